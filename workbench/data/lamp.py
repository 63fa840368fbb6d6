"""The reader of LaMP's official files.

The tasks of the built-in testbed are read by the same code.

Source: LaMP (Salemi et al., 2023), its published schema. It has no field for the user, and several
rows may be one author's: who wrote a row is inferred from its profile.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from workbench.data.authors import infer_users
from workbench.data.examples import Example
from workbench.data.tasks import TESTBED_TASKS, Task, get_task
from workbench.errors import InputError
from workbench.runs import read_json


def load_lamp(task: str, split: str = "dev", root: Path | str = ".") -> list[Example]:
    """Read one task and split from the official LaMP files.

    Args:
        task: `LaMP-1` to `LaMP-5` or `LaMP-7` (LaMP-6 is not public), or a testbed task.
        split: `train`, `dev` or `test`, whatever the files begin with.
        root: The folder that holds a folder `LaMP-4` or `LaMP_4`, in which
            `{split}_questions.json` and `{split}_outputs.json` lie.

    Returns:
        The examples in the order of the questions. A row's `user_id`, where there is one, names
        the user. Official files have none; there users are inferred: rows are one user's if their
        profiles share at least half of the smaller profile's items (equal in all the task's
        fields, whatever their ids) or, in LaMP-3, 4 and 7, one text of 60 characters; the user is
        named after the first row, `LaMP-4:310`. This is done within the file: an author in two
        splits is two users.

    Raises:
        InputError: A file is missing or malformed, ids are repeated or don't match, a gold
            output is missing or empty, or a profile is empty or lacks a field.
    """
    spec = get_task(task)
    folder = _task_folder(task, Path(root))
    questions_path = folder / f"{split}_questions.json"
    outputs_path = folder / f"{split}_outputs.json"
    for path in (questions_path, outputs_path):
        if not path.is_file():
            found = sorted({p.name.split("_")[0] for p in folder.glob("*_questions.json")})
            raise InputError(
                f"{path}: no such file; splits found here: {', '.join(found) or 'none'}"
            )
    questions = _read_rows(questions_path, None)
    golds = _golds(outputs_path)
    examples, seen = [], set[str]()
    for number, row in enumerate(questions):
        example = _example(row, task, spec, golds, f"{questions_path}: row {number}")
        if example.id in seen:
            raise InputError(f"{questions_path}: row {number}: id {example.id!r} stands twice")
        seen.add(example.id)
        examples.append(example)
    unknown = sorted(golds.keys() - seen)
    if unknown:
        raise InputError(
            f"{outputs_path}: gold output for id {unknown[0]!r}, which {questions_path.name} "
            f"does not have ({len(unknown)} such ids); do the two files belong together?"
        )
    if not examples:
        raise InputError(f"{questions_path}: holds no rows")
    return infer_users(examples)


def _task_folder(task: str, root: Path) -> Path:
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; --root names where the LaMP files lie")
    for name in (task, task.replace("-", "_")):
        if (root / name).is_dir():
            return root / name
    raise InputError(f"{root}: holds no folder {task} or {task.replace('-', '_')}")


# Texts that all look like dates, and numbers with a point in some rows only, are converted when a
# column's type is guessed: "2011-01-05" would become a time of day, a score of 5 "5.0".
_REREAD = re.compile(r"Value\('(?:timestamp|date|time|float|double)")


def _read_rows(path: Path, field: str | None) -> list[dict[str, Any]]:
    """Rows of a JSON array, or of the array under `field`, through `datasets`."""
    import datasets

    try:
        with quiet_datasets():
            loaded = datasets.load_dataset("json", data_files=str(path), field=field, split="train")
        if _REREAD.search(str(loaded.features)):
            rows = read_json(path)
            return list(rows[field] if field else rows)
        return list(loaded)
    except (
        *(datasets.exceptions.DatasetGenerationError, ValueError, TypeError, KeyError),
        StopIteration,  # what an empty file raises
    ) as error:
        # `datasets` does not say where a file is broken; the parser does.
        rows = read_json(path)
        if field:
            rows = rows.get(field) if isinstance(rows, dict) else None
        wanted = "an object with a list `golds`" if field else "a list of rows"
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise InputError(f"{path}: wanted {wanted}, each row an object") from None
        if not rows:
            raise InputError(f"{path}: holds no rows") from None
        raise InputError(
            f"{path}: `datasets` can't read it: {error.__cause__ or error}; "
            "give a field the same type in every row"
        ) from error


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """No bars and no remarks of `datasets` while small local files are read."""
    import datasets

    level = datasets.utils.logging.get_verbosity()
    bars = datasets.is_progress_bar_enabled()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.utils.logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()


def _golds(path: Path) -> dict[str, str]:
    golds: dict[str, str] = {}
    for number, row in enumerate(_read_rows(path, "golds")):
        if row.get("id") is None or row.get("output") is None:
            raise InputError(f"{path}: gold {number}: wanted `id` and `output`, got {sorted(row)}")
        if str(row["id"]) in golds:
            raise InputError(f"{path}: gold {number}: id {row['id']!r} stands twice")
        golds[str(row["id"])] = str(row["output"])
    return golds


def _example(
    row: Mapping[str, Any], task: str, spec: Task, golds: Mapping[str, str], place: str
) -> Example:
    for key in ("id", "input", "profile"):
        if row.get(key) is None:
            raise InputError(f"{place}: `{key}` is missing")
    row_id = str(row["id"])
    if row_id not in golds:
        raise InputError(f"{place}: no gold output for id {row_id!r} in the outputs file")
    if not golds[row_id].strip():
        raise InputError(f"{place}: the gold output for id {row_id!r} is empty; remove the row")
    items = row["profile"]
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise InputError(f"{place}: wanted `profile` to be a list of objects, got {items!r:.60}")
    if spec.kind == "rating" and golds[row_id].strip() not in spec.labels:
        raise InputError(
            f"{place}: the gold output for id {row_id!r} is {golds[row_id]!r}, no rating; wanted "
            f"one of {', '.join(spec.labels)}"
        )
    profile = []
    for index, item in enumerate(items):
        missing = [name for name in spec.fields if item.get(name) is None]
        if missing:
            raise InputError(
                f"{place}: profile item {index} lacks {', '.join(missing)}; "
                f"{task} items have {', '.join(spec.fields)}"
            )
        profile.append({key: str(value) for key, value in item.items() if value is not None})
    if not profile:
        raise InputError(
            f"{place}: the profile of id {row_id!r} is empty; remove the row, "
            "there is nothing to personalise from"
        )
    user = "" if row.get("user_id") is None else str(row["user_id"])
    nameless = not user.strip()
    query, gold = str(row["input"]), golds[row_id]
    return Example(row_id, user, task, query, gold, tuple(profile), inferred=nameless)


def sample_users(examples: Sequence[Example], users: int | None, seed: int = 0) -> list[Example]:
    """All examples of some users, drawn at random from a seed; the order stays.

    Raises:
        InputError: Fewer users are there than asked for, or fewer than one is asked for.
    """
    names = list(dict.fromkeys(example.user for example in examples))
    if users is None:
        return list(examples)
    if not 1 <= users <= len(names):
        raise InputError(f"asked for {users} users, the data has {len(names)}")
    kept = set(random.Random(seed).sample(names, users))
    return [example for example in examples if example.user in kept]


def testbed_examples(split: str, root: Path) -> list[Example]:
    """The testbed's three tasks in one list, with the users' latent style attached."""
    users_path = root / f"{split}_users.json"
    users = read_json(users_path)
    examples = []
    for task in TESTBED_TASKS:
        for example in load_lamp(task, split, root):
            if example.user not in users:
                raise InputError(f"{users_path}: has no user {example.user!r}")
            style = users[example.user]["style"] if task == "testbed-headline" else {}
            examples.append(replace(example, style=style))
    return examples
