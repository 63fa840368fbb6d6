"""Scores of every head: heatmaps by user or task (paper figure 3), and a ranking."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from workbench.errors import InputError
from workbench.figures.grid import Grid
from workbench.figures.labels import count, escape, interval, missing, shorten, thinned
from workbench.figures.marks import (
    LEGEND,
    below_noise,
    hollow_dot,
    hover_note,
    legend,
    minus,
    not_scored,
)
from workbench.figures.template import (
    DPS,
    FAINT,
    GAP,
    INK,
    PAPER,
    centred,
    finish,
    largest,
    whiskers,
)
from workbench.heads import Head, rank
from workbench.scores import By, HeadScores

UNITS = "PCS (nats per target token)"
HELPS = "red: the loss rises without the head, it helps; blue, minus: it falls, the head hurts"
# Panels of one ranking figure; a ranking is tall.
RANKINGS = 9


def user_heatmaps(scores: HeadScores, by: By = "user", limit: int = 10) -> go.Figure:
    """Mean PCS of every head as one heatmap a group (paper figure 3), all on one colour scale.

    Args:
        scores: PCS per example.
        by: One heatmap a `user` or a `task`, or `all` in one.
        limit: Draw the first so many groups, in order of appearance.

    Returns:
        Layers upwards from L0, heads to the right; colour centred at 0, a minus on what is
        clearly below it; a head that isn't there is a grey gap, one that wasn't scored a stroke
        on light grey. A dot marks a mean that is below the noise floor. Hovering
        names the head with its 95 % interval.

    Raises:
        InputError: There is nothing to draw.
    """
    shown, total = _first(scores, by, limit)
    table = shown.mean(by)
    names = table["group"].values.tolist()
    absent = _unscored(shown, table)
    marked = int(absent.any()) + int(table["below_noise"].any())
    grid = _heatmap_grid(len(names), table.sizes["layer"], table.sizes["head"], marked)
    side = grid.widths[0]
    cell = min(side / table.sizes["head"], grid.height / table.sizes["layer"])
    figure = grid.figure([_panel_title(name, by, int(side / 7.5)) for name in names])
    end = largest(table["mean"].values)
    for i, name in enumerate(names):
        place, left, low = grid.place(i), grid.leftmost(i), grid.lowest(i)
        group = table.sel(group=name)
        figure.add_trace(_heatmap(group), **place)
        # A mean below the noise floor has its dot; its sign says nothing.
        signed = np.where(group["below_noise"], np.nan, group["mean"])
        for trace in (
            *not_scored(name, absent[i], cell),
            *minus(signed, end, cell),
            *below_noise(group, cell),
        ):
            figure.add_trace(trace, **place)
        figure.update_xaxes(title_text="head" if low else None, showticklabels=low, **place)
        figure.update_yaxes(title_text="layer" if left else None, showticklabels=left, **place)
    # One pair of axes for all: zooming into a head shows it for every group.
    figure.update_xaxes(matches="x", **_cells(table.sizes["head"], side / 26))
    figure.update_yaxes(matches="y", **_cells(table.sizes["layer"], grid.height / 17))
    figure.update_layout(coloraxis=centred(table["mean"].values, UNITS))
    legend(figure, grid)
    finish(figure, *_heatmap_titles(shown, table, by, total))
    return figure.update_layout(plot_bgcolor=GAP)


def ranked_heads(scores: HeadScores, by: By = "all", limit: int = 20) -> go.Figure:
    """The heads with the highest mean PCS, with their 95 % intervals.

    Args:
        scores: PCS per example.
        by: One ranking of `all` examples, or one a `task` or `user` (the first nine).
        limit: Heads in a ranking.

    Returns:
        Dots with whiskers, the highest at the top, and a line at 0. A mean without an interval
        has no whiskers; one below the noise floor is a hollow dot. Heads that weren't scored are
        left out.

    Raises:
        InputError: There is nothing to draw.
    """
    if limit < 1:
        raise InputError(f"a ranking needs at least 1 head, got limit={limit}")
    shown, total = _first(scores, by, RANKINGS)
    table = shown.mean(by)
    names = table["group"].values.tolist()
    rows = min(limit, int((~np.isnan(table["mean"].values)).sum(axis=(1, 2)).max()))
    if not rows:
        raise InputError(
            f"no head was scored on all examples of a group by {by}; draw the groups that the "
            "heads were screened for"
        )
    columns = min(len(names), 3)
    widths = (630,) if columns == 1 else ((870 - 66 * (columns - 1)) / columns,) * columns
    marked = any(_ranked_below(table.sel(group=name), rows) for name in names)
    top = 24 + LEGEND * marked
    grid = Grid(len(names), widths, 19 * rows + 12, (66, 84), 66, right=24, bottom=52, top=top)
    figure = grid.figure([_panel_title(name, by, 32) for name in names])
    for i, name in enumerate(names):
        dots = _ranking(table.sel(group=name), rows)
        figure.add_trace(dots, **grid.place(i))
        figure.update_yaxes(tickvals=dots.y, ticktext=dots.customdata, **grid.place(i))
    figure.update_yaxes(range=[0.4 - rows, 0.6])
    figure.update_xaxes(
        title_text=UNITS,
        matches="x",
        rangemode="tozero",
        zeroline=True,
        zerolinecolor=INK,
        zerolinewidth=1,
    )
    if marked:
        figure.add_trace(hollow_dot(), **grid.place(0))
        legend(figure, grid)
    return finish(figure, *_ranking_titles(shown, table, by, total, rows))


def _first(scores: HeadScores, by: By, limit: int) -> tuple[HeadScores, int]:
    """The scores of the first groups, and how many groups there are."""
    names = list(scores.groups(by))
    examples = scores.data.sizes["example"]
    if limit < 1 or np.isnan(scores.data["pcs"].values).all():
        raise InputError(
            f"nothing to draw of {count(examples, 'scored example')} with limit={limit}; "
            "score at least one example and draw at least one group"
        )
    if by == "user":
        return scores.select(users=names[:limit]), len(names)
    return (scores.select(tasks=names[:limit]) if by == "task" else scores), len(names)


def _unscored(scores: HeadScores, table: xr.Dataset) -> np.ndarray:
    """Heads that the model has and the group has no mean of, [group, layer, head]."""
    shape = np.asarray(scores.heads_per_layer)
    exists = np.arange(table.sizes["head"])[None, :] < shape[:, None]
    return np.isnan(table["mean"].values) & exists


def _heatmap_grid(number: int, layers: int, heads: int, marked: int) -> Grid:
    rows = math.ceil(number / 5)
    columns = math.ceil(number / rows)
    gap, room = 24, 690
    side = min((room - gap * (columns - 1)) / columns, 520)
    # Cells are square where that makes a panel neither flat nor taller than is useful; a single
    # row must be as tall as the title of the colour bar is long.
    height = min(max(side * layers / heads, 190 if rows == 1 else 84), max(side, 240))
    top = 24 + LEGEND * marked
    return Grid(number, (side,) * columns, height, (gap, 42), 58, right=96, bottom=48, top=top)


def _cells(number: int, labels: float) -> dict[str, object]:
    """An axis along cells, with as many integers as there is room for."""
    ticks = thinned(number, int(labels))
    return {"range": [-0.5, number - 0.5], "tickvals": ticks, "showgrid": False}


def _panel_title(name: str, by: By, letters: int) -> str:
    return "" if by == "all" else shorten(name, letters)


def _hover(group: xr.Dataset, head: Head, numbers: Sequence[float]) -> str:
    mean, low, high = numbers
    return (
        f"{escape(group['group'].item())}<br><b>{head}</b> {interval(mean, low, high, '+.4f')}<br>"
        f"{UNITS}<br>{count(int(group['examples']), 'example')}{hover_note(group, head)}"
    )


def _columns(group: xr.Dataset) -> np.ndarray:
    """Mean, low and high as [layer, head, 3]; NaN stays."""
    return np.stack([group[name].values for name in ("mean", "low", "high")], axis=-1)


def _heatmap(group: xr.Dataset) -> go.Heatmap:
    cells = _columns(group)
    layers, heads, _ = cells.shape
    # Gaps between small cells would take more room than the cells.
    gap = 0 if max(layers, heads) > 16 else 1
    return go.Heatmap(
        z=cells[..., 0],
        coloraxis="coloraxis",
        hoverinfo="text",
        hovertext=[
            [
                "" if missing(cell[0]) else _hover(group, Head(layer, h), cell)
                for h, cell in enumerate(row)
            ]
            for layer, row in enumerate(cells.tolist())
        ],
        xgap=gap,
        ygap=gap,
    )


def _sample(scores: HeadScores) -> str:
    users = len(scores.groups("user"))
    examples = scores.data.sizes["example"]
    return f"mean over {count(examples, 'example')} of {count(users, 'user')}"


def _which(scores: HeadScores, by: By, total: int) -> str:
    """Whose means are drawn."""
    if by == "all":
        return _sample(scores)
    drawn = len(scores.groups(by))
    part = f"the first {drawn} of {total} {by}s" if drawn < total else count(total, by)
    return f"{part}; mean over each {by}'s examples"


def _what(scores: HeadScores) -> str:
    estimated = scores.manifest.get("settings", {}).get("method") == "attribution"
    return "estimated PCS" if estimated else "PCS"


def _heatmap_titles(
    scores: HeadScores, table: xr.Dataset, by: By, total: int
) -> tuple[str, list[str]]:
    what = _what(scores)
    title = f"{what[0].upper()}{what[1:]} of every head" + (
        "" if by == "all" else f", {by} by {by}"
    )
    missing_heads = np.isnan(table["mean"].values) & ~_unscored(scores, table)
    gaps = "; grey: no such head" if missing_heads.any() else ""
    meaning = f"{HELPS}; white: 0"
    return title, [_which(scores, by, total), meaning + gaps]


def _ranked_below(group: xr.Dataset, limit: int) -> bool:
    """Whether any head of a ranking is below the noise floor."""
    best = rank(group["mean"].values)[:limit]
    return any(group["below_noise"].values[head.layer, head.head] for head in best)


def _ranking(group: xr.Dataset, limit: int) -> go.Scatter:
    cells = _columns(group)
    best = rank(cells[..., 0])[:limit]
    numbers = np.array([cells[head.layer, head.head] for head in best]).reshape(-1, 3)
    mean, low, high = numbers.T.tolist()
    below = [bool(group["below_noise"].values[head.layer, head.head]) for head in best]
    return go.Scatter(
        x=mean,
        y=[-i for i in range(len(best))],
        mode="markers",
        marker={
            "color": [PAPER if under else DPS for under in below],
            "size": 8,
            "line": {"color": DPS, "width": 1.5},
        },
        error_x=whiskers(mean, low, high, FAINT),
        customdata=[str(head) for head in best],
        hoverinfo="text",
        hovertext=[_hover(group, h, n) for h, n in zip(best, numbers.tolist(), strict=True)],
        showlegend=False,
    )


def _ranking_titles(
    scores: HeadScores, table: xr.Dataset, by: By, total: int, rows: int
) -> tuple[str, list[str]]:
    heads = int((~np.isnan(table["mean"].values)).any(axis=0).sum())
    title = f"Heads by mean {_what(scores)}: the highest {rows} of {heads}"
    if heads < sum(scores.heads_per_layer):
        title += " scored"
    unit = "example" if by == "user" else "user"
    note = f"whiskers: 95 % intervals from resampled {unit}s, not corrected for picking the highest"
    if np.isnan(table["low"].values).all():
        note = f"no intervals: there is only one {unit}, and nothing to resample"
    return title + ("" if by == "all" else f", {by} by {by}"), [_which(scores, by, total), note]
