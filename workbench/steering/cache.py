"""Keys and values that grow without being copied at every step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):
    """A cache layer with room for the tokens to come.

    Transformers' own joins old and new keys anew at every step: for a long prompt that moves more
    bytes than the step's attention reads.

    Args:
        room: Columns to keep free behind the first tokens.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.used = 0
        self.buffers: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append columns, and give all of them: views of the buffers."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before, self.used = self.used, self.used + key_states.shape[-2]
        if self.buffers is None or self.buffers[0].shape[-2] < self.used:
            self._grow(key_states, value_states, before)
        for buffer, states in zip(self.buffers or (), (key_states, value_states), strict=True):
            buffer[:, :, before : self.used] = states
        self._show()
        return self.keys, self.values

    def _grow(self, key_states: Tensor, value_states: Tensor, before: int) -> None:
        old = self.buffers or ()
        keys, values = (
            states.new_empty(*states.shape[:2], self.used + self.room, states.shape[-1])
            for states in (key_states, value_states)
        )
        self.buffers = keys, values
        for buffer, kept in zip(self.buffers, old, strict=False):
            buffer[:, :, :before] = kept[:, :, :before]

    def _show(self) -> None:
        keys, values = self.buffers or (None, None)
        if keys is not None and values is not None:
            self.keys, self.values = keys[:, :, : self.used], values[:, :, : self.used]

    def insert(self, other: RoomyLayer, at: int, offset: int) -> None:
        """Put another layer's rows among these, which hold as many columns or more.

        Args:
            other: The other layer; it isn't used again.
            at: In front of which row.
            offset: Columns of padding in front of its own.
        """
        if self.buffers is None or other.buffers is None:
            return
        mixed = []
        for own, new in zip(self.buffers, other.buffers, strict=True):
            rows = own.new_zeros(len(new), *own.shape[1:])
            rows[:, :, offset : self.used] = new[:, :, : other.used]
            mixed.append(torch.cat((own[:at], rows, own[at:])))
        self.buffers = mixed[0], mixed[1]
        self._show()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Keep some rows, in any order and as often as they are named."""
        if self.buffers is not None:
            keys, values = (buffer.index_select(0, beam_idx) for buffer in self.buffers)
            self.buffers = keys, values
            self._show()


def new_cache(config: Any, room: int, plain: bool = False) -> DynamicCache:
    """An empty cache of a model.

    Args:
        config: The model's.
        room: Tokens to come behind the prompt.
        plain: Keep all tokens in every layer, also where a layer looks back a window only.
    """
    cache = DynamicCache(config=config)
    cache.layers = [
        RoomyLayer(room) if type(layer) is DynamicLayer or plain else layer
        for layer in cache.layers
    ]
    return cache


def insert(cache: DynamicCache, other: DynamicCache, at: int, offset: int) -> None:
    """`RoomyLayer.insert` in every layer."""
    for layer, new in zip(cache.layers, other.layers, strict=True):
        layer.insert(new, at, offset)
