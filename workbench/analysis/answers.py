"""Answers and losses that are kept as soon as they are there: a stopped analysis goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from workbench import runs
from workbench.data.examples import Example
from workbench.data.prompts import PromptSettings, build_prompts
from workbench.errors import InputError
from workbench.heads import Gates
from workbench.models import context_length, describe
from workbench.steering.contrast import DPS, Ablated
from workbench.steering.decode import generate
from workbench.steering.loop import contrasts_of

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

ANSWERS = "answers"
LOSSES = "losses"
SCHEMA = pa.schema([("example", pa.string()), ("text", pa.string())])
NUMBERS = pa.schema([("example", pa.string()), ("values", pa.list_(pa.float32()))])


class Answers:
    """Greedy answers of one model to one list of examples, under any contrast.

    With a folder every list of answers is written there as Parquet (example, text), under a name
    made from all that decides it: weights, dtype, prompts, heads, gamma and limit. The same
    request is then read and not written again.
    """

    def __init__(
        self,
        model: TransformerBridge,
        examples: Sequence[Example],
        max_new_tokens: int,
        prompt: PromptSettings | None = None,
        folder: Path | None = None,
        batch_tokens: int = 16384,
    ) -> None:
        self.model = model
        self.examples = list(examples)
        self.max_new_tokens = max_new_tokens
        self.prompt = prompt
        self.folder = folder
        self.batch_tokens = batch_tokens
        prompts = build_prompts(
            examples, model.tokenizer, context_length(model), prompt, new_tokens=max_new_tokens
        )
        data = [(p.example.name, p.ids) for p in prompts]
        self.basis = [describe(model), data, max_new_tokens] if folder is not None else []

    def texts(self, contrast: DPS | Ablated | Mapping[str, DPS]) -> list[str]:
        """One text an example, in order.

        Args:
            contrast: For all, or for each user by name; `Ablated` for all.

        Raises:
            InputError: A kept file is damaged, or what `generate` refuses.
        """
        if self.folder is None:
            return self._write(contrast)
        name = runs.digest([*self.basis, *self._asked(contrast)])[:32]
        path = self.folder / ANSWERS / f"{name}.parquet"
        if path.exists():
            return self._read(path)
        texts = self._write(contrast)
        table = pa.table([[e.name for e in self.examples], texts], schema=SCHEMA)
        with runs.atomic(path) as part:
            pq.write_table(table, part, compression="zstd")
        return texts

    def _asked(self, contrast: DPS | Ablated | Mapping[str, DPS]) -> list[Any]:
        """What decides the answers beside the basis: heads and gamma, of all or example by example.

        Users whose contrasts are the same are asked as one contrast for all would be.
        """
        if isinstance(contrast, DPS | Ablated):
            return _described(contrast)
        every = contrasts_of(self.examples, contrast)
        found = [_described(one) for one in every if isinstance(one, DPS)]
        alike = all(one == found[0] for one in found)
        return found[0] if found and alike else [found]

    def _write(self, contrast: DPS | Ablated | Mapping[str, DPS]) -> list[str]:
        answers = generate(
            self.model,
            self.examples,
            contrast,
            max_new_tokens=self.max_new_tokens,
            prompt=self.prompt,
            batch_tokens=self.batch_tokens,
        )
        return [answer.text for answer in answers]

    def _read(self, path: Path) -> list[str]:
        return [str(text) for text in _column(path, "text", [e.name for e in self.examples])]


def kept(
    folder: Path | None,
    basis: Any,
    names: Sequence[str],
    compute: Callable[[], NDArray[np.floating[Any]]],
) -> NDArray[np.float32]:
    """Numbers of examples, read from where an earlier call kept them, or computed and kept.

    Args:
        folder: Where they are kept, as Parquet (example, values) under a name made from `basis`;
            None to compute them each time.
        basis: Plain values that decide the numbers: weights, prompts, heads and the like.
        names: The examples' names, in order.
        compute: Gives the numbers, [row, example].

    Raises:
        InputError: A kept file is damaged.
    """
    if folder is None:
        return compute().astype(np.float32)
    path = folder / LOSSES / f"{runs.digest(basis)[:32]}.parquet"
    if not path.exists():
        columns = [list(names), compute().astype(np.float32).T.tolist()]
        with runs.atomic(path) as part:
            pq.write_table(pa.table(columns, schema=NUMBERS), part, compression="zstd")
    return np.array(_column(path, "values", names), dtype=np.float32).T


def _column(path: Path, column: str, names: Sequence[str]) -> list[Any]:
    try:
        table = pq.read_table(path)
        found, values = table["example"].to_pylist(), table[column].to_pylist()
    except (pa.ArrowException, OSError, KeyError) as error:
        raise InputError(f"{path}: damaged ({error}); delete it and run again") from None
    if found != list(names):
        raise InputError(f"{path}: holds other examples; delete it and run again")
    return list(values)


def _described(contrast: DPS | Ablated) -> list[Any]:
    """Heads and gamma; gates are told from heads, as soft ones keep a part of them."""
    if not contrast.active:
        return [[], 0.0]
    heads = contrast.heads
    named = heads.values if isinstance(heads, Gates) else sorted(map(str, heads))
    return [named, contrast.gamma if isinstance(contrast, DPS) else "ablated"]
