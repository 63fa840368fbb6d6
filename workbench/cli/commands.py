"""`workbench probe` and `score`; the other commands come in here.

What a command needs is imported when it runs: help answers at once, without torch.
"""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any, cast

import typer

from workbench.cli import failures
from workbench.cli import options as opt
from workbench.cli.bench import bench
from workbench.cli.evaluate import evaluate
from workbench.cli.figures import figures
from workbench.cli.judge import judge
from workbench.cli.lab import lab
from workbench.cli.retrieval import retrieval_heads
from workbench.cli.sizes import plan
from workbench.cli.steer import steer
from workbench.cli.tables import tables
from workbench.cli.testbed import testbed_app
from workbench.errors import InputError

app = typer.Typer(
    help="Find the attention heads that carry a user's preferences, and steer with them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(testbed_app, name="testbed")


def main() -> None:
    """Run the command line; what a user can put right ends in one message and exit code 2."""
    try:
        app()
    except Exception as error:
        text = failures.message(error)
        if text is None:
            raise
        typer.echo(f"error: {text}", err=True)
        sys.exit(2)


@app.command()
def probe(
    model: opt.Model = "testbed",
    data: opt.Data = "testbed",
    root: opt.Root = None,
    split: opt.Split = None,
    users: opt.Users = None,
    eval_users: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Other users, to measure on; 40 if unset, or as many as are left.",
            rich_help_panel="Data",
        ),
    ] = None,
    k: Annotated[int, typer.Option("-k", help="Size of the head sets.")] = 8,
    sweep_k: Annotated[
        str | None, typer.Option(help="Numbers of heads of the sweep; 1,2,4,8,16 if unset.")
    ] = None,
    gamma: Annotated[float, typer.Option(help="Strength of DPS.")] = 0.5,
    draws: Annotated[int, typer.Option(help="Random head sets at each K.")] = 5,
    full: Annotated[
        bool, typer.Option("--full/--quick", help="Every analysis, or what takes minutes.")
    ] = False,
    neutral: Annotated[
        str | None,
        typer.Option(
            help="Text that has no user: builtin, testbed, or a file of passages; what fits the "
            "data if unset.",
            rich_help_panel="Data",
        ),
    ] = None,
    cluster_users: Annotated[
        int | None,
        typer.Option(help="Users a cluster of the routing; 100 if unset, fewer of few users."),
    ] = None,
    ablation: opt.Ablation = "zero",
    style: opt.Style = "plain",
    items: opt.Items = 5,
    ranking: opt.Ranking = None,
    max_prompt_tokens: opt.MaxPromptTokens = 2048,
    max_new_tokens: opt.MaxNewTokens = 32,
    device: opt.Device = None,
    dtype: opt.Dtype = "auto",
    revision: opt.Revision = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    threads: opt.Threads = None,
    batch_tokens: opt.FreeBatchTokens = None,
    ray: opt.Ray = None,
    workers: opt.Workers = None,
    seed: opt.Seed = 0,
    out: opt.Out = None,
    as_json: opt.Json = False,
) -> None:
    """The main job: the whole examination of a model; writes figures and report.html."""
    from workbench import runs
    from workbench.cli import show
    from workbench.probe import ProbeSettings, discovery_and_evaluation
    from workbench.probe import probe as run_probe

    settings = ProbeSettings(
        k=k,
        sweep_k=None if sweep_k is None else _numbers(sweep_k),
        gamma=gamma,
        draws=draws,
        ablation=cast(Any, ablation),
        max_new_tokens=max_new_tokens,
        seed=seed,
        depth="full" if full else "quick",
        neutral=neutral or ("testbed" if data == "testbed" else "builtin"),
        cluster_users=cluster_users,
        prompt=opt.prompt(style, items, ranking, max_prompt_tokens, max_new_tokens),
        batch_tokens=batch_tokens,
    )
    if data == "testbed" and users is None:
        users = None if full else 16
    discovery, evaluation = discovery_and_evaluation(data, split, root, users, eval_users, seed)
    folder = opt.run_folder(out, model, data)
    with failures.resumable(folder), opt.cluster(ray, workers) as joined:
        bridge = opt.open_model(model, device, dtype, revision, trust_remote_code, threads)
        result = run_probe(
            bridge,
            discovery,
            evaluation,
            folder,
            settings,
            ray=joined,
            progress=not as_json,
            say=show.step,
        )
        show.step("Drawing figures and writing the report")
        with runs.hold(folder):
            note = show.write_pictures(result, folder)
    if as_json:
        typer.echo(json.dumps(result.summary, indent=1))
    else:
        show.summary(result, folder, note)


@app.command()
def score(
    model: opt.Model = "testbed",
    data: opt.Data = "testbed",
    root: opt.Root = None,
    tasks: opt.Tasks = None,
    split: opt.Split = None,
    users: opt.Users = None,
    k: Annotated[int, typer.Option("-k", help="Heads to show, and to screen for.")] = 8,
    method: opt.Method = "exact",
    screen_by: opt.ScreenBy = None,
    candidates: opt.Candidates = None,
    audit: opt.Audit = None,
    ablation: opt.Ablation = "zero",
    style: opt.Style = "plain",
    items: opt.Items = 5,
    ranking: opt.Ranking = None,
    max_prompt_tokens: opt.MaxPromptTokens = 2048,
    max_new_tokens: opt.MaxNewTokens = 32,
    device: opt.Device = None,
    dtype: opt.Dtype = "auto",
    revision: opt.Revision = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    threads: opt.Threads = None,
    batch_tokens: opt.FreeBatchTokens = None,
    ray: opt.Ray = None,
    workers: opt.Workers = None,
    seed: opt.Seed = 0,
    out: opt.Out = None,
    as_json: opt.Json = False,
) -> None:
    """Score every head on every example (PCS), and nothing more."""
    from workbench.cli import show
    from workbench.data.sources import load_examples
    from workbench.discovery.run import score_heads
    from workbench.heads import check_k
    from workbench.models import heads_per_layer

    screen = opt.screen(method, k, screen_by, candidates, audit, seed)
    prompt = opt.prompt(style, items, ranking, max_prompt_tokens, max_new_tokens)
    examples = load_examples(data, split, root, users=users, tasks=opt.names(tasks), seed=seed)
    folder = opt.run_folder(out, model, data)
    with failures.resumable(folder), opt.cluster(ray, workers) as joined:
        device, dtype = opt.beside_workers(joined, device, dtype)
        bridge = opt.open_model(model, device, dtype, revision, trust_remote_code, threads)
        check_k(k, sum(heads_per_layer(bridge)))
        scores = score_heads(
            bridge,
            examples,
            cast(Any, ablation),
            method=cast(Any, method),
            screen=screen,
            prompt=prompt,
            folder=folder,
            batch_tokens=batch_tokens,
            ray=joined,
            progress=not as_json,
        )
    by = screen.by if screen else "task"
    top = scores.top(k, by)
    if as_json:
        typer.echo(json.dumps(show.scores_json(scores, top, by, folder), indent=1))
    else:
        show.scores(scores, top, by, folder)


app.command()(figures)
app.command()(steer)
app.command()(plan)
app.command()(bench)
app.command()(evaluate)
app.command()(retrieval_heads)
app.command()(tables)
app.command()(judge)
app.command()(lab)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"wanted numbers like 1,2,4, got {text!r}") from None
