"""Prompts as padded batches, and the loss on their targets.

Rows are padded on the left: the targets of all rows then end in the last column, so that logits
are needed for the last few positions only. The attention mask must go with the tokens; the
bridge derives position ids from it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.data.prompts import Prompt
from workbench.errors import InputError
from workbench.models import pad_token

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True)
class Batch:
    """Rows of prompt and target, padded on the left.

    Attributes:
        tokens: Token ids.
        attention_mask: 1 at tokens, 0 at padding.
        target_mask: True at the target tokens that count in the loss.
    """

    tokens: Int[Tensor, "batch pos"]
    attention_mask: Int[Tensor, "batch pos"]
    target_mask: Bool[Tensor, "batch pos"]

    @property
    def longest_target(self) -> int:
        """How many of the last columns hold every target token that counts."""
        columns = self.target_mask.any(dim=0).nonzero()
        return self.target_mask.shape[1] - int(columns[0]) if len(columns) else 0


def collate(prompts: Sequence[Prompt], pad: int, device: torch.device | str) -> Batch:
    """Pad prompts, each followed by its target, on the left."""
    rows = [(*prompt.ids, *prompt.target_ids) for prompt in prompts]
    length = max(map(len, rows))
    tokens = torch.full((len(rows), length), pad, dtype=torch.long)
    attention = torch.zeros_like(tokens)
    target = torch.zeros((len(rows), length), dtype=torch.bool)
    for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        tokens[i, length - len(row) :] = torch.tensor(row)
        attention[i, length - len(row) :] = 1
        first = length - len(prompt.target_ids)
        target[i, [first + position for position in prompt.scored]] = True
    return Batch(tokens.to(device), attention.to(device), target.to(device))


def by_length(
    model: TransformerBridge, prompts: Sequence[Prompt], batch_tokens: int
) -> Iterator[tuple[list[int], Batch]]:
    """Batches of prompts of similar length, on the model's device.

    Args:
        model: Names the padding token and the device.
        prompts: What to batch.
        batch_tokens: Most tokens in a batch, padding counted; a single longer prompt still makes
            a batch of its own.

    Yields:
        The positions of the rows in `prompts`, and the batch.
    """
    lengths = [len(prompt.ids) + len(prompt.target_ids) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: lengths[i])
    while order:
        # Sorted by length, so the last row of a batch is its longest and sets the width.
        count = 1
        while count < len(order) and lengths[order[count]] * (count + 1) <= batch_tokens:
            count += 1
        rows, order = order[:count], order[count:]
        yield rows, collate([prompts[i] for i in rows], pad_token(model), model.cfg.device)


def takes_logits_to_keep(model: TransformerBridge) -> bool:
    """Whether the model can compute logits for the last positions only."""
    return "logits_to_keep" in inspect.signature(model.original_model.forward).parameters


def last_logits(
    model: TransformerBridge, batch: Batch, positions: int
) -> Float[Tensor, "batch positions d_vocab"]:
    """Logits of the last positions of a batch, as the model gives them."""
    options = {"logits_to_keep": positions} if takes_logits_to_keep(model) else {}
    logits = model(
        batch.tokens, attention_mask=batch.attention_mask, return_type="logits", **options
    )
    return logits[:, -positions:]


def target_nll(
    logits: Float[Tensor, "batch kept d_vocab"], batch: Batch
) -> Float[Tensor, " batch"]:
    """Mean negative log-likelihood of the target tokens that count.

    Args:
        logits: Unnormalised, of the last `kept` positions, at least one more than the longest
            target; position p predicts token p + 1. Taken to float32 first.
        batch: The rows that the logits belong to.

    Returns:
        Nats per target token, one a row.

    Raises:
        ValueError: A row has no target token, or `kept` doesn't cover the targets.

    Source:
        Section 3 of the paper, the loss that PCS is a difference of. The released code takes it
        in bfloat16, which makes every score a multiple of 1/64 nat.
    """
    counts = batch.target_mask.sum(dim=1)
    if bool((counts == 0).any()):
        raise ValueError(f"row {int((counts == 0).nonzero()[0])} has no target token")
    kept = logits.shape[1]
    if kept <= batch.longest_target:
        raise ValueError(f"{kept} positions don't cover a target of {batch.longest_target} tokens")
    log_probs = logits[:, :-1].float().log_softmax(dim=-1)
    tokens = batch.tokens[:, 1 - kept :]
    chosen = log_probs.gather(-1, tokens[..., None])[..., 0]
    mask = batch.target_mask[:, 1 - kept :]
    return -(chosen * mask).sum(dim=1) / counts


@torch.inference_mode()
def batch_nll(model: TransformerBridge, batch: Batch) -> Float[Tensor, " batch"]:
    """`target_nll` of one forward pass, under whatever hooks are in place."""
    return target_nll(last_logits(model, batch, batch.longest_target + 1), batch)


def losses(
    model: TransformerBridge, prompts: Sequence[Prompt], batch_tokens: int = 8192
) -> Float[Tensor, " prompt"]:
    """`target_nll` of many prompts, in their order, float32 on the CPU.

    Raises:
        InputError: A loss is NaN or infinite; the message names the example.
    """
    result = torch.empty(len(prompts))
    for rows, batch in by_length(model, prompts, batch_tokens):
        result[rows] = batch_nll(model, batch).cpu()
    if not bool(result.isfinite().all()):
        first = prompts[int((~result.isfinite()).nonzero()[0])].example.name
        raise InputError(f"{first}: the model's loss is NaN or infinite; try --dtype float32")
    return result
