"""From an example to token ids in which the target's place is exact.

Prompt and target are tokenised apart and joined as ids. A tokenizer that would merge characters
across the boundary never sees them together, so the target is always the last
`len(target_ids)` tokens, and decoding starts from exactly the tokens that scoring starts from.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from workbench.data.aspects import ASPECTS, token_aspects
from workbench.data.examples import Example
from workbench.data.retrieval import rank_profile
from workbench.data.tasks import Ranking, get_task
from workbench.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Style = Literal["plain", "chat"]
# Some tokenizers put a space before any text. Behind one of these marks, from which it is then
# cut off, the target is spelled without; several, since a tokenizer may merge it with the mark.
_MARKS = ("\n", "(", "0", "=")


@dataclass(frozen=True)
class PromptSettings:
    """How prompts are built.

    Attributes:
        style: `plain` text, or `chat`: a user turn in the tokenizer's chat template, behind the
            example's earlier turns if it has any. Plain, a turn is a line of query and answer.
        items: How many profile items are shown.
        ranking: How they are chosen; None for the task's default.
        max_tokens: Budget of prompt tokens; the model's context may leave less.
        answer_tokens: Room left in the context for an answer, gold or generated. The same for
            scoring and for decoding, so that both see the same prompt.
        aspect: Count only the target tokens of this aspect (`workbench.data.aspects`) in the
            loss; None for all. Decoding pays no heed to it.

    Raises:
        InputError: The style, the ranking or the aspect is unknown, or a number is out of range.
    """

    style: Style = "plain"
    items: int = 5
    ranking: Ranking | None = None
    max_tokens: int = 2048
    answer_tokens: int = 32
    aspect: str | None = None

    def __post_init__(self) -> None:
        if self.style not in get_args(Style):
            raise InputError(f"prompt style must be plain or chat, got {self.style!r}")
        if self.ranking is not None and self.ranking not in get_args(Ranking):
            known = ", ".join(get_args(Ranking))
            raise InputError(f"unknown ranking {self.ranking!r}; known are {known}")
        if self.aspect is not None and self.aspect not in ASPECTS:
            known = ", ".join(ASPECTS)
            raise InputError(f"unknown aspect {self.aspect!r}; known are {known}")
        if self.items < 0 or self.max_tokens < 1 or self.answer_tokens < 1:
            raise InputError(
                "a prompt shows 0 or more items in 1 or more tokens and leaves 1 or more for the "
                f"answer, got {self.items} items, {self.max_tokens} tokens and "
                f"{self.answer_tokens} for the answer"
            )


@dataclass(frozen=True)
class Prompt:
    """One example as token ids.

    Attributes:
        example: Where it comes from.
        ids: The prompt's tokens.
        target_ids: The target's tokens, which follow the prompt's.
        shown: Positions in the profile of the items shown, the most relevant first.
        dropped_items: Items that the budget shut out.
        shortened_items: Items of which the budget cut the end off.
        cut_tokens: Tokens that the budget cost the prompt.
        counted: Which of the target's tokens count in the loss; None for all.
    """

    example: Example
    ids: tuple[int, ...]
    target_ids: tuple[int, ...]
    shown: tuple[int, ...]
    dropped_items: int = 0
    shortened_items: int = 0
    cut_tokens: int = 0
    counted: tuple[bool, ...] | None = None

    @property
    def scored(self) -> tuple[int, ...]:
        """Positions within the target of the tokens that count in the loss."""
        if self.counted is None:
            return tuple(range(len(self.target_ids)))
        return tuple(i for i, counts in enumerate(self.counted) if counts)


def build_prompts(
    examples: Iterable[Example],
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    settings: PromptSettings | None = None,
    new_tokens: int = 0,
) -> list[Prompt]:
    """Build the prompts of all examples, before any of them is run.

    Args:
        examples: What to ask.
        tokenizer: The model's.
        context: Tokens that the model takes.
        settings: How prompts are built.
        new_tokens: Room to leave for a generation, where it is more than the settings leave. An
            example without a target may be answered, though not scored.

    Raises:
        InputError: A target is empty or has no token of the aspect that is to count, a prompt
            doesn't fit even without its profile, or the tokenizer has no chat template and `chat`
            was asked for. The message names the example.
    """
    settings = settings or PromptSettings()
    if settings.style == "chat" and not getattr(tokenizer, "chat_template", None):
        raise InputError("this tokenizer has no chat template; use the plain prompt style")
    builder = _Builder(tokenizer, settings)
    return [builder.build(example, context, new_tokens) for example in examples]


def truncation(prompts: Sequence[Prompt]) -> dict[str, int]:
    """What the token budget cost, summed over prompts: a line for every report."""
    return {
        "prompts": len(prompts),
        "prompts_cut": sum(prompt.cut_tokens > 0 for prompt in prompts),
        "items_shown": sum(len(prompt.shown) for prompt in prompts),
        "items_shortened": sum(prompt.shortened_items for prompt in prompts),
        "items_dropped": sum(prompt.dropped_items for prompt in prompts),
        "tokens_cut": sum(prompt.cut_tokens for prompt in prompts),
        "tokens_kept": sum(len(prompt.ids) for prompt in prompts),
    }


class _Builder:
    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: PromptSettings) -> None:
        self.tokenizer = tokenizer
        self.settings = settings
        # What the tokenizer was made with. TransformerLens gives one without a first token (Qwen2)
        # its end-of-text token as one, and every prompt would begin with an end.
        named = tokenizer.init_kwargs.get("bos_token")
        self.first = None if named is None else tokenizer.bos_token_id
        # Tokens such as Llama 3's <|start_header_id|> are special without being in the list.
        added = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
        special = dict.fromkeys([*tokenizer.all_special_tokens, *added])
        self.special = [token for token in special if len(token) > 1]

    def build(self, example: Example, context: int, new_tokens: int) -> Prompt:
        positions = rank_profile(example, self.settings.items, self.settings.ranking)
        items = [self._clean_item(example.profile[i]) for i in positions]
        whole, text = self._encode_prompt(example, items)
        written = new_tokens > 0 and not example.target  # nobody has answered it yet
        target = [] if written else self._encode_target(example, whole, text)
        counted = None if new_tokens > 0 else self._counted(example, target)
        answer = max(len(target), new_tokens, self.settings.answer_tokens)
        room = min(self.settings.max_tokens, context - answer)
        if len(whole) <= room:
            shown = tuple(positions)
            return Prompt(example, tuple(whole), tuple(target), shown, counted=counted)
        kept, ids = self._fit(example, items, room)
        if ids is None:
            alone = len(self._encode_prompt(example, [])[0])
            raise InputError(
                f"{example.name}: the prompt takes {alone} tokens even without its profile, and "
                f"{room} are left (context {context}, budget {self.settings.max_tokens}, "
                f"{answer} for the answer); raise the budget, ask for "
                "fewer new tokens, or drop the example"
            )
        shortened = sum(a != b for a, b in zip(items, kept, strict=False))
        return Prompt(
            example,
            tuple(ids),
            tuple(target),
            tuple(positions[: len(kept)]),
            dropped_items=len(items) - len(kept),
            shortened_items=shortened,
            cut_tokens=len(whole) - len(ids),
            counted=counted,
        )

    def _fit(
        self, example: Example, items: list[dict[str, str]], room: int
    ) -> tuple[list[dict[str, str]], list[int] | None]:
        """Shorten all items to the same length; drop the least relevant where that's no help."""
        field = get_task(example.task).shorten
        ends = [self._token_ends(item[field]) for item in items]
        for count in range(len(items), 0, -1):
            best: tuple[list[dict[str, str]], list[int]] | None = None
            low, high = 1, max(1, *(len(e) for e in ends[:count]))
            while low <= high:
                cap = (low + high) // 2
                cut = [
                    {**item, field: item[field][: e[cap - 1]]} if len(e) > cap else item
                    for item, e in zip(items[:count], ends, strict=False)
                ]
                ids = self._encode_prompt(example, cut)[0]
                if len(ids) <= room:
                    best, low = (cut, ids), cap + 1
                else:
                    high = cap - 1
            if best:
                return best
        ids = self._encode_prompt(example, [])[0]
        return [], ids if len(ids) <= room else None

    def _token_ends(self, text: str) -> list[int]:
        """Where in the text each token ends, in characters."""
        if self.tokenizer.is_fast:
            encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            return [end for _, end in encoded["offset_mapping"]]
        ids = self._encode(text)
        return [len(self.tokenizer.decode(ids[: i + 1])) for i in range(len(ids))]

    def _encode_prompt(
        self, example: Example, items: list[dict[str, str]]
    ) -> tuple[list[int], str]:
        task = get_task(example.task)
        queries = [self._clean(query) for query, _ in example.turns]
        queries.append(self._clean(example.query))
        answers = [self._clean(answer) for _, answer in example.turns]
        if items:
            shown = task.joint.join(task.item.format(**i) for i in items)
            queries[0] = task.compose(shown, queries[0])
        if self.settings.style == "chat":
            text = self._chat(queries, answers)
        else:
            joint = "" if task.cue[-1:].isspace() else " "
            turns = [
                f"{query}{task.cue}{joint}{answer}\n"
                for query, answer in zip(queries, answers, strict=False)
            ]
            text = "".join(turns) + queries[-1] + task.cue
        ids = self._encode(text)
        # Models are trained behind their first token; some tokenizers leave it to the caller.
        if self.first is not None and ids[:1] != [self.first]:
            ids = [self.first, *ids]
        return ids, text

    def _chat(self, queries: list[str], answers: list[str]) -> str:
        """A conversation in the tokenizer's template, up to where the model is to answer."""
        messages = [{"role": "user", "content": queries[0]}]
        for answer, query in zip(answers, queries[1:], strict=True):
            messages.append({"role": "assistant", "content": answer})
            messages.append({"role": "user", "content": query})
        return str(
            self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        )

    def _encode_target(self, example: Example, prompt: list[int], text: str) -> list[int]:
        """Ids of the target. The space before it, where there is one, belongs to it."""
        apart = self.settings.style == "chat" or text[-1:].isspace()
        joint = "" if apart else " "
        wanted = joint + self._clean(example.target)
        if not wanted.strip():
            raise InputError(f"{example.name}: the target is empty; remove the example")
        before = self._decode(prompt)
        spellings = [self._encode(wanted), self._encode(wanted.lstrip())]
        for mark in _MARKS:
            anchor, behind = self._encode(mark), self._encode(mark + wanted)
            if behind[: len(anchor)] == anchor:
                spellings.append(behind[len(anchor) :])
        for ids in spellings:
            if ids and self._decode(prompt + ids) == before + wanted:
                return ids
        # No spelling reads back as written (word-level tokenizers): the first one is as good.
        if not spellings[0]:
            raise InputError(f"{example.name}: the target has no tokens for this tokenizer")
        return spellings[0]

    def _counted(self, example: Example, target: list[int]) -> tuple[bool, ...] | None:
        """Which of the target's tokens are of the aspect that was asked for."""
        aspect = self.settings.aspect
        if aspect is None:
            return None
        written = replace(example, target=self._clean(example.target))
        labels = token_aspects(written, self.tokenizer, target)
        if aspect not in labels:
            raise InputError(
                f"{example.name}: no token of its target is of the aspect {aspect!r}, only of "
                f"{', '.join(dict.fromkeys(labels))}; `with_aspect` keeps the others"
            )
        return tuple(label == aspect for label in labels)

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _decode(self, ids: list[int]) -> str:
        options: dict[str, Any] = {"clean_up_tokenization_spaces": False}
        return str(self.tokenizer.decode(ids, **options))

    def _clean_item(self, item: Any) -> dict[str, str]:
        return {key: self._clean(value) for key, value in item.items()}

    def _clean(self, text: str) -> str:
        """Users' text must not turn into control tokens (a forged turn, an early end)."""
        for token in self.special:
            text = text.replace(token, f"{token[0]} {token[1:]}")
        return text
