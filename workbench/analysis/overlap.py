"""Overlap of head sets (paper figure 4), beside what chance and noise alone would give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import xarray as xr

from workbench.analysis.stability import split_half
from workbench.errors import InputError
from workbench.heads import HeadSet, chance_jaccard, jaccard_matrix, jaccard_of, membership
from workbench.scores import By, HeadScores


def jaccard(heads: Mapping[str, HeadSet]) -> xr.DataArray:
    """Pairwise Jaccard overlap of named head sets.

    Returns:
        [set, other]: symmetric, 1 on the diagonal, fractions in [0, 1]; the attribute `k` holds
        the sizes of the sets.

    Raises:
        InputError: There is no set.
    """
    if not heads:
        raise InputError("no head sets to compare")
    names = list(heads)
    return xr.DataArray(
        jaccard_matrix(list(heads.values())),
        dims=("set", "other"),
        coords={"set": names, "other": names},
        name="jaccard",
        attrs={"k": sorted({len(s) for s in heads.values()})},
    )


def user_overlap(
    scores: HeadScores, k: int, by: By = "user", seed: int = 0, limit: int = 50
) -> xr.DataArray:
    """Overlap of the users' top-K sets, with the numbers that it must be read against.

    Args:
        scores: PCS per example.
        k: Size of the sets.
        by: `user` or `task`.
        seed: Seed of the random sets and halvings.
        limit: Sets in the matrix, the first ones; the paper shows 50. The averages are over all.

    Returns:
        As `jaccard`, with attributes: `sets`, how many there are; `mean`, of all their pairs;
        `chance`, two random sets of K of all heads (exact); `layer_chance`, random heads with
        each set's own number in every layer (simulated); and from `split_half`, sets from half
        of the examples each: `same`, two halves of one user; `others`, halves of two users; `gap`
        = same - others with `gap_low` and `gap_high`. NaN where one can't be had.
    """
    scores.need_all_heads("the overlap beside chance and noise")
    heads = scores.top(k, by)
    sets = list(heads.values())
    shape = scores.heads_per_layer
    table = jaccard(dict(list(heads.items())[:limit]))
    table.attrs.update(
        by=by,
        sets=len(sets),
        mean=_mean_pair(jaccard_matrix(sets, heads_per_layer=shape)),
        chance=chance_jaccard(k, sum(shape)),
        layer_chance=_layer_chance(membership(sets, shape), shape, seed),
        **split_half(scores, k, by, seed=seed).attrs,
        ties=max(s.ties for s in sets),
    )
    return table


def _layer_chance(held: np.ndarray, shape: Sequence[int], seed: int) -> float:
    """Mean overlap of pairs of random sets that have each set's number of heads in every layer."""
    if len(held) < 2:
        return float("nan")
    rng = np.random.default_rng(seed)
    rows = held.reshape(len(held), len(shape), -1)
    counts = rows.sum(axis=2, keepdims=True)
    exists = np.arange(rows.shape[2])[None, :] < np.asarray(shape)[:, None]
    means = []
    # About as many simulated pairs whatever the number of users.
    for _ in range(int(np.clip(20_000 // len(held), 5, 200))):
        order = np.where(exists, rng.random(rows.shape), 2.0).argsort(axis=2).argsort(axis=2)
        drawn = (order < counts).astype(np.float32).reshape(held.shape)
        means.append(_mean_pair(jaccard_of(drawn, drawn)))
    return float(np.mean(means))


def _mean_pair(matrix: np.ndarray) -> float:
    pairs = matrix[np.triu_indices(len(matrix), k=1)]
    return float(pairs.mean()) if len(pairs) else float("nan")
