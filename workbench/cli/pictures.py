"""What `workbench figures` draws, and where."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from workbench import figures, report, runs, tables
from workbench.analysis import needed, recurrence
from workbench.analysis.official import lines as official_lines
from workbench.analysis.official import official_overlap
from workbench.analysis.transfer import lines as transfer_lines
from workbench.analysis.transfer import transfer
from workbench.cli import show
from workbench.data.official import read_official, write_official
from workbench.errors import InputError
from workbench.probe import load_probe
from workbench.probe.results import SUMMARY
from workbench.scores import HeadScores

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go
    import xarray as xr


@dataclass(frozen=True)
class Drawn:
    """What was drawn.

    Attributes:
        folder: Where.
        paths: Every file.
        lines: What the numbers say.
        notes: What could not be drawn, and why.
    """

    folder: Path
    paths: tuple[Path, ...]
    lines: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


# What can be made of scores alone: its name, its table, its figure, its findings.
FROM_SCORES = (
    ("figure-7-examples", needed.by_examples, figures.example_counts, needed.lines),
    ("recurrence", recurrence.recurrence, figures.recurrence, recurrence.lines),
)


def of_run(folder: Path, k: int, paper: bool) -> Drawn:
    """Everything a run has numbers for: a probe's report and figures, or a scoring's heads.

    Raises:
        InputError: The folder is no run, or the paper's figures are wanted of a scoring.
    """
    runs.read_manifest(folder)  # refuses what is no run before `hold` makes it a folder
    place = folder / "figures"
    with runs.hold(folder):
        if not (folder / SUMMARY).is_file():
            if paper:
                load_probe(folder)  # which says why it can't be opened
            return _of_scores(HeadScores.load(folder), place, k)
        found = load_probe(folder)
        note = show.write_pictures(found, folder)
        paths, notes = sorted(place.iterdir()), [note]
        if paper:
            written = report.write_paper(found, folder)
            paths += written.paths
            notes.append(written.note)
            if written.missing:
                names = ", ".join(map(str, written.missing))
                notes.append(f"No figure {names} of the paper: probe with --full for it.")
    return Drawn(folder, tuple(paths), (), tuple(filter(None, notes)))


def _of_scores(scores: HeadScores, place: Path, k: int) -> Drawn:
    """What a run of `score` has: its heads, and how far they can be trusted."""
    drawn = {
        "figure-3-user-heatmaps": figures.user_heatmaps(scores),
        "task-heatmaps": figures.user_heatmaps(scores, by="task"),
        "ranked-heads": figures.ranked_heads(scores),
    }
    behind: dict[str, pd.DataFrame] = {}
    lines: list[str] = []
    for name, make, draw, words in FROM_SCORES:
        try:
            table = make(scores, k)
        except InputError as error:
            lines.append(f"Left out: {name}: {error}")
            continue
        drawn[name] = draw(table)
        behind |= _flat(name, table)
        lines += words(table)
    saved = figures.save(drawn, place, behind)
    return Drawn(place, saved.paths, tuple(lines), tuple(filter(None, [saved.note])))


def of_two(folders: list[Path], k: int, place: Path) -> Drawn:
    """The first run's heads beside every other's.

    Raises:
        InputError: A folder is no run, or the runs can't be compared.
    """
    first, *others = [HeadScores.load(folder) for folder in folders]
    names = _file_names([folder.name for folder in folders])
    drawn: dict[str, go.Figure] = {}
    behind: dict[str, pd.DataFrame] = {}
    lines: list[str] = []
    for other, named in zip(others, names[1:], strict=True):
        table = transfer(first, other, k, names=(names[0], named))
        name = f"transfer-{named}"
        drawn[name] = figures.transfer(table)
        behind |= _flat(name, table)
        lines += transfer_lines(table)
    saved = figures.save(drawn, place, behind)
    return Drawn(place, saved.paths, tuple(lines), tuple(filter(None, [saved.note])))


def as_official(folder: Path, place: Path, k: int) -> Drawn:
    """A run's scores in the format of the authors' files.

    Raises:
        InputError: The folder is no run, its heads were screened, or K is outside the model.
    """
    written = write_official(HeadScores.load(folder), place, k)
    return Drawn(place, tuple(written))


def of_official(source: Path, place: Path) -> Drawn:
    """The authors' published score files: figure 7, their ties and the steps of their scores.

    Raises:
        InputError: A file is missing or damaged; it is named with the entry.
    """
    official = read_official(source)
    drawn: dict[str, go.Figure] = {}
    behind: dict[str, pd.DataFrame] = {}
    lines: list[str] = []
    for task, name in zip(official.tasks, _file_names(list(official.tasks)), strict=True):
        table = official_overlap(official, task)
        drawn[f"figure-7-{name}"] = figures.example_counts(table)
        drawn[f"resolution-{name}"] = figures.resolution(table)
        behind |= _flat(f"figure-7-{name}", table)
        behind |= _flat(f"resolution-{name}", table.drop_dims("other"))
        lines += official_lines(table)
    saved = figures.save(drawn, place, behind)
    return Drawn(place, saved.paths, tuple(lines), tuple(filter(None, [saved.note])))


def _file_names(names: list[str]) -> list[str]:
    """Names of folders or tasks as parts of file names, no two alike."""
    found: list[str] = []
    for name in names:
        plain = re.sub(r"[^\w.-]+", "-", name) or "run"
        same = sum(re.sub(r"-\d+$", "", one) == plain for one in found)
        found.append(f"{plain}-{same + 1}" if same else plain)
    return found


def _flat(name: str, table: xr.Dataset) -> dict[str, pd.DataFrame]:
    return {
        "-".join(filter(None, (name, part))): frame for part, frame in tables.frames(table).items()
    }
