"""Findings in words, from tables. An effect is named only where its interval leaves 0 out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
from scipy.stats import t


def _span(low: float, high: float, digits: int) -> str:
    if math.isnan(low) or math.isnan(high):
        return "no interval: a single user"
    return f"95 % interval {low:+.{digits}f} to {high:+.{digits}f}"


def profile_lines(table: xr.Dataset) -> list[str]:
    """Whether the own profile helps the plain model, a task a line."""
    lines = []
    for task in table["task"].values:
        row = table.sel(task=task, profile="none")
        cost, low, high = (float(row[name]) for name in ("cost", "cost_low", "cost_high"))
        span = f"{cost:+.3f} nats per token without it ({_span(low, high, 3)})"
        if low > 0:
            lines.append(f"{task}: the user's own profile helps the plain model: {span}.")
        else:
            state = "hurts the plain model" if high < 0 else "is not shown to help"
            lines.append(
                f"{task}: the user's own profile {state}: {span}. Head scores here can't be read "
                "as preference."
            )
    return lines


def sparsity_lines(table: xr.Dataset) -> list[str]:
    """How concentrated the scores are, a group a line."""
    lines = []
    for name in table["group"].values:
        row = table.sel(group=name)
        top, nll = float(row["top"]), float(row["nll"])
        heads = int(row["heads"])
        lines.append(
            f"{name}: half of the positive score lies in {int(row['half'])} of {heads} heads; the "
            f"highest is {row['top_head'].item()} with {top:.3f} nats per token, "
            f"{top / nll:.0%} of the loss. {int(row['positive'])} intervals lie above 0 and "
            f"{int(row['negative'])} below, about {heads * _beyond(int(row['units'])):.1f} each "
            "expected of inert heads."
        )
    return lines


def _beyond(units: int) -> float:
    """How often the 95 % interval from so many users or examples puts an inert head above 0.

    The percentile interval is 1.96 standard errors to a side, and these with n in place of n - 1:
    of few it is too narrow, and what it leaves out follows Student's t.
    """
    if units < 2:
        return 0.0
    return float(t.sf(1.96 * np.sqrt((units - 1) / units), units - 1))


def noise_lines(means: xr.Dataset) -> list[str]:
    """How many heads' means are no larger than what rounding moves them by; a group a line."""
    lines = []
    for name in means["group"].values:
        row = means.sel(group=name)
        below = int(row["below_noise"].sum())
        if below:
            heads = int(row["mean"].notnull().sum())
            lines.append(
                f"{name}: {below} of {heads} heads are below the noise floor: sums in another "
                f"order move a mean over {int(row['examples'])} examples by "
                f"{float(row['noise_floor']):.2g} nats per token."
            )
    return lines


def engine_lines(manifest: Mapping[str, Any]) -> list[str]:
    """What computed the scores, how far it is from the reference, and how much rounding does."""
    engine, noise, lines = manifest.get("engine"), manifest.get("noise"), []
    if engine:
        lines = [f"passed over: {reason}." for reason in engine["passed_over"]]
        if engine["difference"] is None:
            first = "the reference itself, one whole pass a head."
        else:
            first = (
                f"{engine['name']}; at most {engine['difference']:.2g} nats per token from the "
                f"reference on {engine['compared']} exact scores "
                f"({engine['tolerance']:.2g} allowed)."
            )
        lines.insert(0, f"Engine: {first}")
    if noise and noise["p95"] is not None:
        lines.append(
            f"Noise: sums in another order move one example's score by up to {noise['p95']:.2g} "
            "(95 %), a mean over n examples by that over the root of n."
        )
    return lines


def screening_lines(table: xr.Dataset) -> list[str]:
    """What a screened run scored exactly, and how much it may have missed."""
    lines = []
    for name in table["group"].values:
        row = table.sel(group=name)
        lines.append(
            f"{name}: {int(row['scored'])} of {table.attrs['heads']} heads scored exactly, "
            f"{int(row['audited'])} of them drawn at random to audit the rest; "
            f"{int(row['hits'])} of those are in the top {table.attrs['k']}."
        )
    return [*lines, f"{bound_line(table.attrs)}."]


def bound_line(attrs: Mapping[str, Any]) -> str:
    """The bound on what a screened run missed, in words."""
    k, by = attrs["k"], attrs["by"]
    if attrs["unscored"] == 0:
        return "Every head was scored exactly, so none can have been missed"
    if attrs["upper"] >= k:
        # With no hit the bound is about 3 n / (a G²) for n others in all, a audited in each of G.
        others = attrs["unscored"] + attrs["audited"]
        enough = math.ceil(6 * others / (k * attrs["group_count"] ** 2))
        return (
            f"Too few audited heads to tell how many of the top {k} of a {by} were missed; "
            f"--audit {enough} would bound it by half of them if no audited head is among them"
        )
    return (
        f"At most {attrs['upper']:.1f} of the top {k} of a {by} missed on average (95 %): "
        f"{attrs['hits']} of {attrs['audited']} audited heads belong to them"
    )


def overlap_line(attrs: dict[str, Any]) -> str:
    """Whether users share heads, against chance and against their own noise."""
    k = "/".join(map(str, attrs["k"]))
    if math.isnan(attrs["mean"]):
        return "Overlap between users needs two users; there is one."
    line = (
        f"The users' top-{k} sets overlap by {attrs['mean']:.2f} (Jaccard); random heads in the "
        f"same layers by {attrs['layer_chance']:.2f}, random heads by {attrs['chance']:.2f}"
    )
    if math.isnan(attrs["gap"]):
        return line + ". With one example a user, how far noise alone parts them is unknown."
    state = (
        "differ beyond the noise of examples" if attrs["gap_low"] > 0 else "are not shown to differ"
    )
    return (
        f"{line}. Found from half of the examples each, one user's sets overlap by "
        f"{attrs['same']:.2f} and two users' by {attrs['others']:.2f}: the users' heads {state} "
        f"({attrs['gap']:+.3f}, {_span(attrs['gap_low'], attrs['gap_high'], 3)}). Both halves of a "
        "user stand behind the same profile; with another profile of that user they may differ."
    )


def sweep_lines(table: xr.Dataset, k: int) -> list[str]:
    """What DPS does at one K that was named beforehand, a task a line."""
    lines = []
    draws = int(table.attrs["draws"])
    for task in table["task"].values:
        row = table.sel(task=task, k=k)
        sign = 1 if row["better"].item() == "higher" else -1
        low, high = float(row["gain_low"]), float(row["gain_high"])
        line = (
            f"{task}: {row['metric'].item()} ({row['better'].item()} is better) is "
            f"{float(row['plain']):.3f} plain and {float(row['dps']):.3f} with DPS (K = {k}, gamma "
            f"= {table.attrs['gamma']:g}): {_effect(low, high, sign)} the plain model "
            f"({float(row['gain']):+.3f}, {_span(low, high, 3)}). Random heads in its place give "
            f"{float(row['random']):.3f}; DPS beats {int(row['beaten'])} of {draws} random sets"
        )
        chance = (1 + draws - int(row["beaten"])) / (1 + draws)
        line += f" (chance alone does as well with probability {chance:.2f})."
        if float(row["unreadable"]) > 0:
            line += (
                f" {float(row['unreadable']):.0%} of the plain answers are no label of the task "
                "and count as wrong: the metric says little here."
            )
        lines.append(line)
    return lines


def _effect(low: float, high: float, sign: int) -> str:
    if min(low * sign, high * sign) > 0:
        return "better than"
    return "worse than" if max(low * sign, high * sign) < 0 else "no effect shown against"
