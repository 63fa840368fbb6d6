"""Pairs of answers for a judge who doesn't know the methods, and the key that names them.

1. Every example that both methods answered is a pair. Equal answers are ties without a judge:
   they stay out of the file and are counted in the key.
2. Which method is answer A is drawn from the seed, half and half in each task. The draw is about
   the two methods by name, so that asking for them the other way round gives the same file.
3. The key, a file of its own, holds the methods and the digest of the pairs that it belongs to.

Source: table 4 of the paper, which compares methods in pairs. The order drawn, the ties, the key
and its digest are ours.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from workbench import runs
from workbench.errors import InputError
from workbench.evaluation.results import Evaluation

KEY_FORMAT = "workbench.pairs/1"


@dataclass(frozen=True)
class Pair:
    """Two answers to one query, and which method wrote which.

    Attributes:
        id: Says nothing of the example or the methods.
        task: As in the evaluation.
        example: Its name.
        user: Whose query it is.
        a: The method whose answer is shown as A; empty where the answers are equal.
    """

    id: str
    task: str
    example: str
    user: str
    a: str


@dataclass(frozen=True)
class Key:
    """What the pairs file keeps from its reader.

    Attributes:
        methods: The first is the one whose wins are counted.
        seed: Of the draws.
        run: Digest of the evaluation's settings and examples.
        answer_seeds: method -> the seed of its answers that were taken.
        pairs: Those in the file.
        ties: Those whose answers are equal, which are not.
        sha256: Digest of the pairs file.
    """

    methods: tuple[str, str]
    seed: int
    run: str
    answer_seeds: Mapping[str, int]
    pairs: tuple[Pair, ...]
    ties: tuple[Pair, ...]
    sha256: str

    def record(self) -> dict[str, Any]:
        """As it is written."""
        return {
            "format": KEY_FORMAT,
            "methods": list(self.methods),
            "seed": self.seed,
            "run": self.run,
            "answer_seeds": dict(self.answer_seeds),
            "sha256": self.sha256,
            "note": "ties: equal answers, not in the pairs file and counted as ties",
            "pairs": [vars(pair) for pair in self.pairs],
            "ties": [vars(pair) for pair in self.ties],
        }


def key_path(pairs: Path) -> Path:
    """Where the key of a pairs file lies unless it is said."""
    return pairs.with_suffix(".key.json")


def run_digest(evaluation: Evaluation) -> str:
    """What tells an evaluation from another one: its settings and examples."""
    names = sorted(evaluation.examples["example"])
    return runs.digest([evaluation.manifest["settings"], names])


def draw(
    evaluation: Evaluation,
    methods: Sequence[str],
    *,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    seed: int = 0,
    show_target: bool = False,
) -> tuple[str, Key]:
    """The text of a pairs file and its key.

    Args:
        evaluation: From `load_evaluation`.
        methods: Two of its methods; the first is the one whose wins will be counted.
        tasks: All that the run holds if empty.
        limit: Most examples a task, drawn from those that both methods answered. Those with
            equal answers are among them, so that the share of ties stays what it is.
        seed: Seed of the examples, of their order and of who is A.
        show_target: Show what the user answered, too.

    Raises:
        InputError: The methods aren't two of the run's, a task is not in it, or no two answers
            differ.
    """
    answers, seeds = _answers(evaluation, methods)
    wanted = _tasks(evaluation, tasks)
    records: Sequence[Any] = evaluation.examples.to_dict("records")
    rows: dict[str, dict[str, Any]] = {row["example"]: row for row in records}
    drawn = [pair for task in wanted for pair in _drawn(task, rows, answers, methods, limit, seed)]
    pairs = tuple(pair for pair in drawn if pair.a)
    ties = tuple(pair for pair in drawn if not pair.a)
    if not drawn:
        raise InputError(
            f"{evaluation.folder}: no example of {', '.join(wanted)} was answered by both "
            f"{' and '.join(methods)}; finish `workbench evaluate` with both"
        )
    if not pairs:
        raise InputError(
            f"{' and '.join(methods)} gave the same answer to all {len(ties)} examples: there is "
            "nothing to judge"
        )
    text = "".join(_line(pair, rows[pair.example], answers, show_target) for pair in pairs)
    digest = sha256(text.encode()).hexdigest()
    names = (methods[0], methods[1])
    return text, Key(names, seed, run_digest(evaluation), seeds, pairs, ties, digest)


def _drawn(
    task: str,
    rows: Mapping[str, Mapping[str, Any]],
    answers: Mapping[str, Mapping[str, str]],
    methods: Sequence[str],
    limit: int | None,
    seed: int,
) -> list[Pair]:
    """A task's pairs in random order, half of them with either method as A."""
    # A generator a task: a task more or less leaves the others' draws as they are.
    rng = np.random.default_rng([seed, *task.encode()])
    one, other = (answers[method] for method in methods)
    both = sorted(name for name in one if name in other and rows[name]["task"] == task)
    names = [both[i] for i in rng.permutation(len(both))[:limit]]
    differ = [name for name in names if one[name].strip() != other[name].strip()]
    first, second = sorted(methods)
    # With an odd count a coin decides who is A once more often.
    sides = rng.permutation((np.arange(len(differ)) + rng.integers(2)) % 2)
    shown = {name: (first, second)[side] for name, side in zip(differ, sides, strict=True)}
    return [
        Pair(
            runs.digest([seed, first, second, name])[:12],
            task,
            name,
            rows[name]["user"],
            shown.get(name, ""),
        )
        for name in names
    ]


def _answers(
    evaluation: Evaluation, methods: Sequence[str]
) -> tuple[dict[str, dict[str, str]], dict[str, int]]:
    """By method and example the text of the lowest seed, and by method that seed."""
    if len(methods) != 2 or methods[0] == methods[1]:
        raise InputError(f"wanted two methods such as cad,dps, got {','.join(methods) or 'none'}")
    table: pd.DataFrame = evaluation.answers
    there = list(dict.fromkeys(table["method"]))
    texts, seeds = {}, {}
    for method in methods:
        found = table[table["method"] == method]
        if not len(found):
            raise InputError(
                f"{evaluation.folder}: no answers of {method!r}; there are those of "
                f"{', '.join(there) or 'no method yet'}"
            )
        seeds[method] = int(found["seed"].min())
        found = found[found["seed"] == seeds[method]]
        texts[method] = dict(zip(found["example"], found["text"], strict=True))
    return texts, seeds


def _tasks(evaluation: Evaluation, tasks: Sequence[str]) -> list[str]:
    there = list(evaluation.manifest["settings"]["tasks"])
    for task in tasks:
        if task not in there:
            raise InputError(f"{evaluation.folder}: no task {task!r}; there are {', '.join(there)}")
    return list(dict.fromkeys(tasks or there))


def _line(
    pair: Pair,
    row: Mapping[str, Any],
    answers: Mapping[str, Mapping[str, str]],
    show_target: bool,
) -> str:
    b = next(method for method in answers if method != pair.a)
    shown = {
        "id": pair.id,
        "task": pair.task,
        "profile": list(row["profile"]),
        "query": row["query"],
        **({"target": row["target"]} if show_target else {}),
        "answer_a": answers[pair.a][pair.example],
        "answer_b": answers[b][pair.example],
    }
    return json.dumps(shown, ensure_ascii=False) + "\n"


def write_pairs(text: str, key: Key, path: Path) -> Path:
    """Write a pairs file and its key beside it.

    Returns:
        Where the key lies.

    Raises:
        InputError: Other pairs are there, which somebody may be judging, or a file can't be
            written.
    """
    where = key_path(path)
    written = json.dumps(key.record(), indent=1, ensure_ascii=False) + "\n"
    for file, new in ((path, text), (where, written)):
        if file.exists() and file.read_bytes() != new.encode():
            raise InputError(f"{file} holds other pairs; name another file, or delete this one")
    runs.write_text(where, written)  # first: pairs without their key are of no use
    runs.write_text(path, text)
    return where


def load_key(path: Path, pairs: Path) -> Key:
    """Read a key and make sure that it is the pairs file's.

    Raises:
        InputError: A file is missing or damaged, or the key is of another pairs file.
    """
    value = runs.read_json(path)
    runs.check_format(path, value.get("format") if isinstance(value, dict) else None, KEY_FORMAT)
    try:
        first, second = value["methods"]
        key = Key(
            (first, second),
            value["seed"],
            value["run"],
            value["answer_seeds"],
            tuple(Pair(**pair) for pair in value["pairs"]),
            tuple(Pair(**pair) for pair in value["ties"]),
            value["sha256"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: damaged ({error}); export the pairs again") from None
    if sha256(_bytes(pairs)).hexdigest() != key.sha256:
        raise InputError(
            f"{path} is the key of other pairs than {pairs}, or one of them was changed; name the "
            "right ones with --pairs and --key, or export the pairs again"
        )
    return key


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path}: can't be read: {error.strerror}; name the exported pairs with --pairs"
        ) from None


def check_run(key: Key, evaluation: Evaluation) -> None:
    """Refuse a key whose pairs were drawn from another evaluation.

    Raises:
        InputError: They were.
    """
    if key.run != run_digest(evaluation):
        raise InputError(
            f"these pairs were drawn from another run than {evaluation.folder}; name the run that "
            "they were exported from"
        )
