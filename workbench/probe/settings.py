"""What a probe does, and on whom."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from workbench.data.examples import Example
from workbench.data.lamp import sample_users
from workbench.data.prompts import PromptSettings
from workbench.data.sources import load_examples
from workbench.errors import InputError
from workbench.heads import HeadSet, check_k
from workbench.hooks import Ablation
from workbench.steering.contrast import DPS

Depth = Literal["quick", "full"]
PASS_TOKENS = 8192
EVAL_USERS = 40
DEFAULT_SWEEP = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Effort:
    """How much of each analysis a depth asks for.

    Attributes:
        counterfactuals: Profiles that the user's own is held against.
        neutral: Passages of text that has no user.
        gammas: Strengths at which coherence is measured.
        draws: Random subsets of the examples a number of examples.
        resamples: Bootstrap resamples of the users.
        sample: Users on whom mixed profiles, aspects and positions are scored, as many times over
            as each has variants; all, where there are no more.
        shares: Shares of the profile's items that are swapped for a stranger's.
        steps: Steps of each kind of position: items between, items shown, turns.
    """

    counterfactuals: tuple[str, ...]
    neutral: int
    gammas: tuple[float, ...]
    draws: int
    resamples: int
    sample: int
    shares: tuple[float, ...] = ()
    steps: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


EFFORTS: dict[Depth, Effort] = {
    "quick": Effort(("stranger", "none"), 48, (0.5, 2.0), 10, 200, 16),
    "full": Effort(
        ("stranger", "none", "shuffled"),
        96,
        (0.25, 0.5, 1.0, 2.0),
        20,
        1000,
        24,
        (0.25, 0.5, 1.0),
        {"distance": (0, 1, 2, 4), "length": (1, 2, 3, 4), "turns": (0, 1, 2, 3)},
    ),
}


@dataclass(frozen=True)
class ProbeSettings:
    """What a probe does.

    Attributes:
        k: Size of the head sets that overlap, steered texts and verdict are about.
        sweep_k: Numbers of heads of the sweep, to which k is added; by default 1, 2, 4, 8 and 16
            as far as the model goes.
        gamma: Strength of DPS. Fixed beforehand, not tuned.
        draws: Random head sets at each K.
        ablation: `zero` or `mean`.
        max_new_tokens: Limit of new tokens of an answer.
        seed: Seed of draws, bootstraps and random sets.
        depth: `quick`, or `full`: every analysis, more draws and a whole grid of gamma.
        neutral: Text that has no user: `builtin`, `testbed`, or a file of passages.
        cluster_users: Users a cluster for the routing; by default the paper's 100, or a quarter
            of the users where there are fewer than 400.
        prompt: How prompts are built.
        batch_tokens: Most tokens in a forward pass; by default scoring takes what the memory at
            hand allows, and everything else 8,192.
    """

    k: int = 8
    sweep_k: tuple[int, ...] | None = None
    gamma: float = 0.5
    draws: int = 5
    ablation: Ablation = "zero"
    max_new_tokens: int = 32
    seed: int = 0
    depth: Depth = "quick"
    neutral: str = "builtin"
    cluster_users: int | None = None
    prompt: PromptSettings = field(default_factory=PromptSettings)
    batch_tokens: int | None = None

    def __post_init__(self) -> None:
        # Both refuse what they can't use; better now than after hours of scoring.
        DPS(HeadSet(()), self.gamma)
        if self.ablation not in get_args(Ablation):
            raise InputError(f"ablation must be zero or mean, got {self.ablation!r}")
        if self.draws < 1:
            raise InputError(f"the random control needs at least 1 draw, got {self.draws}")
        if self.depth not in get_args(Depth):
            raise InputError(f"depth must be quick or full, got {self.depth!r}")
        if self.cluster_users is not None and self.cluster_users < 1:
            raise InputError(f"a cluster needs at least 1 user, got {self.cluster_users}")

    @property
    def effort(self) -> Effort:
        """How much of each analysis the depth asks for."""
        return EFFORTS[self.depth]

    @property
    def pass_tokens(self) -> int:
        """Most tokens in a forward pass of what isn't scoring."""
        return self.batch_tokens or PASS_TOKENS

    def head_counts(self, heads: int) -> list[int]:
        """The sweep's K for a model with so many heads.

        Raises:
            InputError: A K that was asked for is outside the model.
        """
        asked = self.sweep_k
        for n in (self.k, *(asked or ())):
            check_k(n, heads)
        usual = [n for n in DEFAULT_SWEEP if n <= heads]
        return sorted({*(usual if asked is None else asked), self.k})


def discovery_and_evaluation(
    source: str,
    split: str | None,
    root: Path | str | None,
    users: int | None,
    eval_users: int | None = None,
    seed: int = 0,
) -> tuple[list[Example], list[Example]]:
    """Examples of the users that heads are found on, and of other users to measure on.

    The testbed has a split for each. LaMP's users are divided by a draw from `seed`; with
    `users=None` all that are not drawn for evaluation serve for discovery. With `eval_users=None`
    40 serve for evaluation, or as many as are left; half of them if `users` is None too.

    Raises:
        InputError: Too few users for both.
    """
    if source == "testbed":
        found = load_examples(source, split or "discovery", root, users=users, seed=seed)
        other = "validation" if (split or "discovery") != "validation" else "test"
        others = load_examples(source, other, root)
        if eval_users is None:
            eval_users = min(EVAL_USERS, len({example.user for example in others}))
        return found, sample_users(others, eval_users, seed)
    examples = load_examples(source, split, root)
    names = list(dict.fromkeys(example.user for example in examples))
    if eval_users is None:
        left = len(names) // 2 if users is None else max(0, len(names) - users)
        eval_users = min(EVAL_USERS, left)
    wanted = len(names) - eval_users if users is None else users
    if wanted < 1 or eval_users < 1 or wanted + eval_users > len(names):
        raise InputError(
            f"{source} has {len(names)} users; {wanted} to find heads on and {eval_users} others "
            "to measure on don't fit in. Lower --users or --eval-users (both at least 1)"
        )
    drawn = random.Random(seed).sample(names, wanted + eval_users)
    first, second = set(drawn[:wanted]), set(drawn[wanted:])
    return [e for e in examples if e.user in first], [e for e in examples if e.user in second]
