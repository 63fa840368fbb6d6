"""How far a head set can be trusted: found again from other examples, is it the same set?"""

from __future__ import annotations

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy.stats import t as student_t

from workbench.analysis.agreement import scored_pcs
from workbench.heads import jaccard_matrix, top_k
from workbench.scores import By, HeadScores


def split_half(
    scores: HeadScores, k: int, by: By = "user", splits: int = 20, seed: int = 0
) -> xr.Dataset:
    """Overlap of top-K sets found from halves of the examples, within and between groups.

    Two users' sets differ by noise too. So a user's set from one random half of the examples is
    held against the set from the other half of the same user's, and against the other half of
    every other user's: both sides from equally few examples. Only the gap between the two says
    that users differ. It does not say why: both halves of a user stand behind the same profile,
    whose wording may need other heads as well as its preferences.

    Args:
        scores: PCS per example.
        k: Size of the sets.
        by: What is halved: each user's, each task's, or all examples; task by task, so that
            both halves have the same mix.
        splits: Random halvings to average over.
        seed: Seed of the halvings.

    Returns:
        `same[group]` and `others[group]`, mean Jaccard overlap with the own other half and with
        those of other groups; NaN for a group with a single example; `examples` and `users`.
        Attributes `same`, `others` and `gap` = same - others, means over groups, `gap_low` and
        `gap_high` its 95 % interval by the jackknife over groups; NaN where they can't be had.

    Raises:
        InputError: The run was screened, a score is missing, or K is outside the model.
    """
    pcs = scored_pcs(scores, k, "the overlap of halves")
    rng = np.random.default_rng(seed)
    groups, users = scores.groups(by), scores.data["user"].values
    halved = [name for name, rows in groups.items() if len(rows) > 1]
    same, others = np.full(len(groups), np.nan), np.full(len(groups), np.nan)
    attrs = dict.fromkeys(("same", "others", "gap", "gap_low", "gap_high"), float("nan"))
    if halved:
        rows = [groups[name] for name in halved]
        overlaps = np.mean(
            [_overlap_of_halves(pcs, scores, rows, k, rng) for _ in range(splits)], 0
        )
        places = [list(groups).index(name) for name in halved]
        own = overlaps.diagonal()
        same[places] = own
        attrs["same"] = float(own.mean())
        if len(halved) > 1:
            others[places] = (overlaps.sum(axis=1) - own) / (len(halved) - 1)
            attrs |= {"others": float(others[places].mean()), **_gap_interval(overlaps)}
    return xr.Dataset(
        {
            "same": ("group", same),
            "others": ("group", others),
            "examples": ("group", [len(rows) for rows in groups.values()]),
            "users": ("group", [len(set(users[rows])) for rows in groups.values()]),
        },
        coords={"group": list(groups)},
        attrs=attrs,
    )


def _gap(overlaps: np.ndarray) -> float:
    count = len(overlaps)
    own = np.trace(overlaps)
    return float(own / count - (overlaps.sum() - own) / (count * (count - 1)))


def _gap_interval(overlaps: np.ndarray) -> dict[str, float]:
    """The gap with its 95 % interval by the jackknife over groups.

    A pair belongs to two groups, so that groups' own gaps are not independent: a bootstrap of
    them gave intervals that missed 0 in 40 % of simulations without any difference; leaving out a
    group with all its pairs missed it in 5 %.
    """
    count, gap = len(overlaps), _gap(overlaps)
    if count < 3:
        return {"gap": gap, "gap_low": float("nan"), "gap_high": float("nan")}
    left = np.array([_gap(np.delete(np.delete(overlaps, i, 0), i, 1)) for i in range(count)])
    error = np.sqrt((count - 1) / count * ((left - left.mean()) ** 2).sum())
    reach = float(student_t.ppf(0.975, count - 1) * error)
    return {"gap": gap, "gap_low": gap - reach, "gap_high": gap + reach}


def _overlap_of_halves(
    pcs: NDArray[np.float64],
    scores: HeadScores,
    groups: list[np.ndarray],
    k: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Jaccard [group, group] of one random half's set with the other half's."""
    tasks = scores.data["task"].values
    shape = scores.heads_per_layer
    first, second = [], []
    for rows in groups:
        halves: tuple[list[int], list[int]] = ([], [])
        # Within each task: halves that differ in their mix of tasks would differ for that alone.
        for task in dict.fromkeys(tasks[rows].tolist()):
            shuffled = rng.permutation(rows[tasks[rows] == task]).tolist()
            # An odd one out goes to the half that is behind.
            behind = int(len(halves[0]) > len(halves[1]))
            for index, row in enumerate(shuffled):
                halves[(behind + index) % 2].append(row)
        first.append(top_k(pcs[halves[0]].mean(axis=0), k))
        second.append(top_k(pcs[halves[1]].mean(axis=0), k))
    return jaccard_matrix(first, second, shape)


def lines(table: xr.Dataset) -> list[str]:
    """Whether groups differ beyond noise, in a line."""
    same, others, gap, low, high = (
        float(table.attrs[name]) for name in ("same", "others", "gap", "gap_low", "gap_high")
    )
    if np.isnan(same):
        return ["Sets from halves can't be compared: no group has two examples."]
    found = f"Found from half of the examples each, sets of one group overlap by {same:.2f}"
    if np.isnan(gap):
        return [f"{found}; there is no other group to hold them against."]
    found += f", of two groups by {others:.2f}"
    if np.isnan(low):
        return [f"{found}; two groups are too few to tell that from noise."]
    state = "the groups' heads differ beyond noise" if low > 0 else "no difference shown"
    return [f"{found}: {state} ({gap:+.3f}, 95 % interval {low:+.3f} to {high:+.3f})."]
