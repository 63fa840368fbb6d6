"""Head weights beside random ones, and what DPS scores under each (paper figure 5)."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from workbench.figures.grid import Grid
from workbench.figures.labels import count, escape, fits, interval, missing, shorten, thinned
from workbench.figures.marks import numbers, two_digits
from workbench.figures.template import BODY, GAP, finish, shares
from workbench.heads import Head

NAMES = {
    "global": "discovered",
    "random-weights": "random weights",
    "random-mask": "random mask",
}
SIDE = 256  # pixels across a panel
LOWEST, HIGHEST = 92, 250  # pixels from its bottom to its top


def head_weights(table: xr.Dataset) -> go.Figure:
    """What each head's weight is, discovered and drawn at random (paper figure 5).

    Args:
        table: From `weight_controls`.

    Returns:
        A row a task, a panel a map, all on one colour scale from 0 (the head is left alone) to 1
        (removed whole); a head that isn't there is a grey gap. Under each panel the task's metric
        when DPS decodes against the model with these weights taken away, with its 95 % interval;
        that of a random map is the mean over its draws, of which the first is drawn.
    """
    tasks, maps = table["task"].values.tolist(), table["map"].values.tolist()
    layers, heads = table.sizes["layer"], table.sizes["head"]
    height = min(max(SIDE * layers / heads, LOWEST), HIGHEST)
    small = fits(heads, SIDE) and height >= layers * 1.2 * BODY
    grid = Grid(
        len(tasks) * len(maps), (SIDE,) * len(maps), height, (30, 122), 58, right=92, bottom=90
    )
    figure = grid.figure(
        [
            (f"<b>{shorten(task, 18)}</b>: " if i == 0 else "") + NAMES.get(name, escape(name))
            for task in tasks
            for i, name in enumerate(maps)
        ]
    )
    for n, (task, name) in enumerate((task, name) for task in tasks for name in maps):
        part, place = table.sel(task=task, map=name), grid.place(n)
        figure.add_trace(_heatmap(part, small), **place)
        if small:
            # A low weight looks much like none; where there is room its number stands in the cell.
            known = np.where(part["weight"] > 0, part["weight"], np.nan)
            figure.add_trace(numbers(known, two_digits(known)), **place)
        figure.update_xaxes(title_text=f"head<br>{_metric(part)}", **place)
        left = grid.leftmost(n)
        figure.update_yaxes(title_text="layer" if left else None, showticklabels=left, **place)
    figure.update_xaxes(matches="x", **_cells(heads, SIDE / 26))
    figure.update_yaxes(matches="y", **_cells(layers, height / 17))
    figure.update_layout(coloraxis=shares("weight"))
    finish(figure, *_titles(table))
    return figure.update_layout(plot_bgcolor=GAP)


def _cells(number: int, labels: float) -> dict[str, object]:
    ticks = thinned(number, int(labels))
    return {"range": [-0.5, number - 0.5], "tickvals": ticks, "showgrid": False}


def _metric(part: xr.Dataset) -> str:
    """The metric under a panel, with its interval where there is one."""
    value, low, high = (float(part[name]) for name in ("value", "value_low", "value_high"))
    ends = "no interval" if missing(low) else f"[{low:.3f}, {high:.3f}]"
    metric, better = shorten(part["metric"].item(), 20), escape(part["better"].item())
    return f"<b>{value:.3f}</b> {ends}<br>{metric}, {better} is better"


def _heatmap(part: xr.Dataset, small: bool) -> go.Heatmap:
    weights = part["weight"].values
    task, name = escape(part["task"].item()), escape(part["map"].item())
    mean, low, high = (float(part[n]) for n in ("value", "value_low", "value_high"))
    below = f"{escape(part['metric'].item())} {interval(mean, low, high)}"
    return go.Heatmap(
        z=weights,
        coloraxis="coloraxis",
        hoverinfo="text",
        hovertext=[
            [
                ""
                if missing(weight)
                else f"{task}, {name}<br><b>{Head(layer, head)}</b> weight {weight:.3f}<br>{below}"
                for head, weight in enumerate(row)
            ]
            for layer, row in enumerate(weights.tolist())
        ],
        xgap=int(small),
        ygap=int(small),
    )


def _titles(table: xr.Dataset) -> tuple[str, list[str]]:
    attrs = table.attrs
    users = sorted({int(n) for n in table["users"].values})
    who = count(users[0], "user") if len(users) == 1 else f"{users[0]} to {users[-1]} users"
    drawn = count(int(attrs["draws"]), "draw")
    note = f"numbers: DPS with γ = {attrs['gamma']:g}, 95 % intervals from {who}"
    if np.isnan(table["value_low"].values).all():
        note = f"numbers: DPS with γ = {attrs['gamma']:g}, no intervals: one user only"
    return "Head weights, discovered and drawn at random, and the metric under each", [
        "0: the head stays, 1: it is removed whole; random: as much in each layer, "
        f"the first of {drawn} is shown, the number is their mean",
        note,
    ]
