"""How many examples a head set needs: sets from few examples against sets from many."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from workbench.analysis.agreement import (
    by_layer,
    ends,
    layer_chance,
    scored_pcs,
    spearman,
    top_members,
)
from workbench.errors import InputError
from workbench.heads import chance_jaccard, jaccard_of
from workbench.scores import By, HeadScores

COUNTS = (1, 2, 5, 10, 25, 50, 100, 200)
ALL = "all"


def by_examples(
    scores: HeadScores,
    k: int,
    counts: Sequence[int] = COUNTS,
    draws: int = 20,
    seed: int = 0,
    by: By = "task",
    by_users: bool = False,
) -> xr.Dataset:
    """Overlap of the top-K sets found from 1, 2, 5, … and all examples (paper figure 7).

    In each draw the examples are put in a random order, and a set is found from the first one,
    the first two, and so on. So a small subset is a part of every larger one and of `all`, and
    agrees with them partly by construction: `to_all` reaches 1 whatever the scores are. What
    another sample would have given is `apart`: the users are cut in two halves, and the set of a
    subset of the one is held against the set of the whole other half.

    The authors' figure is one draw of examples. With several examples a user, examples of one
    user are not independent: a sample of few users is worse than its number of examples says.
    `by_users` shows that: a user's examples then follow one another, so that a subset holds as few
    users as it can. The default takes examples whosever they are, as the figure does.

    Args:
        scores: PCS per example, of all heads.
        k: Size of the sets.
        counts: Numbers of examples; those that a group has not more of are left out.
        draws: Random orders to average over.
        seed: Seed of the orders.
        by: A matrix each `task`, each `user`, or `all`. Within a user halves are of examples.
        by_users: Whether the examples of a user are drawn together.

    Returns:
        With `count` and `other` the counts as text and `all` last: `jaccard[group, count, other]`
        and `spearman` of mean scores, means over draws, NaN where left out; `to_all[group, count]`
        and `apart`, Jaccard overlaps as said above, each with the `_low` and `_high` of 95 % of
        draws, which say how much one draw depends on luck and are no confidence interval;
        `apart_chance`, the overlap of random heads with as many in each layer as these sets have;
        `drawn_users`, mean number of users in a subset; `examples`, `users` and `left_out`, the
        counts left out, as text. The attribute `chance` is the overlap of random sets of any heads.
        Ends are         NaN with one draw, `apart` where half of the users have too few examples.

    Raises:
        InputError: No head was scored, K is outside the model, or a number is below 1.
    """
    counts = sorted(set(counts))
    if draws < 1 or not counts or counts[0] < 1:
        raise InputError(
            f"examples and draws are counted from 1, got counts {counts} and {draws} draws"
        )
    pcs = scored_pcs(scores, k, "a set from few examples")
    groups = scores.groups(by)
    kept = [c for c in counts if c < max(map(len, groups.values()))]
    users = scores.data["user"].values
    rng = np.random.default_rng(seed)
    each = [
        _drawn(_Group(pcs[rows], users[rows], by == "user", by_users, k), kept, draws, rng)
        for rows in groups.values()
    ]
    heads = int((~np.isnan(pcs).all(axis=0)).sum())
    square = dict.fromkeys(("jaccard", "spearman"), ("group", "count", "other"))
    labels = [*map(str, kept), ALL]
    skipped = [", ".join(str(c) for c in counts if c >= len(rows)) for rows in groups.values()]
    return xr.Dataset(
        {
            **{
                name: (square.get(name, ("group", "count")), np.stack([one[name] for one in each]))
                for name in each[0]
            },
            "examples": ("group", [len(rows) for rows in groups.values()]),
            "users": ("group", [len(set(users[rows])) for rows in groups.values()]),
            "left_out": ("group", skipped),
        },
        coords={"group": list(groups), "count": labels, "other": labels},
        attrs={
            "k": k,
            "by": by,
            "by_users": int(by_users),
            "draws": draws,
            "seed": seed,
            "heads": heads,
            "chance": chance_jaccard(k, heads),
        },
    )


@dataclass(frozen=True)
class _Group:
    """The scores of one group, and how they are drawn.

    Attributes:
        pcs: [example, layer, head].
        users: [example].
        single: Whether the group is one user, whose examples are then the units.
        by_users: Whether a user's examples follow one another.
        k: Size of the sets.
    """

    pcs: NDArray[np.float64]
    users: NDArray
    single: bool
    by_users: bool
    k: int

    @property
    def units(self) -> NDArray:
        """What halves are made of, [example]."""
        return np.arange(len(self.pcs)) if self.single else self.users

    def order(self, rows: NDArray, rng: np.random.Generator) -> NDArray:
        """The rows in a random order."""
        shuffled = rng.permutation(rows)
        if not self.by_users:
            return shuffled
        _, index = np.unique(self.users[shuffled], return_inverse=True)
        place = rng.permutation(index.max() + 1)
        return shuffled[np.argsort(place[index], kind="stable")]

    def halves(self, rng: np.random.Generator) -> tuple[NDArray, NDArray]:
        """The rows of two random halves of the users; the second is empty for a single one."""
        names = rng.permutation(np.unique(self.units))
        first = np.isin(self.units, names[: (len(names) + 1) // 2])
        return np.flatnonzero(first), np.flatnonzero(~first)

    def means(self, order: NDArray, counts: Sequence[int]) -> NDArray[np.float64]:
        """Mean scores of the first so many rows of an order, [count, layer, head]."""
        sums = np.cumsum(self.pcs[order], axis=0)
        return np.stack([sums[c - 1] / c for c in counts])


def _drawn(
    group: _Group, counts: Sequence[int], draws: int, rng: np.random.Generator
) -> dict[str, NDArray[np.float64]]:
    """The columns of one group, NaN at counts that it has not more examples than."""
    number, size = len(group.pcs), len(counts) + 1
    fit = [c for c in counts if c < number]
    # Counts rise, so those that fit come first; `all` is the last column whatever fits.
    places = [*range(len(fit)), size - 1]
    layers = (~np.isnan(group.pcs).all(axis=0)).sum(axis=1).tolist()
    squares = {name: np.full((draws, size, size), np.nan) for name in ("jaccard", "spearman")}
    names = ("to_all", "apart", "apart_chance", "drawn_users")
    rows = {name: np.full((draws, size), np.nan) for name in names}
    for draw in range(draws):
        order = group.order(np.arange(number), rng)
        means = group.means(order, [*fit, number])
        members = top_members(means, group.k)
        cells = (draw, *np.ix_(places, places))
        squares["jaccard"][cells] = jaccard_of(members, members)
        squares["spearman"][cells] = spearman(means, means)
        rows["to_all"][draw, : len(fit)] = squares["jaccard"][draw, : len(fit), -1]
        rows["drawn_users"][draw, places] = [
            len(set(group.users[order[:c]])) for c in (*fit, number)
        ]
        first, second = group.halves(rng)
        within = [c for c in fit if c <= len(first)]
        if within and len(second):
            few = top_members(group.means(group.order(first, rng), within), group.k)
            whole = top_members(group.pcs[second].mean(axis=0)[None], group.k)
            rows["apart"][draw, : len(within)] = jaccard_of(few, whole)[:, 0]
            taken = by_layer(np.concatenate([few, whole]), len(layers))
            rows["apart_chance"][draw, : len(within)] = [
                layer_chance(one, taken[-1], layers) for one in taken[:-1]
            ]
    columns = {name: values.mean(axis=0) for name, values in (squares | rows).items()}
    for name in ("to_all", "apart"):
        low, high = ends(rows[name]) if draws > 1 else (np.full(size, np.nan),) * 2
        columns |= {f"{name}_low": low, f"{name}_high": high}
    return columns


def lines(table: xr.Dataset) -> list[str]:
    """How far sets from few examples can be trusted, a group a line."""
    if table.attrs["k"] == table.attrs["heads"]:
        return [f"K = {table.attrs['k']} is every head of the model: all sets are equal."]
    return [_line(table.sel(group=name), table.attrs) for name in table["group"].values]


def _line(row: xr.Dataset, attrs: Mapping[str, Any]) -> str:
    units = "examples" if attrs["by"] == "user" else "users"
    name, examples = row["group"].item(), int(row["examples"])
    known = [c for c in row["count"].values.tolist()[:-1] if row["to_all"].sel(count=c).notnull()]
    if not known:
        return (
            f"{name}: {examples} example{'' if examples == 1 else 's'}, too few to hold the top "
            f"{attrs['k']} of fewer against."
        )
    found = []
    for count in dict.fromkeys((known[0], known[-1])):
        cell = row.sel(count=count)
        found.append(
            f"from {count} example{'' if count == '1' else 's'} by {float(cell['to_all']):.2f}"
        )
    text = (
        f"{name}: sets of {attrs['k']} heads overlap with the set from all {examples} examples, of "
        f"which theirs are a part, {' and '.join(found)}"
    )
    apart = [c for c in known if not math.isnan(float(row["apart"].sel(count=c)))]
    if not apart:
        return f"{text}; with an independent half they can't be compared: too few {units}."
    cell = row.sel(count=apart[-1])
    low, high = float(cell["apart_low"]), float(cell["apart_high"])
    spread = "" if math.isnan(low) else f", {low:.2f} to {high:.2f} in 95 % of draws"
    chance = float(cell["apart_chance"])
    shown = "" if low > chance else ": not shown to be above chance"
    return (
        f"{text}. With the other half of the {units} those from {apart[-1]} overlap by "
        f"{float(cell['apart']):.2f}{spread} (random heads in the same layers: {chance:.2f}, "
        f"any: {attrs['chance']:.2f}){shown}."
    )
