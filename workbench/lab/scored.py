"""The scores that an explorer has at hand, from wherever they were given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from workbench import runs
from workbench.analysis.alignment import check_model
from workbench.analysis.head_map import specific_scores
from workbench.data.examples import COUNTERFACTUALS
from workbench.data.prompts import PromptSettings
from workbench.errors import InputError
from workbench.models import heads_per_layer, tensors_id
from workbench.scores import HeadScores

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

OWN, NEUTRAL = "own", "neutral"
PCS = "PCS"
Given = HeadScores | Mapping[str, HeadScores] | Path | str | None


@dataclass(frozen=True)
class Scored:
    """Scores by what they are of.

    Attributes:
        parts: What a head map can show, by name: `PCS`, and its specific parts, `PCS` less that
            behind another profile. Empty while nothing is scored.
        neutral: Scores on text that has no user.
        folder: Where scores that are made now are kept.
        notes: What could not be used, and why.
    """

    parts: Mapping[str, HeadScores] = field(default_factory=dict)
    neutral: HeadScores | None = None
    folder: Path | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, given: Given, model: TransformerBridge) -> Scored:
        """Whatever was given as scores.

        Args:
            given: `HeadScores`; several by name, `own` and any of `stranger`, `none`, `shuffled`
                (`counterfactual_scores`) and `neutral`; a run folder of `score_heads` or `probe`;
                a folder that isn't there yet, for scores that are made now; or None.
            model: Whose heads they must be.

        Raises:
            InputError: The folder holds no finished run, a name is unknown, the own scores are
                missing, or they are of another model.
        """
        if given is None:
            return cls()
        if isinstance(given, str | Path):
            return cls._opened(Path(given), model)
        named = {OWN: given} if isinstance(given, HeadScores) else dict(given)
        unknown = sorted(set(named) - {OWN, NEUTRAL, *COUNTERFACTUALS})
        if unknown or OWN not in named:
            raise InputError(
                f"scores by name are {OWN}, {', '.join(COUNTERFACTUALS)} and {NEUTRAL}, and {OWN} "
                f"must be there; got {', '.join(named) or 'none'}"
            )
        tensors = tensors_id(model)
        for name, scores in named.items():
            _check(scores, name, model, tensors)
        if NEUTRAL in named:
            check_model(named[OWN], named[NEUTRAL], NEUTRAL)
        parts = {PCS: named[OWN]}
        for kind in COUNTERFACTUALS:
            if kind in named:
                parts |= _specific(named[OWN], named[kind], kind)
        return cls(parts, named.get(NEUTRAL), notes=_ablation_note(named[OWN]))

    @classmethod
    def _opened(cls, folder: Path, model: TransformerBridge) -> Scored:
        if not folder.exists():
            return cls(folder=folder)
        own, tensors = HeadScores.load(folder), tensors_id(model)
        _check(own, str(folder), model, tensors)
        parts, neutral, notes = {PCS: own}, None, [*_ablation_note(own)]
        # Beside its own scores a probe keeps those behind other profiles and on neutral text.
        for path in sorted((folder / "runs").glob(f"*/**/{runs.MANIFEST}")):
            run, kind = path.parent, path.parent.name
            try:
                if kind in COUNTERFACTUALS:
                    more = _specific(own, HeadScores.load(run), kind)
                    if set(more) & set(parts):
                        raise InputError(f"there is another run behind the profile {kind}")
                    parts |= more
                elif kind.startswith(f"{NEUTRAL}-"):
                    found = HeadScores.load(run)
                    check_model(own, found, kind)
                    neutral = found
            except InputError as error:
                notes.append(f"{run.relative_to(folder)} is left out: {error}")
        return cls(parts, neutral, folder, tuple(notes))

    def prompt(self, asked: PromptSettings | None) -> PromptSettings | None:
        """How prompts are to be built: as they were for the scores.

        Raises:
            InputError: Something else is asked for.
        """
        own = self.parts.get(PCS)
        kept = None if own is None else own.manifest.get("settings", {}).get("prompt")
        scored = PromptSettings(**kept) if kept else None
        if asked is not None and scored is not None and asked != scored:
            raise InputError(
                "the scores were made with other prompt settings than are asked for; leave "
                "`prompt` out, or score with these"
            )
        return asked or scored

    def with_own(self, scores: HeadScores) -> Scored:
        """With other scores behind the users' own profiles; their specific parts aren't known."""
        return replace(self, parts={PCS: scores})

    def with_neutral(self, scores: HeadScores) -> Scored:
        """With scores on text that has no user."""
        return replace(self, neutral=scores)


def _specific(own: HeadScores, other: HeadScores, kind: str) -> dict[str, HeadScores]:
    found = specific_scores(own, other, kind)
    return {str(found.data.attrs["part"]): found}


def _ablation_note(own: HeadScores) -> tuple[str, ...]:
    ablation = own.manifest.get("settings", {}).get("ablation", "zero")
    if ablation == "zero":
        return ()
    return (f"the map is of {ablation} ablation; everywhere else here heads are removed whole",)


def _check(scores: HeadScores, name: str, model: TransformerBridge, tensors: str) -> None:
    """Refuse the scores of a model with other tensors than this one's."""
    settings = scores.manifest.get("settings", {})
    shape = tuple(settings.get("heads_per_layer", ()))
    if settings.get("tensors", tensors) != tensors:
        raise InputError(
            f"the scores {name} are of {settings.get('model')}, and this is another model, or "
            "other weights; load the one that was scored, or score this one"
        )
    own = heads_per_layer(model)
    if (shape or scores.heads_per_layer) != own and scores.data["pcs"].shape[1:] != (
        len(own),
        max(own),
    ):
        raise InputError(
            f"the scores {name} are of a model with {scores.heads_per_layer} heads by layer, and "
            f"this one has {own}; score this one"
        )
