"""What a screened run scored, and how much of the true top K it may have missed."""

from __future__ import annotations

from dataclasses import asdict

import xarray as xr

from workbench.discovery.screening import missed
from workbench.errors import InputError
from workbench.scores import HeadScores


def screened(scores: HeadScores) -> xr.Dataset:
    """The audit of a screened run.

    Returns:
        For each group that was screened for: `scored`, heads with exact scores; `audited`, those
        of them that were drawn at random; `hits`, audited heads that belong to the top K. As
        attributes: `by`, `k`, `heads` (of the model), and the bound of `screening.Missed` over
        all groups.

    Raises:
        InputError: The run wasn't screened.
    """
    screen = scores.manifest.get("settings", {}).get("screen")
    if not screen or "audited" not in scores.data:
        raise InputError("these scores were not screened; there is no audit to read")
    by, k = screen["by"], screen["k"]
    pcs, drawn = scores.data["pcs"].values, scores.data["audited"].values
    heads = sum(scores.heads_per_layer)
    groups = scores.groups(by)
    each = [missed(pcs, drawn, {name: members}, k, heads) for name, members in groups.items()]
    return xr.Dataset(
        {
            "scored": ("group", [heads - one.unscored for one in each]),
            "audited": ("group", [one.audited for one in each]),
            "hits": ("group", [one.hits for one in each]),
        },
        coords={"group": list(groups)},
        attrs={
            "by": by,
            "k": k,
            "heads": heads,
            "group_count": len(groups),
            **asdict(missed(pcs, drawn, groups, k, heads)),
        },
    )
