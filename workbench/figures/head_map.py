"""One group's head map, to be clicked: scores, how sure they are, and the chosen heads."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from workbench.figures.grid import HEADER
from workbench.figures.labels import count, escape, interval, missing, shorten, thinned
from workbench.figures.marks import below_noise, minus, not_scored
from workbench.figures.template import GAP, INK, PAPER, centred, finish, largest
from workbench.heads import Head, HeadSet

SIDE = 390  # pixels across the cells, and at most from top to bottom
MARGIN = {"l": 52, "r": 92, "b": 44, "t": HEADER + 16}
TRACES = ("scores", "unscored", "strokes", "noise", "minus", "halo", "chosen")
"""What each trace is, in order."""


def head_map(table: xr.Dataset, heads: HeadSet | None = None) -> go.Figure:
    """Mean score of every head of one group, with a frame around the chosen heads.

    Args:
        table: Of `workbench.head_map`.
        heads: The chosen ones.

    Returns:
        Layers upwards from L0, heads to the right; colour centred at 0, a minus on what is
        clearly below it. A head that isn't there is a grey gap, one that wasn't scored a stroke on
        light grey; a dot marks a mean below the noise floor. Hovering names the head with its
        score and interval. There are always the traces of `TRACES`, in that order, empty where
        there is nothing to mark, so that a widget can be changed in place.
    """
    layers, columns = table.sizes["layer"], table.sizes["head"]
    height = float(np.clip(SIDE * layers / columns, 150, SIDE))
    cell = min(SIDE / columns, height / layers)
    values, name = table["mean"].values, str(table.attrs["group"])
    absent = np.isnan(values) & table["exists"].values
    fill, strokes = (*not_scored(name, absent, cell), None, None)[:2]
    grouped = table.assign_coords(group=name)
    # Empty and not left out: what a widget showed before must be gone.
    nothing = go.Scatter(x=[], y=[], mode="markers", hoverinfo="skip")
    traces = [
        _scores(table),
        fill or go.Heatmap(z=_nulls(np.full_like(values, np.nan)), hovertext=[], showscale=False),
        strokes or nothing,
        next(iter(below_noise(grouped, cell)), nothing),
        next(iter(minus(values, largest(values), cell)), nothing),
        *chosen(heads or HeadSet(()), cell),
    ]
    traces[1].z = _nulls(traces[1].z)
    figure = go.Figure(traces)
    figure.update_traces(showlegend=False)
    # A double click would zoom, and two heads clicked in haste are one.
    axis = {"showgrid": False, "showline": False, "fixedrange": True}
    across, up = thinned(columns, int(SIDE / 26)), thinned(layers, int(height / 17))
    figure.update_xaxes(title_text="head", range=[-0.5, columns - 0.5], tickvals=across, **axis)
    figure.update_yaxes(title_text="layer", range=[-0.5, layers - 0.5], tickvals=up, **axis)
    figure.update_layout(
        coloraxis=centred(values, _units(table)),
        width=SIDE + MARGIN["l"] + MARGIN["r"],
        height=height + MARGIN["t"] + MARGIN["b"],
        margin=MARGIN,
        # Dragging would zoom; a click is what the map is for.
        dragmode=False,
    )
    finish(figure, *_titles(table, bool(absent.any())))
    return figure.update_layout(plot_bgcolor=GAP)


def chosen(heads: HeadSet, cell: float) -> list[go.Scatter]:
    """A dark frame with a light one around it on each head: one of them is seen on any colour.

    Args:
        heads: Which.
        cell: Pixels across a cell.
    """
    places = {"x": [head.head for head in heads], "y": [head.layer for head in heads]}
    size = min(max(cell * 0.72, 5.0), 26.0)
    return [
        go.Scatter(
            **places,
            mode="markers",
            hoverinfo="skip",
            marker={
                "symbol": "square-open",
                "color": color,
                "size": size + 2 * (color == PAPER),
                "line": {"width": 2.4 if cell > 12 else 1.6},
            },
        )
        for color in (PAPER, INK)
    ]


def _units(table: xr.Dataset) -> str:
    part = table.attrs["part"]
    return "PCS (nats per target token)" if part == "PCS" else "difference of PCS (nats/token)"


def _nulls(values: np.ndarray) -> list[list[float | None]]:
    """Rows with None for NaN, which a widget could not send."""
    return [[None if missing(v) else v for v in row] for row in np.asarray(values).tolist()]


def _scores(table: xr.Dataset) -> go.Heatmap:
    cells = np.stack([table[name].values for name in ("mean", "low", "high")], axis=-1)
    layers, heads, _ = cells.shape
    below = table["below_noise"].values
    floor = f"<br>below the noise floor, {float(table['noise_floor']):.2g}"
    end = (
        f"<br>{escape(_units(table))}<br>"
        f"{shorten(table.attrs['group'], 40)}, {count(int(table['examples']), 'example')}"
    )
    # Gaps between small cells would take more room than the cells.
    gap = 0 if max(layers, heads) > 16 else 1
    return go.Heatmap(
        z=_nulls(cells[..., 0]),
        coloraxis="coloraxis",
        hoverinfo="text",
        hovertext=[
            [
                ""
                if missing(mean)
                else f"<b>{Head(layer, h)}</b> {interval(mean, low, high, '+.4f')}{end}"
                + (floor if below[layer, h] else "")
                for h, (mean, low, high) in enumerate(row)
            ]
            for layer, row in enumerate(cells.tolist())
        ],
        xgap=gap,
        ygap=gap,
    )


def _titles(table: xr.Dataset, unscored: bool) -> tuple[str, list[str]]:
    part, sample = str(table.attrs["part"]), count(int(table["examples"]), "example")
    if int(table["users"]) > 1:
        sample += f" of {count(int(table['users']), 'user')}"
    kinds = ["" if part == "PCS" else part, str(table.attrs.get("note", ""))]
    title = ", ".join(["PCS of every head", *(escape(kind) for kind in kinds if kind)])
    who = f"{shorten(table.attrs['group'], 30)}, {sample}" if sample[0] != "0" else "no score yet"
    meaning = "red: the loss rises without the head; blue, minus: it falls"
    if unscored and sample[0] == "0":
        meaning = "click heads all the same, or let them be scored"
    return title, [who, meaning]
