"""Which items of a profile go into the prompt, and in which order."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import get_args

from workbench.data.examples import Example
from workbench.data.tasks import Ranking, get_task
from workbench.errors import InputError


def rank_profile(example: Example, k: int, ranking: Ranking | None = None) -> list[int]:
    """Positions of the k items to show, the most relevant first.

    Args:
        example: Whose profile.
        k: At most how many; 0 shows none.
        ranking: `bm25` against the query's own text, `recency` (newest `date` first; without
            dates the last item of the file is the newest), `first` (the file's order), or None
            for the task's default. Equal scores keep the file's order.

    Raises:
        InputError: k is negative or the ranking is unknown.
    """
    if k < 0:
        raise InputError(f"the number of profile items must be >= 0, got {k}")
    ranking = ranking or get_task(example.task).ranking
    if ranking not in get_args(Ranking):
        raise InputError(f"unknown ranking {ranking!r}; known are {', '.join(get_args(Ranking))}")
    positions = list(range(len(example.profile)))
    if ranking == "recency":
        positions.sort(key=lambda i: (_date(example.profile[i]), i), reverse=True)
    elif ranking == "bm25":
        scores = _bm25(example)
        positions.sort(key=lambda i: -scores[i])
    return positions[:k]


def _date(item: Mapping[str, str]) -> tuple[int, ...]:
    """Year, month, day or whatever numbers a date has; one without a date is the oldest."""
    return tuple(map(int, re.findall(r"\d+", item.get("date", ""))))


def _bm25(example: Example) -> list[float]:
    import bm25s

    # It logs every index it builds, and here there is one for every example.
    logging.getLogger("bm25s").setLevel(logging.WARNING)

    task = get_task(example.task)
    found = task.match.search(example.query)
    query = found[1] if found else example.query
    if len(example.profile) < 2:
        return [0.0] * len(example.profile)
    corpus = [" ".join(item[name] for name in task.search) for item in example.profile]
    options = {"stopwords": None, "show_progress": False}
    documents = bm25s.tokenize(corpus, return_ids=False, **options)
    words = bm25s.tokenize([query], return_ids=False, **options)[0]
    held = set().union(*documents)
    known = [word for word in words if word in held]
    if not known:
        return [0.0] * len(corpus)
    index = bm25s.BM25()
    index.index(documents, show_progress=False)
    return [float(score) for score in index.get_scores(known)]
