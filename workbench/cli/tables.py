"""`workbench tables`: the paper's tables 1, 2 and 3 from finished evaluations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from workbench.cli import options as opt
from workbench.errors import InputError

if TYPE_CHECKING:
    from workbench.discovery.shapes import Shape
    from workbench.evaluation.finished import Run
    from workbench.evaluation.sheet import Sheet

_COUNT = "Table 3"


def tables(
    run: Annotated[
        list[Path] | None,
        typer.Argument(help="Folders of finished evaluations, one a model or task."),
    ] = None,
    published: Annotated[
        bool, typer.Option("--published", help="The paper's own tables, and nothing else.")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(
            help="Read the shape from this model's config: folder, hub id or `testbed`.",
            rich_help_panel=_COUNT,
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(help="Tokens of the prompts; 512,1024,2048 if unset.", rich_help_panel=_COUNT),
    ] = None,
    query_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens of a prompt without profile, for CAD; if unset their mean in the run, "
            "and 64 if it doesn't say.",
            rich_help_panel=_COUNT,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the files; RUN/tables for a single run.")
    ] = None,
    as_json: opt.Json = False,
) -> None:
    """The paper's tables 1, 2 and 3 beside its numbers: Markdown, LaTeX and CSV."""
    from workbench.evaluation import finished, layout, sheet

    notes: list[str] = []
    if published:
        if run:
            raise InputError("--published prints the paper's tables; leave the run folders out")
        sheets = layout.published_sheets()
    elif not run:
        raise InputError("name the folder of a finished `workbench evaluate`, or --published")
    else:
        if out is None and len(run) > 1:
            raise InputError(f"{len(run)} runs in one table: name a folder for it with --out")
        out = out or run[0] / "tables"
        given = [finished.load_run(folder) for folder in run]
        sheets = layout.score_sheets(given)
        shapes, notes = _shapes(given, model)
        if shapes:
            queries = query_tokens or finished.query_tokens(given)
            sheets.append(layout.cost_sheet(shapes, _numbers(prompts), queries))
    written = sheet.write(sheets, out) if out is not None else []
    _show(sheets, written, notes, as_json)


def _show(
    sheets: Sequence[Sheet], written: Sequence[Path], notes: Sequence[str], as_json: bool
) -> None:
    if as_json:
        parts = [{"title": one.title, "note": one.note, "rows": one.records} for one in sheets]
        found = {"tables": parts, "written": [str(path) for path in written], "notes": notes}
        typer.echo(json.dumps(found, indent=1))
        return
    typer.echo("\n\n".join(one.markdown() for one in sheets))
    if written:
        names = ", ".join(path.name for path in written)
        typer.echo(f"\n{written[0].parent}: {names}")
    for note in notes:
        typer.echo(note, err=True)


def _shapes(
    given: Sequence[Run], model: str | None
) -> tuple[dict[str, tuple[Shape, int | None]], list[str]]:
    """The shape of every model that has one, with DPS's lowest head; what is missing, in words."""
    from workbench.evaluation.layout import lowest_block
    from workbench.evaluation.operations import shape_from

    if model is not None and len({one.model for one in given}) > 1:
        raise InputError("--model gives one model's shape, and the runs are of several")
    named = None if model is None else _read_shape(model)
    found: dict[str, tuple[Shape, int | None]] = {}
    notes = []
    for one in given:
        described = one.manifest.get("shape")
        shape = named or (None if described is None else shape_from(described))
        if shape is None:
            notes.append(
                f"table 3 needs the shape of {one.model}, which {one.folder} doesn't hold; name "
                "the model with --model"
            )
            continue
        heads = one.manifest["settings"]["heads_per_layer"]
        if list(shape.heads) != heads:
            raise InputError(
                f"{one.folder} is of a model with {sum(heads)} heads in {len(heads)} layers, and "
                f"the shape has {sum(shape.heads)} in {shape.layers}; name its own model with "
                "--model"
            )
        lowest = [
            value
            for value in (lowest_block(one), found.get(one.model, (0, None))[1])
            if value is not None
        ]
        found[one.model] = shape, min(lowest, default=None)
    return found, notes


def _read_shape(model: str) -> Shape:
    from workbench.data.testbed import located
    from workbench.discovery.shapes import read_config, shape_of

    return shape_of(read_config(located(model)))


def _numbers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--prompts: wanted numbers like 512,1024, got {text!r}") from None
