"""What commands print, for a terminal of 80 columns, and the pictures they write."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from workbench import report, tables
from workbench.analysis import verdict
from workbench.analysis.screened import screened
from workbench.analysis.sparsity import sparsity
from workbench.figures import save
from workbench.figures.labels import missing

if TYPE_CHECKING:
    import xarray as xr

    from workbench.heads import HeadSet
    from workbench.probe import Probe
    from workbench.scores import By, HeadScores
    from workbench.steering.decode import Written

ESTIMATE = "attribution"
MOST_TABLES = 10

_out = Console(highlight=False)
_err = Console(stderr=True, highlight=False)


def step(line: str) -> None:
    """Say what begins, beside the results and not among them."""
    _err.print(escape(line))


def write_pictures(result: Probe, folder: Path) -> str:
    """Write figures and report; returns a note where a browser was wanted and not found."""
    drawn, behind = report.probe_figures(result), report.figure_tables(result)
    saved = save(drawn, folder / "figures", behind)
    # Pictures of an earlier, deeper probe in this folder would pass for this one's.
    for old in set((folder / "figures").iterdir()) - set(saved.paths):
        if old.suffix in (".html", ".png", ".svg", ".csv"):
            old.unlink()
    report.write_report(result, folder)
    return saved.note


def _number(value: float | None) -> str:
    return "–" if missing(value) else f"{value:.3f}"


def summary(result: Probe, folder: Path, note: str) -> None:
    """The verdict, the findings behind it, the sweep, and where everything lies."""
    _out.print("[bold]Verdict[/bold]")
    _lines(result.summary["headline"])
    for key, title in report.SECTIONS.items():
        if lines := result.summary["findings"].get(key):
            _out.print(f"\n[bold]{title}[/bold]")
            _lines(lines)
    if "sweep" in result.tables:
        _sweep(result.tables["sweep"])
    for name, reason in result.summary["left_out"].items():
        _out.print(f"Left out: {name}: {escape(reason)}")
    for group, counts in result.summary["truncation"].items():
        _out.print(
            f"Prompts, {group}: {counts['prompts_cut']} of {counts['prompts']} cut; "
            f"{counts['items_shortened']} profile items shortened, {counts['items_dropped']} "
            f"dropped, {counts['tokens_cut']} tokens lost, {counts['tokens_kept']} kept"
        )
    if note:
        _out.print(escape(note))
    _out.print(f"Report:  {escape(str(folder / report.REPORT))}", soft_wrap=True)
    _out.print(f"Figures: {escape(str(folder / 'figures'))}", soft_wrap=True)


def _lines(lines: Sequence[str]) -> None:
    for line in lines:
        _out.print(f"- {escape(line)}")


def _sweep(found: xr.Dataset) -> None:
    table = Table(title=f"\nDPS, gamma = {found.attrs['gamma']:g}", title_justify="left")
    for name in ("task", "K", "plain", "DPS", "random", "beaten", "DPS - plain, 95 %"):
        table.add_column(name, justify="left" if name == "task" else "right")
    for row in tables.records(found.drop_dims(["draw", "other"])):
        interval = f"{_number(row['gain_low'])} to {_number(row['gain_high'])}"
        numbers = (_number(row[name]) for name in ("plain", "dps", "random"))
        beaten = f"{row['beaten']} of {found.attrs['draws']}"
        table.add_row(escape(row["task"]), str(row["k"]), *numbers, beaten, interval)
    _out.print(table)


def scores(result: HeadScores, top: Mapping[str, HeadSet], by: By, folder: Path) -> None:
    """The highest heads of each group with their intervals, and how far they can be trusted."""
    means = result.mean(by)
    method = result.manifest["settings"]["method"]
    for name in list(top)[:MOST_TABLES]:
        _ranking(means.sel(group=name), top[name], "estimate" if method == ESTIMATE else "PCS")
    if len(top) > MOST_TABLES:
        _out.print(f"\n{len(top) - MOST_TABLES} more {by}s are in the run folder")
    _out.print()
    lines = verdict.noise_lines(means.isel(group=slice(MOST_TABLES)))
    if method == ESTIMATE:
        lines.append(
            "The gradient estimate, no exact score: saturation, cancellation and curvature put "
            "heads out of order; workbench/discovery/attribution.py says how."
        )
    elif method == "screened":
        lines += verdict.screening_lines(screened(result).isel(group=slice(MOST_TABLES)))
    for line in [*lines, *verdict.engine_lines(result.manifest)]:
        _out.print(f"- {escape(line)}")
    _out.print(f"Scores: {escape(str(folder))}", soft_wrap=True)


def _ranking(means: xr.Dataset, heads: HeadSet, what: str) -> None:
    title = f"\n{escape(means['group'].item())}: {what}, nats per target token"
    table = Table(title=title, title_justify="left")
    below = [bool(means["below_noise"].sel(layer=h.layer, head=h.head)) for h in heads]
    for name in ("head", what, "95 % interval", *(["noise"] if any(below) else [])):
        table.add_column(name, justify="right")
    for head, under in zip(heads, below, strict=True):
        cell = means.sel(layer=head.layer, head=head.head)
        low, high = float(cell["low"]), float(cell["high"])
        marks = ["below the floor" if under else ""] if any(below) else []
        table.add_row(str(head), f"{float(cell['mean']):.4f}", f"{low:.4f} to {high:.4f}", *marks)
    _out.print(table)
    if heads.ties:
        _out.print(f"{heads.ties} more heads tie with the last one; lower layers go first")


def scores_json(
    result: HeadScores, top: Mapping[str, HeadSet], by: By, folder: Path
) -> dict[str, Any]:
    """The same for a program. `sparsity` needs a score of every head; screened runs have none."""
    method = result.manifest["settings"]["method"]
    means = result.mean(by)
    below = {
        name: [
            str(head)
            for head in heads
            if means["below_noise"].sel(group=name, layer=head.layer, head=head.head)
        ]
        for name, heads in top.items()
    }
    found = {
        "run": str(folder),
        "method": method,
        "by": by,
        "top": {name: [str(head) for head in heads] for name, heads in top.items()},
        "below_noise": below,
        "engine": result.manifest.get("engine"),
        "noise": result.manifest.get("noise"),
    }
    if method == "screened":
        audit = screened(result)
        bound = {**audit.attrs, "words": verdict.bound_line(audit.attrs)}
        return tables.plain({**found, "screening": {"groups": tables.records(audit), **bound}})
    return tables.plain({**found, "sparsity": tables.records(sparsity(result))})


def answers(rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """Answers side by side."""
    for row in rows:
        table = Table(title=f"\n{escape(row['example'])}", title_justify="left", show_header=False)
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        table.add_row("query", escape(row["query"]))
        if row["target"]:
            table.add_row("user wrote", escape(row["target"]))
        table.add_row("plain", escape(row["plain"] or "(nothing)"))
        table.add_row("steered", escape(row["steered"] or "(nothing)"))
        table.add_row("by", escape(title))
        table.add_row("moved", f"{row['kl']:.3g} nats over all steps")
        if row["heads"]:
            table.add_row("heads", row["heads"])
            table.add_row("found on", escape(row["heads_from"]))
        _out.print(table)


def asked(name: str, query: str, target: str, origin: str | None) -> None:
    """What is answered, above answers that are printed as they come."""
    _out.print(f"\n[bold]{escape(name)}[/bold]")
    lines = {"query": query, "user wrote": target, "heads from": origin}
    for title, text in lines.items():
        if text:
            _out.print(f"[bold]{title}[/bold] {escape(text)}")


def streamed(title: str, steps: Iterable[Written]) -> None:
    """An answer, token by token, and by how much it was moved."""
    _out.print(f"[bold]{escape(title)}[/bold]")
    count, moved = 0, 0.0
    for step in steps:
        _out.print(escape(step.text), end="", soft_wrap=True)
        _out.file.flush()
        count, moved = count + 1, moved + step.kl
    spent = f", moved by {moved:.3g} nats" if moved else ""
    _out.print(f"\n[dim]({count} token{'' if count == 1 else 's'}{spent})[/dim]")
