"""Classes of heads at equal K: what removing each of them costs, and steering with it does.

| class | the K heads with the highest |
|---|---|
| `preference` | PCS on the users' text |
| `specific` | PCS less that behind a stranger's profile |
| `capability` | score on text that has no user |
| `induction` | prefix-matching score on repeated random tokens |
| `retrieval` | copy score on needles |
| `random` | none: drawn, in every layer as many as `preference` has there; several draws |
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from tqdm.auto import tqdm

from workbench import stats
from workbench.analysis.answers import Answers
from workbench.analysis.coherence import Losses, check_sets
from workbench.analysis.controls import RANDOM, Classes, check_model, need_scores, within
from workbench.analysis.sweep import beaten_draws
from workbench.analysis.tested import adjusted, called, shown, tested_line, unnamed
from workbench.data.examples import Example
from workbench.data.prompts import PromptSettings
from workbench.errors import InputError
from workbench.evaluation.metrics import Metric, get_metric, metrics_of
from workbench.heads import HeadSet, random_matched, top_k
from workbench.scores import HeadScores
from workbench.steering.contrast import DPS, Ablated

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

STRANGER = "stranger"
TESTED = ("user_loss", "neutral_loss", "change_ablated", "change_dps")
"""The changes that are tested, all of a table as one family."""
LOSSES = ("user_loss", "neutral_loss")
LESS_RANDOM = tuple(f"{name}_less_random" for name in LOSSES)
"""What removing a class costs beyond random heads, paired; a family of tests of their own."""


def halved(neutral: Sequence[Example], seed: int = 0) -> tuple[list[Example], list[Example]]:
    """Neutral text in two halves: to choose capability heads on, and to measure classes on.

    The heads that hurt most on some passages hurt there by luck as well. On the other half that
    luck is gone, and all classes are measured alike.

    Args:
        neutral: Text that has no user, as of `neutral_examples`.
        seed: Of the draw.

    Returns:
        Those to choose on and those to measure on, in their order. No user is in both; of each
        task there are as many on both sides, or one more to measure on.

    Raises:
        InputError: No task has passages of two users.
    """
    rng = np.random.default_rng((seed, 1))
    by_task: dict[str, list[str]] = {}
    for user, task in {example.user: example.task for example in neutral}.items():
        by_task.setdefault(task, []).append(user)
    chosen = {
        str(user)
        for users in by_task.values()
        for user in rng.permutation(sorted(users))[: len(users) // 2]
    }
    if not chosen:
        raise InputError(
            f"{len(neutral)} passages of neutral text can't be halved: a task needs two or more, "
            "one to choose capability heads on and one to measure them on; give more"
        )
    first = [example for example in neutral if example.user in chosen]
    return first, [example for example in neutral if example.user not in chosen]


def head_classes(
    own: HeadScores,
    specific: xr.Dataset,
    neutral: HeadScores,
    k: int,
    *,
    induction: xr.DataArray | None = None,
    retrieval: HeadSet | None = None,
    draws: int = 5,
    seed: int = 0,
) -> dict[str, dict[str, list[HeadSet]]]:
    """Sets of K heads by task and class.

    Args:
        own: PCS behind the users' own profiles.
        specific: `specificity` by task, with the counterfactual `stranger`.
        neutral: Scores on text that has no user; of `halved` the first half, so that the other
            is left for `class_effects`.
        k: Heads in a set.
        induction: `induction_scores`; None leaves the class out.
        retrieval: Retrieval heads, the highest first, of which K are taken; None leaves the
            class out.
        draws: Random sets.
        seed: Of the draws.

    Returns:
        For each task one set a class, in the order of the table above, and `draws` of `random`.
        A head may be in several classes. A task without a stranger's profile, of a single user,
        has none.

    Raises:
        InputError: K is outside the model, there are fewer retrieval heads, no random set is
            asked for, the stranger's profile or a task is missing, or the scores are of different
            models.
    """
    need_scores(own, "the own profiles")
    need_scores(neutral, "the neutral text")
    check_model(own, neutral, "neutral")
    if draws < 1:
        raise InputError(f"the random control needs at least 1 draw, got {draws}")
    if retrieval is not None and len(retrieval) < k:
        raise InputError(f"wanted {k} retrieval heads, got {len(retrieval)}; ask for as many")
    if STRANGER not in specific["counterfactual"].values:
        raise InputError(
            "specific heads are told by a stranger's profile, and these scores have "
            f"{', '.join(specific['counterfactual'].values)}; score that counterfactual too"
        )
    against = specific["specific"].sel(counterfactual=STRANGER)
    shared = {"capability": neutral.top(k, "all")["all"]}
    if induction is not None:
        shared["induction"] = top_k(induction.mean("probe").values, k)
    if retrieval is not None:
        shared["retrieval"] = HeadSet(retrieval.heads[:k])
    found = {}
    for place, (task, preference) in enumerate(own.top(k, "task").items()):
        if task not in against["group"].values:
            raise InputError(f"no specific scores of {task}; take specificity by task")
        if np.isnan(against.sel(group=task).values).all():
            continue  # a single user, behind whom there was no stranger
        rng = np.random.default_rng((seed, place))
        found[task] = {
            "preference": [preference],
            "specific": [top_k(against.sel(group=task).values, k)],
            **{name: [heads] for name, heads in shared.items()},
            RANDOM: [random_matched(preference, own.heads_per_layer, rng) for _ in range(draws)],
        }
    if not found:
        raise InputError("every task has a single user, and so no stranger; take more users")
    return found


def class_effects(
    model: TransformerBridge,
    evaluation: Sequence[Example],
    neutral: Sequence[Example],
    classes: Classes,
    gamma: float = 0.5,
    *,
    found_on: Collection[str],
    chosen_on: Collection[str] | None = None,
    prompt: PromptSettings | None = None,
    folder: Path | str | None = None,
    batch_tokens: int = 16384,
    max_new_tokens: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> xr.Dataset:
    """What each class does to users' text and to neutral text, removed and steered with.

    Args:
        model: From `load_model`.
        evaluation: Examples of users on whom no head was found.
        neutral: Text that has no user; of `halved` the second half.
        classes: From `head_classes`.
        gamma: Strength of DPS.
        found_on: Users on whom the heads were found.
        chosen_on: Users of the neutral text on which capability heads were chosen; None if not
            known, and then the words say so.
        prompt: How prompts are built.
        folder: Keep answers and losses there; the same call then goes on where it stopped.
        batch_tokens: Most tokens of a batch.
        max_new_tokens: Limit of new tokens of an answer.
        seed: Of the resampling.
        progress: Show a bar on the terminal.

    Returns:
        For each `task` and `cls`: `user_loss` and `neutral_loss`, the change of the loss when the
        whole set is removed, in nats per target token, positive where it hurts; `metric_ablated`
        and `metric_dps`, and `change_ablated` and `change_dps`, these less `plain`; all with
        `_low` and `_high`, 95 % intervals from resampled users, paired for changes. Of random
        heads it is the mean over draws. `beaten`: of how many random sets DPS with the class is
        better. Of the changes also `_p`, the sign-flip p, adjusted after Holm for all of them in
        the table. `user_loss_less_random` and `neutral_loss_less_random`, with ends and `_p`: the
        change less that of random heads, paired, the drawn sets as they are; their p are adjusted
        as a family of their own, and NaN stands where no random set is. For each task `plain`,
        `plain_user_nll` and `plain_neutral_nll`, the plain model's.

    Raises:
        InputError: Capability heads were chosen on a passage of `neutral`, or what
            `coherence.check_sets` and `Answers` refuse.
    """
    tasks = check_sets(classes, evaluation, neutral, found_on)
    if shared := {example.user for example in neutral} & set(chosen_on or ()):
        raise InputError(
            f"capability heads were chosen on {len(shared)} of these passages, {min(shared)} "
            "among them; measure on the other half (halved)"
        )
    place = Path(folder) if folder is not None else None
    general = Losses(model, neutral, prompt, place, batch_tokens)
    total = sum(len(members) for task in tasks for members in classes[task].values())
    parts = []
    with tqdm(total=total, desc="head classes", unit="set", disable=not progress) as bar:
        for task in tasks:
            part = [example for example in evaluation if example.task == task]
            bench = _Bench(
                Answers(model, part, max_new_tokens, prompt, place, batch_tokens),
                Losses(model, part, prompt, place, batch_tokens),
                general,
                get_metric(metrics_of(part[0])[0]),
            )
            parts.append(_task(bench, classes[task], gamma, seed, bar))
    names = list(classes[tasks[0]])
    table = xr.concat(parts, dim="task").assign_coords(task=tasks, cls=names)
    draws = len(classes[tasks[0]].get(RANDOM, ()))
    table.attrs.update(units="nats/token", level=0.95, gamma=gamma, draws=draws, seed=seed)
    table.attrs["apart"] = chosen_on is not None
    return adjusted(adjusted(table, LESS_RANDOM), TESTED)


@dataclass(frozen=True)
class _Bench:
    """Where the sets of one task are measured."""

    answers: Answers
    own: Losses
    general: Losses
    metric: Metric

    def scored(self, contrast: DPS | Ablated) -> NDArray[np.float64]:
        """The metric of each answer."""
        pairs = zip(self.answers.examples, self.answers.texts(contrast), strict=True)
        return np.array([self.metric.score(example, text) for example, text in pairs])

    def measure(
        self, heads: HeadSet, gamma: float, plain: NDArray[np.float64]
    ) -> dict[str, NDArray[np.floating[Any]]]:
        """Numbers of one set, one an example; `plain` is the plain model's metric."""
        none = HeadSet(())
        ablated, dps = self.scored(Ablated(heads)), self.scored(DPS(heads, gamma))
        return {
            "user_loss": self.own.ablated(heads) - self.own.ablated(none),
            "neutral_loss": self.general.ablated(heads) - self.general.ablated(none),
            "metric_ablated": ablated,
            "change_ablated": ablated - plain,
            "metric_dps": dps,
            "change_dps": dps - plain,
        }


def _task(
    bench: _Bench, classes: Mapping[str, Sequence[HeadSet]], gamma: float, seed: int, bar: Any
) -> xr.Dataset:
    none = HeadSet(())
    plain = bench.scored(DPS(none))
    columns: dict[str, list[float]] = {}
    means: dict[str, NDArray[np.float64]] = {}
    costs: dict[str, list[NDArray[np.float64]]] = {}
    for cls, members in classes.items():
        each = []
        for heads in members:
            each.append(bench.measure(heads, gamma, plain))
            bar.update()
        means[cls] = np.array([numbers["metric_dps"].mean() for numbers in each])
        costs[cls] = [np.mean([numbers[name] for numbers in each], axis=0) for name in LOSSES]
        for name in each[0]:
            values = np.mean([numbers[name] for numbers in each], axis=0)
            users = (bench.general if name == "neutral_loss" else bench.own).users
            found = stats.estimate(values, users, seed=seed)
            for end, value in (("", found.mean), ("_low", found.low), ("_high", found.high)):
                columns.setdefault(name + end, []).append(value)
            if name in TESTED:
                p = stats.sign_flip_p(values, users, seed)
                columns.setdefault(f"{name}_p", []).append(p)
    columns |= _less_random(costs, (bench.own.users, bench.general.users), seed)
    random, better = means.get(RANDOM, np.array([])), bench.metric.better
    base = stats.estimate(plain, bench.own.users, seed=seed)
    return xr.Dataset(
        {
            **{name: ("cls", values) for name, values in columns.items()},
            "beaten": ("cls", [beaten_draws(m.mean(), random, better) for m in means.values()]),
            "heads": ("cls", ["; ".join(map(str, members)) for members in classes.values()]),
            "sets": ("cls", [len(members) for members in classes.values()]),
            "plain": base.mean,
            "plain_low": base.low,
            "plain_high": base.high,
            "plain_user_nll": float(bench.own.ablated(none).mean()),
            "plain_neutral_nll": float(bench.general.ablated(none).mean()),
            "examples": base.n,
            "users": base.groups,
            "neutral_examples": len(bench.general.users),
            "metric": bench.metric.label,
            "better": better,
        }
    )


def _less_random(
    costs: Mapping[str, Sequence[NDArray[np.float64]]], users: Sequence[Sequence[str]], seed: int
) -> dict[str, list[float]]:
    """The columns of `LESS_RANDOM`, a number a class."""
    columns: dict[str, list[float]] = {}
    for cls, values in costs.items():
        for i, name in enumerate(LESS_RANDOM):
            numbers = [np.nan] * 4
            if cls != RANDOM and RANDOM in costs:
                less = values[i] - costs[RANDOM][i]
                found = stats.estimate(less, users[i], seed=seed)
                p = stats.sign_flip_p(less, users[i], seed)
                numbers = [found.mean, found.low, found.high, p]
            for end, value in zip(("", "_low", "_high", "_p"), numbers, strict=True):
                columns.setdefault(name + end, []).append(value)
    return columns


# In words


def lines(table: xr.Dataset) -> list[str]:
    """What removing and steering with each class does, a task and class a line.

    The last lines say by what an effect is named, and on which neutral text.
    """
    said = []
    alpha = 1 - table.attrs["level"]
    for task in table["task"].values.tolist():
        for cls in table["cls"].values.tolist():
            row = table.sel(task=task, cls=cls)
            draws = int(table.attrs["draws"])
            words = ("better", "worse")[:: 1 if row["better"].item() == "higher" else -1]
            text = (
                f"{task}, {called(cls)} heads: removed, the loss on the users' text is "
                f"{_nats(row, 'user_loss', alpha)} and on neutral text "
                f"{_nats(row, 'neutral_loss', alpha)}; steered with (gamma = "
                f"{table.attrs['gamma']:g}), {row['metric'].item()} is "
                f"{_word(row, 'change_dps', alpha, words)}: "
                f"{_span(row, 'change_dps', alpha)}"
            )
            if cls != RANDOM and draws:
                text += f", ahead of {int(row['beaten'])} of {draws} random sets"
            said.append(text + ".")
    said.append(tested_line(table))
    if "capability" in table["cls"].values:
        said.append(_neutral_line(table))
    return said


def _neutral_line(table: xr.Dataset) -> str:
    passages = int(table["neutral_examples"].values.max())
    if table.attrs["apart"]:
        return f"No head was chosen on the {passages} passages of neutral text measured here."
    return (
        "Capability heads may have been chosen on the very passages measured here: what removing "
        "them does to neutral text then looks larger than it is."
    )


def _word(row: xr.Dataset, name: str, alpha: float, words: Sequence[str]) -> str:
    """The first word where a change is shown to be above 0, the second where below."""
    above, below = shown(row, name, alpha)
    return words[0] if above else words[1] if below else "not shown to change"


def _span(row: xr.Dataset, name: str, alpha: float, unit: str = "") -> str:
    value, low, high = (float(row[f"{name}{end}"]) for end in ("", "_low", "_high"))
    p = unnamed(row, name, alpha)
    return f"{value:+.3f}{unit} {within(low, high)}" + f" ({p})" * bool(p)


def _nats(row: xr.Dataset, name: str, alpha: float) -> str:
    word = _word(row, name, alpha, ("higher", "lower"))
    return f"{word}: {_span(row, name, alpha, ' nats per token')}"
