"""The `Example`: one user's history, a query, and what the user answered; and the same behind
another history than the user's own.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from workbench.data.tasks import get_task
from workbench.errors import InputError

COUNTERFACTUALS = ("none", "stranger", "shuffled")


@dataclass(frozen=True)
class Example:
    """One task input of one user.

    Attributes:
        id: Unique within task and split.
        user: Whose it is. Where the data doesn't say, as in LaMP's official files, rows whose
            profiles agree are one user's: `workbench.data.authors`.
        task: A key of `workbench.data.tasks.TASKS`.
        query: The task input, as it stands in the data.
        target: What the user answered, the gold output.
        profile: The user's history items, each a mapping of the task's fields.
        style: Style the user keeps to, where the corpus knows it (the testbed's headlines).
        inferred: Whether the data names no user, so that `user` was inferred from profiles.
        turns: Earlier queries of the same conversation with their answers, the oldest first;
            they stand between profile and query.
    """

    id: str
    user: str
    task: str
    query: str
    target: str
    profile: tuple[Mapping[str, str], ...]
    style: Mapping[str, str] = field(default_factory=dict, compare=False)
    inferred: bool = field(default=False, compare=False)
    turns: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """Task and id: unique over all tasks."""
        return f"{self.task}/{self.id}"


def without_profile(examples: Sequence[Example]) -> list[Example]:
    """The same queries and targets with an empty history."""
    return [replace(example, profile=()) for example in examples]


def single_user_tasks(examples: Sequence[Example]) -> list[str]:
    """Tasks in which nobody is a stranger: all their examples are of one user."""
    users: dict[str, set[str]] = {}
    for example in examples:
        users.setdefault(example.task, set()).add(example.user)
    return [task for task, names in users.items() if len(names) < 2]


def with_strangers_profile(examples: Sequence[Example]) -> list[Example]:
    """The same queries and targets behind another user's history.

    The history is the next user's of the same task, in order of appearance, so that the result
    is the same every time and every history is used equally often.

    Raises:
        ValueError: A task has one user only.
    """
    profiles: dict[str, dict[str, tuple[Mapping[str, str], ...]]] = {}
    for example in examples:
        profiles.setdefault(example.task, {}).setdefault(example.user, example.profile)
    strangers = {}
    for task, by_user in profiles.items():
        users = list(by_user)
        if len(users) < 2:
            raise ValueError(f"{task}: a stranger's profile needs two users, got one")
        strangers[task] = {u: by_user[v] for u, v in zip(users, users[1:] + users[:1], strict=True)}
    return [replace(e, profile=strangers[e.task][e.user]) for e in examples]


def with_shuffled_profile(examples: Sequence[Example], seed: int = 0) -> list[Example]:
    """The same queries and targets behind the user's own words without their order.

    Within a profile the words of each field are pooled over the items and dealt out again at
    random; every item keeps its number of words. What the user talks about stays; how it is put,
    and which answer went with which text, is gone: of ratings the scores move between items.

    Args:
        examples: What to change.
        seed: The deal follows from it and from the example's name alone.

    Returns:
        The examples. The prompt shows a profile's items in an order that depends on their words,
        so that retrieval may show others of them.
    """
    return [replace(e, profile=_shuffled(e, seed)) for e in examples]


def _shuffled(example: Example, seed: int) -> tuple[Mapping[str, str], ...]:
    rng = random.Random(f"{seed}/shuffled/{example.name}")
    items = [dict(item) for item in example.profile]
    for field_name in get_task(example.task).fields:
        words = [item[field_name].split() for item in items]
        pool = [word for part in words for word in part]
        rng.shuffle(pool)
        for item, part in zip(items, words, strict=True):
            item[field_name] = " ".join(pool[: len(part)])
            del pool[: len(part)]
    return tuple(items)


def counterfactual(examples: Sequence[Example], kind: str, seed: int = 0) -> list[Example]:
    """The same queries and targets behind a profile that isn't the user's own.

    Args:
        examples: What to change.
        kind: `none`, `stranger` or `shuffled`.
        seed: Of the shuffle.

    Raises:
        InputError: The kind is unknown, or a stranger's profile is asked for and a task has one
            user only.
    """
    if kind == "none":
        return without_profile(examples)
    if kind == "shuffled":
        return with_shuffled_profile(examples, seed)
    if kind != "stranger":
        raise InputError(f"unknown counterfactual {kind!r}; known are {', '.join(COUNTERFACTUALS)}")
    try:
        return with_strangers_profile(examples)
    except ValueError as error:
        raise InputError(f"{error}; load more users, or leave the stranger's profile out") from None
