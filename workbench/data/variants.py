"""The same queries and targets in other contexts: further from the profile, behind less of it,
later in a conversation.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

from workbench.data.examples import Example
from workbench.data.prompts import PromptSettings
from workbench.data.retrieval import rank_profile
from workbench.errors import InputError

Item = Mapping[str, str]


def as_shown(examples: Sequence[Example], settings: PromptSettings) -> list[Example]:
    """The examples with no more of their profile than a prompt shows, in that order.

    A prompt that shows `first` items then has these, whatever is put behind them.
    """
    shown = (rank_profile(e, settings.items, settings.ranking) for e in examples)
    return [
        replace(e, profile=tuple(e.profile[i] for i in positions))
        for e, positions in zip(examples, shown, strict=True)
    ]


def with_first_items(examples: Sequence[Example], number: int) -> list[Example]:
    """The examples with the first items of their profile only; shorter profiles stay whole."""
    return [replace(example, profile=example.profile[:number]) for example in examples]


def with_strangers_between(
    examples: Sequence[Example], number: int, seed: int = 0
) -> list[Example]:
    """The user's own items, and behind them items of strangers, so that the query is further off.

    Args:
        examples: What to change.
        number: How many strangers' items.
        seed: Of the draw. A user's strangers are the same for all queries of a task, and those of
            a smaller number are among those of a larger one, which adds further ones behind them.

    Returns:
        The examples, with profiles that end in other users' items of the same task.

    Raises:
        InputError: The other users of a task have too few items.
    """
    pools: dict[str, dict[str, tuple[Item, ...]]] = {}
    for example in examples:
        pools.setdefault(example.task, {}).setdefault(example.user, example.profile)
    drawn: dict[tuple[str, str], tuple[Item, ...]] = {}
    for task, profiles in pools.items():
        pool = [(user, item) for user, items in profiles.items() for item in items]
        for user, items in profiles.items():
            if len(pool) - len(items) < number:
                raise InputError(
                    f"{task}: {number} items of strangers are to stand behind those of {user}, and "
                    f"there are {len(pool) - len(items)}; load more users or ask for fewer"
                )
            drawn[task, user] = _draw(pool, user, number, random.Random(f"{seed}/{task}/{user}"))
    return [replace(e, profile=(*e.profile, *drawn[e.task, e.user])) for e in examples]


def _draw(
    pool: Sequence[tuple[str, Item]], user: str, number: int, rng: random.Random
) -> tuple[Item, ...]:
    """Different items of others, one by one: what is drawn first doesn't depend on the number."""
    places: dict[int, Item] = {}
    while len(places) < number:
        place = rng.randrange(len(pool))
        if pool[place][0] != user:
            places[place] = pool[place][1]
    return tuple(places.values())


def with_turns(examples: Sequence[Example], number: int) -> list[Example]:
    """The examples behind earlier turns of a conversation with the same user.

    The turns are the user's queries of the same task that come before this one, with the gold
    answers; before the first query comes the last one again, so that every query can have any
    number of others before it.

    Args:
        examples: What to change.
        number: How many turns; fewer are the last of more.

    Raises:
        InputError: A user has too few queries of a task.
    """
    groups: dict[tuple[str, str], list[Example]] = {}
    for example in examples:
        groups.setdefault((example.task, example.user), []).append(example)
    found = {}
    for (task, user), queries in groups.items():
        if len(queries) <= number:
            raise InputError(
                f"{user} has {len(queries)} queries of {task}, and {number} turns need "
                f"{number + 1}; keep the users with enough of them or ask for fewer turns"
            )
        for place, example in enumerate(queries):
            before = [queries[place - back] for back in range(number, 0, -1)]
            found[example.name] = replace(
                example, turns=tuple((other.query, other.target) for other in before)
            )
    return [found[example.name] for example in examples]
