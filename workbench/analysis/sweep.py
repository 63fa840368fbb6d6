"""Performance against the number of heads (paper figure 6), beside random heads and no heads.

Without the random control a sweep means nothing: decoding against any damaged model can help. At
every K the random sets have as many heads in each layer as the set they are held against.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from tqdm.auto import tqdm

from workbench import stats
from workbench.analysis.answers import Answers
from workbench.data.examples import Example
from workbench.data.prompts import PromptSettings
from workbench.data.tasks import get_task
from workbench.errors import InputError
from workbench.evaluation.metrics import get_metric, metrics_of
from workbench.evaluation.reading import readable
from workbench.heads import HeadSet, check_k, jaccard_matrix, random_matched
from workbench.models import heads_per_layer
from workbench.scores import HeadScores
from workbench.steering.contrast import DPS

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def sweep_head_count(
    model: TransformerBridge,
    examples: Sequence[Example],
    scores: HeadScores,
    k: Sequence[int],
    gamma: float = 0.5,
    *,
    draws: int = 5,
    seed: int = 0,
    max_new_tokens: int = 32,
    prompt: PromptSettings | None = None,
    folder: Path | str | None = None,
    batch_tokens: int = 16384,
    same_users: bool = False,
    progress: bool = True,
) -> xr.Dataset:
    """Measure DPS with each task's top K heads, for several K, against random heads.

    Args:
        model: From `load_model`.
        examples: What to answer, by users on whom no head was found.
        scores: PCS on other users; the sets are the top K of each task's mean.
        k: Numbers of heads.
        gamma: Strength of the contrast.
        draws: Random sets at each K, matched in number per layer.
        seed: Seed of the draws and of the bootstrap.
        max_new_tokens: Limit of new tokens of an answer.
        prompt: How prompts are built.
        folder: Keep every list of answers there; the same call then goes on where it stopped.
        batch_tokens: Most tokens of a batch, as of `generate`.
        same_users: Allow examples by users who are in the scores too; the result is marked.
        progress: Show a bar on the terminal.

    Returns:
        For each `task`, with its own metric: `plain`, `dps[k]`, `random[k]` (the mean over
        draws) and `gain[k]` = dps - plain, each with `_low` and `_high`, 95 % intervals from
        resampled users, paired for the gain; `edge[k]` = dps - random and `beaten[k]`, how many
        of the random sets DPS is better than; `random_draws[k, draw]`, the mean of each random
        set; `nested[k, other]`, Jaccard overlap of the sets for two K; `unreadable`, share of
        the plain answers that are no label or rating of the task (0 for texts).

    Raises:
        InputError: K is outside the model, the scores are of another model or lack a task, or
            users are in both.
    """
    ks = _checked(model, examples, scores, k, same_users)
    if draws < 1:
        raise InputError(f"the random control needs at least 1 draw, got {draws}")
    tasks = list(dict.fromkeys(example.task for example in examples))
    total = len(tasks) * (1 + len(ks) * (1 + draws))
    place = Path(folder) if folder is not None else None
    with tqdm(total=total, desc="sweeping", unit="run", disable=not progress) as bar:
        parts = [
            _task_sweep(
                model,
                [e for e in examples if e.task == task],
                {n: scores.select(tasks=[task]).top(n, "all")["all"] for n in ks},
                (gamma, draws, seed),
                (max_new_tokens, prompt, place, batch_tokens),
                bar,
            )
            for task in tasks
        ]
    table = xr.concat(parts, dim="task").assign_coords(task=tasks)
    table.attrs.update(
        gamma=gamma,
        draws=draws,
        seed=seed,
        level=0.95,
        heads_from="the same users" if same_users else "other users",
    )
    return table


def _checked(
    model: TransformerBridge,
    examples: Sequence[Example],
    scores: HeadScores,
    k: Sequence[int],
    same_users: bool,
) -> list[int]:
    shape = heads_per_layer(model)
    if scores.heads_per_layer != shape:
        raise InputError(
            f"the scores are of a model with {sum(scores.heads_per_layer)} heads in "
            f"{len(scores.heads_per_layer)} layers, this one has {sum(shape)} in {len(shape)}"
        )
    ks = sorted(set(k))
    if not ks:
        raise InputError("no number of heads K to sweep")
    for n in ks:
        check_k(n, sum(shape))
    missing = {e.task for e in examples} - set(scores.data["task"].values.tolist())
    if not examples or missing:
        raise InputError(
            f"no scores for {', '.join(sorted(missing)) or 'an empty list of examples'}"
        )
    shared = {e.user for e in examples} & set(scores.data["user"].values.tolist())
    if shared and not same_users:
        raise InputError(
            f"{len(shared)} users, {sorted(shared)[0]} among them, are in the scores and in the "
            "examples; measure on other users, or say same_users=True and the result is marked"
        )
    return ks


def _task_sweep(
    model: TransformerBridge,
    examples: list[Example],
    sets: dict[int, HeadSet],
    settings: tuple[float, int, int],
    writing: tuple[int, PromptSettings | None, Path | None, int],
    bar: Any,
) -> xr.Dataset:
    gamma, draws, seed = settings
    metric = get_metric(metrics_of(examples[0])[0])
    users = [example.user for example in examples]
    shape = heads_per_layer(model)
    answers = Answers(model, examples, *writing)

    def measure(heads: HeadSet) -> np.ndarray:
        texts = answers.texts(DPS(heads, gamma))
        bar.update()
        return np.array([metric.score(e, text) for e, text in zip(examples, texts, strict=True)])

    plain = measure(HeadSet(()))
    columns: dict[str, list[Any]] = {}
    drawn = []
    for n, heads in sets.items():
        rng = np.random.default_rng((seed, n))
        random = np.stack([measure(random_matched(heads, shape, rng)) for _ in range(draws)])
        drawn.append(random.mean(axis=1))
        dps = measure(heads)
        values = {"dps": dps, "random": random.mean(axis=0)}
        values["gain"] = dps - plain
        columns.setdefault("edge", []).append(float(dps.mean() - random.mean()))
        beaten = beaten_draws(dps.mean(), random.mean(axis=1), metric.better)
        columns.setdefault("beaten", []).append(beaten)
        for name, column in values.items():
            _add(columns, name, stats.estimate(column, users, seed=seed))
    base = stats.estimate(plain, users, seed=seed)
    answered = zip(examples, answers.texts(DPS(HeadSet(()))), strict=True)
    return xr.Dataset(
        {
            **{name: ("k", column) for name, column in columns.items()},
            "plain": base.mean,
            "plain_low": base.low,
            "plain_high": base.high,
            "random_draws": (("k", "draw"), np.stack(drawn)),
            "nested": (("k", "other"), jaccard_matrix(list(sets.values()))),
            "ties": ("k", [heads.ties for heads in sets.values()]),
            "heads": ("k", [str(heads) for heads in sets.values()]),
            "unreadable": float(np.mean([not readable(e, t) for e, t in answered])),
            "examples": len(examples),
            "users": len(set(users)),
            "metric": metric.label,
            "better": metric.better,
            "kind": get_task(examples[0].task).kind,
        },
        coords={"k": list(sets), "other": list(sets), "draw": np.arange(draws)},
    )


def beaten_draws(value: float, draws: np.ndarray, better: str) -> int:
    """How many random sets a value is strictly better than.

    The random sets are few and spread widely, so this rank is the test: were the heads no better
    than random ones, they would beat all n sets with probability 1 / (n + 1). An interval over
    users alone would call random sets different from each other.
    """
    sign = 1.0 if better == "higher" else -1.0
    # Means of the same numbers in another order must not count as a victory.
    return int((sign * (value - draws) > 1e-9).sum())


def _add(columns: dict[str, list[Any]], name: str, value: stats.Estimate) -> None:
    columns.setdefault(name, []).append(value.mean)
    columns.setdefault(f"{name}_low", []).append(value.low)
    columns.setdefault(f"{name}_high", []).append(value.high)
