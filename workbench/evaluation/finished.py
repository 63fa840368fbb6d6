"""Finished evaluations as tables take them: one run, or several whose tests count together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from workbench import runs, stats
from workbench.errors import InputError
from workbench.evaluation.results import CHOICES, FORMAT
from workbench.evaluation.summary import TABLE


@dataclass(frozen=True)
class Run:
    """What the tables need of an evaluation.

    Attributes:
        folder: Where it lies.
        manifest: How it came about.
        rows: The cells that `workbench evaluate` summed up, a mapping each.
        choices: task -> method -> the settings chosen on validation users.
    """

    folder: Path
    manifest: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    choices: Mapping[str, Mapping[str, Any]]

    @property
    def model(self) -> str:
        """The model's name."""
        return str(self.manifest["settings"]["model"])


def load_run(folder: Path) -> Run:
    """Open a finished evaluation.

    Raises:
        InputError: The folder holds no evaluation, or one that isn't finished.
    """
    manifest = runs.read_manifest(folder, FORMAT)
    path = folder / TABLE
    if not path.is_file():
        raise InputError(
            f"{path}: no such file; `workbench evaluate` writes it when all cells are done: run "
            "the same command again to finish them"
        )
    rows = runs.read_json(path)
    choices = folder / CHOICES
    return Run(folder, manifest, rows, runs.read_json(choices) if choices.is_file() else {})


def check_apart(given: Sequence[Run]) -> None:
    """Refuse runs that tell of the same cell.

    Raises:
        InputError: The message names both.
    """
    seen: dict[tuple[str, ...], Path] = {}
    for run in given:
        for row in run.rows:
            key = (run.model, row["task"], row["method"], row["reading"], row["metric"])
            if key in seen:
                raise InputError(
                    f"{run.folder} and {seen[key]} both hold {row['metric']} of {row['method']} on "
                    f"{row['task']} by {run.model}; give one of them"
                )
            seen[key] = run.folder


def adjusted(given: Sequence[Run]) -> list[Run]:
    """The runs; where a model has several, p after Holm is over all of their tests together."""
    found = []
    for run in given:
        family = [other for other in given if other.model == run.model]
        tested = [row["p"] for one in family for row in one.rows if _is_tested(row)]
        # Equal p are equal after Holm.
        after = dict(zip(tested, map(float, stats.holm(tested)), strict=True))
        rows = [{**r, "p_holm": after[r["p"]]} if _is_tested(r) else r for r in run.rows]
        found.append(replace(run, rows=rows) if len(family) > 1 else run)
    return found


def several_in_words(given: Sequence[Run]) -> str:
    """Which models have several runs, whose tests are adjusted together; empty if none has."""
    count = Counter(run.model for run in given)
    named = [f"{n} runs of {model}" for model, n in sorted(count.items()) if n > 1]
    if not named:
        return ""
    return (
        f"Holm is over all tests of a model, here of {', '.join(named)} together; DPS against "
        "random heads (CSV) over the tasks of each run."
    )


def _is_tested(row: Mapping[str, Any]) -> bool:
    return bool(row["primary"]) and row["p"] is not None


def query_tokens(given: Sequence[Run]) -> dict[str, int]:
    """Model -> the mean number of tokens of its test prompts without profile, where it is known."""
    found: dict[str, int] = {}
    for model in dict.fromkeys(run.model for run in given):
        known = [
            (run.manifest["query_tokens"], run.manifest["examples"]["test"])
            for run in given
            if run.model == model and "query_tokens" in run.manifest
        ]
        if known:
            found[model] = round(sum(mean * n for mean, n in known) / sum(n for _, n in known))
    return found
