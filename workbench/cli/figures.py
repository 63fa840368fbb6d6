"""`workbench figures`: a run's figures again, two runs side by side, the authors' files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from workbench.cli import options as opt
from workbench.errors import InputError


def figures(
    run: Annotated[
        list[Path] | None,
        typer.Argument(help="Run folders, of `probe` or `score`; a second one is compared."),
    ] = None,
    official: Annotated[
        Path | None,
        typer.Option(help="Folder of the authors' published score files: figure 7 and its table."),
    ] = None,
    export_official: Annotated[
        Path | None,
        typer.Option(help="Write the runs' scores there in the format of the authors' files."),
    ] = None,
    paper: Annotated[
        bool, typer.Option("--paper", help="Also figures 3 to 8 in the paper's format.")
    ] = False,
    k: Annotated[int, typer.Option("-k", help="Size of the sets of runs of `score`.")] = 8,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of a comparison or of the authors' files' figures."),
    ] = None,
    as_json: opt.Json = False,
) -> None:
    """Draw a run's figures and its report again: HTML, PNG, SVG and CSV."""
    from workbench.cli import pictures

    folders = run or []
    if (paper or export_official) and not folders:
        raise InputError("--paper and --export-official are about a run; name its folder")
    if not folders and official is None:
        raise InputError("name a run folder, or --official FOLDER with the authors' score files")
    done = [pictures.of_run(folder, k, paper) for folder in folders]
    compared: tuple[str, ...] = ()
    if len(folders) > 1:
        done.append(pictures.of_two(folders, k, out or folders[0] / "compared"))
        compared = done[-1].lines
    if export_official is not None:
        done += [pictures.as_official(folder, export_official, k) for folder in folders]
    if official is not None:
        done.append(pictures.of_official(official, out or Path("runs/official")))
    if as_json:
        found = {
            "written": sorted({str(path) for one in done for path in one.paths}),
            "lines": {str(one.folder): list(one.lines) for one in done if one.lines},
            "compared": list(compared),
            "note": " ".join(note for one in done for note in one.notes),
        }
        typer.echo(json.dumps(found, indent=1))
        return
    for one in done:
        for line in one.lines:
            typer.echo(line)
        typer.echo(f"{len(one.paths)} files in {one.folder}")
        for note in one.notes:
            typer.echo(note, err=True)
