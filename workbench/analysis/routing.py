"""Does routing users to head weights of their own add anything to one set for all (section 5)?

Whatever clusters gain must be gained over `global` and over `random-clusters`; whatever the
weights gain, over the two maps below it, which are those of the paper's figure 5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from tqdm.auto import tqdm

from workbench import stats
from workbench.analysis.answers import Answers
from workbench.analysis.arms import (
    ARMS,
    MAPS,
    RIVALS,
    ROUTED,
    Plan,
    RoutingSettings,
    plan_arms,
    random_maps,
    weight_map,
)
from workbench.analysis.sweep import beaten_draws
from workbench.data.examples import Example
from workbench.data.prompts import PromptSettings
from workbench.errors import InputError
from workbench.evaluation.metrics import Metric, get_metric, metrics_of
from workbench.heads import Gates, HeadSet
from workbench.models import heads_per_layer
from workbench.scores import HeadScores
from workbench.steering.contrast import DPS

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

ALPHA = 0.05
Asked = DPS | dict[str, DPS]


def routing_gain(
    model: TransformerBridge,
    scores: HeadScores,
    discovery: Sequence[Example],
    evaluation: Sequence[Example],
    settings: RoutingSettings | None = None,
    *,
    gamma: float = 0.5,
    draws: int = 5,
    seed: int = 0,
    max_new_tokens: int = 32,
    prompt: PromptSettings | None = None,
    folder: Path | str | None = None,
    batch_tokens: int = 16384,
    progress: bool = True,
) -> xr.Dataset:
    """Measure DPS under every arm, task by task, on users whom no weight comes from.

    Args:
        model: From `load_model`.
        scores: PCS of all heads on discovery users.
        discovery: The scored examples; clusters are made from their profiles.
        evaluation: What to answer, by other users; they are routed by their profiles alone.
        settings: How users are clustered, weighed and routed.
        gamma: Strength of the contrast in every arm; nothing is chosen here.
        draws: Of each random arm.
        seed: Of k-means, the draws and the bootstrap.
        max_new_tokens: Limit of new tokens of an answer.
        prompt: How prompts are built.
        folder: Keep every list of answers there; the same call then goes on where it stopped.
        batch_tokens: Most tokens of a batch, as of `generate`.
        progress: Show a bar on the terminal.

    Returns:
        For each `task` and `arm`: `value` of the task's first metric (the mean over draws),
        `gain` = value - plain, `edge` = value - global, each with `_low` and `_high`, 95 %
        intervals from resampled users, paired for differences; `gain_p` and `edge_p`, sign-flip p
        after Holm over arms and tasks; `draw_values[draw]`; `beaten`, how many draws of a random
        arm are worse than what they stand in for (`hard` for clusters, `global` for maps); and of
        the routed arms `entropy` (normalised, mean over users), `uniform`, `temperature` and
        `cosine`, of a user's weights with the clusters' mean. For each task: `clusters`, `sizes`,
        `idle`, clusters without a head of positive mean, whose users get the plain model,
        `heads`, how many `global` weighs, `discovery_users`, `examples`, `users`, `metric`,
        `better`. NaN where there is no such number.

    Raises:
        InputError: The scores are of another model, screened or lack a task; users are in both
            lists; there is no draw; or what `Router.fit` and `generate` refuse.

    Source:
        Section 5, figures 5 and 8 of the paper, which compares hard with soft routing only, and
        prints no interval.
    """
    settings = settings or RoutingSettings()
    tasks = _checked(model, scores, evaluation, draws)
    runs_ = len(tasks) * (len(ARMS) - len(RIVALS) + draws * len(RIVALS))
    place = Path(folder) if folder is not None else None
    parts = []
    with tqdm(total=runs_, desc="routing", unit="run", disable=not progress) as bar:
        for task in tasks:
            asked = [e for e in evaluation if e.task == task]
            plan = plan_arms(model, scores, discovery, asked, (settings, draws, seed))
            answers = Answers(model, asked, max_new_tokens, prompt, place, batch_tokens)
            parts.append(_measured(plan, answers, gamma, seed, bar))
    table = xr.concat(parts, dim="task").assign_coords(task=tasks)
    for name in ("gain_p", "edge_p"):
        table[name] = table[name].copy(data=_holm(table[name].values))
    fixed = {k: v for k, v in vars(settings).items() if v is not None}
    table.attrs.update(fixed, gamma=gamma, draws=draws, seed=seed, level=0.95)
    return table


def _checked(
    model: TransformerBridge, scores: HeadScores, evaluation: Sequence[Example], draws: int
) -> list[str]:
    shape = heads_per_layer(model)
    if scores.heads_per_layer != shape:
        raise InputError(
            f"the scores are of a model with {sum(scores.heads_per_layer)} heads in "
            f"{len(scores.heads_per_layer)} layers, this one has {sum(shape)} in {len(shape)}"
        )
    if draws < 1:
        raise InputError(f"the random arms need at least 1 draw, got {draws}")
    tasks = list(dict.fromkeys(example.task for example in evaluation))
    missing = set(tasks) - set(scores.data["task"].values.tolist())
    if not tasks or missing:
        raise InputError(
            f"no scores for {', '.join(sorted(missing)) or 'an empty list of examples'}"
        )
    shared = {e.user for e in evaluation} & set(scores.data["user"].values.tolist())
    if shared:
        raise InputError(
            f"{len(shared)} users, {sorted(shared)[0]} among them, are in the scores and in the "
            "evaluation; measure on other users"
        )
    return tasks


def _measured(plan: Plan, answers: Answers, gamma: float, seed: int, bar: Any) -> xr.Dataset:
    """Let every arm answer; arms that come to the same are asked once."""
    examples = answers.examples
    users = [example.user for example in examples]
    metric = get_metric(metrics_of(examples[0])[0])
    known: dict[Any, NDArray[np.float64]] = {}

    def measure(gates: Gates | dict[str, Gates] | None) -> NDArray[np.float64]:
        asked = _asked(gates, gamma)
        key = tuple(asked[u] for u in users) if isinstance(asked, dict) else (asked,) * len(users)
        if key not in known:
            texts = answers.texts(asked)
            known[key] = np.array(
                [metric.score(e, text) for e, text in zip(examples, texts, strict=True)]
            )
        bar.update()
        return known[key]

    values = {"plain": measure(None)[None]}
    for arm in ARMS[1:]:
        values[arm] = np.stack([measure(one) for one in plan.gates[arm]])
    draws = max(map(len, values.values()))
    columns = _compared(values, users, metric, seed)
    drawn = np.full((len(ARMS), draws), np.nan)
    for i, arm in enumerate(ARMS):
        if arm in RIVALS:
            drawn[i] = values[arm].mean(axis=1)
    return xr.Dataset(
        {
            **{name: ("arm", column) for name, column in columns.items()},
            "draw_values": (("arm", "draw"), drawn),
            **plan.known,
            "examples": len(examples),
            "users": len(set(users)),
            "metric": metric.label,
            "better": metric.better,
        },
        coords={"arm": list(ARMS), "draw": np.arange(draws)},
    )


def _asked(gates: Gates | dict[str, Gates] | None, gamma: float) -> Asked:
    if gates is None:
        return DPS(HeadSet(()))
    if isinstance(gates, Gates):
        return DPS(gates, gamma)
    return {user: DPS(one, gamma) for user, one in gates.items()}


def _compared(
    values: Mapping[str, NDArray[np.float64]], users: Sequence[str], metric: Metric, seed: int
) -> dict[str, list[float]]:
    """Columns [arm] from each arm's values [draw, example]."""
    columns: dict[str, list[float]] = {}
    means = {arm: drawn.mean(axis=0) for arm, drawn in values.items()}
    for arm, mean in means.items():
        found = {"value": stats.estimate(mean, users, seed=seed)}
        for name, base in (("gain", "plain"), ("edge", "global")):
            found[name] = stats.estimate(mean - means[base], users, seed=seed)
            same = arm == base or (name == "edge" and arm == "plain")
            p = np.nan if same else stats.sign_flip_p(mean - means[base], users, seed=seed)
            columns.setdefault(f"{name}_p", []).append(p)
        for name, one in found.items():
            for end, number in (("", one.mean), ("_low", one.low), ("_high", one.high)):
                columns.setdefault(name + end, []).append(number)
        rank = np.nan
        if arm in RIVALS:
            own = means[RIVALS[arm]].mean()
            rank = beaten_draws(own, values[arm].mean(axis=1), metric.better)
        columns.setdefault("beaten", []).append(float(rank))
    return columns


def _holm(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """Holm over all p values there are, [task, arm]; NaN stays."""
    adjusted = np.full_like(p, np.nan)
    there = ~np.isnan(p)
    adjusted[there] = stats.holm(p[there])
    return adjusted


def weight_controls(scores: HeadScores, table: xr.Dataset) -> xr.Dataset:
    """The weight maps behind three arms, with what DPS scores under each (paper figure 5).

    Args:
        scores: Those that the table was made from.
        table: From `routing_gain`.

    Returns:
        `weight[task, map, layer, head]` in [0, 1] of `global`, and of `random-weights` and
        `random-mask` in their first draw; NaN where a layer has no such head. The arms' columns
        `value`, `gain`, `edge` with their ends and p, as [task, map]: means over all draws.
        `metric`, `better`, `examples` and `users` of each task.

    Raises:
        InputError: The scores lack a task of the table.
    """
    attrs = table.attrs
    grids = []
    for task in table["task"].values.tolist():
        weights = weight_map(scores.select(tasks=[task]), attrs["share"], attrs["power"])
        maps = random_maps(weights, attrs["draws"], attrs["seed"], task)
        grids.append(np.stack([maps[name][0] for name in MAPS]))
    taken = [
        name + end
        for name, ends in (("value", ""), ("gain", "p"), ("edge", "p"))
        for end in ("", "_low", "_high", *(("_p",) if ends else ()))
    ]
    rows = table[[*taken, "metric", "better", "examples", "users"]].sel(arm=list(MAPS))
    found = rows.rename(arm="map")
    found["weight"] = (("task", "map", "layer", "head"), np.stack(grids))
    return found.assign_coords(
        layer=np.arange(grids[0].shape[1]), head=np.arange(grids[0].shape[2])
    )


def lines(table: xr.Dataset) -> list[str]:
    """Whether clusters and weights add anything, a few lines a task."""
    found = []
    for task in table["task"].values.tolist():
        part = table.sel(task=task)
        found.append(f"{task}: {_overview(part)}")
        found.append(f"{task}: {_routed(part)}")
        found += [f"{task}: {line}" for line in _uniform(part)]
        found.append(f"{task}: {_controls(part, table.attrs)}")
    return found


def _overview(part: xr.Dataset) -> str:
    clusters = int(part["clusters"])
    values = ", ".join(
        f"{float(part['value'].sel(arm=arm)):.3f} {arm}" for arm in ("plain", "global", *ROUTED)
    )
    line = (
        f"{int(part['discovery_users'])} users in {clusters} cluster{'s' * (clusters > 1)} "
        f"({part['sizes'].item()}); {part['metric'].item()} ({part['better'].item()} is better) "
        f"{values}. {_against(part, 'global', 'gain', 'One global set', 'the plain model')}."
    )
    if int(part["idle"]):
        line += f" In {int(part['idle'])} of the clusters no head has a positive mean score."
    return line


def _effect(part: xr.Dataset, arm: str, name: str) -> int:
    """1 for better, -1 for worse, 0 where none is shown after correction."""
    row = part.sel(arm=arm)
    low, high, p = (float(row[name + end]) for end in ("_low", "_high", "_p"))
    if not p <= ALPHA or not (low > 0 or high < 0):
        return 0
    sign = 1 if part["better"].item() == "higher" else -1
    return sign if low > 0 else -sign


def _against(part: xr.Dataset, arm: str, name: str, what: str, base: str) -> str:
    row = part.sel(arm=arm)
    mean, low, high, p = (float(row[name + end]) for end in ("", "_low", "_high", "_p"))
    words = {1: "is better than", -1: "is worse than", 0: "shows no effect against"}
    span = "no interval: a single user"
    if not np.isnan(low):
        span = f"95 % interval {low:+.3f} to {high:+.3f}, Holm p {p:.2f}"
    return f"{what} {words[_effect(part, arm, name)]} {base} ({mean:+.3f}, {span})"


def _routed(part: xr.Dataset) -> str:
    if int(part["clusters"]) == 1:
        return (
            "with one cluster routing is the one global set; ask for smaller clusters to route "
            "at all."
        )
    effects = [_effect(part, arm, "edge") for arm in ROUTED]
    start = "routing is not shown to add anything to one global set"
    if max(effects) > 0:
        start = "routing adds to one global set"
    elif min(effects) < 0:
        start = "routing takes away from one global set"
    named = [_against(part, arm, "edge", arm, "it") for arm in ROUTED]
    return f"{start}: {'; '.join(named)}."


def _uniform(part: xr.Dataset) -> list[str]:
    found = []
    for arm in ROUTED[1:]:
        row = part.sel(arm=arm)
        if bool(row["uniform"]):
            found.append(
                f"{arm} routing is uniform to two digits (normalised entropy "
                f"{float(row['entropy']):.3f} at temperature {float(row['temperature']):.3g}): "
                "every user gets nearly the mean of all clusters (cosine "
                f"{float(row['cosine']):.4f})."
            )
        elif not np.isnan(float(row["entropy"])):
            found.append(
                f"{arm} routing has a normalised entropy of {float(row['entropy']):.2f} at "
                f"temperature {float(row['temperature']):.3g}."
            )
    return found


def _controls(part: xr.Dataset, attrs: Mapping[str, Any]) -> str:
    draws = int(attrs["draws"])
    clauses = []
    for arm, rival in RIVALS.items():
        row = part.sel(arm=arm)
        beaten = int(row["beaten"])
        chance = (1 + draws - beaten) / (1 + draws)
        clauses.append(
            f"{rival} beats {beaten} of {draws} draws of {arm} (mean {float(row['value']):.3f}; "
            f"chance alone does as well with probability {chance:.2f})"
        )
    return f"controls: {'; '.join(clauses)}."
