"""Options that several commands share, and what is made of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from workbench.errors import InputError

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from workbench.data.prompts import PromptSettings
    from workbench.discovery.cluster import RayOptions
    from workbench.discovery.screening import Screen

_MODEL, _DATA, _PROMPT, _RUN, _SCREEN = "Model", "Data", "Prompt", "Run", "Screening"
_RAY = "Many machines"

Model = Annotated[
    str, typer.Argument(help="Hub id, local folder, or `testbed`.", show_default=True)
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1; the GPU if any.", rich_help_panel=_MODEL)
]
Dtype = Annotated[
    str,
    typer.Option(help="auto, checkpoint, float32, bfloat16 or float16.", rich_help_panel=_MODEL),
]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit on the hub.", rich_help_panel=_MODEL)
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run code that comes with the model.", rich_help_panel=_MODEL
    ),
]
Threads = Annotated[
    int | None, typer.Option(min=1, help="CPU threads of torch.", rich_help_panel=_MODEL)
]
Data = Annotated[
    str,
    typer.Option(
        help="testbed, lamp:LaMP-4 or longlamp:product_review_user, and the like; lamp for several "
        "tasks of one folder.",
        rich_help_panel=_DATA,
    ),
]
Tasks = Annotated[
    str | None,
    typer.Option(
        help="Tasks of the data, such as LaMP-1,LaMP-2; all if unset.", rich_help_panel=_DATA
    ),
]
Root = Annotated[
    Path | None,
    typer.Option(
        help="Folder that holds the LaMP task folders, or a local copy of LongLaMP; without one "
        "LongLaMP comes from the hub.",
        rich_help_panel=_DATA,
    ),
]
Split = Annotated[
    str | None,
    typer.Option(
        help="Split of the users that heads are found on: discovery of the testbed, dev of LaMP, "
        "val of LongLaMP if unset.",
        rich_help_panel=_DATA,
    ),
]
Users = Annotated[
    int | None, typer.Option(help="How many of them; all by default.", rich_help_panel=_DATA)
]
Seed = Annotated[int, typer.Option(help="Seed of every random choice.", rich_help_panel=_RUN)]
Style = Annotated[
    str, typer.Option(help="plain, or chat: the chat template.", rich_help_panel=_PROMPT)
]
Items = Annotated[
    int, typer.Option(min=0, help="Profile items in the prompt.", rich_help_panel=_PROMPT)
]
Ranking = Annotated[
    str | None,
    typer.Option(help="bm25, recency or first; the task's own if unset.", rich_help_panel=_PROMPT),
]
MaxPromptTokens = Annotated[
    int, typer.Option(min=1, help="Token budget of the prompt.", rich_help_panel=_PROMPT)
]
MaxNewTokens = Annotated[
    int, typer.Option(min=1, help="Limit of new tokens.", rich_help_panel=_PROMPT)
]
Ablation = Annotated[str, typer.Option(help="zero (the paper's) or mean.", rich_help_panel=_RUN)]
BatchTokens = Annotated[
    int,
    typer.Option(
        min=1,
        help="Most tokens in a forward pass; lower it when memory is short.",
        rich_help_panel=_RUN,
    ),
]
FreeBatchTokens = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Most tokens in a forward pass; if unset, scoring takes what the memory at hand "
        "allows and everything else 8,192.",
        rich_help_panel=_RUN,
    ),
]
Method = Annotated[
    str,
    typer.Option(
        help="exact; attribution, an estimate from gradients; or screened, exact scores for the "
        "heads that the estimate finds promising.",
        rich_help_panel=_RUN,
    ),
]
ScreenBy = Annotated[
    str | None,
    typer.Option(
        help="Screen for the top K of each task or each user; task if unset.",
        rich_help_panel=_SCREEN,
    ),
]
Candidates = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Heads scored exactly for each; 1.5 K or K + 8 if unset.",
        rich_help_panel=_SCREEN,
    ),
]
Audit = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Random other heads scored exactly, to bound what is missed; K / 4 if unset.",
        rich_help_panel=_SCREEN,
    ),
]
Ray = Annotated[
    str | None,
    typer.Option(
        help="Score on a Ray cluster: auto joins the one of RAY_ADDRESS or of this machine and "
        "else starts one here; local starts one; HOST:PORT joins that one.",
        metavar="auto|local|HOST:PORT",
        rich_help_panel=_RAY,
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        min=1, help="How many there; one a GPU, or one a node, if unset.", rich_help_panel=_RAY
    ),
]
Out = Annotated[
    Path | None, typer.Option(help="Run folder; runs/NAME by default.", rich_help_panel=_RUN)
]
Json = Annotated[bool, typer.Option("--json", help="Print results as JSON on standard output.")]


def names(text: str | None) -> list[str] | None:
    """What stands between commas; None if the option is unset."""
    if text is None:
        return None
    return [part.strip() for part in text.split(",") if part.strip()]


def open_model(
    name: str,
    device: str | None,
    dtype: str,
    revision: str | None,
    trust_remote_code: bool,
    threads: int | None,
) -> TransformerBridge:
    """Load the model that the options name."""
    import torch

    from workbench.discovery.room import keep_freed_memory
    from workbench.models import load_model

    keep_freed_memory()
    if threads is not None:
        torch.set_num_threads(threads)
    return load_model(
        name, device=device, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code
    )


def prompt(
    style: str, items: int, ranking: str | None, max_tokens: int, answer_tokens: int
) -> PromptSettings:
    """How prompts are built, by the options."""
    from workbench.data.prompts import PromptSettings

    return PromptSettings(cast(Any, style), items, cast(Any, ranking), max_tokens, answer_tokens)


@contextmanager
def cluster(address: str | None, workers: int | None) -> Iterator[RayOptions | None]:
    """Join the Ray cluster that the options name, before any long work; None if they name none.

    Raises:
        InputError: There is none, or the options don't go together.
    """
    if address is None:
        if workers is not None:
            raise InputError(f"--workers {workers}: only with --ray")
        yield None
        return
    from workbench.discovery.cluster import RayOptions, connect

    options = RayOptions(address, workers)
    with connect(options):
        yield options


def beside_workers(
    ray: RayOptions | None, device: str | None, dtype: str
) -> tuple[str | None, str]:
    """Device and dtype of a driver that leaves the work to others: off the GPUs, as they have it.

    A device that was asked for stays.
    """
    from workbench.discovery.cluster import has_gpus

    if ray is None or device is not None:
        return device, dtype
    return "cpu", "checkpoint" if dtype == "auto" and has_gpus() else dtype


def run_folder(out: Path | None, model: str, data: str) -> Path:
    """The run folder asked for, or one named after model and data."""
    if out is not None:
        return out
    name = Path(model).name if Path(model).is_dir() else model.replace("/", "--")
    return Path("runs") / f"{name}-{data.rpartition(':')[2]}"


def screen(
    method: str, k: int, by: str | None, candidates: int | None, audit: int | None, seed: int
) -> Screen | None:
    """How to screen, for the screened method.

    Raises:
        InputError: The options don't go together.
    """
    from workbench.discovery.screening import Screen

    if method != "screened":
        given = {"--screen-by": by, "--candidates": candidates, "--audit": audit}
        unused = [name for name, value in given.items() if value is not None]
        if unused:
            raise InputError(f"{', '.join(unused)}: only for --method screened, got {method!r}")
        return None
    if by not in (None, "task", "user"):
        raise InputError(f"--screen-by must be task or user, got {by!r}")
    return Screen(k, cast(Any, by or "task"), candidates, audit, seed)
