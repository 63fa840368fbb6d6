"""Which heads of a top K are found again when the users are drawn anew."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from workbench.analysis.agreement import by_layer, layer_chance, scored_pcs, top_members
from workbench.errors import InputError
from workbench.heads import chance_jaccard, jaccard_of, top_k
from workbench.scores import By, HeadScores

FIRM = 0.95


def recurrence(
    scores: HeadScores, k: int, by: By = "task", draws: int = 500, seed: int = 0
) -> xr.Dataset:
    """How often each head is in the top K of users drawn with replacement.

    A resample's scores scatter around those of the sample as the sample's scatter around the
    truth, but the gaps between heads in the sample are themselves partly luck. So the share is
    how firmly these examples put a head into the set, not the probability that it belongs there,
    and two fresh samples overlap by somewhat less than two resamples do: `by_examples` has the
    overlap of disjoint halves.

    Args:
        scores: PCS per example, of all heads.
        k: Size of the sets.
        by: A set each `task`, each `user`, or of `all`. Within a user examples are drawn.
        draws: Resamples.
        seed: Seed of the draws.

    Returns:
        `share[group, layer, head]` of the resamples, NaN where there is no head, and everywhere
        in a group with a single user; `member`, 1 for the heads of the top K of all examples;
        `firm[group]`, how many heads are in at least 95 % of resamples; `overlap`, mean Jaccard
        of two resamples, and `layer_chance`, that of random heads with as many in each layer;
        `ties`, heads that the tie rule shut out of the top K; `examples` and
        `users`. The attribute `chance` is the overlap of random sets of any heads.

    Raises:
        InputError: No head was scored, K is outside the model, or there are fewer than two draws.
    """
    if draws < 2:
        raise InputError(f"recurrence needs 2 draws or more, got {draws}")
    pcs = scored_pcs(scores, k, "recurrence")
    exists: NDArray[np.bool_] = np.asarray(~np.isnan(pcs).all(axis=0))
    users = scores.data["user"].values
    columns: dict[str, list] = {}
    for rows in scores.groups(by).values():
        units = rows if by == "user" else users[rows]
        found = _of_group(pcs[rows], units, exists, k, draws, seed)
        found |= {"examples": len(rows), "users": len(set(users[rows]))}
        for name, value in found.items():
            columns.setdefault(name, []).append(value)
    cells = dict.fromkeys(("share", "member"), ("group", "layer", "head"))
    heads = int(exists.sum())
    return xr.Dataset(
        {name: (cells.get(name, "group"), np.array(each)) for name, each in columns.items()},
        coords={
            "group": list(scores.groups(by)),
            "layer": np.arange(exists.shape[0]),
            "head": np.arange(exists.shape[1]),
        },
        attrs={
            "k": k,
            "by": by,
            "draws": draws,
            "seed": seed,
            "heads": heads,
            "firm_share": FIRM,
            "chance": chance_jaccard(k, heads),
        },
    )


def _of_group(
    pcs: NDArray[np.float64],
    units: NDArray,
    exists: NDArray[np.bool_],
    k: int,
    draws: int,
    seed: int,
) -> dict[str, object]:
    mean = pcs.mean(axis=0)
    row: dict[str, object] = {
        "share": np.full(mean.shape, np.nan),
        "member": np.where(exists, top_members(mean[None], k).reshape(mean.shape), np.nan),
        "firm": math.nan,
        "overlap": math.nan,
        "layer_chance": math.nan,
        "ties": top_k(mean, k).ties,
    }
    means = resampled_means(pcs, units, draws, seed)
    if means is None:
        return row
    members = top_members(means, k)
    share = members.mean(axis=0, dtype=np.float64).reshape(mean.shape)
    layers = exists.sum(axis=1).tolist()
    taken = by_layer(members, len(layers))
    pairs = jaccard_of(members, members)[np.triu_indices(draws, k=1)]
    return row | {
        "share": np.where(exists, share, np.nan),
        "firm": float((share >= FIRM).sum()),
        "overlap": float(pairs.mean()),
        # Each with the next: all pairs would take long in a large model, and say the same.
        "layer_chance": float(np.mean([layer_chance(a, b, layers) for a, b in pairwise(taken)])),
    }


def resampled_means(
    pcs: NDArray[np.float64], units: NDArray, draws: int, seed: int
) -> NDArray[np.float64] | None:
    """Mean scores of users drawn with replacement, the same users for the same seed.

    Args:
        pcs: [example, ...].
        units: [example], what is drawn whole: the user.
        draws: How many resamples.
        seed: Seed of the draws.

    Returns:
        [draw, ...]; None for a single unit, which can't be drawn otherwise.
    """
    _, index, counts = np.unique(units, return_inverse=True, return_counts=True)
    number = len(counts)
    if number < 2:
        return None
    sums = np.zeros((number, *pcs.shape[1:]))
    np.add.at(sums, index, pcs)
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(number, np.full(number, 1 / number), draws).astype(float)
    means = (weights @ sums.reshape(number, -1)) / (weights @ counts)[:, None]
    return means.reshape(draws, *pcs.shape[1:])


def lines(table: xr.Dataset) -> list[str]:
    """How many heads of each set are found again, a group a line."""
    k = table.attrs["k"]
    if k == table.attrs["heads"]:
        return [f"K = {k} is every head of the model: each is in every resample."]
    found = []
    unit = "example" if table.attrs["by"] == "user" else "user"
    for name in table["group"].values:
        row = table.sel(group=name)
        if math.isnan(float(row["firm"])):
            found.append(f"{name}: a single {unit}; which heads would be found again is unknown.")
            continue
        share = row["share"].values[row["member"].values == 1]
        tied = f" The tie rule shut out {int(row['ties'])}." if int(row["ties"]) else ""
        found.append(
            f"{name}: of the top {k} heads {int(row['firm'])} in at least "
            f"{table.attrs['firm_share']:.0%} of resamples of the {unit}s, "
            f"{int((share < 0.5).sum())} in fewer than half; two resamples' sets overlap by "
            f"{float(row['overlap']):.2f} (random heads in the same layers: "
            f"{float(row['layer_chance']):.2f}, any: {table.attrs['chance']:.2f}).{tied}"
        )
    return found
