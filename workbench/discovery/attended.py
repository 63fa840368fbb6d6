"""What chosen heads look at while the model predicts an example's target."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr
from einops import reduce

from workbench.batches import collate, last_logits
from workbench.data.examples import Example
from workbench.data.prompts import Prompt, PromptSettings, build_prompts
from workbench.discovery.patterns import PATTERN
from workbench.errors import InputError
from workbench.heads import HeadSet
from workbench.models import context_length, heads_per_layer, pad_token, token_texts

if TYPE_CHECKING:
    from torch import Tensor
    from transformer_lens.model_bridge import TransformerBridge


@torch.inference_mode()
def attended(
    model: TransformerBridge,
    prompt: Prompt | Example,
    heads: HeadSet,
    *,
    settings: PromptSettings | None = None,
) -> xr.DataArray:
    """Attention of chosen heads, from where the target is predicted onto the prompt and target.

    Args:
        model: From `load_model`.
        prompt: One example with its target, as it is or with its prompt built.
        heads: Whose attention.
        settings: How the prompt of an example is built.

    Returns:
        [head, position]: the attention weight on each token, averaged over the positions that
        predict a target token: fractions that add up to 1 for a head (to less in models that let
        a head look nowhere). The last target token is predicted and not fed, so that the last
        position is 0. The coordinate `token` holds each position's text, `part` whether it is of
        the `prompt` or of the `target`.

    Raises:
        InputError: A head isn't the model's, a layer's pattern can't be read, the weights are
            NaN, or the prompt can't be built.
    """
    if isinstance(prompt, Example):
        context = context_length(model)
        prompt = build_prompts([prompt], model.tokenizer, context, settings)[0]
    heads.check(heads_per_layer(model))
    if not len(heads) or not prompt.target_ids:
        raise InputError(f"{prompt.example.name}: attention needs a head and a target, got none")
    batch = collate([prompt], pad_token(model), model.cfg.device)
    steps = len(prompt.target_ids)
    found: dict[int, Tensor] = {}

    def read(layer: int) -> Callable[..., None]:
        def hook(pattern: Tensor, hook: Any) -> None:
            # Position p predicts token p + 1: the row of the last token predicts nothing here.
            rows = pattern[0, :, -steps - 1 : -1].float().cpu()
            found[layer] = reduce(rows, "head step position -> head position", "mean")

        return hook

    names = {head.layer: PATTERN.format(head.layer) for head in heads}
    hooks = [(name, read(layer)) for layer, name in names.items() if name in model.hook_dict]
    with model.hooks(fwd_hooks=hooks):
        last_logits(model, batch, 1)
    unread = sorted(set(names) - set(found))
    if unread:
        raise InputError(
            f"{model.cfg.model_name}: TransformerLens doesn't show the attention pattern of layer "
            f"{', '.join(map(str, unread))}; choose heads of other layers"
        )
    weights = torch.stack([found[head.layer][head.head] for head in heads]).numpy()
    if not np.isfinite(weights).all():
        raise InputError(f"{prompt.example.name}: attention is NaN; try --dtype float32")
    return xr.DataArray(
        weights,
        {
            "head": list(map(str, heads)),
            "token": ("position", token_texts(model, (*prompt.ids, *prompt.target_ids))),
            "part": ("position", ["prompt"] * len(prompt.ids) + ["target"] * steps),
        },
        ("head", "position"),
        name="attention",
        attrs={"example": prompt.example.name, "user": prompt.example.user},
    )
