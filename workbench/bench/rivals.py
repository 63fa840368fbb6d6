"""Other ways of decoding the same prompts, as their users run them, with a watch on each step.

- `TransformerLens`: `TransformerBridge.generate` with its cache.
- `Hugging Face generate`: the checkpoint's own class, with no hook of the workbench in it.
- `two passes`: DPS as the released code runs it: a row at a time, one unmasked pass over all but
  the prompt's last token, its cache copied twice, and then two passes a token, one after the
  other. That code hides the heads in another way; here z of the heads is zeroed by a hook at the
  output projection, which costs next to nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, StoppingCriteria

from workbench.bench.clock import wait
from workbench.data.prompts import Prompt
from workbench.discovery.twin import build_twin
from workbench.heads import HeadSet

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedModel


class Watch(StoppingCriteria):
    """Notes the time after every step; stops nothing.

    Both libraries call their stopping criteria once a token. The first interval holds the prompt.

    Args:
        device: What is waited for.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.stamps = [time.perf_counter()]

    def stamp(self) -> None:
        """A step is done."""
        wait(self.device)
        self.stamps.append(time.perf_counter())

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        """As a stopping criterion: no row is done."""
        self.stamp()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    @property
    def seconds(self) -> list[float]:
        """Of every step."""
        pairs = zip(self.stamps, self.stamps[1:], strict=False)
        return [after - before for before, after in pairs]


@dataclass(frozen=True)
class Written:
    """What one call wrote, and when.

    Attributes:
        tokens: Of each row.
        first: Seconds until all rows had their first token; a row's mean where rows go alone.
        steps: Seconds of each later step; a row's where rows go alone.
    """

    tokens: list[list[int]]
    first: float
    steps: list[float] = field(default_factory=list)


Writer = Callable[[Sequence[Prompt], int], Written]


def own_modules(model: TransformerBridge) -> PreTrainedModel:
    """The checkpoint's own class around the bridge's tensors, as Transformers runs it by default.

    Its attention is torch's kernel; no end-of-text token stops it.
    """
    native: Any = build_twin(model, "sdpa")
    native.generation_config = GenerationConfig()
    return native


def _ids(prompts: Sequence[Prompt], device: str) -> Tensor:
    return torch.tensor([prompt.ids for prompt in prompts], device=device)


def transformer_lens(model: TransformerBridge) -> Writer:
    """Through the bridge; prompts of one length."""
    device = str(model.cfg.device)

    def write(prompts: Sequence[Prompt], new: int) -> Written:
        watch, ids = Watch(device), _ids(prompts, device)
        written: Any = model.generate(
            ids,
            max_new_tokens=new,
            do_sample=False,
            stop_at_eos=False,
            return_type="tokens",
            verbose=False,
            stopping_criteria=watch,
        )
        return Written(written[:, ids.shape[1] :].tolist(), watch.seconds[0], watch.seconds[1:])

    return write


def hugging_face(native: PreTrainedModel) -> Writer:
    """By Transformers' own loop; prompts of one length."""
    device = str(native.device)

    def write(prompts: Sequence[Prompt], new: int) -> Written:
        watch, ids = Watch(device), _ids(prompts, device)
        written: Any = native.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=[watch],
        )
        return Written(written[:, ids.shape[1] :].tolist(), watch.seconds[0], watch.seconds[1:])

    return write


def two_passes(native: PreTrainedModel, heads: HeadSet, gamma: float) -> Writer:
    """DPS with two caches, a row at a time; Llama's layout."""
    device = str(native.device)
    count = native.config.num_attention_heads
    gates = torch.from_numpy(heads.gates([count] * native.config.num_hidden_layers)).to(
        device, native.dtype
    )

    def step(token: Tensor, cache: DynamicCache) -> Tensor:
        logits: Tensor = native(token, past_key_values=cache, use_cache=True).logits[:, -1]
        return logits.float()

    def row(prompt: Prompt, new: int, watch: Watch) -> list[int]:
        ids = _ids([prompt], device)
        cache = DynamicCache(config=native.config)
        native(ids[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
        whole, without = deepcopy(cache), deepcopy(cache)
        token, written = ids[:, -1:], []
        for _ in range(new):
            full = step(token, whole)
            with _gated(native, gates):
                ablated = step(token, without)
            token = (full + gamma * (full - ablated)).argmax(dim=-1, keepdim=True)
            written.append(int(token))
            watch.stamp()
        return written

    @torch.inference_mode()
    def write(prompts: Sequence[Prompt], new: int) -> Written:
        tokens, firsts, steps = [], [], []
        for prompt in prompts:
            watch = Watch(device)
            tokens.append(row(prompt, new, watch))
            first, *later = watch.seconds
            firsts.append(first)
            steps += later
        return Written(tokens, mean(firsts), steps)

    return write


@contextmanager
def _gated(native: PreTrainedModel, gates: Tensor) -> Iterator[None]:
    """Multiply z of every head by its gate, [layer, head]."""

    def hook(gate: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        def scale(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            z = args[0].unflatten(-1, (len(gate), -1))
            return ((z * gate[:, None]).flatten(-2),)

        return scale

    with ExitStack() as stack:
        for layer in (gates != 1).any(dim=-1).nonzero()[:, 0].tolist():
            output = native.get_submodule(f"model.layers.{layer}.self_attn.o_proj")
            handle = output.register_forward_pre_hook(hook(gates[layer]))
            stack.callback(handle.remove)
        yield
