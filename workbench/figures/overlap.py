"""Overlap of head sets (paper figure 4), beside the numbers that it must be read against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from workbench.figures.grid import Grid
from workbench.figures.labels import count, escape, fits, missing, shorten, thinned, width
from workbench.figures.marks import numbers, two_digits
from workbench.figures.template import (
    BODY,
    DPS,
    FAINT,
    INK,
    PLAIN,
    RANDOM,
    finish,
    shares,
)

LETTERS = 18
# What the mean must be read against: attribute, words, colour and symbol.
REFERENCES = (
    ("mean", "mean over all pairs", DPS, "circle"),
    ("same", "halves of one {by}'s examples", PLAIN, "square"),
    ("others", "halves of two {by}s' examples", PLAIN, "square-open"),
    ("layer_chance", "chance, as many heads in each layer", RANDOM, "diamond"),
    ("chance", "chance, any heads", RANDOM, "circle-open"),
)


def overlap(table: xr.DataArray) -> go.Figure:
    """Pairwise Jaccard overlap as a heatmap in [0, 1] with a blank diagonal (paper figure 4).

    Args:
        table: From `user_overlap`, or from `jaccard`, which has no numbers to read it against.

    Returns:
        The matrix, values written where cells have room for them; for a table of `user_overlap` a
        second panel with the mean over pairs, what halves of the examples share and two kinds of
        chance. A number that can't be had is said to be so, not drawn.
    """
    names = [str(name) for name in table["set"].values.tolist()]
    references = [row for row in REFERENCES if row[0] in table.attrs]
    side = float(min(max(len(names) * 34, 270), 448))
    label = width(names, LETTERS) + 14
    flat = label < side / len(names)
    grid = Grid(
        2 if references else 1,
        (side, 220) if references else (side,),
        side,
        gap=(118, 0),
        left=max(label, 40),
        right=40 if references else 90,
        bottom=max(36 if flat else label, 52),
    )
    figure = grid.figure(("", "to be read against") if references else ())
    # A set overlaps fully with itself: that says nothing, and would draw every eye.
    values = np.array(table.values, dtype=float)
    np.fill_diagonal(values, np.nan)
    figure.add_trace(_matrix(values, names), **grid.place(0))
    if fits(len(names), side):
        figure.add_trace(numbers(values, two_digits(values)), **grid.place(0))
    ticks = thinned(len(names), int(side / 14))
    cells = {
        "tickvals": ticks,
        "ticktext": [shorten(names[i], LETTERS) for i in ticks],
        "ticklabelstandoff": 4,
        "showgrid": False,
        "ticks": "",
        "showline": False,
    }
    edges = (-0.5, len(names) - 0.5)
    figure.update_xaxes(range=edges, tickangle=0 if flat else -90, **cells, **grid.place(0))
    figure.update_yaxes(range=edges[::-1], **cells, **grid.place(0))
    if len(names) == 1:
        figure.add_annotation(text="one set, no pair to compare", x=0, y=0, **grid.place(0))
    if references:
        _add_references(figure, table.attrs, references)
    figure.update_layout(
        coloraxis=shares("Jaccard"),
        coloraxis_colorbar={"x": side / grid.inner[0], "xpad": 12},
    )
    return finish(figure, *_titles(table, len(names), bool(references)))


def _matrix(values: np.ndarray, names: list[str]) -> go.Heatmap:
    hover = [
        [
            "" if missing(value) else f"{escape(a)}<br>{escape(b)}<br><b>Jaccard {value:.3f}</b>"
            for b, value in zip(names, row, strict=True)
        ]
        for a, row in zip(names, values.tolist(), strict=True)
    ]
    return go.Heatmap(
        z=values,
        coloraxis="coloraxis",
        hoverinfo="text",
        hovertext=hover,
    )


def _add_references(
    figure: go.Figure, attrs: Mapping[str, Any], references: list[tuple[str, str, str, str]]
) -> None:
    """Draw each number on its own line, with its words above it and its value beside it."""
    by = attrs.get("by", "set")
    for line, (name, phrase, color, symbol) in enumerate(references):
        value, height = attrs[name], len(references) - 1 - line
        words = phrase.format(by=by)
        known = not missing(value)
        figure.add_annotation(
            text=words if known else f"{words}:<br>cannot be had",
            x=0,
            xanchor="left",
            xref="x2",
            y=height,
            yanchor="bottom",
            yref="y2",
            yshift=8,
            align="left",
            showarrow=False,
            font={"size": BODY, "color": INK if known else FAINT},
        )
        if known:
            figure.add_trace(_dot(value, height, words, color, symbol), row=1, col=2)
    figure.update_xaxes(
        range=[-0.03, 1.14], tickvals=[0, 0.5, 1], title_text="Jaccard", row=1, col=2
    )
    figure.update_yaxes(
        range=[-0.4, len(references) - 0.35],
        tickvals=list(range(len(references))),
        showticklabels=False,
        ticks="",
        showline=False,
        row=1,
        col=2,
    )


def _dot(value: float, height: int, words: str, color: str, symbol: str) -> go.Scatter:
    return go.Scatter(
        x=[value],
        y=[height],
        name=words,
        mode="markers+text",
        marker={"color": color, "symbol": symbol, "size": 11, "line": {"width": 2, "color": color}},
        text=[f"{value:.3f}"],
        textposition="middle right",
        hoverinfo="text",
        hovertext=[f"{words}: {value:.4f}"],
        cliponaxis=False,
        showlegend=False,
    )


def _titles(table: xr.DataArray, sets: int, references: bool) -> tuple[str, list[str]]:
    k, by = table.attrs["k"], table.attrs.get("by", "set")
    size = f"{k[0]}" if len(k) == 1 else f"{k[0]} to {k[-1]}"
    total = int(table.attrs.get("sets", sets))
    shown = count(sets, by) if sets == total else f"the first {sets} of {total} {by}s"
    title = f"Do {by}s share heads? Overlap of head sets, K = {size}, {shown}"
    lines = ["Jaccard of each pair: shared heads over the heads of either; diagonal left blank"]
    if references:
        lines.append(
            f"beside it: what two halves of one {by}'s examples share, and what chance gives"
        )
    return title, lines
