"""What an evaluation keeps: every answer of every method, and the examples they answer.

A folder of an evaluation holds `manifest.json`, `examples.parquet`, `choices.json` (the settings
chosen on validation users) and `answers/TASK/METHOD-SEED/00000.parquet`, a row an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from workbench import runs
from workbench.errors import InputError

FORMAT = "workbench.evaluation/1"
EXAMPLES, CHOICES, ANSWERS = "examples.parquet", "choices.json", "answers"
EXAMPLE = pa.schema(
    [
        ("example", pa.string()),  # task and id: Example.name
        ("user", pa.string()),
        ("task", pa.string()),
        ("query", pa.string()),
        ("target", pa.string()),
        ("profile", pa.list_(pa.string())),  # the items that the prompt shows, a text each
        ("style", pa.string()),  # JSON: what the corpus knows of the user's style, or {}
        ("leaked", pa.bool_()),  # heads were found on this example or on its user
    ]
)
ANSWER = pa.schema(
    [
        ("example", pa.string()),
        ("text", pa.string()),  # as written, or the label decided on by likelihood
        ("finished", pa.bool_()),  # ended by itself, before the limit of new tokens
        ("tokens", pa.int32()),  # how many were written
        ("logprob", pa.float64()),  # mean log-probability under the plain model, nats a token
        ("kl", pa.float64()),  # mean KL(steered, plain) a step, nats
    ]
)


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation, or what there is of one.

    Attributes:
        folder: Where it lies.
        manifest: How it came about; `manifest["settings"]` holds `tasks`, `methods`, `seeds`.
        choices: task -> method -> the settings chosen on validation users.
        examples: A row an example, the columns of `EXAMPLE`.
        answers: A row an answer: `task`, `method`, `seed` and the columns of `ANSWER`.
    """

    folder: Path
    manifest: dict[str, Any]
    choices: dict[str, dict[str, Any]]
    examples: pd.DataFrame
    answers: pd.DataFrame


def stage(task: str, method: str, seed: int) -> str:
    """Where the shards of a cell lie in the run folder."""
    return f"{ANSWERS}/{task}/{method}-{seed}"


def load_evaluation(folder: Path | str) -> Evaluation:
    """Open what `workbench evaluate` wrote; cells that aren't finished are simply not there.

    Raises:
        InputError: The folder holds no evaluation, or a file is damaged.
    """
    folder = Path(folder)
    manifest = runs.read_manifest(folder, FORMAT)
    cells = []
    for task in manifest["settings"]["tasks"]:
        for place in sorted((folder / ANSWERS / task).glob("*-*")):
            method, _, seed = place.name.rpartition("-")
            where = f"{ANSWERS}/{task}/{place.name}"
            for path in runs.shards(folder, where):
                found = read_rows(path, ANSWER).to_pandas()
                cells.append(found.assign(task=task, method=method, seed=int(seed)))
    empty = pd.DataFrame(columns=[*ANSWER.names, "task", "method", "seed"])
    choices = folder / CHOICES
    return Evaluation(
        folder=folder,
        manifest=manifest,
        choices=runs.read_json(choices) if choices.is_file() else {},
        examples=read_rows(folder / EXAMPLES, EXAMPLE).to_pandas(),
        answers=pd.concat(cells, ignore_index=True) if cells else empty,
    )


def write_rows(rows: Sequence[dict[str, Any]], schema: pa.Schema, path: Path) -> None:
    """Write rows as Parquet, whole or not at all.

    Raises:
        InputError: It can't be written.
    """
    with runs.atomic(path) as part:
        pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), part, compression="zstd")


def read_rows(path: Path, schema: pa.Schema) -> pa.Table:
    """Read what `write_rows` wrote.

    Raises:
        InputError: The file is missing, damaged, or has other columns.
    """
    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; run the same command again") from None
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: damaged ({error}); delete it and run again") from None
    if table.schema.names != schema.names:
        raise InputError(
            f"{path}: wanted the columns {', '.join(schema.names)}, got "
            f"{', '.join(table.schema.names)}; delete it and run again"
        )
    return table
