"""Heads by what a target token is about: their scores, and whether two aspects share heads."""

from __future__ import annotations

import math

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from workbench.errors import InputError
from workbench.figures.grid import Grid
from workbench.figures.heatmaps import HELPS
from workbench.figures.labels import count, escape, interval, missing, shorten, thinned, width
from workbench.figures.marks import minus, numbers, two_digits
from workbench.figures.template import GAP, INK, centred, finish, largest, shares
from workbench.heads import Head

UNITS = "PCS (nats per token of the aspect)"
SHOWN = "the interval leaves 0 out, all heads of an aspect tested together"
LETTERS = 16
LEGEND = 28  # pixels that the legend takes above the panels


def aspect_heads(table: xr.Dataset) -> go.Figure:
    """Mean PCS of every head as one heatmap an aspect, all on one colour scale.

    Args:
        table: From `workbench.analysis.aspects.aspects`.

    Returns:
        Layers upwards from L0, heads to the right; colour centred at 0, a minus on what is
        clearly below it; a head that isn't there is a grey gap. A ring marks a head whose
        interval leaves 0 out and whose mean is above the noise floor. Hovering names the head with
        its interval.

    Raises:
        InputError: No head has a score.
    """
    names = [str(name) for name in table["aspect"].values.tolist()]
    values = table["pcs"].values
    if not names or np.isnan(values).all():
        raise InputError("no head of any aspect has a score; there is nothing to draw")
    layers, heads = values.shape[1:]
    grid = _grid(len(names), layers, heads)
    side = grid.widths[0]
    figure = grid.figure(
        [
            f"<b>{shorten(name, LETTERS)}</b>, loss {float(loss):.2g}"
            for name, loss in zip(names, table["nll"].values, strict=True)
        ]
    )
    cell = min(side / heads, grid.height / layers)
    for i, name in enumerate(names):
        place, left, low = grid.place(i), grid.leftmost(i), grid.lowest(i)
        part = table.isel(aspect=i)
        figure.add_trace(_heatmap(part, name), **place)
        for trace in (*minus(values[i], largest(values), cell), _rings(part, cell)):
            figure.add_trace(trace, **place)
        figure.update_xaxes(title_text="head" if low else None, showticklabels=low, **place)
        figure.update_yaxes(title_text="layer" if left else None, showticklabels=left, **place)
    figure.update_xaxes(matches="x", **_cells(heads, side / 26))
    figure.update_yaxes(matches="y", **_cells(layers, grid.height / 17))
    next(trace for trace in figure.data if trace.name == SHOWN).showlegend = True
    figure.update_layout(
        coloraxis=centred(values, UNITS),
        legend={"x": 0, "xanchor": "left", "y": 1 + 24 / grid.inner[1], "yanchor": "bottom"},
    )
    gaps = "; grey: no such head" if np.isnan(values).any() else ""
    meaning = f"{HELPS}; white: 0"
    finish(figure, "PCS of every head by aspect of the target", [_sample(table), meaning + gaps])
    return figure.update_layout(plot_bgcolor=GAP)


def _grid(number: int, layers: int, heads: int) -> Grid:
    rows = math.ceil(number / 4)
    columns = math.ceil(number / rows)
    gap = 24
    side = min((690 - gap * (columns - 1)) / columns, 420)
    # As tall as the colour bar's title is long, if it is a single row.
    height = min(max(side * layers / heads, 240 if rows == 1 else 96), max(side, 240))
    top = 24 + LEGEND
    return Grid(number, (side,) * columns, height, (gap, 42), 58, right=96, bottom=48, top=top)


def _cells(number: int, labels: float) -> dict[str, object]:
    ticks = thinned(number, int(labels))
    return {"range": [-0.5, number - 0.5], "tickvals": ticks, "showgrid": False}


def _heatmap(part: xr.Dataset, name: str) -> go.Heatmap:
    cells = np.stack([part[column].values for column in ("pcs", "low", "high")], axis=-1)
    small = max(cells.shape[:2]) > 16  # gaps would take more room than the cells
    tokens = f"{int(part['tokens']):,} tokens of {count(int(part['users']), 'user')}"

    def hover(head: Head, mean: float, low: float, high: float) -> str:
        if missing(mean):
            return ""
        value = interval(mean, low, high, "+.4f")
        return f"{escape(name)}<br><b>{head}</b> {value}<br>{UNITS}<br>{tokens}"

    return go.Heatmap(
        z=cells[..., 0],
        coloraxis="coloraxis",
        hoverinfo="text",
        hovertext=[
            [hover(Head(layer, h), *numbers) for h, numbers in enumerate(row)]
            for layer, row in enumerate(cells.tolist())
        ],
        xgap=0 if small else 1,
        ygap=0 if small else 1,
    )


def _rings(part: xr.Dataset, cell: float) -> go.Scatter:
    clear = (part["low"].values > 0) | (part["high"].values < 0)
    layers, heads = np.nonzero(clear & ~part["below_noise"].values)
    none = [None]  # the legend's entry needs a point, though not one that is drawn
    return go.Scatter(
        x=heads if len(heads) else none,
        y=layers if len(layers) else none,
        name=SHOWN,
        mode="markers",
        marker={
            "symbol": "circle-open",
            "size": min(max(cell * 0.5, 3.0), 9.0),
            "color": INK,
            "line": {"width": 1.2 if cell > 8 else 0.8},
        },
        hoverinfo="skip",
        showlegend=False,
    )


def _sample(table: xr.Dataset) -> str:
    users = sorted({int(n) for n in table["users"].values})
    who = count(users[0], "user") if len(users) == 1 else f"{users[0]} to {users[-1]} users"
    note = "no intervals: there is one user" if users[-1] < 2 else "each aspect's own tokens"
    return f"mean over the examples of {who}; {note}"


def aspect_overlap(table: xr.Dataset) -> go.Figure:
    """How many heads two aspects share, and how many of it noise would leave.

    Args:
        table: From `workbench.analysis.aspects.aspects`.

    Returns:
        Two matrices with their values written in. Left: Jaccard overlap of the top K sets, the
        diagonal blank. Right: the share of K that the set of one aspect from one half of the
        users has in common with the set of the other from the other half; on the diagonal the same
        aspect, which is as much as noise lets two sets share. A star marks two aspects whose heads
        differ beyond noise.

    Raises:
        InputError: There is a single aspect, which has nothing to be held against.
    """
    names = [str(name) for name in table["aspect"].values.tolist()]
    if len(names) < 2:
        raise InputError("an overlap needs two aspects; score another one")
    side = float(min(max(len(names) * 40, 190), 330))
    label = width(names, LETTERS) + 14
    flat = label < side / len(names)
    grid = Grid(
        2,
        (side, side),
        side,
        gap=(40, 0),
        left=max(label, 40),
        right=96,
        bottom=max(36 if flat else label, 44),
    )
    k = table.attrs["k"]
    figure = grid.figure((f"top {k} of all users (Jaccard)", f"between halves (share of {k})"))
    stars = (table["gap_low"].values > 0) & (table["gap_p"].values <= 1 - table.attrs["level"])
    whole = np.array(table["jaccard"].values, dtype=float)
    np.fill_diagonal(whole, np.nan)
    hover = _pairs(table, names)
    for panel, values in enumerate((whole, table["shared"].values)):
        for trace in _matrix(values, stars, hover):
            figure.add_trace(trace, **grid.place(panel))
    cells = {
        "tickvals": list(range(len(names))),
        "ticktext": [shorten(name, LETTERS) for name in names],
        "ticklabelstandoff": 4,
        "showgrid": False,
        "ticks": "",
        "showline": False,
    }
    edges = (-0.5, len(names) - 0.5)
    figure.update_xaxes(range=edges, tickangle=0 if flat else -90, **cells)
    figure.update_yaxes(range=edges[::-1], **cells)
    figure.update_yaxes(showticklabels=False, **grid.place(1))
    figure.update_layout(coloraxis=shares("share"))
    chance = f"chance: {table.attrs['chance']:.2f} (Jaccard)"
    return finish(
        figure,
        f"Do aspects use different heads? K = {k}",
        [
            f"right: the diagonal is what noise lets two halves of the users share; {chance}",
            "*: the heads differ beyond noise, Holm-adjusted over the pairs",
        ],
    )


def _pairs(table: xr.Dataset, names: list[str]) -> list[list[str]]:
    """Hover text of each two aspects."""
    columns = ("jaccard", "spearman", "shared", "gap", "gap_low", "gap_high")
    cells = np.stack([table[column].values for column in columns], axis=-1).tolist()
    return [
        [
            f"{escape(a)} and {escape(b)}<br>Jaccard {jaccard:.3f}, ranks correlate at "
            f"{spearman:+.2f}<br>between halves they share {_number(shared)} of K"
            + (
                f"<br>short of noise by {interval(gap, low, high, '+.2f')}"
                if not missing(gap)
                else ""
            )
            for b, (jaccard, spearman, shared, gap, low, high) in zip(names, row, strict=True)
        ]
        for a, row in zip(names, cells, strict=True)
    ]


def _number(value: float) -> str:
    return "unknown" if missing(value) else f"{value:.2f}"


def _matrix(
    values: np.ndarray, stars: np.ndarray, hover: list[list[str]]
) -> list[go.Heatmap | go.Scatter]:
    texts = [
        [text + "*" * (star and bool(text)) for text, star in zip(row, marks, strict=True)]
        for row, marks in zip(two_digits(values), stars.tolist(), strict=True)
    ]
    cells = go.Heatmap(
        z=values,
        coloraxis="coloraxis",
        hoverinfo="text",
        hovertext=hover,
    )
    return [cells, numbers(values, texts)]
