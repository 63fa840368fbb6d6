"""Contrasts: a second view of the model, and with what strength it is decoded against.

| contrast | the second view | joined by |
|---|---|---|
| `DPS`, `DeCoRe` | the model without some heads | `full + gamma * (full - view)` |
| `CAD` | the prompt without the profile | `full + gamma * (full - view)` |
| `DoLa` | an earlier layer's prediction | `full - view` |
| `NoProfile`, `Ablated` | as above | `view`, alone: a control, not a contrast |

They add up: `DPS(heads, 0.5) + CAD(0.3)` is one loop with three views. `rules.py` holds the
arithmetic, `decode.py` the loop.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from workbench.errors import InputError
from workbench.heads import Gates, HeadSet

Kind = Literal["amplify", "replace", "early"]
Where = Literal["heads", "prompt", "layers"]
LAYER_RANGES = ("low", "high")


@dataclass(frozen=True)
class Entropy:
    """A strength that follows the plain model's uncertainty at each step.

    Attributes:
        factor: Multiplies the entropy.
        normalised: Divide the entropy by ln V, so that it lies in [0, 1]; otherwise it is in nats.
        cap: Most strength; None for no limit.

    Raises:
        InputError: factor or cap is negative or not a number.

    Source:
        DeCoRe (arXiv 2410.18860) and the released code of Preference Heads. That code ignores a
        cap of 0; here it switches the contrast off.
    """

    factor: float = 1.0
    normalised: bool = False
    cap: float | None = None

    def __post_init__(self) -> None:
        _check_strength("factor", self.factor)
        if self.cap is not None:
            _check_strength("cap", self.cap)

    def __str__(self) -> str:
        name = "H/lnV" if self.normalised else "H"
        text = name if self.factor == 1 else f"{self.factor:g}{name}"
        return text if self.cap is None else f"min({text}, {self.cap:g})"


Strength = float | Entropy


def _check_strength(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise InputError(f"{name} must be >= 0, got {value}")


@dataclass(frozen=True)
class Term:
    """One view and what is done with it: what the loop makes of a contrast.

    Attributes:
        kind: How it joins: see the table above.
        where: What is different in the view.
        strength: gamma of `amplify`; 1 for the others.
        heads: The heads that the view goes without, or how much of each it keeps, where it is
            about heads.
        layers: Candidate layers, where it is about layers.
    """

    kind: Kind
    where: Where
    strength: Strength = 1.0
    heads: HeadSet | Gates = field(default_factory=lambda: HeadSet(()))
    layers: str | tuple[int, ...] = "low"


@dataclass(frozen=True)
class Contrast(ABC):
    """What all contrasts have.

    Attributes:
        plausible: Only tokens that the plain model gives at least this share of its best token's
            probability stay in. 0 lets all in.
        max_kl: Most nats by which a step's distribution may move from the plain model's, as
            KL(steered, plain). Where it would move further, the strength is scaled down. None
            for no limit.

    Raises:
        InputError: `plausible` is outside [0, 1), or `max_kl` is negative or not a number.

    Source:
        The cut: contrastive decoding (arXiv 2210.15097), its V_head. The limit is ours.
    """

    plausible: float = field(default=0.0, kw_only=True)
    max_kl: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not 0 <= self.plausible < 1:
            raise InputError(f"plausible must be in [0, 1), got {self.plausible}")
        if self.max_kl is not None and not self.max_kl >= 0:
            raise InputError(f"max_kl must be >= 0 nats, got {self.max_kl}")

    @property
    @abstractmethod
    def terms(self) -> tuple[Term, ...]:
        """The views, those of strength 0 or without heads left out."""

    @property
    def active(self) -> bool:
        """Whether the contrast changes anything; if not, no second view is computed."""
        return len(self.terms) > 0

    @property
    def head_sets(self) -> tuple[HeadSet | Gates, ...]:
        """The heads that views go without, or the gates that they have, whatever the strength."""
        return ()

    def check(self, heads_per_layer: Sequence[int]) -> None:
        """Refuse heads or layers that a model doesn't have.

        Raises:
            InputError: A head or layer is outside the model.
        """
        for heads in self.head_sets:
            heads.check(heads_per_layer)
        for term in self.terms:
            if term.where == "layers":
                candidate_layers(term.layers, len(heads_per_layer), False)

    def __add__(self, other: Contrast) -> Sum:
        limits = [one.max_kl for one in (self, other) if one.max_kl is not None]
        return Sum(
            (*_parts(self), *_parts(other)),
            plausible=max(self.plausible, other.plausible),
            max_kl=min(limits, default=None),
        )


@dataclass(frozen=True)
class DPS(Contrast):
    """Differential Preference Steering: decode against the model without some heads.

    Attributes:
        heads: The heads that the second view goes without, in the prompt as well as after it
            (with `prefill="shared"`, after it only); or `Gates`, which take a part of a head
            away, as soft routing does.
        gamma: Strength, >= 0: a constant, or `Entropy`. 0 is the plain model.

    Raises:
        InputError: gamma is negative or not a number.

    Source:
        Section 4 of the paper, with its constant gamma. The released code takes the entropy of
        the base distribution instead, and lets the second view start from the intact model's
        cache, so that the heads have already read the profile there.
    """

    heads: HeadSet | Gates
    gamma: Strength = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.gamma, Entropy):
            _check_strength("gamma", self.gamma)

    @property
    def head_sets(self) -> tuple[HeadSet | Gates, ...]:
        """Its own."""
        return (self.heads,)

    @property
    def terms(self) -> tuple[Term, ...]:
        """The model without the heads."""
        if not len(self.heads) or _is_zero(self.gamma):
            return ()
        return (Term("amplify", "heads", self.gamma, self.heads),)


@dataclass(frozen=True)
class DeCoRe(DPS):
    """Decoding by contrasting retrieval heads: DPS's rule with heads that copy from the prompt.

    Attributes:
        heads: Retrieval heads, from `retrieval_heads` or a published list.
        gamma: Their strength; the entropy of the plain distribution in nats by default.

    Source:
        DeCoRe (arXiv 2410.18860), its entropy-controlled form.
    """

    gamma: Strength = field(default_factory=Entropy)


@dataclass(frozen=True)
class CAD(Contrast):
    """Context-aware decoding: decode against the same query without the profile.

    Attributes:
        gamma: Strength, >= 0, which that paper calls alpha; 0.5 there.

    Raises:
        InputError: gamma is negative or not a number.

    Source:
        Context-aware decoding (arXiv 2305.14739), equation 2, with the profile as the context.
    """

    gamma: Strength = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.gamma, Entropy):
            _check_strength("gamma", self.gamma)

    @property
    def terms(self) -> tuple[Term, ...]:
        """The prompt without the profile."""
        return () if _is_zero(self.gamma) else (Term("amplify", "prompt", self.gamma),)


@dataclass(frozen=True)
class DoLa(Contrast):
    """Decoding by contrasting layers: the last layer's log-probabilities less an earlier one's.

    At each step the candidate layer is taken whose prediction is farthest from the last one's in
    Jensen-Shannon divergence.

    Attributes:
        layers: `low` (even blocks of the lower half), `high` (of the upper half), or the numbers
            of the blocks whose input is read out.

    Raises:
        InputError: `layers` is neither.

    Source:
        DoLa (arXiv 2309.03883), equations 1 to 6, with its plausibility cut of 0.1. Each row
        chooses its own layer; Transformers' version chooses one for the whole batch.
    """

    layers: str | tuple[int, ...] = "low"
    plausible: float = field(default=0.1, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.layers, str) and self.layers not in LAYER_RANGES:
            raise InputError(f"layers must be low, high or numbers of blocks, got {self.layers!r}")
        if not isinstance(self.layers, str):
            object.__setattr__(self, "layers", tuple(self.layers))

    @property
    def terms(self) -> tuple[Term, ...]:
        """The early layers."""
        return (Term("early", "layers", layers=self.layers),)


@dataclass(frozen=True)
class NoProfile(Contrast):
    """The plain model on the prompt without the profile, in the same loop: a control.

    Its Kullback-Leibler divergence and log-probabilities are those from and under the plain model
    that sees the profile.
    """

    @property
    def terms(self) -> tuple[Term, ...]:
        """The prompt without the profile."""
        return (Term("replace", "prompt"),)


@dataclass(frozen=True)
class Ablated(Contrast):
    """The model without some heads, by itself: a control.

    Attributes:
        heads: The heads that are removed, or their gates.
    """

    heads: HeadSet | Gates

    @property
    def head_sets(self) -> tuple[HeadSet | Gates, ...]:
        """Its own."""
        return (self.heads,)

    @property
    def terms(self) -> tuple[Term, ...]:
        """The model without the heads."""
        return (Term("replace", "heads", heads=self.heads),) if len(self.heads) else ()


@dataclass(frozen=True)
class Sum(Contrast):
    """Several contrasts at once: each adds its own difference to the plain logits.

    Attributes:
        parts: The contrasts. The strictest of their cuts and limits hold for the sum.

    Raises:
        InputError: A control (`NoProfile`, `Ablated`) is among them; it would replace the logits
            that the others start from.
    """

    parts: tuple[Contrast, ...]

    def __post_init__(self) -> None:
        for part in self.parts:
            if isinstance(part, NoProfile | Ablated):
                raise InputError(f"{type(part).__name__} is a control and can't be added up")
        super().__post_init__()  # its own cut and limit, before those of the parts
        every = (self, *self.parts)
        limits = [one.max_kl for one in every if one.max_kl is not None]
        object.__setattr__(self, "plausible", max(one.plausible for one in every))
        object.__setattr__(self, "max_kl", min(limits, default=None))

    @property
    def head_sets(self) -> tuple[HeadSet | Gates, ...]:
        """Those of all parts."""
        return tuple(heads for part in self.parts for heads in part.head_sets)

    @property
    def terms(self) -> tuple[Term, ...]:
        """Those of all parts."""
        return tuple(term for part in self.parts for term in part.terms)


def _parts(contrast: Contrast) -> tuple[Contrast, ...]:
    return contrast.parts if isinstance(contrast, Sum) else (contrast,)


def contrast_name(contrast: Contrast) -> str:
    """What a contrast is called, without its heads: `DPS γ=0.5 + CAD γ=0.3, plausible 0.1`."""
    names = []
    for part in _parts(contrast):
        gamma = getattr(part, "gamma", None)
        strength = (
            str(gamma) if isinstance(gamma, Entropy) else f"{gamma:g}" if gamma is not None else ""
        )
        names.append(f"{type(part).__name__} γ={strength}" if strength else type(part).__name__)
    name = " + ".join(names)
    name += f", plausible {contrast.plausible:g}" if contrast.plausible else ""
    return name if contrast.max_kl is None else f"{name}, at most {contrast.max_kl:g} nats a step"


def _is_zero(strength: Strength) -> bool:
    if isinstance(strength, Entropy):
        return strength.factor == 0 or strength.cap == 0
    return strength == 0


def candidate_layers(layers: str | tuple[int, ...], blocks: int, tied: bool) -> tuple[int, ...]:
    """Blocks whose input is read out as an earlier layer's prediction.

    Args:
        layers: `low`, `high` or numbers; block 0's input is the embedding.
        blocks: Number of the model's blocks.
        tied: Whether embedding and unembedding are the same matrix. The embedding then predicts
            the token itself again, which says nothing, so `low` starts at block 2.

    Raises:
        InputError: A number is outside the model, or the range holds no layer.

    Source:
        The even layers of the lower or upper half, as Transformers' version of DoLa takes them;
        of more than 40 blocks the lowest or highest 20.
    """
    if not isinstance(layers, str):
        outside = [layer for layer in layers if not 0 <= layer < blocks]
        if outside or not layers:
            raise InputError(
                f"wanted layers between 0 and {blocks - 1}, got {outside[0] if outside else 'none'}"
            )
        return tuple(sorted(set(layers)))
    end, start = (20, blocks - 20) if blocks > 40 else (blocks // 2, blocks // 2)
    lowest = 2 if tied else 0
    if layers == "high":
        found = range(start, blocks, 2)
    else:
        found = range(lowest, lowest + 1 if lowest == end else end, 2)
    if not found:
        raise InputError(
            f"a model of {blocks} blocks has no {layers} layers for DoLa; name some: layers=(1,)"
        )
    return tuple(found)
