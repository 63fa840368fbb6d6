"""How many tokens a pass may hold, from the memory at hand."""

from __future__ import annotations

import ctypes
import sys
from typing import TYPE_CHECKING

import psutil
import torch

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # as malloc.h numbers them
SHARE = 0.4  # of what is free; blocks of memory come and go, and other programs need some
# Past this, larger passes gain nothing: on a CPU they leave its caches, a GPU is busy by then.
MOST = {"cpu": 4096, "cuda": 65536}


def keep_freed_memory() -> None:
    """Have glibc keep the pages of freed tensors for the next ones.

    By default it hands large blocks back at once and has each page of the next one cleared: a
    fifth of replay's time on a CPU. The price is that the process stays as large as it once was,
    so this is for programs of the workbench's own, not for a notebook that imports it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**30)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def free_memory(device: torch.device) -> int:
    """Bytes that tensors on a device may still take."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    # torch keeps the memory of freed tensors, and the driver counts it as taken.
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + kept


def tokens_that_fit(model: TransformerBridge) -> int:
    """Most tokens for a pass, padding counted.

    Memory of a token: what a block holds at once (about 12 times the residual stream's width and
    3 times the MLP's), and the clean pass's residual stream, z and attention output of every
    block. An estimate; where it is too high, the run halves it and goes on.
    """
    config = model.cfg
    device = torch.device(config.device)
    free = free_memory(device)
    mlp = getattr(config, "d_mlp", None) or 4 * config.d_model
    values = 12 * config.d_model + 3 * mlp + 3 * config.n_layers * config.d_model
    fits = int(SHARE * free / (values * config.dtype.itemsize))
    return max(256, min(fits, MOST.get(device.type, MOST["cpu"])))
