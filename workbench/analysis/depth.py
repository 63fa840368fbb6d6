"""Where in a model's depth its positive head scores lie, for models of any shapes."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from workbench import stats

Array = NDArray[np.float64]
TENTHS = 10
DEPTH = (
    *("overlap", "overlap_low", "overlap_high", "overlap_chance", "overlap_p"),
    *("depth_rho", "depth_rho_low", "depth_rho_high"),
)


class Side:
    """One model's scores of a group of examples, ready to be resampled by users.

    Attributes:
        pcs: Scores [example, layer, head]; NaN where there is no such head.
        users: Whose each example is.
        mean: Over examples, [layer, head].
        names: The users, sorted; what is resampled.
        counts: Examples of each.
        sums: Of their scores, [user, layer, head], 0 where there is no such head.
    """

    def __init__(self, pcs: Array, users: NDArray[Any]) -> None:
        self.pcs, self.users = pcs, users
        self.mean = pcs.mean(axis=0)
        self.names, index = np.unique(users, return_inverse=True)
        self.counts = np.bincount(index).astype(float)
        # A head that isn't there has no score to add.
        self.sums = np.zeros((len(self.names), *self.mean.shape))
        np.add.at(self.sums, index, np.nan_to_num(pcs))

    def resampled(self, seed: int) -> Array:
        """Means [draw, layer, head] of users drawn with replacement."""
        rng = np.random.default_rng(seed)
        number = len(self.names)
        weights = rng.multinomial(number, np.full(number, 1 / number), stats.RESAMPLES)
        return np.einsum("du,ulh->dlh", weights, self.sums) / (weights @ self.counts)[:, None, None]


def unit_ranks(values: Array) -> Array:
    """Ranks with mean 0 and length 1; all 0 where every value is the same."""
    ranks = rankdata(values, axis=-1)
    ranks = ranks - ranks.mean(axis=-1, keepdims=True)
    length = np.sqrt((ranks**2).sum(axis=-1, keepdims=True))
    return np.divide(ranks, length, out=np.zeros_like(ranks), where=length > 0)


def reached(value: float, draws: Array) -> float:
    """Share of draws that reach the value, which counts as one of them."""
    return float(((draws >= value - 1e-12).sum() + 1) / (len(draws) + 1))


def by_depth(a: Side, b: Side, permutations: int, level: float, seed: int) -> dict[str, Any]:
    """Where in the depth the positive score lies; `DEPTH`, `mass` and `centre` of `transfer`."""
    shares = [_layer_shares(side.mean) for side in (a, b)]
    masses = [share @ _spread(len(share)) for share in shares]
    orders = _orders(len(shares[1]), permutations, np.random.default_rng(seed))
    drawn = _overlap(masses[0], shares[1][orders] @ _spread(len(shares[1])))
    result: dict[str, Any] = {
        "overlap": float(_overlap(*masses)),
        "overlap_chance": float(drawn.mean()),
        "depth_rho": float(_rho(*masses)),
    }
    # Of all orders the one there is is one already.
    reach = float((drawn >= result["overlap"] - 1e-12).mean())
    every = len(orders) == math.factorial(len(shares[1]))
    result["overlap_p"] = reach if every else reached(result["overlap"], drawn)
    result |= {"mass": np.stack(masses), "centre": np.array([_centre(s) for s in shares])}
    if min(len(a.names), len(b.names)) < 2:
        return result
    # The same users are drawn on both sides where the sides have the same users.
    paired = a.names.tolist() == b.names.tolist()
    draws = [
        _layer_shares(side.resampled(seed + (0 if paired else offset)))
        for offset, side in enumerate((a, b))
    ]
    spreads = [share @ _spread(share.shape[1]) for share in draws]
    tails = [(1 - level) / 2, (1 + level) / 2]
    ends = [np.quantile(spread, tails, axis=0) for spread in spreads]
    result["mass_low"], result["mass_high"] = (np.stack([e[i] for e in ends]) for i in (0, 1))
    middles = [np.quantile(_centre(share), tails) for share in draws]
    result["centre_low"], result["centre_high"] = (
        np.array([m[i] for m in middles]) for i in (0, 1)
    )
    for name, resampled, limits in (
        ("overlap", _overlap(*spreads), (0, 1)),
        ("depth_rho", _rho(*spreads), (-1, 1)),
    ):
        low, high = np.clip(2 * result[name] - np.quantile(resampled, tails)[::-1], *limits)
        result |= {f"{name}_low": float(low), f"{name}_high": float(high)}
    return result


def _orders(layers: int, number: int, rng: np.random.Generator) -> NDArray[np.intp]:
    """Orders of the layers [order, layer]: all there are of few, else random ones."""
    if layers < 6:
        return np.array(list(itertools.permutations(range(layers))))
    return np.stack([rng.permutation(layers) for _ in range(number)])


def _layer_shares(mean: Array) -> Array:
    """Share of the positive score [..., layer]; NaN where no score is positive."""
    positive = np.nan_to_num(mean).clip(min=0).sum(axis=-1)
    whole = positive.sum(axis=-1, keepdims=True)
    return np.divide(positive, whole, out=np.full_like(positive, np.nan), where=whole > 0)


def _spread(layers: int) -> Array:
    """What share of a layer's part of the depth lies in each tenth, [layer, tenth]."""
    edges = np.arange(layers + 1) / layers
    tenths = np.arange(TENTHS + 1) / TENTHS
    upper = np.minimum(edges[1:, None], tenths[None, 1:])
    lower = np.maximum(edges[:-1, None], tenths[None, :-1])
    return (upper - lower).clip(min=0) * layers


def _centre(shares: Array) -> Array:
    """Mean relative depth, from 0 (input) to 1 (output)."""
    layers = shares.shape[-1]
    return shares @ ((np.arange(layers) + 0.5) / layers)


def _overlap(first: Array, second: Array) -> Array:
    return np.minimum(first, second).sum(axis=-1)


def _rho(first: Array, second: Array) -> Array:
    # Tenths of one layer hold the same share but for rounding, and must tie.
    return (unit_ranks(first.round(12)) * unit_ranks(second.round(12))).sum(axis=-1)
