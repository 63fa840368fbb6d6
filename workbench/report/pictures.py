"""The figures of a probe: which, from what, and where they stand."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from workbench import figures, tables
from workbench.errors import InputError

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go
    import xarray as xr

    from workbench.probe import Probe
    from workbench.scores import HeadScores

DRAWN_USERS = 10


@dataclass(frozen=True)
class Picture:
    """One figure of a probe.

    Attributes:
        name: Its file name.
        section: Where it stands in the report.
        table: The step whose table it draws.
        draw: From that table to the figure.
    """

    name: str
    section: str
    table: str
    draw: Callable[[xr.Dataset], go.Figure]


PICTURES = (
    Picture("specific-heads", "controls", "specificity", figures.specific_heads),
    Picture("damage", "controls", "damage", figures.damage),
    Picture("class-effects", "controls", "classes", figures.class_effects),
    Picture("figure-7-examples", "stability", "examples", figures.example_counts),
    Picture("recurrence", "stability", "recurrence", figures.recurrence),
    Picture("profile-noise", "stability", "noise", figures.profile_noise),
    Picture("precision", "stability", "precision", figures.precision),
    Picture("aspect-heads", "aspects", "aspects", figures.aspect_heads),
    Picture("aspect-overlap", "aspects", "aspects", figures.aspect_overlap),
    Picture("position-distance", "aspects", "distance", figures.position),
    Picture("position-length", "aspects", "length", figures.position),
    Picture("position-turns", "aspects", "turns", figures.position),
    Picture(
        "figure-4-user-overlap",
        "users",
        "overlap",
        lambda table: figures.overlap(table["jaccard"]),
    ),
    Picture("lend", "users", "lend", figures.lend),
    Picture("figure-5-head-weights", "users", "weights", figures.head_weights),
    Picture("figure-8-routing", "users", "routing", figures.routing),
    Picture("figure-6-head-count", "steering", "sweep", figures.head_count),
    Picture("coherence", "steering", "coherence", figures.coherence),
)


def probe_figures(result: Probe) -> dict[str, go.Figure]:
    """The figures of a probe by file name, in the order of the report."""
    drawn = {}
    for picture in shown(result):
        # A table may hold too little for its picture, such as one aspect for an overlap.
        with suppress(InputError):
            drawn[picture.name] = picture.draw(result.tables[picture.table])
    return {
        "figure-3-user-heatmaps": figures.user_heatmaps(
            result.scores, by="user", limit=DRAWN_USERS
        ),
        "task-heatmaps": figures.user_heatmaps(result.scores, by="task"),
        "ranked-heads": figures.ranked_heads(result.scores),
        **drawn,
    }


def shown(result: Probe) -> list[Picture]:
    """The pictures whose tables this probe made."""
    return [picture for picture in PICTURES if picture.table in result.tables]


def figure_tables(result: Probe) -> dict[str, pd.DataFrame]:
    """The numbers behind each figure, long tables by its name."""
    found = {
        "figure-3-user-heatmaps": _head_table(_first_users(result).mean("user")),
        "task-heatmaps": _head_table(result.scores.mean("task")),
        "ranked-heads": _head_table(result.scores.mean("all")).sort_values("mean", ascending=False),
    }
    for picture in shown(result):
        for part, frame in tables.frames(result.tables[picture.table]).items():
            found["-".join(filter(None, (picture.name, part)))] = frame
    return found


def _first_users(result: Probe) -> HeadScores:
    """The users in the picture; a row a head of thousands of users is no table to open."""
    return result.scores.select(users=list(result.scores.groups("user"))[:DRAWN_USERS])


def _head_table(means: xr.Dataset) -> pd.DataFrame:
    # A layer with fewer heads than the widest has no row for those it lacks.
    return means.to_dataframe().reset_index().dropna(subset="mean")
