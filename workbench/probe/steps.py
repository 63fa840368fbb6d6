"""The steps of the examination: what each one makes, in order, and what it says in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import xarray as xr

from workbench.analysis import (
    aspects,
    classes,
    coherence,
    controls,
    lending,
    needed,
    noise,
    position,
    precision,
    recurrence,
    routing,
    verdict,
)
from workbench.analysis.overlap import user_overlap
from workbench.analysis.profiles import profile_value
from workbench.analysis.sparsity import sparsity
from workbench.analysis.sweep import sweep_head_count
from workbench.discovery.copying import copy_scores
from workbench.discovery.induction import induction_line, induction_scores
from workbench.discovery.screening import Screen
from workbench.probe.settings import Depth
from workbench.probe.work import Work, whole

FULL: tuple[Depth, ...] = ("full",)
BOTH: tuple[Depth, ...] = ("quick", "full")
PAPER_SHARE = 0.04
SETS = ("preference", "specific", "random")


@dataclass(frozen=True)
class Step:
    """One step of the examination.

    Attributes:
        name: Its table's name.
        title: What it does, for the terminal.
        section: Where its findings stand in the report.
        make: From what the steps share to its table.
        lines: From the table to its findings in words.
        depths: When it is done.
        needs: Steps whose tables it starts from.
    """

    name: str
    title: str
    section: str
    make: Callable[[Work], xr.Dataset]
    lines: Callable[[xr.Dataset, Work], list[str]]
    depths: tuple[Depth, ...] = BOTH
    needs: tuple[str, ...] = ()


def _plain(lines: Callable[[xr.Dataset], list[str]]) -> Callable[[xr.Dataset, Work], list[str]]:
    return lambda table, _work: lines(table)


def _profiles(work: Work) -> xr.Dataset:
    settings = work.settings
    return profile_value(
        work.model,
        work.evaluation,
        prompt=settings.prompt,
        batch_tokens=settings.pass_tokens,
        seed=settings.seed,
    )


def _overlap(work: Work) -> xr.Dataset:
    return user_overlap(work.scores, work.settings.k, seed=work.settings.seed).to_dataset()


def _specificity(work: Work) -> xr.Dataset:
    return controls.specificity(
        work.scores, work.counterfactuals, k=work.settings.k, seed=work.settings.seed
    )


def _induction(work: Work) -> xr.Dataset:
    return induction_scores(work.model, seed=work.settings.seed, progress=work.progress).to_dataset(
        name="induction"
    )


def _copying(work: Work) -> xr.Dataset:
    return copy_scores(work.model, progress=work.progress).to_dataset(name="copying")


def _damage(work: Work) -> xr.Dataset:
    return controls.damage(
        work.scores, work.neutral_scores, work.head_classes, seed=work.settings.seed
    )


def _classes(work: Work) -> xr.Dataset:
    return classes.class_effects(
        work.model,
        work.classed,
        work.neutral_halves[1],
        work.head_classes,
        work.settings.gamma,
        found_on=work.found_on,
        chosen_on=work.chosen_on,
        **work.writing,
    )


def _coherence(work: Work) -> xr.Dataset:
    chosen = {
        task: {name: sets for name, sets in named.items() if name in SETS}
        for task, named in work.head_classes.items()
    }
    return coherence.coherence(
        work.model,
        work.classed,
        work.neutral_halves[1],
        chosen,
        work.settings.effort.gammas,
        found_on=work.found_on,
        **work.writing,
    )


def _examples_needed(work: Work) -> xr.Dataset:
    settings = work.settings
    return needed.by_examples(
        work.scores, settings.k, draws=settings.effort.draws, seed=settings.seed
    )


def _recurrence(work: Work) -> xr.Dataset:
    settings = work.settings
    return recurrence.recurrence(
        work.scores, settings.k, draws=settings.effort.resamples, seed=settings.seed
    )


def _noise(work: Work) -> xr.Dataset:
    return noise.profile_noise(
        work.model,
        work.sample,
        work.settings.k,
        work.settings.effort.shares,
        clean=work.scores.select(users=list(dict.fromkeys(e.user for e in work.sample))),
        folder=work.place("noise", whole(work.sample), work.settings.seed),
        seed=work.settings.seed,
        **work.scoring,
    )


def _precision(work: Work) -> xr.Dataset:
    k = work.settings.k
    others = {
        "attribution": work.scored("attribution", work.discovery, method="attribution"),
        "screened": work.scored(
            "screened", work.discovery, method="screened", screen=Screen(k=k, by="task")
        ),
    }
    return precision.precision(work.scores, others, k)


def _aspects(work: Work) -> xr.Dataset:
    scores = aspects.aspect_scores(
        work.model,
        work.sample,
        ablation=work.settings.ablation,
        folder=work.place("aspects", whole(work.sample)),
        ray=work.ray,
        **work.scoring,
    )
    return aspects.aspects(aspects.grouped(scores), work.settings.k, seed=work.settings.seed)


def _position(kind: position.Kind) -> Callable[[Work], xr.Dataset]:
    def make(work: Work) -> xr.Dataset:
        return position.position(
            work.model,
            work.sample,
            kind,
            work.settings.effort.steps[kind],
            work.settings.k,
            ablation=work.settings.ablation,
            folder=work.place(kind, whole(work.sample), work.settings.seed),
            seed=work.settings.seed,
            **work.scoring,
        )

    return make


def _lend(work: Work) -> xr.Dataset:
    return lending.lend(
        work.model,
        work.discovery,
        work.scores,
        work.settings.k,
        folder=work.folder,
        prompt=work.settings.prompt,
        batch_tokens=work.settings.pass_tokens,
        seed=work.settings.seed,
        progress=work.progress,
    )


def _routing(work: Work) -> xr.Dataset:
    # As many heads as everything else is about, and at least the paper's share of them.
    share = max(PAPER_SHARE, work.settings.k / sum(work.scores.heads_per_layer))
    settings = routing.RoutingSettings(size=work.cluster_users, share=share)
    return routing.routing_gain(
        work.model,
        work.scores,
        work.discovery,
        work.evaluation,
        settings,
        gamma=work.settings.gamma,
        draws=work.settings.draws,
        **work.writing,
    )


def _weights(work: Work) -> xr.Dataset:
    return routing.weight_controls(work.scores, work.tables["routing"])


def _sweep(work: Work) -> xr.Dataset:
    return sweep_head_count(
        work.model,
        work.evaluation,
        work.scores,
        work.counts,
        work.settings.gamma,
        draws=work.settings.draws,
        **work.writing,
    )


def _nothing(_table: xr.Dataset, _work: Work) -> list[str]:
    """What another step's findings say already."""
    return []


POSITIONS: Mapping[position.Kind, str] = {
    "distance": "Scoring with strangers' items between the profile and the query",
    "length": "Scoring with fewer and more of the profile's items",
    "turns": "Scoring behind earlier turns of the conversation",
}
STEPS = (
    Step(
        "profiles",
        "What the profile is worth to the plain model",
        "profile",
        _profiles,
        _plain(verdict.profile_lines),
    ),
    Step(
        "sparsity",
        "How concentrated the scores are",
        "heads",
        lambda work: sparsity(work.scores, seed=work.settings.seed),
        _plain(verdict.sparsity_lines),
    ),
    Step(
        "overlap",
        "Overlap of the users' heads",
        "users",
        _overlap,
        lambda table, _work: [verdict.overlap_line(table["jaccard"].attrs)],
    ),
    Step(
        "specificity",
        "Scoring behind counterfactual profiles",
        "controls",
        _specificity,
        lambda table, work: controls.lines(table, work.tables.get("damage")),
    ),
    Step(
        "induction",
        "Which heads continue a repeated pattern",
        "controls",
        _induction,
        lambda table, work: [induction_line(table["induction"], work.settings.k)],
    ),
    Step("copying", "Which heads copy a needle out of a text", "controls", _copying, _nothing),
    Step(
        "damage",
        "Scoring on text that has no user",
        "controls",
        _damage,
        _nothing,
        needs=("specificity",),
    ),
    Step(
        "classes",
        "Removing and steering with each class of heads",
        "controls",
        _classes,
        _plain(classes.lines),
        needs=("specificity",),
    ),
    Step(
        "examples",
        "Head sets from fewer examples",
        "stability",
        _examples_needed,
        _plain(needed.lines),
    ),
    Step(
        "recurrence",
        "Head sets from resampled users",
        "stability",
        _recurrence,
        _plain(recurrence.lines),
    ),
    Step(
        "noise",
        "Scoring behind profiles mixed with strangers'",
        "stability",
        _noise,
        _plain(noise.lines),
        FULL,
    ),
    Step(
        "precision",
        "Scoring by estimate and by screening",
        "stability",
        _precision,
        _plain(precision.lines),
        FULL,
    ),
    Step("aspects", "Scoring aspect by aspect", "aspects", _aspects, _plain(aspects.lines)),
    *(
        Step(kind, title, "aspects", _position(kind), _plain(position.lines), FULL)
        for kind, title in POSITIONS.items()
    ),
    Step(
        "lend",
        "One user's heads on another's text",
        "users",
        _lend,
        _plain(lending.lines),
        FULL,
    ),
    Step(
        "routing",
        "Clusters of users, and steering with their heads",
        "users",
        _routing,
        _plain(routing.lines),
        FULL,
    ),
    Step("weights", "Head weights", "users", _weights, _nothing, FULL, needs=("routing",)),
    Step(
        "sweep",
        "Steering with more and fewer heads",
        "steering",
        _sweep,
        lambda table, work: verdict.sweep_lines(table, work.settings.k),
    ),
    Step(
        "coherence",
        "What steering costs",
        "steering",
        _coherence,
        _plain(coherence.lines),
        needs=("specificity",),
    ),
)
