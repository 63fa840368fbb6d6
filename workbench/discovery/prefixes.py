"""Which prompts begin with the same tokens, and how much of that is worth sharing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

SHORTEST = 16  # tokens; a shorter beginning costs more to keep than to run again
LEAST_SHARE = 0.25  # of its members' tokens, which a group must save


def shared_prefixes(
    ids: Sequence[Sequence[int]], limits: Sequence[int], *, enabled: bool = True
) -> Iterator[tuple[int, list[int]]]:
    """Divide prompts into groups behind a shared beginning.

    Args:
        ids: Token ids of each prompt with its target.
        limits: Most of each prompt's tokens that may belong to the beginning.
        enabled: Without, nothing is shared.

    Yields:
        Number of tokens shared, and the positions in `ids` of those that share them, sorted by
        length; last of all the prompts that share nothing, behind a beginning of 0 tokens.
    """
    alone: list[int] = []
    if not enabled:
        alone = list(range(len(ids)))
    else:
        # In lexical order whatever shares a beginning stands side by side.
        order = sorted(range(len(ids)), key=lambda i: tuple(ids[i]))
        while order:
            length, size = _best_run(ids, limits, order)
            members, order = order[:size], order[size:]
            if size == 1:
                alone += members
            else:
                yield length, sorted(members, key=lambda i: len(ids[i]))
    if alone:
        yield 0, sorted(alone, key=lambda i: len(ids[i]))


def _best_run(
    ids: Sequence[Sequence[int]], limits: Sequence[int], order: Sequence[int]
) -> tuple[int, int]:
    """Shared length and number of the first prompts of `order` that save most together."""
    best, saved = (0, 1), 0
    length = limits[order[0]]
    total = len(ids[order[0]])
    for count, i in enumerate(order[1:], start=2):
        length = min(_common(ids[order[0]], ids[i], length), limits[i])
        total += len(ids[i])
        # Too short to pay for anything: an instruction that all prompts begin with, say. To go
        # on through thousands of them would take longer than the model.
        if length < max(SHORTEST, LEAST_SHARE * len(ids[order[0]])):
            break
        saving = length * (count - 1)
        if saving > saved and saving >= LEAST_SHARE * total:
            best, saved = (length, count), saving
    return best


def _common(first: Sequence[int], second: Sequence[int], most: int) -> int:
    for i in range(min(most, len(second))):
        if first[i] != second[i]:
            return i
    return min(most, len(second))
