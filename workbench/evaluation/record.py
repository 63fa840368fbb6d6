"""How an evaluation came about, and whom it asked: what its folder says beside the answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from workbench import runs
from workbench.data.prompts import Prompt, truncation
from workbench.data.tasks import get_task
from workbench.discovery.run import PACKAGES
from workbench.discovery.shapes import shape_of
from workbench.errors import InputError
from workbench.evaluation.protocol import Asked
from workbench.evaluation.results import EXAMPLE, EXAMPLES, FORMAT, write_rows
from workbench.evaluation.settings import GridSettings
from workbench.heads import HeadSet
from workbench.models import describe

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

# Examples a shard of a small model: one of 32 heads takes about a second for them.
SHARD_WORK, LEAST_SHARD = 16384, 64


def write_examples(folder: Path, prompts: Sequence[Prompt], leaked: frozenset[str]) -> None:
    """Keep the test examples, with the profile items that their prompts show.

    Raises:
        InputError: The file can't be written.
    """
    path = folder / EXAMPLES
    if path.exists():
        return  # of these very examples: their digest is among the run's settings
    rows = [_row(prompt) | {"leaked": prompt.example.name in leaked} for prompt in prompts]
    write_rows(rows, EXAMPLE, path)


def _row(prompt: Prompt) -> dict[str, Any]:
    example, task = prompt.example, get_task(prompt.example.task)
    return {
        "example": example.name,
        "user": example.user,
        "task": example.task,
        "query": example.query,
        "target": example.target,
        "profile": [task.item.format(**example.profile[i]) for i in prompt.shown],
        "style": json.dumps(dict(example.style), sort_keys=True),
    }


def manifest_of(
    model: TransformerBridge,
    settings: GridSettings,
    asked: Asked,
    prompts: Mapping[str, Sequence[Prompt]],
    sets: Mapping[str, Mapping[int, HeadSet]],
    retrieval: HeadSet | None,
) -> dict[str, Any]:
    """The manifest: under `settings` all that decides the answers, beside it what is good to know.

    Args:
        model: The model.
        settings: What is done.
        asked: Whom.
        prompts: Their prompts, by group.
        sets: task -> K -> preference heads.
        retrieval: DeCoRe's heads, if they were given.
    """
    described = describe(model)
    heads = sum(described["heads_per_layer"])
    kept_settings = asdict(settings)
    del kept_settings["batch_tokens"]
    chosen_from = {
        task: {str(k): [str(h) for h in found] for k, found in by_k.items()}
        for task, by_k in sets.items()
    }
    users = {name: len({p.example.user for p in group}) for name, group in prompts.items()}
    return {
        "format": FORMAT,
        "settings": {
            **described,
            **kept_settings,
            "k": settings.head_counts(heads),
            "tasks": list(dict.fromkeys(example.task for example in asked.test)),
            "splits": {"validation": asked.validation_split, "test": asked.split},
            "heads": chosen_from,
            "retrieval": None if retrieval is None else [str(head) for head in retrieval],
            "data_sha256": {
                name: runs.digest([(p.ids, _row(p)) for p in group])
                for name, group in prompts.items()
            },
            "same_examples": asked.same_examples,
            "leaked": sorted(asked.leaked),
            "shard_examples": max(LEAST_SHARD, SHARD_WORK // heads),
        },
        **_shape(model),
        "users": users,
        "examples": {name: len(group) for name, group in prompts.items()},
        "left_out_users": asked.left_out,
        "users_inferred": asked.users_inferred,
        "users_recur": asked.users_recur,
        "truncation": {name: truncation(group) for name, group in prompts.items()},
        "command": runs.command(),
        "versions": {name: version(name) for name in PACKAGES},
        "threads": torch.get_num_threads(),
    }


def _shape(model: TransformerBridge) -> dict[str, Any]:
    """What table 3 counts operations from; nothing for an architecture that isn't known."""
    dtype = str(model.cfg.dtype).removeprefix("torch.")
    try:
        return {"shape": asdict(shape_of(model.original_model.config, dtype))}
    except InputError:
        return {}
