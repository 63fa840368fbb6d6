"""The decoding loop: plain and steered rows in one batch, several users at once.

1. Every example is a row; every row with an active contrast has a second row with the same
   tokens, whose heads are gated, over the prompt too. One forward pass serves both.
2. The two rows' logits are joined by the contrast; the token chosen from them is fed to both.
3. A row that has met its end-of-text token is left as it is; the loop ends with the last row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from workbench.batches import collate, takes_logits_to_keep
from workbench.data.examples import Example
from workbench.data.prompts import Prompt, PromptSettings, build_prompts
from workbench.errors import InputError
from workbench.hooks import head_gates
from workbench.models import context_length, heads_per_layer, pad_token
from workbench.steering.contrast import DPS
from workbench.steering.rules import contrast_logits

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Contrast = DPS | Mapping[str, DPS] | Sequence[DPS] | None


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from logits.

    Attributes:
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_p: Sample from the fewest tokens whose probabilities reach this share.
        seed: Each example draws from a generator of its own, seeded by this and by its name, so
            that a text doesn't depend on which other texts are in the batch.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise InputError(f"temperature must be >= 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be in (0, 1], got {self.top_p}")


@dataclass(frozen=True)
class Generation:
    """What was written for one example.

    Attributes:
        example: Whose.
        text: The text, without special tokens.
        tokens: The ids, without the end-of-text token.
        finished: Whether the text ended by itself, before the limit of new tokens.
    """

    example: Example
    text: str
    tokens: tuple[int, ...]
    finished: bool


@overload
def generate(
    model: TransformerBridge,
    examples: Example,
    contrast: Contrast = None,
    *,
    max_new_tokens: int = ...,
    sampling: Sampling | None = ...,
    prompt: PromptSettings | None = ...,
    batch_tokens: int = ...,
    progress: bool = ...,
) -> Generation: ...


@overload
def generate(
    model: TransformerBridge,
    examples: Sequence[Example],
    contrast: Contrast = None,
    *,
    max_new_tokens: int = ...,
    sampling: Sampling | None = ...,
    prompt: PromptSettings | None = ...,
    batch_tokens: int = ...,
    progress: bool = ...,
) -> list[Generation]: ...


def generate(
    model: TransformerBridge,
    examples: Example | Sequence[Example],
    contrast: Contrast = None,
    *,
    max_new_tokens: int = 32,
    sampling: Sampling | None = None,
    prompt: PromptSettings | None = None,
    batch_tokens: int = 16384,
    progress: bool = False,
) -> Generation | list[Generation]:
    """Write an answer for every example, plain or steered.

    Args:
        model: From `load_model`.
        examples: What to answer, one or several; their targets are not shown to the model.
        contrast: A DPS for all rows, one for each user by name, one for each example in order,
            or None for the plain model. A gamma of 0 or an empty head set gives the plain
            model's tokens, exactly.
        max_new_tokens: Limit of new tokens.
        sampling: Greedy by default.
        prompt: How prompts are built.
        batch_tokens: Most tokens kept at a time: rows, second views counted, times prompt and new
            tokens. Lower it when memory is short.
        progress: Show a bar on the terminal.

    Returns:
        One generation an example, in the order given; for a single example just that one.

    Raises:
        InputError: A head is outside the model, a user has no contrast, a prompt leaves no room,
            or the logits hold NaN.

    Source:
        Section 4 of the paper. The released code runs one row at a time, two passes in a row,
        from copies of one unmasked cache.
    """
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be >= 1, got {max_new_tokens}")
    asked = [examples] if isinstance(examples, Example) else list(examples)
    contrasts = _contrasts(asked, contrast)
    for one in contrasts:
        if one is not None:
            one.heads.check(heads_per_layer(model))
    prompts = build_prompts(
        asked, model.tokenizer, context_length(model), prompt, new_tokens=max_new_tokens
    )
    written: dict[int, Generation] = {}
    loop = _Loop(model, sampling or Sampling(), max_new_tokens)
    with tqdm(total=len(prompts), desc="writing", unit="ex", disable=not progress) as bar:
        for positions in _in_batches(prompts, contrasts, max_new_tokens, batch_tokens):
            batch = [prompts[i] for i in positions]
            texts = loop.run(batch, [contrasts[i] for i in positions])
            written.update(zip(positions, texts, strict=True))
            bar.update(len(positions))
    answers = [written[i] for i in range(len(prompts))]
    return answers[0] if isinstance(examples, Example) else answers


def _contrasts(examples: Sequence[Example], contrast: Contrast) -> list[DPS | None]:
    """One contrast an example; None where it changes nothing and needs no second view."""
    if isinstance(contrast, Mapping):
        for example in examples:
            if example.user not in contrast:
                raise InputError(
                    f"no contrast for user {example.user}; give one, or an empty head set"
                )
        given: list[DPS | None] = [contrast[example.user] for example in examples]
    elif isinstance(contrast, Sequence):
        given = list(contrast)
        if len(given) != len(examples):
            raise InputError(f"{len(given)} contrasts for {len(examples)} examples")
    else:
        given = [contrast] * len(examples)
    return [one if one is not None and one.active else None for one in given]


def _in_batches(
    prompts: Sequence[Prompt],
    contrasts: Sequence[DPS | None],
    new_tokens: int,
    batch_tokens: int,
) -> Iterator[list[int]]:
    """Positions of prompts of similar length; a batch holds at least one."""
    batch: list[int] = []
    rows = 0
    for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids)):
        views = 1 if contrasts[i] is None else 2
        # Sorted by length, so the newcomer is the longest row and sets the width.
        if batch and (rows + views) * (len(prompts[i].ids) + new_tokens) > batch_tokens:
            yield batch
            batch, rows = [], 0
        batch.append(i)
        rows += views
    if batch:
        yield batch


def end_tokens(model: TransformerBridge) -> set[int]:
    """Ids that end a text: the tokenizer's and the generation config's."""
    config = getattr(model.original_model, "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    listed = ends if isinstance(ends, list) else [ends]
    return {int(i) for i in (*listed, model.tokenizer.eos_token_id) if i is not None}


class _Loop:
    """One model and one way of choosing tokens, for batch after batch."""

    def __init__(self, model: TransformerBridge, sampling: Sampling, limit: int) -> None:
        self.model = model
        self.sampling = sampling
        self.limit = limit
        self.ends = end_tokens(model)
        self.last_only = {"logits_to_keep": 1} if takes_logits_to_keep(model) else {}

    @torch.inference_mode()
    def run(self, prompts: Sequence[Prompt], contrasts: Sequence[DPS | None]) -> list[Generation]:
        """Decode a batch; the rows of the second views follow those of the examples."""
        steered = [i for i, contrast in enumerate(contrasts) if contrast is not None]
        rows = [*range(len(prompts)), *steered]
        device = self.model.cfg.device
        start = collate([_prompt_only(prompts[i]) for i in rows], pad_token(self.model), device)
        gamma = torch.tensor([c.gamma for c in contrasts if c is not None], device=device)
        generators = [self._generator(prompt.example) for prompt in prompts]
        new: list[list[int]] = [[] for _ in prompts]
        finished = [False] * len(prompts)
        tokens, mask, cache = start.tokens, start.attention_mask, None
        with head_gates(self.model, self._gates(contrasts, steered)):
            for _ in range(self.limit):
                logits, cache = self._step(tokens, mask, cache)
                logits = self._join(logits, steered, gamma, prompts)
                chosen = self._choose(logits, generators)
                for i, token in enumerate(chosen.tolist()):
                    finished[i] = finished[i] or token in self.ends
                    if not finished[i]:
                        new[i].append(token)
                if all(finished):
                    break
                tokens = chosen[rows][:, None]
                mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        return [
            Generation(prompt.example, self._text(ids), tuple(ids), done)
            for prompt, ids, done in zip(prompts, new, finished, strict=True)
        ]

    def _gates(self, contrasts: Sequence[DPS | None], steered: list[int]) -> np.ndarray:
        shape = heads_per_layer(self.model)
        gates = np.ones((len(contrasts) + len(steered), len(shape), max(shape)), dtype=np.float32)
        active = [contrast for contrast in contrasts if contrast is not None]
        for row, contrast in enumerate(active, start=len(contrasts)):
            gates[row] = contrast.heads.gates(shape)
        return gates

    def _step(
        self, tokens: Int[Tensor, "rows pos"], mask: Int[Tensor, "rows past"], cache: Any
    ) -> tuple[Float[Tensor, "rows d_vocab"], Any]:
        past = {"use_cache": True} if cache is None else {"past_key_values": cache}
        logits, cache = self.model(
            tokens,
            attention_mask=mask,
            return_type="logits_and_cache",
            **past,
            **self.last_only,
        )
        return logits[:, -1].float(), cache

    def _join(
        self,
        logits: Float[Tensor, "rows d_vocab"],
        steered: list[int],
        gamma: Float[Tensor, " steered"],
        prompts: Sequence[Prompt],
    ) -> Float[Tensor, "batch d_vocab"]:
        broken = logits.isnan().any(dim=-1).nonzero()
        if len(broken):
            row = [*range(len(prompts)), *steered][int(broken[0])]
            raise InputError(
                f"{prompts[row].example.name}: the logits hold NaN; try --dtype float32, or "
                "check the checkpoint"
            )
        if not steered:
            return logits
        full = logits[: len(prompts)].clone()
        full[steered] = contrast_logits(full[steered], logits[len(prompts) :], gamma)
        return full

    def _choose(
        self, logits: Float[Tensor, "batch d_vocab"], generators: Sequence[torch.Generator]
    ) -> Int[Tensor, " batch"]:
        if self.sampling.temperature == 0:
            return logits.argmax(dim=-1)
        probs = (logits / self.sampling.temperature).softmax(dim=-1)
        probs, order = probs.sort(dim=-1, descending=True)
        before = probs.cumsum(dim=-1) - probs
        probs = probs.masked_fill(before >= self.sampling.top_p, 0.0).cpu()
        picks = [
            torch.multinomial(row, 1, generator=generator)
            for row, generator in zip(probs, generators, strict=True)
        ]
        return order.gather(-1, torch.stack(picks).to(order.device))[:, 0]

    def _generator(self, example: Example) -> torch.Generator:
        digest = sha256(f"{self.sampling.seed}/{example.name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    def _text(self, ids: list[int]) -> str:
        return str(self.model.tokenizer.decode(ids, skip_special_tokens=True)).strip()


def _prompt_only(prompt: Prompt) -> Prompt:
    return replace(prompt, target_ids=())
