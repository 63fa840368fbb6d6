"""Contrasts computed plainly: whole prompts, no cache, no batch, on separate copies of a model.

An answer is held against them step by step, so that a near tie of two tokens does not decide.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from plain import output_weights
from torch import Tensor
from torch.nn.functional import kl_div

from workbench.data.examples import Example, without_profile
from workbench.data.prompts import Prompt, build_prompts
from workbench.heads import Head, HeadSet
from workbench.steering.loop import Generation

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedModel

# Logits of size 10, each a sum of a few hundred products in float32, and a contrast that
# multiplies their rounding by 3 or 4.
ROUNDING = 2e-4


@contextmanager
def without(twin: PreTrainedModel, heads: Iterable[Head], shape: Sequence[int]) -> Iterator[None]:
    """The model with the rows of W_O of some heads zeroed, for the time of the block."""
    heads = list(heads)
    kept = {head.layer: output_weights(twin, head.layer).clone() for head in heads}
    for head in heads:
        output_weights(twin, head.layer).unflatten(0, (shape[head.layer], -1))[head.head] = 0
    try:
        yield
    finally:
        for layer, weights in kept.items():
            output_weights(twin, layer).copy_(weights)


def behind(twin: PreTrainedModel, prompt: Sequence[int], new: Sequence[int]) -> Tensor:
    """Logits that follow a prompt, and each of some tokens behind it: [1 + new, d_vocab]."""
    ids = torch.tensor([[*prompt, *new]])
    return twin(ids, use_cache=False).logits[0, len(prompt) - 1 :].float()


def gated(
    twin: PreTrainedModel,
    heads: HeadSet,
    shape: Sequence[int],
    prompt: Sequence[int],
    new: Sequence[int],
) -> Tensor:
    """The same for the model without some heads."""
    with without(twin, heads, shape):
        return behind(twin, prompt, new)


def prompts_of(model: TransformerBridge, rows: Sequence[Example], new: int) -> list[Prompt]:
    """Prompts that leave room for `new` tokens."""
    return build_prompts(rows, model.tokenizer, model.cfg.n_ctx, new_tokens=new)


def bare_prompts_of(model: TransformerBridge, rows: Sequence[Example], new: int) -> list[Prompt]:
    """The same without the profiles."""
    return prompts_of(model, without_profile(rows), new)


def check_answer(
    answer: Generation, joined: Tensor, plain: Tensor, ends: set[int], atol: float = ROUNDING
) -> None:
    """Every token is the likeliest of `joined` but for rounding, and what is kept of it is right.

    Args:
        answer: What was written greedily.
        joined: Contrasted logits at every step, [steps or more, d_vocab].
        plain: The plain model's.
        ends: Ids that end a text.
        atol: In nats.
    """
    steps = len(answer.tokens) + answer.finished
    assert len(answer.logprobs) == len(answer.kl) == steps
    joined, plain = joined.log_softmax(-1), plain.log_softmax(-1)
    for step in range(steps):
        if step < len(answer.tokens):
            token = answer.tokens[step]
            assert token not in ends
        else:
            token = max(ends, key=lambda end: float(joined[step, end]))
        where = f"{answer.example.name}, step {step}"
        assert joined[step].max() - joined[step, token] <= atol, where
        assert abs(plain[step, token] - answer.logprobs[step]) <= atol, where
        moved = kl_div(plain[step], joined[step].exp(), reduction="sum")  # 0 where a token is out
        assert abs(moved - answer.kl[step]) <= atol * max(1, float(moved)), where
