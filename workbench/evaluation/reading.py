"""How an answer is read before it is scored: strictly, as LaMP's authors do, or leniently.

A model that says "The answer is [1]." has answered, and a strict reading counts it wrong. Which
reading is fair depends on what is asked, so a table says which was used.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Literal, get_args

from workbench.data.examples import Example
from workbench.data.tasks import get_task
from workbench.errors import InputError

Reading = Literal["strict", "lenient"]
READINGS: tuple[str, ...] = get_args(Reading)


def read(task: str, text: str, how: Reading) -> str:
    """What an answer is taken to say.

    Args:
        task: A key of `workbench.data.tasks.TASKS`.
        text: What the model wrote.
        how: `strict`: the text without spaces at its ends. `lenient`: the first label of the
            task found in it. Labels are found as whole words, whatever their case and spacing;
            of two that begin at one place the longer is meant ("dark comedy" is no "dark"). A
            rating is a number of its own: "4", "4.0", "4/5" and "4 out of 5" are 4, while
            "4.5", "14", "-4" and the scale's own 5 are none. The first label is taken even where
            the text goes on to another ("not [1] but [2]" is [1]).

    Returns:
        For `lenient` the label as the task spells it, or the text as it is where there is none:
        unreadable. Texts of generation tasks are returned as they are.

    Raises:
        InputError: There is no such task or reading.
    """
    if how not in READINGS:
        raise InputError(f"unknown reading {how!r}; known are {', '.join(READINGS)}")
    if not get_task(task).labels:
        return text
    if how == "strict":
        return text.strip()
    pattern, spelling = _labels(task)
    found = pattern.search(text)
    return spelling[_plain(found["label"])] if found else text


def readable(example: Example, answer: str) -> bool:
    """Whether an answer is one of the task's labels; a text always is."""
    labels = get_task(example.task).labels
    return not labels or answer.strip() in labels


def _plain(label: str) -> str:
    return " ".join(label.split()).lower()


@cache
def _labels(task: str) -> tuple[re.Pattern[str], dict[str, str]]:
    """A pattern that finds the task's labels, and their spelling by what it finds."""
    spec = get_task(task)
    choices = "|".join(
        # A word has ends; a bracket is an end itself.
        (r"(?<!\w)" if label[0].isalnum() else "")
        + r"\s+".join(re.escape(word) for word in label.split())
        + (r"(?!\w)" if label[-1].isalnum() else "")
        for label in sorted(spec.labels, key=len, reverse=True)
    )
    pattern = f"(?P<label>{choices})"
    if spec.kind == "rating":
        # Before it no decimal mark, minus or range, nor what announces the end of the scale;
        # behind it no decimals but zeros.
        before = r"(?<!\d[.,])(?<![-−–/])(?<!/ )(?<!out of )"
        pattern = rf"{before}{pattern}(?:\.0+)?(?![.,]?\d)(?!\w)"
    return re.compile(pattern, re.IGNORECASE), {_plain(label): label for label in spec.labels}
