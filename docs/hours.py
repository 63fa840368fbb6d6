"""What `workbench plan` says of the how-to's jobs, put into the how-to: no hour is typed by hand.

    python docs/hours.py

writes the blocks of `llama-3-8b.md` again: hours as the command counts them, and how many answers
the page's own commands ask for. Tests hold both against the commands.
"""

from __future__ import annotations

import contextlib
import re
import shlex
from pathlib import Path
from typing import Any

from typer.main import get_command
from typer.testing import CliRunner

from workbench.cli.commands import app
from workbench.cli.sizes import estimate
from workbench.discovery.cost import assumed_machine
from workbench.discovery.shapes import read_config, shape_of
from workbench.evaluation import methods as ways
from workbench.evaluation.settings import GridSettings
from workbench.heads import HeadSet
from workbench.probe.settings import EFFORTS, Depth, ProbeSettings

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/llama-3-8b.md"
MODEL = "docs/llama-3-8b"  # its config.json; the command takes a hub id as well
PLAN = f"workbench plan {MODEL} --examples 2500 --tokens 2048 -k 40 --gpus 1"
# Examples and tokens of the other `score` runs.
SCORED = ((2500, 512), (2500, 1024), (2500, 2048), (400, 2048))
USERS = 200  # of a probe, with an example each
ASPECTS = 2  # content and function words
METHODS = ("replay", "screened", "attribution")
DTYPES = ("bfloat16", "float32")


def main() -> None:
    """Write the how-to with the blocks of today."""
    PAGE.write_text(with_blocks(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def with_blocks(text: str) -> str:
    """The page with its blocks between their markers.

    Raises:
        ValueError: A marker isn't there just once.
    """
    for name, body in (("plan", printed()), ("jobs", jobs()), ("answers", answers(text))):
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"{PAGE}: needs the markers {begin} and {end} once each")
        before, rest = text.split(begin)
        text = f"{before}{begin}\n\n{body}\n\n{end}{rest.split(end)[1]}"
    return text


def printed() -> str:
    """The command and what it prints, as a block of code."""
    with contextlib.chdir(ROOT):
        done = CliRunner().invoke(
            app, shlex.split(PLAN)[1:], env={"COLUMNS": "80", "TERM": "dumb", "NO_COLOR": "1"}
        )
    if done.exit_code:
        raise RuntimeError(f"{PLAN}: {done.output}") from done.exception
    lines = re.sub(r" +$", "", done.stdout.strip(), flags=re.MULTILINE)
    return f"```text\n$ {PLAN}\n{lines}\n```"


def jobs() -> str:
    """Hours of the other jobs and memory of all, as two tables."""
    hours = [
        "| job | tokens of each | exact | screened | attribution |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    rows = [(f"`score`, {n:,} examples", n, tokens) for n, tokens in SCORED]
    rows += [
        (f"`probe --{depth}`, {USERS} users, {n:,} scored", n, 2048)
        for depth, n in ((depth, probed(depth)) for depth in EFFORTS)
    ]
    for what, examples, tokens in rows:
        found = _methods("bfloat16", examples, tokens, 8192)
        cells = [_short(found[name]["hours_one_gpu"]) for name in METHODS]
        if what.startswith("`probe"):  # which scores every head exactly
            cells[1:] = ["–", "–"]
        hours.append(f"| {what} | {tokens:,} | {' | '.join(cells)} |")
    memory = [
        "| GiB, 2,048 tokens | weights | exact | screened, attribution |",
        "| --- | ---: | ---: | ---: |",
    ]
    for dtype in DTYPES:
        for batch, words in ((8192, "8,192 tokens a pass"), (2048, "one example a pass")):
            found = {n: m["memory_bytes"] for n, m in _methods(dtype, 1, 2048, batch).items()}
            sizes = [found["replay"]["weights"]]
            sizes += [found[name]["total"] for name in ("replay", "screened")]
            cells = [_short(size / 2**30) for size in sizes]
            memory.append(f"| {dtype}, {words} | {' | '.join(cells)} |")
    return "\n".join([*hours, "", *memory])


def probed(depth: Depth) -> int:
    """Examples that a probe scores, counted with all the contexts that it puts them in."""
    effort = EFFORTS[depth]
    contexts = ASPECTS + len(effort.shares) + sum(map(len, effort.steps.values()))
    behind = 1 + len(effort.counterfactuals)
    return USERS * behind + min(effort.sample, USERS) * contexts + effort.neutral


def answers(text: str) -> str:
    """Texts that the page's `probe` and `evaluate` write, for one task, as a table.

    An example a user is assumed. Of a probe it is the sweep alone.
    """
    probe, grid = _given(text, "probe"), _given(text, "evaluate")
    heads = sum(shape_of(read_config(ROOT / MODEL)).heads)
    swept = tuple(map(int, probe["sweep_k"].split(",")))
    counts = ProbeSettings(probe["k"], swept).head_counts(heads)
    lists = 1 + len(counts) * (1 + probe["draws"])  # plain; at each K the set and random ones
    settings = GridSettings(
        methods=tuple(grid["methods"].split(",")),
        gamma=tuple(map(float, grid["gamma"].split(","))),
        seeds=grid["seeds"],
    )
    tried = candidates(settings, heads)
    final = len(settings.methods) + settings.seeds - 1
    rows = [
        (f"`probe`: the sweep, {len(counts)} K", lists, probe["eval_users"]),
        ("`evaluate`: choosing settings", tried, grid["validation_users"]),
        ("`evaluate`: the table", final, grid["users"]),
    ]
    lines = [
        "| job | ways to write | users | answers |",
        "| --- | ---: | ---: | ---: |",
        *(f"| {job} | {n} | {users} | {n * users:,} |" for job, n, users in rows),
    ]
    return "\n".join(lines)


def candidates(settings: GridSettings, heads: int) -> int:
    """How many settings of all methods an evaluation tries on the validation users of a task."""
    none, gammas = HeadSet(()), settings.gamma
    sets = dict.fromkeys(settings.head_counts(heads), none)
    found = {
        "dps": ways.dps(sets, gammas),
        "decore": ways.decore(sets, gammas),
        "cad": ways.cad(gammas),
        "dola": ways.dola(),
        ways.RANDOM: ways.random(none, gammas) * settings.seeds,
        ways.BOTH: ways.both(none, gammas),
    }
    return sum(len(found[name]) for name in settings.methods if name in found)


def _given(text: str, name: str) -> dict[str, Any]:
    """The options of the page's command of that name, and the others' defaults."""
    lines = text.replace("\\\n", " ").splitlines()
    (line,) = [line for line in lines if line.startswith(f"workbench {name} ")]
    command = getattr(get_command(app), "commands")[name]  # noqa: B009 - click leaves it untyped
    return dict(command.make_context(name, shlex.split(line, comments=True)[2:]).params)


def _methods(dtype: str, examples: int, tokens: int, batch: int) -> dict[str, dict]:
    """What `workbench plan --json` says, by method."""
    shape = shape_of(read_config(ROOT / MODEL), dtype)
    machine = assumed_machine(shape.dtype)
    found = estimate(
        *(shape, machine),
        **{"examples": examples, "tokens": tokens, "target": 32, "k": 40, "gpus": 1},
        batch_tokens=batch,
    )
    return {row["method"]: row for row in found["methods"]}


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}" if value < 1 else f"{value:.3g}"


if __name__ == "__main__":
    main()
