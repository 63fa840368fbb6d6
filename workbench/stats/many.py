"""Many tests at once: p after Holm, and intervals and p of all heads of a model together."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from workbench.stats.resampling import RESAMPLES, group_sums, user_weights

FEWEST = 6
"""Users below which many positions are not judged together."""


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """Holm's step-down adjustment of p values, in the order given."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p))))
    result = np.empty_like(p)
    result[order] = np.minimum(adjusted, 1.0)
    return result


def simultaneous(
    values: ArrayLike, groups: ArrayLike, level: float = 0.95, seed: int = 0
) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """Means of many positions with intervals that hold together, and p adjusted for all of them.

    The positions (the heads of a model) are one family. In each draw of users with replacement a
    position's `t* = (mean* - mean) / se*` is taken, and the largest and the smallest t* of all
    positions are kept. The low end is `mean - c * se`, c the upper quantile of the largest t*; the
    high end follows from the smallest alike, so that skewed values have uneven intervals. p is
    twice the share of draws whose largest (smallest) t* reaches the position's own, the observed
    one counted. An interval that leaves 0 out always has a p of at most 1 - level.

    Nothing is found where the users can't tell. A draw whose users are all alike at a position
    has se* = 0, and t* is infinite there if mean* differs: with an end in more draws than lie
    beyond it, the position has no such end, and takes no part on that side.

    How often there is any false finding among 30 correlated positions without an effect, in 500
    simulations at level .95 (each has a standard error of about 1 %):

    | users' means | 16 users | 48 users |
    |---|---|---|
    | normal | 2.0 % | 4.6 % |
    | exponential, centred | 2.4 % | 3.6 % |
    | 10 % of users with an effect, others at each position, centred, and noise | 0.0 % | 2.2 % |
    | the same 10 % of users at all positions | 22 % | 4.2 % |
    | the same 10 %, either sign, and no noise | 0.0 % | 0.0 % |

    What no user in the sample has can't be seen: 18.5 % of samples of 16 hold none of those 10 %.

    Args:
        values: [example, ...], one number an example at every trailing position.
        groups: [example], what is resampled whole: the user.
        level: Coverage of all intervals together, as a fraction.
        seed: Seed of the resampling.

    Returns:
        Mean, lower and upper ends, and p, each of the trailing shape. An end without a bound is
        NaN, so that `(low > 0) | (high < 0)` are the findings; p is NaN where neither side can be
        judged. A position with a NaN is NaN and takes no part. One whose users all have the same
        mean has no spread to be judged by: no ends, and a p of 1. With fewer than 6 users there
        are no ends and no p.

    Raises:
        ValueError: There is no example.

    Source:
        Single-step max-T (Westfall and Young, 1993) of the studentised cluster bootstrap (Davison
        and Hinkley, 1997, section 5.2), with linearised standard errors of a ratio.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.shape[0] == 0:
        raise ValueError("no values to average")
    sums, counts = group_sums(data.reshape(len(data), -1), groups)
    mean = sums.sum(axis=0) / counts.sum()
    low, high, p = (np.full_like(mean, np.nan) for _ in range(3))
    if len(counts) >= FEWEST:
        residuals = sums - mean * counts[:, None]
        # What rounding leaves of equal means is no spread.
        spread = np.abs(residuals).max(axis=0) > 1e-12 * np.abs(sums).max(axis=0)
        p[~np.isnan(mean) & ~spread] = 1.0
        if spread.any():
            found = _together(mean[spread], residuals[:, spread], counts, level, seed)
            low[spread], high[spread], p[spread] = found
    shape = data.shape[1:]
    return mean.reshape(shape), low.reshape(shape), high.reshape(shape), p.reshape(shape)


def _together(
    mean: NDArray[np.float64],
    residuals: NDArray[np.float64],
    counts: NDArray[np.float64],
    level: float,
    seed: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Low and high ends and p [position] of means that all have some spread."""
    tail = (1 - level) / 2
    se = np.sqrt((residuals**2).sum(axis=0) * len(counts) / (len(counts) - 1)) / counts.sum()
    largest, judged = _largest_t(residuals, counts, tail, seed)
    place = int(np.ceil((1 - tail) * (RESAMPLES + 1))) - 1
    ends, shares = [], []
    for side, draws, there in zip((1, -1), np.sort(largest, axis=1), judged, strict=True):
        reached = RESAMPLES - np.searchsorted(draws, side * mean / se * (1 - 1e-9))
        shares.append(np.where(there, (reached + 1) / (RESAMPLES + 1), np.nan))
        # What only reaches the edge is no finding, however its sums were rounded.
        c = draws[place] * (1 + 2e-9) if place < RESAMPLES else np.inf
        bounded = there & np.isfinite(c)
        ends.append(np.where(bounded, mean - side * (c if np.isfinite(c) else 0.0) * se, np.nan))
    return ends[0], ends[1], np.minimum(2 * np.fmin(*shares), 1.0)


def _largest_t(
    residuals: NDArray[np.float64], counts: NDArray[np.float64], tail: float, seed: int
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Largest t* and largest -t* of all positions, [side, draw], and who takes part.

    A position is judged on a side, [side, position], if at most a share `tail` of its t* is
    infinite there; the others could have no end on that side anyway. A largest t* is 0 or more: an
    interval holds its mean.
    """
    weights = user_weights(len(counts), seed)
    largest = np.zeros((2, RESAMPLES))
    judged = np.zeros((2, residuals.shape[1]), dtype=bool)
    # Some positions at a time: of all heads of a large model there would be gigabytes.
    for start in range(0, residuals.shape[1], 128):
        part = slice(start, start + 128)
        t = _resampled_t(residuals[:, part], counts, weights)
        for row, signed in enumerate((t, -t)):
            judged[row, part] = there = np.isposinf(signed).mean(axis=0) <= tail
            most = signed.max(axis=1, where=there, initial=0.0)
            largest[row] = np.maximum(largest[row], most)
    return largest, judged


def _resampled_t(
    residuals: NDArray[np.float64], counts: NDArray[np.float64], weights: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Studentised deviation (mean* - mean) / se* of each draw, [draw, position].

    Args:
        residuals: [group, position], sums less the mean times counts.
        counts: [group], numbers of examples.
        weights: [draw, group], how often each group was drawn.
    """
    squares = weights @ residuals**2
    sizes = (weights @ counts)[:, None]
    shift = weights @ residuals / sizes
    # Squares of what the drawn users differ from the draw's own mean by.
    moved = shift**2 * (weights @ counts**2)[:, None]
    own = squares - 2 * shift * (weights @ (residuals * counts[:, None])) + moved
    still = squares <= 1e-20 * (residuals**2).sum(axis=0)  # none but users at the mean itself
    alike = own <= 1e-10 * (squares + moved)
    t = np.where(alike, np.copysign(np.inf, shift), 0.0)
    groups = len(counts)
    np.divide(shift * sizes, np.sqrt(np.maximum(own, 0) * groups / (groups - 1)), t, where=~alike)
    return np.where(still, 0.0, t)
