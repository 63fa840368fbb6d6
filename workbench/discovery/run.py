"""Scoring many examples: checks first, then shard by shard, each kept as soon as it is done."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from tqdm.auto import tqdm

from workbench import runs
from workbench.data.examples import Example
from workbench.data.prompts import Prompt, PromptSettings, build_prompts, truncation
from workbench.discovery import check, cluster, stages
from workbench.discovery.check import Engine, Prepared
from workbench.discovery.cluster import RayOptions
from workbench.discovery.crew import Crew
from workbench.discovery.scorer import REFERENCE, Job, Method
from workbench.discovery.screening import Screen
from workbench.errors import InputError
from workbench.hooks import Ablation
from workbench.models import context_length, describe, heads_per_layer
from workbench.scores import FORMAT, HeadScores

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

SHARD_PASSES = 4096
PACKAGES = ("torch", "transformers", "transformer-lens", "datasets", "preference-heads-workbench")


def score_heads(
    model: TransformerBridge,
    examples: Sequence[Example],
    ablation: Ablation = "zero",
    *,
    method: Method = "exact",
    screen: Screen | None = None,
    prompt: PromptSettings | None = None,
    folder: Path | str | None = None,
    shard_examples: int | None = None,
    batch_tokens: int | None = None,
    ray: RayOptions | None = None,
    progress: bool = True,
) -> HeadScores:
    """Measure the preference contribution score of every head on every example.

    Args:
        model: From `load_model`.
        examples: What to score; every target must be what the user really wrote.
        ablation: `zero` (the paper's) or `mean` (z's mean over all tokens of these examples).
        method: `exact`; `attribution`, the gradient estimate of all heads from one forward and
            one backward pass (`workbench.discovery.attribution` says where it fails); or
            `screened`, the estimate for all heads and exact scores for the most promising, with a
            bound on what that misses.
        screen: For what sets heads are screened, and how; for the top 16 of each task by default.
        prompt: How prompts are built.
        folder: A run folder. Each shard is kept there when it is done; the same call goes on
            where it was stopped, and with other settings it is refused.
        shard_examples: Examples a shard, which is what a kill can cost; by default about
            4,096 passes' worth: 128 examples of a model with 32 heads, 4 of one with 1,024.
        batch_tokens: Most tokens in a forward pass, padding counted; by default from the memory
            at hand. When memory runs out it is halved and the shard begun again.
        ray: Score on the workers of a Ray cluster, each with its own copy of the model, loaded
            from where `model` came from.
        progress: Show a bar on the terminal.

    Returns:
        PCS per example, in nats per target token, float32 from the logits on. The manifest says
        which engine computed them, how far it is from the reference, and the noise.

    Raises:
        InputError: A prompt can't be built, the run folder holds another run or is in use, no
            cluster answers, the model gives NaN, or workers were lost; all but the last two
            before any long work.
        runs.Stopped: Ctrl-C or SIGTERM; the shards finished so far are kept.
    """
    _check_request(examples, ablation, method, screen)
    settings = prompt or PromptSettings()
    prompts = build_prompts(examples, model.tokenizer, context_length(model), settings)
    _check_unique(examples)
    shape = heads_per_layer(model)
    screen = (screen or Screen()) if method == "screened" else None
    if screen is not None:
        screen.sizes(sum(shape))
    shard_examples = shard_examples or max(1, SHARD_PASSES // sum(shape))
    manifest = _manifest(model, prompts, settings, ablation, method, shard_examples)
    if screen is not None:
        manifest["settings"]["screen"] = asdict(screen)
    target = Path(folder) if folder is not None else None
    with ExitStack() as stack:
        stop, known = runs.Stop(), dict[str, Any]()
        if target is not None:
            stack.enter_context(runs.hold(target))
            stop = stack.enter_context(runs.stoppable())
            known = _begin(target, manifest)
        bar = stack.enter_context(
            tqdm(desc="checking the engine", unit_scale=True, disable=not progress)
        )
        shards = stages.Shards(target, shard_examples, sum(shape), stop, bar)
        if target is not None and shards.finished(len(prompts)):
            return HeadScores.load(target)
        prepare, workers = _crew(model, ray, stack)
        prepare = partial(prepare, prompts, ablation, method)
        job = _prepare(prepare, batch_tokens, manifest, known)
        if target is not None:
            runs.write_manifest(target, manifest)
        if screen is not None:
            table = stages.screened(workers, job, prompts, shards, screen)
        else:
            job = replace(job, method="exact" if method == "exact" else "attribution")
            table = shards.run(workers(job), prompts, "scoring heads")
    return HeadScores.from_table(table, manifest)


def _begin(target: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Start or go on; returns what an earlier start of the same run measured."""
    known = runs.read_manifest(target) if (target / runs.MANIFEST).exists() else {}
    manifest |= {key: known[key] for key in ("engine", "noise", "batch_tokens") if key in known}
    runs.start(target, manifest)
    return known


def _crew(
    model: TransformerBridge, ray: RayOptions | None, stack: ExitStack
) -> tuple[Callable[..., Prepared], Callable[[Job], stages.Worker]]:
    """Whoever gets ready for a run and does its jobs: this process, or workers far away."""
    if ray is None:
        return partial(check.prepare, model), partial(stages.Local, model)
    stack.enter_context(cluster.connect(ray))
    crew = stack.enter_context(Crew(model, ray))
    return crew.prepare, crew.worker


def _prepare(
    prepare: Callable[[int | None, dict[str, Any]], Prepared],
    batch_tokens: int | None,
    manifest: dict[str, Any],
    known: dict[str, Any],
) -> Job:
    """What `check.prepare` finds, in the manifest too; the noise is measured once a run."""
    prepared = prepare(batch_tokens, known)
    for line in _notes(prepared.engine):
        tqdm.write(line, file=sys.stderr)
    manifest |= {"engine": prepared.engine.record(), "batch_tokens": prepared.job.batch_tokens}
    if prepared.noise is not None:
        manifest["noise"] = prepared.noise
    return prepared.job


def _notes(engine: Engine) -> Iterator[str]:
    if engine.passed_over:
        yield f"engine: {engine.name}, since " + "; ".join(engine.passed_over)
    if engine.name == REFERENCE:
        yield (
            "the fast engine isn't right for this model on these prompts; scoring by the "
            "reference, one whole pass a head"
        )


def _check_request(
    examples: Sequence[Example], ablation: str, method: str, screen: Screen | None
) -> None:
    if not examples:
        raise InputError("no examples to score")
    for name, value, kinds in (("ablation", ablation, Ablation), ("method", method, Method)):
        if value not in get_args(kinds):
            raise InputError(f"{name} must be {' or '.join(get_args(kinds))}, got {value!r}")
    if screen is not None and method != "screened":
        raise InputError(f"`screen` is for method screened, and the method is {method}")


def _check_unique(examples: Sequence[Example]) -> None:
    seen: set[str] = set()
    for example in examples:
        if example.name in seen:
            raise InputError(f"{example.name} is given twice; an example is scored once")
        seen.add(example.name)


def data_digest(prompts: Sequence[Prompt], aspect: str | None = None) -> str:
    """What tells these prompts from others: the data as the model sees it.

    The token ids follow from profile, retrieval, template and budget alike.

    Args:
        prompts: With their targets.
        aspect: The aspect of the target that counts, where it isn't the whole.
    """
    data: list[Any] = [(p.example.name, p.example.user, p.ids, p.target_ids) for p in prompts]
    if aspect is not None:
        data = [(row, p.scored) for row, p in zip(data, prompts, strict=True)]
    return runs.digest(data)


def _manifest(
    model: TransformerBridge,
    prompts: Sequence[Prompt],
    settings: PromptSettings,
    ablation: Ablation,
    method: Method,
    shard_examples: int,
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "settings": {
            **describe(model),
            "method": method,
            "ablation": ablation,
            "prompt": asdict(settings),
            "examples": len(prompts),
            "data_sha256": data_digest(prompts, settings.aspect),
            "shard_examples": shard_examples,
        },
        "truncation": truncation(prompts),
        "units": "nats/token",
        "sign": "ablated - full",
        "command": runs.command(),
        "versions": {name: version(name) for name in PACKAGES},
        "threads": torch.get_num_threads(),
    }
