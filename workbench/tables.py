"""Labelled tables as JSON that any program can read: NaN is null, attributes go along."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from workbench import runs

if TYPE_CHECKING:
    import pandas as pd


def plain(value: Any) -> Any:
    """The same value without NumPy types, with None for NaN, all the way down."""
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, np.generic | np.ndarray):
        return plain(value.tolist())
    return None if isinstance(value, float) and math.isnan(value) else value


def records(table: xr.Dataset) -> list[dict[str, Any]]:
    """Rows of a table, one for each combination of its coordinates."""
    return [plain(row) for row in table.to_dataframe().reset_index().to_dict("records")]


def frames(table: xr.Dataset) -> dict[str, pd.DataFrame]:
    """A labelled table as flat ones, for a spreadsheet.

    Columns that lie along different dimensions can't share rows: a matrix of sets by sets, say,
    and a list of draws. There is one flat table for every combination of dimensions that isn't a
    part of another one; columns along fewer dimensions are repeated in its rows.

    Returns:
        By the dimensions in which they differ, joined by `-`; a single one is named by nothing.
        Rows without any number, such as heads that a layer doesn't have, are left out.
    """
    every = {tuple(column.dims) for column in table.data_vars.values() if column.dims}
    largest = [d for d in every if not any(set(d) < set(other) for other in every)]
    # The same dimensions in another order are the same rows.
    largest = list({frozenset(d): d for d in sorted(largest)}.values())
    shared = set.intersection(*map(set, largest)) if largest else set()
    found = {}
    for dims in largest:
        inside = set(dims)
        columns = [name for name, column in table.data_vars.items() if set(column.dims) <= inside]
        frame = table[columns].to_dataframe(dim_order=list(dims)).reset_index()
        numbers = [name for name in columns if frame[name].dtype.kind == "f"]
        name = "-".join(str(d) for d in dims if d not in shared) if len(largest) > 1 else ""
        found[name] = frame.dropna(how="all", subset=numbers) if numbers else frame
    return found


def save(table: xr.Dataset, path: Path) -> None:
    """Write a table, whole or not at all."""
    runs.write_text(path, json.dumps(plain(table.to_dict()), indent=1, allow_nan=False) + "\n")


def load(path: Path) -> xr.Dataset:
    """Read a table written by `save`; numbers that were NaN are NaN again, attributes too.

    Raises:
        InputError: The file is missing or malformed.
    """
    table = xr.Dataset.from_dict(runs.read_json(path))
    for name, column in table.data_vars.items():
        if column.dtype == object and not any(isinstance(v, str) for v in column.values.flat):
            table[name] = column.astype(float)
    attributes = [table.attrs, *(table[name].attrs for name in table.variables)]
    for found in attributes:
        found.update({name: math.nan for name, value in found.items() if value is None})
    return table
