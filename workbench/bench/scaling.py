"""How time grows, what a shared profile saves, and what long prompts take of memory."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from workbench.bench.clock import MIB, interleaved, peak_mib, start_over
from workbench.bench.inputs import LlamaSize, quiet_load, random_prompts, write_llama
from workbench.data.prompts import Prompt
from workbench.discovery import cost
from workbench.discovery.replay import Replay
from workbench.discovery.room import tokens_that_fit
from workbench.discovery.scorer import Job, Scorer
from workbench.discovery.shapes import shape_of

Tell = Callable[[str], object]
FACTORS = (1, 2, 4)
GROWING = ("tokens", "layers", "heads", "examples")
# Methods timed, and what `plan` calls them.
GROWTH_METHODS: dict[Literal["exact", "attribution"], str] = {
    "exact": "replay",
    "attribution": "attribution",
}


@dataclass(frozen=True)
class Task:
    """A model's size and the prompts that it is given.

    Attributes:
        size: Of the model.
        examples: How many prompts.
        tokens: Tokens of each, target counted.
        target: How many of them are target.
        shared: How many of the first are the same in all.
    """

    size: LlamaSize
    examples: int
    tokens: int
    target: int
    shared: int = 0

    def times(self, what: str, factor: int) -> Task:
        """With so many times the tokens, examples, layers, or heads (in the same width)."""
        if what in ("tokens", "examples"):
            return replace(self, **{what: getattr(self, what) * factor})
        return replace(self, size=replace(self.size, **{what: getattr(self.size, what) * factor}))

    def prompts(self) -> list[Prompt]:
        """Random ones."""
        return random_prompts(
            self.size.vocabulary, self.examples, self.tokens, self.target, self.shared
        )

    def operations(self, method: str) -> float:
        """As `workbench plan` counts them, all examples together."""
        shape = shape_of(self.size.config())
        return cost.operations(shape, method, self.tokens, self.target).total * self.examples


@dataclass(frozen=True)
class Place:
    """Where things are measured.

    Attributes:
        folder: For checkpoints of random models.
        device: To measure on.
        dtype: Of the weights.
        repeats: How often each call is timed.
        tell: Given a line about what is done.
    """

    folder: Path
    device: str
    dtype: str
    repeats: int
    tell: Tell


def growth(base: Task, place: Place) -> list[dict[str, Any]]:
    """Seconds of replay and of the estimate at 1, 2 and 4 times of everything.

    `exponent` is the slope of log seconds over log size; `counted` is that of the operations.
    What a pass costs beside its operations makes the first smaller than the second.
    """
    calls = _scoring(base, "", place)  # times 1 of everything is the same, and timed once
    for what in GROWING:
        for factor in FACTORS[1:]:
            calls |= _scoring(base.times(what, factor), f" {what} x {factor}", place)
    for call in calls.values():
        call()
    timed = interleaved(
        calls, place.repeats, place.device, tell=lambda line: place.tell(f"growth: {line}")
    )
    rows = []
    for method, planned in GROWTH_METHODS.items():
        for what in GROWING:
            seconds = [timed[_label(method, what, f)].median for f in FACTORS]
            counts = [base.times(what, factor).operations(planned) for factor in FACTORS]
            rows.append(
                {
                    "method": planned,
                    "what": what,
                    "from": getattr(base, what, None) or getattr(base.size, what),
                    "factors": list(FACTORS),
                    "seconds": seconds,
                    "exponent": _slope(seconds),
                    "counted": _slope(counts),
                }
            )
    return rows


def _label(method: str, what: str, factor: int) -> str:
    return f"{method} {what} x {factor}" if factor > 1 else method


def _slope(values: list[float]) -> float:
    return float(np.polyfit(np.log(FACTORS), np.log(values), 1)[0])


def _scoring(task: Task, label: str, place: Place) -> dict[str, Callable[[], Any]]:
    """A call for each method, named by the method and the label."""
    model = quiet_load(write_llama(task.size, place.folder), place.device, place.dtype)
    tokens, prompts = tokens_that_fit(model), task.prompts()
    return {
        method + label: partial(Scorer(model, Job(method, "replay", tokens)).scores, prompts)
        for method in GROWTH_METHODS
    }


def shared_profile(task: Task, place: Place) -> dict[str, Any]:
    """Replay of one user's queries, with and without running their profile once a head."""
    model = quiet_load(write_llama(task.size, place.folder), place.device, place.dtype)
    prompts, tokens = task.prompts(), tokens_that_fit(model)
    engines = {name: Replay(model, tokens, shared=name == "shared") for name in ("apart", "shared")}
    for engine in engines.values():
        engine.score(prompts[:2], wanted=_heads(engine, 2, 1))
    timed = interleaved(
        {name: partial(engine.score, prompts) for name, engine in engines.items()},
        place.repeats,
        place.device,
        tell=lambda line: place.tell(f"shared-profile: {line}"),
    )
    apart, together = timed["apart"], timed["shared"]
    return {
        "model": task.size.name,
        "queries": task.examples,
        "profile_tokens": task.shared,
        "query_tokens": task.tokens - task.shared,
        "apart": apart.record() | {"peak_mib": apart.peak_mib},
        "shared": together.record() | {"peak_mib": together.peak_mib},
        "ratio": apart.median / together.median,
        "max_abs_diff": float((apart.result[0] - together.result[0]).abs().max()),
    }


def _heads(engine: Replay, prompts: int, count: int) -> torch.Tensor:
    """A mask of the first heads of the first block, on all prompts."""
    wanted = torch.zeros((prompts, len(engine.shape), max(engine.shape)), dtype=torch.bool)
    wanted[:, 0, :count] = True
    return wanted


def memory(task: Task, place: Place) -> dict[str, Any]:
    """Most memory that exact replay of one long prompt takes, in a process of its own.

    Heads of the first block are replayed, as many as fill two passes: while they are, the clean
    pass's tensors of all blocks are still held. Every later block holds fewer, beside passes of
    the same size.
    """
    place.tell(f"memory: replay at {task.tokens} tokens in a process of its own")
    folder = write_llama(task.size, place.folder)
    threads = torch.get_num_threads()
    # Not forked: a fork would begin with what this process holds.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        measured = pool.submit(
            _replay_alone, folder, task, place.device, place.dtype, threads
        ).result()
    shape = shape_of(task.size.config())
    tokens = measured["batch_tokens"]
    counted = cost.memory(shape, "replay", task.tokens, task.target, tokens).total
    return {
        "model": task.size.name,
        "tokens": task.tokens,
        "target": task.target,
        **measured,
        "counted_mib": counted / MIB,
    }


def _replay_alone(
    folder: Path, task: Task, device: str, dtype: str, threads: int
) -> dict[str, Any]:
    torch.set_num_threads(threads)
    model = quiet_load(folder, device, dtype)
    tokens = tokens_that_fit(model)
    engine = Replay(model, tokens)
    start_over(device)
    loaded = peak_mib(device)
    heads = min(engine.shape[0], 2 * max(1, tokens // task.tokens))
    engine.score(task.prompts()[:1], wanted=_heads(engine, 1, heads))
    return {"batch_tokens": tokens, "loaded_mib": loaded, "peak_mib": peak_mib(device)}
