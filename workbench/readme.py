"""The README's tables, made from the measured results so that no number is typed by hand."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from workbench import runs
from workbench.bench.tables import tables as bench_tables
from workbench.errors import InputError

# What stands between two markers.
TESTBED, BENCH, EVALUATION = "testbed tables", "bench tables", "evaluation tables"
EXAMINATION = "examination"
TOLD = ("headline", "compared", "lines")  # where a command's JSON holds its findings
# What `--json` of a command printed, and under which title its findings stand.
EXAMINED = {
    "examination.json": "The testbed, `workbench probe testbed --full`",
    "examination-small.json": "The smaller one, `workbench probe testbed-small --full`",
    "planted.json": "Planted heads, `workbench testbed planted`",
    "transfer-seed.json": "The testbed and the same architecture from another seed",
    "transfer-small.json": "The testbed and the smaller one",
}


def with_tables(text: str, results: Path) -> str:
    """The text with the tables of all results between its markers.

    Raises:
        InputError: There are no results, or the text lacks the markers.
    """
    files = sorted(results.glob("seed-*.json"))
    if not files:
        raise InputError(f"{results}: holds no results; make them with `workbench testbed study`")
    return _between(text, TESTBED, tables([runs.read_json(path) for path in files]))


def with_bench(text: str, result: Mapping[str, Any]) -> str:
    """The text with the tables of a bench between its markers.

    Raises:
        InputError: The text lacks the markers.
    """
    return _between(text, BENCH, "\n\n".join(table.markdown() for table in bench_tables(result)))


def with_evaluation(text: str, path: Path, shared: Path) -> str:
    """The text with the tables of two evaluations between its markers.

    Args:
        text: With the markers.
        path: What `workbench evaluate --json` printed.
        shared: The same of a run with `--prefill shared`.

    Raises:
        InputError: A file is missing or holds no evaluation, or the text lacks the markers.
    """
    body = [
        evaluation_tables(path),
        '**The same with `prefill="shared"`**: the second view starts from the plain cache.',
        evaluation_tables(shared),
    ]
    return _between(text, EVALUATION, "\n\n".join(body))


def with_examination(text: str, results: Path) -> str:
    """The text with the findings of examinations, of planted heads and of transfer.

    Args:
        text: With the markers.
        results: Folder of what the commands in `EXAMINED` printed with `--json`.

    Raises:
        InputError: A file is missing or holds no findings, or the text lacks the markers.
    """
    body = []
    for name, title in EXAMINED.items():
        found = runs.read_json(results / name)
        lines = (
            next((found[key] for key in TOLD if found.get(key)), None)
            if isinstance(found, dict)
            else None
        )
        if not lines:
            raise InputError(f"{results / name}: holds no findings; make it with --json")
        body.append("\n".join([f"**{title}**", "", *(f"- {line}" for line in lines)]))
    return _between(text, EXAMINATION, "\n\n".join(body))


def evaluation_tables(path: Path) -> str:
    """A table a task, the findings in words, and how they came about, as Markdown.

    Raises:
        InputError: The file is missing or holds no evaluation.
    """
    found = runs.read_json(path)
    try:
        return _evaluation(found)
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: not what `workbench evaluate --json` prints") from error


def _evaluation(found: Mapping[str, Any]) -> str:
    primary = [row for row in found["rows"] if row["primary"]]
    parts = []
    for task in dict.fromkeys(row["task"] for row in primary):
        rows = [row for row in primary if row["task"] == task]
        parts += [_title(rows[0]), _methods(rows)]
    parts.append("\n".join(f"- {line}" for line in found["findings"]))
    parts.append("*" + " ".join(found["protocol"]) + "*")
    return "\n\n".join(parts)


def _title(row: Mapping[str, Any]) -> str:
    arrow = "↑" if row["better"] == "higher" else "↓"
    reading = f", {row['reading']} reading" if row["reading"] else ""
    return (
        f"**{row['task']}**: {row['metric']} ({arrow}){reading}, {row['examples']} examples of "
        f"{row['users']} users"
    )


def _methods(rows: Sequence[Mapping[str, Any]]) -> str:
    body = []
    for row in rows:
        if row["value"] is None:
            body.append([row["method"], "–", "–", "–", row["note"]])
            continue
        value = f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
        if row["seed_min"] is not None:
            value += f", {row['seeds']} sets: {row['seed_min']:.3f} to {row['seed_max']:.3f}"
        difference, p = "–", "–"
        if row["difference"] is not None:
            ends = f"[{row['difference_low']:+.3f}, {row['difference_high']:+.3f}]"
            difference = f"{row['difference']:+.3f} {ends}"
            p = f"{row['p_holm']:.3f}" if row["p_holm"] >= 0.001 else "< .001"
        body.append([row["method"], value, difference, p, row["settings"]])
    return _table(("method", "value", "minus plain", "p (Holm)", "chosen on validation"), body)


def _between(text: str, what: str, body: str) -> str:
    begin, end = f"<!-- {what}: begin -->", f"<!-- {what}: end -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise InputError(f"the README needs the markers {begin} and {end} once each")
    pattern = re.compile(re.escape(begin) + ".*" + re.escape(end), re.DOTALL)
    return pattern.sub(lambda _: f"{begin}\n{body}\n{end}", text)


def tables(studies: Sequence[dict[str, Any]]) -> str:
    """All tables as Markdown, one row a seed and task."""
    heads = studies[0]["sparsity"][0]["heads"]
    parts = [
        "**What a profile is worth to the plain model** (test users; loss in nats per target "
        "token, 95 % intervals from resampled users)",
        _profiles(studies),
        "**How sparse PCS is** (discovery users; nats per target token). *Half* is the fewest "
        "heads that hold half of the positive score; *above* and *below* count the heads whose "
        f"95 % interval leaves 0 out; of {heads} inert heads, {heads * 0.025:.1f} would on each "
        "side.",
        _sparsity(studies),
        "**What DPS gains** (test users; heads from discovery users, K and γ chosen on validation "
        "users). *Random* is the mean of "
        f"{studies[0]['gain'][0]['draws']} head sets with as many heads in each layer and the same "
        "γ, which was not chosen for them, with the lowest and highest draw; p is "
        "Holm-adjusted over the tasks of a seed.",
        _gain(studies),
        _reading(studies),
    ]
    return "\n\n".join(parts)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _interval(row: dict[str, Any], name: str, spec: str = ".3f") -> str:
    return f"{row[name]:{spec}} [{row[name + '_low']:{spec}}, {row[name + '_high']:{spec}}]"


def _profiles(studies: Sequence[dict[str, Any]]) -> str:
    rows = []
    for study in studies:
        by_task: dict[str, dict[str, dict[str, Any]]] = {}
        for row in study["profiles"]:
            by_task.setdefault(row["task"], {})[row["profile"]] = row
        for task, cells in by_task.items():
            losses = [_interval(cells[name], "nll") for name in ("own", "none", "stranger")]
            costs = _interval(cells["none"], "cost", "+.3f")
            rows.append([str(study["seed"]), task, *losses, costs])
    return _table(("seed", "task", "own", "none", "a stranger's", "none - own, paired"), rows)


def _sparsity(studies: Sequence[dict[str, Any]]) -> str:
    rows = [
        [
            str(study["seed"]),
            row["group"],
            f"{row['nll']:.3f}",
            f"{row['top_head']} {row['top']:.3f}",
            f"{row['half']} of {row['heads']}",
            str(row["positive"]),
            str(row["negative"]),
        ]
        for study in studies
        for row in study["sparsity"]
    ]
    return _table(("seed", "task", "loss", "highest PCS", "half", "above 0", "below 0"), rows)


def _gain(studies: Sequence[dict[str, Any]]) -> str:
    rows = [
        [
            str(study["seed"]),
            f"{row['task']}, {row['metric']} ({'↑' if row['better'] == 'higher' else '↓'})",
            f"{row['k']}, {row['gamma']:g}",
            f"{row['plain']:.3f}",
            f"{row['dps']:.3f}",
            f"{row['random']:.3f} ({row['random_min']:.3f} to {row['random_max']:.3f})",
            _interval(row, "gain", "+.3f"),
            f"{row['p']:.3g}",
            f"{row['beaten']} of {row['draws']}",
        ]
        for study in studies
        for row in study["gain"]
    ]
    header = ("seed", "task, metric", "K, γ", "plain", "DPS", "random")
    return _table((*header, "DPS - plain", "p", "random sets beaten"), rows)


def better(row: dict[str, Any], name: str) -> bool:
    """Whether the interval of a difference lies wholly on the good side of 0."""
    if row["better"] == "higher":
        return bool(row[f"{name}_low"] > 0)
    return bool(row[f"{name}_high"] < 0)


def worse(row: dict[str, Any], name: str) -> bool:
    """Whether the interval of a difference lies wholly on the bad side of 0."""
    if row["better"] == "higher":
        return bool(row[f"{name}_high"] < 0)
    return bool(row[f"{name}_low"] > 0)


def _reading(studies: Sequence[dict[str, Any]]) -> str:
    rows = [(study["seed"], row) for study in studies for row in study["gain"]]

    def named(chosen: Sequence[tuple[int, dict[str, Any]]]) -> str:
        listed = ", ".join(f"seed {seed} {row['task']}" for seed, row in chosen)
        return f"{len(chosen)} of {len(rows)}" + (f" ({listed})" if listed else "")

    apart = [(s, r) for s, r in rows if better(r, "gain") or worse(r, "gain")]
    firm = [(s, r) for s, r in apart if r["p"] < 0.05]
    helped = [(s, r) for s, r in firm if better(r, "gain")]
    specific = [(s, r) for s, r in helped if r["beaten"] == r["draws"]]
    hurt = [(s, r) for s, r in firm if worse(r, "gain")]
    overlap = "; ".join(
        f"seed {study['seed']}: one user {study['overlap']['same']:.2f}, two users "
        f"{study['overlap']['others']:.2f} (difference {_interval(study['overlap'], 'gap')})"
        for study in studies
    )
    return (
        f"Read: the interval of DPS - plain leaves 0 out in {len(apart)} of {len(rows)} cases, "
        f"and p stays below .05 after Holm in {len(firm)}. Of those DPS is better than the plain "
        f"model in {named(helped)}, and there better than every random set too in "
        f"{named(specific)}; "
        f"it is worse than the plain model in {named(hurt)}. In all other cases no effect is "
        "shown.\n\n"
        f"Do users have heads of their own? Top-{studies[0]['overlap']['k'][0]} sets found from "
        f"half of the examples each overlap (Jaccard) by: {overlap}. Two random sets overlap by "
        f"{studies[0]['overlap']['chance']:.2f}. Both halves of a user stand behind the same "
        "profile, so the difference may be the profile's words as well as the preference."
    )
