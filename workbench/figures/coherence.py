"""Personal gain against what it costs other text, so that gamma can be chosen by eye."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from workbench.errors import InputError
from workbench.figures.classes import COLOURS, ENDS, SYMBOLS, UNITS, called, legend_above, reach
from workbench.figures.grid import Grid
from workbench.figures.labels import count, escape, interval, shorten
from workbench.figures.template import BODY, INK, PAPER, PLAIN, finish, whiskers

HEIGHT = 270
LABEL = (34, 18)  # pixels that a strength's label takes


def coherence(table: xr.Dataset) -> go.Figure:
    """The change of the task's metric against the rise of the loss on neutral text, over gamma.

    Args:
        table: From `workbench.analysis.coherence.coherence`.

    Returns:
        A panel a task and a curve a class, from the plain model at 0 to the largest gamma. Up is
        always better: where lower values are, the axis is turned around. Whiskers are 95 %
        intervals; a marker is filled where the gain's leaves 0 out and its adjusted p is
        at most .05.

    Raises:
        InputError: There is no task or strength.
    """
    tasks = table["task"].values.tolist()
    if not tasks or not table.sizes["gamma"]:
        raise InputError("a curve over gamma needs a task and a strength; there is nothing to draw")
    columns = min(len(tasks), 3)
    side = {1: 560, 2: 360, 3: 262}[columns]
    grid = Grid(len(tasks), (side,) * columns, HEIGHT, (86, 96), 80, right=24, bottom=72, top=74)
    figure = grid.figure([_title(table.sel(task=task)) for task in tasks])
    for i, task in enumerate(tasks):
        part, place = table.sel(task=task), grid.place(i)
        across, up = (
            reach([part[f"{name}{end}"].values for end in ENDS]) for name in ("neutral_nll", "gain")
        )
        room = (LABEL[0] * (across[1] - across[0]) / side, LABEL[1] * (up[1] - up[0]) / HEIGHT)
        taken = [(0.0, 0.0)]
        traces = [
            _curve(part.sel(cls=cls), room, taken, _under(part, place_of))
            for place_of, cls in enumerate(table["cls"].values.tolist())
        ]
        for trace in (*traces, _origin()):
            trace.showlegend = i == 0
            figure.add_trace(trace, **place)
        lower = part["better"].item() == "lower"
        figure.update_yaxes(
            title_text=f"change of {escape(part['metric_name'].item())}",
            range=up[::-1] if lower else up,
            **place,
        )
        low = f"rise of the loss on neutral text<br>({UNITS})" if grid.lowest(i) else None
        figure.update_xaxes(title_text=low, nticks=5, range=across, **place)
    lines = {"zeroline": True, "zerolinecolor": INK, "zerolinewidth": 1}
    figure.update_xaxes(**lines)
    figure.update_yaxes(**lines)
    legend_above(figure, grid, 48)
    gammas = ", ".join(f"{gamma:g}" for gamma in table["gamma"].values)
    size = count(int(table["neutral_examples"].values[0]), "passage")
    return finish(
        figure,
        "What steering gains for the users, and what it costs other text",
        [
            f"curves over gamma = {gammas} from the plain model; neutral text: {size}",
            "up: better for the users; right: worse for other text; "
            "filled: the gain's interval leaves 0 out, adjusted p ≤ .05",
        ],
    )


def _title(part: xr.Dataset) -> str:
    size = f"{count(int(part['examples']), 'example')} of {count(int(part['users']), 'user')}"
    better = f"{part['better'].item()} is better"
    return f"<b>{shorten(part['task'].item(), 26)}</b>, {escape(better)}<br>{size}"


def _origin() -> go.Scatter:
    """The plain model, where every curve starts."""
    return go.Scatter(
        x=[0],
        y=[0],
        name="plain model",
        legendgroup="plain",
        mode="markers",
        marker={"color": PLAIN, "symbol": "x", "size": 9},
        hoverinfo="text",
        hovertext="plain model, gamma = 0",
    )


def _under(part: xr.Dataset, index: int) -> bool:
    """Whether an earlier class has the very points of this one, as the same heads give."""
    rows = [
        np.stack([part[n].values[i] for n in ("neutral_nll", "gain")]) for i in range(index + 1)
    ]
    return any(np.allclose(row, rows[-1], rtol=0, atol=1e-9) for row in rows[:-1])


def _curve(
    row: xr.Dataset, room: tuple[float, float], taken: list[tuple[float, float]], over: bool
) -> go.Scatter:
    """The curve of a class; `over` another one it is thin and dashed, so that both are seen."""
    cls = row["cls"].item()
    colour = COLOURS.get(cls, INK)
    gammas = row["gamma"].values.tolist()
    cost, gain = (
        [row[f"{name}{end}"].values.tolist() for end in ("", "_low", "_high")]
        for name in ("neutral_nll", "gain")
    )
    p = row["gain_p"].values.tolist()
    clear = [(a > 0 or b < 0) and q <= 0.05 for a, b, q in zip(*gain[1:], p, strict=True)]
    # The labels of one curve are enough to read the others by.
    few = len(gammas) if cls == "preference" else 1
    texts = _labels(gammas, list(zip(cost[0], gain[0], strict=True)), few, room, taken)
    return go.Scatter(
        x=[0, *cost[0]],
        y=[0, *gain[0]],
        name=f"{escape(called(cls))} heads",
        legendgroup=escape(cls),
        mode="lines+markers+text",
        text=["", *texts],
        textposition="top right",
        textfont={"size": BODY, "color": INK},
        line={"color": colour, "width": 2, "dash": "dash" if over else "solid"},
        marker={
            "color": [PAPER, *(colour if filled else PAPER for filled in clear)],
            "symbol": SYMBOLS.get(cls, "circle"),
            "size": [0, *[5 if over else 8] * len(gammas)],
            "opacity": 1,
            "line": {"color": colour, "width": 1.5},
        },
        error_x=_thin([[0, *part] for part in cost], colour),
        error_y=_thin([[0, *part] for part in gain], colour),
        hoverinfo="text",
        hovertext=["", *(_hover(row, i, gamma) for i, gamma in enumerate(gammas))],
        cliponaxis=False,
    )


def _labels(
    gammas: list[float],
    points: list[tuple[float, float]],
    few: int,
    room: tuple[float, float],
    taken: list[tuple[float, float]],
) -> list[str]:
    """Labels of the largest strengths that lie on none of those in `taken`, which grows."""
    texts = [""] * len(gammas)
    for i in reversed(range(max(0, len(gammas) - few), len(gammas))):
        apart = [
            abs(points[i][0] - x) > room[0] or abs(points[i][1] - y) > room[1] for x, y in taken
        ]
        if all(apart):
            texts[i] = f"{gammas[i]:g}"
            taken.append(points[i])
    return texts


def _thin(numbers: list[list[float]], colour: str) -> dict[str, object]:
    return {**whiskers(numbers[0], numbers[1], numbers[2], colour), "thickness": 0.7, "width": 0}


def _hover(row: xr.Dataset, i: int, gamma: float) -> str:
    def numbers(name: str) -> str:
        mean, low, high = (float(row[f"{name}{end}"][i]) for end in ("", "_low", "_high"))
        return interval(mean, low, high, "+.3f")

    return (
        f"<b>{escape(called(row['cls'].item()))} heads</b>, gamma = {gamma:g}<br>"
        f"change of {escape(row['metric_name'].item())}: {numbers('gain')}<br>"
        f"loss on neutral text: {numbers('neutral_nll')}<br>"
        f"loss on users' text: {numbers('user_nll')}<br>"
        f"{float(row['agreement'][i]):.0%} of answers as the plain model's"
    )
