"""Do heads keep their part when the profile is further away, shorter, or behind earlier turns?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from scipy.stats import rankdata

from workbench import stats
from workbench.analysis.agreement import highest
from workbench.analysis.contexts import SHORT, Context, Kind, build_contexts, steps_of
from workbench.analysis.halves import set_gap
from workbench.batches import losses
from workbench.data.examples import Example
from workbench.data.prompts import PromptSettings, build_prompts
from workbench.discovery.cluster import RayOptions
from workbench.discovery.run import score_heads
from workbench.heads import check_k
from workbench.hooks import Ablation
from workbench.models import context_length, heads_per_layer
from workbench.scores import HeadScores

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

UNITS = {
    "distance": "strangers' items between the profile and the query",
    "length": "items of the profile shown",
    "turns": "earlier turns between the profile and the query",
}
ESTIMATES = ("nll", "top_pcs", "top_change", "profile_value", "value_change")


@dataclass(frozen=True)
class _Step:
    """One variant of all examples: scores of every head, and the loss without the profile."""

    scores: HeadScores
    bare: np.ndarray
    context: Context


def position(
    model: TransformerBridge,
    examples: Sequence[Example],
    kind: Kind,
    steps: Sequence[int] | None = None,
    k: int = 8,
    *,
    ablation: Ablation = "zero",
    prompt: PromptSettings | None = None,
    folder: Path | str | None = None,
    batch_tokens: int | None = None,
    ray: RayOptions | None = None,
    progress: bool = True,
    level: float = 0.95,
    seed: int = 0,
) -> xr.Dataset:
    """Score every head on the same examples in several contexts.

    Args:
        model: From `load_model`.
        examples: What to score.
        kind: What changes from step to step: `distance`, so many items of strangers between the
            user's own items and the query; `length`, only so many of the user's items; `turns`,
            so many earlier queries of the user with their gold answers between profile and query
            (lines of a plain prompt, real turns of a chat template). Users with too few queries
            for the largest number of turns are left out.
        steps: The numbers; by default 0, 1, 2, 4 strangers' items, 1, 2, 3 and all items that the
            prompt settings show, or 0 to 3 turns.
        k: Size of the head sets.
        ablation: As `score_heads` takes it.
        prompt: How prompts are built. Which of the user's own items are shown, and in what order,
            is decided once, for the unchanged example.
        folder: Keep a run folder a step in it; the same call then goes on where it stopped.
        batch_tokens: As `score_heads` takes it.
        ray: Score on the workers of a Ray cluster.
        progress: Show a bar on the terminal.
        level: Coverage of the intervals, as a fraction.
        seed: Of the strangers drawn, the halves and the resampling.

    Returns:
        For each `task` and `step`, in nats per target token where nothing else is said:

        - `nll`; `profile_value`, the loss without the user's items (and with all that stands
          between them and the query) minus `nll`; `top_pcs`, the mean PCS of the K heads that
          stand highest at the reference step, found on one half of the users and measured on the
          other, so that their place at the top is no luck of the measured examples. The
          reference is the first step, for `length` the last: attribute `reference`.
        - `value_change` and `top_change`, the paired differences to the reference step.
        - `jaccard` of the step's top K with the reference step's, and `spearman` of all heads.
          Users are resampled for both steps at once; a resample is noisier than the data, so
          these two intervals tend to lie low, and are stretched to hold the value. `gap` says
          whether the sets differ beyond noise, as in `workbench.analysis.halves`, with `gap_p`,
          Holm-adjusted over steps and tasks.
        - `prompt_tokens`, their mean, and `shortened`, the share of prompts of which the budget
          cut the ends of items off; `fewer_items[task]`, the share of examples of which some own
          items are left out at every step, since the largest has no room for them;
          `no_room[task]`, the number of examples left out at every step, since the largest has
          no room for one own item; `examples[task]`, `users[task]`, of those that are left.

        Each of the measures has `_low` and `_high`. The attribute `left_out` names tasks of which
        no example is left (with a single user there are no strangers), `left_out_why` says why.

    Raises:
        InputError: The kind is unknown, the steps are none or negative, K is outside the model,
            there are too few strangers or turns, or the largest step leaves no example room for
            an item of the user's own.
    """
    settings = prompt or PromptSettings()
    numbers = steps_of(kind, steps, settings)
    check_k(k, sum(heads_per_layer(model)))
    contexts = build_contexts(model, examples, kind, numbers, settings, seed)
    measured = []
    for number, context in zip(numbers, contexts, strict=True):
        scores = score_heads(
            model,
            context.examples,
            ablation,
            prompt=context.settings,
            folder=None if folder is None else Path(folder) / f"{kind}-{number}",
            batch_tokens=batch_tokens,
            ray=ray,
            progress=progress,
        )
        bare = build_prompts(
            context.without, model.tokenizer, context_length(model), context.settings
        )
        nll = losses(model, bare, batch_tokens or 8192).numpy()
        measured.append(_Step(scores, nll, context))
    return _table(measured, numbers, kind, (k, level, seed))


def _table(
    measured: Sequence[_Step], numbers: list[int], kind: str, asked: tuple[int, float, int]
) -> xr.Dataset:
    k, level, seed = asked
    tasks = list(measured[0].scores.groups("task"))
    reference = len(numbers) - 1 if kind == "length" else 0
    rows = [_task_rows(measured, task, reference, asked) for task in tasks]
    names = rows[0][0].keys()
    columns = {
        name: np.array([[cell[name] for cell in row] for row in rows], dtype=float)
        for name in names
    }
    known = ~np.isnan(columns["gap_p"])
    columns["gap_p"][known] = stats.holm(columns["gap_p"][known])
    groups = measured[0].scores.groups("task")
    users = measured[0].scores.data["user"].values
    first = measured[0].context
    fewer = np.array(first.fewer)
    return xr.Dataset(
        {
            **{name: (("task", "step"), values) for name, values in columns.items()},
            "examples": ("task", [len(groups[task]) for task in tasks]),
            "fewer_items": ("task", [float(fewer[groups[task]].mean()) for task in tasks]),
            "no_room": ("task", [first.no_room.get(task, 0) for task in tasks]),
            "users": ("task", [len(set(users[groups[task]].tolist())) for task in tasks]),
        },
        coords={"task": tasks, "step": numbers},
        attrs={
            "kind": kind,
            "axis": UNITS[kind],
            "reference": numbers[reference],
            "k": k,
            "level": level,
            "seed": seed,
            "units": "nats/token",
            "left_out": list(first.left_out),
            "left_out_why": list(first.left_out.values()),
            "heads_from": f"step {numbers[reference]}, the other half of the users",
        },
    )


def _task_rows(
    measured: Sequence[_Step], task: str, reference: int, asked: tuple[int, float, int]
) -> list[dict[str, float]]:
    """One task's cells, a step each."""
    k, level, seed = asked
    at = measured[0].scores.groups("task")[task]
    parts = [step.scores.select(tasks=[task]) for step in measured]
    users = parts[0].data["user"].values
    base = parts[reference]
    chosen = _other_half(base, k, seed)
    nll = [part.data["nll"].values.astype(float) for part in parts]
    value = [step.bare[at] - own for step, own in zip(measured, nll, strict=True)]
    top = [_mean_of(part, chosen) for part in parts]
    rows = []
    for i, step in enumerate(measured):
        series = (nll[i], top[i], top[i] - top[reference], value[i], value[i] - value[reference])
        row = _ends(dict(zip(ESTIMATES, series, strict=True)), users, level, seed)
        row |= _agreement(parts[i], base, asked)
        found = set_gap(base, parts[i], k, level, seed) if i != reference else None
        for name, source in (
            ("gap", "gap"),
            ("gap_low", "low"),
            ("gap_high", "high"),
            ("gap_p", "p"),
        ):
            row[name] = float("nan") if found is None else getattr(found, source)
        prompts = [step.context.prompts[j] for j in at]
        row["prompt_tokens"] = float(np.mean([len(one.ids) for one in prompts]))
        row["shortened"] = float(np.mean([one.shortened_items > 0 for one in prompts]))
        rows.append(row)
    return rows


def _ends(
    series: dict[str, np.ndarray], users: np.ndarray, level: float, seed: int
) -> dict[str, float]:
    row: dict[str, float] = {}
    for name, values in series.items():
        found = stats.estimate(values, users, level, seed)
        row |= {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}
    return row


def _other_half(scores: HeadScores, k: int, seed: int) -> np.ndarray:
    """For each example the top K heads of the half of the users that it isn't in.

    Returns:
        Membership [example, layer, head]; all False with a single user, who has no other half.
    """
    groups = scores.groups("user")
    pcs = scores.data["pcs"].values.astype(np.float64)
    chosen = np.zeros(pcs.shape, dtype=bool)
    names = np.random.default_rng(seed).permutation(list(groups))
    if len(names) < 2:
        return chosen
    halves = [np.concatenate([groups[n] for n in half]) for half in np.array_split(names, 2)]
    for mine, others in (halves, halves[::-1]):
        mean = pcs[others].mean(axis=0)
        best = highest(np.where(np.isnan(mean), -np.inf, mean).reshape(1, -1), k)
        chosen[mine] = best.reshape(mean.shape)
    return chosen


def _mean_of(scores: HeadScores, chosen: np.ndarray) -> np.ndarray:
    """Mean PCS of each example's chosen heads; NaN where none is chosen."""
    counts = chosen.sum(axis=(1, 2))
    sums = np.where(chosen, scores.data["pcs"].values, 0.0).sum(axis=(1, 2))
    return np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0)


def _agreement(
    part: HeadScores, base: HeadScores, asked: tuple[int, float, int]
) -> dict[str, float]:
    """Jaccard of the top K sets and rank correlation of all heads, users resampled for both."""
    k, level, seed = asked
    there = ~np.isnan(part.data["pcs"].values).any(axis=0)
    both = [one.data["pcs"].values[:, there].astype(np.float64) for one in (part, base)]
    users = part.data["user"].values

    def jaccard(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
        a, b = (highest(side, k) for side in np.split(sums, 2, axis=-1))
        return np.asarray((a & b).sum(axis=-1) / (a | b).sum(axis=-1))

    def spearman(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
        ranks = [rankdata(side, axis=-1) for side in np.split(sums, 2, axis=-1)]
        x, y = (rank - rank.mean(axis=-1, keepdims=True) for rank in ranks)
        scale = np.sqrt((x**2).sum(axis=-1) * (y**2).sum(axis=-1))
        # Scores that are all the same have no order.
        return np.asarray(
            np.divide(
                (x * y).sum(axis=-1), scale, out=np.full(scale.shape, np.nan), where=scale > 0
            )
        )

    row: dict[str, float] = {}
    for name, combine in (("jaccard", jaccard), ("spearman", spearman)):
        found = stats.bootstrap_statistic(np.concatenate(both, axis=1), users, combine, level, seed)
        row |= {
            name: found.mean,
            f"{name}_low": float(np.minimum(found.low, found.mean)),
            f"{name}_high": float(np.maximum(found.high, found.mean)),
        }
    return row


def lines(table: xr.Dataset) -> list[str]:
    """What a table of `position` says: of each task the step furthest from the reference."""
    steps, attrs = table["step"].values.tolist(), table.attrs
    furthest = max(steps, key=lambda step: abs(step - attrs["reference"]))
    said = []
    if furthest != attrs["reference"]:
        parts = [table.sel(task=task) for task in table["task"].values]
        said = [_line(part, furthest, attrs) + _missing(part) for part in parts]
    reasons = zip(attrs["left_out"], attrs["left_out_why"], strict=True)
    return said + [f"{task}, {SHORT[attrs['kind']]}: left out; {why}." for task, why in reasons]


def _missing(task: xr.Dataset) -> str:
    """A sentence about examples without room; empty where there are none."""
    gone = int(task["no_room"])
    every = gone + int(task["examples"])
    return f" Left out for want of room: {gone} of {every} examples." if gone else ""


def _line(task: xr.Dataset, step: int, attrs: dict[str, Any]) -> str:
    kind, reference, k = attrs["kind"], attrs["reference"], attrs["k"]
    row, base = task.sel(step=step), task.sel(step=reference)
    what = f"{task['task'].item()}, {SHORT[kind]}: {step} against {reference}"
    if float(row["prompt_tokens"]) == float(base["prompt_tokens"]):
        return f"{what}: the prompts are the same, no profile has more items."
    if int(row["users"]) < 2:
        return (
            f"{what}: the profile is worth {float(row['profile_value']):+.3f} nats per token; no "
            "interval: a single user."
        )
    value = _change(row, "value_change", "profile_value", "the profile is worth")
    top = _change(row, "top_change", "top_pcs", f"the top {k} heads' mean PCS is")
    line = f"{what}: {value}; {top}; the top {k} overlap by {float(row['jaccard']):.2f} (Jaccard)"
    if float(row["shortened"]) > 0:
        line += (
            f"; the budget shortened items in {float(row['shortened']):.0%} of the prompts "
            f"({float(base['shortened']):.0%} at {reference})"
        )
    if float(task["fewer_items"]) > 0:
        line += (
            f"; {float(task['fewer_items']):.0%} of the examples show fewer items at every step, "
            "for want of room"
        )
    if math.isnan(float(row["gap_low"])):
        return f"{line}, and whether the heads differ beyond noise can't be told."
    beyond = float(row["gap_low"]) > 0 and float(row["gap_p"]) <= 1 - attrs["level"]
    state = "differ beyond noise" if beyond else "are not shown to differ beyond noise"
    return f"{line}: the heads {state}."


def _change(row: xr.Dataset, change: str, measure: str, words: str) -> str:
    mean, low, high = (float(row[change + end]) for end in ("", "_low", "_high"))
    sign = int(low > 0) - int(high < 0)
    state = ("no change shown", "more", "less")[sign]
    return (
        f"{words} {float(row[measure]):+.3f} nats per token, {state} "
        f"({mean:+.3f}, 95 % interval {low:+.3f} to {high:+.3f})"
    )
