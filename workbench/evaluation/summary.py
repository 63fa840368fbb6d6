"""From the answers of an evaluation to its table.

What is compared: every method with the plain model on the same examples, users being the unit that
is resampled and swapped. The p of a task's primary metric in the main reading are adjusted
together, over all methods and tasks (Holm); other metrics and readings have intervals and no p.
DPS against random heads is a family of its own, a test a task.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from workbench import stats, tables
from workbench.data.examples import Example
from workbench.data.tasks import get_task
from workbench.evaluation.methods import PLAIN, RANDOM, in_words
from workbench.evaluation.metrics import Metric, get_metric, metrics_of
from workbench.evaluation.reading import READINGS, read, readable
from workbench.evaluation.results import Evaluation
from workbench.evaluation.text import distinct_n, repetition

TABLE = "tables/evaluation.json"  # in the run folder
LEVEL = 0.05  # of p after Holm
LIKELIHOOD = "likelihood"
OF_DIFFERENCE = ("difference", "difference_low", "difference_high", "p", "p_holm")
OVER_RANDOM = ("over_random", "over_random_low", "over_random_high", "over_random_p")
_NUMBERS = ("value", "low", "high", *OF_DIFFERENCE, "seed_min", "seed_max", *OVER_RANDOM, "beaten")

Parts = NDArray[np.float64]


@dataclass(frozen=True)
class _Task:
    """The test examples of a task and every method's texts, a list a seed."""

    name: str
    examples: Sequence[Example]
    leaked: bool
    texts: Mapping[str, Sequence[Sequence[str]]]
    notes: Mapping[str, str]  # why a method has no texts

    @property
    def users(self) -> list[str]:
        return [example.user for example in self.examples]


def evaluation_table(evaluation: Evaluation) -> list[dict[str, Any]]:
    """One row for each task, method, metric and reading.

    Returns:
        Plain values, None where there is no number:

        `task`, `method`, `metric` (its label), `name` (its key), `better`, `primary`, `reading`:
        `strict` or `lenient` of written labels, `likelihood` of labels that were decided on, None
        of texts; the main reading is the first of these.
        `value`, `low`, `high`: over all test examples, with its 95 % interval over users. Of
        random heads: the mean over seeds, of which `seed_min` and `seed_max` are the extremes.
        `difference`, `difference_low`, `difference_high`: from plain on the same examples.
        `p`: two-sided, by swapping users' answers; `p_holm` after Holm over all methods and
        tasks. Only primary metrics in the main reading have them.
        `over_random`, `over_random_low`, `over_random_high`, `over_random_p`: of DPS, the same
        against random heads, after Holm over the tasks; `beaten` is the number of seeds that it
        beats, of `seeds`.
        `examples`, `users`: the same for every method; 0 where `note` says why there is nothing.
        `settings`: what was chosen, in words; `leaked`: heads were found on some of these
        examples or users.
    """
    seed = int(evaluation.manifest["settings"].get("seed", 0))
    rows = []
    for task in _tasks(evaluation):
        for name in metrics_of(task.examples[0]):
            for reading in _readings(task.name, evaluation):
                rows += _metric_rows(task, name, reading, evaluation, seed)
    _adjust(rows, "p", "p_holm")
    _adjust(rows, "over_random_p", "over_random_p")
    return [tables.plain(row) for row in rows]


def _tasks(evaluation: Evaluation) -> list[_Task]:
    found = []
    for name in evaluation.manifest["settings"]["tasks"]:
        rows = evaluation.examples[evaluation.examples["task"] == name]
        examples = [_example(row) for row in rows.to_dict("records")]
        answers = evaluation.answers[evaluation.answers["task"] == name]
        texts, notes = {}, {}
        for method in evaluation.manifest["settings"]["methods"]:
            wanted = _seeds(evaluation, method)
            part = answers[answers["method"] == method]
            lists = [_texts(part[part["seed"] == seed], examples) for seed in range(wanted)]
            whole = [texts for texts in lists if texts is not None]
            if len(whole) == wanted:
                texts[method] = whole
            else:
                notes[method] = _why_not(evaluation, name, method, len(part), wanted, examples)
        leaked = bool(rows["leaked"].any())
        found.append(_Task(name, examples, leaked, texts, notes))
    return found


def _seeds(evaluation: Evaluation, method: str) -> int:
    return int(evaluation.manifest["settings"]["seeds"]) if method == RANDOM else 1


def _example(row: Mapping[str, Any]) -> Example:
    task = str(row["task"])
    return Example(
        id=str(row["example"]).removeprefix(f"{task}/"),
        user=str(row["user"]),
        task=task,
        query=str(row["query"]),
        target=str(row["target"]),
        profile=(),
        style=json.loads(row["style"]),
    )


def _texts(answers: pd.DataFrame, examples: Sequence[Example]) -> list[str] | None:
    """The answers in the order of the examples; None unless all are there."""
    by_name = dict(zip(answers["example"], answers["text"], strict=True))
    found = [by_name.get(example.name) for example in examples]
    return None if None in found else [str(text) for text in found]


def _why_not(
    evaluation: Evaluation,
    task: str,
    method: str,
    there: int,
    seeds: int,
    examples: Sequence[Example],
) -> str:
    choice = evaluation.choices.get(task, {}).get(method, {})
    failures = [entry.get("failed") for entry in (choice, *choice.get("seeds", []))]
    why = next(filter(None, failures), None)
    return why or f"{there} of {seeds * len(examples)} answers are there; run the command again"


def _readings(task: str, evaluation: Evaluation) -> tuple[str | None, ...]:
    """How the answers to a task are read, the main reading first."""
    if not get_task(task).labels:
        return (None,)
    likelihood = evaluation.manifest["settings"].get("decide") == LIKELIHOOD
    return (LIKELIHOOD,) if likelihood else READINGS


def _read(task: str, text: str, reading: str | None) -> str:
    return read(task, text, reading) if reading in READINGS else text  # type: ignore[arg-type]


def _metric_rows(
    task: _Task, name: str, reading: str | None, evaluation: Evaluation, seed: int
) -> list[dict[str, Any]]:
    metric = get_metric(name)
    main = (
        name == metrics_of(task.examples[0])[0] and reading == _readings(task.name, evaluation)[0]
    )
    parts = {
        method: [
            metric.parts_of(task.examples, [_read(task.name, text, reading) for text in texts])
            for texts in lists
        ]
        for method, lists in task.texts.items()
    }
    rows = []
    for method in evaluation.manifest["settings"]["methods"]:
        row: dict[str, Any] = {
            "task": task.name,
            "method": method,
            "metric": metric.label,
            "name": name,
            "better": metric.better,
            "primary": main,
            "reading": reading,
            **dict.fromkeys(_NUMBERS),
            "examples": 0,
            "users": 0,
            "seeds": _seeds(evaluation, method),
            "settings": settings_in_words(evaluation.choices.get(task.name, {}).get(method, {})),
            "leaked": task.leaked,
            "note": task.notes.get(method, ""),
        }
        if method in parts:
            row |= _measured(parts, method, metric, task.users, main, seed)
        rows.append(row)
    return rows


def _measured(
    parts: Mapping[str, Sequence[Parts]],
    method: str,
    metric: Metric,
    users: Sequence[str],
    main: bool,
    seed: int,
) -> dict[str, Any]:
    own = parts[method]
    several = _mean_of_seeds(metric.combine, len(own))
    value = stats.bootstrap_statistic(np.hstack(own), users, several, seed=seed)
    row: dict[str, Any] = {"value": value.mean, "low": value.low, "high": value.high}
    row |= {"examples": value.n, "users": value.groups}
    each = [_value(metric, one) for one in own]
    if method == RANDOM:
        row |= {"seed_min": min(each), "seed_max": max(each)}
    if method != PLAIN and PLAIN in parts:
        difference, p = _against(own, parts[PLAIN], metric, users, seed)
        row |= dict(zip(OF_DIFFERENCE[:3], _ends(difference), strict=True))
        row["p"] = p if main else None
    if method == "dps" and RANDOM in parts:
        difference, p = _against(own, parts[RANDOM], metric, users, seed)
        row |= dict(zip(OVER_RANDOM[:3], _ends(difference), strict=True))
        row["over_random_p"] = p if main else None
        sign = 1 if metric.better == "higher" else -1
        others = [_value(metric, one) for one in parts[RANDOM]]
        row["beaten"] = sum(sign * (each[0] - other) > 0 for other in others)
        row["seeds"] = len(others)
    return row


def _value(metric: Metric, parts: Parts) -> float:
    return float(metric.combine(parts.sum(axis=0), np.asarray(float(len(parts)))))


def _ends(found: stats.Estimate) -> tuple[float, float, float]:
    return found.mean, found.low, found.high


def _against(
    own: Sequence[Parts], others: Sequence[Parts], metric: Metric, users: Sequence[str], seed: int
) -> tuple[stats.Estimate, float]:
    """Difference with p; a side with fewer seeds than the other is repeated."""
    count = max(len(own), len(others))
    a, b = (np.hstack(list(side) * (count // len(side))) for side in (own, others))
    return stats.paired_statistic(a, b, users, _mean_of_seeds(metric.combine, count), seed=seed)


def _mean_of_seeds(combine: stats.Combine, seeds: int) -> stats.Combine:
    """The mean over seeds of a statistic, whose parts stand side by side, a block a seed.

    For a plain mean this is the mean of each example's parts over the seeds.
    """

    def together(sums: Parts, counts: Parts) -> Parts:
        blocks = np.split(sums, seeds, axis=-1)
        return np.mean([combine(block, counts) for block in blocks], axis=0)

    return together


def _adjust(rows: Sequence[dict[str, Any]], source: str, target: str) -> None:
    tested = [row for row in rows if row[source] is not None and not math.isnan(row[source])]
    if tested:
        for row, p in zip(tested, stats.holm([row[source] for row in tested]), strict=True):
            row[target] = float(p)


def settings_in_words(choice: Mapping[str, Any]) -> str:
    """What was chosen for a cell, such as `K 4, γ 0.5`; of random heads the gamma of each seed."""
    if "seeds" not in choice:
        return in_words(choice)
    seeds = [entry for entry in choice["seeds"] if "failed" not in entry]
    gammas = "/".join(in_words({"gamma": entry["gamma"]}).removeprefix("γ ") for entry in seeds)
    return f"K {seeds[0]['k']}, γ {gammas}" if seeds else ""


def qualities(evaluation: Evaluation) -> list[dict[str, Any]]:
    """What can be said of the answers without a gold output, a row a task and method.

    Returns:
        `distinct_1`, `distinct_2`: shares of distinct words and pairs among those of all
        answers; `repetition`: share of four words in a row that stood in the answer before;
        `logprob`: mean log-probability under the plain model, nats a token (a label that was
        decided on counts as one); `kl`: mean KL(method, plain) a step, nats; `unreadable`: share
        of answers that are no label, by each reading, None of texts; `finished`: share that
        ended before the limit. Means over seeds for random heads.
    """
    rows = []
    likelihood = evaluation.manifest["settings"].get("decide") == LIKELIHOOD
    for task in _tasks(evaluation):
        answers = evaluation.answers[evaluation.answers["task"] == task.name]
        for method, lists in task.texts.items():
            part = answers[answers["method"] == method]
            row = {
                "task": task.name,
                "method": method,
                "distinct_1": np.mean([distinct_n(texts, 1) for texts in lists]),
                "distinct_2": np.mean([distinct_n(texts, 2) for texts in lists]),
                "repetition": np.mean([repetition(text) for texts in lists for text in texts]),
                "logprob": part["logprob"].mean(),
                "kl": part["kl"].mean(),
                "unreadable": None,
                "unreadable_lenient": None,
                "finished": part["finished"].mean(),
            }
            if get_task(task.name).labels and not likelihood:
                row["unreadable"] = _unreadable(task, lists, "strict")
                row["unreadable_lenient"] = _unreadable(task, lists, "lenient")
            rows.append(tables.plain(row))
    return rows


def _unreadable(task: _Task, lists: Sequence[Sequence[str]], reading: str) -> float:
    bad = [
        not readable(example, _read(task.name, text, reading))
        for texts in lists
        for example, text in zip(task.examples, texts, strict=True)
    ]
    return float(np.mean(bad))
