"""Two runs of one model on the same examples: are they, and the one in the order of the other."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from workbench.errors import InputError
from workbench.scores import HeadScores

_SAME_MODEL = ("weights", "tensors", "heads_per_layer", "dtype", "ablation", "method")


def check_model(scores: HeadScores, other: HeadScores, what: str) -> None:
    """Refuse scores of different models, or scored in different ways.

    Raises:
        InputError: The message names what differs; `what` is said of the other run.
    """
    mine, theirs = (run.manifest.get("settings", {}) for run in (scores, other))
    for key in _SAME_MODEL:
        if mine.get(key) != theirs.get(key):
            raise InputError(
                f"the {what} run is of another model or was scored otherwise: its {key} is "
                f"{str(theirs.get(key))[:40]}, not {str(mine.get(key))[:40]}; score both alike"
            )
    if scores.data["pcs"].shape[1:] != other.data["pcs"].shape[1:]:
        raise InputError(
            f"the {what} run is of a model with {other.heads_per_layer} heads, not "
            f"{scores.heads_per_layer}; score both with one model"
        )


def need_scores(scores: HeadScores, what: str) -> None:
    """Refuse scores that leave heads out.

    Raises:
        InputError: They were screened, or are all NaN; `what` says of what they are.
    """
    scores.need_all_heads(f"a control on {what}")
    if np.isnan(scores.data["pcs"].values).all():
        raise InputError(f"the scores of {what} are all NaN; there is nothing to compare")


def aligned(own: HeadScores, other: HeadScores, kind: str) -> NDArray[np.float64]:
    """PCS of the other run in the order of the own one's examples.

    Args:
        own: The run whose order counts.
        other: The same examples behind other profiles; tasks of one user may be missing.
        kind: What the other run is called.

    Returns:
        [example, layer, head], NaN for the examples that the other run leaves out.

    Raises:
        InputError: The runs are of different models, prompts or examples, or hold no scores.
    """
    check_model(own, other, kind)
    need_scores(other, f"counterfactual {kind}")
    prompts = [run.manifest.get("settings", {}).get("prompt") for run in (own, other)]
    if prompts[0] != prompts[1]:
        raise InputError(f"the {kind} run was scored with other prompt settings; score both alike")
    whole, own = own, _shared(own, other)
    mine, theirs = (run.data["example"].values.tolist() for run in (own, other))
    if sorted(mine) != sorted(theirs):
        differing = sorted(set(mine) ^ set(theirs)) or ["an example given twice"]
        raise InputError(
            f"the {kind} run is of other examples ({differing[0]} is in one only); score the same "
            "ones behind both profiles"
        )
    places = {name: i for i, name in enumerate(theirs)}
    data = other.data.isel(example=[places[name] for name in mine])
    for key, word in (("user", "users"), ("task", "tasks"), ("target_tokens", "targets")):
        if not np.array_equal(own.data[key].values, data[key].values):
            raise InputError(f"the {kind} run has other {word}; score the same examples again")
    pcs = np.full(whole.data["pcs"].shape, np.nan)
    pcs[np.isin(whole.data["example"].values, mine)] = data["pcs"].values
    return pcs


def _shared(own: HeadScores, other: HeadScores) -> HeadScores:
    """The own scores without the tasks of one user that the other run leaves out."""
    tasks, users = (own.data[name].values for name in ("task", "user"))
    there = set(other.data["task"].values.tolist())
    kept = [
        task
        for task in own.groups("task")
        if task in there or len(set(users[tasks == task].tolist())) > 1
    ]
    return own.select(tasks=kept)
