"""Before a run: is the fast engine right about this model, and how fine can a score be?"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool
from torch import Tensor

from workbench.batches import by_length
from workbench.data.prompts import Prompt
from workbench.discovery.prefixes import shared_prefixes
from workbench.discovery.room import tokens_that_fit
from workbench.discovery.scorer import (
    ENGINES,
    REFERENCE,
    Job,
    Means,
    Method,
    Scorer,
    is_out_of_memory,
)
from workbench.discovery.twin import NotReplayableError
from workbench.errors import InputError
from workbench.hooks import Ablation, mean_z
from workbench.models import heads_per_layer

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

# How far two right ways of computing one score may lie apart: sums in another order. In 16 bits
# every activation is rounded to 8 (bfloat16) or 11 bits: on the testbed 1 score in 20 is then
# 0.03 or 0.004 nats from its value in float32. Where the reference's own spread, which is
# measured, is larger, that counts.
ROUNDING = {torch.float32: 3e-5, torch.float16: 1.25e-2, torch.bfloat16: 0.1}
HALF = (torch.float16, torch.bfloat16)
LARGEST = 10  # times that, whatever the spread
SPREAD = 4  # times the reference's own spread
# Rounding differs tenfold between examples and little between heads: many of the former.
SHARERS = 5  # prompts behind one beginning, enough of them that it is shared in the check, too
NOISE_PROMPTS = 32
NOISE_HEADS = 8


@dataclass(frozen=True)
class Engine:
    """Which engine a run uses, and why one may trust it.

    Attributes:
        name: In `ENGINES`, or `reference`.
        difference: Largest distance from the reference on the scores compared, nats per token;
            None for the reference itself.
        tolerance: What was allowed.
        compared: How many scores were compared.
        passed_over: Faster engines that weren't taken, with the reason.
    """

    name: str
    difference: float | None
    tolerance: float
    compared: int
    passed_over: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """As a manifest holds it."""
        return {**asdict(self), "passed_over": list(self.passed_over)}


@dataclass(frozen=True)
class Prepared:
    """What is known before the first shard.

    Attributes:
        job: What every worker does.
        engine: By what, and why one may trust it.
        noise: As `noise` gives it; None where it was measured before.
    """

    job: Job
    engine: Engine
    noise: dict[str, Any] | None


def prepare(
    model: TransformerBridge,
    prompts: Sequence[Prompt],
    ablation: Ablation,
    method: Method,
    batch_tokens: int | None,
    known: Mapping[str, Any],
) -> Prepared:
    """Batch size, means, engine and noise, on the machine that is to do the work.

    Args:
        model: From `load_model`.
        prompts: What the run is about.
        ablation: `zero` or `mean`.
        method: What is asked for.
        batch_tokens: Most tokens in a pass; None for what the memory allows.
        known: What an earlier start of the run measured. Its `batch_tokens` are kept, since sums
            over other shapes differ in the last digits, unless less fits here: it may have been
            another machine.

    Raises:
        InputError: The method needs the replay engine, and it can't run the model.
    """
    fits = tokens_that_fit(model)
    tokens = batch_tokens or min(known.get("batch_tokens") or fits, fits)
    means = _means(model, prompts, tokens) if ablation == "mean" else None
    engine = choose_engine(model, prompts, tokens, means)
    if engine.name == REFERENCE and method != "exact":
        raise InputError(
            f"the {method} method needs the replay engine, which can't run this model "
            f"({'; '.join(engine.passed_over)}); take --method exact"
        )
    job = Job("exact", engine.name, tokens, means)
    # Of exact scores: it says nothing of how far an estimate moves.
    wanted = method != "attribution" and "noise" not in known
    return Prepared(job, engine, noise(model, prompts, job) if wanted else None)


def _means(model: TransformerBridge, prompts: Sequence[Prompt], tokens: int) -> Means:
    """Mean z on the CPU, from where it can be sent to any worker; whole passes, run eagerly."""
    while True:
        try:
            found = mean_z(model, (batch for _, batch in by_length(model, prompts, tokens)))
            return [None if mean is None else mean.cpu() for mean in found]
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or tokens == 1:
                raise
            tokens //= 2


def choose_engine(
    model: TransformerBridge, prompts: Sequence[Prompt], batch_tokens: int, means: Means = None
) -> Engine:
    """The fastest engine that agrees with the reference on this model and these prompts.

    One head of every block is scored by the reference, hook by hook, and by each engine in turn:
    on the longest prompt (windows and positions show there), the shortest (padding), and some
    that share a beginning, if any do. The intact model's losses are compared as well.

    Args:
        model: From `load_model`.
        prompts: What the run is about.
        batch_tokens: Most tokens in a pass.
        means: What replaces an ablated head's z; None for zeros.
    """
    chosen = sample(prompts)
    wanted = one_head_a_block(model, len(chosen))
    # Alone and in one batch: the reference's own spread is no fault of an engine. But a spread
    # that rounding can't explain is no measure of what to allow.
    alone, together = (
        _stack(Scorer(model, Job("exact", REFERENCE, tokens, means)), parts, wanted, True)
        for tokens, parts in ((batch_tokens, [[p] for p in chosen]), (2**31, [chosen]))
    )
    floor = ROUNDING.get(model.cfg.dtype, ROUNDING[torch.float32])
    tolerance = min(max(floor, SPREAD * _distance(alone, together)), LARGEST * floor)
    compared = int(wanted.sum())
    passed_over: list[str] = []
    for name in ENGINES:
        try:
            scorer = Scorer(model, Job("exact", name, batch_tokens, means))
            found = _stack(scorer, [chosen], wanted, losses=True)
        except NotReplayableError as error:
            passed_over.append(f"{name}: {error}")
            continue
        except torch.AcceleratorError:
            raise  # a GPU that is lost is no matter of layout
        except (TypeError, ValueError, KeyError, AttributeError, IndexError, RuntimeError) as error:
            # A layout that this engine doesn't know shows in many ways; the reference is there.
            passed_over.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}")
            continue
        difference = _distance(found, alone)
        if difference <= tolerance:
            return Engine(name, difference, tolerance, compared, tuple(passed_over))
        passed_over.append(f"{name}: off by {difference:.2g} nats per token")
    return Engine(REFERENCE, None, tolerance, compared, tuple(passed_over))


def sample(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The longest prompt, the shortest, and some behind one beginning if there are such."""
    ids = [(*prompt.ids, *prompt.target_ids) for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    groups = shared_prefixes(ids, [len(prompt.ids) - 1 for prompt in prompts])
    shared = next((members for length, members in groups if length), [])
    return [prompts[i] for i in sorted({order[0], order[-1], *shared[:SHARERS]})]


def one_head_a_block(model: TransformerBridge, prompts: int) -> Bool[Tensor, "prompt layer head"]:
    """A mask of one head in every block that has attention, not the same one everywhere."""
    shape = heads_per_layer(model)
    mask = torch.zeros((prompts, len(shape), max(shape)), dtype=torch.bool)
    for layer, heads in enumerate(shape):
        if heads:
            mask[:, layer, (5 * layer + 3) % heads] = True
    return mask


def noise(model: TransformerBridge, prompts: Sequence[Prompt], job: Job) -> dict[str, Any]:
    """How much scores move when nothing changes but how the sums are arranged.

    Some prompts are scored all at once in one order, and one by one in the other. In 16 bits the
    reference, which arranges the same sums in yet another way, scores them as well: on a CPU many
    16-bit kernels give the same bits for every batch shape, which says nothing of how far they
    are rounded. The larger of the two movements counts.

    Returns:
        `p95` and `largest` absolute difference of one example's score in nats per target token,
        and of how many scores. `p95` is the larger of the 95 % quantile and 1.96 times the root
        mean square: where few scores move, and those by much, the quantile alone sees none of
        it. None where a single prompt leaves nothing to rearrange. The 95 % noise floor of a mean
        over n examples is `p95 / sqrt(n)`: rounding errors of different examples are independent.
    """
    half = model.cfg.dtype in HALF
    count = NOISE_PROMPTS if half else NOISE_PROMPTS // 8
    step = max(1, len(prompts) // count)
    chosen = list(prompts[::step][:count])
    shape = heads_per_layer(model)
    wanted = torch.zeros((len(chosen), len(shape), max(shape)), dtype=torch.bool)
    present = [(layer, head) for layer, heads in enumerate(shape) for head in range(heads)]
    for layer, head in random.Random(0).sample(present, min(NOISE_HEADS, len(present))):
        wanted[:, layer, head] = True
    scorer = Scorer(model, job)
    others = [scorer]
    if half and job.engine != REFERENCE:
        others.append(Scorer(model, replace(job, engine=REFERENCE)))
    together = _stack(scorer, [chosen], wanted)
    single = [[prompt] for prompt in reversed(chosen)]
    moved = [
        (together - _stack(other, single, wanted.flip(0)).flip(0))[wanted].abs() for other in others
    ]
    if len(chosen) == 1 and len(others) == 1:  # alone and together are the same
        return {"p95": None, "largest": None, "scores": 0}
    return {
        "p95": max(
            max(float(each.quantile(0.95)), 1.96 * float(each.square().mean().sqrt()))
            for each in moved
        ),
        "largest": max(float(each.max()) for each in moved),
        "scores": int(wanted.sum()),
    }


def _stack(
    scorer: Scorer, parts: Sequence[Sequence[Prompt]], wanted: Tensor, losses: bool = False
) -> Tensor:
    """Scores of all parts, a row a prompt; with the intact model's loss as a last column."""
    found, start = [], 0
    for part in parts:
        pcs, nll = scorer.scores(part, wanted[start : start + len(part)])
        found.append(torch.cat((pcs.flatten(1), nll[:, None]), dim=1) if losses else pcs)
        start += len(part)
    return torch.cat(found)


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).nan_to_num(0).abs().max())
