"""Are two head sets different, or is it noise? Halves of the users, within and across.

Two sets of K heads differ by noise too. So a set found from one random half of the users is held
against the set from the other half: of the same kind (within), and of the other kind (across).
Both comparisons are between different users.

The share of K that two sets have in common, less what chance gives, is written s. Noise thins a
set out: were the two kinds' heads the same and only one found with more noise, then the overlap
across would be the geometric mean of the two within. The gap is how far it falls short of that:

    gap = sqrt(s(a, a) s(b, b)) - s(a, b)

The plain mean in its place would call a set different for being noisy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student_t

from workbench.analysis.agreement import highest
from workbench.heads import check_k
from workbench.scores import HeadScores

SPLITS = 200
SUBSAMPLES = 200
INNER = 8  # halvings of a subsample
LEAST_USERS = 4  # a quarter of the users must be one
LEAST_RATIO = 1 / 3

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Gap:
    """How different two kinds of head sets are, beyond noise.

    Attributes:
        first: Share of K that two halves' sets of the first kind have in common.
        second: The same of the second kind.
        across: The same of one half's set of one kind and the other half's of the other.
        gap: As in the module's docstring; NaN where either kind is no better than chance.
        low: Lower end of the interval.
        high: Upper end of the interval.
        p: Two-sided, of no gap.
        users: Users with examples of both kinds, who were halved.
    """

    first: float
    second: float
    across: float
    gap: float
    low: float
    high: float
    p: float
    users: int


def set_gap(
    first: HeadScores, second: HeadScores, k: int, level: float = 0.95, seed: int = 0
) -> Gap:
    """Hold two kinds of scores of the same heads against each other.

    Args:
        first: Scores of one kind.
        second: Scores of the other, with users in common.
        k: Size of the sets.
        level: Coverage of the interval, as a fraction.
        seed: Seed of the halvings.

    Returns:
        The shares and the gap. The interval is `gap -+ t * se` with the delete-half jackknife
        over users, which is right for statistics that jump, as sets do. There is none with fewer
        than four users, or where the smaller of the two shares within, less chance, is below a
        third of the larger: in simulations of equal heads the interval then missed 0 in up to
        22 % of cases, and otherwise in 5 % at most.

    Raises:
        InputError: K is outside the model.

    Source:
        Shao and Wu (1989) for the delete-d jackknife.
    """
    users = [name for name in first.groups("user") if name in second.groups("user")]
    there = _present(first) & _present(second)
    check_k(k, int(there.sum()))
    nothing = float("nan")
    if len(users) < 2:
        return Gap(nothing, nothing, nothing, nothing, nothing, nothing, nothing, len(users))
    sides = [_user_sums(scores, users, there) for scores in (first, second)]
    rng = np.random.default_rng(seed)
    everyone = np.arange(len(users))
    shares = _shares(sides, *_halvings(rng, everyone, SPLITS), k).mean(axis=1)
    chance = k / int(there.sum())
    gap = float(_gap(shares, chance))
    low = high = p = nothing
    within = shares[:2] - chance
    if len(users) >= LEAST_USERS and within.min() > LEAST_RATIO * within.max() and k < there.sum():
        kept = len(users) // 2
        halvings = [
            _halvings(rng, rng.permutation(len(users))[:kept], INNER, len(users))
            for _ in range(SUBSAMPLES)
        ]
        parts = [np.concatenate(half) for half in zip(*halvings, strict=True)]
        inner = _shares(sides, parts[0], parts[1], k).reshape(3, SUBSAMPLES, INNER).mean(axis=2)
        scale = np.sqrt(kept / (len(users) - kept))
        error = float(np.nanstd(_gap(inner, chance), ddof=1) * scale)
        reach = float(student_t.ppf((1 + level) / 2, len(users) - 1)) * error
        low, high = gap - reach, gap + reach
        # Heads far above the noise make the same sets in every subsample.
        reached = abs(gap) / error if error > 0 else (np.inf if abs(gap) > 1e-9 else 0.0)
        p = 2 * float(student_t.sf(reached, len(users) - 1))
    first_share, second_share, across = map(float, shares)
    return Gap(first_share, second_share, across, gap, low, high, p, len(users))


def _present(scores: HeadScores) -> NDArray[np.bool_]:
    return ~np.isnan(scores.data["pcs"].values).any(axis=0)


def _user_sums(
    scores: HeadScores, users: list[str], there: NDArray[np.bool_]
) -> tuple[Array, Array]:
    """Sums of PCS [user, head] and numbers of examples [user]."""
    pcs = scores.data["pcs"].values[:, there].astype(np.float64)
    groups = scores.groups("user")
    sums = np.stack([pcs[groups[name]].sum(axis=0) for name in users])
    return sums, np.array([len(groups[name]) for name in users], dtype=np.float64)


def _halvings(
    rng: np.random.Generator, members: NDArray[np.intp], number: int, total: int | None = None
) -> tuple[Array, Array]:
    """Random halves of some users as weights [halving, user]; an odd one out is left out."""
    first = np.zeros((number, len(members) if total is None else total))
    second = np.zeros_like(first)
    size = len(members) // 2
    for row in range(number):
        order = rng.permutation(members)
        first[row, order[:size]] = 1
        second[row, order[size : 2 * size]] = 1
    return first, second


def _shares(
    sides: list[tuple[Array, Array]], first: Array, second: Array, k: int
) -> NDArray[np.float64]:
    """Shared heads over K [3, halving]: within the first kind, within the second, across."""
    a1, b1 = (highest(first @ sums / (first @ counts)[:, None], k) for sums, counts in sides)
    a2, b2 = (highest(second @ sums / (second @ counts)[:, None], k) for sums, counts in sides)
    pairs = ((a1, a2), (b1, b2), (a1, b2), (b1, a2))
    shared = [(x & y).sum(axis=1) / k for x, y in pairs]
    return np.stack([shared[0], shared[1], (shared[2] + shared[3]) / 2])


def _gap(shares: NDArray[np.float64], chance: float) -> NDArray[np.float64]:
    """The gap of shares [3, ...]; NaN where a kind's halves share no more than chance gives."""
    first, second, across = shares - chance
    product = np.where((first > 0) & (second > 0), first * second, np.nan)
    return np.asarray(np.sqrt(product) - across)
