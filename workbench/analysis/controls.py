"""Is it preference, or is it damage? PCS held against other profiles and against text of nobody.

PCS as the paper defines it is high for any head that fluent text needs. Two controls:

1. The same score behind another profile than the user's own. What a head loses of its PCS then
   is about the user: `specific = PCS(own profile) - PCS(other profile)`, example by example.
2. The same ablation on text that has no user. A head that hurts there as much does general work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from workbench import stats
from workbench.analysis.alignment import aligned, check_model, need_scores
from workbench.data.examples import (
    COUNTERFACTUALS,
    Example,
    counterfactual,
    single_user_tasks,
)
from workbench.data.prompts import PromptSettings
from workbench.discovery.cluster import RayOptions
from workbench.discovery.run import score_heads
from workbench.errors import InputError
from workbench.evaluation.text import share
from workbench.heads import HeadSet, rank, top_k
from workbench.hooks import Ablation
from workbench.scores import By, HeadScores

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Classes = Mapping[str, Mapping[str, Sequence[HeadSet]]]
"""Head sets by task and class; a class of several sets is a random one, a set a draw."""
RANDOM = "random"


def counterfactual_scores(
    model: TransformerBridge,
    examples: Sequence[Example],
    kinds: Sequence[str] = COUNTERFACTUALS,
    ablation: Ablation = "zero",
    *,
    prompt: PromptSettings | None = None,
    folder: Path | str | None = None,
    batch_tokens: int | None = None,
    ray: RayOptions | None = None,
    progress: bool = True,
    seed: int = 0,
) -> dict[str, HeadScores]:
    """Score all heads on the same queries and targets behind other profiles.

    Args:
        model: From `load_model`.
        examples: Those whose own-profile scores the result is held against.
        kinds: Which of `none`, `stranger` and `shuffled`. The scores behind a stranger's profile
            leave out the examples of tasks with one user only.
        ablation: As of the own-profile scores.
        prompt: Likewise.
        folder: Each kind becomes a run folder in it; the same call goes on where it stopped.
        batch_tokens: Most tokens in a forward pass; by default from the memory at hand.
        ray: Score on a Ray cluster.
        progress: Show a bar on the terminal.
        seed: Of the shuffle.

    Raises:
        InputError: A kind is unknown or given twice, every task has one user only and a
            stranger's profile is asked for, or what `score_heads` refuses.
    """
    if not kinds or len(set(kinds)) < len(kinds):
        raise InputError(f"wanted different counterfactuals, got {', '.join(kinds) or 'none'}")
    alone = single_user_tasks(examples)
    others = [example for example in examples if example.task not in alone]
    # Of nothing but lone users the stranger is refused, by name.
    given = {"stranger": others or examples}
    changed = {kind: counterfactual(given.get(kind, examples), kind, seed) for kind in kinds}
    return {
        kind: score_heads(
            model,
            part,
            ablation,
            prompt=prompt,
            folder=None if folder is None else Path(folder) / kind,
            batch_tokens=batch_tokens,
            ray=ray,
            progress=progress,
        )
        for kind, part in changed.items()
    }


def specificity(
    own: HeadScores,
    others: Mapping[str, HeadScores],
    by: By = "task",
    k: int = 8,
    *,
    level: float = 0.95,
    seed: int = 0,
) -> xr.Dataset:
    """How much of each head's PCS is about the user whose profile it is.

    Args:
        own: PCS behind the users' own profiles, of all heads.
        others: The same examples behind other profiles, by name: `counterfactual_scores`. Tasks
            with one user may be missing.
        by: What heads are judged in.
        k: How many of the highest heads `specific_fraction` is about.
        level: Coverage of the intervals.
        seed: Of the resampling.

    Returns:
        For each `counterfactual`, `group` and head, in nats per target token: `other`, the mean
        PCS behind that profile; `specific`, the mean of own - other, with `low`, `high` and `p`
        that hold for all heads of the group together; `is_specific`, whether the interval leaves
        0 out, on either side; `compared`, the number of examples behind it, those of `own` that
        were scored behind that profile: with none of them all else is NaN. For each group `own`,
        and its `top_heads`, the K highest of it. For each counterfactual and group
        `specific_fraction`, the sum of `specific` over the sum of `own` of these K heads, with its
        95 % interval: 1 if their PCS is all about the user, 0 if none of it is; NaN where it sums
        to nothing. The K heads were chosen by the same scores, of which they have the luckiest:
        their PCS is a little too high, and so is the fraction.

    Raises:
        InputError: There is no counterfactual; a run is of another model or of other examples,
            was screened, or holds no scores; or K is outside the model.
    """
    if not others:
        raise InputError(
            "nothing to hold the scores against; score a counterfactual profile first "
            "(counterfactual_scores)"
        )
    need_scores(own, "the own profiles")
    behind = {kind: aligned(own, scores, kind) for kind, scores in others.items()}
    pcs = own.data["pcs"].values.astype(np.float64)
    groups = own.groups(by)
    units = {name: _units(own, by, rows) for name, rows in groups.items()}
    tops = {name: top_k(pcs[rows].mean(axis=0), k) for name, rows in groups.items()}
    columns: dict[str, list[Any]] = {}
    for name, rows in groups.items():
        for other in behind.values():
            there = ~np.isnan(other[rows]).all(axis=(1, 2))
            sides = pcs[rows][there], other[rows][there]
            found = _against(*sides, units[name][there], tops[name], level, seed)
            for key, value in found.items():
                columns.setdefault(key, []).append(value)
    shape = (len(groups), len(behind))
    dims = ("group", "counterfactual", "layer", "head")
    sizes = {
        name: len(set(own.data["user"].values[rows].tolist())) for name, rows in groups.items()
    }
    table = xr.Dataset(
        {
            "own": (
                ("group", "layer", "head"),
                [pcs[rows].mean(axis=0) for rows in groups.values()],
            ),
            **{
                key: (
                    dims[: 2 + np.ndim(value[0])],
                    np.reshape(value, (*shape, *np.shape(value[0]))),
                )
                for key, value in columns.items()
            },
            "top_heads": ("group", [str(tops[name]) for name in groups]),
            "examples": ("group", [len(rows) for rows in groups.values()]),
            "users": ("group", list(sizes.values())),
        },
        coords={
            "group": list(groups),
            "counterfactual": list(behind),
            "layer": own.data["layer"].values,
            "head": own.data["head"].values,
        },
        attrs={"units": "nats/token", "by": by, "k": k, "level": level, "seed": seed},
    )
    return table.transpose("counterfactual", "group", "layer", "head")


def damage(
    own: HeadScores,
    neutral: HeadScores,
    classes: Classes | None = None,
    by: By = "task",
    *,
    level: float = 0.95,
    seed: int = 0,
) -> xr.Dataset:
    """What removing each head does to the users' text, and to text that has no user.

    Args:
        own: PCS behind the users' own profiles, of all heads.
        neutral: Scores of the same model on `neutral_examples`.
        classes: Head sets by task and class; the random ones name no head.
        by: Groups of the users' text. The neutral text is one and the same for all.
        level: Coverage of the intervals, each by itself.
        seed: Of the resampling.

    Returns:
        For each `group` and head, in nats per target token, `user` and `neutral` with `_low` and
        `_high`; `cls`, the first class that the head belongs to, and `all_cls`, every one, joined
        by commas; empty where there is none. For each group `correlation`, Spearman's between
        the two, with its interval: near 1, PCS ranks heads as general damage does.

        The means are plain ones of all examples. Where the classes were found by these same
        scores, their heads are the luckiest of them and stand too far out, upwards those of PCS,
        to the right those of the neutral text; what a class costs by itself is for
        `workbench.analysis.classes.class_effects`, on other examples.

    Raises:
        InputError: The runs are of different models, were screened, or hold no scores.
    """
    need_scores(own, "the users' text")
    need_scores(neutral, "the neutral text")
    check_model(own, neutral, "neutral")
    user, there = own.mean(by, level, seed), neutral.mean("all", level, seed).isel(group=0)
    values = neutral.data["pcs"].values.astype(np.float64)
    shape = values.shape[1:]
    columns: dict[str, list[Any]] = {}
    for name, rows in own.groups(by).items():
        found = stats.rank_correlation(
            own.data["pcs"].values[rows].reshape(len(rows), -1),
            _units(own, by, rows),
            values.reshape(len(values), -1),
            neutral.data["user"].values,
            level,
            seed,
        )
        sets = (classes or {}).get(name, {})
        row = {
            "correlation": found.mean,
            "correlation_low": found.low,
            "correlation_high": found.high,
            "cls": _names(sets, shape, first=True),
            "all_cls": _names(sets, shape, first=False),
            "examples": len(rows),
            "users": len(set(own.data["user"].values[rows].tolist())),
            "neutral_examples": len(values),
        }
        for key, value in row.items():
            columns.setdefault(key, []).append(value)
    dims = ("group", "layer", "head")
    table = xr.Dataset(
        {key: (dims[: 1 + np.ndim(value[0])], np.array(value)) for key, value in columns.items()},
        coords={name: user[name].values for name in dims},
        attrs={"units": "nats/token", "by": by, "level": level, "seed": seed},
    )
    for end, source in (("", "mean"), ("_low", "low"), ("_high", "high")):
        table[f"user{end}"] = (dims, user[source].values)
        table[f"neutral{end}"] = (dims, np.stack([there[source].values] * len(user["group"])))
    return table


def _units(scores: HeadScores, by: By, rows: NDArray[np.intp]) -> NDArray[Any]:
    """What is resampled: the user; within one user the example."""
    return rows if by == "user" else scores.data["user"].values[rows]


def _against(
    own: NDArray[np.float64],
    other: NDArray[np.float64],
    units: NDArray[Any],
    top: HeadSet,
    level: float,
    seed: int,
) -> dict[str, Any]:
    """The numbers of one group against one counterfactual."""
    if not len(own):
        return _nothing(own.shape[1:])
    mean, low, high, p = stats.simultaneous(own - other, units, level, seed)
    layers, heads = zip(*((head.layer, head.head) for head in top), strict=True)
    parts = np.stack([(own - other)[:, layers, heads].sum(1), own[:, layers, heads].sum(1)], axis=1)
    part = stats.bootstrap_statistic(parts, units, share, level, seed)
    return {
        "other": other.mean(axis=0),
        "specific": mean,
        "low": low,
        "high": high,
        "p": p,
        "is_specific": (low > 0) | (high < 0),
        "compared": len(own),
        "specific_fraction": part.mean,
        "specific_fraction_low": part.low,
        "specific_fraction_high": part.high,
    }


def _nothing(shape: tuple[int, ...]) -> dict[str, Any]:
    """The numbers of a group of which no example was scored."""
    heads = dict.fromkeys(("other", "specific", "low", "high", "p"), np.full(shape, np.nan))
    ends = dict.fromkeys([f"specific_fraction{end}" for end in ("", "_low", "_high")], np.nan)
    return {**heads, "is_specific": np.zeros(shape, dtype=bool), "compared": 0, **ends}


def _names(
    sets: Mapping[str, Sequence[HeadSet]], shape: tuple[int, ...], first: bool
) -> NDArray[np.object_]:
    """The class of every head [layer, head], or all of them."""
    names = np.full(shape, "", dtype=object)
    for name, members in sets.items():
        if name == RANDOM:
            continue
        for head in dict.fromkeys(head for group in members for head in group):
            before = names[head.layer, head.head]
            if not (before and first):
                names[head.layer, head.head] = f"{before}, {name}" if before else name
    return names


# In words


def within(low: float, high: float, spec: str = "+.3f") -> str:
    """The interval of a number, in brackets behind it."""
    if np.isnan(low) or np.isnan(high):
        return "(no interval: a single user)"
    return f"(95 % interval {low:{spec}} to {high:{spec}})"


_BEHIND = {
    "none": "no profile",
    "stranger": "a stranger's profile",
    "shuffled": "the user's own words shuffled",
}


def lines(specific: xr.Dataset, damaged: xr.Dataset | None = None) -> list[str]:
    """Whether it is preference or damage: a line a group and counterfactual, and one on damage.

    Args:
        specific: From `specificity`.
        damaged: From `damage`, of the same groups.
    """
    said = []
    for group in specific["group"].values.tolist():
        part = specific.sel(group=group)
        for kind in part["counterfactual"].values.tolist():
            text = _specific_sentences(part.sel(counterfactual=kind), specific.attrs["k"])
            said.append(f"{group}, against {_BEHIND.get(kind, kind)}: {text}")
        if damaged is not None and group in damaged["group"].values:
            said.append(f"{group}: {_damage_sentence(damaged.sel(group=group))}")
    return said


def _specific_sentences(row: xr.Dataset, k: int) -> str:
    if not int(row["compared"]):
        return "not scored; the task has a single user, and a stranger is another."
    heads, best = int(row["own"].notnull().sum()), rank(row["own"].values)[:k]
    if np.isnan(row["p"].values).all():
        return "no head can be judged; there are too few users."
    above, below = row["low"].values > 0, int((row["high"].values < 0).sum())
    among = sum(bool(above[head.layer, head.head]) for head in best)
    found = (
        f"{int(above.sum())} of {heads} heads matter more behind the user's own profile, {among} "
        f"of the top {k} by PCS among them"
        if above.any()
        else f"no head of {heads} is shown to matter more behind the user's own profile"
    )
    found += f"; {below} matter less" * bool(below) + " (corrected for the number of heads"
    if int(row["compared"]) < int(row["examples"]):
        found += f", over the {int(row['compared'])} of {int(row['examples'])} examples scored"
    found += ")"
    value, low, high = (float(row[f"specific_fraction{end}"]) for end in ("", "_low", "_high"))
    if np.isnan(value):
        return f"{found}. The top {k} have no positive PCS to have a share of."
    span = f"{value:.0%} of the PCS of the top {k} {within(low, high, '.0%')}"
    if np.isnan(low) or low > 0:
        more = ", more than all of it: behind that profile these heads mislead" * (low > 1)
        return f"{found}. What goes with the profile is {span}{more}."
    return f"{found}. That PCS goes with the profile is not shown: {span}."


def _damage_sentence(part: xr.Dataset) -> str:
    value, low, high = (float(part[f"correlation{end}"]) for end in ("", "_low", "_high"))
    span = f"rank correlation {value:+.2f} {within(low, high, '+.2f')}"
    if np.isnan(value):
        text = "how PCS goes with damage to neutral text can't be told from so few heads."
    elif low > 0:
        text = f"heads with a high PCS are those that neutral text needs too: {span}."
    elif high < 0:
        text = f"heads with a high PCS are those that neutral text needs least: {span}."
    else:
        text = f"PCS is not shown to go with the damage to neutral text: {span}."
    names = [entry.split(", ") for entry in part["all_cls"].values.ravel().tolist()]
    chosen = [entry for entry in names if "preference" in entry]
    if any("capability" in entry for entry in names):
        both = sum("capability" in entry for entry in chosen)
        text += (
            f" {both} of the {len(chosen)} preference heads are capability heads as well; both "
            "classes were chosen by these scores, and their heads stand too far out by luck."
        )
    return text
