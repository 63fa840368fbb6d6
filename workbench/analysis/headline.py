"""The verdict of an examination: four questions, task by task, in words with numbers.

How many heads are about the user; how sure is that; what does removing them do to other text;
does steering with them help. What an examination left out is left out here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import xarray as xr

from workbench.analysis.controls import RANDOM
from workbench.analysis.tested import shown, unnamed

STRANGER = "stranger"
LEVEL = 0.95
# A head that is about the user matters more behind the own profile than behind both.
AGAINST = (STRANGER, "none")
BEHIND = {STRANGER: "a stranger's", "none": "no profile"}


def headline(tables: Mapping[str, xr.Dataset], k: int) -> list[str]:
    """The first lines of a report.

    Args:
        tables: What the steps of an examination made, by name.
        k: Size of the sets.

    Returns:
        A line about all tasks together, then one a task. An effect is named only where its interval
        leaves 0 out; each task is judged by itself.
    """
    found = tables.get("specificity")
    if found is None or STRANGER not in found["counterfactual"].values:
        return ["No verdict: the users' profiles were not held against a stranger's."]
    kinds = [kind for kind in AGAINST if kind in found["counterfactual"].values]
    found = found.sel(counterfactual=kinds)
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
    """Heads that matter more behind the own profile than behind every other; less; all heads."""
    firm, gain = found["is_specific"].values.astype(bool), found["specific"].values
    judged = ~np.isnan(gain).any(axis=0)
    more, less = (firm & (gain > 0)).all(axis=0), (firm & (gain < 0)).all(axis=0)
    return int(more.sum()), int(less.sum()), int(judged.sum())


def _behind(found: xr.Dataset) -> str:
    return " and than behind ".join(
        BEHIND[kind] for kind in found["counterfactual"].values.tolist()
    )


def _all(found: xr.Dataset) -> str:
    more, less, heads = _signs(found)
    tasks = found.sizes["group"]
    where = "" if tasks == 1 else f" in {tasks} tasks"
    tested = "95 %, all heads of a task tested together"
    if not more:
        return (
            f"No head is shown to be about the user: of {heads} scores of heads{where} none is "
            f"higher behind the user's own profile than behind {_behind(found)} ({tested})."
        )
    text = (
        f"{more} of {heads} scores of heads{where} are about the user: higher behind the own "
        f"profile than behind {_behind(found)} ({tested})"
    )
    return f"{text}; {less} {'is' if less == 1 else 'are'} lower." if less else f"{text}."


def _specific(row: xr.Dataset, k: int) -> str:
    more, less, heads = _signs(row)
    if not heads:
        return "Whether any head is about the user can't be told from one user."
    text = f"{more} of {heads} heads are specific to the user"
    text += f" ({less} the other way)." if less else "."
    row = row.sel(counterfactual=STRANGER)
    share, low, high = (float(row[f"specific_fraction{end}"]) for end in ("", "_low", "_high"))
    if math.isnan(low):
        return text
    span = f"{share:.0%} ({low:.0%} to {high:.0%}) of the top {k} heads' PCS"
    if low > 0:
        return f"{text} What goes with the own profile, and not with a stranger's, is {span}."
    return f"{text} That the PCS of the top heads goes with the own profile is not shown: {span}."


def _sure(row: xr.Dataset, k: int) -> str:
    if math.isnan(float(row["firm"])):
        return "How firm the top heads are can't be told from one user."
    return f"{int(row['firm'])} of the top {k} are in 95 % of resamples of the users."


def _elsewhere(found: xr.Dataset) -> str:
    """What removing the top heads costs, beside random heads; the two texts are not compared."""
    row = found.sel(cls="preference")
    users, nobody = (_loss(row, name) for name in ("user_loss", "neutral_loss"))
    if not users or not nobody:
        return ""
    if RANDOM in found["cls"].values:
        random = found.sel(cls=RANDOM)
        users += _beside_random(row, random, "user_loss")
        nobody += _beside_random(row, random, "neutral_loss")
        end = (
            f"Random is the mean over {found.attrs['draws']} sets, whose own spread the intervals "
            "leave out; whether the two texts lose unlike amounts is not tested."
        )
    else:
        end = "Random heads were not removed: the same may be true of any heads."
    return (
        f"Without the top heads the loss on other users' text {users}. On text of nobody it "
        f"{nobody}. {end}"
    )


def _loss(row: xr.Dataset, name: str) -> str:
    if math.isnan(float(row[f"{name}_low"])):
        return ""
    rises, falls = shown(row, name, 1 - LEVEL)
    effect = "rises" if rises else "falls" if falls else "is not shown to change"
    return f"{effect} ({_ends(row, name, ' nats per token')})"


def _beside_random(row: xr.Dataset, random: xr.Dataset, name: str) -> str:
    """The same of random heads, and whether the top heads do more: by the paired difference."""
    text = f"; without random heads of the same layers it changes by {_value(random, name)}"
    less = f"{name}_less_random"
    if less not in row or math.isnan(float(row[f"{less}_low"])):
        return f"{text}, the difference not tested"
    more, fewer = shown(row, less, 1 - LEVEL)
    effect = "cost more" if more else "cost less" if fewer else "are not shown to cost more or less"
    return f"{text}: the top heads {effect} (difference {_ends(row, less)})"


def _value(row: xr.Dataset, name: str) -> str:
    mean, low, high = (float(row[f"{name}{end}"]) for end in ("", "_low", "_high"))
    return f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"


def _ends(row: xr.Dataset, name: str, unit: str = "") -> str:
    mean, low, high = (float(row[f"{name}{end}"]) for end in ("", "_low", "_high"))
    p = unnamed(row, name, 1 - LEVEL)
    return f"{mean:+.3f}{unit}, {low:+.3f} to {high:+.3f}" + f", {p}" * bool(p)


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
