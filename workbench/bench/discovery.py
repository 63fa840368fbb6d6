"""One discovery case: every way of scoring heads on the same model and prompts, taking turns.

- `loop`: TransformerLens as it comes, one head and one example a pass, logits at all positions.
- `batched`: the reference, one head a pass over a batch of examples.
- `replay`, `attribution`, `screened`: what `score_heads` runs, without the checks before a run.

Where the loop would take minutes, one head of every block is timed and the seconds are multiplied
by passes wanted over passes made. All passes of the loop are the same work whichever head is
ablated, and so are those of `batched`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Bool
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from workbench import runs
from workbench.bench.clock import Timed, interleaved
from workbench.bench.fit import fitted, rows_of_a_pass
from workbench.bench.machine import Gauge
from workbench.data.prompts import Prompt
from workbench.discovery import cost, stages
from workbench.discovery.check import one_head_a_block
from workbench.discovery.room import tokens_that_fit
from workbench.discovery.scorer import REFERENCE, Job, Scorer
from workbench.discovery.screening import Screen, missed
from workbench.discovery.shapes import Shape, shape_of
from workbench.heads import top_k
from workbench.hooks import hook_name
from workbench.models import heads_per_layer
from workbench.scores import HeadScores

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Scores = NDArray[np.float32]
# What `plan` calls the methods.
PLANNED = {
    "loop": "loop",
    "batched": "reference",
    "replay": "replay",
    "attribution": "attribution",
    "screened": "screened",
}
EXACT = ("loop", "batched", "replay")


@dataclass(frozen=True)
class Case:
    """A model and prompts to measure on.

    Attributes:
        name: What the results call it.
        model: From `load_model`.
        prompts: All of one length.
        k: Size of the head sets that are screened for.
        sampled: Time the loop and the batched reference on one head of every block only.
    """

    name: str
    model: TransformerBridge
    prompts: Sequence[Prompt]
    k: int
    sampled: bool

    @property
    def tokens(self) -> int:
        """Length of the prompts with their targets."""
        return len(self.prompts[0].ids) + len(self.prompts[0].target_ids)

    @property
    def heads(self) -> int:
        """Heads of the model."""
        return sum(heads_per_layer(self.model))

    @property
    def device(self) -> str:
        """What the model runs on."""
        return str(self.model.cfg.device)

    def shape(self) -> Shape:
        """As costs are counted from it."""
        dtype = str(self.model.cfg.dtype).removeprefix("torch.")
        return shape_of(self.model.original_model.config, dtype)

    def minimum(self) -> float:
        """Operations that exact PCS of every head needs at least."""
        shape = self.shape()
        counts = (len(prompt.target_ids) for prompt in self.prompts)
        return sum(cost.minimum(shape, self.tokens, count).total for count in counts)


@dataclass(frozen=True)
class Method:
    """A way of scoring heads.

    Attributes:
        run: The work that is timed.
        warm: Some of it, run before anything is timed.
        scale: What the seconds of `run` are multiplied by.
    """

    run: Callable[[], Any]
    warm: Callable[[], Any]
    scale: float = 1.0


def methods(case: Case) -> dict[str, Method]:
    """What is timed, by name."""
    tokens = tokens_that_fit(case.model)
    some = one_head_a_block(case.model, 1)
    timed = some if case.sampled else _all_heads(case.model)
    scale = (case.heads + 1) / (int(timed.sum()) + 1)
    first = case.prompts[:1]
    everywhere = timed.expand(len(case.prompts), -1, -1)

    @cache
    def worker(job: Job) -> stages.Local:
        return stages.Local(case.model, job)

    def scores(
        method: Literal["exact", "attribution"],
        engine: str,
        prompts: Sequence[Prompt],
        wanted: Bool[Tensor, "prompt layer head"] | None,
    ) -> Scores:
        scorer: Scorer = worker(Job(method, engine, tokens)).scorer
        return scorer.scores(prompts, wanted)[0].numpy()

    def screened(prompts: Sequence[Prompt], k: int) -> HeadScores:
        shards = stages.Shards(None, len(prompts), case.heads, runs.Stop(), tqdm(disable=True))
        job = Job("exact", "replay", tokens)
        table = stages.screened(worker, job, prompts, shards, Screen(k))
        return HeadScores.from_table(table, {})

    exact, estimate = partial(scores, "exact"), partial(scores, "attribution", "replay")
    return {
        "loop": Method(
            lambda: plain_loop(case.model, case.prompts, timed[0]),
            lambda: plain_loop(case.model, first, some[0]),
            scale,
        ),
        "batched": Method(
            lambda: exact(REFERENCE, case.prompts, everywhere),
            lambda: exact(REFERENCE, first, some),
            scale,
        ),
        "replay": Method(
            lambda: exact("replay", case.prompts, None), lambda: exact("replay", first, some)
        ),
        "attribution": Method(lambda: estimate(case.prompts, None), lambda: estimate(first, None)),
        "screened": Method(lambda: screened(case.prompts, case.k), lambda: screened(first, 1)),
    }


@torch.inference_mode()
def plain_loop(
    model: TransformerBridge, prompts: Sequence[Prompt], wanted: Bool[Tensor, "layer head"]
) -> Scores:
    """PCS by one whole pass for each head and example, in nats per target token; NaN elsewhere."""

    def loss(hooks: Sequence[tuple[str, Callable[..., Tensor]]]) -> float:
        logits = model.run_with_hooks(tokens, fwd_hooks=list(hooks))
        before = logits[0, start - 1 : -1].float()
        return float(cross_entropy(before, tokens[0, start:]))

    def without(head: int, z: Tensor, hook: Any) -> Tensor:
        z[:, :, head] = 0
        return z

    pcs = np.full((len(prompts), *wanted.shape), np.nan, dtype=np.float32)
    for row, prompt in enumerate(prompts):
        tokens = torch.tensor([prompt.ids + prompt.target_ids], device=model.cfg.device)
        start = len(prompt.ids)
        full = loss(())
        for layer, head in wanted.nonzero().tolist():
            pcs[row, layer, head] = loss([(hook_name(layer), partial(without, head))]) - full
    return pcs


def _all_heads(model: TransformerBridge) -> Bool[Tensor, "1 layer head"]:
    shape = heads_per_layer(model)
    return torch.tensor([[[head < count for head in range(max(shape))] for count in shape]])


def measure(
    case: Case, gauge: Gauge, repeats: int, tell: Callable[[str], object]
) -> dict[str, Timed]:
    """Time all methods of a case in turn, the machine between them."""
    found = methods(case)
    for name, method in found.items():
        tell(f"{case.name}: warming up {name}")
        method.warm()
    calls: dict[str, Callable[[], Any]] = {name: method.run for name, method in found.items()}
    return interleaved(
        {"the machine itself": gauge.measure, **calls},
        repeats,
        case.device,
        {name: method.scale for name, method in found.items()},
        lambda line: tell(f"{case.name}: {line}"),
    )


def rows(case: Case, timed: Mapping[str, Timed], machine: cost.Machine) -> list[dict[str, Any]]:
    """What `discovery` holds of a case, a row a method."""
    loop = timed["loop"]
    least = case.minimum() / machine.rate
    result = []
    for method in PLANNED:
        entry = timed[method]
        scores = _scores(entry.result)
        exact = method in EXACT
        # An estimate has no share in the limit of exact scores, and no difference to be small.
        comparable = exact or method == "screened"
        result.append(
            {
                "case": case.name,
                "method": method,
                **entry.record(),
                "ratio_to_loop": loop.median / entry.median,
                "max_abs_diff": _distance(scores, loop.result) if comparable else None,
                "peak_mib": entry.peak_mib,
                "share_of_limit": least / entry.median if exact else None,
            }
        )
    return result


def _scores(result: Scores | HeadScores) -> Scores:
    return result.data["pcs"].values if isinstance(result, HeadScores) else result


def _distance(found: Scores, wanted: Scores) -> float | None:
    """Largest difference on the scores that both have; None if they have none in common."""
    apart = np.abs(found - wanted)
    return float(np.nanmax(apart)) if np.isfinite(apart).any() else None


def description(case: Case, timed: Mapping[str, Timed]) -> dict[str, Any]:
    """What a case consists of."""
    shape = case.shape()
    scored = int(np.isfinite(timed["loop"].result[0]).sum())
    return {
        "case": case.name,
        "layers": shape.layers,
        "heads": case.heads,
        "d_model": shape.d_model,
        "vocabulary": shape.vocabulary,
        "examples": len(case.prompts),
        "tokens": case.tokens,
        "target": max(len(prompt.target_ids) for prompt in case.prompts),
        "heads_timed_in_the_loop": scored,
        "minimum_operations": case.minimum(),
    }


def screening(case: Case, timed: Mapping[str, Timed]) -> dict[str, Any]:
    """How well the estimate ranks heads, and what screening finds of the exact top K."""
    exact = timed["replay"].result.astype(np.float64)
    estimate = timed["attribution"].result.astype(np.float64)
    result: HeadScores = timed["screened"].result
    groups = result.groups("task")
    recall, alone, rank = [], [], []
    for members in groups.values():
        both = exact[members].mean(axis=0)
        wanted = set(top_k(both, case.k))
        means = result.data["pcs"].values[members].astype(np.float64).mean(axis=0)
        recall.append(len(wanted & set(top_k(means, case.k))) / case.k)
        rough = estimate[members].mean(axis=0)
        alone.append(len(wanted & set(top_k(rough, case.k))) / case.k)
        there = np.isfinite(both)
        rank.append(spearmanr(both[there], rough[there]).statistic)
    audit = missed(
        result.data["pcs"].values, result.data["audited"].values, groups, case.k, case.heads
    )
    return {
        "case": case.name,
        "k": case.k,
        "groups": len(groups),
        "heads_scored": cost.screened_heads(case.shape(), case.k),
        "recall": float(np.mean(recall)),
        "recall_least": min(recall),
        "recall_bound": audit.recall,
        "attribution_recall": float(np.mean(alone)),
        "attribution_spearman": float(np.mean(rank)),
        "attribution_error": float(np.nanmax(np.abs(estimate - exact))),
        "largest_score": float(np.nanmax(np.abs(exact))),
    }


def planned(
    case: Case, timed: Mapping[str, Timed], machines: Mapping[str, cost.Machine]
) -> list[dict[str, Any]]:
    """What `workbench plan` says of a case on this machine, beside what was measured.

    Args:
        case: The case.
        timed: What was measured.
        machines: What `fit` found for each method.
    """
    shape = case.shape()
    result = []
    for method, name in PLANNED.items():
        replayed = cost.screened_heads(shape, case.k) if method == "screened" else 0
        estimate = sum(
            cost.seconds(
                *(shape, name, case.tokens, len(prompt.target_ids), machines[method]),
                batch_tokens=_rows_of_a_pass(case, name) * case.tokens,
                replayed=replayed,
            )
            for prompt in case.prompts
        )
        measured = timed[method].median
        result.append(
            {
                "case": case.name,
                "method": method,
                "estimated": estimate,
                "measured": measured,
                "ratio": estimate / measured,
                "machine": asdict(machines[method]),
            }
        )
    return result


def fit(case: Case, base: cost.Machine) -> dict[str, cost.Machine]:
    """The machine at the sizes of each method's passes."""
    return {
        method: fitted(
            case.shape(), name, _rows_of_a_pass(case, name), case.tokens, case.device, base
        )
        for method, name in PLANNED.items()
    }


def _rows_of_a_pass(case: Case, method: str) -> int:
    tokens = tokens_that_fit(case.model)
    return rows_of_a_pass(case.shape(), method, len(case.prompts), case.tokens, tokens)
