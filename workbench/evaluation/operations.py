"""What one generation costs in operations, plain and steered, counted from a model's shape.

A generation of n tokens is a pass over the prompt, which gives the first of them, and n - 1 passes
of one token each with all before it in the cache. Logits are made at the last position only.
What the ways to decode add to that:

- `dps, shared`: the second view starts from the prompt's cache, so its passes are the prompt's
  last token and the n - 1 tokens after it. The released code's way.
- `dps, masked`: the second view reads the prompt by itself. The equation's way.
- either of them, `low once`: below the lowest gated head both views are the same, so the blocks
  there run once. The head's own block runs for both.
- `cad`: the second view reads the prompt without the profile, a query.

Counted are matrix products, 2·m·n·k operations each, as `workbench.discovery.work` counts them:
every query with every key of a pass, also where a mask is between them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from workbench.discovery.shapes import Block, Shape
from workbench.errors import InputError

PLAIN, SHARED, MASKED, CAD = "plain", "dps, shared", "dps, masked", "cad"
ONCE = ", low once"


@dataclass(frozen=True)
class Cost:
    """What a way to decode costs.

    Attributes:
        way: See the module's table of ways.
        prompt: Tokens of the prompt.
        operations: Of one generation.
        ratio: To those of plain decoding.
    """

    way: str
    prompt: int
    operations: int
    ratio: float


def shape_from(described: Mapping[str, Any]) -> Shape:
    """A shape back from the mapping that `dataclasses.asdict` made of it.

    Raises:
        InputError: It lacks a field, or has one that this version doesn't know.
    """
    try:
        blocks = tuple(Block(**block) for block in described["blocks"])
        return Shape(**{**described, "blocks": blocks})
    except (TypeError, KeyError) as error:
        raise InputError(
            f"the manifest's `shape` can't be read ({error}); evaluate again with this version"
        ) from None


def forward(shape: Shape, new: int, keys: int, first: int = 0) -> int:
    """Operations of a pass over new tokens, with logits at the last one.

    Args:
        shape: The model.
        new: Tokens fed.
        keys: Tokens that the cache then holds, the new ones among them.
        first: The block it starts in; those below were run before.
    """
    return 2 * shape.d_model * shape.vocabulary + sum(
        _block(block, new, keys) for block in shape.blocks[first:]
    )


def _block(block: Block, new: int, keys: int) -> int:
    weights = 2 * block.query + block.key_value + block.mixer + block.mlp
    # A window's cache forgets, but a pass over a longer prompt multiplies before it masks.
    seen = keys if block.window is None else max(new, min(keys, block.window))
    return 2 * new * weights + 4 * block.heads * block.head_dim * new * seen


def generation(shape: Shape, prompt: int, new_tokens: int, first: int = 0) -> int:
    """Operations of one generation by one view.

    Args:
        shape: The model.
        prompt: Tokens of the prompt.
        new_tokens: Tokens written.
        first: The block it starts in; those below were run before.
    """
    return forward(shape, prompt, prompt, first) + _steps(shape, prompt, new_tokens - 1, first)


def _steps(shape: Shape, before: int, steps: int, first: int) -> int:
    return sum(forward(shape, 1, before + step, first) for step in range(1, steps + 1))


def costs(
    shape: Shape,
    prompts: Sequence[int],
    new_tokens: int,
    *,
    lowest: int | None = None,
    query: int = 64,
) -> list[Cost]:
    """What every way to decode costs.

    Args:
        shape: The model.
        prompts: Tokens of the prompt, a generation each.
        new_tokens: Tokens written.
        lowest: The block of the lowest gated head; None or 0, which has no block below it, leaves
            out the ways that run blocks once.
        query: Tokens of CAD's prompt without the profile; never more than the prompt.

    Raises:
        InputError: A number isn't positive, or there is no block `lowest`.
    """
    if new_tokens < 1 or query < 1 or any(prompt < 1 for prompt in prompts):
        raise InputError(
            f"prompts, new tokens and the query must be >= 1, got {list(prompts)}, {new_tokens} "
            f"and {query}"
        )
    if lowest is not None and not 0 <= lowest < shape.layers:
        raise InputError(f"the lowest head must be in block 0 to {shape.layers - 1}, got {lowest}")
    found = []
    for prompt in prompts:
        plain = generation(shape, prompt, new_tokens)
        ways = {PLAIN: 0, SHARED: _steps(shape, prompt - 1, new_tokens, 0)}
        if lowest:
            ways[SHARED + ONCE] = _steps(shape, prompt - 1, new_tokens, lowest)
        ways[MASKED] = plain
        if lowest:
            ways[MASKED + ONCE] = generation(shape, prompt, new_tokens, lowest)
        ways[CAD] = generation(shape, min(query, prompt), new_tokens)
        for way, more in ways.items():
            found.append(Cost(way, prompt, plain + more, (plain + more) / plain))
    return found
