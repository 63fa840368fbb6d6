"""The verdict of an examination: four questions, task by task, in words with numbers.

How many heads are about the user; how sure is that; what does removing them do to other text;
does steering with them help. What an examination left out is left out here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import xarray as xr

STRANGER = "stranger"


def headline(tables: Mapping[str, xr.Dataset], k: int) -> list[str]:
    """The first lines of a report.

    Args:
        tables: What the steps of an examination made, by name.
        k: Size of the sets.

    Returns:
        A line about all tasks together, then one a task. An effect is named only where its interval
        leaves 0 out.
    """
    found = tables.get("specificity")
    if found is None or STRANGER not in found["counterfactual"].values:
        return ["No verdict: the users' profiles were not held against a stranger's."]
    found = found.sel(counterfactual=STRANGER)
    lines = [_all(found)]
    for task in found["group"].values.tolist():
        parts = [_specific(found.sel(group=task), k)]
        if "recurrence" in tables:
            parts.append(_sure(tables["recurrence"].sel(group=task), k))
        if "classes" in tables and task in tables["classes"]["task"].values:
            parts.append(_elsewhere(tables["classes"].sel(task=task)))
        if "sweep" in tables and task in tables["sweep"]["task"].values:
            parts.append(_steering(tables["sweep"].sel(task=task, k=k)))
        lines.append(f"{task}: " + " ".join(filter(None, parts)))
    return lines


def _signs(found: xr.Dataset) -> tuple[int, int, int]:
    """Heads that help this user more than another, that help less, and all heads; over groups."""
    firm, gain = found["is_specific"].values.astype(bool), found["specific"].values
    signs = (firm & (gain > 0)).sum(), (firm & (gain < 0)).sum()
    return int(signs[0]), int(signs[1]), int((~np.isnan(gain)).sum())


def _all(found: xr.Dataset) -> str:
    more, less, heads = _signs(found)
    tasks = found.sizes["group"]
    where = "" if tasks == 1 else f" in {tasks} tasks"
    if not more:
        return (
            f"No head is shown to be about the user: of {heads} scores of heads{where} none falls "
            "behind a stranger's profile (95 %, corrected for all heads of a task)."
        )
    text = (
        f"{more} of {heads} scores of heads{where} are about the user: they fall behind a "
        "stranger's profile (95 %, corrected for all heads of a task)"
    )
    if not less:
        return f"{text}."
    return f"{text}; {less} {'rises' if less == 1 else 'rise'}."


def _specific(row: xr.Dataset, k: int) -> str:
    more, less, heads = _signs(row)
    text = f"{more} of {heads} heads are specific to the user"
    text += f" ({less} the other way)." if less else "."
    share, low, high = (float(row[f"specific_fraction{end}"]) for end in ("", "_low", "_high"))
    if not math.isnan(low):
        text += (
            f" What goes with the user's own profile, and not with a stranger's, is {share:.0%} "
            f"({low:.0%} to {high:.0%}) of the top {k} heads' PCS."
        )
    return text


def _sure(row: xr.Dataset, k: int) -> str:
    if math.isnan(float(row["firm"])):
        return "How firm the top heads are can't be told from one user."
    return f"{int(row['firm'])} of the top {k} are in 95 % of resamples of the users."


def _elsewhere(row: xr.Dataset) -> str:
    row = row.sel(cls="preference")
    mean, low, high = (float(row[f"neutral_loss{end}"]) for end in ("", "_low", "_high"))
    own = float(row["user_loss"])
    if math.isnan(low):
        return ""
    effect = "costs" if low > 0 else "helps" if high < 0 else "is not shown to touch"
    return (
        f"Without the top heads the loss on other users' text rises by {own:+.3f} nats per token, "
        f"and it {effect} text that has no user ({mean:+.3f}, {low:+.3f} to {high:+.3f})."
    )


def _steering(row: xr.Dataset) -> str:
    sign = 1 if row["better"].item() == "higher" else -1
    mean, low, high = (float(row[f"gain{end}"]) for end in ("", "_low", "_high"))
    if math.isnan(low):
        return "Whether steering helps can't be told from one user."
    draws = row.sizes["draw"]
    beaten = int(row["beaten"])
    if min(low * sign, high * sign) > 0:
        effect = "helps"
        if beaten < draws:
            effect += f", though {draws - beaten} of {draws} random sets do as well"
    elif max(low * sign, high * sign) < 0:
        effect = "hurts"
    else:
        effect = "is not shown to help"
    return f"Steering {effect} ({row['metric'].item()} {mean:+.3f}, {low:+.3f} to {high:+.3f})."
