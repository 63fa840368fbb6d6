"""Whose a row is where the data doesn't say: rows whose profiles agree are one user's.

LaMP's official files name no user, and the id of a profile's item is made from the row's, so that
the same item has another id in every row. Its texts stay the same: complete profiles of one author
are nearly equal, and profiles cut to the items retrieved for a query overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components

from workbench.data.examples import Example
from workbench.data.tasks import get_task

SHARE = 0.5
# Tasks whose items a single person wrote. Movies (LaMP-2) are tagged by many, and papers (LaMP-1,
# LaMP-5) have several authors.
OWN_WRITING = frozenset({"LaMP-3", "LaMP-4", "LaMP-7"})
LONG = 60  # characters; "Great, thank you!" is written by many
BLOCK = 1024  # rows compared with all others at once; bounds the memory where many share an item


def infer_users(examples: Sequence[Example]) -> list[Example]:
    """Name the users of those examples whose data names none.

    Two rows of a task are one user's if their profiles share at least half of the different items
    of the smaller one; items are equal if all the task's fields are. Any shared item would be too
    little where users share items, as movies in LaMP-2. In LaMP-3, 4 and 7, whose items are
    texts by one person, a single shared one of at least 60 characters is enough: profiles cut to
    what was retrieved for a query may have no more in common. Rows that a third one links to
    both are one user's, too.

    This is what can be told from the texts: authors who wrote most of their papers together
    become one user, and one author's rows whose profiles have nothing in common stay two.

    Returns:
        The examples in their order. Where `inferred` is set, `user` is `TASK:ID`, with the id of
        the user's first row here; others stay as they are.
    """
    nameless = [index for index, example in enumerate(examples) if example.inferred]
    found = list(examples)
    if not nameless:
        return found
    first = _first_rows([examples[index] for index in nameless])
    for index, row in zip(nameless, first, strict=True):
        named_after = examples[nameless[row]]
        user = f"{named_after.task}:{named_after.id}"
        found[index] = replace(examples[index], user=user)
    return found


def _first_rows(examples: Sequence[Example]) -> np.ndarray:
    """For each example the position of its user's first."""
    holds, telling = _incidence(examples)
    count = len(examples)
    one, other = _alike(holds)
    # A telling item is a node of its own, linked to the rows that hold it.
    rows, items = holds.nonzero()
    kept = telling[items]
    ends = (np.concatenate([one, rows[kept]]), np.concatenate([other, items[kept] + count]))
    nodes = count + len(telling)
    links = coo_array((np.ones(len(ends[0]), dtype=bool), ends), shape=(nodes, nodes))
    groups = connected_components(links, directed=False)[1][:count]
    _, first, group = np.unique(groups, return_index=True, return_inverse=True)
    return np.asarray(first[group])


def _alike(holds: csr_array) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of rows that share at least half of the smaller one's items."""
    sizes = np.diff(holds.indptr)
    ones, others = [], []
    for start in range(0, holds.shape[0], BLOCK):
        shared = (holds[start : start + BLOCK] @ holds.T).tocoo()
        one, other = shared.row + start, shared.col
        enough = shared.data >= SHARE * np.minimum(sizes[one], sizes[other])
        ones.append(one[enough])
        others.append(other[enough])
    return np.concatenate(ones), np.concatenate(others)


def _incidence(examples: Sequence[Example]) -> tuple[csr_array, np.ndarray]:
    """(examples, different items), 1 where the profile holds the item; which items tell alone."""
    numbers: dict[tuple[str, ...], int] = {}
    rows: list[int] = []
    columns: list[int] = []
    for row, example in enumerate(examples):
        fields = get_task(example.task).fields
        items = {(example.task, *(item[name] for name in fields)) for item in example.profile}
        rows += [row] * len(items)
        columns += [numbers.setdefault(item, len(numbers)) for item in items]
    telling = [
        task in OWN_WRITING and sum(map(len, texts)) >= LONG for task, *texts in numbers
    ] or [False]
    shape = (len(examples), len(telling))
    ones = np.ones(len(rows), dtype=np.int32)
    return csr_array((ones, (rows, columns)), shape=shape), np.array(telling)
