"""Prompts that are built once and used under many contrasts.

To choose among a long history costs more than to run a small model on what was chosen; an
evaluation asks the same examples dozens of times.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from workbench.data.examples import Example
from workbench.data.prompts import Prompt, PromptSettings, build_prompts
from workbench.models import context_length

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Tokens = tuple[int, ...]
_Kept = tuple["array[int]", "array[int]", tuple[Any, ...]]


class PromptCache:
    """Prompts of one model, built when they are first asked for.

    Kept are token ids, at 4 bytes each, and no texts: a run takes a few kB an example. An example
    is known by its name and by what it holds, so that another profile under the same name is
    another prompt.

    Args:
        model: From `load_model`.
    """

    def __init__(self, model: TransformerBridge) -> None:
        self.model = model
        self._kept: dict[tuple[Any, ...], _Kept] = {}
        self._labels: dict[tuple[str, PromptSettings], dict[str, Tokens]] = {}

    def build(
        self, examples: Sequence[Example], settings: PromptSettings | None, new_tokens: int
    ) -> list[Prompt]:
        """The prompts of some examples, in order.

        Args:
            examples: What to ask.
            settings: How prompts are built.
            new_tokens: As `build_prompts` takes it.

        Raises:
            InputError: As `build_prompts`.
        """
        settings = settings or PromptSettings()
        keys = [(e.name, _content(e), settings, new_tokens) for e in examples]
        missing = {k: e for k, e in zip(keys, examples, strict=True) if k not in self._kept}
        if missing:
            tokenizer, context = self.model.tokenizer, context_length(self.model)
            built = build_prompts(missing.values(), tokenizer, context, settings, new_tokens)
            self._kept.update(zip(missing, map(_packed, built), strict=True))
        return [_unpacked(e, self._kept[k]) for k, e in zip(keys, examples, strict=True)]

    def labels(
        self, task: str, settings: PromptSettings | None, spell: Callable[[], dict[str, Tokens]]
    ) -> dict[str, Tokens]:
        """The tokens of a task's labels, spelled once.

        Args:
            task: Whose labels.
            settings: How prompts are built.
            spell: Finds them.
        """
        key = task, settings or PromptSettings()
        if key not in self._labels:
            self._labels[key] = spell()
        return self._labels[key]


def _content(example: Example) -> int:
    """What tells two examples of a name apart; of text that is held Python keeps the hash."""
    items = tuple(tuple(item.items()) for item in example.profile)
    return hash((example.query, example.target, items, example.turns))


def _packed(prompt: Prompt) -> _Kept:
    told = (
        *(prompt.shown, prompt.dropped_items, prompt.shortened_items, prompt.cut_tokens),
        prompt.counted,
    )
    return array("i", prompt.ids), array("i", prompt.target_ids), told


def _unpacked(example: Example, kept: _Kept) -> Prompt:
    ids, target_ids, told = kept
    return Prompt(example, tuple(ids), tuple(target_ids), *told)
