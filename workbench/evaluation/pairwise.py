"""What judgements of pairs come to: the paper's table 4, and how far they can be trusted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from workbench import stats
from workbench.errors import InputError
from workbench.evaluation.annotations import Annotation
from workbench.evaluation.judge import Key, Pair
from workbench.evaluation.sheet import NOTHING, Sheet, with_interval
from workbench.tables import plain

# Agreement


def percent_agreement(units: Sequence[Sequence[str]]) -> float:
    """Share of pairs of judgements of the same unit that agree, as a mean over units.

    Args:
        units: The judgements of each unit; those with fewer than two say nothing.

    Returns:
        A fraction; NaN if no unit has two judgements.
    """
    shares = [
        np.mean([one == other for one, other in combinations(unit, 2)])
        for unit in units
        if len(unit) > 1
    ]
    return float(np.mean(shares)) if shares else float("nan")


def krippendorff_alpha(units: Sequence[Sequence[str]]) -> float:
    """Krippendorff's alpha for nominal judgements, any number of annotators, missing ones too.

    Args:
        units: The judgements of each unit; those with fewer than two say nothing.

    Returns:
        1 for perfect agreement, 0 for what chance gives; NaN where all judgements are the same,
        as nothing is then known of disagreement, or no unit has two.

    Source:
        Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), section C.
    """
    paired = [unit for unit in units if len(unit) > 1]
    totals = Counter(judgement for unit in paired for judgement in unit)
    n = sum(totals.values())
    expected = n * n - sum(count * count for count in totals.values())
    if expected == 0:
        return float("nan")
    observed = sum(
        (len(unit) ** 2 - sum(count * count for count in Counter(unit).values())) / (len(unit) - 1)
        for unit in paired
    )
    return 1 - (n - 1) * observed / expected


# Table 4


@dataclass(frozen=True)
class Rates:
    """How the first method fared against the second.

    Attributes:
        group: The task, or `all`.
        win: Share of examples on which it was chosen; several annotators of a pair count as
            their mean.
        tie: Share of ties, equal answers among them.
        loss: Share on which the other was chosen.
        margin: Wins less losses.
        p: Two-sided, of the margin, by flipping users' signs; after Holm over the tasks. NaN where
            all answers were equal.
        judged: Pairs with a judgement.
        asked: Pairs in the file.
        equal: Examples with equal answers, counted as ties with the share of pairs judged.
    """

    group: str
    win: stats.Estimate
    tie: stats.Estimate
    loss: stats.Estimate
    margin: stats.Estimate
    p: float
    judged: int
    asked: int
    equal: int


@dataclass(frozen=True)
class Reliability:
    """How far the judgements can be trusted.

    Attributes:
        annotators: How many.
        shared: Pairs that two or more of them judged.
        agreement: Share of agreeing judgements on those.
        alpha: Krippendorff's, nominal over A, B and tie.
        first: Share of choices, ties left out, for the answer shown first, over users; None
            where all were ties.
        inconsistent: Share of pairs that an endpoint judged differently in the two orders; None
            without an endpoint.
        unreadable: Pairs that have no judgement as a reply could not be read.
    """

    annotators: int
    shared: int
    agreement: float
    alpha: float
    first: stats.Estimate | None
    inconsistent: float | None
    unreadable: int


def rates(key: Key, annotations: Sequence[Annotation], methods: Sequence[str]) -> list[Rates]:
    """Win, tie and loss of the first method against the second, by task and over all.

    Args:
        key: Of the pairs.
        annotations: From `read_annotations`.
        methods: The key's two methods, the first being the one whose wins are counted.

    Raises:
        InputError: The methods are others than the key's, or no pair has a judgement.
    """
    if sorted(methods) != sorted(key.methods):
        raise InputError(f"the pairs are of {' and '.join(key.methods)}, not {','.join(methods)}")
    outcomes = _outcomes(key, annotations, methods[0])
    if not outcomes:
        raise InputError("no pair has a judgement: none of the endpoint's replies could be read")
    tasks = list(dict.fromkeys(pair.task for pair in (*key.pairs, *key.ties)))
    # A task none of whose pairs was judged has no rates; one with equal answers only has.
    unjudged = {pair.task for pair in key.pairs} - {pair.task for pair in outcomes}
    tasks = [task for task in tasks if task not in unjudged]
    groups = {task: [task] for task in tasks}
    if len(tasks) > 1:
        groups["all"] = tasks
    found = [_rates(name, key, outcomes, members) for name, members in groups.items()]
    tested = [one for one in found[: len(tasks)] if one.judged]
    adjusted = stats.holm([one.p for one in tested])
    holm = {one.group: float(p) for one, p in zip(tested, adjusted, strict=True)}
    return [replace(one, p=holm.get(one.group, one.p)) for one in found]


def _outcomes(
    key: Key, annotations: Sequence[Annotation], first: str
) -> dict[Pair, tuple[float, float, float]]:
    """Shares of win, tie and loss that each judged pair has from its annotators."""
    said: dict[str, list[str]] = {}
    for annotation in annotations:
        if annotation.choice is not None:
            said.setdefault(annotation.id, []).append(annotation.choice)
    found = {}
    for pair in key.pairs:
        if choices := said.get(pair.id):
            won, lost = ("A", "B") if pair.a == first else ("B", "A")
            found[pair] = (
                choices.count(won) / len(choices),
                choices.count("tie") / len(choices),
                choices.count(lost) / len(choices),
            )
    return found


def _rates(
    name: str,
    key: Key,
    outcomes: Mapping[Pair, tuple[float, float, float]],
    tasks: Sequence[str],
) -> Rates:
    shares: list[tuple[float, float, float]] = []
    weights, users = [], []
    judged = asked = equal = 0
    for task in tasks:
        mine = [pair for pair in outcomes if pair.task == task]
        all_pairs = sum(pair.task == task for pair in key.pairs)
        ties = [pair for pair in key.ties if pair.task == task]
        # Where only some pairs were judged, the ties known beforehand must not outweigh them.
        share = len(mine) / all_pairs if all_pairs else 1.0
        shares += [outcomes[pair] for pair in mine] + [(0.0, 1.0, 0.0)] * len(ties)
        weights += [1.0] * len(mine) + [share] * len(ties)
        users += [pair.user for pair in (*mine, *ties)]
        judged, asked, equal = judged + len(mine), asked + all_pairs, equal + len(ties)
    win, tie, loss = np.array(shares).T
    return Rates(
        name,
        win=_weighted(win, weights, users),
        tie=_weighted(tie, weights, users),
        loss=_weighted(loss, weights, users),
        margin=_weighted(win - loss, weights, users),
        p=stats.sign_flip_p(win - loss, users) if judged else float("nan"),
        judged=judged,
        asked=asked,
        equal=equal,
    )


def _weighted(values: ArrayLike, weights: ArrayLike, users: ArrayLike) -> stats.Estimate:
    """A weighted mean with its interval over users."""
    by = np.asarray(weights, dtype=np.float64)
    parts = np.stack([np.asarray(values) * by, by], axis=1)
    return stats.bootstrap_statistic(parts, users, lambda sums, _: sums[..., 0] / sums[..., 1])


def reliability(key: Key, annotations: Sequence[Annotation]) -> Reliability:
    """How far the judgements can be trusted."""
    units: dict[str, list[str]] = {}
    for annotation in annotations:
        if annotation.choice is not None:
            units.setdefault(annotation.id, []).append(annotation.choice)
    user = {pair.id: pair.user for pair in key.pairs}
    decided = [
        (a.id, place == "A") for a in annotations for place in a.shown if place in ("A", "B")
    ]
    asked_twice = [a for a in annotations if len(a.shown) > 1 and a.choice is not None]
    swap = {"A": "B", "B": "A", "tie": "tie"}
    differ = [swap[str(a.shown[1])] != a.shown[0] for a in asked_twice]
    judgements = list(units.values())
    return Reliability(
        annotators=len({annotation.annotator for annotation in annotations}),
        shared=sum(len(unit) > 1 for unit in judgements),
        agreement=percent_agreement(judgements),
        alpha=krippendorff_alpha(judgements),
        first=stats.estimate([is_first for _, is_first in decided], [user[i] for i, _ in decided])
        if decided
        else None,
        inconsistent=float(np.mean(differ)) if differ else None,
        unreadable=sum(annotation.choice is None for annotation in annotations),
    )


# On paper


def sheets(key: Key, annotations: Sequence[Annotation], methods: Sequence[str]) -> list[Sheet]:
    """Table 4, and below it what is to be known of the judges.

    Args:
        key: Of the pairs.
        annotations: From `read_annotations`.
        methods: The key's two methods, the first being the one whose wins are counted.

    Raises:
        InputError: As `rates`.
    """
    found = rates(key, annotations, methods)
    name = f"table-4-{methods[0]}-{methods[1]}"
    lines = [
        [
            one.group,
            *(_interval(part) for part in (one.win, one.tie, one.loss, one.margin)),
            NOTHING if np.isnan(one.p) else f"{one.p:.3g}",
            f"{one.judged} of {one.asked}",
            str(one.equal),
            str(one.margin.groups),
        ]
        for one in found
    ]
    header = ["task", "win", "tie", "loss", "win − loss", "p", "judged", "equal", "users"]
    title = f"Table 4. {methods[0]} against {methods[1]}, judged pairs"
    note = (
        "Shares of examples with 95 % intervals over users; p of win − loss by flipping users' "
        "signs, after Holm over the tasks (all: as it is). equal: examples with equal answers, "
        "which nobody was asked about; they are ties, with the share of pairs that were judged."
    )
    trust = reliability(key, annotations)
    records = [_rates_record(title, one) for one in found]
    return [
        Sheet(name, title, header, lines, note, records),
        _trust_sheet(f"{name}-judges", trust),
    ]


def _interval(found: stats.Estimate) -> str:
    values = plain([found.mean, found.low, found.high])
    return with_interval(*values)


def _rates_record(title: str, one: Rates) -> dict[str, Any]:
    record: dict[str, Any] = {"table": title, "task": one.group}
    for name in ("win", "tie", "loss", "margin"):
        part: stats.Estimate = getattr(one, name)
        record |= {name: part.mean, f"{name}_low": part.low, f"{name}_high": part.high}
    counts = {"judged": one.judged, "asked": one.asked, "equal": one.equal}
    return dict(plain({**record, "p": one.p, **counts, "users": one.margin.groups}))


def _trust_sheet(name: str, trust: Reliability) -> Sheet:
    title = "Table 4, the judges"
    first = NOTHING if trust.first is None else _interval(trust.first)
    rows = [
        ["annotators", str(trust.annotators)],
        ["pairs judged by two or more", str(trust.shared)],
        ["agreement on those", _share(trust.agreement)],
        ["Krippendorff's alpha", _share(trust.alpha)],
        ["choices of the answer shown first", first],
    ]
    if trust.inconsistent is not None:
        rows.append(["pairs judged differently in the other order", _share(trust.inconsistent)])
    if trust.unreadable:
        rows.append(["pairs without a readable reply", str(trust.unreadable)])
    note = (
        "Alpha is nominal over A, B and tie: 1 is perfect agreement, 0 what chance gives. Without "
        "a preference for a place the answer shown first is chosen in half of the decided cases."
    )
    if trust.inconsistent is not None:
        note += " The endpoint judged every pair in both orders; those that differ are ties."
    records = [{"table": title, "what": row[0], "value": row[1]} for row in rows]
    return Sheet(name, title, ["of the judgements", "value"], rows, note, records)


def _share(value: float) -> str:
    return NOTHING if np.isnan(value) else f"{value:.3f}"
