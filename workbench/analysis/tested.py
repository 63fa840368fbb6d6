"""Which effects of a table are named: by their intervals, and by p adjusted for all its tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from workbench import stats


def adjusted(table: xr.Dataset, names: Sequence[str]) -> xr.Dataset:
    """The table with the p of some columns adjusted after Holm, all cells but NaN one family.

    Args:
        table: With a column `{name}_p` of plain p for each name.
        names: The tested changes.

    Returns:
        The same table; `tests` among its attributes is the number of tests.
    """
    columns = [table[f"{name}_p"] for name in names]
    p = np.concatenate([column.values.ravel() for column in columns])
    there = ~np.isnan(p)
    p[there] = stats.holm(p[there])
    parts = np.split(p, np.cumsum([column.size for column in columns])[:-1])
    found = {
        f"{name}_p": (column.dims, part.reshape(column.shape))
        for name, column, part in zip(names, columns, parts, strict=True)
    }
    return table.assign(found).assign_attrs(tests=int(there.sum()))


def shown(row: xr.Dataset, name: str, alpha: float) -> tuple[NDArray, NDArray]:
    """Where a change is shown to be above 0, and where below: by its interval and adjusted p."""
    likely = row[f"{name}_p"].values <= alpha
    return likely & (row[f"{name}_low"].values > 0), likely & (row[f"{name}_high"].values < 0)


def tested_line(table: xr.Dataset) -> str:
    """By what an effect of the table is named."""
    level = table.attrs["level"]
    return (
        f"An effect is named where its {level:.0%} interval leaves 0 out and its p, adjusted for "
        f"the {int(table.attrs['tests'])} tests of this table (Holm), is at most {1 - level:.2g}."
    )


def unnamed(row: xr.Dataset, name: str, alpha: float) -> str:
    """The adjusted p for which a change isn't named though its interval leaves 0 out; else empty.

    Of several changes the smallest p.
    """
    out = (row[f"{name}_low"].values > 0) | (row[f"{name}_high"].values < 0)
    p = row[f"{name}_p"].values
    p = p[out & (p > alpha)]
    return f"adjusted p = {p.min():.2g}" if p.size else ""


def called(cls: str) -> str:
    """A class of heads in words: of the most specific heads none need be shown to be specific."""
    return "most specific" if cls == "specific" else cls
