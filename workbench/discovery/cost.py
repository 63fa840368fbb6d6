"""What PCS costs: operations, bytes and time, counted from a model's shape before anything runs.

PCS of a head is the loss without the head minus the loss, so every head of every example asks for
a pass of its own. The ways to make those passes, of P tokens of which the last T are target:

- `loop`: one head and one example a pass, logits at all P positions; TransformerLens as it comes.
- `reference`: batches of examples, logits at T + 1 positions (`ablation.py`).
- `replay`: one clean pass; then for a head of layer l only what the head can change: its share of
  the output projection, the MLP of block l (not where MLP and attention are parallel), the blocks
  after it, and in the last block no more than keys and values at all positions and the rest at
  the T positions that predict the target. Exact.
- `attribution`: one pass forward and one backward to z, for all heads at once. An estimate.
- `screened`: attribution, then replay for candidates and for audited heads, spread evenly over
  the layers.

Counted are matrix products, 2·m·n·k operations each. `loop` and `reference` run the bridge's eager
attention, which makes every product of a query with a key and stores the pattern; the others use
a fused kernel that stores none. `minimum` counts causal pairs only. Examples are counted as if none
shared its beginning with another; where they do, replay runs that beginning once and takes less.

Element-wise work is counted as bytes read and written, by the model stated in `work.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from workbench.discovery.shapes import Block, Shape
from workbench.discovery.work import EAGER, work
from workbench.errors import InputError

METHODS = ("loop", "reference", "replay", "attribution", "screened")


@dataclass(frozen=True)
class Operations:
    """Operations for one example.

    Attributes:
        clean: The passes with no head ablated, and the pass backward.
        blocks: Products with weights, with a head ablated.
        attention: Queries with keys and patterns with values, with a head ablated.
        unembedding: Logits, with a head ablated.
    """

    clean: float
    blocks: float
    attention: float
    unembedding: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.clean + self.blocks + self.attention + self.unembedding


@dataclass(frozen=True)
class Traffic:
    """What one example costs beside operations.

    Attributes:
        bytes: Moved by element-wise work.
        weights: Bytes of weights read; an example's share, as the rows of a pass read them once.
        calls: Kernels started; an example's share.
    """

    bytes: float
    weights: float
    calls: float


@dataclass(frozen=True)
class Machine:
    """What a device sustains; measured by `workbench bench`, or assumed.

    Attributes:
        rate: Operations a second in products with weights.
        bandwidth: Bytes a second in element-wise work and in reading weights.
        call_seconds: What it costs to start a kernel from a model's modules, seconds.
        attention_rate: Operations a second in products of two activations, every query with
            every key counted. The width of a head bounds it, and heads are narrow; None for
            `rate`.
        hooked_call_seconds: What it costs to start a kernel from TransformerLens, which comes by
            hooks between any two; None for `call_seconds`.
    """

    rate: float
    bandwidth: float
    call_seconds: float
    attention_rate: float | None = None
    hooked_call_seconds: float | None = None

    def __post_init__(self) -> None:
        if not self.rate > 0:
            raise InputError(f"the rate must be > 0 TFLOP/s, got {self.rate / 1e12:g}")
        if not self.bandwidth > 0:
            raise InputError(f"the bandwidth must be > 0 GB/s, got {self.bandwidth / 1e9:g}")
        if not self.call_seconds >= 0:
            raise InputError(f"the seconds a call must be >= 0, got {self.call_seconds:g}")


def assumed_machine(dtype: str) -> Machine:
    """A guess for one H100: 40 % of what its data sheet says for products, 60 % for memory.

    Args:
        dtype: Of the weights: `float32` runs on the general cores, the others on tensor cores.

    Source:
        NVIDIA's data sheet of the H100 SXM: 989 TFLOP/s dense in bfloat16 and float16, 67 in
        float32, 3,350 GB/s. The shares and 10 microseconds a kernel, which is about what starting
        one from Python costs, are assumptions; `workbench bench` measures a machine.
    """
    peak = 67e12 if dtype == "float32" else 989e12
    return Machine(rate=0.4 * peak, bandwidth=0.6 * 3350e9, call_seconds=1e-5)


@dataclass(frozen=True)
class Passes:
    """Passes for one example: whole ones, ones from an ablated head on, and ones backward."""

    full: int
    part: int = 0
    back: int = 0


@dataclass(frozen=True)
class Memory:
    """Bytes held at once.

    Attributes:
        weights: All parameters.
        kept: Activations kept over the clean pass: z, the residual that enters a block and the
            attention's output for replay; what autograd saves for attribution.
        working: The largest set of tensors alive inside one block or around the logits.
    """

    weights: float
    kept: float
    working: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.weights + self.kept + self.working


def screened_heads(shape: Shape, k: int) -> int:
    """Heads that `screened` replays by default: half again K, or K + 8, and K/4 to audit."""
    return min(sum(shape.heads), max(k + 8, -(-3 * k // 2)) + max(2, round(k / 4)))


def passes(shape: Shape, method: str, replayed: int = 0) -> Passes:
    """Passes for one example.

    Args:
        shape: The model.
        method: One of `METHODS`.
        replayed: Heads that `screened` replays.
    """
    heads = sum(shape.heads)
    return {
        "loop": Passes(heads + 1),
        "reference": Passes(heads + 1),
        "replay": Passes(1, heads),
        "attribution": Passes(1, 0, 1),
        "screened": Passes(2, replayed, 1),
    }[method]


def operations(
    shape: Shape,
    method: str,
    tokens: int,
    target: int,
    *,
    replayed: int = 0,
    causal: bool = False,
) -> Operations:
    """Operations for one example, all heads.

    Args:
        shape: The model.
        method: One of `METHODS`.
        tokens: Tokens of prompt and target.
        target: Tokens of the target.
        replayed: Heads that `screened` replays.
        causal: Count only pairs that the causal mask and the window let through, as no kernel
            does wholly; False counts every query with every key.

    Raises:
        InputError: `tokens` doesn't hold the target and a token before it, or is more than the
            model's context.
    """
    _check(shape, method, tokens, target, replayed)
    clean, ablated = work(shape, method, tokens, target, replayed, causal)
    return Operations(
        clean.products + clean.attention + clean.unembedding,
        ablated.products,
        ablated.attention,
        ablated.unembedding,
    )


def minimum(shape: Shape, tokens: int, target: int) -> Operations:
    """What exact PCS of every head can't avoid while examples share no beginning.

    That is `replay` with the pairs of query and key that the masks let through, and no others.
    """
    return operations(shape, "replay", tokens, target, causal=True)


def traffic(
    shape: Shape, method: str, tokens: int, target: int, *, rows: int = 1, replayed: int = 0
) -> Traffic:
    """Bytes and calls for one example, all heads.

    Args:
        shape: The model.
        method: One of `METHODS`.
        tokens: Tokens of prompt and target.
        target: Tokens of the target.
        rows: Rows of a pass, which share its reading of the weights and its calls; `loop` has 1.
        replayed: Heads that `screened` replays.
    """
    _check(shape, method, tokens, target, replayed)
    clean, ablated = work(shape, method, tokens, target, replayed, False)
    both = clean + ablated
    share = 1 if method == "loop" else rows
    return Traffic(both.bytes, both.weights / share, both.calls / share)


def seconds(
    shape: Shape,
    method: str,
    tokens: int,
    target: int,
    machine: Machine,
    *,
    batch_tokens: int = 8192,
    replayed: int = 0,
) -> float:
    """Estimated seconds for one example on one device.

    Operations, bytes and calls are taken to follow one another, as kernels do on one stream; a
    device that overlaps them is faster. Loading the model is not in it.

    Args:
        shape: The model.
        method: One of `METHODS`.
        tokens: Tokens of prompt and target.
        target: Tokens of the target.
        machine: What the device sustains.
        batch_tokens: Most tokens in a pass.
        replayed: Heads that `screened` replays.
    """
    _check(shape, method, tokens, target, replayed)
    moved = traffic(
        shape, method, tokens, target, rows=max(1, batch_tokens // tokens), replayed=replayed
    )
    clean, ablated = work(shape, method, tokens, target, replayed, False)
    both = clean + ablated
    call = machine.call_seconds
    if method in EAGER and machine.hooked_call_seconds is not None:
        call = machine.hooked_call_seconds
    return (
        (both.products + both.unembedding) / machine.rate
        + both.attention / (machine.attention_rate or machine.rate)
        + (moved.bytes + moved.weights) / machine.bandwidth
        + moved.calls * call
    )


def memory(shape: Shape, method: str, tokens: int, target: int, batch_tokens: int = 8192) -> Memory:
    """Bytes held at once by one process.

    Args:
        shape: The model.
        method: One of `METHODS`.
        tokens: Tokens of prompt and target.
        target: Tokens of the target.
        batch_tokens: Most tokens in a pass; one longer row still makes a pass.
    """
    _check(shape, method, tokens, target)
    rows = 1 if method == "loop" else max(1, batch_tokens // tokens)
    size = shape.itemsize
    logits = rows * (tokens if method == "loop" else target + 1) * shape.vocabulary * (size + 8)
    blocks = [_alive(shape, block, rows, tokens, method in EAGER) for block in shape.blocks]
    kept = 0.0
    if method in ("replay", "screened"):
        width = sum(block.heads * block.head_dim + 2 * shape.d_model for block in shape.blocks)
        kept = rows * tokens * width * size
    if method in ("attribution", "screened"):
        saved = sum(_saved(shape, block) for block in shape.blocks)
        kept = max(kept, rows * tokens * saved)
    return Memory(shape.parameters * size, kept, max(*blocks, logits))


def _check(shape: Shape, method: str, tokens: int, target: int, replayed: int = 0) -> None:
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; known are {', '.join(METHODS)}")
    if replayed > sum(shape.heads):
        raise ValueError(f"{replayed} heads to replay, and the model has {sum(shape.heads)}")
    if target < 1 or tokens < target + 1:
        raise InputError(
            f"{tokens} tokens can't hold a prompt and {target} target tokens: wanted a target of "
            "at least 1 and a token before it; give more --tokens or a shorter --target"
        )
    if shape.context is not None and tokens > shape.context:
        raise InputError(
            f"{tokens} tokens are more than the model's context of {shape.context}; give --tokens "
            f"{shape.context} or fewer"
        )


def _alive(shape: Shape, block: Block, rows: int, tokens: int, eager: bool) -> int:
    """Bytes alive at once inside a block: the residual and the larger of its two halves."""
    size, count = shape.itemsize, rows * tokens
    # The residual, its norm in float32 and in the model's dtype, and the branch.
    stream = count * block.d_model * (3 * size + 4)
    attention = count * (4 * block.heads + 2 * block.kv_heads) * block.head_dim * size
    if eager:  # scores, softmax in float32, pattern
        attention += block.heads * rows * tokens * tokens * (2 * size + 4)
    hidden = count * block.width * (block.active or 1) * size
    return stream + max(attention, hidden * (3 if block.gated else 2))


def _saved(shape: Shape, block: Block) -> int:
    """Bytes that autograd saves for a token of a block, no weight having a gradient.

    Norms save their input in float32 and what it was scaled to; attention its queries, keys,
    values and output; a gated MLP the activation's input and the product's two factors.
    """
    size = shape.itemsize
    attention = (2 * block.heads + 2 * block.kv_heads) * block.head_dim * size
    hidden = block.width * (block.active or 1) * size
    return shape.norms * block.d_model * (8 + size) + attention + hidden * (3 if block.gated else 1)
