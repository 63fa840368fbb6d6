"""What a pass consists of: operations, bytes and kernel calls of a block, of the logits, and of the
passes that each method of PCS makes for one example.

Counted are matrix products, 2·m·n·k operations each; element-wise work is counted as bytes.
`cost.py` says what the methods are and makes numbers for a person of this.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass

from workbench.discovery.shapes import Block, Shape

EAGER = ("loop", "reference")

# Bytes. An element-wise kernel reads its inputs and writes its output once, nothing stays in a
# cache between two kernels, and no compiler fuses them: Transformers' modules as they are. In
# elements of the model's dtype and of float32, for every element of the tensor named.
NORM = (4, 7)  # to float32, square, mean, scale, back, times the weight
RESIDUAL = (3, 0)  # two read, one written
ROTARY = (10, 0)  # of queries and keys: negate, join, two products, a sum
REPEAT = (1, 0)  # of keys and values, read for each group and written for each head
SCORES = (6, 2)  # eager attention: scale, mask, softmax into float32, back
GATED, PLAIN = (5, 0), (2, 0)  # activation and product; activation alone
LOGITS = (1, 3)  # to float32, log-softmax

# Kernels, one call each.
NORM_CALLS, ATTENTION_CALLS, EAGER_CALLS, MLP_CALLS, EXPERT_CALLS = 6, 15, 10, 4, 6
LOGIT_CALLS = 5


@dataclass(frozen=True)
class Work:
    """Work of a part of a pass; parts add up.

    Attributes:
        products: Operations of products with weights.
        attention: Operations of products of queries with keys and of patterns with values.
        unembedding: Operations that make logits.
        bytes: Moved by element-wise work.
        weights: Bytes of weights read, once for all rows of a pass.
        calls: Kernels started, once for all rows of a pass.
    """

    products: float = 0
    attention: float = 0
    unembedding: float = 0
    bytes: float = 0
    weights: float = 0
    calls: float = 0

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, times: float) -> Work:
        return Work(*(value * times for value in astuple(self)))


def work(
    shape: Shape, method: str, tokens: int, target: int, replayed: int, causal: bool
) -> tuple[Work, Work]:
    """Work for one example with no head ablated, and with each.

    Args:
        shape: The model.
        method: As in `cost.METHODS`.
        tokens: Tokens of prompt and target.
        target: Tokens of the target.
        replayed: Heads that `screened` replays.
        causal: Count only pairs of query and key that the causal mask and the window let through.
    """
    heads = sum(shape.heads)
    blocks = [_block(shape, b, tokens, tokens, causal, method in EAGER) for b in shape.blocks]
    wanted = tokens if method == "loop" else target + 1
    clean = _sum(blocks) + _logits(shape, wanted)
    if method in EAGER:
        return clean, clean * heads
    if method == "attribution":
        return clean + _backward(shape, blocks, tokens, target), Work()
    ablated = _replay(shape, blocks, tokens, target, causal)
    if method == "replay":
        return clean, ablated
    gradient = clean + _backward(shape, blocks, tokens, target)
    return gradient + clean, ablated * (replayed / heads)


def _replay(shape: Shape, blocks: list[Work], tokens: int, target: int, causal: bool) -> Work:
    """All heads replayed, from the last block to the first."""
    # After a block: everything that its heads can change in the blocks that follow.
    after = _logits(shape, target)
    total = Work()
    for layer in reversed(range(shape.layers)):
        block = shape.blocks[layer]
        last = layer == shape.layers - 1
        positions = target if last else tokens
        own = Work(
            products=2 * positions * block.head_dim * block.d_model,
            bytes=moved(shape, RESIDUAL, positions * block.d_model),
            weights=block.head_dim * block.d_model * shape.itemsize,
            calls=2,
        )
        if not shape.parallel:
            own += _mlp(shape, block, positions)
        total += (own + after) * block.heads
        after += _block(shape, block, tokens, target, causal, False) if last else blocks[layer]
    return total


def _backward(shape: Shape, blocks: list[Work], tokens: int, target: int) -> Work:
    """The gradient of the loss with respect to every head's z, and to no weight.

    A product with weights has one product behind it; one of two activations has two. Below the
    first block with heads no gradient is wanted, and in that block none past its z.
    """
    first = next(layer for layer, block in enumerate(shape.blocks) if block.heads)
    block = shape.blocks[first]
    result = Work(products=2 * tokens * block.query, calls=1) + _logits(shape, target + 1)
    if not shape.parallel:
        result += _mlp(shape, block, tokens)
    for part in blocks[first + 1 :]:
        result += part + Work(attention=part.attention, bytes=part.bytes, calls=part.calls)
    return result


def _block(
    shape: Shape, block: Block, tokens: int, positions: int, causal: bool, eager: bool
) -> Work:
    """A whole block, whose output is wanted at the last positions that matter.

    Keys and values are made at all tokens. With fewer positions than tokens they are those that
    predict the target, so the last token is not among them. What stands in place of attention in
    a hybrid runs at all tokens.
    """
    pairs = tokens * positions
    if causal:
        end = tokens if positions == tokens else tokens - 1
        window = block.window or tokens
        pairs = _seen(end, window) - _seen(end - positions, window)
    rotated = (block.heads * positions + block.kv_heads * tokens) * block.head_dim
    carried = moved(shape, ROTARY, rotated) + moved(shape, RESIDUAL, positions * block.d_model)
    if eager:
        carried += moved(shape, SCORES, block.heads * tokens * positions)
        if block.kv_heads < block.heads:
            repeated = 2 * (block.heads + block.kv_heads) * block.head_dim * tokens
            carried += moved(shape, REPEAT, repeated)
    matrices = 2 * block.query + block.key_value + block.mixer
    return _mlp(shape, block, positions) + Work(
        products=2 * (2 * block.query * positions + (block.key_value + block.mixer) * tokens),
        attention=4 * block.heads * block.head_dim * pairs,
        bytes=carried,
        weights=matrices * shape.itemsize,
        calls=ATTENTION_CALLS + EAGER_CALLS * eager,
    )


def _seen(positions: int, window: int) -> int:
    """Keys that the first positions see together: 1, 2, 3 and so on up to the window."""
    rising = min(positions, window)
    return rising * (rising + 1) // 2 + (positions - rising) * window


def _mlp(shape: Shape, block: Block, positions: int) -> Work:
    """The MLP of a block with the block's norms, which go with it in the count."""
    hidden = block.width * (block.active or 1) * positions
    stored = (block.experts or 1) * block.one_mlp + block.d_model * block.experts
    residual = positions * block.d_model
    return Work(
        products=2 * block.mlp * positions,
        bytes=moved(shape, GATED if block.gated else PLAIN, hidden)
        + moved(shape, NORM, shape.norms * residual)
        + moved(shape, RESIDUAL, residual),
        weights=stored * shape.itemsize,
        calls=MLP_CALLS + EXPERT_CALLS * block.experts + NORM_CALLS * shape.norms,
    )


def _logits(shape: Shape, positions: int) -> Work:
    return Work(
        unembedding=2 * positions * shape.d_model * shape.vocabulary,
        bytes=moved(shape, LOGITS, positions * shape.vocabulary)
        + moved(shape, NORM, positions * shape.d_model),
        weights=shape.d_model * shape.vocabulary * shape.itemsize,
        calls=LOGIT_CALLS + NORM_CALLS,
    )


def moved(shape: Shape, moves: tuple[int, int], elements: int) -> int:
    """Bytes that element-wise work moves, given as elements of the model's dtype and float32."""
    own, float32 = moves
    return (own * shape.itemsize + float32 * 4) * elements


def _sum(parts: Iterable[Work]) -> Work:
    return sum(parts, Work())
