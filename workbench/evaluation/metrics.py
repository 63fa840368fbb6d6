"""The metrics of LaMP, LongLaMP and the testbed.

Some are means of a number an answer has (accuracy, ROUGE), some are not (macro F1, RMSE). All
follow from sums of parts over answers, which is what intervals and tests are taken on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from workbench import stats
from workbench.data.examples import Example
from workbench.data.tasks import get_task
from workbench.data.testbed import read_style
from workbench.errors import InputError


@dataclass(frozen=True)
class Metric:
    """A metric of the answers to one task.

    Attributes:
        label: As figures and tables print it.
        better: Whether `higher` or `lower` is better.
        parts: (example, answer) to numbers [part] that are summed over answers; how many there
            are depends on the task alone.
        combine: From sums and numbers of answers to the metric, as in `workbench.stats`.
    """

    label: str
    better: Literal["higher", "lower"]
    parts: Callable[[Example, str], NDArray[np.float64]]
    combine: stats.Combine = stats.mean_of

    @property
    def pooled(self) -> bool:
        """Whether it is a number of all answers together, and no mean over answers."""
        return self.combine is not stats.mean_of

    def score(self, example: Example, answer: str) -> float:
        """The value of one answer, of which the metric is the mean.

        Raises:
            ValueError: The metric is pooled: an answer has no value of its own.
        """
        if self.pooled:
            raise ValueError(f"{self.label} is no mean over answers; ask for parts_of or value")
        return float(self.parts(example, answer)[0])

    def parts_of(self, examples: Sequence[Example], answers: Sequence[str]) -> NDArray[np.float64]:
        """Parts [example, part] of all answers, for `stats.bootstrap_statistic`.

        Raises:
            ValueError: There are no examples, they are of several tasks, or there are more or
                fewer answers.
        """
        tasks = sorted({example.task for example in examples})
        if len(tasks) != 1:
            raise ValueError(f"{self.label} is of one task, got {', '.join(tasks) or 'no answer'}")
        pairs = zip(examples, answers, strict=True)
        return np.stack([self.parts(example, answer) for example, answer in pairs])

    def value(self, examples: Sequence[Example], answers: Sequence[str]) -> float:
        """The metric of all answers together; errors as those of `parts_of`."""
        parts = self.parts_of(examples, answers)
        return float(self.combine(parts.sum(axis=0), np.asarray(len(parts))))


# Classification


def accuracy(example: Example, answer: str) -> float:
    """1 if the answer is the gold output, spaces at the ends aside (LaMP's exact match)."""
    return float(answer.strip() == example.target.strip())


def label_counts(example: Example, answer: str) -> NDArray[np.float64]:
    """Hits, answers and gold outputs of each label of the task, [3 * label].

    An answer that is no label counts for none: the gold label misses a hit, no label gets a
    false one.

    Raises:
        InputError: The gold output is no label of the task.
    """
    labels = get_task(example.task).labels
    gold = example.target.strip()
    if gold not in labels:
        raise InputError(
            f"{example.name}: the gold output {gold!r} is no label of {example.task} "
            f"({', '.join(labels) or 'which has none'}); F1 needs one"
        )
    counts = np.zeros((3, len(labels)))
    counts[2, labels.index(gold)] = 1
    if answer.strip() in labels:
        said = labels.index(answer.strip())
        counts[1, said] = 1
        counts[0, said] = float(labels[said] == gold)
    return counts.ravel()


def macro_f1(sums: NDArray[np.float64], counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean F1 over all labels of the task from `label_counts`; 0 for a label nobody named.

    Source:
        LaMP's evaluation: scikit-learn's `f1_score(average="macro")` with all labels given.
    """
    hits, said, gold = np.moveaxis(sums.reshape(*sums.shape[:-1], 3, -1), -2, 0)
    both = said + gold
    return np.divide(2 * hits, both, out=np.zeros_like(both), where=both > 0).mean(axis=-1)


# Ratings


def absolute_error(example: Example, answer: str) -> float:
    """Distance from the gold rating; an unreadable answer counts as the farther end.

    A number outside the scale counts as it stands, unless its square is beyond what a float
    holds.

    Source:
        LaMP's evaluation, which does the same.
    """
    gold = float(example.target)
    try:
        error = abs(float(answer) - gold)
    except ValueError:
        error = math.nan
    if math.isfinite(error * error):
        return error
    ratings = [float(label) for label in get_task(example.task).labels]
    return max(abs(end - gold) for end in (ratings[0], ratings[-1]))


def _root_mean(sums: NDArray[np.float64], counts: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.sqrt(stats.mean_of(sums, counts))


# Texts


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rougeL"], use_stemmer=False)


@lru_cache(maxsize=1 << 16)
def _rouge(gold: str, answer: str) -> dict[str, float]:
    """Both F measures: the methods of a table often give the same answer to a query."""
    found = _scorer().score(gold, answer)
    return {kind: float(score.fmeasure) for kind, score in found.items()}


class _NoSynonyms:
    """Stands in for WordNet: no word has a synonym, which leaves METEOR's first two stages."""

    def synsets(self, word: str) -> list[Any]:
        return []


def _wordnet() -> Any:
    """NLTK's WordNet, or None where its corpus is not installed; nothing is downloaded."""
    from nltk.corpus import wordnet

    try:
        wordnet.ensure_loaded()
    except LookupError:
        return None
    return wordnet


def words(text: str) -> list[str]:
    """The words and marks that METEOR aligns.

    As NLTK's `word_tokenize`, which LaMP's evaluation uses through `evaluate`, but for the
    sentences: those are found by Punkt without its trained model, which is a download. An
    abbreviation before a space then loses its point, in the gold text and the answer alike.
    """
    from nltk.tokenize import NLTKWordTokenizer, PunktSentenceTokenizer

    sentences = PunktSentenceTokenizer().tokenize(text)
    return [word for sentence in sentences for word in NLTKWordTokenizer().tokenize(sentence)]


def _meteor() -> Metric:
    from nltk.translate.meteor_score import single_meteor_score

    wordnet = _wordnet()

    @lru_cache(maxsize=1 << 16)
    def score(gold: str, answer: str) -> float:
        return float(
            single_meteor_score(words(gold), words(answer), wordnet=wordnet or _NoSynonyms())
        )

    return _mean(
        "METEOR" if wordnet else "METEOR (exact, stem)",
        "higher",
        lambda example, answer: score(example.target, answer),
    )


def style_match(example: Example, answer: str) -> float:
    """Share of the user's own style slots that the answer shows (testbed headlines).

    Counts only slots in which the user has a style of their own, and the user's usual value, not
    the one that happens to stand in the gold headline.
    """
    if not example.style:
        raise ValueError(f"{example.name}: the corpus knows no style of this user")
    found = read_style(answer)
    return sum(found.get(slot) == value for slot, value in example.style.items()) / len(
        example.style
    )


# By name


def _mean(
    label: str, better: Literal["higher", "lower"], score: Callable[[Example, str], float]
) -> Metric:
    return Metric(label, better, lambda example, answer: np.array([score(example, answer)]))


_MAKERS: dict[str, Callable[[], Metric]] = {
    "accuracy": lambda: _mean("accuracy", "higher", accuracy),
    "f1": lambda: Metric("macro F1", "higher", label_counts, macro_f1),
    "mae": lambda: _mean("mean absolute error", "lower", absolute_error),
    "rmse": lambda: Metric(
        "root mean square error",
        "lower",
        lambda example, answer: np.array([absolute_error(example, answer) ** 2]),
        _root_mean,
    ),
    "rouge1": lambda: _mean("ROUGE-1", "higher", lambda e, a: _rouge(e.target, a)["rouge1"]),
    "rougeL": lambda: _mean("ROUGE-L", "higher", lambda e, a: _rouge(e.target, a)["rougeL"]),
    "meteor": _meteor,
    "style": lambda: _mean("style match", "higher", style_match),
}
METRICS = tuple(_MAKERS)
_OF_KIND = {
    "classification": ("accuracy", "f1"),
    "rating": ("mae", "rmse"),
    "generation": ("rouge1", "rougeL", "meteor"),
}


@cache
def get_metric(name: str) -> Metric:
    """Look a metric up; METEOR's label depends on whether WordNet is installed.

    Raises:
        InputError: There is no such metric; the message lists those there are.
    """
    if name not in _MAKERS:
        raise InputError(f"unknown metric {name!r}; known are {', '.join(METRICS)}")
    return _MAKERS[name]()


def metrics_of(example: Example) -> tuple[str, ...]:
    """Names of the metrics of an example's task, in the order of the paper's tables.

    The first is the primary one, which settings are chosen by: a mean over answers, always.
    """
    task = get_task(example.task)
    return tuple(dict.fromkeys((task.metric, *_OF_KIND[task.kind])))
