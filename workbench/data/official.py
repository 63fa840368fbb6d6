"""The authors' published score files: read with every check they allow, and written.

`FOLDER/TASK/GROUP/` holds `*_ranked.json`, all heads with their mean score; `*_top_heads.json`, the
ones selected; and for some groups `*_pcs.json`, the score of every example. A group is a number of
examples that scores were averaged over, or one of our users.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import numpy as np
from numpy.typing import NDArray

from workbench import runs
from workbench.errors import InputError
from workbench.heads import Head, HeadSet, all_heads, rank, top_k
from workbench.runs import read_json
from workbench.scores import By, HeadScores

RANKED, TOP, PCS = "_ranked.json", "_top_heads.json", "_pcs.json"
GLOBAL = "global"
# Means are printed with all their digits; sums in another order move the last ones.
ROUNDING = 1e-6


@dataclass(frozen=True)
class OfficialGroup:
    """The published scores of one group of examples.

    Attributes:
        name: The group's folder, such as `k25` or `global`.
        model: As the file names it.
        examples: How many examples the means are over.
        mean: Mean scores [layer, head] in nats per target token; NaN where there is no head.
        top: The selected heads, in the file's order.
        scores: Per example, [example, layer, head]; None where they weren't published.
    """

    name: str
    model: str
    examples: int
    mean: NDArray[np.float64]
    top: HeadSet
    scores: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class Official:
    """Published scores: `tasks[task][group]`, the global group first, then by examples."""

    tasks: Mapping[str, Mapping[str, OfficialGroup]]


def read_official(folder: Path | str) -> Official:
    """Read a folder of the authors' format, all tasks and groups in it.

    A file is held against the others: every head of the model once, ranks without a gap and in
    the order of the scores, selected heads that are the highest, and per-example scores whose
    means are the ranked ones.

    Args:
        folder: Holds a folder a task, and in it a folder a group.

    Raises:
        InputError: There is no such folder or file, or a file is damaged or contradicts another;
            the message names the file, the entry, and what to do.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give the one that holds a folder a task")
    tasks: dict[str, dict[str, OfficialGroup]] = {}
    for task in _folders(folder):
        groups = [_group(path) for path in _folders(task) if any(path.glob("*.json"))]
        if groups:
            _same_shape(task, groups)
            groups.sort(key=lambda group: (group.name != GLOBAL, group.examples, group.name))
            tasks[unquote(task.name)] = {group.name: group for group in groups}
    if not tasks:
        raise InputError(
            f"{folder}: holds no score files; give the folder above TASK/GROUP/*{RANKED}, such "
            f"as LaMP-1/k25/MODEL_LaMP_1{RANKED}"
        )
    return Official(tasks)


def _folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _only(folder: Path, ending: str) -> Path | None:
    """The one file of a kind. Hidden ones are not data: `._x.json` comes from a Mac's disk."""
    found = sorted(p for p in folder.glob(f"*{ending}") if not p.name.startswith("."))
    if len(found) > 1:
        names = " and ".join(path.name for path in found[:2])
        raise InputError(f"{folder}: a group has one *{ending}, got {names}; keep one of them")
    return found[0] if found else None


def _needed(folder: Path, ending: str) -> Path:
    path = _only(folder, ending)
    if path is None:
        raise InputError(f"{folder}: has no *{ending}; fetch the file, or move the group away")
    return path


def _group(folder: Path) -> OfficialGroup:
    ranked, selected = _needed(folder, RANKED), _needed(folder, TOP)
    value = read_json(ranked)
    examples, entries = _header(ranked, value)
    mean = _means(ranked, entries, value.get("heads_per_layer"))
    top = _selected(selected, mean)
    each = _only(folder, PCS)
    scores = None if each is None else _per_example(each, mean, examples)
    model = str(value.get("model", "unnamed"))
    return OfficialGroup(unquote(folder.name), model, examples, mean, top, scores)


def _header(path: Path, value: object) -> tuple[int, list[Any]]:
    """Number of examples and the list of heads of a ranked file."""
    entries = value.get("ranked_heads") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(entries, list) or not entries:
        raise InputError(f"{path}: not a ranking; wanted a `ranked_heads` list with all heads")
    examples = value.get("num_samples")
    if type(examples) is not int or examples < 1:
        raise InputError(f"{path}: `num_samples` must be 1 or more, got {examples!r:.40}")
    return examples, entries


def _means(path: Path, entries: list[Any], heads_per_layer: object) -> NDArray[np.float64]:
    """Mean scores [layer, head] of a ranking that holds every head once, in order."""
    means: dict[Head, float] = {}
    before = math.inf
    for place, entry in enumerate(entries, start=1):
        head, mean, numbered = _entry(path, place, entry)
        if head in means:
            raise InputError(f"{path}: entry {place}: {head} is there twice; fetch the file anew")
        if numbered != place or mean > before:
            raise InputError(
                f"{path}: entry {place} ({head}, rank {numbered}, {mean:g}) is out of order: "
                "lines are missing or were changed; fetch the file anew"
            )
        means[head] = before = mean
    shape = _shape(path, means, heads_per_layer)
    grid = np.full((len(shape), max(shape)), np.nan)
    for head, mean in means.items():
        grid[head.layer, head.head] = mean
    return grid


def _entry(path: Path, place: int, entry: object) -> tuple[Head, float, int]:
    try:
        layer, head, mean, numbered = (
            entry[key]  # type: ignore[index]
            for key in ("layer", "head", "avg_pcs", "rank")
        )
        whole = all(type(n) is int and n >= 0 for n in (layer, head, numbered))
        if whole and type(mean) in (int, float) and math.isfinite(mean):
            return Head(layer, head), float(mean), numbered
    except (KeyError, TypeError):
        pass
    raise InputError(
        f"{path}: entry {place}: wanted layer, head, rank and a finite avg_pcs, got {entry!r:.80}"
    )


def _shape(path: Path, means: Mapping[Head, float], given: object) -> tuple[int, ...]:
    """Heads a layer: as our own files say, or as many in each layer. None may be missing."""
    if given is None:
        widest = max(head.head for head in means) + 1
        shape: tuple[int, ...] = (widest,) * (max(head.layer for head in means) + 1)
    elif isinstance(given, list) and all(type(n) is int and n >= 0 for n in given):
        shape = tuple(given)
    else:
        raise InputError(f"{path}: `heads_per_layer` must be a list of counts, got {given!r:.60}")
    lost = [str(head) for head in all_heads(shape) if head not in means]
    if lost:
        more = ", …" if len(lost) > 3 else ""
        raise InputError(
            f"{path}: {len(lost)} of {sum(shape)} heads are missing: {', '.join(lost[:3])}{more}; "
            "fetch the whole file"
        )
    if len(means) > sum(shape):
        raise InputError(f"{path}: holds heads beyond its own `heads_per_layer`, {list(shape)}")
    return shape


def _selected(path: Path, mean: NDArray[np.float64]) -> HeadSet:
    """The selected heads, which must be the highest but for ties at the cut."""
    top = HeadSet.load(path)
    number = read_json(path).get("num_heads_selected", len(top))
    if number != len(top) or not len(top):
        raise InputError(f"{path}: {number} heads are announced and {len(top)} are listed")
    for head in top:
        _check_known(path, str(head), head, mean)
    ours = top_k(mean, len(top))
    cut = ours.heads[-1]
    for head in top:
        score = mean[head.layer, head.head]
        if score < mean[cut.layer, cut.head]:
            raise InputError(
                f"{path}: {head} is selected, and by the ranked file ({score:g}) it is not among "
                f"the {len(top)} highest: the two files are of different runs; fetch both anew"
            )
    return HeadSet(top.heads, ties=ours.ties)


def _per_example(path: Path, mean: NDArray[np.float64], examples: int) -> NDArray[np.float64]:
    """Scores [example, layer, head] of a `*_pcs.json`."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise InputError(f'{path}: not a list of head scores; wanted {{"layer-head": [scores]}}')
    scores = np.full((examples, *mean.shape), np.nan)
    for key, entry in value.items():
        try:
            head = Head.parse(key)
        except InputError as error:
            raise InputError(f"{path}: entry {key!r}: {error}") from None
        _check_known(path, key, head, mean)
        numbers = entry if isinstance(entry, list) else [entry]
        fit = all(type(n) in (int, float) and math.isfinite(n) for n in numbers)
        if not fit or len(numbers) != examples:
            raise InputError(
                f"{path}: entry {key!r}: wanted {examples} finite scores, one an example, got "
                f"{entry!r:.60}"
            )
        if not np.isnan(scores[0, head.layer, head.head]):
            raise InputError(f"{path}: entry {key!r}: {head} is there twice; fetch the file anew")
        scores[:, head.layer, head.head] = numbers
    found = scores.mean(axis=0)
    for head in rank(mean):
        listed, ranked = found[head.layer, head.head], mean[head.layer, head.head]
        if not abs(listed - ranked) <= ROUNDING * max(1.0, abs(ranked)):
            state = "is missing" if np.isnan(listed) else f"has mean {listed:g}"
            raise InputError(
                f"{path}: entry '{head.layer}-{head.head}' {state}, and the ranked file says "
                f"{ranked:g}; fetch both files anew"
            )
    return scores


def _check_known(path: Path, entry: str, head: Head, mean: NDArray[np.float64]) -> None:
    inside = 0 <= head.layer < mean.shape[0] and 0 <= head.head < mean.shape[1]
    if not inside or np.isnan(mean[head.layer, head.head]):
        raise InputError(
            f"{path}: entry {entry!r}: {head} is not in the ranked file; fetch both anew"
        )


def _same_shape(task: Path, groups: list[OfficialGroup]) -> None:
    """Groups are compared head by head, so they must be of one model."""
    first = groups[0]
    for group in groups[1:]:
        same = group.model == first.model and group.mean.shape == first.mean.shape
        if not same or (np.isnan(group.mean) != np.isnan(first.mean)).any():
            raise InputError(
                f"{task / group.name}: scores of {_named(group)}, and those of {first.name} are of "
                f"{_named(first)}; a task's groups are of one model: move one of them away"
            )


def _named(group: OfficialGroup) -> str:
    return f"{group.model} with {int((~np.isnan(group.mean)).sum())} heads"


def write_official(
    scores: HeadScores, folder: Path | str, k: int, by: By = "task"
) -> tuple[Path, ...]:
    """Write scores as files of the authors' format.

    `read_official` reads them back, and so do `HeadSet.load` and `heads.read_head_scores`. A
    model whose layers differ in heads needs one key more than the authors' files have,
    `heads_per_layer`; theirs leave out what they don't know.

    Args:
        scores: PCS per example, of all heads.
        folder: Gets `TASK/GROUP/`. Files of the same groups are replaced.
        k: Size of the selected sets.
        by: `task`: one group a task, `global`. `user` or `cluster`: in each task a group a user,
            named by the user; a letter that a file name can't have is written %XX. `all`: one
            group of all examples, `all/global`.

    Returns:
        The files written.

    Raises:
        InputError: Scores are missing, K is outside the model, or a file can't be written.
    """
    scores.need_all_heads("a file of the authors' format")
    pcs = scores.data["pcs"].values.astype(np.float64)
    heads = sum(scores.heads_per_layer)
    if not heads or (~np.isnan(pcs)).sum() != heads * len(pcs):
        raise InputError(
            "scores are missing, and a file of the authors' format has all of them; score the "
            "run again to its end"
        )
    written: list[Path] = []
    for task, group, rows in _parts(scores, by):
        place = Path(folder) / _file_name(task) / _file_name(group)
        written += _write_group(place, task, pcs[rows], k, scores)
    return tuple(written)


def _parts(scores: HeadScores, by: By) -> list[tuple[str, str, NDArray[np.intp]]]:
    """Task, group and the positions of its examples."""
    if by == "all":
        return [("all", GLOBAL, rows) for rows in scores.groups("all").values()]
    tasks = scores.groups("task")
    if by == "task":
        return [(task, GLOBAL, rows) for task, rows in tasks.items()]
    return [
        (task, name, both)
        for task, rows in tasks.items()
        for name, members in scores.groups(by).items()
        if len(both := rows[np.isin(rows, members)])
    ]


def _file_name(name: str) -> str:
    """A folder's name that stays inside its folder, and that `unquote` reads back."""
    safe = quote(name, safe=" ")
    return f"%2E{safe[1:]}" if safe.startswith(".") else safe


def _write_group(
    folder: Path, task: str, pcs: NDArray[np.float64], k: int, scores: HeadScores
) -> list[Path]:
    mean = pcs.mean(axis=0)
    order, top, shape = rank(mean), top_k(mean, k), scores.heads_per_layer
    model = str(scores.manifest.get("settings", {}).get("model", "unnamed"))
    ranked: dict[str, Any] = {"model": model, "task": task, "num_samples": len(pcs)}
    if len(set(shape)) > 1:
        ranked["heads_per_layer"] = list(shape)
    ranked["ranked_heads"] = [
        {"layer": h.layer, "head": h.head, "avg_pcs": float(mean[h.layer, h.head]), "rank": place}
        for place, h in enumerate(order, start=1)
    ]
    selected = {
        "model": model,
        "task": task,
        "top_percent": round(k / len(order), 4),
        "num_heads_selected": k,
        "preference_heads": [[h.layer, h.head] for h in top],
    }
    each = {f"{h.layer}-{h.head}": pcs[:, h.layer, h.head].tolist() for h in all_heads(shape)}
    # As the authors name them: the task with underscores, LaMP_1.
    stem = re.sub(r"[^\w.-]", "_", model) + "_" + re.sub(r"[^\w.]", "_", task)
    paths = [folder / f"{stem.lstrip('.')}{ending}" for ending in (RANKED, TOP, PCS)]
    for path, value in zip(paths, (ranked, selected, each), strict=True):
        runs.write_text(path, json.dumps(value, indent=2) + "\n")
    return paths
