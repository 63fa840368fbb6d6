"""What an evaluation does, and with which heads; refused, where it can be, before a model loads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from workbench import runs
from workbench.data.prompts import PromptSettings
from workbench.data.tasks import get_task
from workbench.errors import InputError
from workbench.evaluation import methods as ways
from workbench.evaluation.methods import check_methods
from workbench.heads import HeadSet, check_k, rank, read_head_scores
from workbench.scores import HeadScores
from workbench.steering.contrast import Strength
from workbench.steering.native import Prefill

Decide = Literal["generate", "likelihood"]
HEAD_COUNTS, GAMMAS = (1, 2, 4, 8), (0.25, 0.5, 1.0, 2.0)
OWN = "the task's own"  # in place of a ranking that is none of its names
SHARES = (0.005, 0.01, 0.02, 0.04)  # of a large model's heads: the paper takes 32 to 40 of 1,024


@dataclass(frozen=True)
class GridSettings:
    """What an evaluation does.

    Attributes:
        methods: Names of `methods.METHODS`; plain is always among them.
        k: Sizes of head sets that are tried; by default as `usual_counts` has them.
        gamma: Strengths that are tried, of DPS, DeCoRe, CAD and random heads alike: constants, or
            `Entropy`. DeCoRe tries the entropy in nats in any case.
        seeds: Random head sets.
        seed: Seed of random sets and intervals.
        decide: How tasks with labels are answered: by writing, or by the likeliest label.
        prefill: See `generate`.
        max_new_tokens: Limit of new tokens.
        prompt: How prompts are built.
        batch_tokens: Most tokens kept at a time.
        other_prompt: Take heads that were found with other prompts.

    Raises:
        InputError: A method is unknown, a K or the number of seeds is below 1, a gamma is
            negative, or `decide` or `prefill` is none of its kinds.
    """

    methods: tuple[str, ...] = ways.METHODS
    k: tuple[int, ...] | None = None
    gamma: tuple[Strength, ...] = GAMMAS
    seeds: int = 3
    seed: int = 0
    decide: Decide = "generate"
    prefill: Prefill = "masked"
    max_new_tokens: int = 32
    prompt: PromptSettings = field(default_factory=PromptSettings)
    batch_tokens: int = 16384
    other_prompt: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "methods", check_methods(self.methods))
        for name, value, kinds in (
            ("decide", self.decide, Decide),
            ("prefill", self.prefill, Prefill),
        ):
            if value not in get_args(kinds):
                raise InputError(f"{name} must be {' or '.join(get_args(kinds))}, got {value!r}")
        if not self.gamma or self.k == ():
            raise InputError("at least one K and one gamma must be tried")
        ways.cad(self.gamma)  # refuses what is no strength
        if self.seeds < 1 or self.max_new_tokens < 1:
            raise InputError(
                f"seeds and max_new_tokens must be >= 1, got {self.seeds} and {self.max_new_tokens}"
            )
        if self.k is not None and min(self.k) < 1:
            raise InputError(f"K must be >= 1, got {min(self.k)}")

    @property
    def on_heads(self) -> bool:
        """Whether a method needs head scores."""
        return bool(set(self.methods) & set(ways.ON_HEADS))

    def head_counts(self, heads: int) -> tuple[int, ...]:
        """The K for a model with so many heads.

        Raises:
            InputError: A K that was asked for is above that.
        """
        if self.k is None:
            return usual_counts(heads)
        for k in self.k:
            check_k(k, heads)
        return tuple(sorted(set(self.k)))


def usual_counts(heads: int) -> tuple[int, ...]:
    """The sizes of head sets to try in a model with so many heads.

    1, 2, 4 and 8 as far as it goes; in a large model 0.5, 1, 2 and 4 % of its heads where that is
    more, 5, 10, 20 and 40 of 1,024.
    """
    counts = (max(k, _rounded(s * heads)) for k, s in zip(HEAD_COUNTS, SHARES, strict=True))
    return tuple(k for k in counts if k <= heads)


def _rounded(number: float) -> int:
    """To a whole number below 10, to fives below 100, to fifties below 1,000."""
    step = 1 if number < 10 else 5 * 10 ** (int(math.log10(number)) - 1)
    return step * round(number / step)


def check_scores(settings: GridSettings, scores: HeadScores | None, tasks: Sequence[str]) -> None:
    """Refuse a run of head scores that can't serve, before a model is loaded.

    Raises:
        InputError: It is needed and not given, lacks a task, is smaller than a K, or was made with
            other prompts and `settings.other_prompt` doesn't allow that.
    """
    if not settings.on_heads:
        return
    if scores is None:
        wanted = [method for method in settings.methods if method in ways.ON_HEADS]
        raise InputError(
            f"{', '.join(wanted)}: needs --heads, the run folder of a `workbench score` or `probe`"
        )
    head_sets(scores, tasks, settings.head_counts(sum(scores.heads_per_layer)))
    different = prompt_differences(settings.prompt, scores, tasks)
    if different and not settings.other_prompt:
        theirs = " ".join(
            f"--{_option(name)} {was}" if was != OWN else f"no --{name}"
            for name, (was, _) in different.items()
        )
        raise InputError(
            f"the heads were found with other prompts: {differences_in_words(different)}. Ask with "
            f"theirs ({theirs}), score heads with these, or allow the difference: --other-prompt"
        )


def prompt_differences(
    prompt: PromptSettings, scores: HeadScores, tasks: Sequence[str]
) -> dict[str, tuple[Any, Any]]:
    """Name of a setting -> its value where heads were found and here, where they differ.

    The room left for an answer is none of them; a ranking is compared as each task takes it.
    """
    was: Mapping[str, Any] = scores.manifest.get("settings", {}).get("prompt", {})
    found = {
        name: (was[name], getattr(prompt, name))
        for name in ("style", "items", "max_tokens")
        if name in was and was[name] != getattr(prompt, name)
    }
    usual = [get_task(task).ranking for task in tasks]
    then, now = was.get("ranking"), prompt.ranking
    if was and any((then or one) != (now or one) for one in usual):
        found["ranking"] = (then or OWN, now or OWN)
    return found


def differences_in_words(different: Mapping[str, tuple[Any, Any]]) -> str:
    """Such as `items 5 there, 4 here`."""
    return ", ".join(
        f"{_option(name)} {was} there, {now} here" for name, (was, now) in different.items()
    )


def _option(name: str) -> str:
    return {"max_tokens": "max-prompt-tokens"}.get(name, name)


def head_sets(
    scores: HeadScores, tasks: Sequence[str], counts: Sequence[int]
) -> dict[str, dict[int, HeadSet]]:
    """Task -> K -> the heads with the highest mean score on that task.

    Raises:
        InputError: A task has no scores, or the heads were screened for smaller or other sets.
    """
    known = set(scores.data["task"].values.tolist())
    for task in tasks:
        if task not in known:
            raise InputError(
                f"no head scores of {task}, only of {', '.join(sorted(known))}; score heads on it, "
                "or name other --tasks"
            )
    screen = scores.manifest.get("settings", {}).get("screen")
    if screen and max(counts) > screen["k"]:
        raise InputError(
            f"K = {max(counts)} is to be tried, and the heads were screened for the top "
            f"{screen['k']}: name no larger -k, screen for more, or score all heads exactly"
        )
    by_count = {k: scores.top(k, "task") for k in counts}
    return {task: {k: by_count[k][task] for k in counts} for task in tasks}


def read_retrieval(path: Path) -> HeadSet:
    """Retrieval heads from a head set or a published list of scores, the highest first.

    Raises:
        InputError: The file is neither.
    """
    value = runs.read_json(path)
    if isinstance(value, dict) and ("format" in value or "preference_heads" in value):
        return HeadSet.load(path)
    return HeadSet(tuple(rank(read_head_scores(path))))
