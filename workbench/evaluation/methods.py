"""The methods of a table by name, and the settings that each is tried with.

A method is a contrast with settings still open. Its candidates are listed from less steering to
more, so that the first of equally good ones is the gentlest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from workbench import runs
from workbench.errors import InputError
from workbench.heads import HeadSet
from workbench.steering.contrast import (
    CAD,
    DPS,
    LAYER_RANGES,
    Contrast,
    DeCoRe,
    DoLa,
    Entropy,
    NoProfile,
    Strength,
)

PLAIN, RANDOM, BOTH = "plain", "random", "dps+cad"
METHODS = (PLAIN, "no-profile", "cad", "dola", "decore", RANDOM, "dps", BOTH)
FIXED = (PLAIN, "no-profile")  # nothing about them is chosen
ON_HEADS = (RANDOM, "dps", BOTH)  # they need a run of head scores
_SIGNS = {"k": "K", "gamma": "γ", "cad": "CAD", "layers": "layers"}


@dataclass(frozen=True)
class Candidate:
    """A method with its settings.

    Attributes:
        method: One of `METHODS`.
        contrast: What it is decoded with; None for the plain model.
        settings: Names and plain values of what was open: `k`, `gamma`, `cad`, `layers`.
        heads: The heads that the second view goes without, if any.
    """

    method: str
    contrast: Contrast | None
    settings: Mapping[str, Any] = field(default_factory=dict)
    heads: HeadSet | None = None

    @property
    def key(self) -> str:
        """A name for files."""
        return "-".join(f"{name}{value}" for name, value in self.settings.items()) or "only"

    @property
    def words(self) -> str:
        """The settings as tables print them."""
        return in_words(self.settings)

    def record(self) -> dict[str, Any]:
        """Everything that decides its answers, as plain values."""
        heads = {} if self.heads is None else {"heads": [str(head) for head in self.heads]}
        return {**self.settings, **heads}

    def digest(self) -> str:
        """What tells its answers from another's."""
        return runs.digest([self.method, {**self.record(), "heads": sorted(map(str, self._set))}])

    @property
    def _set(self) -> Sequence[Any]:
        return () if self.heads is None else self.heads.heads


def in_words(settings: Mapping[str, Any]) -> str:
    """Settings as tables print them, such as `K 4, γ 0.5, CAD 1`."""
    named = ((_SIGNS[key], value) for key, value in settings.items() if key in _SIGNS)
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in named
    )


def check_methods(names: Sequence[str]) -> tuple[str, ...]:
    """The methods in the order asked for, plain first: differences are taken from it.

    Raises:
        InputError: A name is unknown or there twice, or there is none.
    """
    for name in names:
        if name not in METHODS:
            raise InputError(f"unknown method {name!r}; known are {', '.join(METHODS)}")
        if list(names).count(name) > 1:
            raise InputError(f"method {name} is named twice")
    if not names:
        raise InputError(f"no method is named; known are {', '.join(METHODS)}")
    return (PLAIN, *(name for name in names if name != PLAIN))


def fixed(method: str) -> Candidate:
    """The one candidate of a method of `FIXED`."""
    return Candidate(method, None if method == PLAIN else NoProfile())


def dps(sets: Mapping[int, HeadSet], gammas: Sequence[float]) -> list[Candidate]:
    """DPS for every K, a set each, and every gamma."""
    return [
        _on_heads("dps", DPS(sets[k], gamma), gamma, sets[k])
        for gamma in sorted(gammas)
        for k in sorted(sets)
    ]


def decore(sets: Mapping[int, HeadSet], gammas: Sequence[float]) -> list[Candidate]:
    """DeCoRe with constant strengths and, after them, its own, which follows the entropy."""
    strengths: list[Strength] = [*sorted(gammas), Entropy()]
    return [
        _on_heads("decore", DeCoRe(sets[k], gamma), gamma, sets[k])
        for gamma in strengths
        for k in sorted(sets)
    ]


def random(heads: HeadSet, gammas: Sequence[float]) -> list[Candidate]:
    """DPS with one random set."""
    return [_on_heads(RANDOM, DPS(heads, gamma), gamma, heads) for gamma in sorted(gammas)]


def cad(gammas: Sequence[float]) -> list[Candidate]:
    """Context-aware decoding."""
    return [Candidate("cad", CAD(gamma), {"gamma": gamma}) for gamma in sorted(gammas)]


def dola() -> list[Candidate]:
    """DoLa on the lower and on the upper half of the layers."""
    return [Candidate("dola", DoLa(layers), {"layers": layers}) for layers in LAYER_RANGES]


def both(heads: HeadSet, gammas: Sequence[float]) -> list[Candidate]:
    """DPS and CAD added up, in every pair of strengths."""
    pairs = sorted(((a, b) for a in gammas for b in gammas), key=lambda pair: (sum(pair), pair))
    return [
        Candidate(BOTH, DPS(heads, a) + CAD(b), {"k": len(heads), "gamma": a, "cad": b}, heads)
        for a, b in pairs
    ]


def _on_heads(method: str, contrast: DPS, gamma: Strength, heads: HeadSet) -> Candidate:
    strength = str(gamma) if isinstance(gamma, Entropy) else float(gamma)
    return Candidate(method, contrast, {"k": len(heads), "gamma": strength}, heads)
