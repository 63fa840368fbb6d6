"""`workbench lab`: JupyterLab on a copy of the notebooks."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from workbench.lab.server import Copied

OVER_SSH = (
    "You came by ssh: run this on your own machine, then open the address there.\n"
    "(If you reach this machine by another name, put that behind the @.)"
)


def lab(
    folder: Annotated[
        Path, typer.Argument(help="Where the notebooks are copied; what is there is kept.")
    ] = Path("workbench-notebooks"),
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port; 8888 or a free one if unset.")
    ] = None,
    browser: Annotated[
        bool | None,
        typer.Option(
            "--browser/--no-browser",
            help="Open it; done where there is a screen if unset, and never over ssh.",
        ),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="New copies, in FOLDER-2 or the next that is unused.")
    ] = False,
) -> None:
    """Open JupyterLab on a copy of the notebooks, for this machine only; Ctrl-C ends it.

    JUPYTER_TOKEN gives the token; it is a new random one otherwise.
    """
    from workbench.lab import server

    server.check(port)
    if fresh:
        folder = server.unused(folder)
    copied = server.copy_notebooks(folder)
    prepared = server.prepare(folder, port, os.environ.get("JUPYTER_TOKEN", ""))
    forward = server.forwarding(os.environ, prepared.port)
    if forward is None and (browser or (browser is None and _screen())):
        prepared.open_browser = True

    def ready() -> None:
        for line in _told(copied, folder):
            typer.echo(line)
        typer.echo(f"JupyterLab, for this machine only:\n{server.address(prepared)}")
        if forward is not None:
            typer.echo(f"{OVER_SSH}\n{forward}")
        typer.echo("Ctrl-C ends it.")
        sys.stdout.flush()  # who reads a pipe waits for the address

    server.serve(prepared, ready)
    typer.echo(f"JupyterLab has ended. The notebooks are in {folder}")


def _told(copied: Copied, folder: Path) -> list[str]:
    """What became of the notebooks."""
    counts = {"copied": len(copied.new), "there already and kept as they are": len(copied.kept)}
    done = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    lines = [f"Notebooks in {folder}: {done}"]
    if copied.kept:
        lines.append("(--fresh copies them anew, into another folder)")
    return lines


def _screen() -> bool:
    """Whether a browser would have a screen; on Linux one without takes over the terminal."""
    wanted = ("DISPLAY", "WAYLAND_DISPLAY")
    return not sys.platform.startswith("linux") or any(os.environ.get(name) for name in wanted)
