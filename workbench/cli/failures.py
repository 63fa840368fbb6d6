"""How a command ends that can't go on: in a message, and with what is finished kept."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from workbench import runs
from workbench.discovery.cluster import GPU_FAILURES
from workbench.errors import InputError

# What torch says of a GPU that is gone, was taken away or gave up; older versions in a plain


def message(error: Exception) -> str | None:
    """What to tell the user of an error that isn't the program's; None for one that is."""
    if isinstance(error, InputError):
        return str(error)
    # Where torch was never imported it raised nothing; importing it would cost a second.
    if not isinstance(error, RuntimeError | MemoryError) or "torch" not in sys.modules:
        return None
    from workbench.discovery.scorer import is_out_of_memory

    first = (str(error) or type(error).__name__).split("\n")[0]
    if is_out_of_memory(error) or "out of memory" in first:
        return (
            f"out of memory: {first} Lower --batch-tokens and run the same command again; "
            "what is finished is kept"
        )
    if any(words in first for words in GPU_FAILURES):
        return (
            f"the GPU failed: {first.rstrip('.')}. nvidia-smi tells whether it is still there, "
            "--device cuda:1 takes another; run the same command again, what is finished is kept"
        )
    return None


@contextmanager
def resumable(folder: Path) -> Iterator[None]:
    """End with code 130 and a line saying how to go on where Ctrl-C or SIGTERM stops a run."""
    try:
        yield
    except runs.Stopped as stopped:
        typer.echo(str(stopped), err=True)
        raise typer.Exit(130) from None
    except KeyboardInterrupt:
        kept = runs.Stopped(len(runs.shards(folder)), folder)
        typer.echo(f"\n{kept}", err=True)
        raise typer.Exit(130) from None
