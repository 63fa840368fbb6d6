"""The reference: PCS by ablating one head at a time, short enough to trust by reading.

For every head h and example (section 3 of the paper):

    PCS(h) = NLL(model without h) - NLL(model)

Every other way of computing PCS is held against this one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from workbench.batches import Batch, batch_nll
from workbench.heads import HeadSet, all_heads
from workbench.hooks import head_gates
from workbench.models import heads_per_layer

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def ablate_each_head(
    model: TransformerBridge,
    batch: Batch,
    means: Sequence[Float[Tensor, "head d_head"] | None] | None = None,
    wanted: Bool[Tensor, "layer head"] | None = None,
) -> Iterator[tuple[HeadSet, Float[Tensor, " batch"]]]:
    """Loss of every row, first with no head ablated and then with each head alone.

    Args:
        model: The model.
        batch: Prompts and targets.
        means: What replaces an ablated head's z; None for zeros.
        wanted: Which heads; None for all.

    Yields:
        The heads ablated, and the rows' mean loss in nats per target token, float32.
    """
    shape = heads_per_layer(model)
    chosen = [h for h in all_heads(shape) if wanted is None or wanted[h.layer, h.head]]
    for heads in (HeadSet(()), *(HeadSet((head,)) for head in chosen)):
        with head_gates(model, heads.gates(shape), means):
            yield heads, batch_nll(model, batch)


def score_batch(
    model: TransformerBridge,
    batch: Batch,
    means: Sequence[Float[Tensor, "head d_head"] | None] | None = None,
    tick: Callable[[], object] = lambda: None,
    wanted: Bool[Tensor, "layer head"] | None = None,
) -> tuple[Float[Tensor, "batch layer head"], Float[Tensor, " batch"]]:
    """PCS of every head on every row, and the intact model's loss.

    Args:
        model: The model.
        batch: Prompts and targets.
        means: What replaces an ablated head's z; None for zeros.
        tick: Called after each head, for a progress bar.
        wanted: Which heads; None for all.

    Returns:
        PCS in nats per target token, NaN where it isn't wanted or a layer has fewer heads than
        the widest, and the loss in nats per target token; both float32 on the CPU.
    """
    shape = heads_per_layer(model)
    losses = ablate_each_head(model, batch, means, wanted)
    _, full = next(losses)
    pcs = torch.full((len(full), len(shape), max(shape)), torch.nan)
    for heads, ablated in losses:
        (head,) = heads
        pcs[:, head.layer, head.head] = (ablated - full).cpu()
        tick()
    return pcs, full.cpu()
