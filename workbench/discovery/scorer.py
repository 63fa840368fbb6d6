"""What is done with a shard, the same wherever it is done: here or in a worker far away."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from workbench.batches import by_length
from workbench.data.prompts import Prompt
from workbench.discovery.ablation import score_batch
from workbench.discovery.attribution import attribute
from workbench.discovery.replay import Replay
from workbench.discovery.twin import NotReplayableError
from workbench.errors import InputError
from workbench.models import heads_per_layer
from workbench.scores import SCHEMA

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from workbench.discovery.stages import Shard

Method = Literal["exact", "attribution", "screened"]
Means = Sequence[Float[Tensor, "head d_head"] | None] | None
Scores = tuple[Float[Tensor, "prompt layer head"], Float[Tensor, " prompt"]]
Tick = Callable[[int], object]

REFERENCE = "reference"
# From the fastest to the most general. What each leaves out of `Replay`, the next also does.
ENGINES: dict[str, dict[str, Any]] = {
    "replay": {},
    "replay, last block whole": {"reduced": False},
    "replay, PyTorch's attention": {"reduced": False, "attention": "sdpa"},
    "replay, eager attention": {"reduced": False, "attention": "eager"},
}


@dataclass(frozen=True)
class Job:
    """What is computed for every prompt.

    Attributes:
        method: `exact` or `attribution`; screening is one of each.
        engine: A name in `ENGINES`, or `reference`.
        batch_tokens: Most tokens in a pass, padding counted.
        means: What replaces an ablated head's z; None for zeros.
    """

    method: Literal["exact", "attribution"]
    engine: str
    batch_tokens: int
    means: Means = None

    def open(self, model: TransformerBridge) -> Callable[[Shard, Tick], pa.Table]:
        """What does a shard of this job with a model; `crew.Replica` calls it.

        Raises:
            NotReplayableError: As `Scorer`.
        """
        scorer = Scorer(model, self)
        return lambda shard, tick: scorer.table(shard.prompts, shard.wanted, tick)


class Scorer:
    """Scores prompts with a model.

    Args:
        model: From `load_model`.
        job: What to compute.

    Raises:
        NotReplayableError: The model can't be run by the engine that the job names.
    """

    def __init__(self, model: TransformerBridge, job: Job) -> None:
        self.model = model
        self.job = job
        self.shape = heads_per_layer(model)
        self.batch_tokens = job.batch_tokens
        self.engine = (
            None
            if job.engine == REFERENCE
            else Replay(model, job.batch_tokens, **ENGINES[job.engine])
        )
        if job.method == "attribution" and self.engine is None:
            raise NotReplayableError("the gradient estimate needs the replay engine")

    def table(
        self,
        prompts: Sequence[Prompt],
        wanted: Bool[Tensor, "prompt layer head"] | None = None,
        tick: Tick = lambda count: None,
    ) -> pa.Table:
        """One shard's rows.

        Raises:
            InputError: As `scores` does.
        """
        pcs, nll = self.scores(prompts, wanted, tick)
        rows = []
        for i, prompt in enumerate(prompts):
            example = prompt.example
            rows.append(
                {
                    "example": example.name,
                    "user": example.user,
                    "task": example.task,
                    "nll": float(nll[i]),
                    "target_tokens": len(prompt.scored),
                    "pcs": [pcs[i, layer, :n].tolist() for layer, n in enumerate(self.shape)],
                }
            )
        return pa.Table.from_pylist(rows, schema=SCHEMA)

    def scores(
        self,
        prompts: Sequence[Prompt],
        wanted: Bool[Tensor, "prompt layer head"] | None = None,
        tick: Tick = lambda count: None,
    ) -> Scores:
        """Scores and the intact model's loss; `Replay.score` says how they look.

        Memory that runs out is answered with passes of half the size, from the start of these
        prompts.

        Raises:
            InputError: A loss is NaN or infinite, or one example doesn't fit into memory.
        """
        longest = max(len(prompt.ids) + len(prompt.target_ids) for prompt in prompts)
        while True:
            done = 0

            def count(pairs: int) -> None:
                nonlocal done
                done += pairs
                tick(pairs)

            try:
                pcs, nll = self._scores(prompts, wanted, count)
                break
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                tick(-done)
                self._shrink(longest, error)
        for i, prompt in enumerate(prompts):
            name = prompt.example.name
            self._check_finite(name, pcs[i], nll[i], None if wanted is None else wanted[i])
        return pcs, nll

    def _scores(self, prompts: Sequence[Prompt], wanted: Tensor | None, tick: Tick) -> Scores:
        if self.engine is None:
            return self._reference(prompts, wanted, tick)
        self.engine.batch_tokens = self.batch_tokens
        if self.job.method == "exact":
            return self.engine.score(prompts, self.job.means, wanted, tick)
        return self._attribution(self.engine, prompts, tick)

    def _attribution(self, engine: Replay, prompts: Sequence[Prompt], tick: Tick) -> Scores:
        pcs = torch.full((len(prompts), len(self.shape), max(self.shape)), torch.nan)
        nll = torch.empty(len(prompts))
        for members in engine.attribution_batches(prompts):
            rows = engine.rows([prompts[i] for i in members], 0)
            pcs[members], nll[members] = attribute(engine, rows, self.job.means)
            tick(len(members) * sum(self.shape))
        return pcs, nll

    def _reference(self, prompts: Sequence[Prompt], wanted: Tensor | None, tick: Tick) -> Scores:
        pcs = torch.full((len(prompts), len(self.shape), max(self.shape)), torch.nan)
        nll = torch.empty(len(prompts))
        for members, batch in by_length(self.model, prompts, self.batch_tokens):
            some = None if wanted is None else wanted[members].any(dim=0)
            found, nll[members] = score_batch(
                self.model, batch, self.job.means, partial(tick, len(members)), some
            )
            pcs[members] = found if wanted is None else found.where(wanted[members], torch.nan)
        return pcs, nll

    def _shrink(self, longest: int, error: Exception) -> None:
        if self.batch_tokens <= longest:
            raise InputError(
                f"out of memory with a single example of {longest} tokens in a pass: "
                f"{str(error).splitlines()[0]} Lower --max-prompt-tokens, or take a smaller "
                "--dtype or another --device; finished shards are kept"
            ) from error
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.batch_tokens = max(longest, self.batch_tokens // 2)

    def _check_finite(self, name: str, pcs: Tensor, nll: Tensor, wanted: Tensor | None) -> None:
        """A head without a finite loss must neither vanish from a ranking nor lead it."""
        if not math.isfinite(nll):
            raise InputError(
                f"{name}: the model's loss is {float(nll)}; its logits hold NaN or infinity. "
                "Try --dtype float32, or check the checkpoint"
            )
        for layer, heads in enumerate(self.shape):
            bad = ~pcs[layer, :heads].isfinite()
            if wanted is not None:
                bad &= wanted[layer, :heads]
            if bool(bad.any()):
                raise InputError(
                    f"{name}: without L{layer}H{int(bad.nonzero()[0])} the model's loss is NaN or "
                    "infinite. Try --dtype float32, or --ablation mean"
                )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or on the machine, where torch has no class for it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and (
        "not enough memory" in text or "can't allocate memory" in text
    )
