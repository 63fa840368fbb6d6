"""LongLaMP: long personal texts, from the hub or from a copy of it.

Six configs: `abstract_generation`, `product_review` and `topic_writing`, each as `_user` (other
users in every split) and `_temporal` (the same users later on); splits `train`, `val` and `test`.
A row holds its user, `input` (the whole instruction), `output` and `profile`, a list of items:

| config | user | fields of an item |
|---|---|---|
| `abstract_generation` | `name` | `title`, `abstract`, `year`, `id` |
| `product_review` | `reviewerId` | `overall`, `description`, `summary`, `reviewText` |
| `topic_writing` | `author` | `summary`, `content`, `author`, `id` |

Source:
    LongLaMP (Kumar et al., 2024, arXiv 2407.11016): tasks, settings and metrics (ROUGE-1, ROUGE-L,
    METEOR). Configs and splits stand on the dataset's page on the hub, `LongLaMP/LongLaMP`. The
    columns are those that several public programs read from it, one of them after the hub's own
    schema service; the dataset itself was not at hand when this was written, so a row that differs
    is refused with the columns it has. In the authors' own code posts of a profile are called
    `input` and `output`; those names are read too. What the authors don't say and was decided here:
    an item's field without a value is an empty text, `year` serves as the item's date, and a row
    without an `id` gets its split and number for one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from workbench.data.authors import infer_users
from workbench.data.examples import Example
from workbench.data.lamp import quiet_datasets
from workbench.data.tasks import LONGLAMP_TASKS, Task, get_task
from workbench.errors import InputError

HUB_ID = "LongLaMP/LongLaMP"
SPLITS = ("train", "val", "test")
_PREFIX = "LongLaMP-"
_RECURRING = "_temporal"
_USERS = {"abstract_generation": "name", "product_review": "reviewerId", "topic_writing": "author"}
_OTHER_NAMES = {"summary": "input", "content": "output"}
_DOWNLOAD = f"hf download {HUB_ID} --repo-type dataset --local-dir FOLDER"

Row = Mapping[str, Any]


def load_longlamp(
    task: str, split: str = "val", root: Path | str | None = None, *, revision: str | None = None
) -> list[Example]:
    """Read one config and split of LongLaMP.

    Args:
        task: `abstract_generation_user` and the like; `LongLaMP-` before it is allowed.
        split: `train`, `val` or `test`.
        root: A local copy; by default the hub is asked, through its local cache. In the copy a
            folder of the config's name holds one of: Parquet files `val-*.parquet` or
            `val/*.parquet`, as they are downloaded; a folder `val` written by
            `datasets.save_to_disk`; `val.jsonl`, a row a line. A copy of the whole repository
            whose `README.md` names its files may lay them out in another way.
        revision: Branch, tag or commit on the hub.

    Returns:
        The examples in the order of the rows. The row's author or reviewer is the user; rows that
        name none are joined by their profiles, as LaMP's are. An id is the row's own, or made of
        split and number, `val-0`.

    Raises:
        InputError: The config or the split is unknown, the hub can't be reached, files are
            missing or broken, or a row lacks its input, output or profile.
    """
    config = task.removeprefix(_PREFIX)
    if _PREFIX + config not in LONGLAMP_TASKS:
        known = ", ".join(name.removeprefix(_PREFIX) for name in LONGLAMP_TASKS)
        raise InputError(f"unknown LongLaMP task {task!r}; known are {known}")
    if split not in SPLITS:
        raise InputError(f"unknown LongLaMP split {split!r}; known are {', '.join(SPLITS)}")
    if root is None:
        rows, place = _hub_rows(config, split, revision), f"{HUB_ID} {config} {split}"
        return _examples(rows, config, split, place)
    if revision is not None:
        raise InputError(f"revision {revision!r} is one of the hub's; a local copy has none")
    rows, place = _local_rows(Path(root), config, split)
    return _examples(rows, config, split, place)


def users_recur(task: str) -> bool:
    """Whether a task has the same users in every split, later on in time, by design.

    Source: LongLaMP (Kumar et al., 2024), its temporal setting.
    """
    return task.startswith(_PREFIX) and task.endswith(_RECURRING)


# Where rows come from


def _hub_rows(config: str, split: str, revision: str | None) -> Iterable[Row]:
    import datasets

    try:
        return datasets.load_dataset(HUB_ID, name=config, split=split, revision=revision)
    except Exception as error:
        # Each library on the way to the hub has its own errors for a connection that breaks.
        what = (str(error) or type(error).__name__).split("\n")[0].rstrip(".")
        at = f" at revision {revision!r}" if revision else ""
        raise InputError(
            f"{HUB_ID} {config} {split}{at}: can't be loaded from the hub: {what}. Without a "
            f"connection give a copy by --root FOLDER, made where there is one: {_DOWNLOAD}"
        ) from error


def _local_rows(root: Path, config: str, split: str) -> tuple[Iterable[Row], str]:
    """Rows of a local copy, and where they stand."""
    import datasets

    if not root.is_dir():
        raise InputError(f"{root}: no such folder; --root names a local copy of {HUB_ID}")
    folder = root / config
    lines, saved = folder / f"{split}.jsonl", folder / split
    parquet = _parquet_files(folder, split)
    readme = root / "README.md"
    with quiet_datasets():
        try:
            if (saved / "state.json").is_file():
                return datasets.load_from_disk(str(saved)), str(saved)
            if parquet:
                names = [str(path) for path in parquet]
                rows = datasets.load_dataset("parquet", data_files=names, split="train")
                place = names[0] if len(names) == 1 else f"{folder} {split}"
                return rows, place
            if lines.is_file():
                return _json_lines(lines), str(lines)
            if readme.is_file() and config in readme.read_text(encoding="utf-8"):
                rows = datasets.load_dataset(str(root), name=config, split=split)
                return rows, f"{root} {config} {split}"
        except InputError:
            raise
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            what = str(error.__cause__ or error).split("\n")[0].rstrip(".")
            raise InputError(
                f"{folder}: split {split} can't be read: {what}. Download it again "
                f"({_DOWNLOAD}); a clone needs `git lfs pull` for its files"
            ) from error
    raise InputError(
        f"{folder}: holds no split {split}; splits found here: {_splits_in(folder)}. Wanted are "
        f"{split}-*.parquet, {split}/*.parquet, {split}.jsonl or a folder {split} of save_to_disk"
    )


def _parquet_files(folder: Path, split: str) -> list[Path]:
    """The Parquet files of a split in order; none missing where their names say how many."""
    found = [*folder.glob(f"{split}.parquet"), *folder.glob(f"{split}-*.parquet")]
    found = sorted(found or (folder / split).glob("*.parquet"))
    totals = {int(m[1]) for path in found if (m := re.search(r"-of-(\d+)\.parquet$", path.name))}
    if totals and totals != {len(found)}:
        wanted = " or ".join(map(str, sorted(totals)))
        raise InputError(
            f"{folder}: {len(found)} of {wanted} files of split {split} are there; download the "
            f"rest ({_DOWNLOAD}) and keep one version of the files"
        )
    return found


def _splits_in(folder: Path) -> str:
    names = [path.name for path in folder.glob("*")]
    found = [split for split in SPLITS if any(re.match(rf"{split}\b", name) for name in names)]
    return ", ".join(found) or "none"


def _json_lines(path: Path) -> list[Row]:
    # Not through `datasets`, which guesses types: a text that looks like a date becomes a time.
    rows: list[Row] = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}: line {number}: malformed JSON: {error}") from None
        if not isinstance(row, dict):
            raise InputError(f"{path}: line {number}: wanted an object, got {line[:60]!r}")
        rows.append(row)
    return rows


# From rows to examples


def _examples(rows: Iterable[Row], config: str, split: str, place: str) -> list[Example]:
    task = _PREFIX + config
    examples, seen = [], set[str]()
    for number, row in enumerate(rows):
        example = _example(row, f"{split}-{number}", task, f"{place}: row {number}")
        if example.id in seen:
            raise InputError(f"{place}: row {number}: id {example.id!r} stands twice")
        seen.add(example.id)
        examples.append(example)
    if not examples:
        raise InputError(f"{place}: holds no rows")
    return infer_users(examples)


def _example(row: Row, place_in_split: str, task: str, place: str) -> Example:
    for key in ("input", "output", "profile"):
        if row.get(key) is None:
            raise InputError(f"{place}: `{key}` is missing; columns found: {', '.join(row)}")
    items = row["profile"]
    if not isinstance(items, list) or not all(isinstance(item, Mapping) for item in items):
        raise InputError(f"{place}: wanted `profile` to be a list of objects, got {items!r:.60}")
    for key, empty in (("output", not str(row["output"]).strip()), ("profile", not items)):
        if empty:
            raise InputError(
                f"{place}: `{key}` is empty; make a copy without the row (`filter` and "
                "`save_to_disk` of datasets) and give it by --root"
            )
    spec = get_task(task)
    profile = tuple(
        _item(item, spec, f"{place}: profile item {index}") for index, item in enumerate(items)
    )
    row_id = place_in_split if row.get("id") is None else str(row["id"])
    named = row.get(_USERS[task.removeprefix(_PREFIX).rpartition("_")[0]])
    user = "" if named is None or not str(named).strip() else str(named)
    query, gold = str(row["input"]), str(row["output"])
    return Example(row_id, user, task, query, gold, profile, inferred=not user)


def _item(item: Row, spec: Task, place: str) -> dict[str, str]:
    """An item with the task's fields; those without a value are empty."""
    shown = {key: "" if value is None else str(value) for key, value in item.items()}
    for name in spec.fields:
        if name not in shown and _OTHER_NAMES.get(name) in shown:
            shown[name] = shown.pop(_OTHER_NAMES[name])
    missing = [name for name in spec.fields if name not in shown]
    if missing:
        raise InputError(
            f"{place} lacks {', '.join(missing)}; fields found: {', '.join(item) or 'none'}"
        )
    if "date" not in shown and "year" in shown:
        shown["date"] = shown["year"]
    return shown
