"""Who is asked: validation users, test users, and neither of those that heads were found on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.data.examples import Example
from workbench.data.lamp import sample_users
from workbench.data.sources import load_examples
from workbench.errors import InputError
from workbench.models import describe
from workbench.scores import HeadScores

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

SPLITS = {"testbed": ("test", "validation"), "lamp": ("dev", "dev"), "longlamp": ("test", "val")}
SHARE, MOST = 5, 200  # of users divided by a draw, one in five validates, and no more than these


@dataclass(frozen=True)
class Asked:
    """The examples of an evaluation.

    Attributes:
        validation: What settings are chosen on.
        test: What the table is about.
        split: Name of the test users' split.
        validation_split: Name of the validation users' split.
        left_out: Users of the validation split, or of the split that both are drawn from, that
            heads were found on and who are therefore not asked.
        leaked: Names of test examples that heads were found on, or on whose users.
        same_examples: Whether such examples and users were asked for by name.
    """

    validation: Sequence[Example]
    test: Sequence[Example]
    split: str
    validation_split: str
    left_out: int
    leaked: frozenset[str]
    same_examples: bool = False

    def check(self, scores: HeadScores | None) -> None:
        """Refuse what would make the table say more than it knows.

        Raises:
            InputError: A group is empty, a task has no validation example, or an example or user
                is in two groups or has served for the heads; users, and examples that heads were
                found on, only if `same_examples` doesn't allow it.
        """
        _check_present(self.validation, self.test)
        found = Found(None if self.same_examples else scores)
        for example in (*self.test, *self.validation):
            if example in found:
                raise InputError(
                    f"{example.name} (user {example.user}): heads were found on this example or "
                    "on its user; name another split, or ask for it by name: --same-examples"
                )
        names = {example.name for example in self.validation}
        users = {e.user for e in self.validation if e.user != e.id and not self.same_examples}
        for example in self.test:
            if example.name in names or example.user in users:
                raise InputError(
                    f"{example.name} (user {example.user}) is in the validation and in the test "
                    "group; settings must be chosen on others"
                )


class Found:
    """What heads were found on; knows it again.

    A row that names no user is a user of its own, named by its id. Ids of two tasks may be equal
    by chance, so that such a user is known by the example alone.
    """

    def __init__(self, scores: HeadScores | None) -> None:
        self.names: set[str] = set()
        self.users: set[str] = set()
        if scores is None:
            return
        data = scores.data
        self.names = set(data["example"].values.tolist())
        rows = zip(
            *(data[name].values.tolist() for name in ("example", "task", "user")), strict=True
        )
        self.users = {user for name, task, user in rows if name != f"{task}/{user}"}

    def __contains__(self, example: Example) -> bool:
        named = example.user != example.id
        return example.name in self.names or (named and example.user in self.users)


def ask(
    source: str,
    scores: HeadScores | None,
    *,
    split: str | None = None,
    validation_split: str | None = None,
    root: Path | None = None,
    tasks: Sequence[str] | None = None,
    users: int | None = None,
    validation_users: int | None = None,
    same_examples: bool = False,
    seed: int = 0,
) -> Asked:
    """Load the examples of both groups.

    Where one split serves for both, those that heads were found on are taken out and the rest
    divided by a draw from the seed: one user in five, at most 200, for validation if
    `validation_users` doesn't say otherwise. Where there are two splits, only the validation
    users are reduced so; a test user that heads were found on is refused.

    Args:
        source: As `load_examples` takes it.
        scores: What heads were found on; None where no method needs heads.
        split: Of the test users; by default `test`, and `dev` of LaMP, whose test answers are not
            public.
        validation_split: By default `validation`; `dev` of LaMP, `val` of LongLaMP.
        root: As `load_examples` takes it.
        tasks: Names of tasks; all by default.
        users: Draw so many test users; all by default.
        validation_users: Draw so many validation users.
        same_examples: Keep and mark what heads were found on.
        seed: Of the draws.

    Raises:
        InputError: No user is left for a group, a user or example is in two groups, or as
            `load_examples` says.
    """
    usual = SPLITS.get(source.partition(":")[0], (None, None))
    split, validation_split = split or usual[0], validation_split or usual[1]
    found = Found(None if same_examples else scores)
    if split == validation_split:
        pool, left_out = _without(load_examples(source, split, root, tasks=tasks), found, split)
        validation, test = _divide(pool, users, validation_users, seed)
    else:
        test = load_examples(source, split, root, tasks=tasks, users=users, seed=seed)
        others = load_examples(source, validation_split, root, tasks=tasks)
        others, left_out = _without(others, found, validation_split)
        validation = sample_users(others, validation_users, seed)
    known = Found(scores)
    leaked = frozenset(example.name for example in test if example in known)
    names = (str(split), str(validation_split))
    asked = Asked(validation, test, *names, left_out, leaked, same_examples)
    asked.check(scores)
    return asked


def _without(examples: list[Example], found: Found, split: str | None) -> tuple[list[Example], int]:
    kept = [example for example in examples if example not in found]
    if examples and not kept:
        raise InputError(
            f"heads were found on all users of the {split} split; score heads on fewer (--users), "
            "name another split, or ask for it by name: --same-examples"
        )
    return kept, len({e.user for e in examples} - {e.user for e in kept})


def _divide(
    pool: list[Example], users: int | None, validation_users: int | None, seed: int
) -> tuple[list[Example], list[Example]]:
    names = {example.user for example in pool}
    count = validation_users or max(1, min(MOST, len(names) // SHARE))
    if len(names) < count + (users or 1):
        raise InputError(
            f"{count} validation and {users or 'some'} test users are wanted, and {len(names)} are "
            "left that heads were not found on; ask for fewer, or score heads on fewer"
        )
    validation = sample_users(pool, count, seed)
    chosen = {example.user for example in validation}
    rest = [example for example in pool if example.user not in chosen]
    return validation, sample_users(rest, users, seed)


def _check_present(validation: Sequence[Example], test: Sequence[Example]) -> None:
    for name, group in (("test", test), ("validation", validation)):
        if not group:
            raise InputError(f"no {name} examples: the split is empty")
    missing = sorted({e.task for e in test} - {e.task for e in validation})
    if missing:
        raise InputError(f"no validation examples of {', '.join(missing)} to choose settings on")


def check_model(scores: HeadScores, model: TransformerBridge, run: str) -> None:
    """Refuse head scores of another model.

    Weights in another dtype are the same model: they are then told apart by their files alone.

    Raises:
        InputError: The message names both models.
    """
    was, now = dict(scores.manifest.get("settings", {})), describe(model)
    keys = ["weights", "heads_per_layer"]
    if was.get("dtype") == now["dtype"]:
        keys.append("tensors")
    different = [key for key in keys if key in was and was[key] != now[key]]
    if different:
        raise InputError(
            f"{run} holds head scores of {_name(was)}, and this model is {_name(now)}: other "
            f"{', '.join(different)}. Score this model's heads first (workbench score)"
        )


def _name(described: dict[str, Any]) -> str:
    heads = described.get("heads_per_layer") or [0]
    return (
        f"{described.get('model')} ({str(described.get('weights'))[:19]}, {len(heads)} layers, "
        f"{sum(heads)} heads)"
    )
