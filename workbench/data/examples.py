"""The `Example`: one user's history, a query, and what the user answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace


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
    """

    id: str
    user: str
    task: str
    query: str
    target: str
    profile: tuple[Mapping[str, str], ...]
    style: Mapping[str, str] = field(default_factory=dict, compare=False)
    inferred: bool = field(default=False, compare=False)

    @property
    def name(self) -> str:
        """Task and id: unique over all tasks."""
        return f"{self.task}/{self.id}"


def without_profile(examples: Sequence[Example]) -> list[Example]:
    """The same queries and targets with an empty history."""
    return [replace(example, profile=()) for example in examples]


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
