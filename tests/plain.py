"""The independent route: a checkpoint read again by transformers alone, without any bridge."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from workbench.data.prompts import Prompt
from workbench.heads import Head

if TYPE_CHECKING:
    from torch.nn import Module
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedModel

BLOCKS = r"layers|h"
ATTENTION = r"self_attn|self_attention|attention|attn"
OUTPUT = r"o_proj|out_proj|c_proj|dense"


def plain_copy(model: TransformerBridge, **changes: Any) -> PreTrainedModel:
    """The checkpoint behind a bridge, its config changed where asked."""
    from transformers import AutoModelForCausalLM

    folder = model.original_model.config._name_or_path
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **changes).eval()


def output_projection(twin: PreTrainedModel, layer: int) -> Module:
    """The module of a layer that holds W_O."""
    name = re.compile(rf".*\.({BLOCKS})\.{layer}\.({ATTENTION})\.({OUTPUT})")
    (found,) = [module for path, module in twin.named_modules() if name.fullmatch(path)]
    return found


def output_weights(twin: PreTrainedModel, layer: int) -> Tensor:
    """W_O, [heads × d_head, d_model]; changing it changes the model."""
    projection = output_projection(twin, layer)
    weight = projection.weight.data
    return weight if type(projection).__name__ == "Conv1D" else weight.T  # GPT-2: [in, out]


def zero_output_weights(twin: PreTrainedModel, head: Head, heads: int) -> None:
    """Zero the part of W_O that reads one head: z @ W_O then can't see it."""
    output_weights(twin, head.layer).unflatten(0, (heads, -1))[head.head] = 0


def plain_nll(twin: PreTrainedModel, prompt: Prompt) -> float:
    """One prompt, no padding, the loss by PyTorch's own cross entropy."""
    ids = torch.tensor([[*prompt.ids, *prompt.target_ids]])
    logits = twin(ids).logits[0]
    start = len(prompt.ids)
    return cross_entropy(logits[start - 1 : -1], ids[0, start:]).item()
