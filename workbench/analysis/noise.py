"""Head scores behind profiles of which a share is a stranger's: does it matter whose they are?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from workbench import stats
from workbench.analysis.agreement import (
    check_comparable,
    ends,
    scored_pcs,
    spearman_pairs,
    top_members,
)
from workbench.analysis.recurrence import resampled_means
from workbench.data.examples import Example, single_user_tasks
from workbench.data.mixing import swapped_items, with_mixed_profile
from workbench.data.prompts import PromptSettings
from workbench.discovery.run import score_heads
from workbench.errors import InputError
from workbench.heads import chance_jaccard
from workbench.models import describe
from workbench.scores import By, HeadScores

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

SHARES = (0.25, 0.5, 1.0)
WHAT = "the effect of strangers' items"
SPLITS = 10
DRAWS = 500
ESTIMATES = ("clean", "pcs", "drop", "cost", "jaccard", "spearman")


@dataclass(frozen=True)
class _Mixed:
    """Scores of all examples at one share, PCS [example, layer, head] and loss [example]."""

    pcs: NDArray[np.float64]
    nll: NDArray[np.float64]


def profile_noise(
    model: TransformerBridge,
    examples: Sequence[Example],
    k: int,
    shares: Sequence[float] = SHARES,
    *,
    clean: HeadScores,
    by: By = "task",
    prompt: PromptSettings | None = None,
    folder: Path | str | None = None,
    batch_tokens: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> xr.Dataset:
    """Score all heads again with a share of each profile's items swapped for a stranger's.

    Targets stay the user's. A head set that stays the same behind strangers' profiles does not
    depend on whose profile it is; a score that falls with the share does. Each share costs as
    much as the clean scores did.

    The heads whose scores are followed are chosen on the clean scores of one half of the users and
    measured on the other, over 10 halvings: on the users that they were chosen on their clean
    score would be too high, and would fall under any change.

    Args:
        model: The one that `clean` is of.
        examples: The ones that `clean` is of. Those of tasks with a single user, who has no
            stranger, are left out.
        k: Size of the sets.
        shares: Shares of swapped items, above 0 and up to 1. One that swaps as many items of
            every profile of a task as a smaller one is not scored again there.
        clean: Scores behind the users' own profiles, of all heads.
        by: A set each `task`, `user`, or of `all`.
        prompt: As `clean` was made with; by default just that.
        folder: Keeps a run folder for each share, so that a stopped call goes on.
        batch_tokens: Most tokens in a forward pass.
        seed: Of the swaps, the halvings and the resamples.
        progress: Show bars on the terminal.

    Returns:
        For each group and share: `jaccard` of the top K with the clean top K and `spearman` of
        all heads' means with the clean ones; `pcs`, mean PCS of the clean top K, and `drop`, how
        far below `clean[group]` that is, in nats per target token; `cost`, what the swap adds to
        the plain model's loss. Each has `_low` and `_high`, 95 % intervals from resampled users
        (examples within a user), NaN with a single one: for the overlap and the correlation of
        both sides found again on the same resample, which adds noise of its own, so that the ends
        of an overlap lean downwards. `swapped`, the share of items in fact; `repeats`, the smaller
        share that swaps the same items in the group and so has the same numbers, NaN for none;
        and `examples` and `users`. Shares that only repeat are left out. Attributes: `chance`,
        the overlap of random sets; `left_out`, the tasks with a single user; `repeated`, each
        share that is another's repeat, in words.

    Raises:
        InputError: `clean` is of another model, other examples or prompts, or misses scores; a
            share is out of range; every task has a single user; or what `with_mixed_profile` and
            `score_heads` refuse.
    """
    shares = sorted(set(shares))
    if not shares or not 0 < shares[0] <= shares[-1] <= 1:
        raise InputError(f"shares of swapped items lie above 0 and up to 1, got {shares}")
    scored_pcs(clean, k, WHAT)
    _check_clean(model, examples, clean, prompt)
    settings = clean.manifest.get("settings", {})
    if prompt is None and "prompt" in settings:
        prompt = PromptSettings(**settings["prompt"])
    alone = single_user_tasks(examples)
    # Of nothing but lone users the strangers are missed by name.
    tasks = [task for task in clean.groups("task") if task not in alone] or alone
    examples = [example for example in examples if example.task in tasks]
    clean = clean.select(tasks=tasks)
    same = {
        task: _scored_as([examples[i] for i in rows], shares)
        for task, rows in clean.groups("task").items()
    }
    # Drawn before the first of them is scored, so that what can't be drawn costs nothing.
    drawn = {share: with_mixed_profile(examples, share, seed) for share in shares}
    mixed: dict[float, _Mixed] = {}
    for share, part in drawn.items():
        source = np.array([same[example.task][share] for example in examples])
        fresh = np.flatnonzero(source == share)
        if not len(fresh):
            continue
        scores = score_heads(
            model,
            [part[i] for i in fresh],
            settings.get("ablation", "zero"),
            method=settings.get("method", "exact"),
            prompt=prompt,
            folder=None if folder is None else Path(folder) / f"mixed-{share:g}-seed-{seed}",
            batch_tokens=batch_tokens,
            progress=progress,
        )
        mixed[share] = _joined(scores, fresh, source, mixed, k)
    return _table(clean, examples, mixed, k, by, seed).assign_attrs(
        left_out=alone,
        repeated=[
            f"{task}: {share:g} swaps the same items as {first:g}"
            for task, firsts in same.items()
            for share, first in firsts.items()
            if share != first
        ],
    )


def _scored_as(examples: Sequence[Example], shares: Sequence[float]) -> dict[float, float]:
    """For each share, from the smallest up, the first that swaps as many items of every profile.

    The items are then the same too: a larger share swaps what a smaller one does.
    """
    seen: dict[tuple[int, ...], float] = {}
    numbers = {share: tuple(swapped_items(e, share) for e in examples) for share in shares}
    return {share: seen.setdefault(swaps, share) for share, swaps in numbers.items()}


def _joined(
    scores: HeadScores,
    fresh: NDArray[np.intp],
    source: NDArray[np.float64],
    before: Mapping[float, _Mixed],
    k: int,
) -> _Mixed:
    """All examples' scores at a share: the fresh ones, and the others' from their share."""
    found = scored_pcs(scores, k, WHAT)
    pcs, nll = np.empty((len(source), *found.shape[1:])), np.empty(len(source))
    pcs[fresh], nll[fresh] = found, scores.data["nll"].values
    for share, known in before.items():
        rows = source == share
        pcs[rows], nll[rows] = known.pcs[rows], known.nll[rows]
    return _Mixed(pcs, nll)


def _check_clean(
    model: TransformerBridge,
    examples: Sequence[Example],
    clean: HeadScores,
    prompt: PromptSettings | None,
) -> None:
    check_comparable(clean.manifest, {"settings": describe(model)}, ("the clean run", "the model"))
    names = clean.data["example"].values.tolist()
    if names != [example.name for example in examples]:
        raise InputError(
            f"the clean run has {len(names)} examples, not the {len(examples)} given, or in "
            "another order; give the examples that it was made of"
        )
    made = clean.manifest.get("settings", {}).get("prompt")
    if prompt is not None and made is not None and asdict(prompt) != made:
        raise InputError(
            "the clean run was made with other prompt settings; leave `prompt` out to take its own"
        )


def _table(
    clean: HeadScores,
    examples: list[Example],
    mixed: Mapping[float, _Mixed],
    k: int,
    by: By,
    seed: int,
) -> xr.Dataset:
    groups = clean.groups(by)
    users = clean.data["user"].values
    pcs, nll = (clean.data[name].values.astype(np.float64) for name in ("pcs", "nll"))
    columns: dict[str, list[list[float]]] = {}
    for rows in groups.values():
        units = rows if by == "user" else users[rows]
        chosen = _held_out(pcs[rows], units, k, seed)
        asked = [examples[i] for i in rows]
        found: dict[float, dict[str, float]] = {}
        for share, first in _scored_as(asked, list(mixed)).items():
            if share != first:
                found[share] = found[first] | {"repeats": first}
                continue
            cost = mixed[share].nll[rows] - nll[rows]
            row = _cell(pcs[rows], mixed[share].pcs[rows], chosen, cost, units, k, seed)
            found[share] = row | {"swapped": _swapped(asked, share), "repeats": np.nan}
        for name in next(iter(found.values())):
            columns.setdefault(name, []).append([row[name] for row in found.values()])
    heads = int((~np.isnan(pcs).all(axis=0)).sum())
    values = {name: (("group", "share"), np.array(each)) for name, each in columns.items()}
    # The same for every share.
    same = {name: ("group", values.pop(name)[1][:, 0]) for name in _ends_of("clean")}
    return xr.Dataset(
        {
            **values,
            **same,
            "examples": ("group", [len(rows) for rows in groups.values()]),
            "users": ("group", [len(set(users[rows])) for rows in groups.values()]),
        },
        coords={"group": list(groups), "share": list(mixed)},
        attrs={
            "k": k,
            "by": by,
            "seed": seed,
            "heads": heads,
            "chance": chance_jaccard(k, heads),
            "units": "nats/token",
            "level": 0.95,
        },
    )


def _ends_of(name: str) -> tuple[str, str, str]:
    return name, f"{name}_low", f"{name}_high"


def _swapped(examples: list[Example], share: float) -> float:
    """Share of all items that are in fact a stranger's; 0 of none."""
    items = sum(len(example.profile) for example in examples)
    return sum(swapped_items(example, share) for example in examples) / max(items, 1)


def _held_out(pcs: NDArray[np.float64], units: NDArray, k: int, seed: int) -> NDArray[np.float64]:
    """How often each example sees each head as one of the top K of the other half of the users.

    Returns:
        [example, head], fractions of the halvings that sum to K; NaN for a single user.
    """
    names = np.unique(units)
    weights = np.zeros((len(pcs), pcs[0].size))
    if len(names) < 2:
        return np.full_like(weights, np.nan)
    rng = np.random.default_rng(seed)
    for _ in range(SPLITS):
        first = np.isin(units, rng.permutation(names)[: len(names) // 2])
        for inside in (first, ~first):
            weights[inside] += top_members(pcs[~inside].mean(axis=0)[None], k)[0]
    return weights / SPLITS


def _cell(
    clean: NDArray[np.float64],
    mixed: NDArray[np.float64],
    chosen: NDArray[np.float64],
    cost: NDArray[np.float64],
    units: NDArray,
    k: int,
    seed: int,
) -> dict[str, float]:
    """One group at one share, with intervals."""
    followed = [
        (np.nan_to_num(side.reshape(len(side), -1)) * chosen).sum(axis=1) / k
        for side in (clean, mixed)
    ]
    data = {"clean": followed[0], "pcs": followed[1], "drop": followed[0] - followed[1]}
    row: dict[str, float] = {}
    for name, values in (data | {"cost": cost}).items():
        found = stats.estimate(values, units, seed=seed)
        row |= zip(_ends_of(name), (found.mean, found.low, found.high), strict=True)
    point = _agreement(clean.mean(axis=0)[None], mixed.mean(axis=0)[None], k)
    # The same seed draws the same users for both.
    drawn = [resampled_means(side, units, DRAWS, seed) for side in (clean, mixed)]
    for name, value in point.items():
        row |= zip(_ends_of(name), (float(value[0]), np.nan, np.nan), strict=True)
    if drawn[0] is not None and drawn[1] is not None:
        for name, values in _agreement(drawn[0], drawn[1], k).items():
            low, high = ends(values)
            row |= {f"{name}_low": float(low), f"{name}_high": float(high)}
    return row


def _agreement(
    means: NDArray[np.float64], others: NDArray[np.float64], k: int
) -> dict[str, NDArray[np.float64]]:
    """Overlap and rank correlation of each ranking with its counterpart, [ranking]."""
    shared = (top_members(means, k) * top_members(others, k)).sum(axis=1, dtype=np.float64)
    return {"jaccard": shared / (2 * k - shared), "spearman": spearman_pairs(means, others)}


def lines(table: xr.Dataset) -> list[str]:
    """What strangers' items do to the scores, a line a group and share that is no repeat."""
    cells = [
        table.sel(group=name, share=share)
        for name in table["group"].values
        for share in table["share"].values
    ]
    said = [_line(cell, table.attrs) for cell in cells if np.isnan(cell["repeats"])]
    return said + [
        f"{task}: left out; it has a single user, and a stranger is another."
        for task in table.attrs["left_out"]
    ]


def _line(row: xr.Dataset, attrs: dict[str, Any]) -> str:
    drop, low, high = (float(row[name]) for name in _ends_of("drop"))
    overlap = (float(row[name]) for name in _ends_of("jaccard"))
    first = (
        f"{row['group'].item()}: with {float(row['swapped']):.0%} of the profiles' items swapped "
        f"for a stranger's, the top {attrs['k']} overlaps with the clean one by {_span(*overlap)} "
        f"(random sets: {attrs['chance']:.2f})"
    )
    if np.isnan(drop):
        return f"{first}; what their scores lose can't be told from a single user."
    state = "no change shown in the score of the clean heads"
    if low > 0 or high < 0:
        state = f"the clean heads' score {'falls' if low > 0 else 'rises'}"
    return (
        f"{first}; {state}: {drop:+.4f} of {float(row['clean']):.4f} nats per token lost (95 % "
        f"interval {low:+.4f} to {high:+.4f})."
    )


def _span(mean: float, low: float, high: float) -> str:
    return f"{mean:.2f}" if np.isnan(low) else f"{mean:.2f} (95 % {low:.2f} to {high:.2f})"
