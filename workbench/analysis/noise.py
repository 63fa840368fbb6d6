"""Head scores behind profiles of which a share is a stranger's: does it matter whose they are?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
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
from workbench.data.examples import Example
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
SPLITS = 10
DRAWS = 500
ESTIMATES = ("clean", "pcs", "drop", "cost", "jaccard", "spearman")


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
        examples: The ones that `clean` is of.
        k: Size of the sets.
        shares: Shares of swapped items, above 0 and up to 1.
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
        of an overlap lean downwards. `swapped`, the share of items in fact, and
        `examples` and `users`. The attribute `chance` is the overlap of random sets.

    Raises:
        InputError: `clean` is of another model, other examples or prompts, or misses scores; a
            share is out of range; or what `with_mixed_profile` and `score_heads` refuse.
    """
    shares = sorted(set(shares))
    if not shares or not 0 < shares[0] <= shares[-1] <= 1:
        raise InputError(f"shares of swapped items lie above 0 and up to 1, got {shares}")
    pcs = scored_pcs(clean, k, "the effect of strangers' items")
    _check_clean(model, examples, clean, prompt)
    settings = clean.manifest.get("settings", {})
    if prompt is None and "prompt" in settings:
        prompt = PromptSettings(**settings["prompt"])
    # Drawn before the first of them is scored, so that what can't be drawn costs nothing.
    parts = [with_mixed_profile(examples, share, seed) for share in shares]
    mixed = [
        score_heads(
            model,
            part,
            settings.get("ablation", "zero"),
            method=settings.get("method", "exact"),
            prompt=prompt,
            folder=None if folder is None else Path(folder) / f"mixed-{share:g}-seed-{seed}",
            batch_tokens=batch_tokens,
            progress=progress,
        )
        for share, part in zip(shares, parts, strict=True)
    ]
    return _table(clean, pcs, list(examples), dict(zip(shares, mixed, strict=True)), k, by, seed)


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
    pcs: NDArray[np.float64],
    examples: list[Example],
    mixed: dict[float, HeadScores],
    k: int,
    by: By,
    seed: int,
) -> xr.Dataset:
    groups = clean.groups(by)
    users = clean.data["user"].values
    nll = clean.data["nll"].values.astype(np.float64)
    columns: dict[str, list[list[float]]] = {}
    for rows in groups.values():
        units = rows if by == "user" else users[rows]
        chosen = _held_out(pcs[rows], units, k, seed)
        found = []
        for share, scores in mixed.items():
            other = scored_pcs(scores, k, "the effect of strangers' items")[rows]
            cost = scores.data["nll"].values[rows] - nll[rows]
            row = _cell(pcs[rows], other, chosen, cost, units, k, seed)
            found.append(row | {"swapped": _swapped([examples[i] for i in rows], share)})
        for name in found[0]:
            columns.setdefault(name, []).append([row[name] for row in found])
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
    """What strangers' items do to the scores, a group and share a line."""
    return [
        _line(table.sel(group=name, share=share), table.attrs)
        for name in table["group"].values
        for share in table["share"].values
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
