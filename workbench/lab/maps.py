"""Which head map an explorer shows: whose, of what; each is made once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr

from workbench.analysis.head_map import head_map
from workbench.lab.scored import PCS, Scored
from workbench.scores import By

OF: dict[str, By] = {"this user": "user", "cluster": "cluster", "everyone": "all"}


class Maps:
    """Head maps of some scores.

    Args:
        scored: The scores at hand.
        shape: Number of heads in every block of the model.
    """

    def __init__(self, scored: Scored, shape: Sequence[int]) -> None:
        self.scored = scored
        self.shape = shape
        self._made: dict[tuple[str, str, str], xr.Dataset] = {}

    @property
    def clustered(self) -> bool:
        """Whether users have clusters."""
        own = self.scored.parts.get(PCS)
        return own is not None and "cluster" in own.data.coords

    def table(self, of: str, part: str, user: str) -> tuple[xr.Dataset, str]:
        """A head map.

        Args:
            of: Whose: a key of `OF`.
            part: What of: a name of `Scored.parts`.
            user: Whose example is looked at.

        Returns:
            As of `head_map`, everybody's where that user has no scores; and a line that says so.
        """
        scores = self.scored.parts.get(part)
        if scores is None:
            return unscored(self.shape), ""
        by, group, note = OF[of], user, ""
        labels = scores.data["user"].values
        if by != "all" and user not in labels:
            by, note = "all", f"{user} is not among the scored users: the map is of all of them"
        if by == "cluster":
            group = str(scores.data["cluster"].values[labels == user][0])
        key = part, by, group if by != "all" else ""
        if key not in self._made:
            self._made[key] = head_map(scores, by, group)
        return self._made[key], note


def unscored(shape: Sequence[int]) -> xr.Dataset:
    """The map of a model of which nothing is scored yet."""
    layers, heads = len(shape), max(shape)
    nothing = np.full((layers, heads), np.nan)
    dims = ("layer", "head")
    exists = np.arange(heads)[None, :] < np.asarray(shape)[:, None]
    return xr.Dataset(
        {
            **dict.fromkeys(("mean", "low", "high"), (dims, nothing)),
            "below_noise": (dims, np.zeros((layers, heads), dtype=bool)),
            "exists": (dims, exists),
            "noise_floor": 0.0,
            "users": 0,
        },
        coords={"layer": np.arange(layers), "head": np.arange(heads), "examples": 0},
        attrs={"group": "nobody", "part": PCS, "note": ""},
    )
