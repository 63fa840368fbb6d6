"""`workbench judge`: pairs of answers out, judgements in, table 4."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from workbench.cli import options as opt
from workbench.errors import InputError

if TYPE_CHECKING:
    from workbench.evaluation.judge import Key
    from workbench.evaluation.results import Evaluation

_OUT, _IN, _ASK = "Pairs out", "Judgements in", "A model as the judge"


def judge(
    run: Annotated[Path, typer.Argument(help="Folder of an evaluation.")],
    more: Annotated[
        list[Path] | None, typer.Argument(help="More files of annotations, with --import.")
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Two methods as cad,dps. The first is the one whose wins are counted; the key's "
            "first if unset."
        ),
    ] = None,
    export: Annotated[
        Path | None,
        typer.Option(help="Write pairs here, and their key beside them.", rich_help_panel=_OUT),
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="Only this task; repeatable.", rich_help_panel=_OUT)
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="At most so many examples a task.", rich_help_panel=_OUT),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Of examples, order and sides.", rich_help_panel=_OUT)
    ] = 0,
    show_target: Annotated[
        bool, typer.Option("--show-target", help="Show the user's answer.", rich_help_panel=_OUT)
    ] = False,
    annotations: Annotated[
        list[Path] | None,
        typer.Option(
            "--import", help="Annotations, JSON lines or CSV; repeatable.", rich_help_panel=_IN
        ),
    ] = None,
    pairs: Annotated[
        Path | None, typer.Option(help="The exported pairs.", rich_help_panel=_IN)
    ] = None,
    key: Annotated[
        Path | None, typer.Option(help="Their key; beside them if unset.", rich_help_panel=_IN)
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(help="Server that speaks OpenAI's chat protocol.", rich_help_panel=_ASK),
    ] = None,
    judge_model: Annotated[
        str | None, typer.Option(help="The model's name there.", rich_help_panel=_ASK)
    ] = None,
    api_key_env: Annotated[
        str | None, typer.Option(help="Variable that holds the key.", rich_help_panel=_ASK)
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=1, help="Seconds for one reply.", rich_help_panel=_ASK)
    ] = 120.0,
    max_reply_tokens: Annotated[
        int,
        typer.Option(
            min=1, help="Of one reply; a judge that reasons needs many.", rich_help_panel=_ASK
        ),
    ] = 1024,
    answers: Annotated[
        Path | None,
        typer.Option(help="File of its answers; beside the pairs if unset.", rich_help_panel=_ASK),
    ] = None,
    as_json: opt.Json = False,
) -> None:
    """Pairs with the methods hidden, and who won (the paper's table 4)."""
    from workbench.evaluation import judge as judging
    from workbench.evaluation.results import load_evaluation

    modes = [name for name, value in _modes(export, annotations, endpoint).items() if value]
    if len(modes) != 1:
        raise InputError(f"wanted one of --export, --import and --endpoint, got {modes or 'none'}")
    if more and not annotations:
        raise InputError(f"{more[0]}: files after the run are for --import")
    evaluation = load_evaluation(run)
    if export is not None:
        _export(evaluation, methods, export, task or [], limit, seed, show_target, as_json)
        return
    if pairs is None:
        raise InputError("name the exported pairs with --pairs")
    found = judging.load_key(key or judging.key_path(pairs), pairs)
    judging.check_run(found, evaluation)
    files = [*(annotations or []), *(more or [])]
    if endpoint is not None:
        files = [
            _ask(
                pairs,
                found,
                endpoint,
                judge_model,
                api_key_env,
                timeout,
                max_reply_tokens,
                answers,
                as_json,
            )
        ]
    _table(evaluation, found, methods, files, as_json)


def _modes(
    export: Path | None, annotations: list[Path] | None, endpoint: str | None
) -> dict[str, object]:
    return {"--export": export, "--import": annotations, "--endpoint": endpoint}


def _export(
    evaluation: Evaluation,
    methods: str | None,
    path: Path,
    tasks: list[str],
    limit: int | None,
    seed: int,
    show_target: bool,
    as_json: bool,
) -> None:
    from workbench.evaluation.judge import draw, write_pairs

    text, key = draw(
        evaluation,
        (methods or "").split(",") if methods else [],
        tasks=tasks,
        limit=limit,
        seed=seed,
        show_target=show_target,
    )
    where = write_pairs(text, key, path)
    if as_json:
        counts = {"pairs": len(key.pairs), "ties": len(key.ties)}
        typer.echo(json.dumps({"written": [str(path), str(where)], **counts}, indent=1))
        return
    typer.echo(
        f"{len(key.pairs)} pairs: {path}\n{len(key.ties)} more have equal answers: they are left "
        f"out and count as ties\nkey: {where} (names the methods: not for the annotators)"
    )


def _ask(
    pairs: Path,
    key: Key,
    url: str,
    model: str | None,
    variable: str | None,
    timeout: float,
    reply_tokens: int,
    out: Path | None,
    quiet: bool,
) -> Path:
    """Have an endpoint judge all pairs; the file of its answers."""
    from workbench.evaluation import endpoint as asking

    if not model:
        raise InputError("--endpoint needs --judge-model, the model's name there")
    to = asking.Endpoint(url, model, asking.read_key(variable), timeout, reply_tokens=reply_tokens)
    name = re.sub(r"[^\w.-]+", "-", model)
    out = out or pairs.with_name(f"{pairs.stem}.{name}.jsonl")
    try:
        asking.judge(pairs, key.sha256, to, out, progress=not quiet)
    except KeyboardInterrupt:
        typer.echo(f"\nstopped; answers are kept in {out}. Run the same command again", err=True)
        raise typer.Exit(130) from None
    return out


def _table(
    evaluation: Evaluation, key: Key, methods: str | None, files: list[Path], as_json: bool
) -> None:
    from workbench.evaluation import annotations, pairwise, sheet

    names = methods.split(",") if methods else list(key.methods)
    said = annotations.read_annotations(files, key)
    sheets = pairwise.sheets(key, said, names)
    written = sheet.write(sheets, evaluation.folder / "tables")
    if as_json:
        parts = [{"title": one.title, "rows": one.records, "note": one.note} for one in sheets]
        text = {"tables": parts, "written": [str(path) for path in written]}
        typer.echo(json.dumps(text, indent=1))
        return
    typer.echo("\n\n".join(one.markdown() for one in sheets))
    typer.echo(f"\n{written[0].parent}: {', '.join(path.name for path in written)}")
