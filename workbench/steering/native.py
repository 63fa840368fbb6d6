"""Decoding by the checkpoint's own modules: every view of every row in one forward pass.

The twin of `discovery.twin` runs with a cache, as in Transformers' own decoding, and two things
are done to it:

1. The input of an output projection, z, is gated in the rows (or positions) of the views that go
   without some heads.
2. Below the lowest gated head both views of an example are the same, so the blocks there run the
   example's row alone; in front of the block that holds that head the rows are doubled. Caches
   below hold a row an example, caches above a row a view.

With `prefill="shared"` both views start from the same cache of the prompt, as in the released
code. They are then not rows but neighbouring positions of one row: the prompt's keys and values
are stored and read once for both, and a mask keeps the views from seeing each other's tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.discovery.twin import ReadOut, build_twin, places
from workbench.hooks import gate_z
from workbench.steering.attention import ATTENTION

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Prefill = Literal["masked", "shared"]
MASKS = ("attention_mask", "causal_mask")
BY_HEAD = ("position_bias",)  # MPT's: its first dimension is heads, and may be as long as a batch


@dataclass
class Pass:
    """What is done to the modules in one forward pass.

    Attributes:
        split: The block in front of which views are told apart; None for no doubling.
        widen: A block's tensor of [rows, ...] to that of all views.
        mask: Takes the place of the blocks' mask from the split on, [rows, 1, queries, keys]; None
            for the model's own.
        scales: What z is multiplied by, block by block, [rows, pos, head, 1].
        exits: Blocks whose input is kept.
        column: At which position.
        seen: Those inputs, [rows, d_model].
        memo: What was widened already, by the identity of the tensor.
    """

    split: int | None = None
    widen: Callable[[Tensor], Tensor] = field(default=lambda tensor: tensor)
    mask: Tensor | None = None
    scales: dict[int, Tensor] = field(default_factory=dict)
    exits: tuple[int, ...] = ()
    column: int = -1
    seen: dict[int, Tensor] = field(default_factory=dict)
    memo: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def wide(self, name: str, value: Any) -> Any:
        """A block's argument for all views."""
        if isinstance(value, tuple):
            return tuple(self.wide(name, part) for part in value)
        if name in MASKS and self.mask is not None:
            return self.mask
        if not isinstance(value, Tensor) or name in BY_HEAD:
            return value
        # Blocks without attention take their mask as [rows, pos].
        if value.ndim < 3 and not (name == "position_ids" or name.endswith("mask")):
            return value
        if id(value) not in self.memo:
            self.memo[id(value)] = value, self.widen(value)
        return self.memo[id(value)][1]


class Native:
    """The checkpoint's own modules around a bridge's tensors, ready to decode several views.

    Args:
        model: From `load_model`. Its tensors are used, not copied.
        attention: The attention function that the model runs with.
        splits: Whether views may be told apart in the middle of the model, not at its input.

    Raises:
        NotReplayableError: The model isn't laid out as this needs it.
    """

    def __init__(
        self, model: TransformerBridge, attention: str = ATTENTION, splits: bool = True
    ) -> None:
        self.twin = build_twin(model, attention)
        self.places = places(model, self.twin)
        self.splits = splits
        self.shape = tuple(place.heads for place in self.places)
        self.device = torch.device(model.cfg.device)
        takes = inspect.signature(self.twin.forward).parameters
        self.dtype = next(self.twin.parameters()).dtype
        self.adds_masks = attention == "eager"
        self.takes_positions = "position_ids" in takes
        self.keeps = "logits_to_keep" in takes
        self._now: Pass | None = None
        self.read_out = ReadOut(self.twin)
        self._tails: dict[int, int] = {}
        for layer, place in enumerate(self.places):
            place.block.__dict__["forward"] = self._block(layer, place.block)
            if place.output is not None:
                place.output.register_forward_pre_hook(self._at_z(layer, place.heads))

    def _block(self, layer: int, block: nn.Module) -> Callable[..., Any]:
        native = block.forward
        names = list(inspect.signature(native).parameters)

        def forward(*args: Any, **kwargs: Any) -> Any:
            kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
            hidden = kwargs.pop("hidden_states")
            if self.read_out.hidden is not None:  # nothing runs but what follows the last block
                last = layer == len(self.places) - 1
                return self._like(layer, self.read_out.hidden if last else hidden)
            now = self._now
            if now is None:
                return native(hidden, **kwargs)
            if layer in now.exits:
                now.seen[layer] = hidden[:, now.column]
            if now.split is not None and layer >= now.split:
                if layer == now.split:
                    hidden = now.widen(hidden)
                kwargs = {name: now.wide(name, value) for name, value in kwargs.items()}
            out = native(hidden, **kwargs)
            self._tails[layer] = len(out) if isinstance(out, tuple) else 0
            return out

        return forward

    def _like(self, layer: int, hidden: Tensor) -> Any:
        length = self._tails[layer]
        return (hidden, *(None,) * (length - 1)) if length else hidden

    def _at_z(self, layer: int, heads: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            if self._now is None or layer not in self._now.scales:
                return None
            z = args[0].unflatten(-1, (heads, -1))
            return (gate_z(z, self._now.scales[layer].to(z)).flatten(-2), *args[1:])

        return hook

    def run(self, now: Pass, keep: int, **inputs: Any) -> Float[Tensor, "rows keep d_vocab"]:
        """One forward pass; logits of the last positions."""
        self._now = now
        options = {"logits_to_keep": keep} if self.keeps else {}
        if not self.takes_positions:
            inputs.pop("position_ids", None)
        try:
            logits: Tensor = self.twin(**inputs, use_cache=True, **options).logits
        finally:
            self._now = None
        return logits[:, -keep:]
