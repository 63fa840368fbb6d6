"""How fast this machine does what a model's passes consist of, at that model's sizes.

`plan` counts products, element-wise work and calls; the rate of each depends on its size. Narrow
heads keep products of activations far from the peak, a short row keeps products with weights
there, memory that is taken and given back slows element-wise work, and Python stands between any
two kernels. So each is timed alone, at the sizes of a case, and the counts are divided by that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from workbench.bench.inputs import LlamaSize, quiet_load, random_prompts, write_llama
from workbench.bench.machine import best_seconds
from workbench.data.prompts import Prompt
from workbench.discovery import cost
from workbench.discovery.replay import KEPT_BY_BACKWARD
from workbench.discovery.scorer import Job, Scorer
from workbench.discovery.shapes import Shape, shape_of
from workbench.discovery.work import EAGER, GATED, NORM, RESIDUAL, SCORES, moved

# A model in which nothing takes time but getting from one kernel to the next.
EMPTY = LlamaSize(layers=4, heads=1, width=8, hidden=8, vocabulary=16)
TOKENS, TARGET = 4, 1
WEIGHTS = 4  # taken in turn, as a model's are: none is still in the cache from the last time

Loop = Callable[[Any, Sequence[Prompt], Tensor], object]


def calls(folder: Path, device: str, dtype: str, loop: Loop) -> tuple[float, float]:
    """Seconds from one kernel to the next in replay, and in TransformerLens with its hooks.

    Args:
        folder: For a checkpoint.
        device: To measure on.
        dtype: Of the weights.
        loop: The plain loop, given a model, prompts and which heads.
    """
    model = quiet_load(write_llama(EMPTY, folder), device, dtype)
    shape = shape_of(EMPTY.config(), dtype)
    prompts = random_prompts(EMPTY.vocabulary, 1, TOKENS, TARGET)
    scorer = Scorer(model, Job("exact", "replay", TOKENS))
    everywhere = torch.ones(EMPTY.layers, EMPTY.heads, dtype=torch.bool)
    runs = {
        "replay": lambda: scorer.scores(prompts),
        "loop": lambda: loop(model, prompts, everywhere),
    }
    found = {}
    for method, run in runs.items():
        count = cost.traffic(shape, method, TOKENS, TARGET).calls
        found[method] = best_seconds(run, device) / count
    return found["replay"], found["loop"]


def rows_of_a_pass(shape: Shape, method: str, examples: int, tokens: int, batch_tokens: int) -> int:
    """Rows side by side in a pass, as each method divides its work.

    Args:
        shape: The model.
        method: As `plan` calls it.
        examples: How many there are.
        tokens: Length of a prompt with its target.
        batch_tokens: Most tokens in a pass.
    """
    fit = max(1, batch_tokens // tokens)
    if method == "loop":
        return 1
    if method == "reference":
        return min(examples, fit)
    if method == "attribution":
        return min(examples, max(1, fit // KEPT_BY_BACKWARD))
    # Replay has a row a head: so many examples that theirs of a block fill a pass, or one.
    heads = max(shape.heads)
    rows = heads * min(examples, max(1, fit // heads))
    return -(-rows // -(-rows // fit))


def fitted(
    shape: Shape, method: str, rows: int, tokens: int, device: str, base: cost.Machine
) -> cost.Machine:
    """The machine at the sizes of a method's passes.

    Args:
        shape: The model.
        method: As `plan` calls it.
        rows: Of a pass.
        tokens: Of a row.
        device: To measure on.
        base: What starting a kernel costs; the rest is measured.
    """
    block = next(block for block in shape.blocks if block.heads)
    kind = {"device": device, "dtype": getattr(torch, shape.dtype)}
    x = torch.ones(rows * tokens, shape.d_model, **kind)
    weights = [torch.ones(block.width, shape.d_model, **kind) for _ in range(WEIGHTS)]
    products = best_seconds(lambda: [linear(x, weight) for weight in weights], device) / WEIGHTS
    q, k, v = torch.ones(3, rows, block.heads, tokens, block.head_dim, **kind)

    def eager() -> Tensor:
        return (q @ k.transpose(-1, -2)) @ v

    def fused() -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True)

    attention = best_seconds(eager if method in EAGER else fused, device)
    return replace(
        base,
        rate=2 * x.numel() * block.width / products,
        attention_rate=4 * q.numel() * tokens / attention,
        bandwidth=_element_wise(shape, method in EAGER, rows, tokens, device),
    )


def _element_wise(shape: Shape, eager: bool, rows: int, tokens: int, device: str) -> float:
    """Bytes a second in a norm, a gated activation, a residual, and eager attention's softmax.

    Bytes as `work.py` counts them. Roots, exponentials and sums make it slower than a copy.
    """
    block = next(block for block in shape.blocks if block.heads)
    kind: dict[str, Any] = {"device": device, "dtype": getattr(torch, shape.dtype)}
    x = torch.ones(rows, tokens, shape.d_model, **kind)
    gate, up = torch.ones(2, rows, tokens, block.width, **kind)
    scores = torch.ones(rows if eager else 0, block.heads, tokens, tokens, **kind)
    mask = torch.zeros(1, 1, tokens, tokens, **kind)

    def run() -> None:
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        x.add(scaled.to(x.dtype) * x)
        silu(gate).mul(up)
        if eager:
            (scores * 0.5 + mask).softmax(-1, dtype=torch.float32).to(x.dtype)

    counted = (
        moved(shape, NORM, x.numel())
        + moved(shape, RESIDUAL, x.numel())
        + moved(shape, GATED, gate.numel())
        + moved(shape, SCORES, scores.numel())
    )
    return counted / best_seconds(run, device)
