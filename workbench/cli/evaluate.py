"""`workbench evaluate`: methods × tasks with intervals, on users that nothing was chosen on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from workbench.cli import failures
from workbench.cli import options as opt
from workbench.cli.steer import ENTROPY
from workbench.errors import InputError

if TYPE_CHECKING:
    from workbench.steering.contrast import Strength

_DATA, _GRID, _RUN = "Data", "Grid", "Run"
ALL = "plain,no-profile,cad,dola,decore,random,dps,dps+cad"


def evaluate(
    model: opt.Model = "testbed",
    heads: Annotated[
        Path | None,
        typer.Option(help="Run folder of a score or probe on other users.", rich_help_panel=_GRID),
    ] = None,
    methods: Annotated[
        str, typer.Option(help="Rows of the table; plain is always there.", rich_help_panel=_GRID)
    ] = ALL,
    tasks: opt.Tasks = None,
    data: opt.Data = "testbed",
    root: opt.Root = None,
    split: Annotated[
        str | None,
        typer.Option(
            help="Split of the users that the table is about: test; dev of LaMP, whose test "
            "answers are not public.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    validation_split: Annotated[
        str | None,
        typer.Option(
            help="Split of the users that settings are chosen on: validation; val of LongLaMP, dev "
            "of LaMP. If it is the other split too, users are divided by a draw.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    users: Annotated[
        int | None,
        typer.Option(
            min=1, help="How many users the table is about; all if unset.", rich_help_panel=_DATA
        ),
    ] = None,
    validation_users: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="How many to choose settings on; all, or a fifth where a split is divided.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    same_examples: Annotated[
        bool,
        typer.Option(
            "--same-examples",
            help="Allow users and examples that heads were found on, and mark the table.",
            rich_help_panel=_DATA,
        ),
    ] = False,
    k: Annotated[
        str | None,
        typer.Option(
            "-k",
            help="Sizes of head sets to choose from; if unset 1,2,4,8, and of more than 200 heads "
            "0.5, 1, 2 and 4 %: 5,10,20,40 of 1,024.",
            rich_help_panel=_GRID,
        ),
    ] = None,
    gamma: Annotated[
        str,
        typer.Option(
            help="Strengths to choose from: numbers; entropy, the released code's; entropy-share, "
            "that as a share of its maximum.",
            rich_help_panel=_GRID,
        ),
    ] = "0.25,0.5,1,2",
    retrieval_heads: Annotated[
        Path | None,
        typer.Option(
            help="DeCoRe's heads: a head set or a published list of scores; detected if unset.",
            rich_help_panel=_GRID,
        ),
    ] = None,
    decide: Annotated[
        str,
        typer.Option(
            help="How tasks with labels are answered: generate, or likelihood.",
            rich_help_panel=_GRID,
        ),
    ] = "generate",
    prefill: Annotated[
        str,
        typer.Option(
            help="masked: the second view reads the prompt without the heads, too; shared: it "
            "starts from the intact prompt.",
            rich_help_panel=_GRID,
        ),
    ] = "masked",
    other_prompt: Annotated[
        bool,
        typer.Option(
            "--other-prompt",
            help="Allow heads that were found with other prompts: style, items, ranking or budget.",
            rich_help_panel=_GRID,
        ),
    ] = False,
    seeds: Annotated[int, typer.Option(min=1, help="Random head sets.", rich_help_panel=_GRID)] = 3,
    style: opt.Style = "plain",
    items: opt.Items = 5,
    ranking: opt.Ranking = None,
    max_prompt_tokens: opt.MaxPromptTokens = 2048,
    max_new_tokens: opt.MaxNewTokens = 32,
    device: opt.Device = None,
    dtype: opt.Dtype = "auto",
    revision: opt.Revision = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    threads: opt.Threads = None,
    batch_tokens: opt.BatchTokens = 16384,
    ray: opt.Ray = None,
    workers: opt.Workers = None,
    seed: opt.Seed = 0,
    out: opt.Out = None,
    as_json: opt.Json = False,
) -> None:
    """Compare methods on users that neither heads nor settings were chosen on."""
    from workbench import runs
    from workbench.data.prompts import PromptSettings
    from workbench.evaluation.findings import summarise
    from workbench.evaluation.grid import evaluate as run_grid
    from workbench.evaluation.protocol import ask
    from workbench.evaluation.settings import GridSettings, check_scores, read_retrieval
    from workbench.scores import HeadScores

    settings = GridSettings(
        methods=tuple(opt.names(methods) or ()),
        k=None if k is None else tuple(_numbers("-k", k, int)),
        gamma=_strengths(gamma),
        seeds=seeds,
        seed=seed,
        decide=cast(Any, decide),
        prefill=cast(Any, prefill),
        max_new_tokens=max_new_tokens,
        prompt=PromptSettings(
            cast(Any, style), items, cast(Any, ranking), max_prompt_tokens, max_new_tokens
        ),
        batch_tokens=batch_tokens,
        other_prompt=other_prompt,
    )
    scores = HeadScores.load(heads) if heads is not None else None
    asked = ask(
        data,
        scores,
        split=split,
        validation_split=validation_split,
        root=root,
        tasks=opt.names(tasks),
        users=users,
        validation_users=validation_users,
        same_examples=same_examples,
        seed=seed,
    )
    check_scores(settings, scores, list(dict.fromkeys(e.task for e in asked.test)))
    retrieval = read_retrieval(retrieval_heads) if retrieval_heads is not None else None
    folder = out or _beside(opt.run_folder(None, model, data))
    with failures.resumable(folder), opt.cluster(ray, workers) as joined:
        device, dtype = opt.beside_workers(joined, device, dtype)
        bridge = opt.open_model(model, device, dtype, revision, trust_remote_code, threads)
        evaluation = run_grid(
            bridge,
            asked,
            folder,
            settings,
            scores=scores,
            retrieval=retrieval,
            heads_from=str(heads),
            retrieval_from="" if retrieval_heads is None else retrieval_heads.name,
            ray=joined,
            progress=not as_json,
        )
        with runs.hold(folder):
            found = summarise(evaluation)
    if as_json:
        typer.echo(json.dumps({"run": str(folder), **found}, indent=1))
    else:
        show(found, folder)


def _beside(folder: Path) -> Path:
    """A run of scores goes by the same model and data."""
    return folder.with_name(f"{folder.name}-evaluation")


def _numbers(option: str, text: str, kind: type) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{option}: wanted numbers like 1,2,4, got {text!r}") from None


def _strengths(text: str) -> tuple[Strength, ...]:
    from workbench.steering.contrast import Entropy

    try:
        return tuple(
            Entropy(normalised=ENTROPY[word]) if word in ENTROPY else float(word)
            for word in (part.strip() for part in text.split(","))
        )
    except ValueError:
        raise InputError(
            f"--gamma: wanted numbers like 0.5,1, or {' or '.join(ENTROPY)}, got {text!r}"
        ) from None


# What is printed, in 80 columns


def show(found: Mapping[str, Any], folder: Path) -> None:
    """A table a task, what it rests on, and the findings in words."""
    from rich.console import Console
    from rich.markup import escape

    from workbench.evaluation.summary import TABLE

    out = Console(highlight=False)
    for task in dict.fromkeys(row["task"] for row in found["rows"]):
        rows = [row for row in found["rows"] if row["task"] == task]
        _primary(out, task, [row for row in rows if row["primary"]])
        _others(out, [row for row in rows if not row["primary"]])
        _qualities(out, [row for row in found["qualities"] if row["task"] == task])
    out.print("\n[bold]Findings[/bold]")
    for line in found["findings"]:
        out.print(f"- {escape(line)}")
    out.print("\n[bold]How to read this[/bold]")
    for line in (*found["protocol"], _LEGEND):
        out.print(f"- {escape(line)}")
    out.print(f"Table: {escape(str(folder / TABLE))}", soft_wrap=True)


def _table(columns: Sequence[str]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, collapse_padding=True, pad_edge=False)
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i == 0 else "right")
    return table


def _number(value: float | None, sign: str = "") -> str:
    return "–" if value is None else f"{value:{sign}.3f}"


def _with_ends(row: Mapping[str, Any], name: str, low: str, high: str, sign: str = "") -> str:
    if row[name] is None or row[low] is None:
        return _number(row[name], sign)
    return f"{row[name]:{sign}.3f} [{row[low]:{sign}.3f}, {row[high]:{sign}.3f}]"


def _primary(out: Any, task: str, rows: Sequence[Mapping[str, Any]]) -> None:
    from rich.markup import escape

    from workbench.evaluation.findings import p_in_words

    whole = next((row for row in rows if row["examples"]), rows[0])
    reading = f", {whole['reading']} reading" if whole["reading"] else ""
    out.print(
        f"\n[bold]{escape(task)}[/bold]: {whole['metric']} ({whole['better']} is better){reading}; "
        f"{whole['examples']} examples of {whole['users']} users"
    )
    mark = " †" if whole["leaked"] else ""
    table = _table(("method", "value [95 %]", "minus plain [95 %]", "p"))
    for row in rows:
        value = _with_ends(row, "value", "low", "high")
        difference = _with_ends(row, "difference", "difference_low", "difference_high", "+")
        p = p_in_words(row["p_holm"])
        table.add_row(row["method"] + mark, value, difference, p)
    out.print(table)
    chosen = [f"{row['method']} {row['settings']}" for row in rows if row["settings"]]
    if chosen:
        out.print(f"Chosen: {'; '.join(chosen)}")
    for row in rows:
        if row["note"]:
            out.print(f"{row['method']}: no answers: {escape(row['note'])}")
        if row["seed_min"] is not None and row["seeds"] > 1:
            ends = f"{row['seed_min']:.3f} to {row['seed_max']:.3f}"
            out.print(f"{row['method']}: mean of {row['seeds']} seeds, which lie at {ends}")
    if mark:
        out.print("† LEAKED: heads were found on some of these examples or users")


def _others(out: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    columns = dict.fromkeys((row["metric"], row["reading"]) for row in rows)
    if not columns:
        return
    heads = [metric if reading is None else f"{metric}, {reading}" for metric, reading in columns]
    out.print()
    table = _table(("method", *heads))
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = {(row["metric"], row["reading"]): row for row in rows if row["method"] == method}
        values = [_with_ends(cells[column], "value", "low", "high") for column in columns]
        table.add_row(method, *values)
    out.print(table)


_QUALITIES = {
    "distinct_1": "dist-1",
    "distinct_2": "dist-2",
    "repetition": "repeat",
    "logprob": "log p",
    "kl": "KL",
    "unreadable": "unread",
    "unreadable_lenient": "lenient",
    "finished": "finish",
}


_LEGEND = (
    "dist-1, dist-2: distinct words and pairs among all; repeat: four words in a row that stood in "
    "the answer before; log p: under the plain model, nats a token; KL: from it, nats a step; "
    "unread, lenient: answers that are no label, by each reading; finish: ended before the limit."
)


def _qualities(out: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    names = [name for name in _QUALITIES if any(row[name] is not None for row in rows)]
    out.print()
    table = _table(("method", *(_QUALITIES[name] for name in names)))
    for row in rows:
        table.add_row(row["method"], *(_number(row[name]) for name in names))
    out.print(table)
