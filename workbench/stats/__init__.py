"""Intervals and tests on bare arrays. The unit that is resampled is the user, not the example:
examples of one user share a profile and are not independent.
"""

from workbench.stats.many import FEWEST, holm, simultaneous
from workbench.stats.resampling import (
    RESAMPLES,
    SWAPS,
    Combine,
    Estimate,
    bootstrap_mean,
    bootstrap_statistic,
    estimate,
    mean_of,
    paired_statistic,
    rank_correlation,
    sign_flip_p,
)

__all__ = [
    "FEWEST",
    "RESAMPLES",
    "SWAPS",
    "Combine",
    "Estimate",
    "bootstrap_mean",
    "bootstrap_statistic",
    "estimate",
    "holm",
    "mean_of",
    "paired_statistic",
    "rank_correlation",
    "sign_flip_p",
    "simultaneous",
]
