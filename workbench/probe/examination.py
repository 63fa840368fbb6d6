"""The examination itself: scores, then step by step what can be made of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xarray as xr

from workbench import runs, tables
from workbench.analysis import verdict
from workbench.analysis.headline import headline
from workbench.data.examples import Example
from workbench.data.neutral import neutral_examples
from workbench.data.prompts import Prompt, build_prompts, truncation
from workbench.discovery.attended import attended
from workbench.discovery.cluster import RayOptions
from workbench.discovery.run import score_heads
from workbench.errors import InputError
from workbench.models import context_length, describe, heads_per_layer
from workbench.probe import results
from workbench.probe.results import Probe
from workbench.probe.settings import ProbeSettings
from workbench.probe.steps import STEPS
from workbench.probe.work import Work, whole
from workbench.scores import HeadScores
from workbench.steering.contrast import DPS
from workbench.steering.decode import generate

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

SAMPLES_A_TASK = 2
SHOWN_HEADS = 6
# What CircuitsVis still draws without delay, and what a reader still reads.
SHOWN_TOKENS = 1500


def probe(
    model: TransformerBridge,
    discovery: Sequence[Example],
    evaluation: Sequence[Example],
    folder: Path | str,
    settings: ProbeSettings | None = None,
    *,
    ray: RayOptions | None = None,
    progress: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> Probe:
    """Run the whole examination and write its numbers to a run folder.

    A step that can't be done with these examples, such as a stranger's profile where there is one
    user, is left out and named with the reason; the others go on.

    Args:
        model: From `load_model`.
        discovery: Examples of the users on whom heads are found.
        evaluation: Examples of other users, on whom everything else is measured.
        folder: The run folder. Scores are kept shard by shard and every step's table when it is
            done; the same call goes on.
        settings: What to do.
        ray: Score on the workers of a Ray cluster; all else is done here.
        progress: Show bars on the terminal.
        say: Told what begins, in a line.

    Raises:
        InputError: Anything is wrong with model, data or settings, or another process works in
            the folder; before long work.
    """
    settings = settings or ProbeSettings()
    folder = Path(folder)
    counts = settings.head_counts(sum(heads_per_layer(model)))
    lacking = {e.task for e in evaluation} - {e.task for e in discovery}
    if lacking:
        raise InputError(
            f"no discovery user has examples of {', '.join(sorted(lacking))}, on which heads are "
            "to be measured; take more users, or one task at a time"
        )
    neutral = neutral_examples(settings.neutral, settings.effort.neutral, settings.seed)
    prompts = {
        name: build_prompts(
            examples,
            model.tokenizer,
            context_length(model),
            settings.prompt,
            new_tokens=settings.max_new_tokens,
        )
        for name, examples in (("evaluation", evaluation), ("neutral", neutral))
    }
    with runs.hold(folder):
        say(f"Scoring {sum(heads_per_layer(model))} heads on {len(discovery)} examples")
        scores = score_heads(
            model,
            discovery,
            settings.ablation,
            prompt=settings.prompt,
            folder=folder,
            batch_tokens=settings.batch_tokens,
            ray=ray,
            progress=progress,
        )
        work = Work(
            model, discovery, evaluation, neutral, scores, folder, settings, counts, ray, progress
        )
        made_of = _made_of(work, prompts)
        left_out = _examine(work, made_of, say)
        say("Writing texts plain and steered")
        samples, attention = [], []
        try:
            samples = _samples(model, evaluation, scores, settings)
            attention = _attention(work, prompts["evaluation"])
        except InputError as error:
            left_out["texts" if not samples else "attention"] = str(error)
        result = Probe(scores, work.tables, samples, attention, {})
        summary = _summary(result, work, left_out)
        summary["truncation"] = {
            "discovery": scores.manifest["truncation"],
            **{name: truncation(built) for name, built in prompts.items()},
        }
        summary["evaluation_sha256"] = _digest(prompts["evaluation"])
        result = replace(result, summary=dict(tables.plain(summary)))
        _keep_heads(result, folder, settings)
        results.save(result, folder)
    return result


def _digest(prompts: Sequence[Prompt]) -> str:
    return runs.digest([(p.example.name, p.ids, p.target_ids) for p in prompts])


def _made_of(work: Work, prompts: dict[str, list[Prompt]]) -> list[Any]:
    """All that decides the tables, beside the step; batches only move roundings."""
    settings = {**asdict(work.settings), "batch_tokens": None}
    data = {name: _digest(built) for name, built in prompts.items()}
    for name, examples in (("discovery", work.discovery), ("evaluation", work.evaluation)):
        data[f"{name}, whole"] = whole(examples)
    made_of = work.scores.manifest["settings"]
    return [describe(work.model), made_of, data, settings, asdict(work.settings.effort)]


def _examine(work: Work, made_of: list[Any], say: Callable[[str], None]) -> dict[str, str]:
    """Make every step's table; returns why some could not be made."""
    left_out = {}
    steps = [step for step in STEPS if work.settings.depth in step.depths]
    for number, step in enumerate(steps, 1):
        say(f"[{number}/{len(steps)}] {step.title}")
        key = runs.digest([results.FORMAT, step.name, *made_of])
        lacking = [name for name in step.needs if name not in work.tables]
        if lacking:
            left_out[step.name] = f"needs {', '.join(lacking)}"
            continue
        try:
            make = partial(step.make, work)
            work.tables[step.name] = results.kept(work.folder, step.name, key, make)
        except InputError as error:
            left_out[step.name] = str(error)
            say(f"  left out: {error}")
    return left_out


def _summary(found: Probe, work: Work, left_out: dict[str, str]) -> dict[str, Any]:
    """The findings in words, as plain values for JSON."""
    findings: dict[str, list[str]] = {}
    for step in STEPS:
        if step.name in found.tables:
            findings.setdefault(step.section, []).extend(step.lines(found.tables[step.name], work))
    noise = verdict.noise_lines(found.scores.mean("task", seed=work.settings.seed))
    findings.setdefault("heads", []).extend(noise)
    if work.settings.ablation == "mean":
        findings.setdefault("controls", []).insert(
            0,
            "Heads are scored by mean ablation here; classes, lending and steering remove them "
            "whole (zero ablation).",
        )
    findings["origin"] = verdict.engine_lines(found.scores.manifest)
    return {
        "format": results.FORMAT,
        "headline": headline(found.tables, work.settings.k),
        "findings": findings,
        "left_out": left_out,
        "steps": {step.name: step.section for step in STEPS if step.name in found.tables},
        "model": found.scores.manifest["settings"]["model"],
        "users": {
            "discovery": len({example.user for example in work.discovery}),
            "evaluation": len({example.user for example in work.evaluation}),
            "inferred": any(example.inferred for example in work.discovery),
        },
        "k": work.settings.k,
        "settings": asdict(work.settings),
        "command": runs.command(),
        "samples": found.samples,
    }


def _samples(
    model: TransformerBridge,
    examples: Sequence[Example],
    scores: HeadScores,
    settings: ProbeSettings,
) -> list[dict[str, str]]:
    """A few texts plain and steered; the first examples of each task, not chosen by outcome."""
    heads = scores.top(settings.k, "task")
    result = []
    for task in dict.fromkeys(example.task for example in examples):
        asked = [example for example in examples if example.task == task][:SAMPLES_A_TASK]
        options: dict[str, Any] = {
            "max_new_tokens": settings.max_new_tokens,
            "prompt": settings.prompt,
            "batch_tokens": settings.pass_tokens,
        }
        plain = generate(model, asked, **options)
        steered = generate(model, asked, DPS(heads[task], settings.gamma), **options)
        result += [
            {
                "example": example.name,
                "user": example.user,
                "task": task,
                "query": example.query,
                "target": example.target,
                "plain": without.text,
                "steered": with_dps.text,
            }
            for example, without, with_dps in zip(asked, plain, steered, strict=True)
        ]
    return result


def _attention(work: Work, prompts: Sequence[Prompt]) -> list[xr.DataArray]:
    """What each task's highest heads look at in its first example that isn't too long to read."""
    found = []
    for task, heads in work.scores.top(min(SHOWN_HEADS, work.settings.k), "task").items():
        short = [
            p
            for p in prompts
            if p.example.task == task and len(p.ids) + len(p.target_ids) <= SHOWN_TOKENS
        ]
        if short:
            found.append(attended(work.model, short[0], heads))
    return found


def _keep_heads(result: Probe, folder: Path, settings: ProbeSettings) -> None:
    heads = {
        **{f"task-{name}": s for name, s in result.scores.top(settings.k, "task").items()},
        "all": result.scores.top(settings.k, "all")["all"],
    }
    (folder / "heads").mkdir(parents=True, exist_ok=True)
    for name, head_set in heads.items():
        head_set.save(folder / "heads" / f"{name}.json")
