"""Means and other statistics with intervals from resampled users, and paired tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

RESAMPLES = 2000
SWAPS = 5 * RESAMPLES

Combine = Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]
"""From sums of parts over examples, [..., part], and numbers of examples, [...], to values, [...].

A macro F1 or a root mean square is no mean of one number an example, yet it follows from sums: of
hits and label counts, of squares. Whatever does can be resampled and tested below.
"""


@dataclass(frozen=True)
class Estimate:
    """A mean, or another statistic of many examples, with its interval.

    Attributes:
        mean: Mean over examples, or the statistic of all of them.
        low: Lower end of the interval.
        high: Upper end of the interval.
        n: Number of examples.
        groups: Number of users, the unit that was resampled.
    """

    mean: float
    low: float
    high: float
    n: int
    groups: int

    def __format__(self, spec: str) -> str:
        spec = spec or ".3f"
        if np.isnan(self.low):
            return f"{self.mean:{spec}} [no interval: {self.groups} user]"
        return f"{self.mean:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"

    def __str__(self) -> str:
        return f"{self}"

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval leaves 0 out; False when there is no interval."""
        return bool(self.low > 0 or self.high < 0)


def group_sums(values: NDArray[np.float64], groups: ArrayLike) -> tuple[NDArray, NDArray]:
    """Sums over each group's examples, [group, ...], and their numbers, [group]."""
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    count = index.max() + 1
    sums = np.zeros((count, *values.shape[1:]))
    np.add.at(sums, index, values)
    return sums, np.bincount(index, minlength=count).astype(float)


def _resampled(
    sums: NDArray[np.float64], counts: NDArray[np.float64], seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sums [draw, part] and numbers of examples [draw] of groups drawn with replacement."""
    weights = user_weights(len(counts), seed)
    return weights @ sums, weights @ counts


def user_weights(groups: int, seed: int) -> NDArray[np.int64]:
    """How often each group is drawn with replacement, [draw, group]."""
    return np.random.default_rng(seed).multinomial(groups, np.full(groups, 1 / groups), RESAMPLES)


def _signs(groups: int, seed: int) -> NDArray[np.float64]:
    """Random assignments [draw, group] of 1 (as observed) and -1 (the two sides swapped)."""
    return np.random.default_rng(seed).choice([-1.0, 1.0], size=(SWAPS, groups))


def _ends(
    draws: NDArray[np.float64], level: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    tail = (1 - level) / 2
    low, high = np.quantile(draws, [tail, 1 - tail], axis=0)
    return low, high


def _share_reached(draws: NDArray[np.float64], observed: float, scale: float) -> float:
    """Share of draws at least as far from 0 as the observed value, which counts as one of them.

    NaN if any of them is: a comparison with NaN is false, which would make p small.
    The slack is far above rounding and far below any real difference: an assignment equal to
    the observed one in exact arithmetic must not be lost to the order of summation.
    """
    if np.isnan(draws).any() or np.isnan(observed):
        return float("nan")
    reached = np.abs(draws) >= abs(observed) - 1e-9 * scale
    return float((reached.sum() + 1) / (len(draws) + 1))


def bootstrap_mean(
    values: ArrayLike, groups: ArrayLike, level: float = 0.95, seed: int = 0
) -> tuple[NDArray, NDArray, NDArray]:
    """Mean over examples with a percentile interval from resampled groups.

    Args:
        values: [example, ...]; every trailing position is estimated on the same resamples.
        groups: [example], what is resampled whole: the user.
        level: Coverage, as a fraction.
        seed: Seed of the resampling.

    Returns:
        Mean, lower and upper ends, each of the trailing shape. With a single group there is
        nothing to resample: the ends are NaN, not a point.

    Source:
        Efron's percentile bootstrap over clusters. The paper and its code print no interval.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.shape[0] == 0:
        raise ValueError("no values to average")
    sums, counts = group_sums(data, groups)
    mean = data.mean(axis=0)
    if len(counts) < 2:
        missing = np.full_like(mean, np.nan)
        return mean, missing, missing
    drawn, sizes = _resampled(sums.reshape(len(counts), -1), counts, seed)
    low, high = _ends(drawn / sizes[:, None], level)
    return mean, low.reshape(mean.shape), high.reshape(mean.shape)


def estimate(values: ArrayLike, groups: ArrayLike, level: float = 0.95, seed: int = 0) -> Estimate:
    """`bootstrap_mean` of one number an example, as an `Estimate`.

    For a paired difference pass the differences: users are resampled once for both sides.
    """
    mean, low, high = bootstrap_mean(values, groups, level, seed)
    number = len(np.unique(np.asarray(groups)))
    return Estimate(float(mean), float(low), float(high), len(np.asarray(values)), number)


def sign_flip_p(differences: ArrayLike, groups: ArrayLike, seed: int = 0) -> float:
    """Two-sided p of a mean paired difference, by flipping the signs of whole users.

    Args:
        differences: [example], one side minus the other on the same example.
        groups: [example], the user; all differences of one user flip together.
        seed: Seed of the flips.

    Returns:
        Share of sign assignments whose mean is at least as far from 0; the observed one counts,
        so p is never 0. NaN if a difference is NaN.
    """
    sums, _ = group_sums(np.asarray(differences, dtype=np.float64), groups)
    return _share_reached(_signs(len(sums), seed) @ sums, sums.sum(), np.abs(sums).sum())


def mean_of(sums: NDArray[np.float64], counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """The `Combine` of a plain mean: one part an example, its sum over the number of examples."""
    return sums[..., 0] / counts


def bootstrap_statistic(
    parts: ArrayLike,
    groups: ArrayLike,
    combine: Combine,
    level: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """A statistic of all examples with a percentile interval from resampled groups.

    With `mean_of` and one part it is `estimate`, on the same resamples.

    Args:
        parts: [example, part], what is summed over examples.
        groups: [example], what is resampled whole: the user.
        combine: From sums and numbers of examples to the statistic.
        level: Coverage, as a fraction.
        seed: Seed of the resampling.

    Returns:
        The statistic of all examples, with its interval. The ends are NaN with a single group,
        and all three numbers where a part is NaN. A label that few users have is missing from
        many resamples, which pulls the ends of a macro F1 down.

    Raises:
        ValueError: There is no example, or `parts` has another shape.

    Source:
        Efron's percentile bootstrap over clusters.
    """
    sums, counts = group_sums(_checked_parts(parts), groups)
    value = low = high = float("nan")
    if not np.isnan(sums).any():
        value = float(combine(sums.sum(axis=0), np.asarray(counts.sum())))
        if len(counts) > 1:
            low, high = map(float, _ends(combine(*_resampled(sums, counts, seed)), level))
    return Estimate(value, low, high, int(counts.sum()), len(counts))


def paired_statistic(
    parts_a: ArrayLike,
    parts_b: ArrayLike,
    groups: ArrayLike,
    combine: Combine,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[Estimate, float]:
    """Difference of a statistic between two sides on the same examples, with interval and p.

    Args:
        parts_a: [example, part] of the first side.
        parts_b: The same of the second side, subtracted from the first.
        groups: [example], the user, resampled and swapped whole.
        combine: From sums and numbers of examples to the statistic.
        level: Coverage of the interval, as a fraction.
        seed: Seed of the resampling and of the swaps.

    Returns:
        The difference with its interval, users resampled once for both sides; and the two-sided
        p of a permutation test: the share of assignments, in each of which every user's two
        sides are swapped or not, whose difference is at least as far from 0. The observed one
        counts, so p is never 0. With one part and `mean_of` the assignments are those of
        `sign_flip_p`, and so is p. Where a part is NaN so are the numbers; with a single group
        the ends are NaN and p is 1.

    Raises:
        ValueError: There is no example, or the sides differ in shape.

    Source:
        Fisher's randomisation test with users as units. What it tests is that a user's two
        answers could as well have changed places, of which equal statistics are a consequence.
    """
    a, b = _checked_parts(parts_a), _checked_parts(parts_b)
    if a.shape != b.shape:
        raise ValueError(f"two sides on the same examples, got shapes {a.shape} and {b.shape}")
    sums, counts = group_sums(np.concatenate([a, b], axis=1), groups)
    number, users = int(counts.sum()), len(counts)
    low = high = float("nan")
    if np.isnan(sums).any():
        return Estimate(low, low, high, number, users), float("nan")

    def sides(both: NDArray, sizes: NDArray) -> tuple[NDArray, NDArray]:
        left, right = np.split(both, 2, axis=-1)
        return combine(left, sizes), combine(right, sizes)

    first, second = map(float, sides(sums.sum(axis=0), np.asarray(counts.sum())))
    difference = first - second
    if users > 1:
        drawn, others = sides(*_resampled(sums, counts, seed))
        low, high = map(float, _ends(drawn - others, level))
    # Sums of what each side holds after the swaps, not the observed sums plus or minus halves
    # of differences: rounding could then push a sum of squares below 0.
    kept = _signs(users, seed) > 0
    swapped = np.concatenate(np.split(sums, 2, axis=1)[::-1], axis=1)
    mixed = kept.astype(float) @ sums + (~kept).astype(float) @ swapped
    left, right = sides(mixed, np.full(SWAPS, counts.sum()))
    p = _share_reached(left - right, difference, abs(first) + abs(second))
    return Estimate(difference, low, high, number, users), p


def _checked_parts(parts: ArrayLike) -> NDArray[np.float64]:
    data = np.asarray(parts, dtype=np.float64)
    if data.ndim != 2 or data.shape[0] == 0:
        raise ValueError(f"parts are [example, part] with one example or more, got {data.shape}")
    return data


def rank_correlation(
    first: ArrayLike,
    first_groups: ArrayLike,
    second: ArrayLike,
    second_groups: ArrayLike,
    level: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Spearman's correlation over positions of two means, each over examples of its own.

    Args:
        first: [example, position]; a position that is NaN on either side takes no part.
        first_groups: [example], the user, resampled whole.
        second: [other example, position] of other examples, as of text without users.
        second_groups: [other example], what is resampled whole there.
        level: Coverage of the interval, as a fraction.
        seed: Seed of the resampling.

    Returns:
        The correlation with the basic bootstrap interval on Fisher's z scale; n counts positions,
        groups the first side's users. A resample is noisier than the data, and noise lowers a
        correlation: percentiles of the resamples would lie too low, and the basic interval turns
        that around. NaN ends with a single user on a side, and all NaN with fewer than three
        positions or where one side is constant.

    Raises:
        ValueError: The sides differ in their number of positions.

    Source:
        Davison and Hinkley (1997), section 5.2, for the basic interval.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape[1:] != b.shape[1:] or a.ndim != 2:
        raise ValueError(f"[example, position] of the same positions, got {a.shape} and {b.shape}")
    there = ~(np.isnan(a).any(axis=0) | np.isnan(b).any(axis=0))
    sides = [group_sums(a[:, there], first_groups), group_sums(b[:, there], second_groups)]
    users, n = len(sides[0][1]), int(there.sum())
    if n < 3:
        return Estimate(np.nan, np.nan, np.nan, n, users)
    rho = float(_spearman(*(sums.sum(axis=0)[None] / counts.sum() for sums, counts in sides))[0])
    if min(len(counts) for _, counts in sides) < 2 or np.isnan(rho):
        return Estimate(rho, np.nan, np.nan, n, users)
    means = []
    for offset, (sums, counts) in enumerate(sides):
        drawn, sizes = _resampled(sums, counts, seed + offset)
        means.append(drawn / sizes[:, None])
    draws = _spearman(*means)
    # Means of quantised values may tie throughout; and z of 1 is infinite.
    z = np.arctanh(np.clip(np.nan_to_num(draws), -1 + 1e-9, 1 - 1e-9))
    middle = 2 * np.arctanh(np.clip(rho, -1 + 1e-9, 1 - 1e-9))
    low, high = _ends(z, level)
    return Estimate(rho, float(np.tanh(middle - high)), float(np.tanh(middle - low)), n, users)


def _spearman(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rank correlation of each row [draw, position] of one side with the other's; ties share."""
    ranks = [rankdata(side, axis=1) for side in (a, b)]
    x, y = (rank - rank.mean(axis=1, keepdims=True) for rank in ranks)
    scale = np.sqrt((x**2).sum(axis=1) * (y**2).sum(axis=1))
    product = (x * y).sum(axis=1)
    return np.divide(product, scale, out=np.full_like(scale, np.nan), where=scale > 0)
