"""What each token of a target is about: its aspect.

A loss over a whole target mixes what a user decides (how to open, which word to take) with what
any writer must get right (the names in the article). Counting the tokens of one aspect only,
`PromptSettings.aspect`, tells them apart.

The testbed's headlines are labelled by their grammar, the answers of tasks with labels or ratings
as a whole, and every other text by a list of English function words.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING

from workbench.data.examples import Example
from workbench.data.tasks import get_task
from workbench.data.testbed import CLOSERS, FORMAL_VERB, INTENSIFIERS, OPENERS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANSWER = "answer"
CONTENT, FUNCTION = "content", "function"
STYLE = ("opener", "intensifier", "order", "register", "closing")
TOPIC = ("topic",)
FRAME = "frame"
ASPECTS = (*STYLE, *TOPIC, FRAME, ANSWER, CONTENT, FUNCTION)
HEADLINE = "testbed-headline"

_VERBS = {*FORMAL_VERB, *FORMAL_VERB.values()}
_FIXED = {
    **dict.fromkeys(OPENERS, "opener"),
    **dict.fromkeys(INTENSIFIERS, "intensifier"),
    **dict.fromkeys(_VERBS, "register"),
    **dict.fromkeys(CLOSERS, "closing"),
    **dict.fromkeys(("news", ",", "-", ":"), FRAME),
}
_JOINTS = "['\u2019-]"  # both apostrophes, and the hyphen
_WORD = re.compile(rf"[@#]?\w+(?:{_JOINTS}\w+)*|[^\w\s]")
_ENDINGS = {"s", "t", "d", "m", "re", "ve", "ll"}
# By kind: determiners; pronouns; prepositions; conjunctions; auxiliary verbs, and what is left
# of them before an apostrophe; adverbs that carry grammar more than meaning.
_FUNCTION_WORDS = frozenset(
    re.findall(
        r"\w+",
        """
        a an the this that these those each every either neither some any no all both half such
        what which whose another other others many much more most few fewer less least several
        enough own same

        i me my mine myself you your yours yourself yourselves he him his himself she her hers
        herself it its itself we us our ours ourselves they them their theirs themselves who whom
        one ones someone somebody something anyone anybody anything everyone everybody everything
        nobody nothing none

        about above across after against along amid among around as at before behind below beneath
        beside besides between beyond by despite down during except for from in inside into like
        near of off on onto out outside over past per since than through throughout to toward
        towards under until unto up upon via with within without

        and but or nor so yet because although though unless while whereas whether if when whenever
        where wherever once

        am is are was were be been being do does did doing done have has had having can could may
        might must shall should will would ought cannot don doesn didn isn aren wasn weren hasn
        haven hadn won wouldn couldn shouldn ain

        not also just only even too very rather quite then there here thus hence how why again
        still already ever never however instead else
        """,
    )
)


def word_aspects(task: str, text: str) -> list[tuple[int, int, str]]:
    """The words of a target, each with its aspect.

    Args:
        task: The task that the target answers.
        text: The target.

    Returns:
        Where each word begins and ends, in characters, and its label, one of `ASPECTS`:

        - Tasks with labels or ratings: `answer` everywhere.
        - `testbed-headline`, by the grammar: `opener`, `intensifier`, `register` (the verb, of
          which there is a plain and a formal one), `closing`; `order`, the first word behind the
          comma: whether it is the actor or the object is the user's choice of order, while which
          actor and object there are stands in the article; `topic`, the other of the two, and any
          word that the grammar doesn't know; `frame`, what stands in every headline and the colon
          that an object in front brings with it.
        - Every other text: `function` for English function words and punctuation, else
          `content`, numbers and symbols included. In another language the list knows next to no
          word: `content` is then all words (a run of letters where there are no spaces), and
          `function` the punctuation.
    """
    if get_task(task).kind != "generation":
        return [(m.start(), m.end(), ANSWER) for m in re.finditer(r"\S+", text)]
    if task == HEADLINE:
        return _headline(text)
    return [(m.start(), m.end(), _function_or_content(m[0])) for m in _WORD.finditer(text)]


def _headline(text: str) -> list[tuple[int, int, str]]:
    found, decided, before = [], False, ""
    for match in re.finditer(r"\S+", text):
        word = match[0]
        label = _FIXED.get(word, "topic")
        if label == "topic" and before == "," and not decided:
            label, decided = "order", True
        found.append((match.start(), match.end(), label))
        before = word
    return found


def _function_or_content(word: str) -> str:
    if not any(c.isalnum() for c in word):
        return FUNCTION if unicodedata.category(word[0]).startswith("P") else CONTENT
    parts = re.split(_JOINTS, word.lower())
    if len(parts) > 1 and parts[-1] in _ENDINGS:
        parts.pop()
    return FUNCTION if all(part in _FUNCTION_WORDS for part in parts) else CONTENT


def token_aspects(
    example: Example, tokenizer: PreTrainedTokenizerBase, target_ids: Sequence[int]
) -> list[str]:
    """The aspect of each token of an example's target.

    Args:
        example: Its task and target.
        tokenizer: The model's.
        target_ids: The target's tokens.

    Returns:
        A label of `ASPECTS` a token. All pieces of a word share its label, and the space before a
        word is the word's; a token that spans several words has the label of the one it holds most
        of.
    """
    text, spans = _token_spans(tokenizer, example.target, list(target_ids))
    words = word_aspects(example.task, text)
    ends = [end for _, end, _ in words]
    return [_label(words, ends, start, end) for start, end in spans]


def _label(words: list[tuple[int, int, str]], ends: list[int], start: int, end: int) -> str:
    """The label of the word that covers most of a span; of the next one where none does."""
    # A piece of a character ends where it begins; it is the character before that it belongs to.
    start = start if end > start else max(0, end - 1)
    first = min(bisect_right(ends, start), len(words) - 1)
    label, most = words[first][2], 0
    for left, right, name in words[first:]:
        if left >= end:
            break
        if min(right, end) - max(left, start) > most:
            label, most = name, min(right, end) - max(left, start)
    return label


def _token_spans(
    tokenizer: PreTrainedTokenizerBase, target: str, ids: list[int]
) -> tuple[str, list[tuple[int, int]]]:
    """A text, and where in it each token lies, in characters.

    The text is the target where the tokenizer spells it with these tokens, by itself or behind a
    space. Elsewhere it is what the tokens read as, and each ends where a shorter text ends.
    """
    if tokenizer.is_fast:
        for before in ("", " "):
            found = tokenizer(
                before + target, add_special_tokens=False, return_offsets_mapping=True
            )
            if found["input_ids"] == ids:
                return before + target, [(a, b) for a, b in found["offset_mapping"]]
    read = [
        str(tokenizer.decode(ids[:n], clean_up_tokenization_spaces=False))
        for n in range(1, len(ids) + 1)
    ]
    ends = [len(text) for text in read]
    return read[-1], list(zip([0, *ends[:-1]], ends, strict=True))


def aspects_of(examples: Sequence[Example]) -> list[str]:
    """The aspects that the targets of some examples have, in the order in which they come."""
    found = (label for e in examples for _, _, label in word_aspects(e.task, e.target))
    return list(dict.fromkeys(found))


def with_aspect(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, aspect: str
) -> list[Example]:
    """The examples whose target has a token of an aspect, in their order.

    `build_prompts` refuses the others: their loss would be a mean over nothing.
    """
    kept = []
    for example in examples:
        ids = tokenizer(example.target, add_special_tokens=False)["input_ids"]
        if aspect in token_aspects(example, tokenizer, ids):
            kept.append(example)
    return kept
