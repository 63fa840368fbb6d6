"""`workbench bench`: what discovery and steering take on this machine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.cli import options as opt
from workbench.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping


def bench(
    model: Annotated[
        str | None, typer.Argument(help="A hub id or folder: adds a case on that model.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--json", help="Write the same to this file, as JSON.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One repeat, fewer examples.")] = False,
    case: Annotated[
        list[str] | None,
        typer.Option(help="Measure this case only; may be given again. All by default."),
    ] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="Times each is timed.")] = None,
    stored: Annotated[
        Path | None,
        typer.Option("--from", help="Show what --json wrote there, and measure nothing."),
    ] = None,
    readme: Annotated[
        Path | None,
        typer.Option(help="Put the tables into this file, between its bench markers."),
    ] = None,
    device: opt.Device = None,
    dtype: opt.Dtype = "float32",
    threads: opt.Threads = None,
) -> None:
    """Time ways of scoring heads beside the plain loop, and of steering beside plain decoding.

    Cases: the built-in model, a random Llama of GPT-2-small's size, one user's queries behind a
    shared profile, how time grows, memory at 2,048 tokens; steering of the Llama and of the
    built-in model. Nothing is downloaded for them. About 12 minutes on 2 cores, 3 with --quick.
    """
    import torch

    from workbench import runs
    from workbench.bench import run, tables
    from workbench.cli import show
    from workbench.discovery.room import keep_freed_memory
    from workbench.readme import with_bench

    if stored is not None:
        result = tables.read(stored)
    else:
        if threads is not None:
            torch.set_num_threads(threads)
        keep_freed_memory()  # as every command does that loads a model, for all methods alike
        sizes = run.QUICK if quick else run.FULL
        result = run.bench(
            model,
            chosen=case or (),
            sizes=replace(sizes, repeats=repeats or sizes.repeats),
            device=device,
            dtype=dtype,
            tell=show.step,
        )
    if out is not None:
        runs.write_text(out, json.dumps(result, indent=1, allow_nan=False) + "\n")
    if readme is not None:
        runs.write_text(readme, with_bench(_text(readme), result))
    _show(result)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None


def _show(result: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from workbench.bench.tables import tables

    out = Console(highlight=False)
    for found in tables(result):
        out.print(f"\n[bold]{escape(found.title)}[/bold]")
        shown = Table()
        for column, name in enumerate(found.header):
            shown.add_column(name, justify="right" if column else "left")
        for row in found.rows:
            shown.add_row(*map(escape, row))
        out.print(shown)
        if found.note:
            out.print(escape(found.note))
    out.print(f"\nMeasured in {result['seconds']:,.0f} s")
