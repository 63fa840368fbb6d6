"""Scoring part by part in one process, for whoever wants the model back in between."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from workbench import runs
from workbench.data.examples import Example
from workbench.data.prompts import PromptSettings, build_prompts
from workbench.discovery.run import data_digest, score_heads
from workbench.models import context_length, heads_per_layer
from workbench.scores import HeadScores

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def joined(before: HeadScores, more: HeadScores) -> HeadScores:
    """The scores of two lots of examples, made alike, as one result."""
    table = pa.concat_tables([before.table(), more.table()])
    settings = {**more.manifest["settings"], "examples": table.num_rows}
    # Whose data it is can't be told from either lot's digest alone.
    settings["data_sha256"] = runs.digest(
        [run.manifest["settings"].get("data_sha256") for run in (before, more)]
    )
    noise = max(before.noise_floor(1), more.noise_floor(1))
    return HeadScores.from_table(
        table, {**more.manifest, "settings": settings, "noise": {"p95": noise}}
    )


def score_in_parts(
    model: TransformerBridge,
    examples: Sequence[Example],
    *,
    prompt: PromptSettings | None = None,
    size: int | None = None,
    batch_tokens: int | None = None,
) -> Iterator[HeadScores]:
    """Score all heads by zero ablation, a part of the examples at a time.

    Args:
        model: From `load_model`.
        examples: What to score.
        prompt: How prompts are built.
        size: Examples of a part; by default about 512 passes' worth.
        batch_tokens: Most tokens in a forward pass; by default from the memory at hand.

    Yields:
        The scores of all examples done so far. Nothing is hooked in between. The last one is what
        `score_heads` gives up to the order of sums; its noise is that of the noisiest part.

    Raises:
        InputError: As `score_heads`; a prompt that can't be built before the first part.
    """
    prompts = build_prompts(examples, model.tokenizer, context_length(model), prompt)
    size = size or max(1, 512 // sum(heads_per_layer(model)))
    tables: list[pa.Table] = []
    noise: dict[str, Any] = {}
    for start in range(0, len(examples), size):
        part = score_heads(
            model,
            examples[start : start + size],
            prompt=prompt,
            batch_tokens=batch_tokens,
            progress=False,
        )
        tables.append(part.table())
        found = part.manifest.get("noise") or {}
        noise = max(noise, found, key=lambda one: one.get("p95") or 0.0)
        done = prompts[: start + size]
        settings = {
            **part.manifest["settings"],
            "examples": len(done),
            "data_sha256": data_digest(done, prompt.aspect if prompt else None),
        }
        manifest = {**part.manifest, "settings": settings, "noise": noise}
        yield HeadScores.from_table(pa.concat_tables(tables), manifest)
