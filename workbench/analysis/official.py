"""The authors' published scores: how far their head sets agree, their ties and resolution."""

from __future__ import annotations

import math

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from workbench.analysis.agreement import spearman
from workbench.data.official import Official, OfficialGroup
from workbench.errors import InputError
from workbench.heads import chance_jaccard, jaccard_matrix

# Steps are powers of two, as those of floating point are, from 1 to below a float32's own.
FINEST = 24
# Sums of steps, printed as decimal means and multiplied out again.
ROUNDING = 1e-6


def official_overlap(official: Official, task: str) -> xr.Dataset:
    """Overlap and rank correlation of a task's published groups (paper figure 7).

    Groups share examples: where per-example scores were published, a small group's example can
    be found in a larger one by its scores of all heads. Such groups agree partly by construction.

    Args:
        official: From `read_official`.
        task: One of its tasks.

    Returns:
        `jaccard[group, other]` of the published sets; `spearman[group, other]` of mean scores,
        average ranks for ties; `shared[group, other]`, how many of the group's examples have the
        same scores of all heads in the other, NaN where either wasn't published. A group:
        `examples`; `k` selected heads; `strictly_above`, heads above the score of the last one
        selected, `at_cut`, heads that have this score, and `ties`, those of them that were shut
        out; `scores`, published per-example scores; `resolution`, the largest step of which all
        of them are multiples, and `share_zero` and `share_32`, the shares that are 0 and
        multiples of 1/32; `sum_resolution`, the step of mean times examples, which all groups
        have. Nats per target token; NaN where nothing was published or there is no step. The
        attribute `chance` is the overlap of random sets. The files name no user.

    Raises:
        InputError: There is no such task.

    Source:
        `headset_jaccard.csv` and `pcs_spearman.csv` of the authors, in every printed digit.
    """
    if task not in official.tasks:
        known = ", ".join(official.tasks)
        raise InputError(f"no task {task} in these files; there is {known}")
    groups = list(official.tasks[task].values())
    means = np.stack([group.mean for group in groups])
    sets = [group.top for group in groups]
    columns: dict[str, list[float | int]] = {}
    for group in groups:
        for name, value in _row(group).items():
            columns.setdefault(name, []).append(value)
    names = [group.name for group in groups]
    square = ("group", "other")
    heads = int((~np.isnan(means[0])).sum())
    return xr.Dataset(
        {
            "jaccard": (square, jaccard_matrix(sets)),
            "spearman": (square, spearman(means, means)),
            "shared": (square, _shared(groups)),
            **{name: ("group", values) for name, values in columns.items()},
        },
        coords={"group": names, "other": names},
        attrs={
            "task": task,
            "model": groups[0].model,
            "heads": heads,
            "chance": chance_jaccard(len(sets[0]), heads),
            "units": "nats/token",
        },
    )


def _row(group: OfficialGroup) -> dict[str, float | int]:
    cut = min(group.mean[head.layer, head.head] for head in group.top)
    each = np.array([]) if group.scores is None else group.scores[~np.isnan(group.scores)]
    return {
        "examples": group.examples,
        "k": len(group.top),
        "strictly_above": int((group.mean > cut).sum()),
        "at_cut": int((group.mean == cut).sum()),
        "ties": group.top.ties,
        "scores": each.size,
        "resolution": _step(each),
        "sum_resolution": _step(group.mean[~np.isnan(group.mean)] * group.examples),
        "share_zero": float((each == 0).mean()) if each.size else math.nan,
        "share_32": float((each * 32 % 1 == 0).mean()) if each.size else math.nan,
    }


def _step(values: NDArray[np.float64]) -> float:
    """The largest power of two, 1 at most, of which all values are multiples; NaN for none.

    All of nothing, or all 0, are multiples of any step: that says nothing, so NaN too.
    """
    if not values.any():
        return math.nan
    for finer in range(FINEST + 1):
        scaled = values * 2.0**finer
        if (np.abs(scaled - scaled.round()) <= ROUNDING).all():
            return float(2.0**-finer)
    return math.nan


def _shared(groups: list[OfficialGroup]) -> NDArray[np.float64]:
    """How many examples of a group have the same scores in another, [group, other]."""
    known = [None if g.scores is None else {row.tobytes() for row in g.scores} for g in groups]
    shared = np.full((len(groups), len(groups)), np.nan)
    for a, ours in enumerate(known):
        for b, theirs in enumerate(known):
            if ours is not None and theirs is not None:
                shared[a, b] = len(ours & theirs)
    return shared


def lines(table: xr.Dataset) -> list[str]:
    """What the published sets can bear, in words."""
    task = table.attrs["task"]
    found = [*_tie_lines(table), *_resolution_lines(table)]
    jaccard = table["jaccard"].values
    pairs = np.triu_indices(len(jaccard), k=1)
    if len(pairs[0]):
        low, high = jaccard[pairs].min(), jaccard[pairs].max()
        rho = table["spearman"].values[pairs]
        found.append(
            f"{task}: the published sets overlap by {low:.2f} to {high:.2f} (Jaccard; random sets "
            f"by {table.attrs['chance']:.2f}), and mean scores correlate at {np.nanmin(rho):.2f} "
            f"to {np.nanmax(rho):.2f} (Spearman)."
        )
    return [*found, *_shared_lines(table)]


def _tie_lines(table: xr.Dataset) -> list[str]:
    tied = table.sel(group=table["ties"].values > 0)
    if not tied.sizes["group"]:
        return [f"{table.attrs['task']}: no tie at the cut."]
    chosen = tied["k"].values - tied["strictly_above"].values
    worst = tied.isel(group=int(chosen.argmax()))
    return [
        f"{table.attrs['task']}: ties at the cut in {tied.sizes['group']} of "
        f"{table.sizes['group']} groups; the most in {worst['group'].item()}: "
        f"{int(worst['strictly_above'])} heads lie strictly above the score of the last of "
        f"{int(worst['k'])} and {int(worst['at_cut'])} have it, so that the tie rule alone chose "
        f"{int(chosen.max())} of the {int(worst['k'])}."
    ]


def _resolution_lines(table: xr.Dataset) -> list[str]:
    task, total = table.attrs["task"], int(table["scores"].sum())
    if not total:
        return [f"{task}: no per-example scores were published."]
    each = table.sel(group=table["scores"].values > 0)
    weights = each["scores"]
    zero, fine = (float(each[n].weighted(weights).mean()) for n in ("share_zero", "share_32"))
    # A group that is all 0 has no step, and is in no other's way.
    steps = each["resolution"].values[each["share_zero"].values < 1]
    grain = "have no common step"
    if not np.isnan(steps).any():
        grain = f"are multiples of {_fraction(steps.min())} nat" if len(steps) else "are 0"
    found = [
        f"{task}: all {total:,} published per-example scores {grain}; {fine:.0%} are multiples of "
        f"1/32, {zero:.0%} exactly 0."
    ]
    sums = table["sum_resolution"].values
    if not np.isnan(sums).any():
        found.append(
            f"{task}: in every group, mean times examples is a multiple of "
            f"{_fraction(sums.min())} nat, also where no per-example scores were published."
        )
    return found


def _fraction(step: float) -> str:
    return "1" if step == 1 else f"1/{round(1 / step):,}"


def _shared_lines(table: xr.Dataset) -> list[str]:
    names, shared = table["group"].values.tolist(), table["shared"].values
    found = [
        f"{int(shared[a, b])} of {int(table['examples'].values[a])} of {names[a]} in {names[b]}"
        for a in range(len(names))
        for b in range(a + 1, len(names))
        if shared[a, b] > 0
    ]
    if not found:
        return []
    return [
        f"{table.attrs['task']}: groups share examples (at least those with the same scores of all "
        f"heads), so that their sets agree partly by construction: {', '.join(found)}."
    ]
