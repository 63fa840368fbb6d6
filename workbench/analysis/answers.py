"""Answers that are kept as soon as they are written, so that a stopped sweep goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from workbench import runs
from workbench.data.examples import Example
from workbench.data.prompts import PromptSettings, build_prompts
from workbench.errors import InputError
from workbench.heads import Gates
from workbench.models import context_length, describe
from workbench.steering.contrast import DPS
from workbench.steering.decode import generate
from workbench.steering.loop import contrasts_of

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

ANSWERS = "answers"
SCHEMA = pa.schema([("example", pa.string()), ("text", pa.string())])


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

    def texts(self, contrast: DPS | Mapping[str, DPS]) -> list[str]:
        """One text an example, in order.

        Args:
            contrast: For all, or for each user by name.

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

    def _asked(self, contrast: DPS | Mapping[str, DPS]) -> list[Any]:
        """What decides the answers beside the basis: heads and gamma, of all or example by example.

        Users whose contrasts are the same are asked as one contrast for all would be.
        """
        if isinstance(contrast, DPS):
            return _described(contrast)
        every = contrasts_of(self.examples, contrast)
        found = [_described(one) for one in every if isinstance(one, DPS)]
        alike = all(one == found[0] for one in found)
        return found[0] if found and alike else [found]

    def _write(self, contrast: DPS | Mapping[str, DPS]) -> list[str]:
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
        try:
            table = pq.read_table(path)
            names, texts = table["example"].to_pylist(), table["text"].to_pylist()
        except (pa.ArrowException, OSError, KeyError) as error:
            raise InputError(f"{path}: damaged ({error}); delete it and run again") from None
        if names != [example.name for example in self.examples]:
            raise InputError(f"{path}: holds other examples; delete it and run again")
        return [str(text) for text in texts]


def _described(contrast: DPS) -> list[Any]:
    """Heads and gamma; gates are told from heads, as soft ones keep a part of them."""
    if not contrast.active:
        return [[], 0.0]
    heads = contrast.heads
    named = heads.values if isinstance(heads, Gates) else sorted(map(str, heads))
    return [named, contrast.gamma]
