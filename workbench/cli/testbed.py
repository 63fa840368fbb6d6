"""`workbench testbed`: train the checkpoint, write the corpus, measure, tabulate; plant heads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from workbench.cli.options import Json

if TYPE_CHECKING:
    import xarray as xr

# What `workbench evaluate --json` printed, with each prefill.
EVALUATIONS = ("evaluation.json", "evaluation-shared.json")
testbed_app = typer.Typer(help="The built-in testbed: make it again, and measure it.")


@testbed_app.command("data")
def write_data(
    out: Annotated[Path, typer.Option(help="Folder to fill.")] = Path("data/testbed/corpus"),
    seed: Annotated[int, typer.Option(help="Seed of the corpus.")] = 0,
    as_json: Json = False,
) -> None:
    """Write the corpus as official LaMP files, discovery, validation and test."""
    from workbench.data.testbed import write_corpus

    written = [str(path) for path in write_corpus(out, seed)]
    typer.echo(json.dumps({"written": written}, indent=1) if as_json else "\n".join(written))


@testbed_app.command("train")
def train_checkpoint(
    out: Annotated[Path, typer.Option(help="Folder of the checkpoint.")] = Path(
        "runs/testbed-checkpoint"
    ),
    size: Annotated[
        str, typer.Option(help="base (4 layers of 8 heads) or small (3 layers of 6).")
    ] = "base",
    seed: Annotated[int, typer.Option(help="Seed of weights, data and dropout.")] = 0,
    threads: Annotated[
        int, typer.Option(min=1, help="Threads; another number gives other roundings.")
    ] = 1,
    steps: Annotated[
        str, typer.Option(help="Steps of the two phases; the shipped recipe's by default.")
    ] = "2000,800",
    as_json: Json = False,
) -> None:
    """Train the checkpoint from a seed: about 10 minutes on one core.

    The same command gives the same weights on the same machine and thread count.
    """
    from tqdm import tqdm

    from workbench.errors import InputError
    from workbench.training import SIZES, train

    if size not in SIZES:
        raise InputError(f"--size must be {' or '.join(SIZES)}, got {size!r}")

    try:
        first, second = (int(part) for part in steps.split(","))
    except ValueError:
        raise InputError(f"wanted two numbers of steps like 2000,800, got {steps!r}") from None
    recipe = replace(SIZES[size], seed=seed, threads=threads, steps=(first, second))
    with tqdm(total=first + second, desc="training", unit="step") as bar:

        def advance(_done: int, _steps: int, loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()

        record = train(recipe, out, advance)
    if as_json:
        typer.echo(json.dumps({"checkpoint": str(out), **record}, indent=1))
        return
    typer.echo(f"{out}: {record['parameters']} parameters, {record['seconds']} s")
    typer.echo(f"weights sha256 {record['weights_sha256']}")


@testbed_app.command("study")
def study(
    checkpoints: Annotated[list[Path], typer.Argument(help="Folders made by `testbed train`.")],
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path(
        "data/testbed/results"
    ),
    users: Annotated[int | None, typer.Option(help="Users of each split; all by default.")] = None,
    draws: Annotated[int, typer.Option(min=1, help="Random head sets.")] = 20,
    as_json: Json = False,
) -> None:
    """Measure checkpoints for the README: about 4 minutes each on one core."""
    from workbench import runs
    from workbench.analysis.study import testbed_study
    from workbench.models import load_model

    written = []
    for folder in checkpoints:
        model = load_model(folder)
        training = runs.read_json(folder / "training.json")
        result = {
            "seed": training["recipe"]["seed"],
            **testbed_study(model, users=users, draws=draws),
        }
        path = out / f"seed-{result['seed']}.json"
        runs.write_text(path, json.dumps(result, indent=1, allow_nan=False) + "\n")
        written.append(str(path))
    typer.echo(json.dumps({"written": written}, indent=1) if as_json else "\n".join(written))


@testbed_app.command("planted")
def planted(
    out: Annotated[Path, typer.Option(help="Folder of the model, its scores and the result.")] = (
        Path("runs/planted")
    ),
    noise: Annotated[
        str, typer.Option(help="Shares of foreign profile items and of slots that stray.")
    ] = "0,0.2,0.4",
    counts: Annotated[
        str, typer.Option(help="Numbers of examples; twice the largest are scored.")
    ] = "8,16,32,64,128",
    seed: Annotated[int, typer.Option(help="Seed of the heads, the users and the noise.")] = 0,
    as_json: Json = False,
) -> None:
    """Build a model whose preference heads are known, and see whether they are found.

    About 90 seconds on one core. The same command goes on where it was stopped.
    """
    from workbench import figures, tables
    from workbench.analysis.recovery import lines
    from workbench.errors import InputError
    from workbench.figures.recovery import recovery
    from workbench.planted import ground_truth, plant

    try:
        shares = [float(part) for part in noise.split(",")]
        numbers = sorted({int(part) for part in counts.split(",")})
    except ValueError:
        raise InputError(
            f"wanted numbers like 0,0.2 and 8,16 for --noise and --counts, got {noise!r} and "
            f"{counts!r}"
        ) from None
    model = plant(out / "model", seed=seed)
    table = ground_truth(model, noise=shares, counts=numbers, seed=seed, folder=out / "scores")
    tables.save(table, out / "recovery.json")
    saved = figures.save({"recovery": recovery(table)}, out / "figures")
    words = [*lines(table), f"The decoys are {model.decoys}."]
    if as_json:
        truth = {"run": str(out), "decoys": str(model.decoys), **table.attrs}
        found = {**truth, "lines": words, "rows": tables.records(table)}
        typer.echo(json.dumps(tables.plain(found), indent=1))
        return
    _show_recovery(table, words, saved.note)
    typer.echo(f"Table: {out / 'recovery.json'}")
    typer.echo(f"Figure: {out / 'figures'}")


def _show_recovery(table: xr.Dataset, words: list[str], note: str) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from workbench import tables

    shown = Table(title="Planted heads found, means over draws", title_justify="left")
    columns = ("method", "noise", "examples", "precision", "recall", "exact draws")
    for name in columns:
        shown.add_column(name, justify="left" if name == "method" else "right")
    for row in tables.records(table):
        precision = "–" if row["precision"] is None else f"{row['precision']:.2f}"
        exact = f"{round(row['exact'] * row['draws'])} of {row['draws']}"
        shown.add_row(
            *(row["method"], f"{row['noise']:g}", str(row["count"]), precision),
            *(f"{row['recall']:.2f}", exact),
        )
    console = Console(highlight=False)
    console.print(shown)
    for line in [*words, *([note] if note else [])]:
        console.print(f"- {escape(line)}")


@testbed_app.command("table")
def table(
    readme: Annotated[Path, typer.Argument(help="File with the markers.")] = Path("README.md"),
    results: Annotated[Path, typer.Option(help="Folder of the results.")] = Path(
        "data/testbed/results"
    ),
    check: Annotated[bool, typer.Option("--check", help="Only say whether it is current.")] = False,
    as_json: Json = False,
) -> None:
    """Put the measured tables into the README, between its markers."""
    from workbench import runs
    from workbench.errors import InputError
    from workbench.readme import with_evaluation, with_examination, with_tables

    try:
        old = readme.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{readme}: no such file") from None
    new = with_evaluation(with_tables(old, results), *(results / name for name in EVALUATIONS))
    new = with_examination(new, results)
    if check and new != old:
        raise InputError(f"{readme}: the tables are not those of {results}; run `testbed table`")
    if not check:
        runs.write_text(readme, new)
    state = {"file": str(readme), "changed": new != old}
    typer.echo(json.dumps(state, indent=1) if as_json else f"{readme}: tables are current")
