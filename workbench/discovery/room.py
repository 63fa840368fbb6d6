"""How many tokens a pass may hold, from the memory at hand."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psutil
import torch

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

SHARE = 0.4  # of what is free; blocks of memory come and go, and other programs need some
# Past this, larger passes gain nothing: on a CPU they leave its caches, a GPU is busy by then.
MOST = {"cpu": 4096, "cuda": 65536}


def tokens_that_fit(model: TransformerBridge) -> int:
    """Most tokens for a pass, padding counted.

    Memory of a token: what a block holds at once (about 12 times the residual stream's width and
    3 times the MLP's), and the clean pass's residual stream, z and attention output of every
    block. An estimate; where it is too high, the run halves it and goes on.
    """
    config = model.cfg
    device = torch.device(config.device)
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = psutil.virtual_memory().available
    mlp = getattr(config, "d_mlp", None) or 4 * config.d_model
    values = 12 * config.d_model + 3 * mlp + 3 * config.n_layers * config.d_model
    fits = int(SHARE * free / (values * config.dtype.itemsize))
    return max(256, min(fits, MOST.get(device.type, MOST["cpu"])))
