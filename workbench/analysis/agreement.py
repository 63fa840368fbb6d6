"""How far rankings of the same heads agree: by their top K, and from the first head to the last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import comb
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from workbench.errors import InputError
from workbench.heads import check_k
from workbench.scores import HeadScores

# What makes two runs comparable, and how a message names it.
MODEL = {"tensors": "models", "heads_per_layer": "models", "ablation": "ablations"}


def scored_pcs(scores: HeadScores, k: int, what: str) -> NDArray[np.float64]:
    """PCS [example, layer, head] of a run that a ranking of all heads can be made of.

    Raises:
        InputError: The run was screened, a score is missing, or K is outside the model.
    """
    scores.need_all_heads(what)
    pcs = scores.data["pcs"].values.astype(np.float64)
    exists = ~np.isnan(pcs).all(axis=0)
    if not exists.any():
        raise InputError(f"{what} needs scores, and all of these are NaN; score the heads again")
    check_k(k, int(exists.sum()))
    holes = np.isnan(pcs[:, exists]).any(axis=1)
    if holes.any():
        name = str(scores.data["example"].values[int(holes.argmax())])
        raise InputError(
            f"{what} needs every head's score, and {int(holes.sum())} examples miss some, {name} "
            "the first; score them again or leave them out"
        )
    return pcs


def top_members(means: NDArray[np.float64], k: int) -> NDArray[np.float32]:
    """1 for the K highest heads of each ranking: `heads.top_k` for many at once.

    Args:
        means: [ranking, layer, head]; NaN where there is no head.
        k: At most the number of heads there are.

    Returns:
        [ranking, heads of all layers in a row]. Ties go to the lower layer, then head.
    """
    return highest(means.reshape(len(means), -1), k).astype(np.float32)


def by_layer(members: NDArray[np.float32], layers: int) -> list[list[int]]:
    """How many heads the sets of `top_members` have in each layer: a list a ranking."""
    counts = members.reshape(len(members), layers, -1).sum(axis=2)
    return [[int(number) for number in row] for row in counts]


def layer_chance(first: Sequence[int], second: Sequence[int], heads: Sequence[int]) -> float:
    """Expected Jaccard overlap of two random sets that have so many heads in each layer.

    The shared count of a layer is hypergeometric, that of all layers the sum of independent ones;
    the expectation is taken exactly.

    Args:
        first: Heads of the one set by layer.
        second: Those of the other.
        heads: Heads that the layers have; nowhere fewer than a set takes.
    """
    shared = np.ones(1)
    for a, b, total in zip(first, second, heads, strict=True):
        ways = [comb(a, s) * comb(total - a, b - s) / comb(total, b) for s in range(min(a, b) + 1)]
        shared = np.convolve(shared, ways)
    counts = np.arange(len(shared))
    return float((shared * counts / (sum(first) + sum(second) - counts)).sum())


def highest(values: NDArray[np.float64], k: int) -> NDArray[np.bool_]:
    """Whether each head is among the K highest of its row [..., head]; ties go to the first."""
    # A stable sort keeps the order among equals; NaN comes last.
    order = np.argsort(-values, axis=-1, kind="stable")[..., :k]
    members = np.zeros(values.shape, dtype=bool)
    np.put_along_axis(members, order, True, axis=-1)
    return members


def spearman(means: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rank correlation [ranking, other] of mean scores over the heads of a model.

    Args:
        means: [ranking, layer, head]; NaN where there is no head, the same heads in all of them.
        others: The same of the rankings to hold them against.

    Returns:
        Spearman's rho with average ranks for ties; NaN for a ranking that is all ties, and where
        fewer than two heads are there.
    """
    return _standard_ranks(means) @ _standard_ranks(others).T


def spearman_pairs(means: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    """`spearman` of each ranking with its counterpart alone, [ranking]."""
    return (_standard_ranks(means) * _standard_ranks(others)).sum(axis=1)


def _standard_ranks(means: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks with mean 0 and length 1: [ranking, head]."""
    flat = means.reshape(len(means), -1)
    ranks = rankdata(flat[:, ~np.isnan(flat).all(axis=0)], axis=1)
    ranks -= ranks.mean(axis=1, keepdims=True)
    length = np.sqrt((ranks**2).sum(axis=1, keepdims=True))
    return np.divide(ranks, length, out=np.full_like(ranks, np.nan), where=length > 0)


def ends(
    values: NDArray[np.float64], level: float = 0.95
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Lower and upper end of the middle `level` of the values along the first axis; NaN stays."""
    tail = (1 - level) / 2
    low, high = np.quantile(values, [tail, 1 - tail], axis=0)
    return low, high


def check_comparable(
    first: Mapping[str, Any], second: Mapping[str, Any], names: tuple[str, str]
) -> None:
    """Refuse two runs of different models or ablations.

    Args:
        first: The manifest of a run.
        second: The manifest of the other.
        names: How the message calls them.

    Raises:
        InputError: They differ in what is compared head by head.
    """
    ours, theirs = first.get("settings", {}), second.get("settings", {})
    for key, noun in MODEL.items():
        if key in ours and key in theirs and ours[key] != theirs[key]:
            told = "ablation" if key == "ablation" else "model"
            a, b = ours.get(told), theirs.get(told)
            which = f"{a} and {b}" if a != b else f"{a} with other weights"
            raise InputError(
                f"{names[0]} and {names[1]} are of different {noun} ({which}); compare runs of one"
            )
