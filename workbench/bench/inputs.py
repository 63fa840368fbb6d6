"""Models and prompts to measure on, made on the spot: no download, the same every time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from workbench.data.examples import Example
from workbench.data.prompts import Prompt, build_prompts
from workbench.data.sources import load_examples
from workbench.data.testbed import testbed_path
from workbench.errors import InputError
from workbench.models import context_length, load_model

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import LlamaConfig

TASK = "random"
FIRST_WORD = 5  # random tokens are none of the special ones
LONGEST_TARGET = 8


@dataclass(frozen=True)
class LlamaSize:
    """Size of a random Llama.

    Attributes:
        layers: Number of blocks.
        heads: Query heads of each, all with keys and values of their own.
        width: Of the residual stream.
        hidden: Of the MLP. Llama's has three matrices where GPT-2's has two: 8/3 of the width
            is as many weights as GPT-2's 4.
        vocabulary: Number of tokens.
    """

    layers: int
    heads: int
    width: int
    hidden: int
    vocabulary: int

    @property
    def name(self) -> str:
        """As cases are called."""
        return f"llama-{self.layers}x{self.heads}x{self.width}"

    def config(self) -> LlamaConfig:
        """For Transformers."""
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            max_position_embeddings=4096,
            dtype="float32",
        )


def write_llama(size: LlamaSize, folder: Path) -> Path:
    """Write a random Llama as a checkpoint, with the testbed's tokenizer; returns its folder."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    path = folder / size.name
    if not path.exists():
        with torch.random.fork_rng(devices=[]), _no_bars():
            torch.manual_seed(0)
            LlamaForCausalLM(size.config()).save_pretrained(path)
        # `load_model` wants a tokenizer; no token of it is used.
        AutoTokenizer.from_pretrained(testbed_path()).save_pretrained(path)
    return path


@contextmanager
def _no_bars() -> Iterator[None]:
    """No progress bars of Transformers between the lines that say what is measured."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def quiet_load(folder: Path | str, device: str, dtype: str) -> TransformerBridge:
    """`load_model` without a progress bar."""
    with _no_bars():
        return load_model(folder, device=device, dtype=dtype)


def random_prompts(
    vocabulary: int, count: int, tokens: int, target: int, shared: int = 0
) -> list[Prompt]:
    """Prompts of random tokens.

    Args:
        vocabulary: Number of tokens that the model knows.
        count: How many prompts.
        tokens: Tokens of each, target counted.
        target: How many of them are target.
        shared: How many of the first are the same in all: one user's profile.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(number: int) -> tuple[int, ...]:
        return tuple(torch.randint(FIRST_WORD, vocabulary, (number,), generator=generator).tolist())

    profile = draw(shared)
    prompts = []
    for index in range(count):
        user = "0" if shared else str(index)
        example = Example(str(index), user, TASK, query="", target="", profile=())
        ids = profile + draw(tokens - target - shared)
        prompts.append(Prompt(example, ids, draw(target), shown=()))
    return prompts


def corpus_prompts(model: TransformerBridge, count: int, tokens: int) -> list[Prompt]:
    """Prompts of the built-in corpus, its tasks in turn, all made one length.

    What is longer loses tokens behind the first; what is shorter gets the end of the prompt
    before it, of the same task, in front.

    Raises:
        InputError: The model's context is too short, or the corpus holds too few examples.
    """
    if tokens > context_length(model):
        raise InputError(f"the model takes {context_length(model)} tokens, {tokens} are wanted")
    by_task: dict[str, list[Prompt]] = {}
    for prompt in build_prompts(load_examples("testbed"), model.tokenizer, 10 * tokens):
        by_task.setdefault(prompt.example.task, []).append(prompt)
    chosen: list[Prompt] = []
    for place in range(1, min(map(len, by_task.values()))):
        for prompts in by_task.values():
            before, prompt = prompts[place - 1], prompts[place]
            target = prompt.target_ids[:LONGEST_TARGET]
            stream = before.ids + before.target_ids + prompt.ids[1:]
            ids = prompt.ids[:1] + stream[len(stream) - (tokens - len(target) - 1) :]
            chosen.append(Prompt(prompt.example, ids, target, prompt.shown))
    short = [prompt for prompt in chosen if len(prompt.ids + prompt.target_ids) != tokens]
    if len(chosen) < count or short:
        raise InputError(f"the built-in corpus doesn't fill {count} prompts of {tokens} tokens")
    return chosen[:count]
