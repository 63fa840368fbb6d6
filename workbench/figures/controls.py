"""Is it preference, or is it damage: users' text against text of nobody, and specific heads."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from workbench.errors import InputError
from workbench.figures.classes import COLOURS, ENDS, SYMBOLS, UNITS, legend_above, reach
from workbench.figures.grid import Grid
from workbench.figures.labels import (
    count,
    escape,
    interval,
    missing,
    shorten,
    thinned,
)
from workbench.figures.marks import minus
from workbench.figures.template import (
    FAINT,
    GAP,
    INK,
    OTHER,
    PAPER,
    centred,
    finish,
    largest,
    whiskers,
)
from workbench.heads import Head

PANELS = 9  # groups in a figure
BARS = 128  # more heads than this have no error bars unless they are of a class
SIDES = {1: 560, 2: 360, 3: 250}  # of a panel, by their number in a row
HEIGHT = 260
COLUMNS = {
    "none": "own − no profile",
    "stranger": "own − a stranger's",
    "shuffled": "own − words shuffled",
}
OUTLINED = "the interval leaves 0 out, all heads of a task tested together"


def damage(table: xr.Dataset) -> go.Figure:
    """Damage to the users' text against damage to neutral text, a point a head.

    Args:
        table: From `workbench.analysis.controls.damage`.

    Returns:
        A panel a group. Colours are head classes, the first that a head belongs to, and the
        subtitle says that these were chosen by the scores that are shown; whiskers are 95 %
        intervals of each head by itself. On the diagonal, removing a head costs both texts
        alike; above it, the users' text more.

    Raises:
        InputError: No head has a score.
    """
    groups, total = _first(table, "user")
    columns = min(len(groups), 3)
    grid = Grid(
        len(groups),
        (SIDES[columns],) * columns,
        HEIGHT,
        gap=(74, 112),
        left=88,
        right=24,
        bottom=72,
        top=74,
    )
    figure = grid.figure([_damage_title(table.sel(group=group)) for group in groups])
    named: set[str] = set()
    for i, group in enumerate(groups):
        part, place = table.sel(group=group), grid.place(i)
        across, up = _reach(part, "neutral"), _reach(part, "user")
        for trace in (*_cross(across, up), *_damage_points(part)):
            trace.showlegend = bool(trace.name) and trace.name not in named
            named.add(trace.name or "")
            figure.add_trace(trace, **place)
        low = f"damage to neutral text<br>({UNITS})" if grid.lowest(i) else None
        left = f"damage to users' text<br>({UNITS})" if grid.leftmost(i) else None
        figure.update_xaxes(title_text=low, nticks=6, range=across, **place)
        figure.update_yaxes(title_text=left, nticks=6, range=up, **place)
    legend_above(figure, grid, 52)
    shown = f"; the first {len(groups)} of {total} groups" if total > len(groups) else ""
    size = count(int(table["neutral_examples"].values[0]), "passage")
    classed = bool((table["cls"].values != "").any())
    return finish(
        figure,
        "Preference or damage: what removing each head costs",
        [
            f"damage: rise of the loss; neutral text: {size}{shown}; whiskers: 95 % intervals",
            "above the diagonal the users' text suffers more"
            + ("; classes chosen by these scores stand too far out" if classed else ""),
        ],
    )


def specific_heads(table: xr.Dataset) -> go.Figure:
    """PCS of every head, and what of it goes with the user's own profile, on one colour scale.

    Args:
        table: From `workbench.analysis.controls.specificity`.

    Returns:
        A row a group: PCS behind the own profile, and that less the PCS behind each other
        profile. Layers upwards, heads to the right; colour centred at 0, a minus on what
        is clearly below it. A frame marks a head
        whose interval leaves 0 out.

    Raises:
        InputError: No head has a score.
    """
    groups, total = _first(table, "own")
    kinds = table["counterfactual"].values.tolist()
    layers, heads = table.sizes["layer"], table.sizes["head"]
    number = 1 + len(kinds)
    side = min(220.0, 800 / number)
    # A single row must be as tall as the title of the colour bar is long.
    height = min(max(side * layers / heads, 190.0 if len(groups) == 1 else 132.0), side)
    grid = Grid(
        number * len(groups),
        (side,) * number,
        height,
        (22, 26),
        left=78,
        right=96,
        bottom=48,
        top=62,
    )
    titles = ["PCS, own profile", *(COLUMNS.get(k, f"own − {shorten(k, 16)}") for k in kinds)]
    figure = grid.figure([*titles, *[""] * (number * (len(groups) - 1))])
    cell = min(side / heads, height / layers)
    values = np.concatenate([table[name].values.ravel() for name in ("own", "specific")])
    for row, group in enumerate(groups):
        part = table.sel(group=group)
        for column in range(number):
            place = grid.place(row * number + column)
            one = part if column == 0 else part.isel(counterfactual=column - 1)
            key = "specific" if column else "own"
            frames = [_frames(one, cell)] if column else []
            for trace in (
                _cells(one, key),
                *minus(one[key].values, largest(values), cell),
                *frames,
            ):
                figure.add_trace(trace, **place)
            low = row == len(groups) - 1
            figure.update_xaxes(title_text="head" if low else None, showticklabels=low, **place)
            name = f"<b>{shorten(group, int(height / 8))}</b><br>layer" if not column else None
            figure.update_yaxes(title_text=name, showticklabels=not column, **place)
    figure.update_xaxes(matches="x", **_axis(heads, side / 26))
    figure.update_yaxes(matches="y", **_axis(layers, height / 17))
    next(trace for trace in figure.data if trace.name == OUTLINED).showlegend = True
    figure.update_layout(coloraxis=centred(values, UNITS))
    legend_above(figure, grid, 24)
    shown = f"the first {len(groups)} of {total} groups; " if total > len(groups) else ""
    finish(
        figure,
        "What part of a head's PCS needs the user's own profile",
        [
            f"{shown}PCS, and PCS less that of the same head behind another profile",
            "red: the head matters more behind the user's own profile; blue, minus: less; white: 0",
        ],
    )
    return figure.update_layout(plot_bgcolor=GAP)


# Parts


def _first(table: xr.Dataset, name: str) -> tuple[list[str], int]:
    """The first groups, and how many there are."""
    if np.isnan(table[name].values).all():
        raise InputError("no head has a score; there is nothing to draw")
    groups = table["group"].values.tolist()
    return groups[:PANELS], len(groups)


def _axis(number: int, labels: float) -> dict[str, object]:
    """An axis along cells, with as many integers as there is room for."""
    return {
        "range": [-0.5, number - 0.5],
        "tickvals": thinned(number, int(labels)),
        "showgrid": False,
    }


def _damage_title(part: xr.Dataset) -> str:
    value, low, high = (float(part[f"correlation{end}"]) for end in ("", "_low", "_high"))
    rho = "cannot be had" if missing(value) else f"{value:.2f}"
    ends = "" if missing(low) else f" [{low:.2f}, {high:.2f}]"
    return f"<b>{shorten(part['group'].item(), 26)}</b><br>rank correlation {rho}{ends}"


def _damage_points(part: xr.Dataset) -> list[go.Scatter]:
    """One trace a class, that of no class first."""
    classes = part["cls"].values
    there = ~np.isnan(part["user"].values)
    known = [name for name in dict.fromkeys([*COLOURS, *classes.ravel().tolist()]) if name]
    traces = []
    for name in ("", *known):
        chosen = np.argwhere((classes == name) & there)
        if not len(chosen):
            continue
        at = tuple(chosen.T)
        numbers = {
            side: [part[f"{side}{end}"].values[at].tolist() for end in ENDS]
            for side in ("user", "neutral")
        }
        colour = COLOURS.get(name, INK) if name else OTHER
        bars: dict[str, object] = {}
        if name or there.sum() <= BARS:
            for axis, side in (("error_x", "neutral"), ("error_y", "user")):
                mean, low, high = numbers[side]
                bars[axis] = {**whiskers(mean, low, high, colour), "thickness": 0.7, "width": 0}
        traces.append(
            go.Scatter(
                x=numbers["neutral"][0],
                y=numbers["user"][0],
                name=escape(name) if name else "other heads",
                legendgroup=escape(name) or "other",
                mode="markers",
                marker={
                    "color": colour,
                    "symbol": SYMBOLS.get(name, "circle"),
                    "size": 8 if name else 5,
                    "opacity": 1.0 if name else 0.7,
                    "line": {"width": 0.7 if name else 0, "color": PAPER},
                },
                hoverinfo="text",
                hovertext=_damage_hovers(part, chosen),
                **bars,
            )
        )
    return traces


def _damage_hovers(part: xr.Dataset, chosen: np.ndarray) -> list[str]:
    """A text for each of some heads, [head, 2] of layer and number."""
    group, at = escape(part["group"].item()), tuple(chosen.T)
    classes = part["all_cls"].values[at].tolist()
    sides = []
    for side, words in (("user", "users' text"), ("neutral", "neutral text")):
        columns = (part[f"{side}{end}"].values[at].tolist() for end in ENDS)
        rows = zip(*columns, strict=True)
        sides.append([f"{words}: {interval(mean, a, b, '+.4f')}" for mean, a, b in rows])
    heads = [Head(layer, head) for layer, head in chosen.tolist()]
    return [
        f"{group}<br><b>{head}</b> {escape(names)}<br>{user}<br>{neutral}"
        for head, names, user, neutral in zip(heads, classes, *sides, strict=True)
    ]


def _reach(part: xr.Dataset, side: str) -> tuple[float, float]:
    """The ends of an axis that holds 0, all points and all whiskers."""
    few = np.isfinite(part["user"].values).sum() <= BARS
    barred = few | (part["cls"].values != "")
    ends = [np.where(barred, part[f"{side}{end}"].values, np.nan) for end in ("_low", "_high")]
    return reach([part[side].values, *ends])


def _cross(across: tuple[float, float], up: tuple[float, float]) -> list[go.Scatter]:
    """The lines at 0, and the diagonal as far as both axes reach."""
    both = [max(across[0], up[0]), min(across[1], up[1])]
    zero = {"mode": "lines", "hoverinfo": "skip", "line": {"color": INK, "width": 1}}
    return [
        go.Scatter(x=across, y=[0, 0], **zero),
        go.Scatter(x=[0, 0], y=up, **zero),
        go.Scatter(
            x=both,
            y=both,
            name="equal damage",
            mode="lines",
            hoverinfo="skip",
            line={"color": FAINT, "width": 1.2, "dash": "dash"},
        ),
    ]


def _cells(part: xr.Dataset, name: str) -> go.Heatmap:
    values = part[name].values
    gap = 0 if max(values.shape) > 16 else 1
    columns = ("own",) if name == "own" else ("specific", "low", "high", "p")
    numbers = np.stack([part[column].values for column in columns], axis=-1)
    group = escape(part["group"].item())
    return go.Heatmap(
        z=values,
        coloraxis="coloraxis",
        hoverinfo="text",
        hovertext=[
            [
                "" if missing(cell[0]) else f"{group}<br>{_cell_hover(Head(layer, head), *cell)}"
                for head, cell in enumerate(row)
            ]
            for layer, row in enumerate(numbers.tolist())
        ],
        xgap=gap,
        ygap=gap,
    )


def _cell_hover(head: Head, mean: float, *tested: float) -> str:
    """A head's own mean; of a difference also its ends and its p."""
    if not tested:
        return f"<b>{head}</b> {mean:+.4f} {UNITS}"
    low, high, p = tested
    adjusted = "" if missing(p) else f"<br>adjusted p = {p:.3g}"
    span = interval(mean, low, high, "+.4f")
    if missing(low) != missing(high):  # the users bound it on one side only
        side, end = ("at most", high) if missing(low) else ("at least", low)
        span = f"{mean:+.4f}, 95 % {side} {end:+.4f}"
    return f"<b>{head}</b> {span}<br>{UNITS}, all heads together{adjusted}"


def _frames(part: xr.Dataset, cell: float) -> go.Scatter:
    """A frame on every head whose interval leaves 0 out."""
    layers, heads = np.nonzero(part["is_specific"].values)
    size = max(cell * 0.72, 3)
    line = {"width": 1.6 if cell > 8 else 1, "color": INK}
    return go.Scatter(
        # With no such head the legend still says what the frame would be.
        x=heads if len(heads) else [None],
        y=layers if len(heads) else [None],
        name=OUTLINED,
        mode="markers",
        marker={"symbol": "square-open", "size": size, "line": line, "color": INK},
        hoverinfo="skip",
        showlegend=False,
    )
