"""The authors' published scores: ties at the cut, and how coarse the scores are."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from workbench.figures.grid import Grid
from workbench.figures.labels import count, escape, missing, shorten, width
from workbench.figures.reference import legend_above
from workbench.figures.template import BODY, DPS, FAINT, GAP, PLAIN, RANDOM, SEQUENTIAL, finish

ROW = 30


def resolution(table: xr.Dataset) -> go.Figure:
    """What the published sets rest on: clear scores or the tie rule, and on what grain of scores.

    Args:
        table: From `official_overlap`.

    Returns:
        A bar a group. Left: heads strictly above the score of the last one selected, those that
        the tie rule chose among equals, and the equals that it shut out. Right: the per-example
        scores that are 0, other multiples of 1/32, and the rest; groups whose scores weren't
        published say of what step their sums are multiples.
    """
    groups = table["group"].values.tolist()
    grid = Grid(
        2,
        (330, 330),
        float(max(ROW * len(groups), 60)),
        gap=(40, 0),
        left=width(groups, 16) + 24,
        right=40,
        bottom=56,
        top=24 + 64,
    )
    figure = grid.figure(("heads at the cut", "published per-example scores"))
    places = list(range(len(groups)))
    above = table["strictly_above"].values
    tied = table["k"].values - above
    for trace in (
        _bars(groups, above, "strictly above the last", DPS, "{:.0f} heads"),
        _bars(groups, tied, "selected with its score", RANDOM, "{:.0f} heads"),
        _bars(groups, table["ties"].values, "the same score, shut out", GAP, "{:.0f} heads"),
    ):
        figure.add_trace(trace, **grid.place(0))
    zero, fine = table["share_zero"].values, table["share_32"].values
    for trace in (
        _bars(groups, zero, "exactly 0", PLAIN, "{:.1%}"),
        _bars(groups, fine - zero, "other multiples of 1/32", SEQUENTIAL[2], "{:.1%}"),
        _bars(groups, 1 - fine, "multiples of finer steps only", SEQUENTIAL[0], "{:.1%}"),
    ):
        figure.add_trace(trace, **grid.place(1))
    for place, note in zip(places, _notes(table), strict=True):
        figure.add_annotation(
            text=note,
            x=0.02,
            xanchor="left",
            xref="x2",
            y=place,
            yref="y2",
            font={"size": BODY, "color": FAINT},
        )
    figure.update_yaxes(range=[len(groups) - 0.5, -0.5], tickvals=places, ticks="", showgrid=False)
    names = [shorten(name, 16) for name in groups]
    figure.update_yaxes(ticktext=names, **grid.place(0))
    figure.update_yaxes(showticklabels=False, **grid.place(1))
    figure.update_xaxes(title_text="heads", rangemode="tozero", **grid.place(0))
    figure.update_xaxes(
        title_text="share of the scores", range=[0, 1], tickformat=".0%", **grid.place(1)
    )
    figure.update_traces(legend="legend2", col=2)
    listed = legend_above(grid, 22) | {"orientation": "v", "traceorder": "normal"}
    beside = {"x": (grid.widths[0] + grid.gap[0]) / grid.inner[0]}
    figure.update_layout(barmode="stack", bargap=0.3, legend=listed, legend2=listed | beside)
    return finish(figure, *_titles(table))


def _bars(groups: list[str], values: np.ndarray, name: str, color: str, spec: str) -> go.Bar:
    shown = values.tolist()
    return go.Bar(
        x=shown,
        y=list(range(len(groups))),
        orientation="h",
        name=name,
        marker={"color": color},
        hoverinfo="text",
        hovertext=[
            "" if missing(value) else f"{escape(group)}<br>{name}: <b>{spec.format(value)}</b>"
            for group, value in zip(groups, shown, strict=True)
        ],
    )


def _notes(table: xr.Dataset) -> list[str]:
    """What stands in the place of scores that weren't published; empty where they were."""
    columns = (table[name].values.tolist() for name in ("scores", "sum_resolution"))
    notes = []
    for published, step in zip(*columns, strict=True):
        if published:
            notes.append("")
        elif missing(step):
            notes.append("not published")
        else:
            notes.append(f"not published; the sums are multiples of {_fraction(step)}")
    return notes


def _titles(table: xr.Dataset) -> tuple[str, list[str]]:
    sizes = sorted({int(k) for k in table["k"].values})
    scores = int(table["scores"].sum())
    steps = table["resolution"].values
    known = steps[~np.isnan(steps)]
    grain = f", all multiples of {_fraction(known.min())} nat" if len(known) else ""
    return f"Ties and resolution of the published scores, {escape(table.attrs['task'])}", [
        f"{escape(table.attrs['model'])}: top {' or '.join(map(str, sizes))} of "
        f"{table.attrs['heads']:,} heads; {count(scores, 'published score')}{grain}",
        "heads with equal scores at the cut are selected by the order of a sort, not by a score",
    ]


def _fraction(step: float) -> str:
    """A step that is a power of two, 1/64, say."""
    return "1" if step == 1 else f"1/{round(1 / step):,}"
