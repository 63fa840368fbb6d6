"""What a probe found, and the files that keep it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xarray as xr

from workbench import runs, tables
from workbench.errors import InputError
from workbench.scores import HeadScores

FORMAT = "workbench.probe/3"
SUMMARY = "summary.json"
ATTENTION = "attention.json"
TABLES = "tables"


@dataclass(frozen=True)
class Probe:
    """Everything a probe found.

    Attributes:
        scores: PCS per example of the discovery users.
        tables: What each step of the examination made, by its name (`workbench.probe.steps`).
        samples: Texts side by side: example, user, task, query, target, plain, steered.
        attention: `attended` of an example of each task.
        summary: What `summary.json` holds: verdict, findings, what was left out and why, settings.
    """

    scores: HeadScores
    tables: Mapping[str, xr.Dataset]
    samples: Sequence[Mapping[str, str]]
    attention: Sequence[xr.DataArray]
    summary: Mapping[str, Any]


def table_path(folder: Path, name: str) -> Path:
    """Where a step's table is kept."""
    return folder / TABLES / f"{name}.json"


def kept(folder: Path, name: str, key: str, make: Callable[[], xr.Dataset]) -> xr.Dataset:
    """A step's table: the one in the folder if it was made of the same, a new one otherwise.

    Args:
        folder: The run folder.
        name: The step's name.
        key: A digest of all that decides the table.
        make: Makes it.
    """
    path = table_path(folder, name)
    if path.is_file():
        table = tables.load(path)
        if table.attrs.get("made_of") == key:
            return table
    table = make()
    table.attrs["made_of"] = key
    tables.save(table, path)
    # Read back, so that a step that goes on and one that was kept see the same.
    return tables.load(path)


def save(result: Probe, folder: Path) -> None:
    """Write what isn't a step's table, the summary last: with it the probe is finished."""
    attention = [tables.plain(one.to_dict()) for one in result.attention]
    runs.write_text(folder / ATTENTION, json.dumps(attention, allow_nan=False) + "\n")
    text = json.dumps(result.summary, indent=1, allow_nan=False)
    runs.write_text(folder / SUMMARY, text + "\n")


def load_probe(folder: Path | str) -> Probe:
    """Open what a finished probe wrote.

    Raises:
        InputError: The folder holds no finished probe, or one of another version.
    """
    folder = Path(folder)
    scores = HeadScores.load(folder)
    if not (folder / SUMMARY).is_file():
        raise InputError(f"{folder}: the probe isn't finished; run the same command again")
    summary = runs.read_json(folder / SUMMARY)
    found = summary.get("format") if isinstance(summary, dict) else None
    runs.check_format(folder / SUMMARY, found, FORMAT)
    read = {name: tables.load(table_path(folder, name)) for name in summary["steps"]}
    attention = [xr.DataArray.from_dict(one) for one in runs.read_json(folder / ATTENTION)]
    return Probe(scores, read, summary["samples"], attention, summary)
