"""How far head sets can be trusted: heads found again, profiles with strangers' items, cheaper
scores against exact ones. Examples needed are in `counts`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from workbench.figures.grid import Grid
from workbench.figures.labels import count, escape, interval, missing, shorten, thinned, width
from workbench.figures.marks import LEGEND
from workbench.figures.reference import chance_entry, chance_line, first_groups, legend_above, say
from workbench.figures.template import (
    DPS,
    GAP,
    INK,
    OKABE_ITO,
    PAPER,
    finish,
    shares,
    whiskers,
)
from workbench.heads import Head


def recurrence(table: xr.Dataset, limit: int = 9) -> go.Figure:
    """How often each head is in the top K of users drawn anew, a heatmap a group.

    Args:
        table: From `recurrence`.
        limit: Draw the first so many groups.

    Returns:
        Layers upwards from L0, heads to the right, shares from 0 to 1; a dot marks the heads of
        the set that all examples give; grey where there is no head.

    Raises:
        InputError: There is no group to draw.
    """
    table, note = first_groups(table, limit)
    groups = table["group"].values.tolist()
    layers, heads = table.sizes["layer"], table.sizes["head"]
    columns = min(len(groups), 3)
    side = 400.0 if columns == 1 else (720 - 28 * (columns - 1)) / columns
    height = min(max(side * layers / heads, 150), side)
    top = 24 + LEGEND
    grid = Grid(len(groups), (side,) * columns, height, (28, 70), 58, right=96, bottom=52, top=top)
    titles = []
    for name in groups:
        firm = float(table["firm"].sel(group=name))
        firmly = "" if missing(firm) else f", {firm:.0f} firm"
        titles.append(f"<b>{shorten(name, int(side / 9))}</b>{firmly}")
    figure = grid.figure(titles)
    for panel, name in enumerate(groups):
        place, part = grid.place(panel), table.sel(group=name)
        figure.add_trace(_shares(part, max(layers, heads) > 16), **place)
        if part["share"].isnull().all():
            say(figure, "a single user:<br>nothing to draw anew", place)
        figure.add_trace(_members(part, min(side / heads, height / layers), panel == 0), **place)
        low, left = grid.lowest(panel), grid.leftmost(panel)
        figure.update_xaxes(title_text="head" if low else None, showticklabels=low, **place)
        figure.update_yaxes(title_text="layer" if left else None, showticklabels=left, **place)
    for update, number, room in (
        (figure.update_xaxes, heads, side / 26),
        (figure.update_yaxes, layers, height / 17),
    ):
        ticks = thinned(number, int(room))
        update(range=[-0.5, number - 0.5], tickvals=ticks, showgrid=False)
    figure.update_layout(
        coloraxis=shares("share of resamples"),
        legend=legend_above(grid, 24) | {"itemsizing": "constant"},
    )
    attrs = table.attrs
    unit = "examples" if attrs["by"] == "user" else "users"
    title = f"How often is each head in the top {attrs['k']} of {unit} drawn anew?"
    lines = [
        f"{note}share of {attrs['draws']:,} resamples of the {unit} with the head in the top K",
        f"firm: in at least {attrs['firm_share']:.0%} of them",
    ]
    return finish(figure, title, lines).update_layout(plot_bgcolor=GAP)


def _shares(part: xr.Dataset, small: bool) -> go.Heatmap:
    name = escape(part["group"].item())
    hover = [
        [
            ""
            if missing(share)
            else f"{name}<br><b>{Head(layer, h)}</b> in {share:.1%} of resamples<br>"
            + ("in the set of all examples" if inside == 1 else "not in the set of all examples")
            for h, (share, inside) in enumerate(zip(row, within, strict=True))
        ]
        for layer, (row, within) in enumerate(
            zip(part["share"].values.tolist(), part["member"].values.tolist(), strict=True)
        )
    ]
    gap = 0 if small else 1
    return go.Heatmap(
        z=part["share"].values,
        coloraxis="coloraxis",
        hoverinfo="text",
        hovertext=hover,
        xgap=gap,
        ygap=gap,
    )


def _members(part: xr.Dataset, cell: float, legend: bool) -> go.Scatter:
    layers, heads = np.nonzero(part["member"].values == 1)
    size = min(max(cell * 0.3, 3.0), 8.0)
    return go.Scatter(
        x=heads,
        y=layers,
        mode="markers",
        marker={"color": PAPER, "size": size, "line": {"color": INK, "width": 1}},
        name="in the top K of all examples",
        showlegend=legend,
        hoverinfo="skip",
    )


# What a share of strangers' items does: column, title and axis.
EFFECTS = (
    ("jaccard", "overlap with the clean top K", "Jaccard with the clean set"),
    ("pcs", "score of the clean top K", "PCS (nats per token)"),
    ("cost", "what it costs the plain model", "added loss (nats per token)"),
)


def profile_noise(table: xr.Dataset, limit: int = 6) -> go.Figure:
    """Heads and scores against the share of profile items that are a stranger's.

    Args:
        table: From `profile_noise`.
        limit: Draw the first so many groups.

    Returns:
        A row a group: the overlap with the clean set, the score of the clean heads, and the plain
        model's added loss, with 95 % intervals; hollow at 0, where nothing is swapped.

    Raises:
        InputError: There is no group to draw.
    """
    table, some = first_groups(table, limit)
    groups = table["group"].values.tolist()
    grid = Grid(
        3 * len(groups), (215,) * 3, 170, (96, 76), 76, right=24, bottom=56, top=24 + LEGEND
    )
    titles = []
    for name in groups:
        titles += [f"<b>{shorten(name, 22)}</b>: overlap", *(words for _, words, _ in EFFECTS[1:])]
    figure = grid.figure(titles)
    for row, name in enumerate(groups):
        part = table.sel(group=name)
        for column, (key, words, axis) in enumerate(EFFECTS):
            place = grid.place(3 * row + column)
            figure.add_trace(_effect(part, key, words), **place)
            figure.update_yaxes(title_text=axis, rangemode="tozero", **place)
            if key == "jaccard":
                figure.update_yaxes(range=[0, 1.05], tickvals=[0, 0.5, 1], **place)
                chance_line(figure, table.attrs["chance"], place, horizontal=True)
            else:
                figure.update_yaxes(zeroline=True, zerolinecolor=INK, zerolinewidth=1, **place)
    figure.update_xaxes(
        title_text="share of items swapped", range=[-0.06, 1.06], tickvals=[0, 0.5, 1]
    )
    figure.add_trace(chance_entry(), **grid.place(0))
    figure.update_layout(legend=legend_above(grid, 24))
    users = sorted({int(n) for n in table["users"].values})
    who = count(users[0], "user") if len(users) == 1 else f"{users[0]} to {users[-1]} users"
    note = "whiskers: 95 % intervals from resampled users; hollow: nothing swapped"
    if table["drop_low"].isnull().all():
        note = "no intervals: a single user; hollow: nothing swapped"
    return finish(
        figure,
        f"Heads, scores and loss as a stranger's items replace the user's, K = {table.attrs['k']}",
        [f"{some}targets stay the user's, {who}; clean: the user's own profile", note],
    )


def _effect(part: xr.Dataset, key: str, words: str) -> go.Scatter:
    """One curve; at 0 is what the clean scores give."""
    mean, low, high = (part[key + end].values.tolist() for end in ("", "_low", "_high"))
    at_zero = {"jaccard": (1.0, math.nan, math.nan), "cost": (0.0, math.nan, math.nan)}
    first = at_zero.get(key) or tuple(float(part["clean" + end]) for end in ("", "_low", "_high"))
    rows = [first, *zip(mean, low, high, strict=True)]
    shares = [0.0, *part["swapped"].values.tolist()]
    y, down, up = (list(values) for values in zip(*rows, strict=True))
    spec = ".3f" if key == "jaccard" else "+.4f"
    return go.Scatter(
        x=shares,
        y=y,
        mode="lines+markers",
        line={"color": DPS, "width": 2},
        marker={
            "color": [PAPER, *[DPS] * len(mean)],
            "size": 8,
            "line": {"color": DPS, "width": 2},
        },
        error_y=whiskers(y, down, up, DPS),
        cliponaxis=False,
        showlegend=False,
        hoverinfo="text",
        hovertext=[
            f"{escape(part['group'].item())}, {share:.0%} swapped<br>{words}<br>"
            + ("none" if missing(row[0]) else f"<b>{interval(row[0], row[1], row[2], spec)}</b>")
            for share, row in zip(shares, rows, strict=True)
        ],
    )


def precision(table: xr.Dataset, limit: int = 40) -> go.Figure:
    """Share of the exact top K that cheaper scores find, and their rank correlation.

    Args:
        table: From `precision`.
        limit: Draw the first so many groups.

    Returns:
        A line a group and a colour a run; a dotted line at what random heads give.

    Raises:
        InputError: There is no group to draw.
    """
    table, note = first_groups(table, limit)
    groups, runs = table["group"].values.tolist(), table["run"].values.tolist()
    label = width(groups, 22) + 18
    row = min(max(14 * len(runs) + 10, 26), 60)
    grid = Grid(
        2,
        (280, 280),
        float(max(row * len(groups), 60)),
        gap=(60, 0),
        left=max(label, 60),
        right=30,
        bottom=56,
        top=24 + LEGEND,
    )
    k = table.attrs["k"]
    figure = grid.figure((f"share of the exact top {k} found", "Spearman of mean scores"))
    for panel, key in enumerate(("precision", "spearman")):
        place = grid.place(panel)
        for index, name in enumerate(runs):
            part = table.sel(run=name)
            step = (index - (len(runs) - 1) / 2) * 0.6 / max(len(runs), 1)
            figure.add_trace(_found(part, key, step, index, panel == 0), **place)
        figure.update_yaxes(
            tickvals=list(range(len(groups))),
            ticktext=[shorten(name, 22) for name in groups],
            range=[len(groups) - 0.5, -0.5],
            showticklabels=panel == 0,
            ticks="outside" if panel == 0 else "",
            **place,
        )
    signed = float(np.nanmin(table["spearman"].values, initial=0.0)) < 0
    figure.update_xaxes(
        title_text="precision", range=[-0.03, 1.05], tickvals=[0, 0.5, 1], **grid.place(0)
    )
    figure.update_xaxes(
        title_text="rank correlation", range=[-1.05 if signed else -0.03, 1.05], **grid.place(1)
    )
    chance_line(figure, table.attrs["chance"], grid.place(0), horizontal=False)
    figure.add_trace(chance_entry(), **grid.place(0))
    figure.update_layout(legend=legend_above(grid, 24))
    return finish(
        figure,
        f"Do cheaper scores find the heads that exact ones find? K = {k}",
        [
            f"{note}the same examples scored both ways; {table.attrs['heads']:,} heads",
            "a screened run correlates over the heads that it scored exactly",
        ],
    )


def _found(part: xr.Dataset, key: str, step: float, index: int, legend: bool) -> go.Scatter:
    values: Sequence[float] = part[key].values.tolist()
    name = escape(part["run"].item())
    symbols = ("circle", "diamond", "square", "cross", "x", "star")
    return go.Scatter(
        x=values,
        y=[place + step for place in range(len(values))],
        mode="markers",
        name=name,
        legendgroup=name,
        showlegend=legend,
        marker={
            "color": (DPS, *OKABE_ITO[2:])[index % 7],
            "symbol": symbols[index % 6],
            "size": 10,
        },
        cliponaxis=False,
        hoverinfo="text",
        hovertext=[
            f"{name}, {escape(group)}<br><b>{value:.3f}</b> over {int(heads)} scored heads"
            for group, value, heads in zip(
                part["group"].values.tolist(), values, part["compared"].values, strict=True
            )
        ],
    )
