"""The gradient estimate: all heads' PCS from one forward and one backward pass.

With a gate g at every head's z (1 leaves it alone, 0 ablates it), PCS is NLL(g=0) - NLL(g=1). Its
first-order estimate at g=1 is

    PCS(h) ~ -dNLL/dg_h = -sum over positions of z_h . dNLL/dz_h

(`(z_h - mean_h) . dNLL/dz_h` for mean ablation): attribution patching, with the ablated value as
the patch.

Where it fails, and why it screens and doesn't replace the exact score:

- Saturation. A softmax that is sure, or a norm behind a large head, is flat where the estimate
  looks and not where the ablation leads: the head's share is underestimated.
- Cancellation. Two paths of opposite sign add up to a small gradient though taking both away
  changes much; backup heads, which take over when a head is gone, are the same from the other side.
- Curvature. The estimate is a straight line; large heads, the ones that matter, are the ones for
  which it is furthest off. Their order suffers less than their size.
- Switches. In a mixture of experts the ablation may send a token to another expert; no gradient
  sees that coming.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.discovery.replay import Means, Replay, Rows
from workbench.discovery.rerun import Rerun


def attribute(
    engine: Replay, rows: Rows, means: Means = None
) -> tuple[Float[Tensor, "rows layer head"], Float[Tensor, " rows"]]:
    """Estimate PCS of every head on every row.

    Args:
        engine: The model, ready to run.
        rows: Prompts with their targets, with no shared beginning.
        means: What replaces an ablated head's z; None for zeros.

    Returns:
        The estimate in nats per target token, NaN where a layer has fewer heads than the widest,
        and the intact model's loss in nats per target token; both float32 on the CPU.
    """
    count = len(rows.tokens)
    gates = {
        layer: torch.ones((count, heads), device=rows.tokens.device, requires_grad=True)
        for layer, heads in enumerate(engine.shape)
        if heads
    }
    with _frozen(engine.partial.twin), torch.enable_grad():
        given = {layer: (gate, _mean(means, layer)) for layer, gate in gates.items()}
        out = engine.partial.run(Rerun(rows.tokens, rows.keep, gates=given))
        losses = engine.losses(out, rows.targets, rows.weights)
        gradients = torch.autograd.grad(losses.sum(), list(gates.values()))
    scores = torch.full((count, len(engine.shape), max(engine.shape)), torch.nan)
    for (layer, gate), gradient in zip(gates.items(), gradients, strict=True):
        scores[:, layer, : gate.shape[1]] = -gradient.float().cpu()
    return scores, losses.detach().cpu()


def _mean(means: Means, layer: int) -> Tensor | None:
    """A copy: means computed in inference mode can't be part of a gradient."""
    mean = means[layer] if means is not None else None
    return None if mean is None else mean.clone()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No gradient of any weight is wanted, so nothing is kept for one."""
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learned:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)
