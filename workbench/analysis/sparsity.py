"""How few heads carry how much of the score."""

from __future__ import annotations

import numpy as np
import xarray as xr

from workbench.scores import By, HeadScores


def sparsity(scores: HeadScores, by: By = "task", seed: int = 0) -> xr.Dataset:
    """Concentration of the mean PCS.

    Returns:
        For each group: `top`, the highest mean PCS (nats/token) and `top_head` that has it;
        `half`, the fewest heads that hold half of the positive scores; `positive` and
        `negative`, heads whose 95 % interval lies above or below 0 (not corrected for the number
        of heads: 2.5 % of inert heads are expected on each side, more with few users); `heads`,
        how many there are; `units`, the users who are resampled, within one user the examples;
        `nll`, the intact model's mean loss, to hold the scores against.
    """
    scores.need_all_heads("how concentrated scores are")
    table = scores.mean(by, seed=seed)
    users = scores.data["user"].values
    columns: dict[str, list[object]] = {}
    for name, positions in scores.groups(by).items():
        group = table.sel(group=name)
        mean = group["mean"].values
        best = scores.top(1, by)[name]
        share = np.cumsum(np.sort(mean[mean > 0])[::-1])
        half = int(np.searchsorted(share, share[-1] / 2) + 1) if len(share) else 0
        row = {
            "top": float(np.nanmax(mean)),
            "top_head": str(best),
            "half": half,
            "positive": int((group["low"].values > 0).sum()),
            "negative": int((group["high"].values < 0).sum()),
            "heads": int((~np.isnan(mean)).sum()),
            "units": len(positions if by == "user" else set(users[positions].tolist())),
            "nll": float(scores.data["nll"].values[positions].mean()),
        }
        for key, value in row.items():
            columns.setdefault(key, []).append(value)
    return xr.Dataset(
        {key: ("group", values) for key, values in columns.items()},
        coords={"group": table["group"].values},
        attrs={"units": "nats/token", "by": by},
    )
