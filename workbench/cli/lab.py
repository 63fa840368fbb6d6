"""`workbench lab`: JupyterLab on a copy of the notebooks."""

from __future__ import annotations

import getpass
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from workbench.lab.server import Copied


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

    if fresh:
        folder = server.unused(folder)
    copied = server.copy_notebooks(folder)
    started = server.start(folder, port, os.environ.get("JUPYTER_TOKEN", ""))
    typer.echo(_told(copied, folder))
    typer.echo(f"JupyterLab: {server.address(started)}")
    line = server.forwarding(os.environ, started.port, getpass.getuser())
    if line is not None:
        typer.echo(
            "This is a machine at the other end of ssh. On your own, run the line below (put\n"
            "the name you know this machine by after the @ if you came another way), then\n"
            f"open the address above.\n{line}"
        )
    elif browser or (browser is None and _screen()):
        started.open_browser = True
    typer.echo("Ctrl-C ends it.")
    sys.stdout.flush()  # who reads a pipe waits for the address
    server.serve(started)
    typer.echo(f"JupyterLab has ended. The notebooks are in {folder}")


def _told(copied: Copied, folder: Path) -> str:
    """What became of the notebooks, in a line."""
    kept = f"{len(copied.kept)} kept as they were" if copied.kept else ""
    new = f"{len(copied.new)} copied" if copied.new else ""
    return f"Notebooks in {folder}: " + ", ".join(filter(None, (new, kept)))


def _screen() -> bool:
    """Whether a browser would have a screen; on Linux one without takes over the terminal."""
    wanted = ("DISPLAY", "WAYLAND_DISPLAY")
    return not sys.platform.startswith("linux") or any(os.environ.get(name) for name in wanted)
