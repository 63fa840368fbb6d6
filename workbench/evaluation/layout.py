"""The rows of an evaluation laid out as the paper's tables 1, 2 and 3, its numbers beside ours.

Table 1 holds the tasks that are answered with a text, table 2 classification and rating; a row a
model, task, method and reading. Table 3 is counted from the models' shapes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from workbench.data.tasks import TASKS, get_task
from workbench.discovery.shapes import Shape
from workbench.errors import InputError
from workbench.evaluation import operations, published
from workbench.evaluation.findings import LEVEL, MACRO_F1, about_heads, about_users
from workbench.evaluation.finished import Run, adjusted, check_apart, several_in_words
from workbench.evaluation.sheet import NOTHING, Sheet, with_interval
from workbench.heads import Head

PROMPTS, NEW_TOKENS = tuple(published.OPERATIONS), published.NEW_TOKENS
QUERY = 64  # tokens of a prompt without profile, where no run says
_UNITS = ((1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"))
COST_TITLE = "Table 3. Operations of one generation"
BETTER, WORSE, LEAKED = "▲", "▼", "†"
_SHORT = {
    "accuracy": "accuracy",
    "macro F1": "macro F1",
    "mean absolute error": "MAE",
    "root mean square error": "RMSE",
    "ROUGE-1": "R-1",
    "ROUGE-L": "R-L",
    "style match": "style match",
}
_ORDER = ("accuracy", "macro F1", "MAE", "RMSE", "R-1", "R-L", "METEOR", "style match")
_KINDS = {
    "generation": ("table-1", "Table 1. Generation"),
    "classification": ("table-2", "Table 2. Classification"),
    "rating": ("table-2", "Table 2. Rating"),
}
_METHODS = {**published.METHODS, "random": "random heads", "dps+cad": "DPS + CAD"}
_WAYS = {
    operations.PLAIN: ("plain", "plain"),
    operations.SHARED: ("DPS, shared prefill", "dps"),
    operations.SHARED + operations.ONCE: ("DPS, shared prefill, lower blocks once", ""),
    operations.MASKED: ("DPS, masked prefill", ""),
    operations.MASKED + operations.ONCE: ("DPS, masked prefill, lower blocks once", ""),
    operations.CAD: ("CAD", ""),
}


def short(label: str) -> str:
    """A metric's name in a table's head; METEOR's label says which stages it has."""
    return "METEOR" if label.startswith("METEOR") else _SHORT.get(label, label)


def score_sheets(given: Sequence[Run]) -> list[Sheet]:
    """Tables 1 and 2 of several runs together; a table without rows is left out.

    Raises:
        InputError: Two runs have a number for the same cell.
    """
    check_apart(given)
    given, sheets = adjusted(given), []
    for kind, (name, title) in _KINDS.items():
        rows = [(run, row) for run in given for row in run.rows if _kind(row) == kind]
        if rows:
            sheets.append(_scores(name, title, rows, several_in_words(given)))
    return sheets


def _kind(row: Mapping[str, Any]) -> str:
    return get_task(row["task"]).kind


def _paper(run: Run, row: Mapping[str, Any]) -> float | None:
    """The paper's number for a cell; it reads predictions as they come, which is strictly."""
    if row["reading"] not in (None, "strict"):
        return None
    return published.published(run.model, row["method"], row["task"], short(row["metric"]))


def _mark(row: Mapping[str, Any]) -> str:
    """Whether a method differs from plain after Holm, and to which side."""
    p, low, high = row["p_holm"], row["difference_low"], row["difference_high"]
    if p is None or p >= LEVEL or low is None or low <= 0 <= high:
        return ""
    return BETTER if (low > 0) == (row["better"] == "higher") else WORSE


def _scores(
    name: str, title: str, rows: Sequence[tuple[Run, Mapping[str, Any]]], several: str
) -> Sheet:
    found = {short(row["metric"]) for _, row in rows}
    metrics = [m for m in _ORDER if m in found] + sorted(found - set(_ORDER))
    beside = {m for m in metrics for r, row in rows if short(row["metric"]) == m and _paper(r, row)}
    readings = any(row["reading"] for _, row in rows)
    header = ["model", "task", "method", *(["reading"] if readings else [])]
    words = len(header)
    for metric in metrics:
        header += [metric, *(["paper"] if metric in beside else [])]
    lines = []
    for cells in _lines(rows):
        run, first = cells[0]
        by_metric = {short(row["metric"]): row for _, row in cells}
        leaked = LEAKED if any(row["leaked"] for _, row in cells) else ""
        line = [run.model, first["task"], _METHODS.get(first["method"], first["method"]) + leaked]
        line += [first["reading"] or NOTHING] if readings else []
        for metric in metrics:
            row = by_metric.get(metric)
            line.append(NOTHING if row is None else _cell(row))
            if metric in beside:
                value = None if row is None else _paper(run, row)
                line.append(NOTHING if value is None else f"{value:.4f}")
        lines.append([*line, str(first["examples"]), str(first["users"])])
    return Sheet(
        name,
        title,
        [*header, "n", "users"],
        lines,
        _note(rows, bool(beside), several),
        [_record(title, run, row) for run, row in rows],
        words,
    )


def _lines(
    rows: Sequence[tuple[Run, Mapping[str, Any]]],
) -> Iterator[list[tuple[Run, Mapping[str, Any]]]]:
    """The cells of each line: by model and task, methods and readings as the run has them."""
    lines: dict[tuple[Any, ...], list[tuple[Run, Mapping[str, Any]]]] = {}
    models = list(dict.fromkeys(run.model for run, _ in rows))
    tasks = list(TASKS)
    for run, row in rows:
        place = (models.index(run.model), tasks.index(row["task"]))
        lines.setdefault((place, row["reading"], row["method"]), []).append((run, row))
    yield from (cells for _, cells in sorted(lines.items(), key=lambda item: item[0][0]))


def _cell(row: Mapping[str, Any]) -> str:
    text = with_interval(row["value"], row["low"], row["high"])
    return f"{text} {mark}" if (mark := _mark(row)) else text


def _record(title: str, run: Run, row: Mapping[str, Any]) -> dict[str, Any]:
    verdict = {BETTER: "better", WORSE: "worse", "": ""}[_mark(row)]
    return {"table": title, "model": run.model, **row, "holm": verdict, "paper": _paper(run, row)}


def _note(rows: Sequence[tuple[Run, Mapping[str, Any]]], beside: bool, several: str) -> str:
    """What a reader has to know beside tables 1 and 2."""
    parts = [
        f"In brackets 95 % intervals over users; {BETTER} better and {WORSE} worse than plain, "
        "paired over users, p after Holm < .05 and the difference's interval without 0. Tested: "
        f"{_tested(row for _, row in rows)}.",
        several,
    ]
    if any(row["metric"] == "macro F1" for _, row in rows):
        parts.append(f"In {MACRO_F1}")
    for run in {str(run.folder): run for run, _ in rows}.values():
        tasks = dict.fromkeys(row["task"] for other, row in rows if other is run)
        parts += [_protocol(run, list(tasks)), published.family_note(run.model) if beside else ""]
        parts += [*about_users(run.manifest), *about_heads(run.manifest, run.folder)]
    if any(row["leaked"] for _, row in rows):
        parts.append(f"{LEAKED} Heads were found on some of these examples or on their users.")
    if len({row["metric"] for _, row in rows if short(row["metric"]) == "METEOR"}) > 1:
        parts.append("METEOR is with WordNet in some runs and without it in others.")
    elif variant := next((r["metric"] for _, r in rows if short(r["metric"]) == "METEOR"), ""):
        parts.append("" if variant == "METEOR" else f"{variant}: without WordNet's synonyms.")
    remarks = (f"{row['task']}, {row['method']}: {row['note']}." for _, row in rows if row["note"])
    told = dict.fromkeys(filter(None, parts))  # two runs of a model say some things alike
    return " ".join([*told, *dict.fromkeys(remarks), *([published.NOTE] * beside)])


def _tested(rows: Iterable[Mapping[str, Any]]) -> str:
    """The metric and reading of each task that p is of."""
    found = {
        row["task"]: " ".join(filter(None, (short(row["metric"]), row["reading"])))
        for row in rows
        if row["primary"]
    }
    return ", ".join(f"{task} {metric}" for task, metric in found.items()) or "none"


def _protocol(run: Run, tasks: Sequence[str]) -> str:
    """On whom settings were chosen, which, and who was asked."""
    settings, users = run.manifest["settings"], run.manifest["users"]
    splits = settings["splits"]
    text = (
        f"{run.model}: settings chosen on {users['validation']} users of {splits['validation']}, "
        f"answers to {users['test']} users of {splits['test']}"
    )
    if "random" in settings["methods"]:
        text += f"; random heads: {settings['seeds']} draws"
    chosen = [f"{task}: {words}" for task in tasks if (words := _chosen(run, task))]
    return f"{text}. Chosen: {'; '.join(chosen)}." if chosen else f"{text}."


def _chosen(run: Run, task: str) -> str:
    """The settings of a task's methods, as `DPS K 4, γ 0.5`."""
    parts = []
    for method, record in run.choices.get(task, {}).items():
        name = _METHODS.get(method, method)
        words = [str(one.get("words", "")) for one in record.get("seeds", [record])]
        if any(words):
            parts.append(f"{name} {' / '.join(dict.fromkeys(words))}")
    return ", ".join(parts)


# Table 3


def lowest_block(run: Run) -> int | None:
    """The block of the lowest head that DPS was given; None where the run chose none."""
    heads = [
        Head.parse(name).layer
        for chosen in run.choices.values()
        for name in chosen.get("dps", {}).get("heads", [])
    ]
    return min(heads, default=None)


def cost_sheet(
    models: Mapping[str, tuple[Shape, int | None]],
    prompts: Sequence[int] | None = None,
    query: int | Mapping[str, int] = QUERY,
) -> Sheet:
    """Table 3: estimated operations of one generation.

    Args:
        models: Name -> its shape, and the block of the lowest gated head if that is known.
        prompts: Tokens of the prompt; the paper's if None, and shorter ones where none of those
            fits.
        query: Tokens of CAD's prompt without the profile, of every model or by name; `QUERY` of
            one that isn't named.

    Raises:
        InputError: No prompt has room for the new tokens in a model's context.
    """
    beside = any(published.family(model) == published.LLAMA for model in models)
    found, remarks, queries = [], [], dict[str, int]()
    for model, (shape, lowest) in models.items():
        fitting = _fitting(model, shape, prompts)
        if max(fitting) < max(prompts or PROMPTS):
            remarks.append(f"Longer prompts don't fit into the {shape.context} tokens of {model}.")
        if lowest is not None:
            remarks.append(f"The lowest head of {model} is in block {lowest} of {shape.layers}.")
        queries[model] = query if isinstance(query, int) else query.get(model, QUERY)
        costs = operations.costs(shape, fitting, NEW_TOKENS, lowest=lowest, query=queries[model])
        found += [(model, cost) for cost in costs]
    most = max(cost.operations for _, cost in found)
    unit = next((u for u in _UNITS if beside or most >= u[0]), _UNITS[-1])
    header = ["model", "prompt", "method", unit[1], "× plain"]
    header += ["paper, TFLOP", "paper, × plain"] if beside else []
    note = (
        f"Matrix products of one generation of {NEW_TOKENS} tokens, every query with every key, "
        f"logits at one position a pass; CAD's second prompt is taken to have {_queries(queries)} "
        "tokens. Shared prefill starts the second view from the prompt's cache and runs the "
        "prompt's last token and the new ones again; lower blocks once: those below the "
        "lowest head run for both views."
    )
    if beside:
        note += " The paper doesn't say how it counts: compare its ratios, not its TFLOP."
    lines = [_cost_line(model, cost, unit[0], beside) for model, cost in found]
    records = [
        {"table": COST_TITLE, "model": m, **vars(cost), "paper_tflop": _paper_cost(m, cost)}
        for m, cost in found
    ]
    return Sheet("table-3", COST_TITLE, header, lines, " ".join([note, *remarks]), records, 3)


def _queries(found: Mapping[str, int]) -> str:
    """The tokens of CAD's second prompt, with the models' names where they differ."""
    if len(set(found.values())) == 1:
        return str(next(iter(found.values())))
    return ", ".join(f"{tokens} ({model})" for model, tokens in found.items())


def _fitting(model: str, shape: Shape, prompts: Sequence[int] | None) -> list[int]:
    """The prompts that leave room for the new tokens."""
    wanted = PROMPTS if prompts is None else prompts
    room = max(wanted) if shape.context is None else shape.context - NEW_TOKENS
    fitting = [prompt for prompt in wanted if prompt <= room]
    if prompts is None and not fitting:  # a small model's: the longest powers of two
        fitting = [2**i for i in range(room.bit_length()) if 2**i <= room][-3:] if room > 0 else []
    if not fitting:
        raise InputError(
            f"{model}: none of the prompts of {', '.join(map(str, wanted))} tokens leaves room for "
            f"{NEW_TOKENS} more in a context of {shape.context}; give shorter --prompts"
        )
    return fitting


def _paper_cost(model: str, cost: operations.Cost) -> float | None:
    if published.family(model) != published.LLAMA:
        return None
    return published.OPERATIONS.get(cost.prompt, {}).get(_WAYS[cost.way][1])


def _cost_line(model: str, cost: operations.Cost, unit: float, beside: bool) -> list[str]:
    line = [model, str(cost.prompt), _WAYS[cost.way][0]]
    line += [f"{cost.operations / unit:.2f}", f"{cost.ratio:.2f}"]
    if beside:
        paper = _paper_cost(model, cost)
        if paper is None:
            line += [NOTHING, NOTHING]
        else:
            line += [f"{paper:.2f}", f"{paper / published.OPERATIONS[cost.prompt]['plain']:.2f}"]
    return line


# The paper alone


def published_sheets() -> list[Sheet]:
    """The paper's tables 1 to 3 as they are printed, from `published.py`."""
    sheets = []
    for kind, (name, title) in _KINDS.items():
        tasks = [task for task in published.TASKS if get_task(task).kind == kind]
        cells = [(task, metric) for task in tasks for metric in published.TASKS[task]]
        found = [cell for cell in published.NUMBERS.values() if cell.task in tasks]
        lines = [
            [model, published.METHODS[method]]
            + [f"{published.NUMBERS[model, method, *cell].value:.4f}" for cell in cells]
            for model, method in dict.fromkeys((cell.model, cell.method) for cell in found)
        ]
        header = ("model", "method", *(f"{task} {metric}" for task, metric in cells))
        records = [vars(cell) for cell in found]
        sheets.append(Sheet(name, f"{title}, the paper's", header, lines, "", records, 2))
    rows = [
        {"prompt": prompt, **tflop, "ratio": tflop["dps"] / tflop["plain"]}
        for prompt, tflop in published.OPERATIONS.items()
    ]
    lines = [
        [str(row["prompt"]), *(f"{row[name]:.2f}" for name in ("plain", "dps", "ratio"))]
        for row in rows
    ]
    title = f"{COST_TITLE}, the paper's ({published.LLAMA})"
    header = ("prompt", "plain, TFLOP", "DPS, TFLOP", "× plain")
    return [*sheets, Sheet("table-3", title, header, lines, published.NOTE, rows)]
