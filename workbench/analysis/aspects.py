"""PCS by what a target token is about, and whether two aspects use different heads.

A mean over the aspects of an example, weighted by their numbers of tokens, is the PCS over its
whole target: the aspects take it apart without a rest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from scipy.stats import rankdata

from workbench import stats
from workbench.analysis.halves import LEAST_RATIO, LEAST_USERS, set_gap
from workbench.data.aspects import STYLE, TOPIC, aspects_of, with_aspect
from workbench.data.examples import Example
from workbench.data.prompts import PromptSettings
from workbench.discovery.cluster import RayOptions
from workbench.discovery.run import score_heads
from workbench.errors import InputError
from workbench.heads import chance_jaccard, jaccard_matrix, rank, top_k
from workbench.hooks import Ablation
from workbench.scores import HeadScores

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

GROUPS: dict[str, tuple[str, ...]] = {"style": STYLE, "topic": TOPIC}
SURE = 0.01  # nats per token
PAIRS_TOLD = 3  # more pairs than this are summed up in one line


def aspect_scores(
    model: TransformerBridge,
    examples: Sequence[Example],
    aspects: Sequence[str] | None = None,
    *,
    ablation: Ablation = "zero",
    prompt: PromptSettings | None = None,
    folder: Path | str | None = None,
    batch_tokens: int | None = None,
    ray: RayOptions | None = None,
    progress: bool = True,
) -> dict[str, HeadScores]:
    """Score every head once for each aspect, on the examples whose target has it.

    Args:
        model: From `load_model`.
        examples: What to score.
        aspects: Of `workbench.data.aspects.ASPECTS`; all that the targets have by default.
        ablation: As `score_heads` takes it.
        prompt: How prompts are built; its own aspect is not heeded.
        folder: Keep a run folder an aspect in it; the same call then goes on where it stopped.
        batch_tokens: As `score_heads` takes it.
        ray: Score on the workers of a Ray cluster.
        progress: Show a bar on the terminal.

    Returns:
        Scores by aspect, in nats per token of that aspect.

    Raises:
        InputError: No target has an aspect that was asked for, or what `score_heads` refuses.
    """
    settings = prompt or PromptSettings()
    names = list(dict.fromkeys(aspects_of(examples) if aspects is None else aspects))
    parts = {name: with_aspect(examples, model.tokenizer, name) for name in names}
    empty = [name for name, part in parts.items() if not part]
    if empty or not parts:
        raise InputError(
            f"no target has a token of the aspect {', '.join(empty) or 'asked for'}; these "
            f"have {', '.join(aspects_of(examples)) or 'none'}"
        )
    return {
        name: score_heads(
            model,
            part,
            ablation,
            prompt=replace(settings, aspect=name),
            folder=None if folder is None else Path(folder) / name,
            batch_tokens=batch_tokens,
            ray=ray,
            progress=progress,
        )
        for name, part in parts.items()
    }


def grouped(
    scores: Mapping[str, HeadScores], groups: Mapping[str, Sequence[str]] | None = None
) -> dict[str, HeadScores]:
    """Aspects joined into larger ones, as if their tokens had been counted together.

    Args:
        scores: From `aspect_scores`.
        groups: Name -> its aspects, of which those that weren't scored are left out. By default
            the testbed's `style` and `topic` where it has them, and every other aspect as it is.

    Raises:
        InputError: No aspect of a group was scored.
    """
    if groups is None:
        groups = {g: names for g, names in GROUPS.items() if scores.keys() & set(names)}
        held = {name for names in groups.values() for name in names}
        groups |= {name: (name,) for name in scores if name not in held}
    found = {}
    for group, names in groups.items():
        parts = {name: scores[name] for name in names if name in scores}
        if not parts:
            raise InputError(
                f"{group}: none of its aspects ({', '.join(names)}) was scored, only "
                f"{', '.join(scores)}"
            )
        found[group] = parts[group] if list(parts) == [group] else _joined(parts)
    return found


def _joined(parts: Mapping[str, HeadScores]) -> HeadScores:
    """Means of several aspects, weighted by an example's tokens; one without an aspect has 0."""
    _check_comparable(parts)
    aligned = xr.concat(
        [part.data[["pcs", "nll", "target_tokens"]] for part in parts.values()],
        dim="aspect",
        join="outer",
        coords="minimal",
        compat="override",
    )
    tokens = aligned["target_tokens"].fillna(0)
    # A head that isn't there is NaN in every part, and stays so.
    share = tokens / tokens.sum("aspect")
    data = xr.Dataset(
        {
            name: (aligned[name] * share).sum("aspect", min_count=1).astype(np.float32)
            for name in ("pcs", "nll")
        }
    )
    data["pcs"] = data["pcs"].transpose("example", "layer", "head")
    data["target_tokens"] = tokens.sum("aspect").astype(np.int32)
    owner = {
        name: (user, task)
        for part in parts.values()
        for name, user, task in zip(
            *(part.data[c].values.tolist() for c in ("example", "user", "task")), strict=True
        )
    }
    order = list(owner)
    data = data.reindex(example=order).assign_coords(
        user=("example", [owner[name][0] for name in order]),
        task=("example", [owner[name][1] for name in order]),
    )
    first = next(iter(parts.values()))
    settings: dict[str, Any] = {**first.manifest.get("settings", {}), "examples": len(order)}
    settings["prompt"] = {**settings.get("prompt", {}), "aspect": "+".join(parts)}
    data.attrs.update(first.data.attrs)
    return HeadScores(data, {**first.manifest, "settings": settings})


def aspects(
    scores: Mapping[str, HeadScores], k: int = 8, level: float = 0.95, seed: int = 0
) -> xr.Dataset:
    """Compare the heads of several aspects.

    Args:
        scores: From `aspect_scores` or `grouped`.
        k: Size of the head sets.
        level: Coverage of the intervals, as a fraction.
        seed: Of the resampling and the halvings.

    Returns:
        - `pcs[aspect, layer, head]`, the mean, with `low`, `high` and `p`, adjusted for the
          number of heads (`stats.simultaneous`); `nll[aspect]` with `nll_low` and `nll_high`;
          nats per token of the aspect. `below_noise[aspect, layer, head]` where a mean is below
          `noise_floor[aspect]`, what sums in another order move it by.
        - `examples`, `users` and `tokens` of each aspect; `heads`, its top K, and `ties`.
        - `jaccard[aspect, other]` of the top K, `spearman[aspect, other]` of all heads' means.
        - Whether two aspects use different heads, from halves of the users
          (`workbench.analysis.halves`): `shared[aspect, other]`, the share of K that one half's
          set of the one and the other half's set of the other have in common (on the diagonal:
          of the same aspect); `gap[aspect, other]`, how far that falls short of what noise alone
          would leave, with `gap_low`, `gap_high` and `gap_p`, Holm-adjusted over the pairs.

    Raises:
        InputError: There is no aspect, the scores are of different models, heads were screened,
            or K is outside the model.
    """
    _check_comparable(scores)
    names = list(scores)
    shape = next(iter(scores.values())).heads_per_layer
    columns: dict[str, list[Any]] = {}
    for one in scores.values():
        for name, value in _aspect_row(one, k, level, seed).items():
            columns.setdefault(name, []).append(value)
    sets = columns.pop("heads")
    means = [mean[~np.isnan(mean)] for mean in columns["pcs"]]
    grid = ("aspect", "layer", "head")
    return xr.Dataset(
        {
            **{
                name: (grid if np.ndim(values[0]) else "aspect", np.stack(values))
                for name, values in columns.items()
            },
            "heads": ("aspect", np.array([str(heads) for heads in sets], dtype=object)),
            "jaccard": (("aspect", "other"), jaccard_matrix(sets, heads_per_layer=shape)),
            "spearman": (("aspect", "other"), _rank_correlations(means)),
            **_gaps(list(scores.values()), k, level, seed),
        },
        coords={
            "aspect": names,
            "other": names,
            "layer": np.arange(len(shape)),
            "head": np.arange(max(shape)),
        },
        attrs={
            "units": "nats/token",
            "k": k,
            "level": level,
            "seed": seed,
            "chance": chance_jaccard(k, sum(shape)),
        },
    )


def _aspect_row(scores: HeadScores, k: int, level: float, seed: int) -> dict[str, Any]:
    """What a table holds of one aspect by itself; `heads` is still a set."""
    users = scores.data["user"].values
    mean, low, high, p = stats.simultaneous(scores.data["pcs"].values, users, level, seed)
    nll = stats.estimate(scores.data["nll"].values, users, level, seed)
    heads = top_k(mean, k)
    floor = scores.noise_floor(nll.n)
    return {
        **{"noise_floor": floor, "below_noise": np.abs(mean) < floor},
        **{"pcs": mean, "low": low, "high": high, "p": p},
        **{"nll": nll.mean, "nll_low": nll.low, "nll_high": nll.high},
        **{"examples": nll.n, "users": nll.groups, "heads": heads, "ties": heads.ties},
        "tokens": int(scores.data["target_tokens"].values.sum()),
    }


def _check_comparable(scores: Mapping[str, HeadScores]) -> None:
    if not scores:
        raise InputError("no aspects to compare; score at least one")
    settings = {name: one.manifest.get("settings", {}) for name, one in scores.items()}
    first = next(iter(scores))
    for name, one in scores.items():
        one.need_all_heads("a comparison of aspects")
        for key in ("weights", "dtype", "ablation"):
            if settings[name].get(key) != settings[first].get(key):
                raise InputError(
                    f"{first} and {name} were scored with different {key}; score both with one "
                    "model in the same way"
                )
        if one.heads_per_layer != scores[first].heads_per_layer:
            raise InputError(f"{first} and {name} are scores of models with different heads")


def _rank_correlations(means: Sequence[np.ndarray]) -> np.ndarray:
    """Spearman's correlation of each two rows of means; NaN where one is constant."""
    ranks = np.stack([rankdata(mean) for mean in means])
    ranks -= ranks.mean(axis=1, keepdims=True)
    norms = np.sqrt((ranks**2).sum(axis=1))
    scale = np.outer(norms, norms)
    return np.divide(ranks @ ranks.T, scale, out=np.full_like(scale, np.nan), where=scale > 0)


def _gaps(scores: Sequence[HeadScores], k: int, level: float, seed: int) -> dict[str, Any]:
    count = len(scores)
    values = {
        name: np.full((count, count), np.nan)
        for name in ("shared", "gap", "gap_low", "gap_high", "gap_p")
    }
    for i in range(count):
        for j in range(i, count):
            found = set_gap(scores[i], scores[j], k, level, seed)
            values["shared"][[i, j], [j, i]] = found.across
            if i != j:
                row = {"gap": found.gap, "gap_low": found.low, "gap_high": found.high}
                for name, value in {**row, "gap_p": found.p}.items():
                    values[name][[i, j], [j, i]] = value
    pairs = np.triu_indices(count, k=1)
    p = values["gap_p"][pairs]
    p[~np.isnan(p)] = stats.holm(p[~np.isnan(p)])
    values["gap_p"][pairs] = values["gap_p"][pairs[::-1]] = p
    return {name: (("aspect", "other"), value) for name, value in values.items()}


def lines(table: xr.Dataset) -> list[str]:
    """What a table of `aspects` says: a line an aspect, then whether they use different heads.

    Many pairs are summed up in one line; style and topic have theirs in any case.
    """
    names = table["aspect"].values.tolist()
    found = [_aspect_line(table.sel(aspect=name)) for name in names]
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    if not pairs:
        return found
    if len(pairs) <= PAIRS_TOLD:
        return [*found, *(_pair_line(table, a, b) for a, b in pairs)]
    p = {(a, b): float(table["gap_p"].sel(aspect=a, other=b)) for a, b in pairs}
    alpha = 1 - table.attrs["level"]
    different = [
        pair
        for pair, value in p.items()
        if value <= alpha and table["gap"].sel(aspect=pair[0], other=pair[1]) > 0
    ]
    untold = sum(math.isnan(value) for value in p.values())
    line = (
        f"Different heads: of {len(pairs)} pairs of aspects the top {table.attrs['k']} of "
        f"{len(different)} differ beyond noise (Holm-adjusted over the pairs)"
    )
    line += f"; {untold} can't be judged." if untold else "."
    if different:
        a, b = max(different, key=lambda d: float(table["gap"].sel(aspect=d[0], other=d[1])))
        line += f" The widest gap: {_pair_line(table, a, b)}"
    asked = [_pair_line(table, *GROUPS)] if set(GROUPS) <= set(names) else []
    return [*found, *asked, line]


def _aspect_line(row: xr.Dataset) -> str:
    pcs = row["pcs"].values
    best = rank(pcs)[0]
    top, low, high = (float(row[name][best.layer, best.head]) for name in ("pcs", "low", "high"))
    line = (
        f"{row['aspect'].item()}: loss {float(row['nll']):.3g} nats per token "
        f"({int(row['tokens']):,} tokens of {int(row['users'])} users). "
    )
    if np.isnan(row["p"].values).all():
        few = "a single user" if int(row["users"]) < 2 else "too few users"
        return f"{line}The highest head is {best} with {top:+.2g}; no interval: {few}."
    if float(row["nll"]) < SURE:
        line += "The model is all but sure of these tokens: what scores it has are as small. "
    heads = int((~np.isnan(pcs)).sum())
    above = ~row["below_noise"].values
    helping, hurting = (
        (above & (row["low"].values > 0)).sum(),
        (above & (row["high"].values < 0)).sum(),
    )
    return line + (
        f"Of {heads} heads {helping} are shown to help and {hurting} to hurt, all tested together; "
        f"the highest is {best} with {top:+.2g} ({_ends(low, high)})."
    )


def _ends(low: float, high: float) -> str:
    """An interval; users who are alike but for a few may bound it on one side only, or on none."""
    if math.isnan(low) and math.isnan(high):
        return "no interval: too few users differ"
    if math.isnan(low) or math.isnan(high):
        return f"95 %: at {f'most {high:+.2g}' if math.isnan(low) else f'least {low:+.2g}'}"
    return f"95 % interval {low:+.2g} to {high:+.2g}"


def _pair_line(table: xr.Dataset, a: str, b: str) -> str:
    row = table.sel(aspect=a, other=b)
    own = [float(table["shared"].sel(aspect=name, other=name)) for name in (a, b)]
    k, low, high = table.attrs["k"], float(row["gap_low"]), float(row["gap_high"])
    line = (
        f"{a} and {b}: the top {k} overlap by {float(row['jaccard']):.2f} (Jaccard; "
        f"{table.attrs['chance']:.2f} by chance), all heads' ranks correlate at "
        f"{float(row['spearman']):+.2f}. "
    )
    if math.isnan(own[0]) or math.isnan(own[1]):
        return line + "How far noise alone parts them takes two users."
    line += (
        f"Between halves of the users {a} shares {own[0] * k:.1f} of {k} with itself, {b} "
        f"{own[1] * k:.1f}, and each with the other {float(row['shared']) * k:.1f}: "
    )
    if math.isnan(low):
        few = int(table["users"].min()) < LEAST_USERS
        why = (
            "an interval takes four users"
            if few
            else f"one is so noisy (less than {LEAST_RATIO:.0%} of the other's overlap above "
            "chance) that it can't be told"
        )
        return f"{line}{why}."
    state = "their heads are not shown to differ"
    if low > 0 and float(row["gap_p"]) <= 1 - table.attrs["level"]:
        state = "their heads differ beyond noise"
    span = f"gap {float(row['gap']):+.2f} of K, 95 % interval {low:+.2f} to {high:+.2f}"
    return f"{line}{state} ({span})."
