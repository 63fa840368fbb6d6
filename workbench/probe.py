"""The main job: score heads, analyse, sweep, steer, and keep everything in one run folder."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import xarray as xr

from workbench import runs, tables
from workbench.analysis import verdict
from workbench.analysis.overlap import user_overlap
from workbench.analysis.profiles import profile_value
from workbench.analysis.sparsity import sparsity
from workbench.analysis.sweep import sweep_head_count
from workbench.data.examples import Example
from workbench.data.lamp import sample_users
from workbench.data.prompts import PromptSettings, build_prompts, truncation
from workbench.data.sources import load_examples
from workbench.discovery.cluster import RayOptions
from workbench.discovery.run import score_heads
from workbench.errors import InputError
from workbench.heads import HeadSet, check_k
from workbench.hooks import Ablation
from workbench.models import context_length, heads_per_layer
from workbench.scores import HeadScores
from workbench.steering.contrast import DPS
from workbench.steering.decode import generate

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

FORMAT = "workbench.probe/1"
SUMMARY = "summary.json"
PASS_TOKENS = 8192
SAMPLES_A_TASK = 2
EVAL_USERS = 40
DEFAULT_SWEEP = (1, 2, 4, 8, 16)
TABLES = ("profiles", "sparsity", "sweep")


@dataclass(frozen=True)
class ProbeSettings:
    """What a probe does.

    Attributes:
        k: Size of the head sets that overlap, steered texts and verdict are about.
        sweep_k: Numbers of heads of the sweep, to which k is added; by default 1, 2, 4, 8 and 16
            as far as the model goes.
        gamma: Strength of DPS. Fixed beforehand, not tuned.
        draws: Random head sets at each K.
        ablation: `zero` or `mean`.
        max_new_tokens: Limit of new tokens of an answer.
        seed: Seed of draws, bootstraps and random sets.
        prompt: How prompts are built.
        batch_tokens: Most tokens in a forward pass; by default scoring takes what the memory at
            hand allows, and everything else 8,192.
    """

    k: int = 8
    sweep_k: tuple[int, ...] | None = None
    gamma: float = 0.5
    draws: int = 5
    ablation: Ablation = "zero"
    max_new_tokens: int = 32
    seed: int = 0
    prompt: PromptSettings = field(default_factory=PromptSettings)
    batch_tokens: int | None = None

    def __post_init__(self) -> None:
        # Both refuse what they can't use; better now than after hours of scoring.
        DPS(HeadSet(()), self.gamma)
        if self.ablation not in get_args(Ablation):
            raise InputError(f"ablation must be zero or mean, got {self.ablation!r}")
        if self.draws < 1:
            raise InputError(f"the random control needs at least 1 draw, got {self.draws}")

    @property
    def pass_tokens(self) -> int:
        """Most tokens in a forward pass of what isn't scoring."""
        return self.batch_tokens or PASS_TOKENS

    def head_counts(self, heads: int) -> list[int]:
        """The sweep's K for a model with so many heads.

        Raises:
            InputError: A K that was asked for is outside the model.
        """
        asked = self.sweep_k
        for n in (self.k, *(asked or ())):
            check_k(n, heads)
        usual = [n for n in DEFAULT_SWEEP if n <= heads]
        return sorted({*(usual if asked is None else asked), self.k})


@dataclass(frozen=True)
class Probe:
    """Everything a probe found.

    Attributes:
        scores: PCS per example of the discovery users.
        overlap: `user_overlap` of those users.
        profiles: `profile_value` on the evaluation users.
        sparsity: `sparsity` a task.
        sweep: `sweep_head_count` on the evaluation users.
        samples: Texts side by side: example, user, task, query, target, plain, steered.
        summary: What `summary.json` holds: settings, truncation, findings in words.
    """

    scores: HeadScores
    overlap: xr.DataArray
    profiles: xr.Dataset
    sparsity: xr.Dataset
    sweep: xr.Dataset
    samples: list[dict[str, str]]
    summary: dict[str, Any]


def discovery_and_evaluation(
    source: str,
    split: str | None,
    root: Path | str | None,
    users: int | None,
    eval_users: int | None = None,
    seed: int = 0,
) -> tuple[list[Example], list[Example]]:
    """Examples of the users that heads are found on, and of other users to measure on.

    The testbed has a split for each. LaMP's users are divided by a draw from `seed`; with
    `users=None` all that are not drawn for evaluation serve for discovery. With `eval_users=None`
    40 serve for evaluation, or as many as are left; half of them if `users` is None too.

    Raises:
        InputError: Too few users for both.
    """
    if source == "testbed":
        found = load_examples(source, split or "discovery", root, users=users, seed=seed)
        other = "validation" if (split or "discovery") != "validation" else "test"
        others = load_examples(source, other, root)
        if eval_users is None:
            eval_users = min(EVAL_USERS, len({example.user for example in others}))
        return found, sample_users(others, eval_users, seed)
    examples = load_examples(source, split, root)
    names = list(dict.fromkeys(example.user for example in examples))
    if eval_users is None:
        left = len(names) // 2 if users is None else max(0, len(names) - users)
        eval_users = min(EVAL_USERS, left)
    wanted = len(names) - eval_users if users is None else users
    if wanted < 1 or eval_users < 1 or wanted + eval_users > len(names):
        raise InputError(
            f"{source} has {len(names)} users; {wanted} to find heads on and {eval_users} others "
            "to measure on don't fit in. Lower --users or --eval-users (both at least 1)"
        )
    drawn = random.Random(seed).sample(names, wanted + eval_users)
    first, second = set(drawn[:wanted]), set(drawn[wanted:])
    return [e for e in examples if e.user in first], [e for e in examples if e.user in second]


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

    Args:
        model: From `load_model`.
        discovery: Examples of the users on whom heads are found.
        evaluation: Examples of other users, on whom everything else is measured.
        folder: The run folder. Scores are kept shard by shard; the same call goes on.
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
    prompts = build_prompts(
        evaluation,
        model.tokenizer,
        context_length(model),
        settings.prompt,
        new_tokens=settings.max_new_tokens,
    )
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
        say(f"Measuring on {len(evaluation)} examples of other users")
        found = _measure(model, evaluation, scores, folder, settings, counts, progress)
        users = {
            "discovery": len({example.user for example in discovery}),
            "evaluation": len({example.user for example in evaluation}),
        }
        data = runs.digest([(p.example.name, p.ids, p.target_ids) for p in prompts])
        summary = _summary(found, settings, users, truncation(prompts))
        result = replace(found, summary={**summary, "evaluation_sha256": data})
        _keep(result, folder, settings)
    return result


def _measure(
    model: TransformerBridge,
    evaluation: Sequence[Example],
    scores: HeadScores,
    folder: Path,
    settings: ProbeSettings,
    counts: Sequence[int],
    progress: bool,
) -> Probe:
    """Everything after the scores; the summary is still empty."""
    return Probe(
        scores=scores,
        overlap=user_overlap(scores, settings.k, seed=settings.seed),
        profiles=profile_value(
            model,
            evaluation,
            prompt=settings.prompt,
            batch_tokens=settings.pass_tokens,
            seed=settings.seed,
        ),
        sparsity=sparsity(scores, seed=settings.seed),
        sweep=sweep_head_count(
            model,
            evaluation,
            scores,
            counts,
            settings.gamma,
            draws=settings.draws,
            seed=settings.seed,
            max_new_tokens=settings.max_new_tokens,
            prompt=settings.prompt,
            folder=folder,
            batch_tokens=settings.pass_tokens,
            progress=progress,
        ),
        samples=_samples(model, evaluation, scores, settings),
        summary={},
    )


def _summary(
    found: Probe,
    settings: ProbeSettings,
    users: dict[str, int],
    evaluation_cut: dict[str, int],
) -> dict[str, Any]:
    """The findings in words and the tables behind them, as plain values for JSON."""
    summary = {
        "format": FORMAT,
        "findings": {
            "profile": verdict.profile_lines(found.profiles),
            "heads": [
                *verdict.sparsity_lines(found.sparsity),
                *verdict.noise_lines(found.scores.mean("task", seed=settings.seed)),
            ],
            "users": [verdict.overlap_line(found.overlap.attrs)],
            "steering": verdict.sweep_lines(found.sweep, settings.k),
        },
        "truncation": {
            "discovery": found.scores.manifest["truncation"],
            "evaluation": evaluation_cut,
        },
        "model": found.scores.manifest["settings"]["model"],
        "computed": verdict.engine_lines(found.scores.manifest),
        "users": users,
        "tables": {
            "profiles": tables.records(found.profiles),
            "sparsity": tables.records(found.sparsity),
            "overlap": dict(found.overlap.attrs),
            "sweep": tables.records(found.sweep.drop_dims(["draw", "other"])),
        },
        "sweep": dict(found.sweep.attrs),
        "k": settings.k,
        "settings": asdict(settings),
        "command": " ".join(sys.argv),
        "samples": found.samples,
    }
    return dict(tables.plain(summary))


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


def _keep(result: Probe, folder: Path, settings: ProbeSettings) -> None:
    heads = {
        **{f"task-{name}": s for name, s in result.scores.top(settings.k, "task").items()},
        "all": result.scores.top(settings.k, "all")["all"],
    }
    (folder / "heads").mkdir(parents=True, exist_ok=True)
    for name, head_set in heads.items():
        head_set.save(folder / "heads" / f"{name}.json")
    for name in TABLES:
        tables.save(getattr(result, name), folder / "tables" / f"{name}.json")
    tables.save(result.overlap.to_dataset(), folder / "tables" / "overlap.json")
    runs.write_text(folder / SUMMARY, json.dumps(result.summary, indent=1, allow_nan=False) + "\n")


def load_probe(folder: Path | str) -> Probe:
    """Open what a finished probe wrote.

    Raises:
        InputError: The folder holds no finished probe, or one of another version.
    """
    folder = Path(folder)
    scores = HeadScores.load(folder)
    if not (folder / SUMMARY).is_file():
        raise InputError(f"{folder}: the probe isn't finished; run the same command again")
    summary = runs.read_json(folder / SUMMARY)
    found = summary.get("format") if isinstance(summary, dict) else None
    runs.check_format(folder / SUMMARY, found, FORMAT)
    read = {name: tables.load(folder / "tables" / f"{name}.json") for name in TABLES}
    overlap = tables.load(folder / "tables" / "overlap.json")["jaccard"]
    return Probe(scores, overlap, **read, samples=summary["samples"], summary=summary)
