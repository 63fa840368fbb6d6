"""Do two models share their heads?

A head has no identity across models: the same place means nothing after another seed, and there
is no same place in another shape. So models are held against each other in three ways.

1. By place, where the shapes are equal: overlap of the top K and rank correlation of all heads,
   beside what the same heads in another order within their layers would give. Depth alone makes
   two models alike; only what goes beyond that is about places.
2. By the best one-to-one matching of heads, by how their scores go together over the same
   examples. Some matching is always good, so the users of one model are permuted against the
   other's and matched again; and a matching found on half of the users is tried on the others.
3. By relative depth, for any two shapes: in which tenths of the depth the positive score lies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from workbench import stats
from workbench.analysis.depth import DEPTH, TENTHS, Array, Side, by_depth, reached, unit_ranks
from workbench.errors import InputError
from workbench.heads import chance_jaccard, check_k, jaccard, top_k
from workbench.scores import HeadScores

SPLITS = 10
PERMUTATIONS = 200
# Four users have 24 orders, of which one alone is below 5 %.
BLOCK = 4
PLACE = (
    *("jaccard", "jaccard_chance", "jaccard_layer", "jaccard_p"),
    *("spearman", "spearman_low", "spearman_high", "spearman_layer", "spearman_p"),
)
MATCH = (
    *("matched", "matched_chance", "matched_p", "matched_examples"),
    *("held_out", "any_pair"),
)


def transfer(
    a: HeadScores,
    b: HeadScores,
    k: int,
    names: tuple[str, str] = ("a", "b"),
    by: Literal["task", "all"] = "task",
    *,
    match: bool = True,
    permutations: int = PERMUTATIONS,
    level: float = 0.95,
    seed: int = 0,
) -> xr.Dataset:
    """Hold the scores of two models against each other.

    Args:
        a: PCS of one model.
        b: PCS of another, on examples of the same tasks.
        k: Size of the sets that are compared by place.
        names: What the models are called.
        by: One comparison a `task`, or one of `all` examples.
        match: Match heads over the same examples; False where the examples are others.
        permutations: Random orders that chance is estimated from.
        level: Coverage of the intervals.
        seed: Seed of the resampling and of the permutations.

    Returns:
        For each `group`, with NaN for what can't be had:

        - By place: `jaccard` of the top K beside `jaccard_chance`, of two random sets (exact),
          and `jaccard_layer`, heads permuted within their layers; `spearman` of all heads' means
          with its interval and `spearman_layer`. `_p` is the share of permutations within layers
          that reach the value.
        - By matching: `matched`, mean rank correlation over examples of the best one-to-one pairs
          of heads, `matched_chance` and `matched_p` with users permuted as wholes, among users
          of equally many examples: where they differ, users are cut to fewer, and these three
          are over `matched_examples`. Chance and p are NaN where no two users can change
          places. `held_out`, of pairs matched on half of the users, on the other half, and
          `any_pair`, the mean of all pairs there. Heads whose scores rise with the difficulty of
          an example go together in any two models: only `held_out` above `any_pair` says that
          they can be told apart.
        - By depth: `mass[model, depth]`, share of the positive mean score in each tenth of the
          depth, a layer's spread evenly over its part; `centre[model]`, its mean depth from 0
          to 1; `overlap`, the sum over tenths of the smaller share (1: alike), `overlap_chance`
          and `overlap_p` with the second model's layers in all orders (random ones from
          six layers on); `depth_rho`, rank correlation
          over tenths. Intervals from resampled users, basic for these two, which noise lowers.

    Raises:
        InputError: A run was screened or holds a NaN score, K is outside a model, the groups
            differ, or examples to be matched do.
    """
    pcs = [_checked(scores, k, name) for scores, name in zip((a, b), names, strict=True)]
    groups = [scores.groups(by) for scores in (a, b)]
    if set(groups[0]) != set(groups[1]):
        odd = sorted(set(groups[0]) ^ set(groups[1]))
        raise InputError(f"{', '.join(odd)}: scored by one of the two models only")
    if names[0] == names[1]:
        raise InputError(f"two models need two names, got {names[0]!r} twice")
    order = _same_examples(a, b) if match else None
    rows = []
    for name, first in groups[0].items():
        sides = [
            Side(pcs[0][first], a.data["user"].values[first]),
            Side(pcs[1][groups[1][name]], b.data["user"].values[groups[1][name]]),
        ]
        row: dict[str, Any] = dict.fromkeys((*PLACE, *MATCH), np.nan)
        rng = np.random.default_rng(seed)
        row |= by_depth(sides[0], sides[1], permutations, level, seed)
        if a.heads_per_layer == b.heads_per_layer:
            row |= by_place(sides[0], sides[1], k, permutations, level, rng)
        if order is not None:
            row |= by_matching(
                pcs[0][first], pcs[1][order[first]], sides[0].users, permutations, rng
            )
        row |= {"examples": len(first), "users": len(set(sides[0].users.tolist()))}
        rows.append(row)
    layers = [len(scores.heads_per_layer) for scores in (a, b)]
    attrs = {"k": k, "by": by, "level": level, "seed": seed, "layers": layers}
    return _table(rows, list(groups[0]), names, attrs)


def _checked(scores: HeadScores, k: int, name: str) -> Array:
    scores.need_all_heads("a comparison of models")
    pcs = scores.data["pcs"].values.astype(np.float64)
    exists = ~np.isnan(pcs).all(axis=0)
    if not exists.any() or np.isnan(pcs[:, exists]).any():
        raise InputError(f"{name}: some scores are NaN; score the heads again")
    check_k(k, int(exists.sum()))
    return pcs


def _same_examples(a: HeadScores, b: HeadScores) -> NDArray[np.intp]:
    """Where in the second run each example of the first is."""
    first, second = (scores.data["example"].values.tolist() for scores in (a, b))
    if set(first) != set(second):
        odd = sorted(set(first) ^ set(second))[0]
        raise InputError(
            f"heads are matched over the same examples, and {odd} is in one run only; score the "
            "same examples with both models, or compare without matching (match=False)"
        )
    place = {name: i for i, name in enumerate(second)}
    return np.array([place[name] for name in first])


# 1. By place


def by_place(
    a: Side, b: Side, k: int, permutations: int, level: float, rng: np.random.Generator
) -> dict[str, float]:
    """Overlap and rank correlation of two models of the same shape; `PLACE` of `transfer`."""
    there = ~np.isnan(a.mean)
    sets = top_k(a.mean, k), top_k(b.mean, k)
    found = stats.rank_correlation(a.pcs[:, there], a.users, b.pcs[:, there], b.users, level)
    values = {"jaccard": jaccard(*sets), "spearman": found.mean}
    members, ranks = _members(a.mean, k), unit_ranks(a.mean[there])
    drawn: dict[str, list[float]] = {name: [] for name in values}
    for _ in range(permutations):
        other = _within_layers(b.mean, rng)
        shared = (members & _members(other, k)).sum()
        drawn["jaccard"].append(float(shared / (2 * k - shared)))
        drawn["spearman"].append(float(ranks @ unit_ranks(other[there])))
    result = {
        "jaccard_chance": chance_jaccard(k, int(there.sum())),
        "spearman_low": found.low,
        "spearman_high": found.high,
    }
    for name, value in values.items():
        draws = np.array(drawn[name])
        result |= {
            name: value,
            f"{name}_layer": float(draws.mean()),
            f"{name}_p": reached(value, draws),
        }
    return result


def _members(mean: Array, k: int) -> NDArray[np.bool_]:
    held = np.zeros(mean.shape, dtype=bool)
    for head in top_k(mean, k):
        held[head.layer, head.head] = True
    return held


def _within_layers(mean: Array, rng: np.random.Generator) -> Array:
    other = mean.copy()
    for row in other:
        there = ~np.isnan(row)
        row[there] = rng.permutation(row[there])
    return other


# 2. By the best matching


def by_matching(
    a: Array, b: Array, users: NDArray[Any], permutations: int, rng: np.random.Generator
) -> dict[str, float]:
    """The best one-to-one pairs of heads over the same examples; `MATCH` of `transfer`.

    Args:
        a: Scores of one model, [example, layer, head].
        b: Scores of the other on the same examples in the same order.
        users: [example].
        permutations: Random orders of the second model's users, each as a whole.
        rng: Source of the orders and halves.

    Returns:
        Without `matched_chance` and `matched_p` where no two users can change places, and empty
        with fewer than three examples.
    """
    first, second = (_heads_by_example(pcs) for pcs in (a, b))
    if len(users) < 3:
        return {}
    blocks = exchangeable(users)
    kept = np.concatenate([block.ravel() for block in blocks]) if blocks else np.arange(0)
    if len(kept) < 3:
        kept, blocks = np.arange(len(users)), []
    # The value is of the same examples as its chance, or the two could not be compared.
    matched = _best(_correlations(first[:, kept], second[:, kept]))[0]
    result: dict[str, float] = {"matched": matched, "matched_examples": len(kept)}
    if blocks:
        drawn = [
            _best(_correlations(first[:, kept], second[:, shuffled(blocks, rng)]))[0]
            for _ in range(permutations)
        ]
        result["matched_chance"] = float(np.mean(drawn))
        result["matched_p"] = reached(matched, np.array(drawn))
    names = np.unique(users)
    # A correlation needs examples of two users or more on either side.
    if len(names) < 4:
        return result
    held = []
    for _ in range(SPLITS):
        half = np.isin(users, rng.permutation(names)[: len(names) // 2])
        pairs = _best(_correlations(first[:, half], second[:, half]))[1]
        other = _correlations(first[:, ~half], second[:, ~half])
        held.append((other[pairs].mean(), other.mean()))
    result["held_out"], result["any_pair"] = map(float, np.mean(held, axis=0))
    return result


def _heads_by_example(pcs: Array) -> Array:
    flat = pcs.reshape(len(pcs), -1).T
    return flat[~np.isnan(flat).any(axis=1)]


def _correlations(a: Array, b: Array) -> Array:
    """Rank correlation [head of a, head of b] over examples."""
    return unit_ranks(a) @ unit_ranks(b).T


def _best(correlations: Array) -> tuple[float, tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Mean of the best one-to-one pairs, and the pairs."""
    pairs = linear_sum_assignment(correlations, maximize=True)
    return float(correlations[pairs].mean()), pairs


def exchangeable(users: NDArray[Any]) -> list[NDArray[np.intp]]:
    """Users with equally many examples, who can change places as wholes.

    From the user with the most examples on, users make a block as soon as there are enough of
    them and the next has fewer; in a block all are cut to the first so many examples, as many as
    its last user has. The last few users are a block of their own; a single one goes into the
    block before, if that cuts off less than leaving him out.

    Args:
        users: [example].

    Returns:
        Blocks [user, example] of places in `users`; none of a single user.
    """
    rows = [np.flatnonzero(users == name) for name in np.unique(users)]
    rows.sort(key=len, reverse=True)
    blocks: list[list[NDArray[np.intp]]] = []
    for row in rows:
        last = blocks[-1] if blocks else []
        if not last or (len(last) >= BLOCK and len(row) < len(last[-1])):
            blocks.append([])
        blocks[-1].append(row)
    if len(blocks[-1]) == 1:
        (alone,) = blocks.pop()
        if blocks and len(blocks[-1]) * (len(blocks[-1][-1]) - len(alone)) < len(alone):
            blocks[-1].append(alone)
    return [np.stack([row[: len(block[-1])] for row in block]) for block in blocks]


def shuffled(blocks: Sequence[NDArray[np.intp]], rng: np.random.Generator) -> NDArray[np.intp]:
    """Places of all examples of the blocks in order, with the users of each block permuted."""
    return np.concatenate([block[rng.permutation(len(block))].ravel() for block in blocks])


def _table(
    rows: Sequence[dict[str, Any]], groups: list[str], names: tuple[str, str], attrs: dict[str, Any]
) -> xr.Dataset:
    columns: dict[str, Any] = {
        name: ("group", [row.get(name, np.nan) for row in rows])
        for name in (*PLACE, *MATCH, *DEPTH, "examples", "users")
    }
    for name, dims in (("mass", ("group", "model", "depth")), ("centre", ("group", "model"))):
        empty = np.full((2, TENTHS) if name == "mass" else 2, np.nan)
        for end in ("", "_low", "_high"):
            columns[name + end] = (dims, np.stack([row.get(name + end, empty) for row in rows]))
    coords = {"group": groups, "model": list(names), "depth": list(range(1, TENTHS + 1))}
    return xr.Dataset(columns, coords=coords, attrs=attrs)


def lines(table: xr.Dataset) -> list[str]:
    """What the two models share, in words with numbers."""
    found = []
    first, second = table["model"].values.tolist()
    matched = _adjusted(table, "matched_p")
    placed = _adjusted(table, "spearman_p")
    depths = _adjusted(table, "overlap_p")
    for i, group in enumerate(table["group"].values.tolist()):
        row = {name: float(table[name].values[i]) for name in (*PLACE, *MATCH, *DEPTH)}
        found.append(f"{group}: {_depth_words(row, depths[i], table, i)}.")
        if not np.isnan(row["spearman"]):
            found.append(
                f"{group}: heads at the same place correlate by {row['spearman']:+.2f} (rank; "
                f"95 % interval {row['spearman_low']:+.2f} to {row['spearman_high']:+.2f}), heads "
                f"in another order within their layers by {row['spearman_layer']:+.2f}: "
                f"{_state(placed[i], 'places agree beyond their layers', 'no agreement')}. "
                f"Top {table.attrs['k']}: Jaccard {row['jaccard']:.2f}, within layers "
                f"{row['jaccard_layer']:.2f}."
            )
        if not np.isnan(row["matched"]):
            sizes = int(table["examples"][i]), int(table["users"][i])
            text = (
                f"{group}: the best one-to-one pairs of heads of {first} and {second} correlate by "
                f"{row['matched']:.2f} over {_match_words(row, matched[i], *sizes)}."
            )
            if not np.isnan(row["held_out"]):
                text += (
                    f" Pairs found on half of the users correlate by {row['held_out']:.2f} on the "
                    f"other half, any two heads by {row['any_pair']:.2f}."
                )
            found.append(text)
    return found


def _adjusted(table: xr.Dataset, name: str) -> NDArray[np.float64]:
    """P after Holm over the groups; NaN stays."""
    p = table[name].values.astype(float)
    known = ~np.isnan(p)
    p[known] = stats.holm(p[known])
    return p


def _state(p: float, yes: str, no: str) -> str:
    return f"{yes} (p = {p:.3f})" if p < 0.05 else f"{no} shown beyond that (p = {p:.2f})"


def _match_words(row: dict[str, float], p: float, examples: int, users: int) -> str:
    if np.isnan(p):
        why = "a single user" if users < 2 else "too few examples of two users each"
        return f"{examples} examples; whether that is chance can't be told: {why}"
    kept = int(row["matched_examples"])
    text = "examples" if kept == examples else f"{kept} of {examples} examples, users cut alike"
    state = _state(p, "their scores go together", "no common course")
    return f"{text}, with users permuted by {row['matched_chance']:.2f}: {state}"


def _depth_words(row: dict[str, float], p: float, table: xr.Dataset, i: int) -> str:
    if np.isnan(row["overlap"]):
        return "in one of the models no head has a positive score, which so lies at no depth"
    centres = [
        f"{name} {middle:.2f}"
        for name, middle in zip(table["model"].values, table["centre"].values[i], strict=True)
    ]
    state = _state(p, "alike beyond an order of layers by chance", "no likeness")
    layers = table.attrs["layers"][1]
    if p >= 0.05 and layers < 5:
        state += f", and {layers} layers have only {math.factorial(layers)} orders"
    return (
        f"the positive score lies at a mean depth of {' and '.join(centres)} (0 input, 1 output) "
        f"and overlaps by {row['overlap']:.2f} over tenths of the depth, with layers permuted by "
        f"{row['overlap_chance']:.2f}: {state}"
    )
