"""Head classes: their colours, and what removing them and steering with them does."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from workbench.figures.grid import Grid
from workbench.figures.labels import count, escape, interval, shorten, width
from workbench.figures.template import DPS, INK, OKABE_ITO, PAPER, PLAIN, RANDOM, finish, whiskers

UNITS = "nats per target token"
ENDS = ("", "_low", "_high")
# A class has one colour in every figure.
COLOURS = {
    "preference": DPS,
    "specific": OKABE_ITO[3],
    "capability": OKABE_ITO[2],
    "induction": OKABE_ITO[4],
    "retrieval": OKABE_ITO[5],
    "random": RANDOM,
}
# And one symbol: induction's and random's colour are alike to some eyes, and most are in grey.
SYMBOLS = {
    "preference": "circle",
    "specific": "diamond",
    "capability": "square",
    "induction": "triangle-up",
    "retrieval": "triangle-down",
    "random": "cross",
}


def class_effects(table: xr.Dataset) -> go.Figure:
    """What each class of heads does, removed and steered with.

    Args:
        table: From `workbench.analysis.classes.class_effects`.

    Returns:
        A row a task. Left: the rise of the loss on the users' and on neutral text without the
        class. Right: the change of the task's metric without it, and with DPS. Whiskers are 95 %
        intervals, a marker is filled where its interval leaves 0 out and its adjusted p is at
        most .05.
    """
    tasks = table["task"].values.tolist()
    names = table["cls"].values.tolist()
    left = width([called(name) for name in names], 16) + 34
    grid = Grid(
        2 * len(tasks), (360, 360), 34 * len(names) + 16, (40, 86), left, 24, bottom=56, top=70
    )
    titles: list[str] = []
    for task in tasks:
        part = table.sel(task=task)
        size = f"{count(int(part['examples']), 'example')} of {count(int(part['users']), 'user')}"
        plain = f"{escape(part['metric'].item())} of the plain model: {float(part['plain']):.3f}"
        titles += [f"<b>{shorten(task, 22)}</b>, {size}", plain]
    figure = grid.figure(titles)
    gamma = float(table.attrs["gamma"])
    for row, task in enumerate(tasks):
        part = table.sel(task=task)
        loss, metric = grid.place(2 * row), grid.place(2 * row + 1)
        for name, words, colour, symbol, step, place in (
            ("user_loss", "loss on users' text", INK, "circle", 0.14, loss),
            ("neutral_loss", "loss on neutral text", PLAIN, "square", -0.14, loss),
            ("change_ablated", "metric, removed", OKABE_ITO[4], "diamond", 0.14, metric),
            (
                "change_dps",
                f"metric, DPS (gamma = {gamma:g})",
                DPS,
                "circle",
                -0.14,
                metric,
            ),
        ):
            dots = _effects(part, name, words, colour, symbol, step)
            dots.showlegend = row == 0
            figure.add_trace(dots, **place)
        drawn = (("user_loss", "neutral_loss", loss), ("change_ablated", "change_dps", metric))
        for first, second, place in drawn:
            ends = [part[f"{name}{end}"].values for name in (first, second) for end in ENDS]
            figure.update_xaxes(range=reach(ends), **place)
        figure.update_xaxes(title_text=f"rise of the loss when removed ({UNITS})", **loss)
        better = f"change of {part['metric'].item()} ({part['better'].item()} is better)"
        figure.update_xaxes(title_text=escape(better), **metric)
        figure.update_yaxes(showticklabels=False, **metric)
    figure.update_yaxes(
        range=[0.6 - len(names), 0.4],
        tickvals=[-i for i in range(len(names))],
        ticktext=[shorten(called(name), 16) for name in names],
    )
    figure.update_xaxes(zeroline=True, zerolinecolor=INK, zerolinewidth=1)
    legend_above(figure, grid, 26)
    draws = int(table.attrs["draws"])
    return finish(
        figure,
        "What head classes of equal size do: removed, and steered with",
        [
            f"random: the mean over {count(draws, 'draw')}; whiskers: 95 % intervals of resampled "
            "users",
            "filled: the interval leaves 0 out, where the plain model is, and adjusted p ≤ .05",
        ],
    )


def called(cls: str) -> str:
    """A class in words: of the most specific heads none need be shown to be specific."""
    return "most specific" if cls == "specific" else cls


def reach(values: Iterable[np.ndarray]) -> tuple[float, float]:
    """The ends of an axis that holds 0 and all values, with room for a marker."""
    every = np.concatenate([[0.0], *(np.ravel(part) for part in values)])
    low, high = float(np.nanmin(every)), float(np.nanmax(every))
    edge = 0.05 * (high - low) or 1.0
    return low - edge, high + edge


def legend_above(figure: go.Figure, grid: Grid, above: int) -> None:
    """The legend over the first row of panels, so many pixels above them."""
    place = {"x": 0, "xanchor": "left", "y": 1 + above / grid.inner[1], "yanchor": "bottom"}
    figure.update_layout(legend=place)


def _effects(
    part: xr.Dataset, name: str, words: str, colour: str, symbol: str, step: float
) -> go.Scatter:
    value, low, high = (part[f"{name}{end}"].values.tolist() for end in ("", "_low", "_high"))
    p = part[f"{name}_p"].values.tolist()
    clear = [(a > 0 or b < 0) and q <= 0.05 for a, b, q in zip(low, high, p, strict=True)]
    names, heads = part["cls"].values.tolist(), part["heads"].values.tolist()
    return go.Scatter(
        x=value,
        y=[step - i for i in range(len(names))],
        name=escape(words),
        legendgroup=words,
        mode="markers",
        marker={
            "color": [colour if filled else PAPER for filled in clear],
            "symbol": symbol,
            "size": 8,
            "line": {"color": colour, "width": 1.5},
        },
        error_x={**whiskers(value, low, high, colour), "width": 0},
        hoverinfo="text",
        hovertext=[
            f"<b>{escape(called(cls))}</b> {escape(words)}<br>{interval(mean, a, b, '+.4f')}"
            f"<br>{shorten(listed, 80)}"
            for cls, listed, mean, a, b in zip(names, heads, value, low, high, strict=True)
        ],
    )
