"""Attention of a few new tokens over a long cache, as Transformers' modules call it.

Transformers' own path repeats keys and values for every query head of a group before torch's
kernel sees them, as soon as a batch is padded. For one token behind a long prompt that copy is
most of the work; here the products are taken with the keys where they lie.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from workbench.discovery.rerun import written_out

ATTENTION = "workbench_decode"
FEW = 8  # new tokens a row; a prompt takes torch's kernel, which never holds the whole pattern


def attend(
    module: nn.Module,
    query: Float[Tensor, "rows head new d_head"],
    key: Float[Tensor, "rows kv_head pos d_head"],
    value: Float[Tensor, "rows kv_head pos d_head"],
    mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What `AttentionInterface` asks for: the heads' outputs, [rows, new, head, d_head]."""
    new, grouped = query.shape[2], query.shape[1] != key.shape[1]
    if options.get("softcap") is not None or options.get("s_aux") is not None:
        if mask is None:  # nothing is hidden but what comes later
            mask = later_hidden(new, key.shape[2], query.device)
        return written_out(query, key, value, mask, options)
    if not (grouped and new <= FEW):
        out, _ = sdpa_attention_forward(module, query, key, value, mask, **options)
        return out, None
    if mask is None and new > 1:
        mask = later_hidden(new, key.shape[2], query.device)
    scaling = options.get("scaling")
    return _grouped(
        query, key, value, mask, query.shape[-1] ** -0.5 if scaling is None else scaling
    )


def later_hidden(new: int, keys: int, device: torch.device) -> Bool[Tensor, "1 1 new keys"]:
    """The causal mask of the last `new` of `keys` tokens."""
    full = torch.ones(new, keys, dtype=torch.bool, device=device)
    return full.tril(diagonal=keys - new)[None, None]


def _grouped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
) -> tuple[Tensor, None]:
    rows, heads, new, width = query.shape
    groups = key.shape[1]
    # The queries that share a key head are rows of one product.
    stacked = (query * scaling).reshape(rows, groups, heads // groups * new, width)
    scores = (stacked @ key.transpose(2, 3)).view(rows, heads, new, -1)
    if mask is not None:
        # Not -inf: a row of padding sees nothing at all, and its NaN would reach every other row
        # as 0 * NaN.
        lowest = torch.finfo(scores.dtype).min
        boolean = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, lowest) if boolean else scores + mask
    pattern = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    out = pattern.view(rows, groups, -1, key.shape[2]) @ value
    return out.view(rows, heads, new, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
