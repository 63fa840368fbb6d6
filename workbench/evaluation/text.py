"""Qualities of generated text that need no gold output: how varied it is, how often it repeats.

Words are what spaces separate, in lower case; an n-gram is n of them in a row. A text of fewer
than n words has none.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    """All n-grams of a text, in order.

    Raises:
        ValueError: n is below 1.
    """
    if n < 1:
        raise ValueError(f"an n-gram has 1 word or more, got n = {n}")
    words = text.lower().split()
    return list(zip(*(words[start:] for start in range(n)), strict=False))


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Share of distinct n-grams among those of all texts together; NaN if there are none.

    It falls as texts are added, since words recur: compare it between equally many texts, and
    don't resample it. For intervals there is `distinct_parts`.

    Source:
        distinct-1 and distinct-2 of Li et al., 2016 (arXiv 1510.03055).
    """
    found = [gram for text in texts for gram in ngrams(text, n)]
    return len(set(found)) / len(found) if found else float("nan")


def distinct_parts(texts: Sequence[str], n: int) -> NDArray[np.float64]:
    """Numbers of distinct and of all n-grams within each text, [text, 2].

    With `share` and `stats.bootstrap_statistic` they give the share of n-grams that are new in
    their own text, which longer texts weigh more in, and a text without n-grams not at all.
    """
    found = [ngrams(text, n) for text in texts]
    return np.array([(len(set(grams)), len(grams)) for grams in found], dtype=np.float64).reshape(
        -1, 2
    )


def share(sums: NDArray[np.float64], counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """First part over second, a `stats.Combine`; NaN where there is nothing to share."""
    whole = sums[..., 1]
    return np.divide(sums[..., 0], whole, out=np.full_like(whole, np.nan), where=whole > 0)


def repetition(text: str, n: int = 4) -> float:
    """Share of a text's n-grams that stood in it before; 0 for a text of n words or fewer.

    Source:
        rep-n of Welleck et al., 2020 (arXiv 1908.04319), as a fraction.
    """
    grams = ngrams(text, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
