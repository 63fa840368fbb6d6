"""What two models share, and whether one user's heads do for another."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from workbench.figures.grid import Grid
from workbench.figures.labels import count, escape, interval, missing, shorten, thinned, width
from workbench.figures.marks import minus, numbers, two_digits
from workbench.figures.template import (
    DPS,
    FAINT,
    INK,
    OKABE_ITO,
    PAPER,
    PLAIN,
    RANDOM,
    centred,
    finish,
    largest,
    whiskers,
)

LETTERS = 18
LOSS = "change of the loss (nats per token)"
WRITTEN = 12  # with more groups the values would not fit into their cells
# Value, what it is held against, its p, and words; from the bottom to the top.
MEASURES = (
    ("jaccard", "jaccard_layer", "jaccard_p", "top K by place (Jaccard)"),
    ("spearman", "spearman_layer", "spearman_p", "all heads by place (rank)"),
    ("held_out", "any_pair", None, "best pairs, on other users"),
    ("matched", "matched_chance", "matched_p", "best pairs of heads"),
    ("overlap", "overlap_chance", "overlap_p", "overlap by depth"),
)
COLORS = (DPS, OKABE_ITO[3])
KINDS = (
    ("own", "own heads", DPS, "circle"),
    ("others", "others' heads, mean", PLAIN, "square"),
    ("random", "random heads, same layers", RANDOM, "diamond"),
)


def transfer(table: xr.Dataset) -> go.Figure:
    """Two models side by side: where in depth their scores lie, and what they agree in.

    Args:
        table: From `analysis.transfer.transfer`.

    Returns:
        A row a group. Left: share of the positive score in each tenth of the depth, with 95 %
        intervals. Right: each measure of agreement beside what chance gives; filled where its p,
        before any correction, is below 0.05. What can't be had is said to be so.
    """
    groups = table["group"].values.tolist()
    grid = Grid(2 * len(groups), (380, 210), 190, (230, 84), 70, right=44, bottom=56, top=58)
    titles = []
    for i, group in enumerate(groups):
        size = f"{int(table['examples'][i]):,} examples"
        titles += [f"<b>{shorten(group, 24)}</b>, {size}", "what they agree in, and by chance"]
    figure = grid.figure(titles)
    for i in range(len(groups)):
        left, right = grid.place(2 * i), grid.place(2 * i + 1)
        part = table.isel(group=i)
        for side in (0, 1):
            figure.add_trace(_mass(part.isel(model=side), COLORS[side], side, i == 0), **left)
        for trace in _measures(part, i == 0):
            figure.add_trace(trace, **right)
        figure.update_xaxes(title_text="relative depth (tenths)", **left)
        figure.update_yaxes(title_text="share of positive score", rangemode="tozero", **left)
        figure.update_xaxes(
            title_text="agreement", range=[-1.05, 1.05], tickvals=[-1, -0.5, 0, 0.5, 1], **right
        )
        figure.update_xaxes(zeroline=True, zerolinecolor=INK, zerolinewidth=1, **right)
        figure.update_yaxes(
            range=[-0.6, len(MEASURES) - 0.4],
            tickvals=list(range(len(MEASURES))),
            ticktext=[_measure_words(row, part) for row in MEASURES],
            **right,
        )
    figure.update_layout(
        legend={"x": 0, "xanchor": "left", "y": 1 + 26 / grid.inner[1], "yanchor": "bottom"}
    )
    figure.update_xaxes(tickvals=list(range(1, 11)), col=1)
    return finish(figure, *_transfer_titles(table))


def _mass(part: xr.Dataset, color: str, side: int, legend: bool) -> go.Scatter:
    mean, low, high = (part[f"mass{end}"].values.tolist() for end in ("", "_low", "_high"))
    tenths = part["depth"].values
    name = shorten(part["model"].item(), 24)
    centre, start, end = (float(part[f"centre{end}"]) for end in ("", "_low", "_high"))
    middle = interval(centre, start, end, ".2f")
    return go.Scatter(
        x=tenths + (0.12 if side else -0.12),
        y=mean,
        name=name,
        legendgroup=name,
        mode="lines+markers",
        line={"color": color, "width": 2.5, "shape": "hvh"},
        marker={"color": color, "size": 7, "symbol": "diamond" if side else "circle"},
        error_y=whiskers(mean, low, high, color),
        hoverinfo="text",
        hovertext=[
            f"<b>{name}</b>, tenth {tenth}<br>{interval(*numbers)}<br>mean depth {middle}"
            for tenth, *numbers in zip(tenths, mean, low, high, strict=True)
        ],
        showlegend=legend,
    )


def _measure_words(row: tuple[str, str, str | None, str], part: xr.Dataset) -> str:
    known = not missing(float(part[row[0]]))
    return row[3] if known else f'<span style="color:{FAINT}">{row[3]}: none</span>'


def _measures(part: xr.Dataset, legend: bool) -> list[go.Scatter]:
    heights = list(range(len(MEASURES)))
    values, chances, fills, hover = [], [], [], []
    low, high = [], []
    for name, control, p, words in MEASURES:
        value, chance = float(part[name]), float(part[control])
        below, above = (float(part.get(name + end, np.nan)) for end in ("_low", "_high"))
        values.append(value)
        chances.append(chance)
        low.append(below)
        high.append(above)
        likely = float(part[p]) if p else np.nan
        fills.append(INK if likely < 0.05 else PAPER)
        told = f", p = {likely:.3f}" if not missing(likely) else ""
        hover.append(
            f"<b>{words}</b><br>{interval(value, below, above)}{told}<br>by chance {chance:.3f}"
        )
    common = {"y": heights, "mode": "markers", "hoverinfo": "text", "hovertext": hover}
    bars = whiskers(values, low, high, INK)
    return [
        go.Scatter(
            x=chances,
            name="by chance",
            legendgroup="chance",
            # A stroke, which shows behind and beside a dot at the same place.
            marker={"symbol": "line-ns", "size": 18, "line": {"color": RANDOM, "width": 3}},
            showlegend=legend,
            **common,
        ),
        go.Scatter(
            x=values,
            name="the two models",
            legendgroup="value",
            marker={"color": fills, "size": 10, "line": {"color": INK, "width": 2}},
            error_x=bars,
            showlegend=legend,
            **common,
        ),
    ]


def _transfer_titles(table: xr.Dataset) -> tuple[str, list[str]]:
    first, second = (shorten(name, 24) for name in table["model"].values)
    return f"Do {first} and {second} share heads? K = {table.attrs['k']}", [
        "left: a layer's positive score is spread over its part of the depth; whiskers: 95 % "
        "intervals, users resampled",
        "right, by chance: layers, heads within layers or users permuted, any two heads; "
        "filled: p < 0.05, uncorrected",
    ]


def lend(table: xr.Dataset) -> go.Figure:
    """What removing each group's heads does to each group's loss.

    Args:
        table: From `analysis.lending.lend`.

    Returns:
        On the left the change of the loss, a row whose text, a column whose heads; on the diagonal
        the own. On the right, a row each: the own heads, the mean over others' and random heads.
    """
    names = [str(name) for name in table["group"].values.tolist()]
    side = float(min(max(len(names) * 34, 240), 420))
    label = width(names, LETTERS) + 14
    flat = label < side / len(names)
    grid = Grid(
        2,
        (side, 300),
        side,
        (124, 0),
        max(label + 18, 64),
        right=30,
        bottom=max(36 if flat else label + 20, 64),
        top=58,
    )
    figure = grid.figure(("whose heads are removed", "own, others' and random heads"))
    matrix = table["change"].values
    figure.add_trace(_matrix(names, matrix), **grid.place(0))
    end = largest(matrix)
    written = [numbers(matrix, two_digits(matrix), end)] if len(names) <= WRITTEN else []
    for trace in written or minus(matrix, end, side / len(names)):
        figure.add_trace(trace, **grid.place(0))
    for trace in _kinds(table, names):
        figure.add_trace(trace, **grid.place(1))
    ticks = thinned(len(names), int(side / 14))
    cells = {
        "tickvals": ticks,
        "ticktext": [shorten(names[i], LETTERS) for i in ticks],
        "ticks": "",
        "ticklabelstandoff": 4,
        "showgrid": False,
        "showline": False,
    }
    edges = (-0.5, len(names) - 0.5)
    figure.update_xaxes(
        range=edges, tickangle=0 if flat else -90, title_text="heads of", **cells, **grid.place(0)
    )
    by = escape(table.attrs["by"])
    figure.update_yaxes(range=edges[::-1], title_text=f"text of {by}", **cells, **grid.place(0))
    figure.update_yaxes(range=edges[::-1], tickvals=ticks, showticklabels=False, **grid.place(1))
    figure.update_xaxes(
        title_text=LOSS,
        rangemode="tozero",
        zeroline=True,
        zerolinecolor=INK,
        zerolinewidth=1,
        **grid.place(1),
    )
    figure.update_layout(
        coloraxis=centred(matrix, LOSS),
        coloraxis_colorbar={"x": side / grid.inner[0], "xpad": 10},
        legend={"x": 0, "xanchor": "left", "y": 1 + 26 / grid.inner[1], "yanchor": "bottom"},
    )
    return finish(figure, *_lend_titles(table))


def _matrix(names: list[str], matrix: np.ndarray) -> go.Heatmap:
    return go.Heatmap(
        z=matrix,
        coloraxis="coloraxis",
        hoverinfo="text",
        hovertext=[
            [
                f"text of {escape(a)}<br>heads of {escape(b)}<br><b>{value:+.4f}</b> nats per token"
                for b, value in zip(names, row, strict=True)
            ]
            for a, row in zip(names, matrix.tolist(), strict=True)
        ],
    )


def _kinds(table: xr.Dataset, names: list[str]) -> list[go.Scatter]:
    matrix = table["change"].values
    size = max(len(names) - 1, 1)
    columns = {
        "own": matrix.diagonal(),
        "others": (matrix.sum(axis=1) - matrix.diagonal()) / size,
        "random": table["random"].values,
    }
    return [
        go.Scatter(
            x=columns[kind],
            y=list(range(len(names))),
            name=words,
            mode="markers",
            marker={"color": color, "symbol": symbol, "size": 10 if len(names) <= 20 else 6},
            hoverinfo="text",
            hovertext=[
                f"text of {escape(name)}<br>{words}: <b>{value:+.4f}</b> nats per token"
                for name, value in zip(names, columns[kind].tolist(), strict=True)
            ],
        )
        for kind, words, color, symbol in KINDS
    ]


def _lend_titles(table: xr.Dataset) -> tuple[str, list[str]]:
    attrs = table.attrs
    by = escape(attrs["by"])
    parts = []
    for name, words in (("gap", f"another {by}'s"), ("edge", "random ones")):
        gap, low, high = (float(attrs[name + end]) for end in ("", "_low", "_high"))
        parts.append(f"own minus {words}: {interval(gap, low, high, '+.3f')}")
    examples = count(int(table["examples"].values.sum()), "example")
    return f"Do one {by}'s heads do for another? Top {attrs['k']} removed, {examples}", [
        "heads found on one half of the examples, loss measured on the other; "
        f"diagonal: the {by}'s own",
        "; ".join(parts),
    ]
