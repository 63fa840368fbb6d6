"""DPS inside Transformers' own `generate`: beams, stopping criteria and streamers work as ever.

`generate` runs the plain model; the processor runs the model without the heads beside it, with a
cache of its own, and joins the two logits by the rules of `rules.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor

from workbench.errors import InputError
from workbench.models import heads_per_layer, pad_token
from workbench.steering.cache import new_cache
from workbench.steering.contrast import Contrast
from workbench.steering.engines import open_engine
from workbench.steering.layout import Layout, Views
from workbench.steering.native import Native, Pass

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

ROOM = 64  # columns by which a cache grows at a time


def hf_model(model: TransformerBridge) -> Any:
    """The checkpoint's own class around the bridge's tensors, for its `generate`.

    No weight is copied: what is changed in the one is changed in the other.

    Raises:
        InputError: Its class can't be built or run as it is.
    """
    twin: Any = _native(model).twin
    config = getattr(model.original_model, "generation_config", None)
    if config is not None:
        twin.generation_config = copy.deepcopy(config)
        # As checkpoints have them; the bridge switches them on.
        twin.generation_config.output_attentions = False
        twin.generation_config.return_dict_in_generate = False
    return twin


class DPSLogitsProcessor(LogitsProcessor):
    """Decode against the model without some heads, in Transformers' `generate`:

        native = wb.hf_model(model)
        processor = wb.DPSLogitsProcessor(model, wb.DPS(heads, gamma=0.5))
        native.generate(**tokens, num_beams=4, logits_processor=[processor])

    The heads are gated in the prompt as well (`prefill="masked"`). The processor may be used for
    one `generate` after the other: rows whose history it doesn't know are read anew. When beams
    change places, so do the rows of its cache.

    Args:
        model: From `load_model`.
        contrast: `DPS`, `DeCoRe`, `Ablated` or sums of these, with cut and limit: one for all
            rows, or one for each prompt of the batch.
        attention_mask: 1 at the prompts' tokens, [prompt, pos], as the tokenizer returns it. By
            default what stands in front of the first token that isn't the model's padding token
            is masked; that is refused where it may be wrong.

    Raises:
        InputError: A head is outside the model, or the contrast needs more than a view without
            heads.
    """

    mask: Int[Tensor, "rows pos"]
    layout: Layout

    def __init__(
        self,
        model: TransformerBridge,
        contrast: Contrast | Sequence[Contrast],
        attention_mask: Int[Tensor, "prompts pos"] | None = None,
    ) -> None:
        self.contrasts = [contrast] if isinstance(contrast, Contrast) else list(contrast)
        self.shape = heads_per_layer(model)
        for one in self.contrasts:
            one.check(self.shape)
            other = [term.where for term in one.terms if term.where != "heads"]
            if other:
                raise InputError(
                    f"{type(one).__name__} needs another view ({other[0]}) than one without "
                    "heads; use workbench.generate for it"
                )
        self.native = _native(model)
        self.pad = pad_token(model)
        self.first = model.tokenizer.bos_token_id
        self.given = attention_mask
        self.beams = 1
        self.known: Tensor | None = None  # the ids that the cache holds, [rows, pos]

    @torch.inference_mode()
    def __call__(
        self, input_ids: Int[Tensor, "rows pos"], scores: Float[Tensor, "rows d_vocab"]
    ) -> Float[Tensor, "rows d_vocab"]:
        """Log-probabilities of the joined distribution.

        Args:
            input_ids: Prompts and what was written behind them.
            scores: The plain model's logits, or its log-probabilities, as beam search gives them.
        """
        parents = self._parents(input_ids)
        if parents is None:
            self._begin(input_ids)
            fed = input_ids
        else:
            views = self._views_of(parents)
            for layer in self.cache.layers:
                layer.reorder_cache(views)
            # A prompt's beams share its padding, so the mask needs no new order.
            self.mask = torch.cat((self.mask, self.mask.new_ones(len(parents), 1)), dim=1)
            fed = input_ids[:, -1:]
        self.known = input_ids
        if not self.layout.gated:
            return scores.log_softmax(dim=-1)
        gated = self._run(fed)
        if bool(gated.isnan().any()):
            raise InputError(
                "the logits without the heads hold NaN; try dtype float32, or check the checkpoint"
            )
        joined = self.layout.join(Views(scores, scores[:0], gated))
        return joined.logits.log_softmax(dim=-1).to(scores.dtype)

    def _parents(self, ids: Tensor) -> Tensor | None:
        """Which row of the cache each row goes on from; None where one has none."""
        known = self.known
        if known is None or ids.shape[1] != known.shape[1] + 1 or len(ids) != len(known):
            return None
        # Only among the beams of its own prompt: an equal prompt may have another contrast.
        prompt = torch.arange(len(ids), device=ids.device) // self.beams
        same = (ids[:, None, :-1] == known[None]).all(dim=-1) & (prompt[:, None] == prompt)
        if not bool(same.any(dim=1).all()):
            return None
        return same.float().argmax(dim=1)

    def _views_of(self, parents: Tensor) -> Tensor:
        """Which row of the cache each view goes on from."""
        views: dict[int, list[int]] = {}
        for view, row in enumerate(self.layout.gated):
            views.setdefault(row, []).append(view)
        order = [view for parent in parents.tolist() for view in views.get(parent, ())]
        return torch.tensor(order, device=parents.device, dtype=torch.long)

    def _begin(self, ids: Tensor) -> None:
        rows = len(ids)
        if rows % len(self.contrasts):
            raise InputError(
                f"{len(self.contrasts)} contrasts for {rows} rows; give one for each prompt"
            )
        self.beams = rows // len(self.contrasts)  # those of a prompt stand side by side
        each = range(self.beams)
        contrasts = [one if one.active else None for one in self.contrasts for _ in each]
        self.layout = Layout.of(contrasts, self.shape)
        self.index = torch.tensor(self.layout.gated, device=ids.device, dtype=torch.long)
        self.scales = {
            layer: self.layout.gates[:, layer, :heads][:, None, :, None].to(ids.device)
            for layer, heads in enumerate(self.shape)
            if bool((self.layout.gates[:, layer, :heads] != 1).any())
        }
        self.cache = new_cache(self.native.twin.config, ROOM)
        self.mask = self._mask(ids)

    def _mask(self, ids: Tensor) -> Tensor:
        if self.given is None:
            return self._guessed(ids)
        mask = self.given.to(ids.device)
        if len(ids) % len(mask) or mask.shape[1] > ids.shape[1]:
            raise InputError(
                f"an attention mask of {tuple(mask.shape)} doesn't fit ids of {tuple(ids.shape)}"
            )
        mask = mask.repeat_interleave(len(ids) // len(mask), dim=0)
        new = mask.new_ones(len(ids), ids.shape[1] - mask.shape[1])
        return torch.cat((mask, new), dim=1)

    def _guessed(self, ids: Tensor) -> Tensor:
        """The mask without what stands in front of the first token that isn't padding."""
        mask = ((ids != self.pad).cumsum(dim=1) > 0).long()
        twice = ids.shape[1] > 1 and bool(((ids[:, 0] == ids[:, 1]) & (mask[:, 0] == 1)).any())
        if twice or (self.pad == self.first and not bool(mask.all())):
            raise InputError(
                "what is padding can't be told from the ids alone; give attention_mask= as the "
                "tokenizer returned it"
            )
        return mask

    def _run(self, fed: Int[Tensor, "rows new"]) -> Float[Tensor, "gated d_vocab"]:
        positions = (self.mask.cumsum(dim=1) - 1).clamp(min=0)[:, -fed.shape[1] :]
        logits = self.native.run(
            Pass(scales=self.scales),
            1,
            input_ids=fed[self.index],
            attention_mask=self.mask[self.index],
            position_ids=positions[self.index],
            past_key_values=self.cache,
        )
        return logits[:, 0]


def _native(model: TransformerBridge) -> Native:
    engine = open_engine(model)
    if engine.native is None:
        raise InputError("the checkpoint's own modules can't be used: " + "; ".join(engine.why_not))
    return engine.native
