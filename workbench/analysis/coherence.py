"""What steering costs: text of nobody, variety, and how often the plain model's answer stays.

A personal gain that is paid for by text in general is one harm traded for another. Every strength
is measured on both sides, so that gamma can be chosen by eye.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from workbench import stats
from workbench.analysis.answers import Answers, kept
from workbench.analysis.controls import Classes, within
from workbench.analysis.tested import adjusted, called, shown, tested_line, unnamed
from workbench.batches import by_length, last_logits, losses, target_nll
from workbench.data.examples import Example
from workbench.data.prompts import Prompt, PromptSettings, build_prompts
from workbench.errors import InputError
from workbench.evaluation.metrics import Metric, get_metric, metrics_of
from workbench.evaluation.text import distinct_n, repetition
from workbench.heads import HeadSet
from workbench.hooks import head_gates
from workbench.models import context_length, describe, heads_per_layer
from workbench.steering.contrast import DPS

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

GAMMAS = (0.25, 0.5, 1.0, 2.0)
TESTED = ("user_nll", "neutral_nll", "gain")
"""The changes that are tested, all of a table as one family."""


@torch.inference_mode()
def steered_losses(
    model: TransformerBridge,
    prompts: Sequence[Prompt],
    heads: HeadSet,
    gammas: Sequence[float],
    batch_tokens: int = 8192,
) -> Float[Tensor, "gamma prompt"]:
    """Loss on the targets under `softmax((1 + gamma) full - gamma ablated)`, the targets fed.

    Two passes serve all strengths: the intact model's and the one without the heads.

    Args:
        model: From `load_model`.
        prompts: With their targets.
        heads: What the second pass goes without, in the prompt as well.
        gammas: Strengths; 0 gives `losses`, bit for bit.
        batch_tokens: Most tokens in a forward pass, padding counted.

    Returns:
        Nats per target token, float32 on the CPU.

    Raises:
        InputError: A head isn't the model's, or a loss is NaN or infinite; the message names the
            example.

    Source:
        Section 4 of the paper.
    """
    gates = heads.gates(heads_per_layer(model))
    result = torch.empty(len(gammas), len(prompts))
    for rows, batch in by_length(model, prompts, batch_tokens):
        positions = batch.longest_target + 1
        full = last_logits(model, batch, positions).float()
        with head_gates(model, gates):
            difference = full - last_logits(model, batch, positions).float()
        # A token that the model itself rules out (-inf) stays so; there no difference is defined.
        difference = torch.where(difference.isfinite(), difference, 0.0)
        for row, gamma in enumerate(gammas):
            result[row, rows] = target_nll(full + gamma * difference, batch).cpu()
    if not bool(result.isfinite().all()):
        first = prompts[int((~result.isfinite()).any(dim=0).nonzero()[0])].example.name
        raise InputError(f"{first}: a steered loss is NaN or infinite; try --dtype float32")
    return result


class Losses:
    """Losses of one model on one list of examples, with heads ablated or steered with.

    With a folder every list of losses is kept there, and the same request is then read.

    Args:
        model: From `load_model`.
        examples: With their targets.
        prompt: How prompts are built.
        folder: Where to keep them.
        batch_tokens: Most tokens in a forward pass.

    Raises:
        InputError: A prompt can't be built.
    """

    def __init__(
        self,
        model: TransformerBridge,
        examples: Sequence[Example],
        prompt: PromptSettings | None = None,
        folder: Path | None = None,
        batch_tokens: int = 8192,
    ) -> None:
        self.model = model
        self.users = [example.user for example in examples]
        self.names = [example.name for example in examples]
        self.prompts = build_prompts(examples, model.tokenizer, context_length(model), prompt)
        self.folder = folder
        self.batch_tokens = batch_tokens
        data = [(p.example.name, p.ids, p.target_ids, p.scored) for p in self.prompts]
        self.basis = [describe(model), data] if folder is not None else []
        self.known: dict[tuple[HeadSet, tuple[float, ...] | None], NDArray[np.float32]] = {}

    def ablated(self, heads: HeadSet) -> NDArray[np.float32]:
        """Nats per target token [example] without some heads; the plain model's without none."""
        return self._get(heads, None)[0]

    def steered(self, heads: HeadSet, gammas: Sequence[float]) -> NDArray[np.float32]:
        """`steered_losses`, [gamma, example]."""
        return self._get(heads, tuple(gammas))

    def _get(self, heads: HeadSet, gammas: tuple[float, ...] | None) -> NDArray[np.float32]:
        key = (heads, gammas)
        if key not in self.known:
            basis = [*self.basis, sorted(map(str, heads)), gammas]
            self.known[key] = kept(
                self.folder, basis, self.names, lambda: self._measure(heads, gammas)
            )
        return self.known[key]

    def _measure(self, heads: HeadSet, gammas: tuple[float, ...] | None) -> NDArray[np.float32]:
        if gammas is not None:
            found = steered_losses(self.model, self.prompts, heads, gammas, self.batch_tokens)
            return found.numpy()
        with head_gates(self.model, heads.gates(heads_per_layer(self.model))):
            return losses(self.model, self.prompts, self.batch_tokens).numpy()[None]


def check_sets(
    sets: Classes,
    evaluation: Sequence[Example],
    neutral: Sequence[Example],
    found_on: Collection[str],
) -> list[str]:
    """Refuse what classes of heads can't be measured on; returns the evaluation's tasks.

    Raises:
        InputError: There are no examples, a task has no head sets, tasks have different classes,
            a class is empty, or the heads were found on a user of the evaluation.
    """
    tasks = list(dict.fromkeys(example.task for example in evaluation))
    if not tasks or not neutral:
        raise InputError(
            f"wanted users' examples and neutral text, got {len(evaluation)} and {len(neutral)}"
        )
    missing = [task for task in tasks if not sets.get(task)]
    if missing:
        raise InputError(f"no head sets for {', '.join(missing)}; find heads on each task")
    for task in tasks:
        if list(sets[task]) != list(sets[tasks[0]]) or not all(sets[task].values()):
            raise InputError(
                f"{task} has head sets of {', '.join(sets[task])} and {tasks[0]} of "
                f"{', '.join(sets[tasks[0]])}; each task needs the same classes, none empty"
            )
    if shared := sorted({example.user for example in evaluation} & set(found_on)):
        raise InputError(
            f"the heads were found on {len(shared)} of these users, {shared[0]} among them; "
            "measure on other users"
        )
    return tasks


def coherence(
    model: TransformerBridge,
    evaluation: Sequence[Example],
    neutral: Sequence[Example],
    sets: Classes,
    gammas: Sequence[float] = GAMMAS,
    *,
    found_on: Collection[str],
    max_new_tokens: int = 32,
    prompt: PromptSettings | None = None,
    folder: Path | str | None = None,
    batch_tokens: int = 16384,
    seed: int = 0,
    progress: bool = True,
) -> xr.Dataset:
    """Measure DPS with several classes of heads over strengths: what it gains and what it costs.

    Args:
        model: From `load_model`.
        evaluation: Examples of users on whom no head was found.
        neutral: Text that has no user, as of `neutral_examples`.
        sets: Head sets by task and class; of a class with several sets the mean is taken.
        gammas: Strengths, above 0.
        found_on: Users on whom the heads were found.
        max_new_tokens: Limit of new tokens of an answer.
        prompt: How prompts are built.
        folder: Keep answers and losses there; the same call then goes on where it stopped.
        batch_tokens: Most tokens of a batch.
        seed: Of the resampling.
        progress: Show a bar on the terminal.

    Returns:
        For each `task`, `cls` and `gamma`: `user_nll` and `neutral_nll`, the changes of the loss
        from the plain model's in nats per target token, positive where steering costs; `metric`
        and `gain` = metric - plain; `agreement`, the share of answers that equal the plain
        model's, and `word_agreement`, that of words at their place; `repetition`, the share of
        4-grams that stood in the answer before; all with `_low` and `_high`, 95 % intervals from
        resampled users, paired for changes; of the changes also `_p`, the sign-flip p, adjusted
        for all of them in the table; `distinct2`, the share of distinct 2-grams in all answers
        together, NaN where no answer has two words. For each task the plain model's
        `plain` (metric), `plain_repetition`, `plain_distinct2`, `plain_user_nll` and
        `plain_neutral_nll`. Agreement, repetition and variety are of answers to the users.

    Raises:
        InputError: A gamma isn't above 0, or what `check_sets` and `Answers` refuse.
    """
    tasks = check_sets(sets, evaluation, neutral, found_on)
    strengths = sorted({float(gamma) for gamma in gammas})
    if not strengths or not strengths[0] > 0:
        raise InputError(f"wanted strengths gamma above 0, got {list(gammas)}")
    place = Path(folder) if folder is not None else None
    general = Losses(model, neutral, prompt, place, batch_tokens)
    names = list(sets[tasks[0]])
    total = sum(len(part) for task in tasks for part in sets[task].values())
    parts = []
    with tqdm(total=total, desc="coherence", unit="set", disable=not progress) as bar:
        for task in tasks:
            part = [example for example in evaluation if example.task == task]
            answers = Answers(model, part, max_new_tokens, prompt, place, batch_tokens)
            own = Losses(model, part, prompt, place, batch_tokens)
            parts.append(_task(answers, own, general, sets[task], strengths, seed, bar))
    table = xr.concat(parts, dim="task").assign_coords(task=tasks, cls=names, gamma=strengths)
    table.attrs.update(units="nats/token", level=0.95, seed=seed)
    return adjusted(table, TESTED)


def _task(
    answers: Answers,
    own: Losses,
    general: Losses,
    sets: Mapping[str, Sequence[HeadSet]],
    gammas: Sequence[float],
    seed: int,
    bar: Any,
) -> xr.Dataset:
    examples = answers.examples
    metric = get_metric(metrics_of(examples[0])[0])
    plain_texts = answers.texts(DPS(HeadSet(())))
    plain = np.array([metric.score(e, t) for e, t in zip(examples, plain_texts, strict=True)])
    base = {"user_nll": own.ablated(HeadSet(())), "neutral_nll": general.ablated(HeadSet(()))}
    columns: dict[str, NDArray[np.float64]] = {}
    for row, members in enumerate(sets.values()):
        each = []
        for heads in members:
            numbers = {
                "user_nll": own.steered(heads, gammas) - base["user_nll"],
                "neutral_nll": general.steered(heads, gammas) - base["neutral_nll"],
            }
            written = [answers.texts(DPS(heads, gamma)) for gamma in gammas]
            texts = [_of_texts(examples, metric, new, plain_texts) for new in written]
            numbers |= {name: np.stack([one[name] for one in texts]) for name in texts[0]}
            numbers["gain"] = numbers["metric"] - plain
            each.append(numbers)
            bar.update()
        for name in each[0]:
            values = np.mean([numbers[name] for numbers in each], axis=0)
            users = general.users if name == "neutral_nll" else own.users
            ends = dict(_with_ends(name, values, users, seed))
            if name in TESTED:
                ends[f"{name}_p"] = np.array([stats.sign_flip_p(v, users, seed) for v in values])
            for end, found in ends.items():
                shape = (len(sets), len(gammas))
                columns.setdefault(end, np.full(shape, np.nan))[row] = found
    return xr.Dataset(
        {
            **{name: (("cls", "gamma"), values) for name, values in columns.items()},
            "heads": ("cls", ["; ".join(map(str, members)) for members in sets.values()]),
            "sets": ("cls", [len(members) for members in sets.values()]),
            "plain": plain.mean(),
            "plain_repetition": np.mean([repetition(text) for text in plain_texts]),
            "plain_distinct2": distinct_n(plain_texts, 2),
            "plain_user_nll": float(base["user_nll"].mean()),
            "plain_neutral_nll": float(base["neutral_nll"].mean()),
            "examples": len(examples),
            "users": len(set(own.users)),
            "neutral_examples": len(general.users),
            "metric_name": metric.label,
            "better": metric.better,
        }
    )


def _of_texts(
    examples: Sequence[Example], metric: Metric, texts: Sequence[str], plain: Sequence[str]
) -> dict[str, Any]:
    """Numbers of the answers at one strength, one an example; of all together `distinct2`."""
    pairs = list(zip(texts, plain, strict=True))
    return {
        "metric": np.array([metric.score(e, t) for e, t in zip(examples, texts, strict=True)]),
        "repetition": np.array([repetition(text) for text in texts]),
        "agreement": np.array([float(text == before) for text, before in pairs]),
        "word_agreement": np.array([_shared_words(*pair) for pair in pairs]),
        "distinct2": distinct_n(texts, 2),
    }


def _shared_words(text: str, before: str) -> float:
    """Share of the longer text's words that stand at the same place in the other."""
    a, b = text.split(), before.split()
    same = sum(x == y for x, y in zip(a, b, strict=False))
    return same / max(len(a), len(b)) if a or b else 1.0


def _with_ends(
    name: str, values: NDArray[np.floating[Any]], users: Sequence[str], seed: int
) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """Means [gamma] of values [gamma, example] with their ends; a number of all stays alone."""
    if values.ndim == 1:
        yield name, values.astype(np.float64)
        return
    found = stats.bootstrap_mean(values.T, users, seed=seed)
    yield from zip((name, f"{name}_low", f"{name}_high"), found, strict=True)


# In words


def lines(table: xr.Dataset) -> list[str]:
    """At which strengths steering is shown to gain and to cost, a task and class a line.

    The last line says by what an effect is named.
    """
    said = []
    alpha = 1 - table.attrs["level"]
    for task in table["task"].values.tolist():
        for cls in table["cls"].values.tolist():
            row = table.sel(task=task, cls=cls)
            better = (
                ("better", "worse") if row["better"].item() == "higher" else ("worse", "better")
            )
            gain = _shown(row, "gain", alpha, better) or _none(row, "gain", alpha, "effect")
            cost = _shown(row, "neutral_nll", alpha, ("higher", "lower")) or _none(
                row, "neutral_nll", alpha, "change"
            )
            said.append(
                f"{task}, steered with {called(cls)} heads: {row['metric_name'].item()}: {gain}; "
                f"loss on neutral text: {cost}; at gamma = {row['gamma'].values[-1]:g}, "
                f"{float(row['agreement'][-1]):.0%} of the answers are the plain model's."
            )
    return [*said, tested_line(table)]


def _none(row: xr.Dataset, name: str, alpha: float, what: str) -> str:
    p = unnamed(row, name, alpha)
    return f"no {what} shown at any gamma" + f" (smallest {p})" * bool(p)


def _shown(row: xr.Dataset, name: str, alpha: float, words: tuple[str, str]) -> str:
    """The strengths at which a number is shown to lie above or below 0; the largest with ends."""
    value, low, high = (row[f"{name}{end}"].values for end in ("", "_low", "_high"))
    gammas = row["gamma"].values
    parts = []
    for word, found in zip(words, shown(row, name, alpha), strict=True):
        if found.any():
            last = int(np.flatnonzero(found)[-1])
            at = ", ".join(f"{gamma:g}" for gamma in gammas[found])
            span = within(low[last], high[last])
            parts.append(
                f"{word} at gamma = {at}, by {value[last]:+.3f} at {gammas[last]:g} {span}"
            )
    return " and ".join(parts)
