"""Are the heads that carry a preference found, where it is known which they are?

Two ways of finding them are held against the truth: the paper's, the K heads with the highest PCS,
which is told the right K; and the specific heads, those whose PCS is higher behind the user's own
profile than behind a stranger's after a correction for all heads, which is told nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from scipy.stats import binomtest

from workbench import stats
from workbench.errors import InputError
from workbench.heads import Head, HeadSet, top_k
from workbench.scores import HeadScores

COUNTS = (8, 16, 32, 64, 128)
METHODS = ("pcs", "specific")
COLUMNS = ("precision", "recall", "exact")


def recovery(
    pairs: Mapping[float, tuple[HeadScores, HeadScores]],
    planted: HeadSet,
    *,
    counts: Sequence[int] = COUNTS,
    draws: int = 10,
    level: float = 0.95,
    seed: int = 0,
) -> xr.Dataset:
    """Precision and recall of the planted heads, by number of examples and noise.

    Args:
        pairs: For each level of noise the scores behind the users' own profiles, and those of
            the same examples behind a stranger's.
        planted: The heads to be found.
        counts: Numbers of examples. Each is tried on groups of so many that share none.
        draws: Groups of each, at most.
        level: Coverage of all intervals.
        seed: Seed of the tests.

    Returns:
        For each (method, noise, count), means over draws: `precision`, the share of the found
        heads that are planted, over the draws that found any; `recall`, the share of the planted
        that are found; with `_low` and `_high` by resampling the draws, NaN where they are one or
        all the same. `exact`, the share of draws that found exactly the planted heads, with the
        Clopper-Pearson interval; `found`, how many heads; `draws`, and `users` of the first.
        Method `pcs` is the top K, K the number planted; `specific` are the heads whose mean PCS
        is higher behind the own profile, by the adjusted p of `stats.simultaneous` and beyond the
        noise floor.

    Raises:
        InputError: The two sides of a pair differ in model or examples, the runs are screened or
            of another model than the planted heads, or hold too few examples for a count.
    """
    _check(pairs, planted, counts, draws)
    shape = (len(METHODS), len(pairs), len(counts))
    names = [name + end for name in COLUMNS for end in ("", "_low", "_high")]
    values = {name: np.full(shape, np.nan) for name in (*names, "found")}
    tried, users = np.zeros(shape[1:], dtype=int), np.zeros(shape[1:], dtype=int)
    for row, (own, other) in enumerate(pairs.values()):
        for column, count in enumerate(counts):
            drawn = list(_draws(own, count, draws))
            sets = [_find(own, other, rows, len(planted), level, seed) for rows in drawn]
            tried[row, column] = len(drawn)
            users[row, column] = len(set(own.data["user"].values[drawn[0]].tolist()))
            for i, method in enumerate(METHODS):
                found = _summary([each[method] for each in sets], planted, level, seed)
                for name, value in found.items():
                    values[name][i, row, column] = value
    dims = ("method", "noise", "count")
    return xr.Dataset(
        {
            **{name: (dims, value) for name, value in values.items()},
            "draws": (dims[1:], tried),
            "users": (dims[1:], users),
        },
        coords={
            "method": list(METHODS),
            "noise": [float(noise) for noise in pairs],
            "count": list(counts),
        },
        attrs={"planted": str(planted), "k": len(planted), "level": level, "seed": seed},
    )


def _check(
    pairs: Mapping[float, tuple[HeadScores, HeadScores]],
    planted: HeadSet,
    counts: Sequence[int],
    draws: int,
) -> None:
    if not pairs or not counts or not len(planted) or draws < 1 or min(counts) < 1:
        raise InputError(
            "recovery needs scores, planted heads, numbers of examples and draws, got "
            f"{len(pairs)} levels of noise, {len(planted)} heads, counts {list(counts)} and "
            f"{draws} draws"
        )
    for noise, (own, other) in pairs.items():
        for scores in (own, other):
            scores.need_all_heads("recovery")
        planted.check(own.heads_per_layer)
        same = own.data["example"].values.tolist() == other.data["example"].values.tolist()
        weights = [s.manifest.get("settings", {}).get("weights") for s in (own, other)]
        if not same or weights[0] != weights[1] or own.heads_per_layer != other.heads_per_layer:
            raise InputError(
                f"noise {noise:g}: the two runs are of other examples or another model; score "
                "the same examples, once behind their own and once behind a stranger's profile"
            )
        if own.data.sizes["example"] < max(counts):
            raise InputError(
                f"noise {noise:g}: {own.data.sizes['example']} examples are scored, and "
                f"{max(counts)} are asked for; score more, or ask for fewer"
            )


def _draws(scores: HeadScores, count: int, most: int) -> Iterator[np.ndarray]:
    """Positions of groups of examples that share none, a user's examples together."""
    order = np.concatenate(list(scores.groups("user").values()))
    for start in range(0, min(most, len(order) // count) * count, count):
        yield order[start : start + count]


def _find(
    own: HeadScores, other: HeadScores, rows: np.ndarray, k: int, level: float, seed: int
) -> dict[str, HeadSet]:
    pcs, counter = (s.data["pcs"].values[rows].astype(np.float64) for s in (own, other))
    users = own.data["user"].values[rows]
    mean, _, _, p = stats.simultaneous(pcs - counter, users, level, seed)
    floor = own.noise_floor(len(rows)) + other.noise_floor(len(rows))
    # A comparison with NaN, where there is no such head or no test, is false.
    layers, heads = np.nonzero((p <= 1 - level) & (mean > floor))
    specific = tuple(Head(int(a), int(b)) for a, b in zip(layers, heads, strict=True))
    return {"pcs": top_k(pcs.mean(axis=0), k), "specific": HeadSet(specific)}


def _summary(
    sets: Sequence[HeadSet], planted: HeadSet, level: float, seed: int
) -> dict[str, float]:
    right = np.array([len(set(each) & set(planted)) for each in sets], dtype=np.float64)
    sizes = np.array([len(each) for each in sets], dtype=np.float64)
    exact = [each == planted for each in sets]
    share = binomtest(sum(exact), len(exact)).proportion_ci(level, method="exact")
    return {
        **_mean("precision", right[sizes > 0] / sizes[sizes > 0], level, seed),
        **_mean("recall", right / len(planted), level, seed),
        "exact": float(np.mean(exact)),
        "exact_low": float(share.low),
        "exact_high": float(share.high),
        "found": float(sizes.mean()),
    }


def _mean(name: str, values: np.ndarray, level: float, seed: int) -> dict[str, float]:
    """A mean over draws; draws that are all the same say nothing about their spread."""
    if not len(values):
        return {}
    if np.ptp(values) == 0:
        return {name: float(values[0])}
    found = stats.estimate(values, np.arange(len(values)), level, seed)
    return {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}


def lines(table: xr.Dataset) -> list[str]:
    """What each method finds of the planted heads, a level of noise and a method a line."""
    k = int(table.attrs["k"])
    found = [f"Planted are {k} heads: {table.attrs['planted']}."]
    words = {"pcs": f"the top {k} by PCS", "specific": "the specific heads"}
    for noise in table["noise"].values.tolist():
        for method in table["method"].values.tolist():
            part = table.sel({"method": method, "noise": noise})  # xarray's own `method`
            found.append(f"Noise {noise:g}, {words[method]}: {_line(part)}.")
    return found


def _line(part: xr.Dataset) -> str:
    counts = part["count"].values.tolist()
    # The smallest number from which on every draw of every larger one is exact, too.
    enough = None
    for count in reversed(counts):
        if float(part["exact"].sel(count=count)) < 1:
            break
        enough = count
    last = part.sel(count=counts[-1])
    if enough is None:
        precision = float(last["precision"])
        share = "nothing found" if np.isnan(precision) else f"precision {precision:.2f}"
        return (
            f"not exactly the planted ones in every draw; at {counts[-1]} examples {share} and "
            f"recall {float(last['recall']):.2f} over {_count(last)}"
        )
    row = part.sel(count=enough)
    return (
        f"exactly the planted ones from {enough} examples on, in all of {_count(row)} "
        f"(95 % interval of that share {float(row['exact_low']):.2f} to 1.00)"
    )


def _count(row: Any) -> str:
    number = int(row["draws"])
    return f"{number} draw{'' if number == 1 else 's'}"
