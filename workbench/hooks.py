"""Head gates at `hook_z`: the one place where the workbench touches an activation.

`z` is a head's output before `W_O`, [batch, pos, head, d_head], with the query heads also under
grouped-query attention. A gate of 1 leaves a head alone, 0 ablates it, between is soft.

The released code reshapes the OUTPUT of `o_proj` instead. Past `W_O` the heads are mixed: a slice
there is a set of residual-stream coordinates, not a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from workbench.batches import Batch, last_logits
from workbench.errors import InputError
from workbench.models import heads_per_layer

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Ablation = Literal["zero", "mean"]
Hook = Callable[..., Any]


def hook_name(layer: int) -> str:
    """Name of a layer's z. The bridge resolves it to `attn.o.hook_in`."""
    return f"blocks.{layer}.attn.hook_z"


@contextmanager
def head_gates(
    model: TransformerBridge,
    gates: NDArray[np.floating[Any]] | Float[Tensor, "*batch layer head"],
    means: Sequence[Float[Tensor, "head d_head"] | None] | None = None,
) -> Iterator[None]:
    """Gate heads in every forward pass inside the block.

    Args:
        model: The model.
        gates: [layer, head] for all rows, or [batch, layer, head] for each row of the batch,
            in [0, 1]. Columns beyond a layer's heads are ignored.
        means: What an ablated head's z is replaced by, layer by layer: z becomes
            `gate * z + (1 - gate) * mean`. None is zero ablation, the paper's.

    Layers whose gates are all 1 get no hook, and a gate of 1 is exact for the others: with
    nothing ablated the logits are the plain model's, bit for bit. Activations are never changed
    in place, and the hooks are gone after the block, also after an exception.

    Raises:
        InputError: The gates' shape doesn't fit the model, or a gate is outside [0, 1].
    """
    values = torch.as_tensor(gates)
    shape = heads_per_layer(model)
    if values.ndim not in (2, 3) or values.shape[-2:] != (len(shape), max(shape)):
        raise InputError(
            f"gates must be [layer, head] or [batch, layer, head] with {len(shape)} layers and "
            f"{max(shape)} heads, got {tuple(values.shape)}"
        )
    if not bool(((values >= 0) & (values <= 1)).all()):
        raise InputError("gates must be between 0 (ablated) and 1 (left alone)")
    hooks = [
        (
            hook_name(layer),
            _gate_hook(values[..., layer, :heads], means[layer] if means is not None else None),
        )
        for layer, heads in enumerate(shape)
        if heads and bool((values[..., layer, :heads] != 1).any())
    ]
    with model.hooks(fwd_hooks=hooks):
        yield


def _gate_hook(gate: Tensor, mean: Tensor | None) -> Hook:
    # [head] or [batch, head] to something that broadcasts over [batch, pos, head, d_head]
    gate = gate[None] if gate.ndim == 1 else gate
    placed: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor | None]] = {}

    def hook(z: Tensor, hook: Any) -> Tensor:
        key = (z.device, z.dtype)
        if key not in placed:
            scale = gate.to(*key)[:, None, :, None]
            placed[key] = scale, None if mean is None else (1 - scale) * mean.to(*key)
        return gate_z(z, *placed[key])

    return hook


def gate_z(z: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
    """Z with its heads gated: `scale * z`, and `shift`, which is `(1 - scale) * mean`, if any.

    Every gate of the workbench is this one, whatever module it is hooked to.
    """
    return z * scale if shift is None else z * scale + shift


@torch.inference_mode()
def mean_z(
    model: TransformerBridge, batches: Iterable[Batch]
) -> list[Float[Tensor, "head d_head"] | None]:
    """Mean z of every head over all real tokens of some batches, for mean ablation.

    Returns:
        A tensor a layer, float32 on the model's device; None where a layer has no attention.
    """
    shape = heads_per_layer(model)
    sums: list[Tensor | None] = [None] * len(shape)
    count = 0

    def collect(layer: int, mask: Tensor) -> Hook:
        def hook(z: Tensor, hook: Any) -> None:
            total = (z.double() * mask[..., None, None]).sum(dim=(0, 1))
            before = sums[layer]
            sums[layer] = total if before is None else before + total

        return hook

    for batch in batches:
        count += int(batch.attention_mask.sum())
        hooks = [
            (hook_name(layer), collect(layer, batch.attention_mask))
            for layer, heads in enumerate(shape)
            if heads
        ]
        with model.hooks(fwd_hooks=hooks):
            last_logits(model, batch, 1)  # no logits are wanted; one position's are the fewest
    return [None if total is None else (total / count).float() for total in sums]
