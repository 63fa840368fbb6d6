"""Hard against soft routing, beside one global set and random clusters (paper figure 8)."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from workbench.figures.grid import Grid
from workbench.figures.labels import count, escape, interval, missing, shorten
from workbench.figures.template import (
    BODY,
    DPS,
    INK,
    OKABE_ITO,
    PAPER,
    PLAIN,
    RANDOM,
    finish,
    whiskers,
)

ROUTED = {
    "hard": ("hard", OKABE_ITO[2]),
    "soft": ("soft", OKABE_ITO[5]),
    "soft-tempered": ("soft,<br>tempered", OKABE_ITO[4]),
}
# Each arm's label and colour; the others are in figure 5.
ARMS = {
    "plain": ("plain", PLAIN),
    "global": ("global", DPS),
    **ROUTED,
    "random-clusters": ("random<br>clusters", RANDOM),
}
AGAINST = tuple(arm for arm in ARMS if arm not in ("plain", "global"))


def routing(table: xr.Dataset) -> go.Figure:
    """A task's metric under each way of routing, and how much routing tells users apart.

    Args:
        table: From `routing_gain`.

    Returns:
        A row a task. Left: the metric, with 95 % intervals. Middle: the paired difference to one
        global set, a marker filled where the interval leaves 0 out and Holm's p is at most .05.
        Right: the normalised entropy of routing; 1 gives every user the mean of all clusters.
    """
    tasks = table["task"].values.tolist()
    grid = Grid(3 * len(tasks), (368, 250, 176), 186, (86, 96), 74, right=20, bottom=56)
    titles = []
    for task in tasks:
        part = table.sel(task=task)
        clusters = count(int(part["clusters"]), "cluster")
        who = f"{count(int(part['examples']), 'example')}, {count(int(part['users']), 'user')}"
        titles += [
            f"<b>{shorten(task, 18)}</b>, {who}, {clusters}",
            "difference from global, paired",
            "routing entropy",
        ]
    figure = grid.figure(titles)
    for row, task in enumerate(tasks):
        part = table.sel(task=task)
        bars, dots, entropy = (grid.place(3 * row + i) for i in range(3))
        figure.add_trace(_bars(part), **bars)
        metric = f"{escape(part['metric'].item())}<br>({escape(part['better'].item())} is better)"
        figure.update_yaxes(title_text=metric, rangemode="tozero", **bars)
        figure.update_xaxes(**_labels([*ARMS]), **bars)
        figure.add_trace(_dots(part), **dots)
        figure.update_xaxes(**_labels(AGAINST), **dots)
        change = f"change of {escape(part['metric'].item())}"
        figure.update_yaxes(
            title_text=change, zeroline=True, zerolinecolor=INK, zerolinewidth=1, **dots
        )
        figure.add_trace(_entropies(part), **entropy)
        figure.update_xaxes(**_labels([*ROUTED]), **entropy)
        figure.update_yaxes(
            title_text="normalised entropy", range=[0, 1.36], tickvals=[0, 0.5, 1], **entropy
        )
        if int(part["clusters"]) == 1:
            figure.add_annotation(text="one cluster:<br>nothing to route", x=1, y=0.5, **entropy)
    return finish(figure, *_titles(table)).update_layout(showlegend=False)


def _labels(arms: list[str] | tuple[str, ...]) -> dict[str, object]:
    """An axis of arms, numbered from 0 and named below; labels stay level."""
    return {
        "tickvals": list(range(len(arms))),
        "ticktext": [ARMS[arm][0] for arm in arms],
        "range": [-0.6, len(arms) - 0.4],
        "tickangle": 0,
        "showgrid": False,
    }


def _numbers(part: xr.Dataset, name: str, arm: str) -> tuple[float, float, float]:
    row = part.sel(arm=arm)
    mean, low, high = (float(row[name + end]) for end in ("", "_low", "_high"))
    return mean, low, high


def _hover(part: xr.Dataset, arm: str) -> str:
    lines = [f"<b>{escape(arm)}</b>", interval(*_numbers(part, "value", arm))]
    for name, base in (("gain", "plain"), ("edge", "global")):
        p = float(part[f"{name}_p"].sel(arm=arm))
        if not missing(p):
            numbers = interval(*_numbers(part, name, arm), "+.3f")
            lines.append(f"minus {base}: {numbers}, Holm p {p:.3f}")
    return "<br>".join(lines)


def _bars(part: xr.Dataset) -> go.Bar:
    mean, low, high = zip(*(_numbers(part, "value", arm) for arm in ARMS), strict=True)
    return go.Bar(
        x=list(range(len(ARMS))),
        y=mean,
        width=0.66,
        marker={"color": [color for _, color in ARMS.values()]},
        # A bar's missing whisker would be drawn as a dash.
        error_y=None if missing(low[0]) else whiskers(mean, low, high, INK),
        hoverinfo="text",
        hovertext=[_hover(part, arm) for arm in ARMS],
    )


def _dots(part: xr.Dataset) -> go.Scatter:
    mean, low, high = zip(*(_numbers(part, "edge", arm) for arm in AGAINST), strict=True)
    p = [float(part["edge_p"].sel(arm=arm)) for arm in AGAINST]
    clear = [(a > 0 or b < 0) and q <= 0.05 for a, b, q in zip(low, high, p, strict=True)]
    colors = [ARMS[arm][1] for arm in AGAINST]
    return go.Scatter(
        x=list(range(len(AGAINST))),
        y=mean,
        mode="markers",
        marker={
            "size": 9,
            "color": [c if filled else PAPER for c, filled in zip(colors, clear, strict=True)],
            "line": {"color": colors, "width": 2},
        },
        error_y=whiskers(mean, low, high, INK),
        hoverinfo="text",
        hovertext=[_hover(part, arm) for arm in AGAINST],
    )


def _entropies(part: xr.Dataset) -> go.Bar:
    values = [float(part["entropy"].sel(arm=arm)) for arm in ROUTED]
    temperatures = [float(part["temperature"].sel(arm=arm)) for arm in ROUTED]
    uniform = [bool(part["uniform"].sel(arm=arm)) for arm in ROUTED]
    texts = [
        "" if missing(v) else f"{v:.3f}" + "<br>uniform" * flat
        for v, flat in zip(values, uniform, strict=True)
    ]
    return go.Bar(
        x=list(range(len(ROUTED))),
        y=values,
        width=0.66,
        text=texts,
        textposition="outside",
        textangle=0,
        constraintext="none",
        cliponaxis=False,
        textfont={"size": BODY},
        marker={"color": [color for _, color in ROUTED.values()]},
        hoverinfo="text",
        hovertext=[
            f"<b>{arm}</b>, normalised entropy {value:.3f}"
            + ("" if missing(t) else f"<br>temperature {t:.3g}")
            + "<br>uniform to two digits" * flat
            for arm, value, t, flat in zip(ROUTED, values, temperatures, uniform, strict=True)
        ],
    )


def _titles(table: xr.Dataset) -> tuple[str, list[str]]:
    attrs = table.attrs
    note = (
        "whiskers: 95 % intervals from resampled users; filled: the paired interval leaves 0 out "
        "and Holm's p ≤ .05"
    )
    if np.isnan(table["value_low"].values).all():
        note = "no intervals: there is only one user, and nothing to resample"
    return (
        f"Does routing users to heads of their cluster beat one global set? γ = {attrs['gamma']:g}",
        [
            f"entropy 1: every user gets the mean of all clusters; about {attrs['size']} users a "
            f"cluster, {escape(attrs['embedder'])}; random clusters: mean of "
            f"{count(int(attrs['draws']), 'draw')}",
            note,
        ],
    )
