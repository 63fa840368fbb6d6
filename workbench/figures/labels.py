"""Text in figures: names from data shown as they are, numbers, intervals, thinned ticks."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

# Wider than the average letter of the template's widest font at 12 px.
LETTER = 7.2
# Pixels that 0.00 takes in that font.
NUMBER = 27.0


def escape(text: object) -> str:
    """Text from data, so that Plotly shows it as it is.

    Plotly reads a part of HTML in every label, and TeX between dollar signs where the page has
    MathJax, as Jupyter's has.
    """
    return html.escape(str(text), quote=False).replace("$", "&#36;")


def shorten(text: object, letters: int) -> str:
    """Text from data, escaped; the middle of a long one is left out, as ids differ at the ends."""
    whole = " ".join(str(text).split())
    if len(whole) > letters:
        tail = (letters - 1) // 2
        whole = f"{whole[: letters - 1 - tail]}…{whole[len(whole) - tail :]}"
    return escape(whole)


def width(names: Sequence[str], letters: int) -> int:
    """Pixels that the longest of some shortened names takes."""
    return math.ceil(min(max(map(len, names)), letters) * LETTER)


def fits(number: int, side: float) -> bool:
    """Whether a number such as 0.25 has room in each of so many cells along a side in pixels."""
    return side >= number * NUMBER


def missing(value: float | None) -> bool:
    """Whether there is no number: NaN, or None as NaN comes back from JSON."""
    return value is None or math.isnan(value)


def interval(mean: float, low: float, high: float, spec: str = ".3f") -> str:
    """A mean with its interval, or a word that there is none."""
    if missing(low) and missing(high):
        return f"{mean:{spec}}, no interval"
    ends = ("open" if missing(end) else f"{end:{spec}}" for end in (low, high))
    return f"{mean:{spec}}, 95 % [{', '.join(ends)}]"


def count(number: int, noun: str) -> str:
    """`1 user`, `2 users`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def thinned(number: int, most: int) -> list[int]:
    """Positions from 0 to `number` - 1, at most `most` of them, a power of two apart."""
    step = 1
    while math.ceil(number / step) > max(most, 1):
        step *= 2
    return list(range(0, number, step))
