"""One group's scores head by head, as the explorer shows them, and the head sets it offers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import xarray as xr

from workbench.analysis.alignment import aligned
from workbench.errors import InputError
from workbench.heads import HeadSet, check_k, random_matched, top_k
from workbench.scores import By, HeadScores

Preset = Literal["top", "random", "capability", "none"]


def specific_scores(own: HeadScores, other: HeadScores, kind: str = "stranger") -> HeadScores:
    """The part of each score that goes with the user's own profile, example by example.

    Args:
        own: PCS behind the users' own profiles.
        other: The same examples behind other profiles, from `counterfactual_scores`.
        kind: What that profile is called.

    Returns:
        `own - other` in nats per target token. Examples that weren't scored behind the other
        profile are left out. The noise is that of two runs.

    Raises:
        InputError: The runs are of different models, prompts or examples, or hold no scores.
    """
    difference = own.data["pcs"] - aligned(own, other, kind)
    there = ~np.isnan(difference.values).all(axis=(1, 2))
    kept = own.data[["nll", "target_tokens"]].assign(pcs=difference).isel(example=there)
    settings = {**own.manifest.get("settings", {}), "examples": int(there.sum())}
    noise = {"p95": math.hypot(own.noise_floor(1), other.noise_floor(1))}
    kept.attrs = {**own.data.attrs, "part": f"own - {kind}"}
    return HeadScores(kept, {**own.manifest, "settings": settings, "noise": noise})


def head_map(
    scores: HeadScores, by: By = "all", group: str | None = None, *, level: float = 0.95
) -> xr.Dataset:
    """Mean score of every head in one group, with its interval and the noise floor.

    Args:
        scores: PCS per example, or what `specific_scores` makes of it.
        by: What groups are: a `user`, a `task`, a `cluster`, or `all` in one.
        group: Which one by name; not needed for `all`.
        level: Coverage of the intervals, each by itself. Users are resampled; within one user
            it is the examples.

    Returns:
        `mean`, `low`, `high` and `below_noise`, each [layer, head], in nats per target token; the
        attribute `note` says of an estimate, of mean ablation and of an aspect that they are that;
        `exists`, whether the model has such a head; `examples`, `users` and `noise_floor`. Heads
        that weren't scored are NaN.

    Raises:
        InputError: There is no such group.
    """
    rows = scores.groups(by).get("all" if by == "all" else str(group))
    if rows is None:
        known = ", ".join(list(scores.groups(by))[:5])
        raise InputError(f"no {by} {group!r} in these scores; there are {known} and so on")
    # The part alone, so that a click costs one group's resampling and not everybody's.
    part = HeadScores(scores.data.isel(example=rows), scores.manifest)
    table = part.mean(by, level).isel(group=0)
    shape = np.asarray(scores.heads_per_layer)
    users = len(set(part.data["user"].values.tolist()))
    table["exists"] = (("layer", "head"), table["head"].values[None, :] < shape[:, None])
    table["users"] = users
    name = "all users" if by == "all" else str(group)
    part = scores.data.attrs.get("part", "PCS")
    table.attrs |= {"group": name, "part": part, "note": _note(scores)}
    return table


def _note(scores: HeadScores) -> str:
    """What sets these scores apart from PCS by removing a head, over the whole target."""
    settings = scores.manifest.get("settings", {})
    notes = ["estimated"] if settings.get("method") == "attribution" else []
    if settings.get("ablation", "zero") != "zero":
        notes.append(f"by {settings['ablation']} ablation")
    if aspect := (settings.get("prompt") or {}).get("aspect"):
        notes.append(f"over {aspect} tokens only")
    return ", ".join(notes)


def choose_heads(
    preset: Preset,
    table: xr.Dataset,
    k: int,
    *,
    capability: HeadScores | None = None,
    seed: int = 0,
) -> HeadSet:
    """One of the head sets that everything is held against.

    Args:
        preset: `top`, the K heads with the highest mean; `random`, in every layer as many heads as
            `top` has there, drawn from the seed; `capability`, the K heads that text without a
            user needs most; `none`.
        table: Of `head_map`.
        k: How many heads.
        capability: Scores on `neutral_examples`, for `capability`.
        seed: Of the random draw.

    Raises:
        InputError: The preset is unknown, K is out of range, the heads of the group weren't
            scored, or scores on neutral text are needed and not given.
    """
    if preset not in get_args(Preset):
        raise InputError(f"preset must be one of {', '.join(get_args(Preset))}, got {preset!r}")
    if preset == "none":
        return HeadSet(())
    if preset == "capability":
        if capability is None:
            raise InputError(
                "capability heads are told by text that has no user; score it first: "
                "score_heads(model, neutral_examples())"
            )
        return capability.top(k, "all")["all"]
    means = table["mean"].values
    scored = int((~np.isnan(means)).sum())
    if not scored:
        raise InputError(f"no head of {table.attrs['group']} has a score; score the examples first")
    check_k(k, scored)
    top = top_k(means, k)
    if preset == "top":
        return top
    shape: Sequence[int] = table["exists"].values.sum(axis=1).tolist()
    return random_matched(top, shape, np.random.default_rng(seed))
