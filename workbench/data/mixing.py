"""Profiles in which a share of the items is somebody else's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from zlib import crc32

import numpy as np

from workbench.data.examples import Example
from workbench.errors import InputError

Item = Mapping[str, str]


def with_mixed_profile(examples: Sequence[Example], share: float, seed: int = 0) -> list[Example]:
    """The same queries and targets behind profiles with some items swapped for a stranger's.

    Places are kept, and a larger share swaps all that a smaller one does, so that shares differ in
    nothing else. One stranger of the same task, another for each user, stands in for as long as
    his items last, then the next; an item that the user has too is no stranger's. A prompt shows
    the items that suit the query best, which may be the user's own more often than the share says.

    Args:
        examples: Examples of two users or more in each task.
        share: Of each profile's items, from 0 to 1; rounded to whole items.
        seed: Of the places and of the strangers.

    Raises:
        InputError: The share is no fraction; a task has one user only; or the strangers have
            too few items.
    """
    if not 0 <= share <= 1:
        raise InputError(f"the share of swapped items must be from 0 to 1, got {share}")
    strangers = _strangers(examples, seed) if share > 0 else {}
    mixed = []
    for example in examples:
        profile = example.profile
        if number := swapped_items(example, share):
            profile = _swap(example, number, strangers[example.task, example.user], seed)
        mixed.append(replace(example, profile=profile))
    return mixed


def swapped_items(example: Example, share: float) -> int:
    """How many items of an example's profile a share comes to, halves rounded up."""
    return math.floor(share * len(example.profile) + 0.5)


def _strangers(examples: Sequence[Example], seed: int) -> dict[tuple[str, str], list[Item]]:
    """For each task and user the items of all its other users, from the next user on."""
    tasks: dict[str, dict[str, list[Item]]] = {}
    for example in examples:
        # A user's rows may have profiles cut to different items.
        items = tasks.setdefault(example.task, {}).setdefault(example.user, [])
        items += [item for item in example.profile if item not in items]
    pools = {}
    for task, by_user in tasks.items():
        if len(by_user) < 2:
            raise InputError(f"{task}: a stranger's items need two users, got one; take more users")
        rng = np.random.default_rng([seed, crc32(task.encode())])
        order = [list(by_user)[i] for i in rng.permutation(len(by_user))]
        shuffled = {u: [by_user[u][i] for i in rng.permutation(len(by_user[u]))] for u in order}
        for place, user in enumerate(order):
            others = order[place + 1 :] + order[:place]
            pools[task, user] = [item for other in others for item in shuffled[other]]
    return pools


def _swap(example: Example, number: int, pool: list[Item], seed: int) -> tuple[Item, ...]:
    """The profile with so many items replaced by the first of the pool that aren't in it."""
    profile = list(example.profile)
    foreign: list[Item] = []
    for item in pool:
        if len(foreign) == number:
            break
        if item not in example.profile and item not in foreign:
            foreign.append(item)
    if len(foreign) < number:
        raise InputError(
            f"{example.name}: {number} items of its profile are to be swapped, and the task's "
            f"other users have {len(foreign)} others; take more users or a smaller share"
        )
    # The same places in all rows of a user whose profiles are equally long.
    words = f"{example.task}/{example.user}".encode()
    places = np.random.default_rng([seed, crc32(words)]).permutation(len(profile))[:number]
    for place, item in zip(places.tolist(), foreign, strict=True):
        profile[place] = item
    return tuple(profile)
