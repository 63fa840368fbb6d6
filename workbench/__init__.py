"""Preference Heads workbench: find the attention heads that carry a user's preferences (PCS),
show them, and steer with them (DPS).

Names are imported when they are first used, so that `import workbench` is cheap and torch is
loaded only by what needs it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench import figures
    from workbench.analysis.overlap import jaccard, user_overlap
    from workbench.analysis.sweep import sweep_head_count
    from workbench.data.examples import Example
    from workbench.data.lamp import load_lamp
    from workbench.data.longlamp import load_longlamp
    from workbench.data.prompts import PromptSettings
    from workbench.data.sources import load_examples
    from workbench.discovery.cluster import RayOptions
    from workbench.discovery.copying import copy_scores, retrieval_heads
    from workbench.discovery.run import score_heads
    from workbench.discovery.screening import Screen
    from workbench.errors import InputError
    from workbench.evaluation.grid import evaluate
    from workbench.evaluation.protocol import ask
    from workbench.evaluation.results import load_evaluation
    from workbench.evaluation.settings import GridSettings
    from workbench.evaluation.summary import evaluation_table
    from workbench.heads import Head, HeadSet
    from workbench.models import load_model
    from workbench.scores import HeadScores
    from workbench.steering.contrast import CAD, DPS, Ablated, DeCoRe, DoLa, Entropy, NoProfile
    from workbench.steering.decode import generate, stream
    from workbench.steering.labels import decide
    from workbench.steering.loop import Sampling
    from workbench.steering.processor import DPSLogitsProcessor, hf_model

_HOMES = {
    "Ablated": "workbench.steering.contrast",
    "CAD": "workbench.steering.contrast",
    "DPS": "workbench.steering.contrast",
    "DPSLogitsProcessor": "workbench.steering.processor",
    "DeCoRe": "workbench.steering.contrast",
    "DoLa": "workbench.steering.contrast",
    "Entropy": "workbench.steering.contrast",
    "Example": "workbench.data.examples",
    "GridSettings": "workbench.evaluation.settings",
    "Head": "workbench.heads",
    "HeadScores": "workbench.scores",
    "HeadSet": "workbench.heads",
    "InputError": "workbench.errors",
    "NoProfile": "workbench.steering.contrast",
    "PromptSettings": "workbench.data.prompts",
    "RayOptions": "workbench.discovery.cluster",
    "Sampling": "workbench.steering.loop",
    "Screen": "workbench.discovery.screening",
    "ask": "workbench.evaluation.protocol",
    "copy_scores": "workbench.discovery.copying",
    "decide": "workbench.steering.labels",
    "evaluate": "workbench.evaluation.grid",
    "evaluation_table": "workbench.evaluation.summary",
    "generate": "workbench.steering.decode",
    "hf_model": "workbench.steering.processor",
    "jaccard": "workbench.analysis.overlap",
    "load_evaluation": "workbench.evaluation.results",
    "load_examples": "workbench.data.sources",
    "load_lamp": "workbench.data.lamp",
    "load_longlamp": "workbench.data.longlamp",
    "load_model": "workbench.models",
    "retrieval_heads": "workbench.discovery.copying",
    "score_heads": "workbench.discovery.run",
    "stream": "workbench.steering.decode",
    "sweep_head_count": "workbench.analysis.sweep",
    "user_overlap": "workbench.analysis.overlap",
}
__all__ = [
    "CAD",
    "DPS",
    "Ablated",
    "DPSLogitsProcessor",
    "DeCoRe",
    "DoLa",
    "Entropy",
    "Example",
    "GridSettings",
    "Head",
    "HeadScores",
    "HeadSet",
    "InputError",
    "NoProfile",
    "PromptSettings",
    "RayOptions",
    "Sampling",
    "Screen",
    "ask",
    "copy_scores",
    "decide",
    "evaluate",
    "evaluation_table",
    "figures",
    "generate",
    "hf_model",
    "jaccard",
    "load_evaluation",
    "load_examples",
    "load_lamp",
    "load_longlamp",
    "load_model",
    "retrieval_heads",
    "score_heads",
    "stream",
    "sweep_head_count",
    "user_overlap",
]


def __getattr__(name: str) -> Any:
    if name == "figures":
        return import_module("workbench.figures")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'workbench' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
