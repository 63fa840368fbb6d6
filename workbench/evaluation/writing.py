"""Answers of many methods to many examples, written in shards and kept as soon as they are done.

A cell is one method's answers to one task's examples. The shards of all cells that can be written
now are one queue, which this process works off, or workers under Ray.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch

from workbench import runs
from workbench.data.examples import Example
from workbench.data.prompts import PromptSettings
from workbench.data.tasks import get_task
from workbench.discovery.scorer import Tick, is_out_of_memory
from workbench.errors import InputError
from workbench.evaluation.methods import Candidate
from workbench.evaluation.results import ANSWER, ANSWERS, read_rows, write_rows
from workbench.steering.contrast import Contrast
from workbench.steering.decode import Generation, generate
from workbench.steering.labels import Decision, decide
from workbench.steering.native import Prefill
from workbench.steering.prompts import PromptCache
from workbench.steering.room import BatchTooLargeError

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

VALIDATION = "validation"
FAILED, MADE_BY = b"failed", b"made by"  # metadata of a shard's table
Worker = Callable[[Sequence["Piece"], Tick], Iterator[tuple[int, pa.Table]]]
"""Whatever turns pieces into tables: gives each piece's index and table as it is done."""


@dataclass(frozen=True)
class Cell:
    """One method's answers to one task's examples.

    Attributes:
        stage: Where its shards lie in the run folder.
        examples: What is answered.
        candidate: By what.
    """

    stage: str
    examples: Sequence[Example]
    candidate: Candidate


@dataclass(frozen=True)
class Piece:
    """A shard of a cell as a worker gets it.

    Attributes:
        index: Its place in the queue.
        cell: Stage of the cell that it is a part of.
        examples: What is answered.
        contrast: With what; None for the plain model.
    """

    index: int
    cell: str
    examples: Sequence[Example]
    contrast: Contrast | None


@dataclass(frozen=True)
class AnswerJob:
    """How answers come about, the same for all methods.

    Attributes:
        by_likelihood: Take the likeliest label where the task has labels, instead of writing.
        prefill: See `generate`.
        max_new_tokens: Limit of new tokens.
        prompt: How prompts are built.
        batch_tokens: Most tokens kept at a time; None for what the memory at hand allows.
    """

    by_likelihood: bool
    prefill: Prefill
    max_new_tokens: int
    prompt: PromptSettings
    batch_tokens: int | None

    def open(self, model: TransformerBridge) -> Answerer:
        """What answers with a model; a worker of `discovery.crew` calls it."""
        return Answerer(model, self)


class Answerer:
    """Answers pieces with a model.

    An example's prompts are built once, with its profile and without, whatever the number of cells.

    Attributes:
        batch_tokens: As the job's, or less since memory ran out.
        failed: Stage of a cell -> why its contrast can't be used; the rest of it isn't tried.
    """

    def __init__(self, model: TransformerBridge, job: AnswerJob) -> None:
        self.model = model
        self.job = job
        self.batch_tokens = job.batch_tokens
        self.prompts = PromptCache(model)
        self.failed: dict[str, str] = {}

    def __call__(self, piece: Piece, tick: Tick) -> pa.Table:
        """One piece's rows; without rows, and with the reason, where a contrast can't be used.

        That is so, too, where a single example with the contrast's views doesn't fit into memory.

        Raises:
            InputError: The plain model itself can't answer.
        """
        try:
            if piece.cell not in self.failed:
                return pa.Table.from_pylist(self._rows(piece), schema=ANSWER)
        except InputError as error:
            if piece.contrast is None:
                raise
            self.failed[piece.cell] = str(error)
        finally:
            tick(len(piece.examples))
        return pa.Table.from_pylist([], ANSWER.with_metadata({FAILED: self.failed[piece.cell]}))

    def _rows(self, piece: Piece) -> list[dict[str, Any]]:
        """Memory that runs out is answered with batches of half the size."""
        while True:
            try:
                return self._answer(piece)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._shrink(error)
            # Not before: until here the error holds what the batch did.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _shrink(self, error: Exception) -> None:
        # Most batches are smaller than the limit; half of the limit may be the same batch again.
        held = error.tokens if isinstance(error, BatchTooLargeError) else self.batch_tokens
        if held is None or held < 2:  # it ran out before there was a batch
            raise error
        self.batch_tokens = min(held, self.batch_tokens or held) // 2

    def _answer(self, piece: Piece) -> list[dict[str, Any]]:
        job, asked = self.job, list(piece.examples)
        if job.by_likelihood and get_task(asked[0].task).labels:
            decisions = decide(
                self.model,
                asked,
                piece.contrast,
                prompt=job.prompt,
                prefill=job.prefill,
                batch_tokens=self.batch_tokens,
                prompts=self.prompts,
            )
            return [decided(decision) for decision in decisions]
        answers = generate(
            self.model,
            asked,
            piece.contrast,
            max_new_tokens=job.max_new_tokens,
            prompt=job.prompt,
            prefill=job.prefill,
            batch_tokens=self.batch_tokens,
            prompts=self.prompts,
        )
        return [written(answer) for answer in answers]


def written(answer: Generation) -> dict[str, Any]:
    """A generated answer as a row of `ANSWER`."""
    return {
        "example": answer.example.name,
        "text": answer.text,
        "finished": answer.finished,
        "tokens": len(answer.tokens),
        "logprob": _mean(answer.logprobs),
        "kl": _mean(answer.kl),
    }


def decided(decision: Decision) -> dict[str, Any]:
    """A label that was decided on as a row of `ANSWER`; no token was written.

    The log-probability is the whole label's under the plain model, the divergence that of the
    first step.
    """
    return {
        "example": decision.example.name,
        "text": decision.label,
        "finished": True,
        "tokens": 0,
        "logprob": decision.plain[decision.label],
        "kl": decision.kl,
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


class Local:
    """Answers pieces in this process, one after the other."""

    def __init__(self, model: TransformerBridge, job: AnswerJob) -> None:
        self.answer = job.open(model)

    def __call__(self, pieces: Sequence[Piece], tick: Tick) -> Iterator[tuple[int, pa.Table]]:
        """Give each piece's index and table, in order."""
        for piece in pieces:
            yield piece.index, self.answer(piece, tick)


class Writer:
    """Writes what is missing of cells, and reads them.

    Args:
        folder: The run folder.
        size: Examples a shard.
        stop: Looked at after every shard.
        bar: A progress bar, of answers.

    Attributes:
        failed: Stage of a cell -> why its method can't answer these examples.
    """

    def __init__(self, folder: Path, size: int, stop: runs.Stop, bar: Any) -> None:
        self.folder = folder
        self.size = size
        self.stop = stop
        self.bar = bar
        self.failed: dict[str, str] = {}

    def write(self, worker: Worker, cells: Sequence[Cell]) -> None:
        """Write the shards that aren't there, or aren't of these examples and settings.

        Raises:
            InputError: A file is damaged or can't be written, or the model can't answer.
            runs.Stopped: After the shard in which that was asked for.
        """
        todo: list[tuple[Cell, int, Piece]] = []
        for cell in cells:
            for number, start in enumerate(range(0, len(cell.examples), self.size)):
                part = cell.examples[start : start + self.size]
                if self._is_there(cell, number, part):
                    self.bar.update(len(part))
                else:
                    piece = Piece(len(todo), cell.stage, part, cell.candidate.contrast)
                    todo.append((cell, number, piece))
        for index, table in worker([piece for _, _, piece in todo], self.bar.update):
            cell, number, _ = todo[index]
            self._keep(cell, number, table)
            if self.stop.asked:
                raise runs.Stopped(kept(self.folder), self.folder)

    def texts(self, cell: Cell) -> list[str] | None:
        """A cell's answers in the order of its examples; None where its method failed."""
        if cell.stage in self.failed:
            return None
        tables = [read_rows(path, ANSWER) for path in runs.shards(self.folder, cell.stage)]
        return [str(text) for text in pa.concat_tables(tables)["text"].to_pylist()]

    def _is_there(self, cell: Cell, number: int, part: Sequence[Example]) -> bool:
        path = runs.shard_path(self.folder, number, cell.stage)
        if not path.exists():
            return False
        table = read_rows(path, ANSWER)
        made_by = (table.schema.metadata or {}).get(MADE_BY, b"").decode()
        names = [example.name for example in part]
        return made_by == cell.candidate.digest() and table["example"].to_pylist() == names

    def _keep(self, cell: Cell, number: int, table: pa.Table) -> None:
        failure = (table.schema.metadata or {}).get(FAILED)
        if failure is not None:
            self.failed.setdefault(cell.stage, failure.decode())
            return
        schema = ANSWER.with_metadata({MADE_BY: cell.candidate.digest()})
        write_rows(table.to_pylist(), schema, runs.shard_path(self.folder, number, cell.stage))


def kept(folder: Path) -> int:
    """How many finished shards of answers a run folder holds."""
    return sum(1 for stage in (ANSWERS, VALIDATION) for _ in folder.glob(f"{stage}/*/*/*.parquet"))


def clear_parts(folder: Path) -> None:
    """Remove files that a killed process left half written; `runs.hold` looks less deep."""
    for stage in (ANSWERS, VALIDATION):
        for part in folder.glob(f"{stage}/*/*/.*.part"):
            with suppress(OSError):
                part.unlink()
