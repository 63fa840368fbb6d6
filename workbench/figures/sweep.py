"""Performance against the number of heads (paper figure 6), beside random heads and no heads."""

from __future__ import annotations

import math

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from workbench.figures.grid import Grid
from workbench.figures.labels import count, escape, fits, interval, missing, shorten
from workbench.figures.marks import numbers, two_digits
from workbench.figures.template import DPS, PAPER, PLAIN, RANDOM, finish, shares, whiskers

# A step aside on the axis of K, so that whiskers at the same K stand side by side.
STEP = 2**0.07
SQUARE = 190  # pixels across the overlaps


def head_count(table: xr.Dataset) -> go.Figure:
    """A task's metric against K, for DPS, random heads and the plain model (paper figure 6).

    Args:
        table: From `sweep_head_count`.

    Returns:
        A row a task. Left: the metric of DPS and of random heads (their mean and each draw)
        against K, with 95 % intervals where there are any, and the plain model as a line with
        its band. A DPS marker is filled where the interval of the paired difference to the plain
        model leaves 0 out, which intervals side by side don't show; each K by itself, uncorrected.
        Right: the Jaccard overlap of the sets for each two K.
    """
    tasks = table["task"].values.tolist()
    grid = Grid(
        2 * len(tasks), (450, SQUARE), SQUARE, gap=(84, 92), left=76, right=20, bottom=56, top=58
    )
    titles = []
    for task in tasks:
        part = table.sel(task=task)
        size = f"{count(int(part['examples']), 'example')} of {count(int(part['users']), 'user')}"
        titles += [f"<b>{shorten(task, 24)}</b>, {size}", "overlap of the sets (Jaccard)"]
    figure = grid.figure(titles)
    for row, task in enumerate(tasks):
        part = table.sel(task=task)
        curve, square = grid.place(2 * row), grid.place(2 * row + 1)
        figure.add_traces(
            [*_plain(part, row == 0), *_random(part, row == 0), _dps(part, row == 0)],
            rows=curve["row"],
            cols=curve["col"],
        )
        figure.add_trace(_nested(part), **square)
        if fits(part.sizes["k"], SQUARE):
            nested = part["nested"].values
            figure.add_trace(numbers(nested, two_digits(nested)), **square)
        metric = f"{escape(part['metric'].item())}<br>({escape(part['better'].item())} is better)"
        figure.update_yaxes(title_text=metric, **curve)
        figure.update_xaxes(title_text="number of heads K (log scale)", **_k_axis(part), **curve)
        names = [str(k) for k in part["k"].values]
        cells = {"tickvals": list(range(len(names))), "ticktext": names, "showgrid": False}
        figure.update_xaxes(title_text="K", **cells, **square)
        figure.update_yaxes(title_text="K", **cells, **square)
    figure.update_layout(
        coloraxis=shares("") | {"showscale": False},
        # Above the titles of the first row.
        legend={"x": 0, "xanchor": "left", "y": 1 + 26 / grid.inner[1], "yanchor": "bottom"},
    )
    return finish(figure, *_titles(table))


def _k_axis(part: xr.Dataset) -> dict[str, object]:
    ks = part["k"].values.tolist()
    ends = [math.log10(end) for end in _ends(part)]
    return {"type": "log", "range": ends, "tickvals": ks, "ticktext": [str(k) for k in ks]}


def _ends(part: xr.Dataset) -> list[float]:
    """The axis of K reaches beyond the smallest and the largest, so that whiskers have room."""
    ks = part["k"].values
    edge = 2**0.45 if len(ks) > 1 else 2.0
    return [ks[0] / edge, ks[-1] * edge]


def _plain(part: xr.Dataset, legend: bool) -> list[go.Scatter]:
    """The line across all K, and its band where there is an interval."""
    mean, low, high = (float(part[name]) for name in ("plain", "plain_low", "plain_high"))
    ends = _ends(part)
    common = {
        "legendgroup": "plain",
        "name": "plain model",
        "legendrank": 4,
        "mode": "lines",
        "hoverinfo": "text",
    }
    line = go.Scatter(
        x=ends,
        y=[mean, mean],
        line={"color": PLAIN, "width": 2, "dash": "dash"},
        hovertext=f"plain model<br>{interval(mean, low, high)}",
        showlegend=legend,
        **common,
    )
    if missing(low):
        return [line]
    band = go.Scatter(
        x=[*ends, *ends[::-1]],
        y=[low, low, high, high],
        fill="toself",
        fillcolor=PLAIN,
        opacity=0.16,
        line={"width": 0},
        showlegend=False,
        **(common | {"hoverinfo": "skip"}),
    )
    return [band, line]


def _random(part: xr.Dataset, legend: bool) -> list[go.Scatter]:
    """The mean over random sets, and each set as a faint point."""
    draws = part["random_draws"].values
    ks = np.repeat(part["k"].values, draws.shape[1])
    single = go.Scatter(
        x=ks * STEP**2,
        y=draws.ravel(),
        name="each random set",
        legendrank=3,
        legendgroup="draws",
        mode="markers",
        marker={"color": RANDOM, "size": 6, "opacity": 0.4},
        hoverinfo="text",
        hovertext=[
            f"K = {k}, one random set: {v:.3f}" for k, v in zip(ks, draws.flat, strict=True)
        ],
        showlegend=legend,
    )
    return [single, _curve(part, "random", RANDOM, STEP, legend)]


def _dps(part: xr.Dataset, legend: bool) -> go.Scatter:
    curve = _curve(part, "dps", DPS, 1 / STEP, legend)
    clear = (part["gain_low"].values > 0) | (part["gain_high"].values < 0)
    curve.marker.color = [DPS if filled else PAPER for filled in clear]
    rows = zip(curve.hovertext, part["heads"].values.tolist(), strict=True)
    curve.hovertext = [
        f"{text}<br>minus plain: {_difference(part, 'gain', i)}"
        f"<br>better than {int(part['beaten'].values[i])} of {part.sizes['draw']} random sets"
        f"<br>{escape(heads if len(heads) < 80 else heads[:79] + '…')}"
        for i, (text, heads) in enumerate(rows)
    ]
    return curve


def _curve(part: xr.Dataset, name: str, color: str, step: float, legend: bool) -> go.Scatter:
    mean, low, high = (part[name + end].values.tolist() for end in ("", "_low", "_high"))
    ks = part["k"].values
    words = {"dps": "DPS", "random": "random heads, mean"}[name]
    return go.Scatter(
        x=ks * step,
        y=mean,
        name=words,
        legendgroup=name,
        legendrank=1 if name == "dps" else 2,
        mode="lines+markers",
        line={"color": color, "width": 2.5},
        marker={
            "color": color,
            "size": 8,
            "symbol": "circle" if name == "dps" else "diamond",
            "line": {"color": color, "width": 2},
        },
        error_y=whiskers(mean, low, high, color),
        hoverinfo="text",
        hovertext=[
            f"<b>{words}</b>, K = {k}<br>{interval(*numbers)}"
            for k, *numbers in zip(ks, mean, low, high, strict=True)
        ],
        showlegend=legend,
    )


def _difference(part: xr.Dataset, name: str, i: int) -> str:
    mean, low, high = (float(part[name + end][i]) for end in ("", "_low", "_high"))
    return interval(mean, low, high, "+.3f")


def _nested(part: xr.Dataset) -> go.Heatmap:
    values, ks = part["nested"].values, part["k"].values
    return go.Heatmap(
        z=values,
        coloraxis="coloraxis",
        hoverinfo="text",
        hovertext=[
            [f"K = {a} and K = {b}: {value:.3f}" for b, value in zip(ks, row, strict=True)]
            for a, row in zip(ks, values, strict=True)
        ],
    )


def _titles(table: xr.Dataset) -> tuple[str, list[str]]:
    attrs = table.attrs
    users = sorted({int(n) for n in table["users"].values})
    who = count(users[0], "user") if len(users) == 1 else f"{users[0]} to {users[-1]} users"
    draws = count(int(attrs["draws"]), "draw")
    note = (
        "whiskers, band: 95 % intervals of users; filled: the paired one of DPS minus plain leaves "
        "0 out, each K alone, uncorrected"
    )
    if all(np.isnan(table[name].values).all() for name in ("dps_low", "plain_low")):
        note = "no intervals: there is only one user, and nothing to resample"
    return f"Performance against the number of heads K, γ = {attrs['gamma']:g}, {who}", [
        f"heads found on {escape(attrs['heads_from'])}; "
        f"random heads: as many in each layer, {draws}",
        note,
    ]
