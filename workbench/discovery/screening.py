"""Exact scores where it counts: which heads to score exactly, and what may have been missed.

1. The gradient estimate scores every head on every example.
2. A few examples of each task, the pilot, are scored exactly on every head. Where the estimate is
   off for a head on the pilot, it is off in the same direction elsewhere: saturation belongs to
   the head.
3. In each group (all examples of a task, or of a user) the candidates are the heads, half again as
   many as K and at least K + 8, that stand highest in any of three rankings: by the estimate; by
   the estimate corrected by the pilot; and, half as many, by the estimate's size whatever its
   sign, since where the gradient is steep the straight line is furthest off and may even point
   the wrong way.
4. Of the others a random few, K / 4, are scored exactly as well: the audit. An audited head that
   turns out to be in the top K shows that the candidates missed some; how many is bounded from
   the share of such hits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta

from workbench.errors import InputError
from workbench.heads import check_k, top_k
from workbench.scores import By

AUDIT = 0.25  # times K
PILOT = 4  # examples a task
PILOT_SHARE = 0.125  # most of a task's examples that may be in it


@dataclass(frozen=True)
class Screen:
    """How heads are screened.

    Attributes:
        k: Size of the head sets that are wanted.
        by: What a set is for: each `task` or each `user`.
        candidates: Heads scored exactly in each group; half again `k`, at least `k` + 8, if None.
        audit: Other heads scored exactly; a quarter of `k` if None.
        seed: Of the pilot's and the audit's draw.
    """

    k: int = 16
    by: By = "task"
    candidates: int | None = None
    audit: int | None = None
    seed: int = 0

    def sizes(self, heads: int) -> tuple[int, int]:
        """Number of candidate and of audited heads in a model with so many heads.

        Raises:
            InputError: K is outside the model, or there are fewer candidates than K.
        """
        check_k(self.k, heads)
        usual = max(self.k + 8, -(-3 * self.k // 2))
        candidates = usual if self.candidates is None else self.candidates
        audit = max(2, round(AUDIT * self.k)) if self.audit is None else self.audit
        if candidates < self.k or audit < 1:
            raise InputError(
                f"{self.k} heads can't be found among {candidates} candidates with {audit} "
                "audited; give at least as many candidates as heads, and 1 to audit"
            )
        candidates = min(candidates, heads)
        return candidates, min(audit, heads - candidates)


@dataclass(frozen=True)
class Missed:
    """What an audit says of the heads that were not scored.

    Attributes:
        audited: Heads audited, over all groups.
        hits: How many of them belong to their group's top K.
        unscored: Heads neither candidate nor audited, over all groups.
        upper: Upper 95 % confidence bound on how many of a group's true top K, on average over
            the groups, were not scored.
        recall: Lower 95 % confidence bound on the share of the true top K that was.
    """

    audited: int
    hits: int
    unscored: int
    upper: float
    recall: float


def pilot(tasks: Sequence[str], seed: int) -> list[int]:
    """Positions of the examples on which every head is scored exactly."""
    rng = np.random.default_rng(seed)
    names = np.asarray(tasks)
    chosen: list[int] = []
    for task in dict.fromkeys(tasks):
        members = np.flatnonzero(names == task)
        size = min(PILOT, int(len(members) * PILOT_SHARE))
        chosen += rng.choice(members, size, replace=False).tolist()
    return sorted(chosen)


def correction(
    estimate: NDArray[np.float32],
    exact: NDArray[np.float32],
    members: Sequence[int],
    tasks: Sequence[str],
) -> NDArray[np.float32]:
    """By how much the estimate is off, head by head, on the pilot of each example's task.

    Args:
        estimate: Gradient estimate [example, layer, head].
        exact: Exact scores of the pilot [member, layer, head].
        members: The pilot's positions.
        tasks: Task of each example.

    Returns:
        [example, layer, head] in nats per token, 0 for a task without a pilot.
    """
    names = np.asarray(tasks)
    result = np.zeros_like(estimate)
    for task in dict.fromkeys(tasks):
        rows = [row for row, i in enumerate(members) if names[i] == task]
        if rows:
            off = exact[rows] - estimate[[members[row] for row in rows]]
            result[names == task] = off.mean(axis=0)
    return result


def choose(
    estimate: NDArray[np.float32],
    corrected: NDArray[np.float32],
    groups: Mapping[str, NDArray[np.intp]],
    screen: Screen,
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which heads to score exactly on each example.

    Args:
        estimate: Gradient estimate [example, layer, head]; NaN where there is no head.
        corrected: The same with the pilot's correction.
        groups: Positions of each group's examples.
        screen: How many.

    Returns:
        Candidates and audited heads, both [example, layer, head], with nothing in common.
    """
    present = ~np.isnan(estimate[0])
    candidates, audit = screen.sizes(int(present.sum()))
    rng = np.random.default_rng(screen.seed)
    chosen = np.zeros(estimate.shape, dtype=bool)
    audited = np.zeros(estimate.shape, dtype=bool)
    for members in groups.values():
        rankings = (estimate[members], corrected[members], np.abs(estimate[members]))
        places = np.stack([_places(values.mean(axis=0)) for values in rankings])
        places[2] *= 2  # a guard against what the others overlook: half as many come by it
        # Of two heads with the same best place the one whose other places are better.
        best = places.min(axis=0) + places.mean(axis=0) / (2 * estimate[0].size)
        order = np.argsort(np.where(present, best, np.inf), axis=None)
        drawn = rng.choice(order[candidates : present.sum()], audit, replace=False)
        for target, heads in ((chosen, order[:candidates]), (audited, drawn)):
            mask = np.zeros(estimate[0].size, dtype=bool)
            mask[heads] = True
            target[members] = mask.reshape(estimate.shape[1:])
    return chosen, audited


def _places(scores: NDArray[np.float32]) -> NDArray[np.float64]:
    """Place of every head, the highest score first: 0, 1, 2..."""
    flat = np.where(np.isnan(scores), -np.inf, scores).ravel()
    places = np.empty(flat.size)
    places[np.argsort(-flat, kind="stable")] = np.arange(flat.size)
    return places.reshape(scores.shape)


def missed(
    scores: NDArray[np.float32],
    audited: NDArray[np.bool_],
    groups: Mapping[str, NDArray[np.intp]],
    k: int,
    heads: int,
) -> Missed:
    """Bound how many of the true top K were never scored.

    A head that wasn't scored and belongs to the true top K would lie above the K-th best score
    seen. Audited heads are a random sample of all that aren't candidates, so the share of
    audited heads that do bounds the share of the others. The bound is Clopper and Pearson's for
    a binomial share of all groups' audits together, which is cautious here: groups that differ,
    and draws without replacement, both scatter less.

    Args:
        scores: Exact scores [example, layer, head], NaN where a head wasn't scored.
        audited: Which were scored as audit only, [example, layer, head].
        groups: Positions of each group's examples.
        k: Size of the sets.
        heads: Number of heads in the model.
    """
    count = hits = unscored = 0
    for members in groups.values():
        means = scores[members].astype(np.float64).mean(axis=0)
        top = top_k(means, k)
        sampled = audited[members[0]]
        count += int(sampled.sum())
        hits += sum(bool(sampled[head.layer, head.head]) for head in top)
        unscored += heads - int((~np.isnan(means)).sum())
    share = float(beta.ppf(0.95, hits + 1, count - hits)) if hits < count else 1.0
    # All heads but the candidates have that share; the hits among them were scored.
    upper = min((share * (count + unscored) - hits) / len(groups), unscored / len(groups), k)
    return Missed(count, hits, unscored, upper, max(0.0, 1 - upper / k))
