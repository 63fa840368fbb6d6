"""Who is asked: validation users, test users, and neither of those that heads were found on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.data.authors import infer_users
from workbench.data.examples import Example
from workbench.data.lamp import sample_users
from workbench.data.longlamp import users_recur
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
        same_examples: Whether such examples and users were asked for by name. Validation and test
            stay apart all the same.
    """

    validation: Sequence[Example]
    test: Sequence[Example]
    split: str
    validation_split: str
    left_out: int
    leaked: frozenset[str]
    same_examples: bool = False

    @property
    def users_inferred(self) -> bool:
        """Whether the data names no users, so that they were inferred from shared profiles."""
        return any(example.inferred for example in (*self.validation, *self.test))

    @property
    def users_recur(self) -> bool:
        """Whether a task has the same users in every split, by design of its data set."""
        return any(users_recur(example.task) for example in self.test)

    def check(self, scores: HeadScores | None) -> None:
        """Refuse what would make the table say more than it knows.

        Raises:
            InputError: A group is empty, a task has no validation example, an example or user is
                in both groups, or one has served for the heads and `same_examples` doesn't allow
                it. Of tasks whose users recur in every split by design only the examples are
                kept apart, unless both groups are of one split.
        """
        _check_present(self.validation, self.test)
        for group in (self.test, self.validation):
            found = Found(None if self.same_examples else scores, group)
            for example in group:
                leaked = example.name in self.leaked and not self.same_examples
                if leaked or example in found:
                    raise InputError(
                        f"{example.name} (user {example.user}): heads were found on this example "
                        "or on its user; name another split, or ask for it by name: "
                        "--same-examples"
                    )
        names = {example.name for example in self.validation}
        users = {example.user for example in self.validation if not self._may_recur(example)}
        for example in self.test:
            if example.name in names or example.user in users:
                raise InputError(
                    f"{example.name} (user {example.user}) is in the validation and in the test "
                    "group; settings must be chosen on others"
                )

    def _may_recur(self, example: Example) -> bool:
        return users_recur(example.task) and self.split != self.validation_split


class Found:
    """What heads were found on; knows it again.

    Users are known by name, those inferred from profiles too: their names hold the task and the
    id of a row. A user of `among` is also known by an example that heads were found on. Where
    users recur in every split by design, this alone tells: heads from such a task's other splits
    are found on the same users' other texts.

    Args:
        scores: Of the heads; None for no heads.
        among: All examples of the split at hand.
    """

    def __init__(self, scores: HeadScores | None, among: Sequence[Example] = ()) -> None:
        self.names: set[str] = set()
        self.users: set[str] = set()
        self.tasks: dict[str, set[str]] = {}
        if scores is None:
            return
        data = scores.data
        self.names = set(data["example"].values.tolist())
        self.users = {example.user for example in among if example.name in self.names}
        pairs = zip(*(data[name].values.tolist() for name in ("user", "task")), strict=True)
        for user, task in set(pairs):
            self.tasks.setdefault(user, set()).add(task)

    def __contains__(self, example: Example) -> bool:
        if example.name in self.names or example.user in self.users:
            return True
        tasks = self.tasks.get(example.user, set())
        return bool(tasks - {example.task} if users_recur(example.task) else tasks)


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
    users are reduced so; a test user that heads were found on is refused. In LongLaMP's temporal
    tasks users recur in every split: there examples are kept apart, and users within a split.

    Inferred users (`workbench.data.authors`) are told apart within a file, and over both splits
    where there are two. Whether heads were found on an author in yet another file can't be seen.

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
        same_examples: Keep and mark what heads were found on; validation and test stay apart.
        seed: Of the draws.

    Raises:
        InputError: No user is left for a group, a user or example is in two groups, or as
            `load_examples` says.
    """
    usual = SPLITS.get(source.partition(":")[0], (None, None))
    split, validation_split = split or usual[0], validation_split or usual[1]
    every = load_examples(source, split, root, tasks=tasks)
    others: list[Example] = []
    kept = None if same_examples else scores
    if split == validation_split:
        pool, left_out = _without(every, kept, split)
        validation, test = _divide(pool, users, validation_users, seed)
    else:
        others = load_examples(source, validation_split, root, tasks=tasks)
        both = infer_users([*every, *others])
        every, others = both[: len(every)], both[len(every) :]
        test = sample_users(every, users, seed)
        pool, left_out = _without(others, kept, validation_split)
        validation = sample_users(pool, validation_users, seed)
    # An inferred user's name may be another in scores of the other file; its rows are the same.
    same = [example for example in others if not users_recur(example.task)]
    known = Found(scores, [*every, *same])
    leaked = frozenset(example.name for example in test if example in known)
    names = (str(split), str(validation_split))
    asked = Asked(validation, test, *names, left_out, leaked, same_examples)
    asked.check(scores)
    return asked


def _without(
    examples: list[Example], scores: HeadScores | None, split: str | None
) -> tuple[list[Example], int]:
    found = Found(scores, examples)
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
