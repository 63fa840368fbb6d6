"""Text that has no user: what ablation and steering do there is damage and no preference.

Our own short passages of plain fact, the testbed's tasks as nobody in particular would answer
them, or the reader's own text file.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path

from workbench.data.examples import Example
from workbench.data.tasks import TEXT
from workbench.data.testbed import TASKS, draw_item, draw_user, query_text
from workbench.errors import InputError

BUILTIN, NOBODY = "builtin", "testbed"
# The space after a sentence; an abbreviation may end one early, which does no harm here.
_END = re.compile(r"(?<=[.!?])\s+")


def neutral_examples(source: str | Path = BUILTIN, count: int = 64, seed: int = 0) -> list[Example]:
    """Examples without a profile, each of a user of its own: the unit that is resampled.

    Args:
        source: `builtin`, 48 passages in English; `testbed`, its three tasks in turn by users who
            follow none of their preferences, so that only what all share is left; or a text file,
            in UTF-8, with a blank line between passages of two or more sentences.
        count: At most so many. Of more passages they are drawn at random and keep their order.
        seed: Of the draw.

    Returns:
        The examples. A passage is of task `text`: its first sentence is the query, the rest the
        target.

    Raises:
        InputError: The count is below 1, or the file can't be read, holds no passage or one with
            a single sentence.
    """
    if count < 1:
        raise InputError(f"neutral text needs 1 or more examples, got count={count}")
    if source == NOBODY:
        return list(_by_nobody(count, seed))
    path = Path(__file__).with_name("neutral.txt") if source == BUILTIN else Path(source)
    passages = _passages(path)
    drawn = random.Random(f"{seed}/neutral").sample(range(len(passages)), min(count, len(passages)))
    return [
        Example(f"{i + 1}", f"passage-{i + 1}", TEXT, query=first, target=rest, profile=())
        for i, (first, rest) in ((i, passages[i]) for i in sorted(drawn))
    ]


def _by_nobody(count: int, seed: int) -> Iterator[Example]:
    rng = random.Random(f"{seed}/nobody")
    for i in range(count):
        task, name = TASKS[i % len(TASKS)], f"nobody-{i:03d}"
        item = draw_item(rng, draw_user(rng, "test", name, (0.0, 0.0)), task)
        yield Example(name, name, task, query_text(task, item.text), item.answer, profile=())


def _passages(path: Path) -> list[tuple[str, str]]:
    """First sentence and rest of every passage of a file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(
            f"{path}: can't be read: {error.strerror}; neutral text is builtin, testbed or a file"
        ) from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not UTF-8 (byte {error.start}); save the text as UTF-8"
        ) from None
    passages = []
    for number, block in enumerate(filter(None, map(str.strip, re.split(r"\n\s*\n", text))), 1):
        first, *rest = _END.split(" ".join(block.split()), maxsplit=1)
        if not rest:
            raise InputError(
                f"{path}: passage {number} ({first[:40]!r}) is a single sentence; it needs a "
                "second one to be predicted from the first"
            )
        passages.append((first, rest[0]))
    if not passages:
        raise InputError(
            f"{path}: holds no text; wanted passages of two or more sentences with a blank line "
            "between them"
        )
    return passages
