"""What panels share: the line of random heads, a note where nothing is drawn, a legend above."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go
import xarray as xr

from workbench.errors import InputError
from workbench.figures.grid import Grid
from workbench.figures.template import BODY, FAINT, RANDOM


def first_groups(table: xr.Dataset, limit: int) -> tuple[xr.Dataset, str]:
    """The first groups of a table, and words that say so where there are more.

    Raises:
        InputError: There is no group to draw.
    """
    total = table.sizes["group"]
    if limit < 1 or not total:
        raise InputError(f"nothing to draw of {total} groups with limit={limit}")
    note = "" if total <= limit else f"the first {limit} of {total} groups; "
    return table.isel(group=slice(limit)), note


def chance_line(figure: go.Figure, chance: float, place: dict[str, int], horizontal: bool) -> None:
    """Draw a dotted line at what random heads give, across a panel."""
    line = {"color": RANDOM, "width": 2, "dash": "dot"}
    draw = figure.add_hline if horizontal else figure.add_vline
    draw(**{"y" if horizontal else "x": chance}, line=line, **place)


def chance_entry(name: str = "random heads") -> go.Scatter:
    """The legend's entry for that line."""
    line = {"color": RANDOM, "width": 2, "dash": "dot"}
    return go.Scatter(x=[None], y=[None], mode="lines", line=line, name=name)


def say(figure: go.Figure, text: str, place: dict[str, int]) -> None:
    """Write a note into the middle of a panel that has nothing to show."""
    figure.add_annotation(
        text=text,
        x=0.5,
        y=0.5,
        xref="x domain",
        yref="y domain",
        font={"color": FAINT, "size": BODY},
        **place,
    )


def legend_above(grid: Grid, pixels: int) -> dict[str, Any]:
    """A legend above the titles of the first row."""
    return {"x": 0, "xanchor": "left", "y": 1 + pixels / grid.inner[1], "yanchor": "bottom"}
