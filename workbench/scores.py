"""Head scores as a labelled result: `pcs[example, layer, head]`, kept per example.

On disk a run is `manifest.json` and Parquet shards, a row an example, which
`datasets.load_dataset("parquet", data_files="RUN/scores/*.parquet")` opens too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xarray as xr

from workbench import runs, stats
from workbench.errors import InputError
from workbench.heads import HeadSet, top_k

By = Literal["user", "task", "cluster", "all"]
FORMAT = "workbench.scores/2"
SCHEMA = pa.schema(
    [
        ("example", pa.string()),
        ("user", pa.string()),
        ("task", pa.string()),
        ("nll", pa.float32()),
        ("target_tokens", pa.int32()),
        ("pcs", pa.list_(pa.list_(pa.float32()))),
    ]
)
# What a screened run has beside its exact scores.
SCREENED = pa.schema(
    [
        ("attribution", pa.list_(pa.list_(pa.float32()))),
        ("audited", pa.list_(pa.list_(pa.bool_()))),
    ]
)


@dataclass(frozen=True)
class HeadScores:
    """Preference contribution scores of every head on every example.

    Attributes:
        data: `pcs[example, layer, head]` in nats per target token, `nll[example]` of the intact
            model and `target_tokens[example]`; coordinates `user` and `task` along `example`.
            A positive `pcs` says that removing the head hurts. NaN: not computed, or the layer
            has no such head. A screened run also has `attribution[example, layer, head]`, the
            gradient estimate of every head in the same units, and `audited`, True at the heads
            that were scored exactly only to see what the estimate misses.
        manifest: Where the numbers come from: model and its digest, data digest, prompt,
            ablation, dtype, versions.
    """

    data: xr.Dataset
    manifest: Mapping[str, Any]

    @classmethod
    def from_table(cls, table: pa.Table, manifest: Mapping[str, Any]) -> HeadScores:
        """Label the rows of a table of `SCHEMA`, with or without the columns of `SCREENED`."""
        extra = [name for name in SCREENED.names if name in table.column_names]
        grids = {name: _grid(table[name].to_pylist()) for name in ("pcs", *extra)}
        layers, heads = grids["pcs"].shape[1:]
        if "audited" in grids:
            grids["audited"] = grids["audited"] == 1
        data = xr.Dataset(
            {
                "nll": ("example", table["nll"].to_numpy()),
                "target_tokens": ("example", table["target_tokens"].to_numpy()),
                **{name: (("example", "layer", "head"), grid) for name, grid in grids.items()},
            },
            coords={
                "example": table["example"].to_pylist(),
                "user": ("example", table["user"].to_pylist()),
                "task": ("example", table["task"].to_pylist()),
                "layer": np.arange(layers),
                "head": np.arange(heads),
            },
            attrs={"units": "nats/token", "sign": "ablated - full"},
        )
        return cls(data, manifest)

    def table(self) -> pa.Table:
        """The rows as they stand on disk; a layer lists as many heads as it has."""
        shape = self.heads_per_layer
        schema = pa.schema([*SCHEMA, *(field for field in SCREENED if field.name in self.data)])
        columns = {}
        for name in schema.names:
            values = self.data[name].values
            columns[name] = values.tolist() if values.ndim == 1 else ragged(values, shape)
        return pa.table(columns, schema=schema)

    def save(self, folder: Path | str) -> None:
        """Write the result as a run folder that `load` opens: a manifest and one shard.

        Raises:
            InputError: The folder holds more shards, which `load` would mix with this one; or it
                can't be written.
        """
        folder = Path(folder)
        only = runs.shard_path(folder, 0)
        if set(runs.shards(folder)) - {only}:
            raise InputError(f"{folder} holds the shards of another run; name another folder")
        write_shard(self.table(), only)
        runs.write_manifest(folder, self.manifest)

    @classmethod
    def load(cls, folder: Path | str) -> HeadScores:
        """Open a run folder.

        Raises:
            InputError: There is no manifest of this format, no shard, or a shard can't be read or
                repeats another; a run that was stopped half way says how many examples are
                still missing.
        """
        folder = Path(folder)
        manifest = runs.read_manifest(folder, FORMAT)
        shards = runs.shards(folder)
        if not shards:
            raise InputError(f"{folder}: the run holds no scores yet; run the command again")
        table = _join(shards)
        wanted = manifest.get("settings", {}).get("examples", table.num_rows)
        if table.num_rows > wanted:
            raise InputError(
                f"{folder}: {table.num_rows} examples are scored, and its manifest says {wanted}: "
                "shards of another run are among them; run the command again into another folder"
            )
        if table.num_rows != wanted:
            raise InputError(
                f"{folder}: {table.num_rows} of {wanted} examples are scored; "
                "run the same command again to finish it"
            )
        return cls.from_table(table, manifest)

    @property
    def heads_per_layer(self) -> tuple[int, ...]:
        """Number of heads, layer by layer, counted up to the last one with a score."""
        known = "attribution" if "attribution" in self.data else "pcs"
        present = ~np.isnan(self.data[known].values).all(axis=0)
        return tuple(int(np.flatnonzero(layer).max(initial=-1)) + 1 for layer in present)

    def assign_clusters(self, labels: Mapping[str, int]) -> HeadScores:
        """The same scores with a coordinate `cluster` along `example`; a saved run has none.

        Args:
            labels: The cluster of each user by name.

        Raises:
            InputError: A user with scores is in no cluster.
        """
        users = self.data["user"].values.tolist()
        if unknown := [user for user in users if user not in labels]:
            raise InputError(f"user {unknown[0]} has scores and is in no cluster")
        names = [str(labels[user]) for user in users]
        return HeadScores(self.data.assign_coords(cluster=("example", names)), self.manifest)

    def groups(self, by: By) -> dict[str, np.ndarray]:
        """Positions of the examples of each user, task or cluster, in order of appearance.

        Raises:
            InputError: Clusters are asked for, and users were assigned to none.
        """
        if by == "all":
            return {"all": np.arange(self.data.sizes["example"])}
        if by not in self.data.coords:
            raise InputError(f"these scores have no {by}s; name them with assign_clusters first")
        labels = self.data[by].values
        return {name: np.flatnonzero(labels == name) for name in dict.fromkeys(labels.tolist())}

    def select(
        self, users: Sequence[str] | None = None, tasks: Sequence[str] | None = None
    ) -> HeadScores:
        """The part of the result that belongs to some users or tasks.

        Raises:
            InputError: A name isn't in the result.
        """
        keep = np.ones(self.data.sizes["example"], dtype=bool)
        for by, names in (("user", users), ("task", tasks)):
            if names is None:
                continue
            labels = self.data[by].values
            unknown = sorted(set(names) - set(labels.tolist()))
            if unknown:
                raise InputError(f"no {by} {', '.join(unknown)} in these scores")
            keep &= np.isin(labels, list(names))
        part = self.data.isel(example=np.flatnonzero(keep))
        # How many examples a saved run must hold; all else says where these come from.
        settings = {**self.manifest.get("settings", {}), "examples": part.sizes["example"]}
        if settings.get("screen"):
            whole = [keep[i].all() or not keep[i].any() for i in self._screened_groups()]
            settings["screen"] = {**settings["screen"], "whole": all(whole)}
        return HeadScores(part, {**self.manifest, "settings": settings})

    def _screened_groups(self) -> list[np.ndarray]:
        """Positions of the examples that were screened together."""
        screen = self.manifest.get("settings", {}).get("screen")
        return list(self.groups(screen["by"]).values()) if screen else []

    def need_all_heads(self, what: str) -> None:
        """Refuse a screened run.

        Args:
            what: What can't be made of it.

        Raises:
            InputError: Heads of which nothing exact is known would be left out without a word.
        """
        if self.manifest.get("settings", {}).get("screen"):
            raise InputError(
                f"{what} needs exact scores of all heads, and these were screened: the sets were "
                "chosen among each group's candidates. Score with method exact"
            )

    def mean(self, by: By = "all", level: float = 0.95, seed: int = 0) -> xr.Dataset:
        """Mean score of every head in each group, with bootstrap intervals.

        Users are resampled; within one user (`by="user"`) it is the examples.

        Returns:
            `mean`, `low` and `high`, each [group, layer, head], in nats per target token, and
            `below_noise`, True where the mean is smaller than what the shape and order of the
            batches alone move it by (`noise_floor[group]`).
        """
        pcs, users = self.data["pcs"].values, self.data["user"].values
        groups = self.groups(by)
        parts = [
            stats.bootstrap_mean(pcs[i], i if by == "user" else users[i], level, seed)
            for i in groups.values()
        ]
        stacked = [np.stack(column) for column in zip(*parts, strict=True)]
        names = ("mean", "low", "high")
        dims = ("group", "layer", "head")
        found = {name: (dims, values) for name, values in zip(names, stacked, strict=True)}
        floor = np.array([self.noise_floor(len(i)) for i in groups.values()])
        below = np.abs(stacked[0]) < floor[:, None, None]
        return xr.Dataset(
            {**found, "below_noise": (dims, below), "noise_floor": ("group", floor)},
            coords={
                "group": list(groups),
                "layer": self.data["layer"],
                "head": self.data["head"],
                "examples": ("group", [len(i) for i in groups.values()]),
            },
            attrs={**self.data.attrs, "by": by, "level": level},
        )

    def noise_floor(self, examples: int) -> float:
        """What a mean over so many examples moves by with the shape and order of batches alone.

        Returns:
            Nats per target token, at the 95 % level; 0 for a run that didn't measure it.
        """
        noise = self.manifest.get("noise") or {}
        return float(noise.get("p95") or 0.0) / max(1, examples) ** 0.5

    def top(self, k: int, by: By = "user") -> dict[str, HeadSet]:
        """The K heads with the highest mean score, for each user, each task, or all together.

        Raises:
            InputError: K is below 1 or larger than the model; or the heads were screened for
                smaller sets, or for sets of other groups.
        """
        screen = self.manifest.get("settings", {}).get("screen")
        if screen and not screen.get("whole", True):
            raise InputError(
                f"only a part of the examples of a {screen['by']} is left, and the heads were "
                "screened for all of them: exact scores may be missing; score all heads exactly"
            )
        if screen and (k > screen["k"] or by != screen["by"]):
            raise InputError(
                f"the heads were screened for the top {screen['k']} of each {screen['by']}, not "
                f"the top {k} of each {by}: exact scores are missing; screen for that, or score "
                "all heads exactly"
            )
        pcs = self.data["pcs"].values.astype(np.float64)
        return {name: top_k(pcs[i].mean(axis=0), k) for name, i in self.groups(by).items()}


def _grid(rows: Sequence[Sequence[Sequence[float]]]) -> np.ndarray:
    """Ragged lists as [example, layer, head], NaN where a layer has fewer heads."""
    layers = max((len(row) for row in rows), default=0)
    heads = max((len(layer) for row in rows for layer in row), default=0)
    values = np.full((len(rows), layers, heads), np.nan, dtype=np.float32)
    for i, row in enumerate(rows):
        for layer, scores in enumerate(row):
            values[i, layer, : len(scores)] = scores
    return values


def ragged(values: np.ndarray, shape: Sequence[int]) -> list[list[list[float]]]:
    """[example, layer, head] as lists, a layer's as long as it has heads."""
    return [[layer[:n].tolist() for layer, n in zip(row, shape, strict=True)] for row in values]


def write_shard(table: pa.Table, path: Path) -> None:
    """Write one shard so that it is there whole or not at all.

    Raises:
        InputError: It can't be written.
    """
    with runs.atomic(path) as part:
        # The checksums are what tells a flipped bit from a score.
        pq.write_table(table, part, compression="zstd", write_page_checksum=True)


def read_shard(path: Path, rows: int | None = None) -> pa.Table:
    """Read one shard.

    Args:
        path: The file.
        rows: How many examples belong in it, where that is known.

    Raises:
        InputError: The file is damaged, has other columns, or holds another number of examples.
    """
    try:
        # Given a schema, `read_table` would fill missing columns with nulls.
        table = pq.read_table(path, page_checksum_verification=True)
        extra = [field for field in SCREENED if field.name in table.column_names]
        schema = pa.schema([*SCHEMA, *extra])
        table = table.select(schema.names).cast(schema)
    except (FileNotFoundError, PermissionError) as error:
        raise InputError(f"{path}: can't be read: {error.strerror}") from None
    except (pa.ArrowException, KeyError, OSError) as error:
        raise _unreadable(path, str(error).strip().split("\n")[0]) from None
    if not table.num_rows or table.num_rows != (rows or table.num_rows):
        raise _unreadable(path, f"it holds {table.num_rows} examples, not {rows or 'one or more'}")
    return table


def _join(shards: Sequence[Path]) -> pa.Table:
    """The rows of all shards, in which an example may be once: a copy would count it twice."""
    tables, seen = [], dict[str, Path]()
    for path in shards:
        tables.append(read_shard(path))
        for name in tables[-1]["example"].to_pylist():
            if seen.setdefault(name, path) != path:
                raise _unreadable(path, f"{name} is in {seen[name].name} too")
    return pa.concat_tables(tables)


def _unreadable(path: Path, reason: str) -> InputError:
    return InputError(
        f"{path}: not a readable shard ({reason}); delete it and run the command again, "
        "which computes only what is missing"
    )
