"""How large a batch of answers may be, from the memory at hand, and what is said of one too large.

Scoring has a rule of its own in `discovery.room`: it keeps what every block computes, decoding
keeps keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from workbench.batches import takes_logits_to_keep
from workbench.discovery.room import free_memory
from workbench.discovery.scorer import is_out_of_memory
from workbench.errors import InputError

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

SHARE = 0.5  # of what is free; blocks of memory come and go, and other programs need some
# Past this, larger batches gain nothing: on a CPU they leave its caches, a GPU is busy by then.
MOST = {"cpu": 16384, "cuda": 65536}
LOGITS = 10  # float32 copies of a row's logits while views are joined and a token is chosen


class BatchTooLargeError(MemoryError):
    """Memory ran out in a batch of several examples; smaller batches may fit.

    Attributes:
        tokens: How many the batch was to hold.
    """

    def __init__(self, reason: str, tokens: int) -> None:
        super().__init__(reason)
        self.tokens = tokens


@dataclass(frozen=True)
class Room:
    """How much a batch may hold.

    Attributes:
        most: Most tokens: rows times prompt and new tokens.
        memory: Bytes it may take.
        token: Bytes that a token of a row takes.
        reading: Bytes that the logits of a row, or of an early layer read out of it, take.
    """

    most: int
    memory: float = math.inf
    token: float = 0.0
    reading: float = 0.0

    @classmethod
    def of(cls, model: TransformerBridge, shape: Sequence[int]) -> Room:
        """What the memory at hand allows.

        An estimate: keys and values of all blocks, what one block holds of the prompt at once
        (about 12 times the residual stream's width and 3 times the MLP's), and the logits.
        Attention that is written out takes more.

        Args:
            model: From `load_model`.
            shape: Number of heads in every block.
        """
        config, device = model.cfg, torch.device(model.cfg.device)
        mlp = getattr(config, "d_mlp", None) or 4 * config.d_model
        values = 12 * config.d_model + 3 * mlp
        if not takes_logits_to_keep(model):
            values += config.d_vocab  # of every token of the prompt
        return cls(
            MOST.get(device.type, MOST["cpu"]),
            SHARE * free_memory(device),
            cache_bytes(model, shape) + values * config.dtype.itemsize,
            LOGITS * torch.float32.itemsize * config.d_vocab,
        )

    def holds(self, rows: int, width: int, readings: int) -> bool:
        """Whether a batch fits.

        Args:
            rows: Its rows.
            width: Tokens of each, the new ones counted.
            readings: Rows of logits at a time.
        """
        bytes_taken = rows * width * self.token + readings * self.reading
        return rows * width <= self.most and bytes_taken <= self.memory


def cache_bytes(model: TransformerBridge, shape: Sequence[int]) -> int:
    """Bytes that the keys and values of one token take, over all blocks with attention.

    Args:
        model: From `load_model`.
        shape: Number of query heads in every block.
    """
    config = model.cfg
    shared = getattr(config, "n_key_value_heads", None)
    heads = (min(count, shared or count) for count in shape)
    return int(2 * sum(heads) * config.d_head * config.dtype.itemsize)


@contextmanager
def batch_in_memory(names: Sequence[str], tokens: int) -> Iterator[None]:
    """Say of a batch for which memory runs out whether a smaller one is worth trying.

    Args:
        names: Its examples'.
        tokens: How many it is to hold.

    Raises:
        BatchTooLargeError: Memory ran out, and there are several examples.
        InputError: It ran out with a single one.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if len(names) > 1:
            raise BatchTooLargeError(reason, tokens) from error
        raise InputError(
            f"{names[0]}: out of memory with this example alone, {tokens:,} tokens in all its "
            f"views: {reason.rstrip('.')}. Lower --max-prompt-tokens, or take a smaller --dtype "
            "or another --device"
        ) from error
