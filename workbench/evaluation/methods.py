"""The methods of a table by name, and the settings that each is tried with.

A method is a contrast with settings still open. Its candidates are listed from less steering to
more, so that the first of equally good ones is the gentlest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
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
        named = "-".join(f"{name}{value}" for name, value in self.settings.items()) or "only"
        return named.replace("/", "-by-")  # H/lnV: an entropy's share

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


def in_order(gammas: Sequence[Strength]) -> list[Strength]:
    """Strengths, each once: constants from small to large, then those that follow the entropy.

    An entropy is a share of its maximum, at most 1, before it is in nats.
    """
    constants = {gamma for gamma in gammas if not isinstance(gamma, Entropy)}
    following = {gamma for gamma in gammas if isinstance(gamma, Entropy)}
    return [*sorted(constants), *sorted(following, key=lambda e: (not e.normalised, str(e)))]


def plain_strength(gamma: Strength) -> float | str:
    """A strength as files and tables name it."""
    return str(gamma) if isinstance(gamma, Entropy) else float(gamma)


def dps(sets: Mapping[int, HeadSet], gammas: Sequence[Strength]) -> list[Candidate]:
    """DPS for every K, a set each, and every gamma."""
    return [
        _on_heads("dps", DPS(sets[k], gamma), gamma, sets[k])
        for gamma in in_order(gammas)
        for k in sorted(sets)
    ]


def decore(sets: Mapping[int, HeadSet], gammas: Sequence[Strength]) -> list[Candidate]:
    """DeCoRe with these strengths and in any case its own, which follows the entropy."""
    return [
        _on_heads("decore", DeCoRe(sets[k], gamma), gamma, sets[k])
        for gamma in in_order([*gammas, Entropy()])
        for k in sorted(sets)
    ]


def random(heads: HeadSet, gammas: Sequence[Strength]) -> list[Candidate]:
    """DPS with one random set."""
    return [_on_heads(RANDOM, DPS(heads, gamma), gamma, heads) for gamma in in_order(gammas)]


def cad(gammas: Sequence[Strength]) -> list[Candidate]:
    """Context-aware decoding."""
    return [
        Candidate("cad", CAD(gamma), {"gamma": plain_strength(gamma)}) for gamma in in_order(gammas)
    ]


def dola() -> list[Candidate]:
    """DoLa on the lower and on the upper half of the layers."""
    return [Candidate("dola", DoLa(layers), {"layers": layers}) for layers in LAYER_RANGES]


def both(heads: HeadSet, gammas: Sequence[Strength]) -> list[Candidate]:
    """DPS and CAD added up, in every pair of strengths: those of two constants come first."""
    ordered = in_order(gammas)

    def steering(pair: tuple[Strength, Strength]) -> tuple[float, ...]:
        constants = [float(one) for one in pair if not isinstance(one, Entropy)]
        return (-len(constants), sum(constants), *map(ordered.index, pair))

    found = []
    for a, b in sorted(product(ordered, ordered), key=steering):
        settings = {"k": len(heads), "gamma": plain_strength(a), "cad": plain_strength(b)}
        found.append(Candidate(BOTH, DPS(heads, a) + CAD(b), settings, heads))
    return found


def _on_heads(method: str, contrast: DPS, gamma: Strength, heads: HeadSet) -> Candidate:
    return Candidate(method, contrast, {"k": len(heads), "gamma": plain_strength(gamma)}, heads)
