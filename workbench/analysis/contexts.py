"""The same examples in several contexts: the profile further away, shorter, or behind turns.

The budget of a prompt would drop items from its end, and with them what a step is about. So the
user's least relevant items go where the largest step leaves no room, from all steps alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

from workbench.data.examples import Example, single_user_tasks
from workbench.data.prompts import Prompt, PromptSettings, build_prompts
from workbench.data.variants import (
    as_shown,
    with_first_items,
    with_strangers_between,
    with_turns,
)
from workbench.errors import InputError
from workbench.models import context_length

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Kind = Literal["distance", "length", "turns"]
SHORT = {
    "distance": "strangers' items between",
    "length": "items of the profile",
    "turns": "earlier turns",
}
STEPS = {"distance": (0, 1, 2, 4), "turns": (0, 1, 2, 3)}


@dataclass(frozen=True)
class Context:
    """All examples at one step.

    Attributes:
        examples: At this step.
        without: The same without the user's own items, with all that stands behind them.
        settings: Settings that show all items as they stand.
        prompts: Of `examples`.
        fewer: Of each example, whether own items are left out at every step for want of room.
        no_room: By task the number of examples left out at every step, which have no room for
            one own item at the largest, or for its turns.
        left_out: Tasks of which no example is left, and why.
    """

    examples: list[Example]
    without: list[Example]
    settings: PromptSettings
    prompts: list[Prompt]
    fewer: list[bool]
    no_room: dict[str, int]
    left_out: dict[str, str]


def steps_of(kind: str, steps: Sequence[int] | None, settings: PromptSettings) -> list[int]:
    """The steps of a kind in order, by default as `STEPS` or as many items as a prompt shows.

    Raises:
        InputError: The kind is unknown, or there is no step or a negative one.
    """
    if kind not in get_args(Kind):
        raise InputError(f"kind must be {', '.join(get_args(Kind))}, got {kind!r}")
    if steps is None:
        steps = STEPS.get(kind, (1, 2, 3, settings.items))
    numbers = sorted(set(steps))
    if not numbers or numbers[0] < 0:
        raise InputError(f"steps are one number >= 0 or more, got {list(steps)}")
    return numbers


def build_contexts(
    model: TransformerBridge,
    examples: Sequence[Example],
    kind: str,
    numbers: Sequence[int],
    settings: PromptSettings,
    seed: int,
) -> list[Context]:
    """The examples at every step.

    Args:
        model: Names the tokenizer and the context.
        examples: What is asked. Left out at every step are tasks with a single user where
            strangers are to come between, users with too few queries for the turns, and examples
            without room at the largest step.
        kind: Of `Kind`.
        numbers: The steps, in order.
        settings: Say which of the user's items are shown, and in what order.
        seed: Of the strangers drawn.

    Raises:
        InputError: There are no examples, too few strangers or turns, a prompt can't be built, or
            the largest step leaves no example room for an item of the user's own.
    """
    if not examples:
        raise InputError("no examples to score")
    tasks = list(dict.fromkeys(example.task for example in examples))
    examples, why = _that_can_take(examples, kind, numbers[-1])
    shown = as_shown(examples, settings)
    kept = _kept(model, _variant(shown, kind, numbers[-1], seed), shown, kind, settings)
    # Strangers and turns are drawn from all examples, those without room too.
    here = [i for i, number in enumerate(kept) if number is not None]
    no_room = Counter(shown[i].task for i, number in enumerate(kept) if number is None)
    there = {shown[i].task for i in here}
    why_gone = f"no example has room for the largest step, {numbers[-1]}"
    left_out = {task: why_gone if task in no_room else why for task in tasks if task not in there}
    whole = [shown[i] for i in here]
    rest = [number for number in kept if number is not None]
    own = _trimmed(whole, whole, rest)
    fewer = [len(a.profile) < len(b.profile) for a, b in zip(own, whole, strict=True)]
    found = []
    for number in numbers:
        every = _variant(shown, kind, number, seed)
        variant = _trimmed([every[i] for i in here], whole, rest)
        fixed = _fixed(settings, variant)
        prompts = build_prompts(variant, model.tokenizer, context_length(model), fixed)
        without = _trimmed(variant, own, [0] * len(own))
        found.append(Context(variant, without, fixed, prompts, fewer, dict(no_room), left_out))
    return found


def _that_can_take(
    examples: Sequence[Example], kind: str, number: int
) -> tuple[Sequence[Example], str]:
    """The examples for which there are strangers or turns, and why the others are not there."""
    if kind == "turns":
        return _with_turns_enough(examples, number), f"no user has {number + 1} queries of it"
    alone = single_user_tasks(examples) if kind == "distance" and number > 0 else []
    others = [example for example in examples if example.task not in alone]
    # Of nothing but lone users the strangers are missed by name.
    return others or examples, "it has a single user, and a stranger is another"


def _with_turns_enough(examples: Sequence[Example], turns: int) -> list[Example]:
    """The examples of users who have enough queries of a task for so many turns."""
    counts = Counter((example.task, example.user) for example in examples)
    kept = [example for example in examples if counts[example.task, example.user] > turns]
    if not kept:
        raise InputError(
            f"no user has the {turns + 1} queries of one task that {turns} earlier turns need; "
            "ask for fewer turns"
        )
    return kept


def _variant(shown: Sequence[Example], kind: str, number: int, seed: int) -> list[Example]:
    if kind == "distance":
        return with_strangers_between(shown, number, seed)
    return with_first_items(shown, number) if kind == "length" else with_turns(shown, number)


def _fixed(settings: PromptSettings, variant: Sequence[Example]) -> PromptSettings:
    """Settings that show all items as they stand."""
    most = max(len(example.profile) for example in variant)
    return replace(settings, ranking="first", items=most)


def _kept(
    model: TransformerBridge,
    variant: Sequence[Example],
    shown: Sequence[Example],
    kind: str,
    settings: PromptSettings,
) -> list[int | None]:
    """How many of its own items each example can show at the largest step, and so at all.

    None for an example that has none left, or of which the prompt has no room at all.
    """
    kept: list[int | None] = [len(example.profile) for example in shown]
    fixed = _fixed(settings, variant)
    open_ = list(range(len(shown)))
    while open_:
        numbers = [number for i in open_ if (number := kept[i]) is not None]
        trimmed = _trimmed([variant[i] for i in open_], [shown[i] for i in open_], numbers)
        prompts = _prompts(model, trimmed, [shown[i] for i in open_], fixed)
        too_full = []
        for i, number, one in zip(open_, numbers, prompts, strict=True):
            if one is None or (one.dropped_items and number <= one.dropped_items):
                kept[i] = None
            elif one.dropped_items:
                kept[i] = number - one.dropped_items
                too_full.append(i)
        open_ = too_full
    if all(number is None for number in kept):
        raise InputError(
            f"{shown[0].name}, {SHORT[kind]}: the prompt of the largest step has no room for an "
            "item of the user's own, nor has that of any other example; ask for less, or raise "
            "the budget as far as the model's context goes"
        )
    return kept


def _prompts(
    model: TransformerBridge,
    variant: Sequence[Example],
    shown: Sequence[Example],
    settings: PromptSettings,
) -> list[Prompt | None]:
    """The prompts; None where the step alone leaves no room for one.

    Raises:
        InputError: A prompt can't be built of the unchanged example either.
    """
    tokenizer, context = model.tokenizer, context_length(model)
    try:
        return list(build_prompts(variant, tokenizer, context, settings))
    except InputError:
        build_prompts(shown, tokenizer, context, settings)
    found: list[Prompt | None] = []
    for example in variant:
        try:
            found += build_prompts([example], tokenizer, context, settings)
        except InputError:
            found.append(None)
    return found


def _trimmed(
    variant: Sequence[Example], shown: Sequence[Example], kept: Sequence[int]
) -> list[Example]:
    """The variant with the first so many of the user's own items, which stand first."""
    return [
        replace(changed, profile=(*changed.profile[:number], *changed.profile[len(own.profile) :]))
        for changed, own, number in zip(variant, shown, kept, strict=True)
    ]
