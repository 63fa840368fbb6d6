"""Does one user's head set do for another? Heads of one removed while the other's text is read.

The examples of each user are halved. Heads are found on one half, and what their removal costs is
measured on the other half, of the same user and of every other; then the halves change places. Were
a user's heads no more the user's than anybody else's, the own would cost as much as the others'.
What random heads of the same layers cost is measured on the same examples.

With tasks in the place of users it is the users that are halved, so that no user is on both sides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xarray as xr
from numpy.typing import NDArray
from scipy.stats import t as student_t
from tqdm.auto import tqdm

from workbench import runs
from workbench.batches import losses
from workbench.data.examples import Example
from workbench.data.prompts import Prompt, PromptSettings, build_prompts
from workbench.errors import InputError
from workbench.heads import HeadSet, random_matched, top_k
from workbench.hooks import head_gates
from workbench.models import context_length, describe, heads_per_layer
from workbench.scores import HeadScores

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

LOSSES = "losses"
SCHEMA = pa.schema([("example", pa.string()), ("nll", pa.float32())])


def lend(
    model: TransformerBridge,
    examples: Sequence[Example],
    scores: HeadScores,
    k: int,
    *,
    by: Literal["user", "task"] = "user",
    limit: int = 12,
    draws: int = 5,
    prompt: PromptSettings | None = None,
    folder: Path | str | None = None,
    batch_tokens: int = 8192,
    seed: int = 0,
    progress: bool = True,
) -> xr.Dataset:
    """Remove one group's heads and measure the loss on every group's text.

    Args:
        model: From `load_model`.
        examples: Whose text; those that `scores` were made from.
        scores: PCS of this model on these examples.
        k: Size of the head sets.
        by: What lends: each `user`, or each `task`.
        limit: Users taken, the first ones who can be halved.
        draws: Random sets for each group's own, with as many heads in every layer.
        prompt: How prompts are built; as for the scores.
        folder: Keep the losses there; the same call then goes on where it stopped.
        batch_tokens: Most tokens in a forward pass, padding counted.
        seed: Seed of the halves and of the random heads.
        progress: Show a bar on the terminal.

    Returns:
        `change[group, other]`, by how much the loss on a group's text rises when the other's heads
        are removed, nats per target token; `random[group]`, the same for random heads in the place
        of the group's own; `examples`, `users`. Attributes `own`, `others` and `random`, means over
        groups; `gap` = own - others and `edge` = own - random with `_low` and `_high`, 95 %
        intervals by the jackknife over users: a user is left out with all pairs that it is in.
        NaN with fewer than three users.

    Raises:
        InputError: The scores are of another model or lack an example, a group can't be halved,
            or there are fewer than two groups.
    """
    groups, halves = _halved(model, examples, scores, by, limit, draws, seed)
    used = np.concatenate(list(groups.values())).tolist()
    prompts = build_prompts(
        [examples[i] for i in used], model.tokenizer, context_length(model), prompt
    )
    place = Path(folder) if folder is not None else None
    settings = draws, seed, place, batch_tokens
    sides = _Sides(dict(zip(used, prompts, strict=True)), list(groups.values()), halves)
    total = 2 * (1 + len(groups) * (1 + draws))
    with tqdm(total=total, desc="lending heads", unit="set", disable=not progress) as bar:
        change, random = _costs(model, sides, _aligned(scores, examples), k, settings, bar)
    users = np.array([example.user for example in examples])
    return _table(change, random, groups, users, {"k": k, "by": by, "draws": draws, "seed": seed})


@dataclass(frozen=True)
class _Sides:
    """Prompts by position of their example, each group's positions, and every example's half."""

    prompts: dict[int, Prompt]
    groups: list[NDArray[np.intp]]
    halves: NDArray[np.int_]


def _costs(
    model: TransformerBridge,
    sides: _Sides,
    pcs: NDArray[np.float64],
    k: int,
    settings: tuple[int, int, Path | None, int],
    bar: Any,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What each group's heads cost each example, [example, group], and random ones the own."""
    draws, seed, folder, batch_tokens = settings
    change = np.full((len(pcs), len(sides.groups)), np.nan)
    random = np.full_like(change, np.nan)
    used, halves = np.array(list(sides.prompts)), sides.halves
    for half in (0, 1):
        rows = used[halves[used] != half]
        measured = _Losses(model, [sides.prompts[i] for i in rows], folder, batch_tokens)
        plain = measured(HeadSet(()))
        bar.update()
        for column, members in enumerate(sides.groups):
            heads = top_k(pcs[members[halves[members] == half]].mean(axis=0), k)
            change[rows, column] = measured(heads) - plain
            bar.update()
            place = np.flatnonzero(np.isin(rows, members))
            own = _Losses(model, [sides.prompts[i] for i in rows[place]], folder, batch_tokens)
            rng = np.random.default_rng((seed, half, column))
            values = []
            for _ in range(draws):
                values.append(own(random_matched(heads, heads_per_layer(model), rng)))
                bar.update()
            random[rows[place], column] = np.mean(values, axis=0) - plain[place]
    return change, random


def _halved(
    model: TransformerBridge,
    examples: Sequence[Example],
    scores: HeadScores,
    by: str,
    limit: int,
    draws: int,
    seed: int,
) -> tuple[dict[str, NDArray[np.intp]], NDArray[np.int_]]:
    """Positions of each group's examples, and which half each example is in."""
    scores.need_all_heads("lending heads")
    if draws < 1:
        raise InputError(f"the random control needs at least 1 draw, got {draws}")
    if scores.heads_per_layer != heads_per_layer(model):
        raise InputError("the scores are of another model than this one; score its heads first")
    if by not in ("user", "task") or limit < 2:
        raise InputError(f"heads are lent by user or task, two or more, got {by!r} and {limit}")
    names = np.array([getattr(example, by) for example in examples])
    groups = {name: np.flatnonzero(names == name) for name in dict.fromkeys(names.tolist())}
    rng = np.random.default_rng(seed)
    halves = np.zeros(len(examples), dtype=int)
    if by == "task":
        users = list(dict.fromkeys(example.user for example in examples))
        first = set(rng.permutation(users)[: len(users) // 2].tolist())
        halves[:] = [int(example.user not in first) for example in examples]
    else:
        for rows in groups.values():
            # Task by task, so that both halves have the same mix; an odd one out goes behind.
            order = sorted(rng.permutation(rows).tolist(), key=lambda i: examples[i].task)
            halves[order] = np.arange(len(order)) % 2
    whole = {name: rows for name, rows in groups.items() if len(set(halves[rows])) == 2}
    if len(whole) < 2:
        raise InputError(
            f"heads are lent between two {by}s or more, each with examples for two halves, and "
            f"{len(whole)} have them; add examples"
        )
    return dict(list(whole.items())[: limit if by == "user" else None]), halves


def _aligned(scores: HeadScores, examples: Sequence[Example]) -> NDArray[np.float64]:
    """PCS [example, layer, head] in the order of the examples."""
    place = {name: i for i, name in enumerate(scores.data["example"].values.tolist())}
    missing = [example.name for example in examples if example.name not in place]
    if missing:
        raise InputError(f"{missing[0]} has no scores, with {len(missing)} in all; score them too")
    rows = [place[example.name] for example in examples]
    return scores.data["pcs"].values[rows].astype(np.float64)


class _Losses:
    """Losses on some prompts with any heads removed, each kept as soon as it is measured."""

    def __init__(
        self,
        model: TransformerBridge,
        prompts: Sequence[Prompt],
        folder: Path | None,
        batch_tokens: int,
    ) -> None:
        self.model, self.prompts, self.batch_tokens = model, prompts, batch_tokens
        self.folder = folder
        data = [(p.example.name, p.ids, p.target_ids) for p in prompts]
        self.basis = [describe(model), data] if folder is not None else []

    def __call__(self, heads: HeadSet) -> NDArray[np.float64]:
        """One loss a prompt."""
        if self.folder is None:
            return self._measure(heads)
        name = runs.digest([*self.basis, sorted(map(str, heads))])[:32]
        path = self.folder / LOSSES / f"{name}.parquet"
        names = [prompt.example.name for prompt in self.prompts]
        if path.exists():
            return _read(path, names)
        values = self._measure(heads)
        with runs.atomic(path) as part:
            pq.write_table(pa.table([names, values], schema=SCHEMA), part, compression="zstd")
        return values

    def _measure(self, heads: HeadSet) -> NDArray[np.float64]:
        with head_gates(self.model, heads.gates(heads_per_layer(self.model))):
            found = losses(self.model, self.prompts, self.batch_tokens)
        return found.numpy().astype(np.float64)


def _read(path: Path, names: list[str]) -> NDArray[np.float64]:
    try:
        table = pq.read_table(path, schema=SCHEMA)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: damaged ({error}); delete it and run again") from None
    if table["example"].to_pylist() != names:
        raise InputError(f"{path}: holds other examples; delete it and run again")
    return table["nll"].to_numpy().astype(np.float64)


def _table(
    change: NDArray[np.float64],
    random: NDArray[np.float64],
    groups: dict[str, NDArray[np.intp]],
    users: NDArray[Any],
    attrs: dict[str, Any],
) -> xr.Dataset:
    parts = list(groups.values())
    matrix, controls = _means(change, random, parts)
    names = list(groups)
    attrs |= _summary(matrix, controls) | {"level": 0.95, "units": "nats/token"}
    left_out = list(_without_a_user(change, random, parts, users, attrs["by"]))
    for name in ("gap", "edge"):
        low, high = _jackknife(attrs[name], [_summary(*left)[name] for left in left_out])
        attrs |= {f"{name}_low": low, f"{name}_high": high}
    return xr.Dataset(
        {
            "change": (("group", "other"), matrix),
            "random": ("group", controls),
            "examples": ("group", [len(rows) for rows in parts]),
            "users": ("group", [len(set(users[rows].tolist())) for rows in parts]),
        },
        coords={"group": names, "other": names},
        attrs=attrs,
    )


def _means(
    change: NDArray[np.float64], random: NDArray[np.float64], parts: list[NDArray[np.intp]]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Means over each group's examples: [group, other], and of random heads [group]."""
    matrix = np.stack([change[rows].mean(axis=0) for rows in parts])
    return matrix, np.array([random[rows, i].mean() for i, rows in enumerate(parts)])


def _summary(matrix: NDArray[np.float64], random: NDArray[np.float64]) -> dict[str, float]:
    count = len(matrix)
    own = float(np.trace(matrix) / count)
    others = float((matrix.sum() - np.trace(matrix)) / (count * (count - 1)))
    control = float(random.mean())
    return {
        "own": own,
        "others": others,
        "random": control,
        "gap": own - others,
        "edge": own - control,
    }


def _without_a_user(
    change: NDArray[np.float64],
    random: NDArray[np.float64],
    parts: list[NDArray[np.intp]],
    users: NDArray[Any],
    by: str,
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """The matrix and the control without each user: its row and column, or its examples."""
    if by == "user":
        matrix, controls = _means(change, random, parts)
        if len(parts) > 2:
            for i in range(len(parts)):
                kept = np.delete(np.arange(len(parts)), i)
                yield matrix[np.ix_(kept, kept)], controls[kept]
        return
    everyone = dict.fromkeys(users[np.concatenate(parts)].tolist())
    for user in everyone:
        left = [rows[users[rows] != user] for rows in parts]
        if all(map(len, left)):
            yield _means(change, random, left)


def _jackknife(value: float, left: list[float]) -> tuple[float, float]:
    """A 95 % interval from the values without each user."""
    count = len(left)
    if count < 3:
        return float("nan"), float("nan")
    error = np.sqrt((count - 1) / count * ((np.array(left) - np.mean(left)) ** 2).sum())
    reach = float(student_t.ppf(0.975, count - 1) * error)
    return value - reach, value + reach


def lines(table: xr.Dataset) -> list[str]:
    """Whether the own heads matter more to a group than others' and than random ones."""
    attrs = table.attrs
    groups = f"{table.sizes['group']} {attrs['by']}s"
    first = (
        f"Removing the own top {attrs['k']} heads of {groups} (found on half of the examples) "
        f"changes the loss on the other half by {attrs['own']:+.3f} nats per token, removing "
        f"another {attrs['by']}'s by {attrs['others']:+.3f}, random heads of the same layers by "
        f"{attrs['random']:+.3f}"
    )
    found = [first + "."]
    for name, other in (("gap", f"another {attrs['by']}'s"), ("edge", "random ones")):
        low, high = attrs[f"{name}_low"], attrs[f"{name}_high"]
        if np.isnan(low):
            found.append(f"Whether the own heads matter more than {other} can't be said: {groups}.")
            continue
        state = "no difference shown"
        if low > 0 or high < 0:
            state = "more" if low > 0 else "less"
            state = f"the own heads matter {state}"
        found.append(
            f"Against {other}: {state} ({attrs[name]:+.4f}, 95 % interval {low:+.4f} to "
            f"{high:+.4f})."
        )
    return found
