"""Which of a method's candidates is taken: the best on validation users, the first of equals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from workbench.data.examples import Example
from workbench.evaluation.methods import Candidate
from workbench.evaluation.metrics import get_metric, metrics_of
from workbench.evaluation.reading import read


@dataclass(frozen=True)
class Choice:
    """What was chosen among a method's candidates.

    Attributes:
        candidate: The one taken; None where every one failed.
        metric: What they were compared by; None where there was nothing to choose.
        tried: Every candidate with its value on the validation users, or why it has none.
        failed: Why there was no candidate to try, where that is so.
    """

    candidate: Candidate | None
    metric: str | None = None
    tried: Sequence[tuple[Candidate, float | str]] = ()
    failed: str | None = None

    def record(self) -> dict[str, Any]:
        """As plain values, for `choices.json`."""
        if self.candidate is None:
            return {"failed": self.why, "candidates": self._listed()}
        record = self.candidate.record()
        if self.metric is None:
            return record
        value = next(value for candidate, value in self.tried if candidate == self.candidate)
        return {
            **record,
            "words": self.candidate.words,
            "metric": self.metric,
            "validation": value,
            **({"all_equal": True} if self.all_equal else {}),
            "candidates": self._listed(),
        }

    @property
    def all_equal(self) -> bool:
        """Whether several candidates answered, and all of them equally well."""
        values = [value for _, value in self.tried if not isinstance(value, str)]
        return len(values) > 1 and len(set(values)) == 1

    @property
    def why(self) -> str:
        """Why nothing could be chosen, where that is so."""
        reasons = dict.fromkeys(value for _, value in self.tried if isinstance(value, str))
        return self.failed or "; ".join(reasons)

    def _listed(self) -> list[dict[str, Any]]:
        return [
            {**candidate.settings, ("failed" if isinstance(value, str) else "value"): value}
            for candidate, value in self.tried
        ]


def choose(
    examples: Sequence[Example],
    outcomes: Sequence[tuple[Candidate, list[str] | str]],
    by_likelihood: bool = False,
) -> Choice:
    """Take the best candidate by the primary metric of the examples' task.

    Written answers are read strictly, as the authors of LaMP do.

    Args:
        examples: The validation examples, of one task.
        outcomes: Candidates, those that steer least first, each with its answers in the order of
            the examples or with the reason why it has none.
        by_likelihood: Whether labels were decided on and not written.
    """
    name = metrics_of(examples[0])[0]
    metric, task = get_metric(name), examples[0].task
    tried: list[tuple[Candidate, float | str]] = []
    for candidate, found in outcomes:
        if isinstance(found, str):
            tried.append((candidate, found))
            continue
        texts = found if by_likelihood else [read(task, text, "strict") for text in found]
        tried.append((candidate, metric.value(examples, texts)))
    sign = 1 if metric.better == "higher" else -1
    values = [sign * v if not isinstance(v, str) else None for _, v in tried]
    best = first_best(values)
    return Choice(None if best is None else tried[best][0], name, tried)


def first_best(values: Sequence[float | None]) -> int | None:
    """Position of the largest value, the first of equals; None where there is none."""
    known = [i for i, value in enumerate(values) if value is not None]
    return max(known, key=lambda i: (values[i], -i), default=None)
