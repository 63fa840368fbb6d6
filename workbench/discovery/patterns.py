"""Attention patterns, layer by layer: nothing is changed, and only what is asked for is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray

from workbench.batches import Batch, last_logits
from workbench.errors import InputError
from workbench.models import heads_per_layer

if TYPE_CHECKING:
    from torch import Tensor
    from transformer_lens.model_bridge import TransformerBridge

PATTERN = "blocks.{}.attn.hook_pattern"  # [batch, head, query, key]


@torch.inference_mode()
def read_patterns(
    model: TransformerBridge,
    rows: Sequence[tuple[int, ...]],
    steps: int,
    read: Callable[[Tensor], Tensor],
    remedy: str,
) -> dict[int, NDArray[Any]]:
    """What one pass over rows of equal length shows of each layer's attention.

    Args:
        model: The model.
        rows: Token ids; the last one of a row is predicted, never fed.
        steps: How many positions at the end of the row are read.
        read: From their attention weights [row, head, step, key] to what is kept.
        remedy: What to do where a pattern can't be read; ends the message.

    Returns:
        What was kept, layer by layer; blocks without attention are left out.

    Raises:
        InputError: A layer's pattern can't be read, or the weights are NaN.
    """
    shape = heads_per_layer(model)
    tokens = torch.tensor(rows, device=model.cfg.device)[:, :-1]
    batch = Batch(tokens, torch.ones_like(tokens), torch.zeros_like(tokens, dtype=torch.bool))
    found: dict[int, NDArray[Any]] = {}

    def keep(layer: int) -> Callable[..., None]:
        def hook(pattern: Tensor, hook: Any) -> None:
            scored = pattern[:, :, -steps:]
            if not bool(scored.isfinite().all()):
                raise InputError(f"layer {layer}: attention is NaN; try --dtype float32")
            found[layer] = read(scored).cpu().numpy()

        return hook

    names = {layer: PATTERN.format(layer) for layer, heads in enumerate(shape) if heads}
    hooks = [(name, keep(layer)) for layer, name in names.items() if name in model.hook_dict]
    with model.hooks(fwd_hooks=hooks):
        last_logits(model, batch, 1)  # no logits are wanted; one position's are the fewest
    unread = [str(layer) for layer in names if layer not in found]
    if unread:
        raise InputError(
            f"{model.cfg.model_name}: TransformerLens doesn't show the attention pattern of layer "
            f"{', '.join(unread)}; {remedy}"
        )
    return found
