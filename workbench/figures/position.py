"""The profile further away, shorter, or behind earlier turns: what is left of it and its heads."""

from __future__ import annotations

import plotly.graph_objects as go
import xarray as xr

from workbench.errors import InputError
from workbench.figures.grid import Grid
from workbench.figures.labels import count, escape, interval, missing, shorten
from workbench.figures.template import DPS, INK, OKABE_ITO, PAPER, finish, whiskers

# Measure, what it is, its units, its colour, and the change whose interval fills the markers.
PANELS = (
    ("profile_value", "value of the profile", "nats per token", DPS, "value_change"),
    ("top_pcs", "mean PCS, top {k} heads", "nats per token", OKABE_ITO[3], "top_change"),
    ("jaccard", "overlap of the top {k}", "Jaccard", OKABE_ITO[2], "gap"),
)
TITLES = {
    "distance": "by strangers' items before the query",
    "length": "by number of items shown",
    "turns": "by earlier turns before the query",
}


def position(table: xr.Dataset) -> go.Figure:
    """What the profile and its heads are worth at every step, a row of panels a task.

    Args:
        table: From `workbench.analysis.position.position`.

    Returns:
        Lines with 95 % intervals against the step: what the profile is worth; the mean PCS of the
        heads found at the reference step, on other users; and the overlap of each step's top K
        with the reference's. A square is the reference step. Another marker is filled where the
        change from the reference leaves 0 out, for the overlap where the heads differ beyond
        noise.

    Raises:
        InputError: There is no task.
    """
    tasks = table["task"].values.tolist()
    if not tasks:
        raise InputError("no task in the table; there is nothing to draw")
    grid = Grid(
        3 * len(tasks), (190, 190, 190), 150, gap=(94, 88), left=80, right=20, bottom=52, top=24
    )
    titles = []
    for task in tasks:
        users = count(int(table["users"].sel(task=task)), "user")
        titles += [f"<b>{shorten(task, 18)}</b>, {users}", "", ""]
    figure = grid.figure(titles)
    steps = table["step"].values.tolist()
    room = max(0.3, (steps[-1] - steps[0]) * 0.08)
    for row, task in enumerate(tasks):
        part = table.sel(task=task)
        for column, (name, words, units, color, change) in enumerate(PANELS):
            place = grid.place(3 * row + column)
            figure.add_trace(_line(part, name, color, change), **place)
            title = f"{words.format(k=table.attrs['k'])}<br>({units})"
            figure.update_yaxes(title_text=title, rangemode="tozero", **place)
    figure.update_xaxes(
        title_text={"distance": "strangers' items", "length": "items", "turns": "turns"}[
            table.attrs["kind"]
        ],
        tickvals=steps,
        range=[steps[0] - room, steps[-1] + room],
        showgrid=False,
    )
    figure.update_yaxes(zeroline=True, zerolinecolor=INK, zerolinewidth=1, nticks=5)
    for row in range(len(tasks)):
        figure.update_yaxes(range=[0, 1.08], **grid.place(3 * row + 2))
    return finish(figure, *_titles(table))


def _line(part: xr.Dataset, name: str, color: str, change: str) -> go.Scatter:
    mean, low, high = (part[name + end].values.tolist() for end in ("", "_low", "_high"))
    steps, reference = part["step"].values.tolist(), part.attrs["reference"]
    filled = _shown(part, change)
    return go.Scatter(
        x=steps,
        y=mean,
        mode="lines+markers",
        line={"color": color, "width": 2.5},
        marker={
            "color": [color if full else PAPER for full in filled],
            "symbol": ["square" if step == reference else "circle" for step in steps],
            "size": 8,
            "line": {"color": color, "width": 2},
        },
        error_y=whiskers(mean, low, high, color),
        hoverinfo="text",
        hovertext=[
            _hover(part.sel(step=step), interval(*numbers), change)
            for step, *numbers in zip(steps, mean, low, high, strict=True)
        ],
        showlegend=False,
    )


def _shown(part: xr.Dataset, change: str) -> list[bool]:
    """Whether the change to the reference is shown at each step."""
    low, high = (part[change + end].values for end in ("_low", "_high"))
    if change == "gap":
        within = part["gap_p"].values <= 1 - part.attrs["level"]
        return [bool(x) for x in (low > 0) & within]
    return [bool(x) for x in (low > 0) | (high < 0)]


def _hover(cell: xr.Dataset, value: str, change: str) -> str:
    mean, low, high = (float(cell[change + end]) for end in ("", "_low", "_high"))
    lines = [f"<b>{escape(cell['task'].item())}</b>, step {int(cell['step'])}", value]
    if not missing(mean):
        words = "short of noise by" if change == "gap" else "change from the reference"
        lines.append(f"{words}: {interval(mean, low, high, '+.3f')}")
    lines.append(f"loss {float(cell['nll']):.3f} nats per token")
    lines.append(f"{float(cell['prompt_tokens']):.0f} prompt tokens")
    if float(cell["shortened"]) > 0:
        lines.append(f"items shortened in {float(cell['shortened']):.0%} of the prompts")
    return "<br>".join(lines)


def _titles(table: xr.Dataset) -> tuple[str, list[str]]:
    attrs = table.attrs
    note = f"filled: the change from the square (step {attrs['reference']}) is beyond noise"
    if all(int(n) < 2 for n in table["users"].values):
        note = "no intervals: there is one user"
    return f"Value of the profile and of its heads, {TITLES[attrs['kind']]}, K = {attrs['k']}", [
        f"whiskers: 95 % intervals from resampled users; {note}",
        f"heads of the middle panels: from {escape(attrs['heads_from'])}",
    ]
