"""The model as Transformers runs it, sharing the bridge's tensors.

The bridge computes attention eagerly, with hooks at every step, so that everything can be looked
at. Replay looks at three things only and needs speed, so it runs the same weights through the
checkpoint's own modules: the class of the bridged model is built anew without storage, and every
parameter and buffer in it is the very tensor that the bridge holds. No memory is spent on a
second copy of the weights.

Where blocks, attention and output projections lie in those modules is what the bridge's
architecture adapter says; no model's forward pass is written down here.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.models import heads_per_layer

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

WRAPPED = "._original_component"


class NotReplayableError(Exception):
    """The fast engine can't run this model; the message says why."""


@dataclass(frozen=True)
class Place:
    """The modules of one block.

    Attributes:
        block: The whole block.
        attention: Its attention; None where it has none.
        output: The attention's output projection, whose input is z.
        query: The query projection where it is a module of its own.
        heads: Number of query heads.
    """

    block: nn.Module
    attention: nn.Module | None = None
    output: nn.Module | None = None
    query: nn.Module | None = None
    heads: int = 0


def build_twin(model: TransformerBridge, attention: str) -> nn.Module:
    """The checkpoint's own class, around the tensors that the bridge holds.

    Args:
        model: From `load_model`.
        attention: Name of an attention function registered with Transformers.

    Raises:
        NotReplayableError: The class can't be built from its config alone, or holds a tensor
            that the bridge doesn't.
    """
    original = model.original_model
    config = copy.deepcopy(original.config)
    config.output_attentions = False  # as checkpoints have it; the bridge switches it on
    try:
        with torch.device("meta"):
            twin = type(original)._from_config(config, attn_implementation=attention)
    except (ValueError, LookupError, TypeError, ImportError, RuntimeError) as error:
        first = str(error).strip().split("\n")[0]
        raise NotReplayableError(f"its class can't be built anew: {first}") from error
    _share(twin, dict(_tensors(original)))
    return twin.eval()


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    held = (module.named_parameters, module.named_buffers)
    for name, tensor in chain.from_iterable(named(remove_duplicate=False) for named in held):
        yield name.replace(WRAPPED, ""), tensor


def _share(twin: nn.Module, tensors: dict[str, Tensor]) -> None:
    for prefix, module in twin.named_modules():
        slots: dict[str, Any]
        for slots in (module._parameters, module._buffers):
            for name, placeholder in slots.items():
                if placeholder is None:
                    continue
                path = f"{prefix}.{name}" if prefix else name
                found = tensors.get(path)
                if found is None or found.shape != placeholder.shape:
                    raise NotReplayableError(f"the bridge holds no tensor for {path}")
                slots[name] = found


def places(model: TransformerBridge, twin: nn.Module) -> list[Place]:
    """Where each block's parts lie in the twin, by the names that the bridge's adapter gives.

    Raises:
        NotReplayableError: A part isn't where the adapter says.
    """
    shape = heads_per_layer(model)
    root = model.adapter.component_mapping["blocks"].name
    result = []
    try:
        for layer, heads in enumerate(shape):
            block = twin.get_submodule(f"{root}.{layer}")
            if not heads:
                result.append(Place(block))
                continue
            bridge: Any = model.blocks[layer].attn
            attention = block.get_submodule(bridge.name)
            names = {key: part.name for key, part in bridge.submodules.items() if part.name}
            output = attention.get_submodule(names["o"])
            # Where one projection makes queries, keys and values, the bridge's `q` is no module.
            query = dict(attention.named_children()).get(names.get("q", ""))
            result.append(Place(block, attention, output, query, heads))
    except (AttributeError, KeyError) as error:
        raise NotReplayableError(
            f"block {len(result)} isn't laid out as expected: {error}"
        ) from error
    return result


class ReadOut:
    """What a model's last norm and unembedding make of a residual stream: its own forward pass.

    Whoever controls the blocks of the twin hands `hidden` on behind the last one while it is set,
    and runs none of them.

    Args:
        twin: From `build_twin`.
    """

    def __init__(self, twin: nn.Module) -> None:
        self.twin = twin
        self.hidden: Tensor | None = None

    def __call__(
        self, hidden: Float[Tensor, "rows pos d_model"]
    ) -> Float[Tensor, "rows pos d_vocab"]:
        """Logits of residual streams at any positions."""
        self.hidden = hidden
        try:
            blank = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
            logits: Tensor = self.twin(input_ids=blank, use_cache=False).logits
            return logits
        finally:
            self.hidden = None
