"""`workbench plan`: what a job will take, before a model is loaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.cli import options as opt

if TYPE_CHECKING:
    from workbench.discovery.cost import Machine
    from workbench.discovery.shapes import Shape

_JOB, _MACHINE = "Job", "Machine"
# Units of the table, in operations, bytes and hours.
_HOURS = ((1.0, "h"), (1 / 60, "min"), (1 / 3600, "s"))
_BYTES = ((2.0**30, "GiB"), (2.0**20, "MiB"))
_OPERATIONS = ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"))


def plan(
    examples: Annotated[int, typer.Option(min=1, help="How many examples.", rich_help_panel=_JOB)],
    tokens: Annotated[
        int, typer.Option(help="Tokens of each, prompt and target.", rich_help_panel=_JOB)
    ],
    model: opt.Model = "testbed",
    target: Annotated[
        int, typer.Option(help="How many of them are target.", rich_help_panel=_JOB)
    ] = 32,
    k: Annotated[
        int,
        typer.Option("-k", help="Heads wanted; screening replays 2.5 K.", rich_help_panel=_JOB),
    ] = 16,
    batch_tokens: opt.BatchTokens = 8192,
    rate: Annotated[
        float | None,
        typer.Option(
            help="TFLOP/s that one GPU sustains; 40 % of an H100's peak if unset.",
            rich_help_panel=_MACHINE,
        ),
    ] = None,
    bandwidth: Annotated[
        float | None,
        typer.Option(
            help="GB/s that its memory sustains; 60 % of an H100's if unset.",
            rich_help_panel=_MACHINE,
        ),
    ] = None,
    gpus: Annotated[
        int, typer.Option(min=1, help="GPUs, each with its examples.", rich_help_panel=_MACHINE)
    ] = 8,
    dtype: opt.Dtype = "auto",
    revision: opt.Revision = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    as_json: opt.Json = False,
) -> None:
    """Operations, memory and hours of PCS by each method, from the model's config alone."""
    from workbench.data.testbed import located
    from workbench.discovery.cost import assumed_machine
    from workbench.discovery.shapes import read_config, shape_of

    shape = shape_of(read_config(located(model), revision, trust_remote_code), dtype)
    machine = assumed_machine(shape.dtype)
    if rate is not None:
        machine = replace(machine, rate=rate * 1e12)
    if bandwidth is not None:
        machine = replace(machine, bandwidth=bandwidth * 1e9)
    result = estimate(
        shape,
        machine,
        examples=examples,
        tokens=tokens,
        target=target,
        k=k,
        gpus=gpus,
        batch_tokens=batch_tokens,
    )
    result = {"model": model, **result}
    result["assumptions"] = _assumptions(shape, machine, rate, bandwidth, batch_tokens)
    if as_json:
        typer.echo(json.dumps(result, indent=1))
    else:
        _show(result)


def estimate(
    shape: Shape,
    machine: Machine,
    *,
    examples: int,
    tokens: int,
    target: int,
    k: int,
    gpus: int,
    batch_tokens: int,
) -> dict[str, Any]:
    """What `--json` prints: the job, and for every method passes, operations, memory and hours.

    Args:
        shape: The model.
        machine: What one GPU sustains.
        examples: How many examples.
        tokens: Tokens of each, prompt and target.
        target: Tokens of the target.
        k: Heads wanted.
        gpus: GPUs, each with a share of the examples.
        batch_tokens: Most tokens in a pass.

    Raises:
        InputError: As `cost.operations` does, or K isn't between 1 and the number of heads.
    """
    from workbench.discovery import cost
    from workbench.heads import check_k

    heads = sum(shape.heads)
    check_k(k, heads)
    replayed = cost.screened_heads(shape, k)
    rows = []
    for method in cost.METHODS:
        passes = cost.passes(shape, method, replayed)
        counted = cost.operations(shape, method, tokens, target, replayed=replayed)
        held = cost.memory(shape, method, tokens, target, batch_tokens)
        seconds = cost.seconds(
            *(shape, method, tokens, target, machine), batch_tokens=batch_tokens, replayed=replayed
        )
        parts = asdict(counted) | {"total": counted.total}
        rows.append(
            {
                "method": method,
                "passes": asdict(passes),
                "operations": {part: count * examples for part, count in parts.items()},
                "memory_bytes": asdict(held) | {"total": held.total},
                "hours_one_gpu": seconds * examples / 3600,
                # The GPU with the most examples ends last.
                "hours": seconds * -(-examples // gpus) / 3600,
            }
        )
    return {
        "layers": shape.layers,
        "heads": heads,
        "parameters": shape.parameters,
        "dtype": shape.dtype,
        "examples": examples,
        "tokens": tokens,
        "target": target,
        "k": k,
        "heads_replayed_by_screened": replayed,
        "gpus": gpus,
        "batch_tokens": batch_tokens,
        "rate_operations_per_second": machine.rate,
        "bandwidth_bytes_per_second": machine.bandwidth,
        "call_seconds": machine.call_seconds,
        "methods": rows,
        "minimum_operations": cost.minimum(shape, tokens, target).total * examples,
    }


def _assumptions(
    shape: Shape,
    machine: Machine,
    rate: float | None,
    bandwidth: float | None,
    batch_tokens: int,
) -> list[str]:
    """What the numbers rest on, a sentence or two each."""
    peak = "67 TFLOP/s in float32" if shape.dtype == "float32" else "989 TFLOP/s in 16 bits"
    lines = [
        f"Rate: {machine.rate / 1e12:,.4g} TFLOP/s a GPU, "
        + ("as given." if rate else f"ASSUMED: 40 % of an H100's {peak}; --rate."),
        f"Bandwidth: {machine.bandwidth / 1e9:,.4g} GB/s, "
        + ("as given." if bandwidth else "ASSUMED: 60 % of an H100's 3,350 GB/s; --bandwidth."),
        f"Kernels: {machine.call_seconds * 1e6:g} µs to start each, ASSUMED. Products, "
        "element-wise work and starts are taken to follow one another.",
        f"Passes hold up to {batch_tokens:,} tokens (loop: one example). Loading is not counted.",
        "loop and reference run eager attention, the others a fused kernel.",
    ]
    if shape.assumed:
        lines.append(f"{shape.assumed}.")
    lines.append("Measure your machine's with `workbench bench`.")
    return lines


def _show(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    out = Console(highlight=False)
    out.print(
        f"[bold]{escape(result['model'])}[/bold]: {result['layers']} layers, "
        f"{result['heads']:,} heads, {result['parameters']:,} parameters in {result['dtype']}\n"
        f"{result['examples']:,} examples of {result['tokens']:,} tokens, "
        f"{result['target']:,} of them target"
    )
    rows = result["methods"]
    work, flop = _unit([row["operations"]["total"] for row in rows], _OPERATIONS)
    byte, size = _unit([row["memory_bytes"]["total"] for row in rows], _BYTES)
    hour, time = _unit([row["hours_one_gpu"] for row in rows], _HOURS)
    several = [f"{time}, {result['gpus']} GPUs"] if result["gpus"] > 1 else []
    table = Table(title="\nPCS of every head, passes an example", title_justify="left")
    for name in ("method", "full", "part", "back", flop, size, f"{time}, 1 GPU", *several):
        table.add_column(name, justify="left" if name == "method" else "right")
    for row in rows:
        cells = [row["method"], *(str(count or "–") for count in row["passes"].values())]
        cells.append(_short(row["operations"]["total"] / work))
        cells.append(_short(row["memory_bytes"]["total"] / byte))
        cells.append(_short(row["hours_one_gpu"] / hour))
        table.add_row(*cells, *(_short(row["hours"] / hour) for _ in several))
    out.print(table)
    out.print(
        f"screened replays {result['heads_replayed_by_screened']} heads: 1.5 K or K + 8, and "
        f"K/4 to audit, K = {result['k']}.\nExact PCS of every head takes at least "
        f"{_short(result['minimum_operations'] / work)} {flop}, unless examples begin alike.\n"
    )
    for line in result["assumptions"]:
        out.print(f"- {escape(line)}")


def _unit(values: list[float], units: Sequence[tuple[float, str]]) -> tuple[float, str]:
    """The first unit that the largest value fills, or the smallest."""
    return next((unit for unit in units if max(values) >= unit[0]), units[-1])


def _short(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
