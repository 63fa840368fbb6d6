"""Judgements of pairs, read back: whose, and of what.

Lines are `{"id": …, "choice": "A" | "B" | "tie", "annotator": …}`, or rows of a CSV file with
these columns. Answers of an endpoint (`endpoint.py`) are lines, too, with what was said to either
order beside them.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.errors import InputError
from workbench.evaluation.judge import Key

CHOICES = ("A", "B", "tie")
JUDGEMENTS = "workbench.judgements/1"


@dataclass(frozen=True)
class Annotation:
    """What one annotator said of one pair.

    Attributes:
        id: The pair's.
        choice: `A`, `B` or `tie`; None where an endpoint's reply could not be read.
        annotator: Who.
        shown: Which place was chosen each time it was asked: once by a person; by an endpoint
            once in each order, so that `("A", "A")` chose the first shown both times.
        where: File and line.
    """

    id: str
    choice: str | None
    annotator: str
    shown: tuple[str | None, ...]
    where: str


def read_annotations(paths: Sequence[Path], key: Key) -> list[Annotation]:
    """Read annotations of a key's pairs from JSON lines or CSV files.

    Raises:
        InputError: A file can't be read, a line is malformed, an id is none of the pairs', or an
            annotator judged a pair twice; the message names file and line.
    """
    known = {pair.id for pair in key.pairs}
    seen: dict[tuple[str, str], str] = {}
    found = []
    for path in paths:
        for where, row in _rows(path, key):
            annotation = _annotation(where, row)
            if annotation.id not in known:
                raise InputError(
                    f"{where}: id {annotation.id!r} is none of the {len(known)} pairs; were these "
                    "pairs judged, or others?"
                )
            judged = annotation.id, annotation.annotator
            if judged in seen:
                raise InputError(
                    f"{where}: {annotation.annotator} judged pair {annotation.id} before, at "
                    f"{seen[judged]}; keep one of the two"
                )
            seen[judged] = where
            found.append(annotation)
    if not found:
        raise InputError(f"{', '.join(map(str, paths))}: holds no annotation")
    return found


def _rows(path: Path, key: Key) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each row with the file and line that it stands in."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: can't be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is no UTF-8 text ({error}); save it as UTF-8") from None
    if path.suffix.lower() == ".csv":
        yield from _csv_rows(path, text)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        where = f"{path}: line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{where}: malformed JSON ({error.msg}); put it right") from None
        if not isinstance(row, dict):
            raise InputError(f"{where}: wanted an object with id, choice and annotator")
        if row.get("format") == JUDGEMENTS:
            _check_header(where, row, key)
            continue
        yield where, row


def _csv_rows(path: Path, text: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    missing = {"id", "choice", "annotator"} - set(reader.fieldnames or ())
    if missing:
        raise InputError(
            f"{path}: line 1: no column {', '.join(sorted(missing))}; wanted id, choice, annotator"
        )
    for row in reader:
        yield f"{path}: line {reader.line_num}", row


def _check_header(where: str, header: Mapping[str, Any], key: Key) -> None:
    if header.get("pairs") != key.sha256:
        raise InputError(f"{where}: an endpoint's answers about other pairs; name those they judge")


def _annotation(where: str, row: Mapping[str, Any]) -> Annotation:
    texts = {}
    for name in ("id", "annotator"):
        value = row.get(name)
        if not isinstance(value, str) or not value.strip():
            raise InputError(f"{where}: wanted a text as {name}, got {value!r}")
        texts[name] = value.strip()
    choice = row.get("choice")
    if "shown" in row:  # an endpoint's
        shown = tuple(row["shown"])
        if choice not in (*CHOICES, None) or not set(shown) <= {*CHOICES, None}:
            raise InputError(f"{where}: damaged; delete the line and ask the endpoint again")
        return Annotation(texts["id"], choice, texts["annotator"], shown, where)
    if choice not in CHOICES:
        raise InputError(f"{where}: choice must be A, B or tie, got {choice!r}")
    return Annotation(texts["id"], choice, texts["annotator"], (choice,), where)
