"""Marks over cells and dots: means below the noise floor, and heads that were not scored."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from workbench.figures.grid import Grid
from workbench.figures.labels import escape, missing
from workbench.figures.template import (
    BODY,
    DIVERGING,
    DPS,
    FAINT,
    INK,
    PAPER,
    SEQUENTIAL,
    UNSCORED,
    readable_on,
)
from workbench.heads import Head

LEGEND = 28  # pixels that a legend takes above the panels
BELOW = "below the noise floor: sums in another order move a mean by as much"
NOT_SCORED = "not scored"
MINUS = "below 0"
WRITTEN = "values"
DOT = 0.2  # of a cell
LARGEST = 7.0
# A minus is on cells at least so far below 0, in parts of the scale; nearer to it all look white.
CLEAR = 1 / 8
# From here on a cell is too dark for a dark mark.
DARK = 5 / 8


def below_noise(group: xr.Dataset, cell: float) -> list[go.Scatter]:
    """A dot on every cell whose mean is below the noise floor; nothing where none is.

    Args:
        group: One group of `HeadScores.mean`.
        cell: Pixels across a cell.
    """
    layers, heads = np.nonzero(group["below_noise"].values)
    if not len(layers):
        return []
    size = min(max(cell * DOT, 1.5), LARGEST)
    return [_points(layers, heads, BELOW, {"color": INK, "size": size, "opacity": 0.7})]


def minus(values: np.ndarray, largest: float, cell: float) -> list[go.Scatter]:
    """A minus on every cell that is clearly below 0; nothing where none is.

    Both ends of the scale are equally dark. The hue tells them apart on a screen, nothing in grey.

    Args:
        values: What is drawn, [layer, head]; NaN is none.
        largest: The end of the colour scale.
        cell: Pixels across a cell.
    """
    layers, heads = np.nonzero(np.nan_to_num(values) < -CLEAR * largest)
    if not len(layers):
        return []
    dark = values[layers, heads] < -DARK * largest
    line = {"color": np.where(dark, PAPER, INK).tolist(), "width": 1.2 if cell > 8 else 0.8}
    marker = {"symbol": "line-ew", "size": min(max(cell * 0.3, 1.5), LARGEST), "line": line}
    return [
        go.Scatter(
            x=heads,
            y=layers,
            name=MINUS,
            mode="markers",
            marker=marker,
            hoverinfo="skip",
            showlegend=False,
        )
    ]


def numbers(values: np.ndarray, texts: list[list[str]], end: float | None = None) -> go.Scatter:
    """Texts in the cells of a heatmap, each in the colour that can be read on its cell.

    Args:
        values: What is drawn, [row, column]; NaN is none, and has no text.
        texts: For each cell; empty for none.
        end: Of a scale centred at 0; without it the scale is that from 0 to 1.
    """
    rows, columns = np.nonzero([[bool(text) for text in row] for row in texts])
    drawn = values[rows, columns]
    colors = (
        readable_on(SEQUENTIAL, drawn)
        if end is None
        else readable_on(DIVERGING, (drawn / (end or 1.0) + 1) / 2)
    )
    return go.Scatter(
        x=columns,
        y=rows,
        name=WRITTEN,
        mode="text",
        text=[texts[row][column] for row, column in zip(rows, columns, strict=True)],
        textfont={"size": BODY, "color": colors},
        hoverinfo="skip",
        showlegend=False,
    )


def two_digits(values: np.ndarray) -> list[list[str]]:
    """What `numbers` writes of values that fit into their cells."""
    return [["" if missing(value) else f"{value:.2f}" for value in row] for row in values.tolist()]


def not_scored(name: str, absent: np.ndarray, cell: float) -> list[go.Heatmap | go.Scatter]:
    """A light cell with a stroke for every head that was not scored; nothing where none is.

    Args:
        name: The group's name.
        absent: True at those heads, [layer, head].
        cell: Pixels across a cell.
    """
    layers, heads = np.nonzero(absent)
    if not len(layers):
        return []
    fill = go.Heatmap(
        z=np.where(absent, 1.0, np.nan),
        colorscale=[[0, UNSCORED], [1, UNSCORED]],
        showscale=False,
        hoverinfo="text",
        hovertext=[
            [
                f"{escape(name)}<br><b>{Head(layer, h)}</b> {NOT_SCORED}" if out else ""
                for h, out in enumerate(row)
            ]
            for layer, row in enumerate(absent.tolist())
        ],
    )
    line = {"color": FAINT, "width": 1}
    size = min(max(cell * 0.45, 2.0), 2 * LARGEST)
    marker = {"symbol": "line-ne", "size": size, "line": line, "opacity": 0.5}
    return [fill, _points(layers, heads, NOT_SCORED, marker)]


def hollow_dot() -> go.Scatter:
    """The legend's entry for a hollow dot, which is drawn nowhere."""
    marker = {"color": PAPER, "size": 8, "line": {"color": DPS, "width": 1.5}}
    none = np.array([np.nan])
    return _points(none, none, BELOW, marker)


def hover_note(group: xr.Dataset, head: Head) -> str:
    """A line for the hover text of a mean below the noise floor; empty for any other."""
    if not group["below_noise"].values[head.layer, head.head]:
        return ""
    return f"<br>below the noise floor, {float(group['noise_floor']):.2g}"


def legend(figure: go.Figure, grid: Grid) -> None:
    """Name each kind of mark once, above the titles of the first row."""
    seen: set[str] = set()
    for trace in figure.data:
        if trace.legendgroup:
            trace.showlegend = trace.legendgroup not in seen
            seen.add(trace.legendgroup)
    figure.update_layout(
        legend={"x": 0, "xanchor": "left", "y": 1 + 24 / grid.inner[1], "yanchor": "bottom"}
    )


def _points(
    layers: np.ndarray, heads: np.ndarray, name: str, marker: dict[str, object]
) -> go.Scatter:
    return go.Scatter(
        x=heads,
        y=layers,
        name=name,
        legendgroup=name,
        mode="markers",
        marker=marker,
        hoverinfo="skip",
    )
