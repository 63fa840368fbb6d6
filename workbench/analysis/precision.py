"""How well cheaper scores find what exact ones find: screening and the gradient estimate."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from workbench.analysis.agreement import check_comparable, scored_pcs, spearman_pairs
from workbench.errors import InputError
from workbench.heads import top_k
from workbench.scores import By, HeadScores

# Batches in another order move a loss by far less than this, another text by far more.
SAME_LOSS = 0.1


def precision(
    exact: HeadScores, others: Mapping[str, HeadScores], k: int, by: By = "task"
) -> xr.Dataset:
    """Head sets of cheaper runs held against the exact run of the same examples.

    Both are facts about these examples, not estimates for others, so there is no interval.

    Args:
        exact: Exact scores of all heads.
        others: Runs of the same model and examples, by the name of their method: screened,
            attribution.
        k: Size of the sets; what a screened run was screened for, at most.
        by: A set each `task`, each `user`, or of `all`; a screened run has its own.

    Returns:
        `precision[run, group]`, the share of the run's top K that is in the exact top K;
        `spearman` of mean scores over the `compared` heads, those that the run has scores of
        on all of the group's examples; NaN for fewer than two. `ties[group]`, heads that share
        the exact score of the last one taken and were shut out by the tie rule; `examples` and
        `users`. The attribute `chance` is the precision of random sets, K / heads.

    Raises:
        InputError: A run is of another model, other examples or other prompts; the exact one
            misses scores; or no set of this size and group can be made of a screened one.
    """
    if not others:
        raise InputError("no run to hold against the exact one; give a screened or attribution run")
    pcs = scored_pcs(exact, k, "the exact side of a comparison")
    groups = exact.groups(by)
    columns: dict[str, list[list[float]]] = {"precision": [], "spearman": [], "compared": []}
    for name, run in others.items():
        scores = _aligned(name, exact, run)
        rows = [_row(pcs[at], scores, at, group, k, by) for group, at in groups.items()]
        for key, column in columns.items():
            column.append([row[key] for row in rows])
    heads = int((~np.isnan(pcs).all(axis=0)).sum())
    users = exact.data["user"].values
    return xr.Dataset(
        {
            **{name: (("run", "group"), values) for name, values in columns.items()},
            "ties": ("group", [top_k(pcs[at].mean(axis=0), k).ties for at in groups.values()]),
            "examples": ("group", [len(at) for at in groups.values()]),
            "users": ("group", [len(set(users[at])) for at in groups.values()]),
        },
        coords={"run": list(others), "group": list(groups)},
        attrs={"k": k, "by": by, "heads": heads, "chance": k / heads},
    )


def _aligned(name: str, exact: HeadScores, run: HeadScores) -> HeadScores:
    """The run with the examples in the exact run's order."""
    check_comparable(exact.manifest, run.manifest, ("the exact run", f"the {name} run"))
    ours, theirs = exact.data["example"].values, run.data["example"].values
    if sorted(ours.tolist()) != sorted(theirs.tolist()):
        raise InputError(
            f"the exact run has {len(ours)} examples and the {name} run {len(theirs)}, not the "
            "same ones; compare runs of one list of examples"
        )
    scores = HeadScores(run.data.sel(example=ours), run.manifest)
    if scores.data["pcs"].shape != exact.data["pcs"].shape:
        raise InputError(
            f"the exact run and the {name} run are of different models: "
            f"{exact.data['pcs'].shape[1:]} and {scores.data['pcs'].shape[1:]} layers and heads"
        )
    apart = np.abs(scores.data["nll"].values - exact.data["nll"].values)
    if apart.max() > SAME_LOSS:
        worst = ours[int(apart.argmax())]
        raise InputError(
            f"the intact model's loss on {worst} differs by {apart.max():.2f} nats per token "
            f"between the exact and the {name} run: other prompts; score both with the same ones"
        )
    return scores


def _row(
    pcs: NDArray[np.float64], run: HeadScores, at: NDArray, group: str, k: int, by: By
) -> dict[str, float]:
    mean = pcs.mean(axis=0)
    theirs = run.data["pcs"].values[at].astype(np.float64).mean(axis=0)
    found = set(run.top(k, by)[group]) & set(top_k(mean, k))
    both = ~np.isnan(mean) & ~np.isnan(theirs)
    rho = np.nan
    if both.sum() > 1:
        rho = float(spearman_pairs(mean[both][None, None], theirs[both][None, None])[0])
    return {"precision": len(found) / k, "spearman": rho, "compared": int(both.sum())}


def lines(table: xr.Dataset) -> list[str]:
    """How much of the exact sets each cheaper run finds, a run and group a line."""
    k, heads = table.attrs["k"], table.attrs["heads"]
    found = []
    for name in table["run"].values:
        for group in table["group"].values:
            row = table.sel(run=name, group=group)
            compared = int(row["compared"])
            over = "all" if compared == heads else f"the {compared} of {heads}"
            rho = float(row["spearman"])
            rank = "no rank correlation" if np.isnan(rho) else f"rank correlation {rho:.2f}"
            tied = int(row["ties"])
            note = f" {tied} more heads tie with the exact set's last." if tied else ""
            found.append(
                f"{group}: {name} finds {round(float(row['precision']) * k)} of the exact top {k} "
                f"(random sets: {k * table.attrs['chance']:.1f}); {rank} over {over} scored "
                f"heads.{note}"
            )
    return found
