"""What DPS gains on users that nothing was chosen on, against the plain model and random heads.

1. Heads are ranked on discovery users (the scores).
2. K and gamma are chosen on validation users, by the task's own metric; equal values go to the
   smaller gamma and then to the smaller K, that is, to less steering.
3. The chosen setting, the plain model and random head sets (as many heads in each layer, the
   same gamma, which was not chosen for them) answer the test users' queries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from workbench import stats
from workbench.analysis.sweep import beaten_draws
from workbench.data.examples import Example
from workbench.errors import InputError
from workbench.evaluation.metrics import get_metric, metrics_of
from workbench.heads import HeadSet, random_matched
from workbench.models import heads_per_layer
from workbench.scores import HeadScores
from workbench.steering.contrast import DPS
from workbench.steering.decode import generate

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Measure = Callable[[Sequence[Example], HeadSet, float], np.ndarray]


def steering_gain(
    model: TransformerBridge,
    scores: HeadScores,
    validation: Sequence[Example],
    test: Sequence[Example],
    *,
    k: Sequence[int],
    gamma: Sequence[float],
    draws: int = 20,
    seed: int = 0,
    max_new_tokens: int = 32,
) -> xr.Dataset:
    """Choose K and gamma on validation users, and measure on test users.

    Returns:
        For each task: the chosen `k` and `gamma`, `heads`, `plain`, `dps`, `random` (mean over
        draws), `random_min` and `random_max` (over the means of the draws), `gain` = dps - plain,
        these with 95 % intervals from resampled users, `edge` = dps - random, `beaten` of the
        `draws`, `p`, sign-flip p of the gain after Holm over the tasks, `examples`, `users`.

    Raises:
        InputError: Two of the three groups share a user, or a task has no scores.
    """
    groups = {
        "discovery": set(scores.data["user"].values.tolist()),
        "validation": {example.user for example in validation},
        "test": {example.user for example in test},
    }
    for a, b in (("discovery", "validation"), ("discovery", "test"), ("validation", "test")):
        if shared := groups[a] & groups[b]:
            raise InputError(f"user {sorted(shared)[0]} is in {a} and in {b}; keep them apart")

    rows = []
    for task in dict.fromkeys(example.task for example in test):
        chosen = [e for e in validation if e.task == task]
        asked = [e for e in test if e.task == task]
        metric = get_metric(metrics_of(asked[0])[0])

        def measure(
            examples: Sequence[Example], heads: HeadSet, strength: float, score: Any = metric.score
        ) -> np.ndarray:
            contrast = DPS(heads, strength)
            answers = generate(model, examples, contrast, max_new_tokens=max_new_tokens)
            return np.array([score(answer.example, answer.text) for answer in answers])

        sign = 1.0 if metric.better == "higher" else -1.0
        sets = {n: scores.select(tasks=[task]).top(n, "all")["all"] for n in k}
        best = _choose(measure, chosen, sets, gamma, sign)
        shape = heads_per_layer(model)
        row = _test(measure, asked, sets[best[0]], best[1], draws, seed, shape, metric.better)
        rows.append({"task": task, "metric": metric.label, "better": metric.better, **row})
    adjusted = stats.holm([row["p"] for row in rows])
    for row, p in zip(rows, adjusted, strict=True):
        row["p"] = float(p)
    names = [name for name in rows[0] if name != "task"]
    return xr.Dataset(
        {name: ("task", [row[name] for row in rows]) for name in names},
        coords={"task": [row["task"] for row in rows]},
        attrs={"draws": draws, "seed": seed, "level": 0.95},
    )


def _choose(
    measure: Measure,
    examples: Sequence[Example],
    sets: dict[int, HeadSet],
    gammas: Sequence[float],
    sign: float,
) -> tuple[int, float]:
    """The (K, gamma) with the best mean; the first of equals, from less steering to more."""
    if not examples:
        raise InputError("no validation examples to choose K and gamma on")
    grid = [(n, strength) for strength in sorted(gammas) for n in sorted(sets)]
    means = [sign * measure(examples, sets[n], strength).mean() for n, strength in grid]
    return grid[int(np.argmax(means))]


def _test(
    measure: Measure,
    examples: Sequence[Example],
    heads: HeadSet,
    gamma: float,
    draws: int,
    seed: int,
    shape: Sequence[int],
    better: str,
) -> dict[str, Any]:
    users = [example.user for example in examples]
    rng = np.random.default_rng(seed)
    plain = measure(examples, HeadSet(()), 0.0)
    dps = measure(examples, heads, gamma)
    random = np.stack(
        [measure(examples, random_matched(heads, shape, rng), gamma) for _ in range(draws)]
    )
    result: dict[str, Any] = {"k": len(heads), "gamma": gamma, "heads": str(heads)}
    columns = {"plain": plain, "dps": dps, "random": random.mean(axis=0)}
    columns["gain"] = dps - plain
    for name, values in columns.items():
        found = stats.estimate(values, users, seed=seed)
        result |= {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}
    draw_means = random.mean(axis=1)
    result |= {"edge": float(dps.mean() - draw_means.mean())}
    result |= {"beaten": beaten_draws(dps.mean(), draw_means, better), "draws": draws}
    result |= {"random_min": float(draw_means.min()), "random_max": float(draw_means.max())}
    result["p"] = stats.sign_flip_p(dps - plain, users, seed=seed)
    return result | {"examples": len(examples), "users": len(set(users))}
