"""A batch being decoded: the caches of its views, step by step.

`MaskedSession` is the equation: every view reads the prompt by itself. `SharedSession` is the
released code's way: both views start from the plain model's cache of the prompt.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Int, Shaped
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from workbench.steering.cache import RoomyLayer, insert, new_cache
from workbench.steering.layout import Layout, Views
from workbench.steering.native import Native, Pass

WORTH = 0.25  # share of a prompt's columns that must be padding for a pass of its own to pay


class Session(ABC):
    """A batch being decoded.

    Args:
        device: Where it is decoded.
        rows: Token ids of the examples' prompts, and behind them those of `layout.others`.
        layout: The views.
        room: Most tokens to come.
        pad: A token for padding.
    """

    def __init__(
        self,
        device: torch.device,
        rows: Sequence[Sequence[int]],
        layout: Layout,
        room: int,
        pad: int,
    ) -> None:
        self.device = device
        self.rows = rows
        self.pad = pad
        self.layout = layout
        self.room = room
        width = max(map(len, rows))
        shape = (len(rows), width)
        tokens = torch.full(shape, pad, dtype=torch.long)
        mask = torch.zeros((len(rows), width + room), dtype=torch.long)
        for i, row in enumerate(rows):
            tokens[i, width - len(row) :] = torch.tensor(row)
            mask[i, width - len(row) :] = 1
        self.padded = any(len(row) != width for row in rows)
        self.tokens = tokens.to(device)
        self.mask = mask.to(device)
        self.lengths = torch.tensor([len(row) for row in rows], device=device)
        self.width = width

    @property
    def examples(self) -> int:
        """Number of examples."""
        return len(self.layout.contrasts)

    @abstractmethod
    def start(self) -> Views:
        """Read the prompts; the logits of the first new token."""

    @abstractmethod
    def step(self, tokens: Int[Tensor, " examples"]) -> Views:
        """Go on with a token an example; the logits of the next one."""

    @abstractmethod
    def select(self, examples: Sequence[int]) -> None:
        """Go on with some of the examples, in any order and as often as they are named."""

    def _fed(self, tokens: Int[Tensor, " examples"]) -> Int[Tensor, "rows 1"]:
        return tokens[[*range(self.examples), *self.layout.others]][:, None]


class NativeSession(Session):
    """A batch decoded by the checkpoint's own modules."""

    def __init__(
        self, native: Native, rows: Sequence[Sequence[int]], layout: Layout, room: int, pad: int
    ) -> None:
        super().__init__(native.device, rows, layout, room, pad)
        self.native = native

    def _spared(self, cache: DynamicCache) -> int:
        """Columns of padding that all other prompts begin with; 0 where it isn't worth a pass.

        A prompt without its profile is short: beside the others' it would be mostly padding.
        """
        others = self.lengths[self.examples :].tolist()
        spare = self.width - max(others, default=self.width)
        roomy = all(type(layer) is RoomyLayer for layer in cache.layers)
        return spare if roomy and spare >= WORTH * self.width else 0

    def _early(self, now: Pass) -> Tensor | None:
        if not now.exits:
            return None
        hidden = [now.seen[layer][: self.examples] for layer in now.exits]
        return self.native.read_out(torch.stack(hidden, dim=1))


class MaskedSession(NativeSession):
    """Every view reads the prompt by itself: a row a view."""

    def start(self) -> Views:
        """See `Session.start`."""
        self.cache = new_cache(self.native.twin.config, self.room)
        self._arrange()
        if spare := self._spared(self.cache):
            return self._start_apart(spare)
        positions = (self.mask[:, : self.width].cumsum(dim=1) - 1).clamp(min=0)
        return self._run(self.tokens, positions)

    def _start_apart(self, spare: int) -> Views:
        """Read the other prompts in a pass of their own; from the next step on all go together."""
        count, none = self.examples, [None] * len(self.layout.others)
        alone = replace(self.layout, others=(), uses=())
        plain = Layout.of(none, self.native.shape)
        main, side = (
            MaskedSession(self.native, rows, layout, self.room, self.pad)
            for rows, layout in ((self.rows[:count], alone), (self.rows[count:], plain))
        )
        views, others = main.start(), side.start().full
        insert(main.cache, side.cache, count, spare)
        self.cache = main.cache
        return Views(views.full, others, views.gated, views.early)

    def _arrange(self) -> None:
        """What depends on the rows only."""
        layout, device = self.layout, self.device
        self.split = layout.split if self.native.splits else (0 if layout.gated else None)
        narrow = self.examples + len(layout.others)
        self.narrow = narrow
        self.index = torch.tensor([*range(narrow), *layout.gated], device=device)
        self.scales = {}
        for layer, heads in enumerate(self.native.shape):
            gate = layout.gates[:, layer, :heads]
            if bool((gate != 1).any()):
                scale = torch.cat((torch.ones(narrow, heads), gate))
                self.scales[layer] = scale[:, None, :, None].to(device)

    def _widen(self, value: Tensor) -> Tensor:
        # One row serves all views by broadcasting; the residual stream itself is given in full.
        return value if len(value) != self.narrow else value[self.index]

    def _run(self, tokens: Tensor, positions: Tensor) -> Views:
        mask = self.mask[:, : self.width] if self.padded else None
        split: int | None = self.split
        if not self.native.splits and split is not None:
            tokens, positions = tokens[self.index], positions[self.index]
            mask, split = None if mask is None else mask[self.index], None
        now = Pass(split, self._widen, scales=self.scales, exits=self.layout.early)
        logits = self.native.run(
            now,
            1,
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
        )[:, 0]
        count = self.examples
        parts = logits[:count], logits[count : self.narrow], logits[self.narrow :]
        return Views(*parts, self._early(now))

    def step(self, tokens: Int[Tensor, " examples"]) -> Views:
        """See `Session.step`."""
        self.width += 1
        positions = self.lengths[:, None]
        self.lengths = self.lengths + 1
        return self._run(self._fed(tokens), positions)

    def select(self, examples: Sequence[int]) -> None:
        """See `Session.select`."""
        count = self.examples
        self.layout, others, gated = self.layout.select(examples)
        narrow = [*examples, *(count + row for row in others)]
        wide = [*narrow, *(self.narrow + row for row in gated)]
        device = self.device
        rows = torch.tensor(narrow, device=device)
        for layer, cached in enumerate(self.cache.layers):
            apart = self.split is not None and (layer >= self.split or not self.native.splits)
            cached.reorder_cache(torch.tensor(wide, device=device) if apart else rows)
        self.mask, self.lengths = self.mask[rows], self.lengths[rows]
        # Blocks below the old split hold a row an example, and stay so: the split may not move.
        split = self.split
        self._arrange()
        self.split = split if self.layout.gated else None


class SharedSession(NativeSession):
    """Both views start from the plain model's cache of the prompt: neighbouring positions."""

    def start(self) -> Views:
        """See `Session.start`; the prompt's last token is the first that the views differ in."""
        # All but the last token of each prompt, which stands in the last column.
        last, self.width = self.tokens[:, -1], self.width - 1
        self.seen = self.mask[:, : self.width].bool()
        self.cache = self._new_cache()
        if spare := self._spared(self.cache):
            self._read(self.cache, slice(self.examples), 0)
            others = self._new_cache()
            self._read(others, slice(self.examples, None), spare)
            insert(self.cache, others, self.examples, spare)
        else:
            self._read(self.cache, slice(None), 0)
        self.lengths = self.lengths - 1
        self.steps = 0
        self.slots = self._slots()
        self._arrange()
        return self._run(last[:, None])

    def _new_cache(self) -> DynamicCache:
        room = self._slots() * (self.room + 1)
        return new_cache(self.native.twin.config, room, plain=True)

    def _read(self, cache: DynamicCache, rows: slice, first: int) -> None:
        """Run some rows' prompts without their last token, from a column on."""
        mask = self.mask[rows, first : self.width]
        self.native.run(
            Pass(),
            1,
            input_ids=self.tokens[rows, first:-1],
            attention_mask=mask if self.padded else None,
            position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
            past_key_values=cache,
        )

    def _slots(self) -> int:
        """Positions a row: the plain view, and as many gated ones as an example has at most."""
        counts = [self.layout.gated.count(example) for example in set(self.layout.gated)]
        return 1 + max(counts, default=0)

    def _arrange(self) -> None:
        layout = self.layout
        self.split = layout.split if self.slots > 1 else None
        taken: dict[int, int] = {}
        self.slot = []
        for example in layout.gated:
            taken[example] = taken.get(example, 0) + 1
            self.slot.append(taken[example])
        rows = self.examples + len(layout.others)
        self.scales = {}
        for layer, heads in enumerate(self.native.shape):
            if bool((layout.gates[:, layer, :heads] != 1).any()):
                scale = torch.ones(rows, self.slots, heads)
                scale[list(layout.gated), self.slot] = layout.gates[:, layer, :heads]
                self.scales[layer] = scale[..., None].to(self.device)

    def _run(self, tokens: Int[Tensor, "rows 1"]) -> Views:
        self.steps += 1
        now = Pass(
            self.split,
            lambda value: value.repeat_interleave(self.slots, dim=1) if _is_step(value) else value,
            self._mask(self.slots) if self.split is not None else None,
            self.scales,
            self.layout.early,
            column=0,
        )
        logits = self.native.run(
            now,
            self.slots if self.split is not None else 1,
            input_ids=tokens,
            attention_mask=self._mask(1),
            position_ids=self.lengths[:, None],
            past_key_values=self.cache,
        )
        self.lengths = self.lengths + 1
        # GPT-2 folds positions into rows on its way out.
        logits = logits.reshape(len(tokens), -1, logits.shape[-1])
        count = self.examples
        gated = logits[list(self.layout.gated), self.slot] if self.layout.gated else logits[:0, 0]
        return Views(logits[:count, 0], logits[count:, 0], gated, self._early(now))

    def _mask(self, slots: int) -> Shaped[Tensor, "rows 1 slots keys"]:
        """The prompt, and behind it every step's token of the same view."""
        own = torch.eye(slots, dtype=torch.bool, device=self.seen.device).repeat(1, self.steps)
        rows = len(self.seen)
        prompt = self.seen[:, None].expand(rows, slots, -1)
        mask = torch.cat((prompt, own.expand(rows, -1, -1)), dim=-1)[:, None]
        if not self.native.adds_masks:
            return mask
        dtype = self.native.dtype
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)

    def step(self, tokens: Int[Tensor, " examples"]) -> Views:
        """See `Session.step`."""
        return self._run(self._fed(tokens))

    def select(self, examples: Sequence[int]) -> None:
        """See `Session.select`."""
        count, split = self.examples, self.split
        self.layout, others, _ = self.layout.select(examples)
        rows = torch.tensor([*examples, *(count + row for row in others)], device=self.seen.device)
        for cached in self.cache.layers:
            cached.reorder_cache(rows)
        self.seen, self.lengths = self.seen[rows], self.lengths[rows]
        self._arrange()
        self.split = split  # the caches above it go on with as many positions a step


def _is_step(value: Tensor) -> bool:
    return value.ndim > 1 and value.shape[1] == 1


def why_not_shared(native: Native, tokens: int) -> str | None:
    """Why two views can't share a prompt's cache as neighbouring positions; None if they can.

    Args:
        native: The modules.
        tokens: Most tokens that will be in the cache.
    """
    if not native.splits:
        return "its views can't be told apart in the middle of the model"
    if not native.takes_positions:
        return "it takes no position ids, so two tokens can't stand at one position"
    layers = new_cache(native.twin.config, 0).layers
    windows = [layer.sliding_window for layer in layers if getattr(layer, "is_sliding", False)]
    if windows and min(windows) < tokens:
        return f"its attention looks back {min(windows)} tokens only, fewer than {tokens}"
    if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers):
        return "not all that its blocks keep of a prompt is keys and values"
    return None
