"""Deciding a classification or rating by the likelihood of each label, not by writing.

1. The prompts are read once, in every view of the contrast.
2. The labels are fed token by token behind them; labels that begin alike share their rows.
3. A label's score is the sum of its tokens' log-probabilities under the joined distribution.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from tqdm.auto import tqdm

from workbench.data.examples import Example
from workbench.data.prompts import PromptSettings, build_prompts
from workbench.data.tasks import get_task
from workbench.errors import InputError
from workbench.models import context_length
from workbench.steering.contrast import Contrast
from workbench.steering.engines import open_engine
from workbench.steering.loop import Contrasts, Work, contrasts_of, refuse_nan
from workbench.steering.native import Prefill
from workbench.steering.prompts import PromptCache, Tokens
from workbench.steering.room import batch_in_memory

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True)
class Decision:
    """Which label is likeliest.

    Attributes:
        example: Whose.
        label: The likeliest under the joined distribution. The plain model's likelihood breaks ties
            (a plausibility cut may rule out every label), then the task's order.
        log_probs: Log-probability of each label under it, in nats, summed over its tokens.
        plain: The same under the plain model.
        kl: By how many nats the first token's distribution was moved.
        ties: How many other labels are exactly as likely.
    """

    example: Example
    label: str
    log_probs: Mapping[str, float]
    plain: Mapping[str, float]
    kl: float
    ties: int


def decide(
    model: TransformerBridge,
    examples: Sequence[Example],
    contrast: Contrasts = None,
    *,
    prompt: PromptSettings | None = None,
    prefill: Prefill = "masked",
    batch_tokens: int | None = None,
    prompts: PromptCache | None = None,
    progress: bool = False,
) -> list[Decision]:
    """Decide every example by the likelihood of its task's labels.

    The likelihood is a label's own, not divided by its length: that of reading exactly this
    label next. It says nothing of whether the model would write a label at all.

    Args:
        model: From `load_model`.
        examples: What to decide, of tasks that have labels.
        contrast: As `generate` takes it.
        prompt: How prompts are built.
        prefill: As `generate` takes it.
        batch_tokens: As `generate` takes it; an example counts as often as it has rows at the step
            at which most labels go on.
        prompts: As `generate` takes it.
        progress: Show a bar on the terminal.

    Raises:
        InputError: A task has no labels, or one label's tokens begin another's, so that their
            likelihoods can't be compared; or what `generate` refuses.
        BatchTooLargeError: As `generate` does.
    """
    kept = PromptCache(model) if prompts is None else prompts
    answers: dict[int, Decision] = {}
    contrasts = contrasts_of(examples, contrast)
    firsts = {example.task: example for example in reversed(examples)}
    sets = {
        task: kept.labels(task, prompt, partial(label_tokens, model, firsts[task], prompt))
        for task in dict.fromkeys(example.task for example in examples)
    }
    with tqdm(total=len(examples), desc="deciding", unit="ex", disable=not progress) as bar:
        for task, labels in sets.items():
            places = [i for i, example in enumerate(examples) if example.task == task]
            asked = [examples[i] for i in places]
            longest = max(map(len, labels.values()))
            given: list[Contrast | None] = [contrasts[i] for i in places]
            work = Work(model, asked, given, longest, prompt, kept)
            _check_spelling(work, labels)
            for batch in work.batches(batch_tokens, _most_rows(labels)):
                at = batch.positions
                with batch_in_memory(work.names(at), batch.tokens):
                    found = _decide(work, at, labels, prefill)
                answers.update((places[i], one) for i, one in zip(at, found, strict=True))
                bar.update(len(at))
    return [answers[i] for i in range(len(examples))]


def label_tokens(
    model: TransformerBridge, example: Example, prompt: PromptSettings | None = None
) -> dict[str, Tokens]:
    """The tokens of each label of an example's task, as they stand behind its prompt.

    Raises:
        InputError: The task has no labels, or one label's tokens begin another's.
    """
    names = get_task(example.task).labels
    if not names:
        raise InputError(f"{example.task} has no labels to decide between; let it be written")
    built = build_prompts(
        [replace(example, target=name) for name in names],
        model.tokenizer,
        context_length(model),
        prompt,
    )
    labels = {name: one.target_ids for name, one in zip(names, built, strict=True)}
    for name, ids in labels.items():
        for other, longer in labels.items():
            if name != other and longer[: len(ids)] == ids:
                raise InputError(
                    f"{example.task}: the label {name!r} has the tokens that {other!r} begins "
                    "with, so their likelihoods can't be compared; let the answers be written "
                    "(--decide generate)"
                )
    return labels


def _check_spelling(work: Work, labels: Mapping[str, Tokens]) -> None:
    """Labels are spelled once a task; a prompt that ends otherwise may spell them otherwise."""
    for prompt in work.prompts:
        spelled = labels.get(prompt.example.target, prompt.target_ids)
        if spelled != prompt.target_ids:
            raise InputError(
                f"{prompt.example.name}: behind this prompt the labels have other tokens than "
                "behind the task's first one; let the answers be written (--decide generate)"
            )


def _most_rows(labels: Mapping[str, Tokens]) -> int:
    """Rows that an example has at the step at which most beginnings of labels go on."""
    longest = max(map(len, labels.values()))
    beginnings = ({ids[:n] for ids in labels.values() if len(ids) > n} for n in range(longest))
    return max(map(len, beginnings))


@torch.inference_mode()
def _decide(
    work: Work, positions: Sequence[int], labels: Mapping[str, Tokens], prefill: Prefill
) -> list[Decision]:
    """One batch of one task."""
    session = work.begin(positions, prefill, open_engine(work.model))
    nodes: list[tuple[int, Tokens]] = [(row, ()) for row in range(len(positions))]
    joined: dict[tuple[int, Tokens], float] = {}
    plain: dict[tuple[int, Tokens], float] = {}
    views = session.start()
    first: list[float] = []
    while True:
        refuse_nan(views, session.layout, work.names([positions[row] for row, _ in nodes]))
        step = session.layout.join(views)
        first = first or step.kl.tolist()
        reached = [
            (at, row, prefix, token)
            for at, (row, prefix) in enumerate(nodes)
            for token in _next(labels, prefix)
        ]
        tables = (joined, step.logits), (plain, views.full.float())
        for table, logits in tables:
            log_probs = logits.log_softmax(dim=-1)
            # Picked out where they are: a vocabulary's worth of each row is much to move.
            picked = log_probs[[at for at, *_ in reached], [token for *_, token in reached]]
            for (_, row, prefix, token), value in zip(reached, picked.tolist(), strict=True):
                table[row, (*prefix, token)] = table.get((row, prefix), 0.0) + value
        longer = [
            (at, (row, (*prefix, token)))
            for at, row, prefix, token in reached
            if _next(labels, (*prefix, token))
        ]
        if not longer:
            break
        session.select([at for at, _ in longer])
        nodes = [node for _, node in longer]
        fed = torch.tensor([prefix[-1] for _, prefix in nodes], device=session.device)
        views = session.step(fed)
    return [
        _decision(work.examples[position], row, labels, joined, plain, first[row])
        for row, position in enumerate(positions)
    ]


def _next(labels: Mapping[str, Tokens], prefix: Tokens) -> list[int]:
    """The tokens with which labels go on behind a beginning."""
    depth = len(prefix)
    return list(
        dict.fromkeys(
            ids[depth] for ids in labels.values() if len(ids) > depth and ids[:depth] == prefix
        )
    )


def _decision(
    example: Example,
    row: int,
    labels: Mapping[str, Tokens],
    joined: Mapping[tuple[int, Tokens], float],
    plain: Mapping[tuple[int, Tokens], float],
    kl: float,
) -> Decision:
    scores = {name: joined[row, ids] for name, ids in labels.items()}
    unmoved = {name: plain[row, ids] for name, ids in labels.items()}
    best = max(scores, key=lambda name: (scores[name], unmoved[name]))
    ties = sum(score == scores[best] for score in scores.values()) - 1
    return Decision(example, best, scores, unmoved, kl, ties)
