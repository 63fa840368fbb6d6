"""Steering cases: what DPS costs beside plain decoding, and both beside their rivals.

All methods write as many tokens behind the same random prompts, greedily; no end-of-text token
ends a row. `rivals.py` holds the ways of others; here are those of the workbench, through the
loop that `wb.generate` runs, with all that it keeps of a step:

- `plain`: no contrast.
- `DPS masked`, `DPS shared`: the two kinds of prefill. The heads are drawn from all, so that they
  reach down to some block, below which both views run as one.
- `DPS masked, upper half`: as many heads, drawn from the upper half of the blocks.

A step is the median over all steps behind the first token; what comes before is the prefill.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from workbench.bench.clock import Timed, interleaved, peak_mib
from workbench.bench.inputs import random_prompts
from workbench.bench.rivals import (
    Watch,
    Writer,
    Written,
    hugging_face,
    own_modules,
    transformer_lens,
    two_passes,
)
from workbench.data.prompts import Prompt
from workbench.heads import Head, HeadSet, all_heads
from workbench.models import heads_per_layer
from workbench.steering.contrast import DPS
from workbench.steering.loop import Loop, Sampling, Work, contrasts_of
from workbench.steering.native import Prefill

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

PLAIN, MASKED, SHARED, UPPER = "plain", "DPS masked", "DPS shared", "DPS masked, upper half"
LENS, NATIVE, TWICE = "TransformerLens", "Hugging Face generate", "two passes"
GAMMA = 0.5
SEED = 0
WARM_TOKENS, WARM_STEPS = 16, 3  # enough to go through all code once


@dataclass(frozen=True)
class Grid:
    """What is decoded.

    Attributes:
        shapes: Rows and prompt tokens of each measurement.
        new_tokens: Written by every row.
        heads: How many DPS goes without; of a model with few, a quarter.
        alone: Most rows that `two passes` are timed on, one after the other; their seconds are
            multiplied.
        often: Where a batch's prompts hold more tokens than this, it is run once only, and not
            with the heads of the upper half.
        mixed: Rows of different lengths whose tokens are compared.
    """

    shapes: tuple[tuple[int, int], ...]
    new_tokens: int = 16
    heads: int = 8
    alone: int = 2
    often: int = 1024
    mixed: int = 8


@dataclass(frozen=True)
class Claim:
    """A ratio of seconds that issue 4 wants.

    Attributes:
        over: Whose seconds.
        under: Divided by whose.
        rows: In a batch of so many.
        at_most: What to stay below, or None.
        at_least: What to reach, or None.
    """

    over: str
    under: str
    rows: int
    at_most: float | None = None
    at_least: float | None = None


def step_claims(rows: int, at_most: float) -> tuple[Claim, ...]:
    """That DPS costs little beside plain decoding."""
    return tuple(Claim(dps, PLAIN, rows, at_most=at_most) for dps in (MASKED, SHARED))


RIVAL_CLAIMS = (
    *(Claim(TWICE, dps, 1, at_least=1.2) for dps in (MASKED, SHARED)),
    *(Claim(TWICE, dps, 32, at_least=10.0) for dps in (MASKED, SHARED)),
    Claim(PLAIN, NATIVE, 8, at_most=1.25),
)


@dataclass(frozen=True)
class Case:
    """A model and what is decoded with it.

    Attributes:
        name: What the results call it.
        source: What they call its model.
        model: From `load_model`.
        grid: Batches and prompts.
        claims: What is wanted of it.
    """

    name: str
    source: str
    model: TransformerBridge
    grid: Grid
    claims: tuple[Claim, ...] = ()

    @property
    def device(self) -> str:
        """What the model runs on."""
        return str(self.model.cfg.device)

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""
        return int(self.model.original_model.get_input_embeddings().weight.shape[0])

    def prompts(self, rows: int, tokens: int) -> list[Prompt]:
        """Random ones of one length."""
        return random_prompts(self.vocabulary, rows, tokens, 0)

    def heads(self) -> dict[str, HeadSet]:
        """Which heads each of the methods goes without."""
        shape = heads_per_layer(self.model)
        everywhere = all_heads(shape)
        upper = [head for head in everywhere if head.layer >= len(shape) // 2]
        count = max(1, min(self.grid.heads, len(everywhere) // 4))
        drawn = _drawn(everywhere, count)
        return {TWICE: drawn, MASKED: drawn, SHARED: drawn, UPPER: _drawn(upper, count)}


def _drawn(heads: Sequence[Head], count: int) -> HeadSet:
    places = np.random.default_rng(SEED).choice(len(heads), size=count, replace=False)
    return HeadSet(tuple(heads[place] for place in sorted(places)))


class GivenWork(Work):
    """Prompts that are token ids already, and that no end-of-text token ends."""

    def __init__(
        self,
        model: TransformerBridge,
        prompts: Sequence[Prompt],
        contrast: DPS | None,
        new_tokens: int,
    ) -> None:
        super().__init__(model, [], contrast, new_tokens, None)
        self.prompts = list(prompts)
        self.examples = [prompt.example for prompt in prompts]
        self.contrasts = contrasts_of(self.examples, contrast)
        self.ends = set()


def by_the_loop(model: TransformerBridge, contrast: DPS | None, prefill: Prefill) -> Writer:
    """The workbench's own way."""

    def write(prompts: Sequence[Prompt], new: int) -> Written:
        watch = Watch(str(model.cfg.device))
        work = GivenWork(model, prompts, contrast, new)
        loop = Loop(work, range(len(prompts)), Sampling(), prefill)
        for _ in loop.steps():
            watch.stamp()
        return Written(loop.new, watch.seconds[0], watch.seconds[1:])

    return write


def methods(case: Case) -> dict[str, Writer]:
    """What is timed, by name."""
    heads, native = case.heads(), own_modules(case.model)
    ours = partial(by_the_loop, case.model)
    return {
        LENS: transformer_lens(case.model),
        NATIVE: hugging_face(native),
        TWICE: two_passes(native, heads[TWICE], GAMMA),
        PLAIN: ours(None, "masked"),
        MASKED: ours(DPS(heads[MASKED], GAMMA), "masked"),
        SHARED: ours(DPS(heads[SHARED], GAMMA), "shared"),
        UPPER: ours(DPS(heads[UPPER], GAMMA), "masked"),
    }


@dataclass
class Trials:
    """A method's calls on one batch, as `interleaved` makes them.

    Attributes:
        write: The method.
        prompts: The batch, or as much of it as is timed.
        new: Tokens to write.
        device: What it runs on.
        times: What a row's seconds are multiplied by where rows go alone; 1 elsewhere.
        first: Seconds to the first token, a call each.
        steps: Seconds of a later step, over all calls.
        extra_mib: Most memory that a call took beyond what was held before; None if unknown.
    """

    write: Writer
    prompts: Sequence[Prompt]
    new: int
    device: str
    times: int = 1
    first: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    extra_mib: float | None = None

    def __call__(self) -> None:
        """Write once more."""
        before = peak_mib(self.device)  # counted anew just now: what is held
        written = self.write(self.prompts, self.new)
        after = peak_mib(self.device)
        self.first.append(written.first * self.times)
        self.steps += [seconds * self.times for seconds in written.steps]
        if before is not None and after is not None:
            self.extra_mib = max(after - before, self.extra_mib or 0.0)


def measure(case: Case, repeats: int, tell: Callable[[str], object]) -> list[dict[str, Any]]:
    """Time all methods on all batches, in turn on each; what `steering` holds of the case."""
    writers = methods(case)
    warm = case.prompts(2, WARM_TOKENS)
    for name, write in writers.items():
        tell(f"{case.name}: warming up {name}")
        write(warm, WARM_STEPS)
    found = []
    for rows, tokens in case.grid.shapes:
        prompts, often = case.prompts(rows, tokens), rows * tokens <= case.grid.often
        trials = {
            name: _trials(case, name, write, prompts)
            for name, write in writers.items()
            if often or name != UPPER
        }
        timed = interleaved(
            trials,
            repeats if often else 1,
            case.device,
            {name: rows / len(one.prompts) for name, one in trials.items()},
            partial(_tell, tell, f"{case.name}, {rows} x {tokens}"),
        )
        found += [_row(case, rows, tokens, name, trials, timed) for name in trials]
    return found


def _tell(tell: Callable[[str], object], where: str, line: str) -> None:
    tell(f"{where}: {line}")


def _trials(case: Case, name: str, write: Writer, prompts: Sequence[Prompt]) -> Trials:
    apart = name == TWICE
    return Trials(
        write,
        prompts[: case.grid.alone] if apart else prompts,
        case.grid.new_tokens,
        case.device,
        len(prompts) if apart else 1,
    )


def _row(
    case: Case,
    rows: int,
    tokens: int,
    name: str,
    trials: Mapping[str, Trials],
    timed: Mapping[str, Timed],
) -> dict[str, Any]:
    mine, plain = trials[name], trials[PLAIN]
    heads = case.heads().get(name)
    return {
        "case": case.name,
        "model": case.source,
        "method": name,
        "batch": rows,
        "prompt": tokens,
        "new_tokens": case.grid.new_tokens,
        "heads": None if heads is None else [str(head) for head in heads],
        "rows_timed": len(mine.prompts),
        **timed[name].record(),
        "prefill_seconds": median(mine.first),
        "step_seconds": median(mine.steps),
        "tokens_per_second": rows * case.grid.new_tokens / timed[name].median,
        "ratio_to_plain": median(mine.steps) / median(plain.steps),
        "prefill_ratio": median(mine.first) / median(plain.first),
        "peak_mib": mine.extra_mib,
    }


def description(case: Case, found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a case consists of, and what its rows come to."""
    shape = heads_per_layer(case.model)
    heads = case.heads()
    return {
        "case": case.name,
        "model": case.source,
        "layers": len(shape),
        "heads": sum(shape),
        "vocabulary": case.vocabulary,
        "gamma": GAMMA,
        "new_tokens": case.grid.new_tokens,
        "heads_without": len(heads[MASKED]),
        "lowest_block": {name: min(h.layer for h in heads[name]) for name in (MASKED, UPPER)},
        "numbers": list(numbers(case.claims, found)),
        "identical": identical(case),
    }


def numbers(
    claims: Sequence[Claim], found: Sequence[Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    """The ratios that are wanted, at every prompt length that was measured."""
    by_name = {(row["method"], row["batch"], row["prompt"]): row for row in found}
    for claim in claims:
        for prompt in dict.fromkeys(row["prompt"] for row in found if row["batch"] == claim.rows):
            over = by_name[claim.over, claim.rows, prompt]
            under = by_name[claim.under, claim.rows, prompt]
            yield {
                "over": claim.over,
                "under": claim.under,
                "batch": claim.rows,
                "prompt": prompt,
                "step": over["step_seconds"] / under["step_seconds"],
                "whole": over["seconds"] / under["seconds"],
                "at_most": claim.at_most,
                "at_least": claim.at_least,
            }


def identical(case: Case) -> dict[str, Any]:
    """Whether a batch of mixed lengths gets the tokens that others give each row alone.

    gamma 0 is held against Hugging Face's greedy ones, `DPS shared` against the two passes'.
    """
    new, heads, native = case.grid.new_tokens, case.heads()[SHARED], own_modules(case.model)
    longest = min(tokens for _, tokens in case.grid.shapes)
    lengths = np.linspace(max(2, longest // 4), longest, case.grid.mixed).round().astype(int)
    prompts = [case.prompts(row + 1, int(n))[row] for row, n in enumerate(lengths)]
    nothing, steered = DPS(heads, 0.0), DPS(heads, GAMMA)
    return {
        "rows": len(prompts),
        "shortest": int(lengths[0]),
        "longest": longest,
        "plain": _same(
            by_the_loop(case.model, nothing, "masked"), hugging_face(native), prompts, new
        ),
        "shared": _same(
            by_the_loop(case.model, steered, "shared"),
            two_passes(native, heads, GAMMA),
            prompts,
            new,
        ),
    }


def _same(together: Writer, alone: Writer, prompts: Sequence[Prompt], new: int) -> int:
    """How many rows of a batch have the tokens that each gets alone."""
    found = together(prompts, new).tokens
    wanted = [alone([prompt], new).tokens[0] for prompt in prompts]
    return sum(a == b for a, b in zip(found, wanted, strict=True))
