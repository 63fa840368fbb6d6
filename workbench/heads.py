"""Attention heads, sets of them, and the arrays of gates that switch them.

A gate array is indexed [layer, head]: 1 leaves a head alone, 0 ablates it. `layer` counts all
blocks of the model, also those without attention (hybrid models), whose number of heads is 0.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workbench.errors import InputError
from workbench.runs import read_json

FORMAT = "workbench.heads/1"
GATES_FORMAT = "workbench.gates/1"


@dataclass(frozen=True, order=True)
class Head:
    """One attention head, printed `L9H6`."""

    layer: int
    head: int

    def __str__(self) -> str:
        return f"L{self.layer}H{self.head}"

    @classmethod
    def parse(cls, text: str) -> Head:
        """Read `L9H6`, or `9-6` as the released code writes it.

        Raises:
            InputError: The text is neither.
        """
        match = re.fullmatch(r"\s*[Ll]?(\d+)\s*(?:[Hh]|-)\s*(\d+)\s*", text)
        if not match:
            raise InputError(f"a head is written like L9H6, got {text!r}")
        return cls(int(match[1]), int(match[2]))


@dataclass(frozen=True)
class HeadSet:
    """Distinct heads, the most important first where they come from a ranking.

    Attributes:
        heads: The heads; two sets are equal if they hold the same heads, in any order.
        ties: How many heads share the score of the last one that was taken, beyond those that
            were taken: the tie rule, not the scores, kept these out. 0 means a clean cut.
    """

    heads: tuple[Head, ...]
    ties: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        repeated = [str(h) for h, n in Counter(self.heads).items() if n > 1]
        if repeated:
            raise InputError(f"a head set names a head once, got {', '.join(repeated)} twice")

    def __iter__(self) -> Iterator[Head]:
        return iter(self.heads)

    def __len__(self) -> int:
        return len(self.heads)

    def __contains__(self, head: object) -> bool:
        return head in self.heads

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HeadSet) and set(self.heads) == set(other.heads)

    def __hash__(self) -> int:
        return hash(frozenset(self.heads))

    def __str__(self) -> str:
        return ", ".join(map(str, self.heads)) or "no heads"

    @classmethod
    def parse(cls, text: str) -> HeadSet:
        """Read `L3H5, L4H0`; commas or spaces between the heads."""
        return cls(tuple(Head.parse(part) for part in re.split(r"[,\s]+", text.strip()) if part))

    def check(self, heads_per_layer: Sequence[int]) -> None:
        """Refuse heads that a model doesn't have.

        Raises:
            InputError: A head is outside the model; the message names it and the limits.
        """
        for head in self.heads:
            inside = 0 <= head.layer < len(heads_per_layer)
            if not inside or not 0 <= head.head < heads_per_layer[head.layer]:
                raise InputError(
                    f"{head} is not a head of this model, which has {_shape(heads_per_layer)}; "
                    "was the head set made for another model?"
                )

    def gates(self, heads_per_layer: Sequence[int]) -> NDArray[np.float32]:
        """Gates [layer, head] that ablate exactly these heads.

        Raises:
            InputError: A head is outside the model.
        """
        self.check(heads_per_layer)
        gates = np.ones((len(heads_per_layer), max(heads_per_layer)), dtype=np.float32)
        for head in self.heads:
            gates[head.layer, head.head] = 0.0
        return gates

    def save(self, path: Path | str) -> None:
        """Write the set as JSON, in the workbench's own format."""
        value = {"format": FORMAT, "ties": self.ties, "heads": [str(h) for h in self.heads]}
        Path(path).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path | str) -> HeadSet:
        """Read a set from our JSON, or from the released code's `*_top_heads.json`.

        Raises:
            InputError: The file is missing, is not JSON, or has neither form.
        """
        value = read_json(path)
        try:
            if isinstance(value, dict) and value.get("format") == FORMAT:
                return cls(tuple(map(Head.parse, value["heads"])), ties=int(value.get("ties", 0)))
            if isinstance(value, dict) and "preference_heads" in value:
                pairs = value["preference_heads"]
                return cls(tuple(Head(int(layer), int(head)) for layer, head in pairs))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: a damaged head set: {error}") from error
        raise InputError(
            f"{path}: not a head set; wanted a file of format {FORMAT!r} or the released code's "
            "*_top_heads.json with a `preference_heads` list"
        )


@dataclass(frozen=True)
class Gates:
    """A gate for every head of a model; where a `HeadSet` says in or out, this says how much.

    Attributes:
        values: `[layer][head]` in [0, 1], a layer as long as it has heads, rounded to float32. 1
            leaves a head alone, 0 ablates it.

    Raises:
        InputError: A gate is outside [0, 1] or no number.

    Source:
        Section 5 of the paper, item 4, whose gates are `clip(1 - sum_c p_c W_c, 0, 1)`.
    """

    values: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        rounded = tuple(tuple(np.asarray(row, dtype=np.float32).tolist()) for row in self.values)
        for head, gate in _each(rounded):
            if not 0 <= gate <= 1:
                raise InputError(f"gates lie between 0 (ablated) and 1, got {gate:g} for {head}")
        object.__setattr__(self, "values", rounded)

    @classmethod
    def from_weights(
        cls, weights: NDArray[np.floating[Any]], heads_per_layer: Sequence[int]
    ) -> Gates:
        """The gates `clip(1 - weights, 0, 1)`.

        Args:
            weights: Of each head, [layer, head]; cells beyond a layer's heads are ignored.
            heads_per_layer: The model's.

        Raises:
            InputError: The weights have another shape, or a head's is NaN.
        """
        wanted = len(heads_per_layer), max(heads_per_layer)
        if weights.shape != wanted:
            raise InputError(f"wanted weights [layer, head] {wanted}, got {weights.shape}")
        pairs = zip(np.clip(1 - weights, 0.0, 1.0), heads_per_layer, strict=True)
        return cls(tuple(tuple(row[:count].tolist()) for row, count in pairs))

    def __len__(self) -> int:
        """How many heads are gated at all."""
        return sum(gate < 1 for _, gate in _each(self.values))

    def __str__(self) -> str:
        gated = sorted((gate, head) for head, gate in _each(self.values) if gate < 1)
        return ", ".join(f"{head} at {gate:.2f}" for gate, head in gated) or "no heads"

    def check(self, heads_per_layer: Sequence[int]) -> None:
        """Refuse a model of another shape.

        Raises:
            InputError: It has other layers or heads.
        """
        own = tuple(map(len, self.values))
        if own != tuple(heads_per_layer):
            raise InputError(
                f"the gates are for {_shape(own)}, and this model has {_shape(heads_per_layer)}; "
                "were they made for another model?"
            )

    def gates(self, heads_per_layer: Sequence[int]) -> NDArray[np.float32]:
        """The gates [layer, head], 1 where a layer has no such head; refuses what `check` does."""
        self.check(heads_per_layer)
        gates = np.ones((len(heads_per_layer), max(heads_per_layer)), dtype=np.float32)
        for layer, row in enumerate(self.values):
            gates[layer, : len(row)] = row
        return gates

    def save(self, path: Path | str) -> None:
        """Write the gates as JSON, in the workbench's own format."""
        value = {"format": GATES_FORMAT, "gates": [list(row) for row in self.values]}
        Path(path).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path | str) -> Gates:
        """Read gates written by `save`.

        Raises:
            InputError: The file is missing, is not JSON, or holds no such gates.
        """
        value = read_json(path)
        if not isinstance(value, dict) or value.get("format") != GATES_FORMAT:
            raise InputError(f"{path}: no gates; wanted a file of format {GATES_FORMAT!r}")
        try:
            return cls(tuple(tuple(map(float, row)) for row in value["gates"]))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: damaged gates: {error}") from error


def _each(values: Sequence[Sequence[float]]) -> Iterator[tuple[Head, float]]:
    for layer, row in enumerate(values):
        for head, value in enumerate(row):
            yield Head(layer, head), value


def _shape(heads_per_layer: Sequence[int]) -> str:
    counts = sorted(set(heads_per_layer))
    heads = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"{len(heads_per_layer)} layers (0 to {len(heads_per_layer) - 1}) of {heads} heads"


def all_heads(heads_per_layer: Sequence[int]) -> list[Head]:
    """Every head of a model, by layer and then by number."""
    return [Head(layer, h) for layer, n in enumerate(heads_per_layer) for h in range(n)]


def read_head_scores(
    path: Path | str, heads_per_layer: Sequence[int] | None = None
) -> NDArray[np.float64]:
    """Read a published list of head scores, `{"layer-head": [scores]}`.

    Args:
        path: A JSON file of Wu et al.'s retrieval scores, or of this paper's `*_pcs.json`. A
            value is a list, one score an example, or a single number.
        heads_per_layer: The model's, which the list is then checked against; if None, the array
            is as large as the list's highest head asks for.

    Returns:
        Mean scores [layer, head]; NaN for heads that the list doesn't hold.

    Raises:
        InputError: The file is missing or isn't such a list, or a head isn't the model's. The
            message names the entry.
    """
    value = read_json(path)
    if not isinstance(value, dict) or not value:
        raise InputError(f'{path}: not a list of head scores; wanted {{"layer-head": [scores]}}')
    means: dict[Head, float] = {}
    for key, entry in value.items():
        try:
            head, numbers = Head.parse(key), _numbers(entry)
        except InputError as error:
            raise InputError(f"{path}: entry {key!r}: {error}") from None
        if head in means:
            raise InputError(f"{path}: entry {key!r}: {head} is there twice")
        means[head] = float(np.mean(numbers))
    heads = HeadSet(tuple(means))
    shape = heads_per_layer or _smallest_shape([heads])
    try:
        heads.check(shape)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    scores = np.full((len(shape), max(shape)), np.nan)
    for head, mean in means.items():
        scores[head.layer, head.head] = mean
    return scores


def _numbers(entry: object) -> list[float]:
    """The scores of an entry."""
    numbers: list[Any] = entry if isinstance(entry, list) else [entry]
    # True is an int to Python; NaN and Infinity are numbers to its JSON reader.
    fit = [type(n) in (int, float) and math.isfinite(n) for n in numbers]
    if not numbers or not all(fit):
        raise InputError(f"wanted a finite number or a list of them, got {entry!r:.60}")
    return numbers


def rank(scores: NDArray[np.floating[Any]]) -> list[Head]:
    """All heads with a score, highest first; equal scores go to the lower layer, then number.

    Args:
        scores: Any real scores [layer, head]; NaN marks a head that isn't there.
    """
    layers, heads = np.nonzero(~np.isnan(scores))
    order = np.lexsort((heads, layers, -scores[layers, heads]))
    return [Head(int(layers[i]), int(heads[i])) for i in order]


def check_k(k: int, heads: int) -> None:
    """Refuse a number of heads that a model with so many heads can't give."""
    if not 1 <= k <= heads:
        raise InputError(f"K must be between 1 and {heads} (the model's heads), got {k}")


def top_k(scores: NDArray[np.floating[Any]], k: int) -> HeadSet:
    """The K heads with the highest scores.

    Args:
        scores: Any real scores [layer, head]; NaN marks a head that isn't there.
        k: How many.

    Returns:
        The heads, highest first. Ties go to the lower layer, then to the lower head number; how
        many heads that rule shut out is counted in `ties`. The released code breaks ties by the
        order of a sort over quantised scores and does not report them.

    Raises:
        InputError: k is below 1 or above the number of heads with a score.
    """
    order = rank(scores)
    check_k(k, len(order))
    last = scores[order[k - 1].layer, order[k - 1].head]
    equal = int(np.sum(scores == last))
    taken = sum(1 for h in order[:k] if scores[h.layer, h.head] == last)
    return HeadSet(tuple(order[:k]), ties=equal - taken)


def jaccard(a: HeadSet, b: HeadSet) -> float:
    """Shared heads over all heads of either; two empty sets overlap fully (1.0)."""
    union = set(a) | set(b)
    return len(set(a) & set(b)) / len(union) if union else 1.0


def membership(sets: Sequence[HeadSet], heads_per_layer: Sequence[int]) -> NDArray[np.float32]:
    """1 where a set holds a head, else 0: [set, head], the heads of all layers in a row."""
    gates = [heads.gates(heads_per_layer) for heads in sets]
    return (1 - np.stack(gates)).reshape(len(gates), -1)


def jaccard_of(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    """Jaccard [set of a, set of b] of two membership arrays."""
    shared = (a @ b.T).astype(np.float64)
    either = a.sum(axis=1)[:, None] + b.sum(axis=1)[None, :] - shared
    return np.divide(shared, either, out=np.ones_like(shared), where=either > 0)


def jaccard_matrix(
    sets: Sequence[HeadSet],
    others: Sequence[HeadSet] | None = None,
    heads_per_layer: Sequence[int] | None = None,
) -> NDArray[np.float64]:
    """Pairwise Jaccard overlap [set, other]; the others are the sets themselves by default."""
    against = sets if others is None else others
    shape = heads_per_layer or _smallest_shape([*sets, *against])
    return jaccard_of(membership(sets, shape), membership(against, shape))


def _smallest_shape(sets: Sequence[HeadSet]) -> tuple[int, ...]:
    heads = [head for group in sets for head in group] or [Head(0, 0)]
    widest = max(head.head for head in heads) + 1
    return (widest,) * (max(head.layer for head in heads) + 1)


def chance_jaccard(k: int, total: int) -> float:
    """Expected Jaccard overlap of two sets of K heads drawn at random from `total`.

    The shared count is hypergeometric; the expectation is taken exactly, not simulated.

    Raises:
        ValueError: k is below 1 or above `total`.
    """
    if not 1 <= k <= total:
        raise ValueError(f"K must be between 1 and {total}, got {k}")
    draws = math.comb(total, k)
    return sum(
        math.comb(k, shared) * math.comb(total - k, k - shared) / draws * shared / (2 * k - shared)
        for shared in range(max(0, 2 * k - total), k + 1)
    )


def random_matched(
    heads: HeadSet, heads_per_layer: Sequence[int], rng: np.random.Generator
) -> HeadSet:
    """Random heads, in every layer as many as the set has there.

    The heads of the set itself may be drawn: under the hypothesis that it is not special, they
    are as random as any others.

    Raises:
        InputError: A head is outside the model.
    """
    heads.check(heads_per_layer)
    per_layer = Counter(head.layer for head in heads)
    drawn = [
        Head(layer, int(h))
        for layer, count in sorted(per_layer.items())
        for h in rng.choice(heads_per_layer[layer], size=count, replace=False)
    ]
    return HeadSet(tuple(drawn))
