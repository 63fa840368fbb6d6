"""The exact engine: PCS of every head without computing anything twice.

Ablating a head of block l changes nothing below it, so for each head only the rest of the model
is run again:

1. A clean pass keeps, at every block, the residual stream that enters it, z, and what its
   attention returns.
2. For head h of block l the attention's output without the head is the clean one minus
   `z_h W_O[h]` (plus the mean's, for mean ablation). With it block l goes on from its MLP; its
   attention is not run again, and the blocks below not at all.
3. Many (example, head) pairs are the rows of one batch.
4. In the last block keys and values are computed at all positions, everything else only where a
   target token is predicted; the logits, too.
5. Examples that begin with the same tokens (one user's queries behind one profile) run the
   ablated beginning once a head, and each its own rest behind the keys and values kept of it.

Source:
    Section 3 of the paper for PCS. The released code runs one whole pass for each head and
    example.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.pytorch_utils import Conv1D

from workbench.data.prompts import Prompt
from workbench.discovery.prefixes import shared_prefixes
from workbench.discovery.rerun import ATTENTION, PartialModel, Past, Rerun, Trace
from workbench.discovery.twin import NotReplayableError
from workbench.models import heads_per_layer, pad_token

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Means = Sequence[Float[Tensor, "head d_head"] | None] | None
KEPT_BY_BACKWARD = 8  # times what a forward pass needs, held against `batch_tokens`
LOGIT_BYTES = 2**28  # most that the float32 logits of a piece may take


@dataclass
class Rows:
    """Examples side by side, behind a beginning that they share.

    Attributes:
        prefix: The beginning's tokens; no columns when nothing is shared.
        tokens: The rest of each, padded on the right.
        keep: The columns of `tokens` that predict a target token that counts.
        targets: The tokens predicted there.
        weights: 1 / number of the row's targets, 0 where a row has fewer than the widest.
    """

    prefix: Int[Tensor, "1 prefix"]
    tokens: Int[Tensor, "rows pos"]
    keep: Int[Tensor, "rows kept"]
    targets: Int[Tensor, "rows kept"]
    weights: Float[Tensor, "rows kept"]


class Replay:
    """Exact PCS by running again only what an ablation changes.

    Args:
        model: From `load_model`. Its tensors are used, not copied.
        batch_tokens: Most tokens in a pass, padding counted.
        reduced: Run the last block at the target positions only.
        shared: Run a beginning that examples share once a head.
        attention: The attention function that the model runs with.

    Raises:
        NotReplayableError: The model isn't laid out as the engine needs it.
    """

    def __init__(
        self,
        model: TransformerBridge,
        batch_tokens: int = 8192,
        reduced: bool = True,
        shared: bool = True,
        attention: str = ATTENTION,
    ) -> None:
        self.partial = PartialModel(model, attention, reduced)
        self.shape = heads_per_layer(model)
        self.pad = pad_token(model)
        self.device = torch.device(model.cfg.device)
        self.batch_tokens = batch_tokens
        self.words = model.original_model.get_input_embeddings().weight.shape[0]
        self.shared = shared and self.partial.can_share
        self.weights = {
            layer: _output_weights(place.output, place.heads)
            for layer, place in enumerate(self.partial.places)
            if place.output is not None
        }

    @torch.inference_mode()
    def score(
        self,
        prompts: Sequence[Prompt],
        means: Means = None,
        wanted: Bool[Tensor, "prompt layer head"] | None = None,
        tick: Callable[[int], object] = lambda count: None,
    ) -> tuple[Float[Tensor, "prompt layer head"], Float[Tensor, " prompt"]]:
        """PCS of heads on prompts, and the intact model's loss.

        Args:
            prompts: What to score.
            means: What replaces an ablated head's z; None for zeros.
            wanted: Which heads on which prompts; None for all.
            tick: Told of every number of (prompt, head) pairs that are done.

        Returns:
            PCS in nats per target token, NaN where it isn't wanted or the layer has fewer heads
            than the widest, and the loss in nats per target token; float32 on the CPU.
        """
        pcs = torch.full((len(prompts), len(self.shape), max(self.shape)), torch.nan)
        nll = torch.empty(len(prompts))
        if wanted is None:
            wanted = torch.ones(pcs.shape, dtype=torch.bool)
        for prefix, members in self._batches(prompts, wanted):
            rows = self.rows([prompts[i] for i in members], prefix)
            scores, losses = self._score_rows(rows, means, wanted[members], tick)
            pcs[members], nll[members] = scores, losses
        return pcs, nll

    def _batches(
        self, prompts: Sequence[Prompt], wanted: Bool[Tensor, "prompt layer head"]
    ) -> Iterator[tuple[int, list[int]]]:
        """Length of the shared beginning, and the prompts behind it; few enough to fit.

        Every example brings a row a head: with more examples than fill a pass, the clean pass
        would only hold memory. Behind a shared beginning more of them do no harm, and every
        division runs the beginning again.
        """
        ids = [(*prompt.ids, *prompt.target_ids) for prompt in prompts]
        limits = [len(prompt.ids) - 1 for prompt in prompts]
        blocks = sum(1 for heads in self.shape if heads)
        heads = max(1, round(int(wanted.sum()) / (len(prompts) * blocks)))
        for prefix, members in shared_prefixes(ids, limits, enabled=self.shared):
            start = 0
            while start < len(members):
                end = start + 1
                while end < len(members):
                    width = len(ids[members[end]]) - prefix  # sorted by length: the widest so far
                    if (end + 1 - start) * width * (1 if prefix else heads) > self.batch_tokens:
                        break
                    end += 1
                yield prefix, members[start:end]
                start = end

    def attribution_batches(self, prompts: Sequence[Prompt]) -> Iterator[list[int]]:
        """Positions of prompts of similar length; few, since a backward pass keeps everything."""
        lengths = [len(prompt.ids) + len(prompt.target_ids) for prompt in prompts]
        members: list[int] = []
        for i in sorted(range(len(prompts)), key=lambda i: lengths[i]):
            if members and lengths[i] * (len(members) + 1) * KEPT_BY_BACKWARD > self.batch_tokens:
                yield members
                members = []
            members.append(i)
        yield members

    def rows(self, prompts: Sequence[Prompt], prefix: int = 0) -> Rows:
        """Prompts whose first `prefix` tokens are the same, as tensors on the model's device."""
        ids = [(*prompt.ids, *prompt.target_ids) for prompt in prompts]
        width = max(map(len, ids)) - prefix
        kept = max(len(prompt.scored) for prompt in prompts)
        tokens = torch.full((len(ids), width), self.pad)
        keep = torch.zeros((len(ids), kept), dtype=torch.long)
        targets = torch.zeros_like(keep)
        weights = torch.zeros((len(ids), kept))
        for i, (prompt, row) in enumerate(zip(prompts, ids, strict=True)):
            scored = torch.tensor(prompt.scored, dtype=torch.long)
            count = len(scored)
            tokens[i, : len(row) - prefix] = torch.tensor(row[prefix:])
            keep[i, :count] = scored + len(prompt.ids) - 1 - prefix
            targets[i, :count] = torch.tensor(prompt.target_ids)[scored]
            weights[i, :count] = 1 / count
        first = torch.tensor([ids[0][:prefix]], dtype=torch.long)
        return Rows(*(t.to(self.device) for t in (first, tokens, keep, targets, weights)))

    def _score_rows(
        self,
        rows: Rows,
        means: Means,
        wanted: Bool[Tensor, "rows layer head"],
        tick: Callable[[int], object],
    ) -> tuple[Tensor, Tensor]:
        before, past = self._clean_prefix(rows)
        trace = Trace()
        out = self.partial.run(Rerun(rows.tokens, rows.keep, past=past, trace=trace))
        full = self.losses(out, rows.targets, rows.weights)
        pcs = torch.full(wanted.shape, torch.nan)
        for layer, heads in enumerate(self.shape):
            mean = means[layer] if means is not None else None
            for part in self._parts(wanted[:, layer, :heads], rows):
                example, head = (index.to(self.device) for index in part)
                ablated = self._ablated(layer, example, head, rows, trace, before, mean)
                values = (ablated - full[example]).cpu()
                pcs[part[0], layer, part[1]] = values
                tick(len(values))
            trace.resid.pop(layer), trace.z.pop(layer, None), trace.attn_out.pop(layer, None)
        return pcs, full.cpu()

    def _clean_prefix(self, rows: Rows) -> tuple[Trace, Past]:
        before, past = Trace(), Past()
        if rows.prefix.shape[1]:
            past.length = rows.prefix.shape[1]
            self.partial.keys(Rerun(rows.prefix, None, trace=before, store=past))
            past.slots = torch.zeros(len(rows.tokens), dtype=torch.long, device=self.device)
        return before, past

    def _parts(
        self, wanted: Bool[Tensor, "rows head"], rows: Rows
    ) -> Iterator[tuple[Int[Tensor, " pair"], Int[Tensor, " pair"]]]:
        """(example, head) pairs of a layer in pieces that fit, the examples of a head together."""
        head, example = wanted.T.nonzero(as_tuple=True)
        if not len(head):
            return
        # Behind a shared beginning each head of a piece runs that once, and each pair holds its
        # keys and values, about an eighth of what a token's pass through a block holds.
        own, before = rows.tokens.shape[1], rows.prefix.shape[1]
        per_pair = max(own, before // len(rows.tokens), (own + before) // 8)
        size = max(1, self.batch_tokens // per_pair)
        pieces = -(-len(head) // size)
        yield from zip(example.tensor_split(pieces), head.tensor_split(pieces), strict=True)

    def _ablated(
        self,
        layer: int,
        example: Int[Tensor, " pair"],
        head: Int[Tensor, " pair"],
        rows: Rows,
        trace: Trace,
        before: Trace,
        mean: Tensor | None,
    ) -> Float[Tensor, " pair"]:
        """Loss of each example without its head."""
        past = Past()
        if rows.prefix.shape[1] and layer < self.partial.last:
            past = self._ablated_prefix(layer, head, rows, before, mean)
        out = self.partial.run(
            Rerun(
                rows.tokens[example],
                rows.keep[example],
                first=layer,
                hidden=trace.resid[layer][example],
                attn_out=self._without(layer, trace, example, head, mean),
                past=past,
            )
        )
        return self.losses(out, rows.targets[example], rows.weights[example])

    def _ablated_prefix(
        self, layer: int, head: Tensor, rows: Rows, before: Trace, mean: Tensor | None
    ) -> Past:
        """Keys and values of the shared beginning, without each head."""
        heads, slots = head.unique(return_inverse=True)
        zero = torch.zeros_like(heads)
        past = Past(rows.prefix.shape[1], slots=slots)
        self.partial.keys(
            Rerun(
                rows.prefix.expand(len(heads), -1),
                None,
                first=layer,
                hidden=before.resid[layer].expand(len(heads), -1, -1),
                attn_out=self._without(layer, before, zero, heads, mean),
                store=past,
            )
        )
        return past

    def _without(
        self, layer: int, trace: Trace, example: Tensor, head: Tensor, mean: Tensor | None
    ) -> Float[Tensor, "pair pos d_model"]:
        """What attention returns without a head: the clean output minus z_h W_O[h]."""
        weights = self.weights[layer]
        z = trace.z[layer].unflatten(-1, (self.shape[layer], -1))
        lost = z[example, :, head]
        if mean is not None:
            lost = lost - mean.to(lost)[head][:, None]
        return torch.baddbmm(trace.attn_out[layer][example], lost, weights[head], alpha=-1)

    def losses(
        self,
        hidden: Float[Tensor, "rows kept d_model"],
        targets: Int[Tensor, "rows kept"],
        weights: Float[Tensor, "rows kept"],
    ) -> Float[Tensor, " rows"]:
        """Mean loss of each row in nats per target token, float32 from the logits on."""
        size = max(1, LOGIT_BYTES // (4 * self.words * targets.shape[1]))
        parts = []
        for part, chosen in zip(hidden.split(size), targets.split(size), strict=True):
            logits = self.partial.logits(part).float()
            loss = cross_entropy(logits.flatten(0, 1), chosen.flatten(), reduction="none")
            parts.append(loss.view(chosen.shape))
        return (torch.cat(parts) * weights).sum(dim=1)


def _output_weights(output: nn.Module, heads: int) -> Float[Tensor, "head d_head d_model"]:
    weight: Any = getattr(output, "weight", None)
    plain = isinstance(output, nn.Linear | Conv1D) and weight.is_floating_point()
    if not plain:
        raise NotReplayableError(f"an output projection is a {type(output).__name__}, no matrix")
    matrix: Tensor = weight.detach() if isinstance(output, Conv1D) else weight.detach().T
    return matrix.unflatten(0, (heads, -1))
