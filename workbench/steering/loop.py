"""One batch from its prompts to its ends: plain and contrasted rows, several users at once.

1. Every example is a row; what its contrast needs beside it (a view without some heads, a prompt
   without the profile, early layers) goes along in the same forward pass.
2. The views' logits are joined by the contrast; the token chosen from them is fed to all views.
3. A row that has met its end-of-text token leaves the batch; the loop ends with the last row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.data.examples import Example, without_profile
from workbench.data.prompts import PromptSettings
from workbench.errors import InputError
from workbench.models import heads_per_layer
from workbench.steering.contrast import Contrast
from workbench.steering.engines import Engine, open_engine
from workbench.steering.layout import Layout, Views
from workbench.steering.native import Prefill
from workbench.steering.prompts import PromptCache
from workbench.steering.room import Room
from workbench.steering.rules import Joined
from workbench.steering.session import Session

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Contrasts = Contrast | Mapping[str, Contrast] | Sequence[Contrast | None] | None
# Rows leave the batch once so many of them have ended: each time the caches are copied.
LEAVE = 0.25


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
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
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
        logprobs: Log-probability of each token under the plain model, in nats; that of the
            end-of-text token comes last where one was written.
        kl: By how many nats each of these steps was moved: KL(contrasted, plain).
    """

    example: Example
    text: str
    tokens: tuple[int, ...]
    finished: bool
    logprobs: tuple[float, ...] = ()
    kl: tuple[float, ...] = ()


def contrasts_of(examples: Sequence[Example], contrast: Contrasts) -> list[Contrast | None]:
    """One contrast an example.

    Raises:
        InputError: A user has none, or there are more or fewer than examples.
    """
    if isinstance(contrast, Mapping):
        for example in examples:
            if example.user not in contrast:
                raise InputError(
                    f"no contrast for user {example.user}; give one, or an empty head set"
                )
        return [contrast[example.user] for example in examples]
    if isinstance(contrast, Sequence):
        if len(contrast) != len(examples):
            raise InputError(f"{len(contrast)} contrasts for {len(examples)} examples")
        return list(contrast)
    return [contrast] * len(examples)


def end_tokens(model: TransformerBridge) -> set[int]:
    """Ids that end a text: the tokenizer's and the generation config's."""
    config = getattr(model.original_model, "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    listed = ends if isinstance(ends, list) else [ends]
    return {int(i) for i in (*listed, model.tokenizer.eos_token_id) if i is not None}


@dataclass(frozen=True)
class Batch:
    """Examples that are answered together.

    Attributes:
        positions: Which of a work's examples.
        rows: Rows that they and their views take.
        width: Tokens of the longest row, the new ones counted.
    """

    positions: tuple[int, ...]
    rows: int
    width: int = 0

    @property
    def tokens(self) -> int:
        """Tokens kept at a time, padding counted."""
        return self.rows * self.width


class Work:
    """Examples with their contrasts and prompts, checked before any long work.

    Args:
        model: From `load_model`.
        examples: What to answer.
        contrast: As `generate` takes it.
        new_tokens: Limit of new tokens.
        prompt: How prompts are built.
        prompts: Prompts that were built before; those that weren't are added.

    Raises:
        InputError: A head or layer is outside the model, a user has no contrast, a prompt
            leaves no room, or the prompts are another model's.
    """

    def __init__(
        self,
        model: TransformerBridge,
        examples: Sequence[Example],
        contrast: Contrasts,
        new_tokens: int,
        prompt: PromptSettings | None,
        prompts: PromptCache | None = None,
    ) -> None:
        if new_tokens < 1:
            raise InputError(f"max_new_tokens must be >= 1, got {new_tokens}")
        built = PromptCache(model) if prompts is None else prompts
        if built.model is not model:
            raise InputError("these prompts are kept for another model; give each its PromptCache")
        self.model = model
        self.examples = list(examples)
        self.contrasts = contrasts_of(examples, contrast)
        self.new_tokens = new_tokens
        self.shape = heads_per_layer(model)
        self.tied = bool(getattr(model.original_model.config, "tie_word_embeddings", False))
        for one in dict.fromkeys(self.contrasts):
            if one is not None:
                one.check(self.shape)
        self.prompts = built.build(self.examples, prompt, new_tokens)
        wanted = [i for i, one in enumerate(self.contrasts) if _sees_no_profile(one)]
        without = without_profile([self.examples[i] for i in wanted])
        bare = built.build(without, prompt, new_tokens)
        self.bare = dict(zip(wanted, bare, strict=True))
        self.ends = end_tokens(model)

    def batches(self, batch_tokens: int | None = None, copies: int = 1) -> Iterator[Batch]:
        """Examples with prompts of similar length; a batch holds at least one.

        Args:
            batch_tokens: Most tokens kept at a time; None for what the memory at hand allows.
            copies: Rows that every view of an example may become.
        """
        room = Room.of(self.model, self.shape) if batch_tokens is None else Room(batch_tokens)
        layouts = {
            one: Layout.of([one], self.shape, self.tied) for one in dict.fromkeys(self.contrasts)
        }
        batch, readings = Batch((), 0), 0
        for i in sorted(range(len(self.prompts)), key=lambda i: len(self.prompts[i].ids)):
            layout = layouts[self.contrasts[i]]
            views, read = copies * layout.rows, copies * (layout.rows + len(layout.early))
            # Sorted by length, so the newcomer is the longest row and sets the width.
            width = len(self.prompts[i].ids) + self.new_tokens
            if batch.rows and not room.holds(batch.rows + views, width, readings + read):
                yield batch
                batch, readings = Batch((), 0), 0
            batch = Batch((*batch.positions, i), batch.rows + views, width)
            readings += read
        if batch.rows:
            yield batch

    def names(self, positions: Sequence[int]) -> list[str]:
        """Names of examples."""
        return [self.examples[i].name for i in positions]

    def begin(self, positions: Sequence[int], prefill: Prefill, engine: Engine) -> Session:
        """The session of a batch."""
        contrasts = [self.contrasts[i] for i in positions]
        layout = Layout.of(contrasts, self.shape, self.tied)
        rows = [self.prompts[i].ids for i in positions]
        rows += [self.bare[positions[row]].ids for row in layout.others]
        return engine.session(rows, layout, self.new_tokens, prefill)

    def text(self, tokens: Sequence[int], strip: bool = True) -> str:
        """Tokens as text, without special ones."""
        found = str(self.model.tokenizer.decode(list(tokens), skip_special_tokens=True))
        return found.strip() if strip else found


def _sees_no_profile(contrast: Contrast | None) -> bool:
    return contrast is not None and any(term.where == "prompt" for term in contrast.terms)


def refuse_nan(views: Views, layout: Layout, names: Sequence[str]) -> None:
    """Stop at logits that are no numbers.

    Raises:
        InputError: A view's logits hold NaN; the message names the example.
    """
    row = layout.spoilt(views)
    if row is not None:
        raise InputError(
            f"{names[row]}: the logits hold NaN; try --dtype float32, or check the checkpoint"
        )


@dataclass
class Loop:
    """One batch from its prompts to its ends.

    Attributes:
        work: Where the batch is from.
        positions: Which examples.
        sampling: How tokens are chosen.
        prefill: As `generate` takes it.
        new: The tokens of each example so far.
        logprobs: Their log-probabilities under the plain model, the end-of-text token's too.
        kl: By how many nats each step was moved.
        finished: Which have ended.
    """

    work: Work
    positions: Sequence[int]
    sampling: Sampling
    prefill: Prefill
    new: list[list[int]] = field(default_factory=list)
    logprobs: list[list[float]] = field(default_factory=list)
    kl: list[list[float]] = field(default_factory=list)
    finished: list[bool] = field(default_factory=list)

    def __post_init__(self) -> None:
        count = len(self.positions)
        self.new = [[] for _ in range(count)]
        self.logprobs = [[] for _ in range(count)]
        self.kl = [[] for _ in range(count)]
        self.finished = [False] * count
        self.generators = [self._generator(self.work.examples[i].name) for i in self.positions]

    def steps(self) -> Iterator[None]:
        """Write all texts; yields after each step."""
        with torch.inference_mode():
            session = self.work.begin(self.positions, self.prefill, open_engine(self.work.model))
            rows = list(range(len(self.positions)))  # which example each row of the batch is
            views = session.start()
        for step in range(self.work.new_tokens):
            with torch.inference_mode():
                names = self.work.names([self.positions[row] for row in rows])
                refuse_nan(views, session.layout, names)
                chosen = self._take(session.layout.join(views), views, rows)
            yield
            live = [at for at, row in enumerate(rows) if not self.finished[row]]
            if not live or step + 1 == self.work.new_tokens:
                return
            with torch.inference_mode():
                if len(live) <= len(rows) * (1 - LEAVE):
                    session.select(live)
                    rows, chosen = [rows[at] for at in live], chosen[live]
                views = session.step(chosen)

    def _take(self, joined: Joined, views: Views, rows: Sequence[int]) -> Int[Tensor, " rows"]:
        """Choose a token for each row, and keep it."""
        chosen = self._choose(joined.logits, [self.generators[row] for row in rows])
        plain = views.full.float().log_softmax(dim=-1).gather(-1, chosen[:, None])[:, 0]
        kept = zip(rows, chosen.tolist(), plain.tolist(), joined.kl.tolist(), strict=True)
        for row, token, logprob, kl in kept:
            if self.finished[row]:
                continue
            self.finished[row] = token in self.work.ends
            self.logprobs[row].append(logprob)
            self.kl[row].append(kl)
            if not self.finished[row]:
                self.new[row].append(token)
        return chosen

    def generations(self) -> list[Generation]:
        """What was written, in the order of the positions."""
        return [
            Generation(
                self.work.examples[position],
                self.work.text(self.new[row]),
                tuple(self.new[row]),
                self.finished[row],
                tuple(self.logprobs[row]),
                tuple(self.kl[row]),
            )
            for row, position in enumerate(self.positions)
        ]

    def _choose(
        self, logits: Float[Tensor, "rows d_vocab"], generators: Sequence[torch.Generator]
    ) -> Int[Tensor, " rows"]:
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

    def _generator(self, name: str) -> torch.Generator:
        digest = sha256(f"{self.sampling.seed}/{name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
