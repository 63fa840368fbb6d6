"""Shards, one after the other or side by side, and the stages of a screened run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool
from torch import Tensor

from workbench import runs
from workbench.data.prompts import Prompt
from workbench.discovery.scorer import Job, Scorer, Tick
from workbench.discovery.screening import Screen, choose, correction, pilot
from workbench.scores import SCHEMA, SCREENED, HeadScores, ragged, read_shard, write_shard

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

ATTRIBUTION = "attribution"
PILOT = "pilot"
CHOSEN = "chosen"


@dataclass(frozen=True)
class Shard:
    """A piece of work.

    Attributes:
        index: Its place among the shards of its stage.
        prompts: What to score.
        wanted: Which heads on which prompts, [prompt, layer, head]; None for all.
    """

    index: int
    prompts: Sequence[Prompt]
    wanted: Bool[Tensor, "prompt layer head"] | None


class Worker(Protocol):
    """Whatever turns shards into tables."""

    def __call__(self, shards: Sequence[Shard], tick: Tick) -> Iterator[tuple[int, pa.Table]]:
        """Give each shard's index and table as it is done, in any order."""
        ...


class Local:
    """Scores shards in this process, one after the other."""

    def __init__(self, model: TransformerBridge, job: Job) -> None:
        self.scorer = Scorer(model, job)

    def __call__(self, shards: Sequence[Shard], tick: Tick) -> Iterator[tuple[int, pa.Table]]:
        """Give each shard's index and table, in order."""
        for shard in shards:
            yield shard.index, self.scorer.table(shard.prompts, shard.wanted, tick)


def _answers(table: pa.Table, shard: Shard) -> bool:
    """Whether a kept table is of these prompts, and of the heads that are wanted now.

    When the estimate is made anew, its last digits may choose other heads.
    """
    if table["example"].to_pylist() != [prompt.example.name for prompt in shard.prompts]:
        return False
    if shard.wanted is None:
        return True
    scored = ~np.isnan(HeadScores.from_table(table, {}).data["pcs"].values)
    return bool((scored == shard.wanted.numpy()[:, :, : scored.shape[2]]).all())


class Shards:
    """The shards of a run: which are there, which are still to be done.

    Args:
        folder: The run folder; None keeps everything in memory.
        size: Examples a shard.
        heads: Heads of the model.
        stop: Looked at after every shard.
        bar: A progress bar, of (example, head) pairs.
    """

    def __init__(
        self, folder: Path | None, size: int, heads: int, stop: runs.Stop, bar: Any
    ) -> None:
        self.folder = folder
        self.heads = heads
        self.size = size
        self.stop = stop
        self.bar = bar

    def finished(self, examples: int) -> bool:
        """Whether all shards of the last stage are there."""
        if self.folder is None:
            return False
        return len(runs.shards(self.folder)) >= -(-examples // self.size)

    def run(
        self,
        worker: Worker,
        prompts: Sequence[Prompt],
        title: str,
        wanted: Bool[Tensor, "prompt layer head"] | None = None,
        stage: str = runs.SHARDS,
    ) -> pa.Table:
        """Do what is missing of a stage, and give its rows in the prompts' order.

        Raises:
            runs.Stopped: After the shard in which that was asked for.
        """
        tables: dict[int, pa.Table] = {}
        todo = []
        for index, start in enumerate(range(0, len(prompts), self.size)):
            rows = slice(start, start + self.size)
            part = Shard(index, prompts[rows], None if wanted is None else wanted[rows])
            path = None if self.folder is None else runs.shard_path(self.folder, index, stage)
            kept = None
            if path is not None and path.exists():
                kept = read_shard(path, len(part.prompts))
            if kept is not None and _answers(kept, part):
                tables[index] = kept
            else:
                todo.append(part)
        pairs = self.heads * len(prompts) if wanted is None else int(wanted.sum())
        left = sum(self._pairs(shard) for shard in todo)
        self.bar.reset(pairs)
        self.bar.set_description(title)
        self.bar.update(pairs - left)
        for index, table in worker(todo, self.bar.update):
            if self.folder is not None:
                write_shard(table, runs.shard_path(self.folder, index, stage))
            tables[index] = table
            if self.stop.asked and self.folder is not None:
                raise runs.Stopped(len(runs.shards(self.folder, stage)), self.folder)
        return pa.concat_tables(tables[index] for index in sorted(tables))

    def keep(self, table: pa.Table) -> None:
        """Write rows that come of several stages as the run's shards."""
        if self.folder is None:
            return
        for index, start in enumerate(range(0, table.num_rows, self.size)):
            path = runs.shard_path(self.folder, index)
            if not path.exists():
                write_shard(table.slice(start, self.size), path)

    def _pairs(self, shard: Shard) -> int:
        """Number of (example, head) pairs."""
        if shard.wanted is None:
            return self.heads * len(shard.prompts)
        return int(shard.wanted.sum())


def screened(
    workers: Callable[[Job], Worker],
    job: Job,
    prompts: Sequence[Prompt],
    shards: Shards,
    screen: Screen,
) -> pa.Table:
    """The estimate for all heads, exact scores for the most promising; `screening` says how.

    Args:
        workers: Makes whatever does a job's shards.
        job: The exact job.
        prompts: What to score.
        shards: Where to keep what is done.
        screen: For which sets.

    Returns:
        Rows of `SCHEMA` and `SCREENED`.
    """
    tasks = [prompt.example.task for prompt in prompts]
    estimator = workers(replace(job, method="attribution"))
    rough = shards.run(estimator, prompts, "estimating", stage=ATTRIBUTION)
    estimate = HeadScores.from_table(rough, {})
    values = estimate.data["pcs"].values
    exact = workers(job)
    first = pilot(tasks, screen.seed)
    corrected, full = values, None
    if first:
        some = [prompts[i] for i in first]
        full = shards.run(exact, some, "scoring the pilot", stage=PILOT)
        known = HeadScores.from_table(full, {}).data["pcs"].values
        corrected = values + correction(values, known, first, tasks)
    chosen, audited = choose(values, corrected, estimate.groups(screen.by), screen)
    wanted = torch.from_numpy(chosen | audited)
    wanted[first] = False
    table = shards.run(exact, prompts, "scoring the chosen heads", wanted, CHOSEN)
    scores = HeadScores.from_table(table, {}).data["pcs"].values
    if full is not None:
        scores[first] = HeadScores.from_table(full, {}).data["pcs"].values
    shape = estimate.heads_per_layer
    columns = {"pcs": scores, "attribution": values, "audited": audited}
    for name, grid in columns.items():
        kind = pa.schema([*SCHEMA, *SCREENED]).field(name).type
        column = pa.array(ragged(grid, shape), type=kind)
        if name in table.column_names:
            table = table.set_column(table.column_names.index(name), name, column)
        else:
            table = table.append_column(name, column)
    shards.keep(table)
    return table
