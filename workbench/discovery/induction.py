"""Induction heads: those that look at what came after a token the last time.

1. A probe is a row of random tokens, all different, and the same row again.
2. It goes through the model once. A step is a position in the second row; the token after its
   first occurrence stands in the first row, one place on.
3. A head's prefix-matching score on a probe is its mean attention weight on that place.

Source:
    Olsson et al. 2022, "In-context Learning and Induction Heads" (arXiv 2209.11895), the
    prefix-matching score on repeated random tokens. There 25 tokens are repeated four times.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import xarray as xr
from tqdm.auto import tqdm

from workbench import stats
from workbench.discovery.copying import ordinary_tokens
from workbench.discovery.patterns import read_patterns
from workbench.errors import InputError
from workbench.heads import top_k
from workbench.models import context_length, heads_per_layer

if TYPE_CHECKING:
    from torch import Tensor
    from transformer_lens.model_bridge import TransformerBridge

REPEATED = 50


def induction_scores(
    model: TransformerBridge,
    count: int = 32,
    length: int | None = None,
    *,
    batch_tokens: int = 8192,
    seed: int = 0,
    progress: bool = True,
) -> xr.DataArray:
    """Prefix-matching score of every head on repeated random tokens, probe by probe.

    Args:
        model: Its ordinary tokens are drawn from: no special ones, none without a letter or digit.
        count: How many probes.
        length: Tokens that are repeated; by default 50, or as many as the model's context and
            vocabulary allow. A head that sees a window only can't reach back farther than it.
        batch_tokens: Most tokens in a forward pass; a single longer probe still makes a batch.
        seed: Of the tokens.
        progress: Show a bar on the terminal.

    Returns:
        [probe, layer, head], mean attention weights, fractions of 1; NaN where there is no such
        head. Attributes: `length`, and `chance`, the score of a head that looks at all visible
        positions alike.

    Raises:
        InputError: There is no probe, the row is shorter than two tokens or longer than the model
            allows, a layer's pattern can't be read, or the weights are NaN.
    """
    vocabulary = ordinary_tokens(model)
    tokenizer = model.tokenizer
    # What the tokenizer was made with: TransformerLens names one where there is none (Qwen2).
    named = tokenizer.init_kwargs.get("bos_token")
    first = [] if named is None else [tokenizer.bos_token_id]
    most = min(len(vocabulary), (context_length(model) - len(first)) // 2)
    length = min(REPEATED, most) if length is None else length
    if count < 1 or not 2 <= length <= most:
        raise InputError(
            f"wanted 1 or more probes of 2 to {most} repeated tokens (the model's context and "
            f"vocabulary allow no more), got {count} of {length}"
        )
    rng = np.random.default_rng(seed)
    drawn = [rng.permutation(vocabulary)[:length].tolist() for _ in range(count)]
    rows = [(*first, *tokens, *tokens) for tokens in drawn]
    shape = heads_per_layer(model)
    scores = np.full((count, len(shape), max(shape)), np.nan)
    size = max(1, batch_tokens // len(rows[0]))
    with tqdm(total=count, desc="induction", unit="probe", disable=not progress) as bar:
        for start in range(0, count, size):
            part = rows[start : start + size]
            # The last token is never fed, so that the other `length - 1` of the second row end it.
            found = read_patterns(model, part, length - 1, _prefix_matches, "leave induction out")
            for layer, weights in found.items():
                scores[start : start + len(part), layer, : shape[layer]] = weights
            bar.update(len(part))
    seen = len(first) + length + 1 + np.arange(length - 1)  # positions that each step sees
    return xr.DataArray(
        scores,
        {"layer": range(len(shape)), "head": range(max(shape))},
        ("probe", "layer", "head"),
        name="induction_score",
        attrs={"length": length, "chance": float((1 / seen).mean())},
    )


def induction_line(scores: xr.DataArray, k: int) -> str:
    """Whether the model has induction heads at all, in words.

    Args:
        scores: From `induction_scores`.
        k: Heads that are taken as a class of their own.

    Returns:
        A sentence: how many heads score above chance, all heads tested together over probes, and
        what the K highest score. Of a model without induction heads those K are as any others.

    Raises:
        InputError: K is outside the model.
    """
    chance = float(scores.attrs["chance"])
    probes = np.arange(scores.sizes["probe"])
    mean, low, _, _ = stats.simultaneous(scores.values - chance, probes)
    best = top_k(mean, k)
    ends = [float(mean[head.layer, head.head]) + chance for head in (best.heads[0], best.heads[-1])]
    said = (
        f"{int((low > 0).sum())} of {int((~np.isnan(mean)).sum())} heads look at what came after a "
        f"token the last time more than chance ({chance:.3f}); the top {k} score {ends[0]:.3f} "
        f"({best.heads[0]}) to {ends[1]:.3f}"
    )
    none = not any(low[head.layer, head.head] > 0 for head in best)
    return said + ("; none of them is shown to be an induction head." if none else ".")


def _prefix_matches(weights: Tensor) -> Tensor:
    """Mean weight on the token after the first occurrence.

    Of n repeated tokens n - 1 steps are read, the last positions of the row. The first step's
    token stands n places before it, so that the token after that is n - 1 places before.

    Args:
        weights: Attention [row, head, step, key].

    Returns:
        [row, head], fractions of 1.
    """
    steps, keys = weights.shape[-2:]
    after = torch.arange(keys - 2 * steps, keys - steps, device=weights.device)
    picked = weights.float().gather(-1, after.expand(*weights.shape[:2], steps)[..., None])
    return picked[..., 0].mean(dim=-1)
