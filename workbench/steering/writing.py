"""The same answer written twice, plain and steered, side by side."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Literal

from workbench.data.examples import Example
from workbench.data.prompts import PromptSettings
from workbench.models import token_texts
from workbench.steering.contrast import Contrast
from workbench.steering.layout import Layout
from workbench.steering.loop import Generation, Loop, Sampling, Work
from workbench.steering.native import Prefill
from workbench.steering.prompts import PromptCache
from workbench.steering.room import batch_in_memory

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Mark = Literal["same", "plain", "steered"]


@dataclass(frozen=True)
class Pair:
    """An answer as the plain model writes it, and as the contrast does.

    Attributes:
        plain: The plain model's.
        steered: The contrast's, with the nats that each step was moved by in `kl`.
        pieces: The text of each token of the steered answer.
        contrast: What it was written by.
        max_new_tokens: Limit of new tokens.
    """

    plain: Generation
    steered: Generation
    pieces: tuple[str, ...]
    contrast: Contrast
    max_new_tokens: int

    @property
    def steps(self) -> int:
        """How many steps have been taken."""
        return max(len(self.plain.logprobs), len(self.steered.logprobs))

    @property
    def words(self) -> list[tuple[Mark, str]]:
        """The words of both texts in order, with the text that each is in, or `same` for both."""
        plain, steered = self.plain.text.split(), self.steered.text.split()
        found: list[tuple[Mark, str]] = []
        matcher = SequenceMatcher(None, plain, steered, autojunk=False)
        for kind, i, i_end, j, j_end in matcher.get_opcodes():
            if kind == "equal":
                found += [("same", word) for word in plain[i:i_end]]
                continue
            found += [("plain", word) for word in plain[i:i_end]]
            found += [("steered", word) for word in steered[j:j_end]]
        return found

    @property
    def kl(self) -> float:
        """Nats that steering spent on the whole text."""
        return float(sum(self.steered.kl))


def write_steps(
    model: TransformerBridge,
    example: Example,
    contrast: Contrast,
    *,
    max_new_tokens: int = 32,
    sampling: Sampling | None = None,
    prompt: PromptSettings | None = None,
    prefill: Prefill = "masked",
    prompts: PromptCache | None = None,
) -> Iterator[Pair]:
    """Write an answer plain and steered, token by token; the arguments are those of `write`.

    Yields:
        What both texts are after each step. Between two steps nothing is hooked, so that the model
        may be used for something else, and writing may be given up.

    Raises:
        InputError: As `write`, when the first step is asked for.
    """
    work = Work(model, [example, example], [None, contrast], max_new_tokens, prompt, prompts)
    loop = Loop(work, [0, 1], sampling or Sampling(), prefill)
    rows = Layout.of(work.contrasts, work.shape, work.tied).rows
    width = len(work.prompts[0].ids) + max_new_tokens
    with batch_in_memory([example.name], rows * width):
        for _ in loop.steps():
            yield _pair(loop, contrast, max_new_tokens)


def write(
    model: TransformerBridge,
    example: Example,
    contrast: Contrast,
    *,
    max_new_tokens: int = 32,
    sampling: Sampling | None = None,
    prompt: PromptSettings | None = None,
    prefill: Prefill = "masked",
    prompts: PromptCache | None = None,
) -> Pair:
    """Write an answer plain and steered, in one batch.

    Args:
        model: From `load_model`.
        example: What to answer; its target is not shown to the model.
        contrast: What the steered text is written by.
        max_new_tokens: Limit of new tokens.
        sampling: Greedy by default; both texts draw from the same random numbers.
        prompt: How the prompt is built.
        prefill: As `generate` takes it.
        prompts: As `generate` takes it.

    Returns:
        Both texts, their words compared, and the KL that steering spent at each step.

    Raises:
        InputError: As `generate`.
    """
    steps = write_steps(
        model,
        example,
        contrast,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        prompt=prompt,
        prefill=prefill,
        prompts=prompts,
    )
    return deque(steps, maxlen=1)[0]


def _pair(loop: Loop, contrast: Contrast, max_new_tokens: int) -> Pair:
    plain, steered = loop.generations()
    last = loop.work.prompts[1].ids[-1:]
    pieces = token_texts(loop.work.model, (*last, *steered.tokens))[1:]
    return Pair(plain, steered, tuple(pieces), contrast, max_new_tokens)
