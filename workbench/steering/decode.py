"""Writing answers, plain or contrasted: all at once, or token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, overload

from tqdm.auto import tqdm

from workbench.data.examples import Example
from workbench.data.prompts import PromptSettings
from workbench.steering.contrast import Contrast
from workbench.steering.loop import Contrasts, Generation, Loop, Sampling, Work
from workbench.steering.native import Prefill
from workbench.steering.prompts import PromptCache
from workbench.steering.room import batch_in_memory

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True)
class Written:
    """One step of a text that is being written.

    Attributes:
        text: What the step adds to the text; empty until a character is whole.
        token: Its id.
        logprob: Log-probability under the plain model, in nats.
        kl: By how many nats the step was moved.
    """

    text: str
    token: int
    logprob: float
    kl: float


@overload
def generate(
    model: TransformerBridge,
    examples: Example,
    contrast: Contrasts = None,
    *,
    max_new_tokens: int = ...,
    sampling: Sampling | None = ...,
    prompt: PromptSettings | None = ...,
    prefill: Prefill = ...,
    batch_tokens: int | None = ...,
    prompts: PromptCache | None = ...,
    progress: bool = ...,
) -> Generation: ...


@overload
def generate(
    model: TransformerBridge,
    examples: Sequence[Example],
    contrast: Contrasts = None,
    *,
    max_new_tokens: int = ...,
    sampling: Sampling | None = ...,
    prompt: PromptSettings | None = ...,
    prefill: Prefill = ...,
    batch_tokens: int | None = ...,
    prompts: PromptCache | None = ...,
    progress: bool = ...,
) -> list[Generation]: ...


def generate(
    model: TransformerBridge,
    examples: Example | Sequence[Example],
    contrast: Contrasts = None,
    *,
    max_new_tokens: int = 32,
    sampling: Sampling | None = None,
    prompt: PromptSettings | None = None,
    prefill: Prefill = "masked",
    batch_tokens: int | None = None,
    prompts: PromptCache | None = None,
    progress: bool = False,
) -> Generation | list[Generation]:
    """Write an answer for every example, plain or contrasted.

    Args:
        model: From `load_model`.
        examples: What to answer, one or several; their targets are not shown to the model.
        contrast: A contrast for all rows, one for each user by name, one for each example in
            order, or None for the plain model. A gamma of 0 or an empty head set gives the plain
            model's tokens, exactly.
        max_new_tokens: Limit of new tokens.
        sampling: Greedy by default.
        prompt: How prompts are built.
        prefill: `masked`, the equation's: a view without some heads reads the prompt without
            them, too. `shared`, the released code's: it starts from the plain model's cache of
            the prompt, up to the prompt's last token. Half the prefill, and another method.
        batch_tokens: Most tokens kept at a time: rows, further views counted, times prompt and
            new tokens. By default what the memory at hand allows.
        prompts: Prompts of this model that were built before, for calls that ask the same
            examples again; those that are missing are built and added.
        progress: Show a bar on the terminal.

    Returns:
        One generation an example, in the order given; for a single example just that one.

    Raises:
        InputError: A head or layer is outside the model, a user has no contrast, a prompt leaves
            no room, the model can't share a prefill, the logits hold NaN, or memory runs out
            with a single example.
        BatchTooLargeError: Memory runs out with several; a smaller `batch_tokens` may do.

    Source:
        Section 4 of the paper. The released code runs one row at a time, two passes in a row,
        from copies of one unmasked cache.
    """
    asked = [examples] if isinstance(examples, Example) else list(examples)
    work = Work(model, asked, contrast, max_new_tokens, prompt, prompts)
    written: dict[int, Generation] = {}
    with tqdm(total=len(asked), desc="writing", unit="ex", disable=not progress) as bar:
        for batch in work.batches(batch_tokens):
            loop = Loop(work, batch.positions, sampling or Sampling(), prefill)
            with batch_in_memory(work.names(batch.positions), batch.tokens):
                for _ in loop.steps():
                    pass
            written.update(zip(batch.positions, loop.generations(), strict=True))
            bar.update(len(batch.positions))
    answers = [written[i] for i in range(len(asked))]
    return answers[0] if isinstance(examples, Example) else answers


def stream(
    model: TransformerBridge,
    example: Example,
    contrast: Contrast | None = None,
    *,
    max_new_tokens: int = 32,
    sampling: Sampling | None = None,
    prompt: PromptSettings | None = None,
    prefill: Prefill = "masked",
    prompts: PromptCache | None = None,
) -> Iterator[Written]:
    """Write an answer token by token; the arguments are those of `generate`.

    Yields:
        Every step as it is done. The texts, joined, are `generate`'s text but for spaces at its
        ends and for a character that the end-of-text token leaves incomplete; that token is not
        among the steps.

    Raises:
        InputError: As `generate` does, when the first step is asked for.
    """
    work = Work(model, [example], contrast, max_new_tokens, prompt, prompts)
    loop = Loop(work, [0], sampling or Sampling(), prefill)
    shown, started = "", False
    for _ in loop.steps():
        tokens = loop.new[0]
        if len(loop.logprobs[0]) > len(tokens):  # the end of the text
            return
        whole = work.text(tokens, strip=False)
        # A character may take several tokens; until it is whole its place is held by U+FFFD.
        held = whole.endswith("\ufffd") and len(tokens) < max_new_tokens
        piece = "" if held else whole[len(shown) :]
        shown += piece
        started = started or bool(piece.strip())
        text = piece if started else ""
        yield Written(text, tokens[-1], loop.logprobs[0][-1], loop.kl[0][-1])
