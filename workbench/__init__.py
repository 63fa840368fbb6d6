"""Preference Heads workbench: find the attention heads that carry a user's preferences (PCS),
show them, and steer with them (DPS).

Names are imported when they are first used, so that `import workbench` is cheap and torch is
loaded only by what needs it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench import figures
    from workbench.analysis.arms import RoutingSettings
    from workbench.analysis.aspects import aspect_scores, aspects
    from workbench.analysis.classes import class_effects, head_classes
    from workbench.analysis.coherence import coherence
    from workbench.analysis.controls import counterfactual_scores, damage, specificity
    from workbench.analysis.head_map import choose_heads, head_map, specific_scores
    from workbench.analysis.lending import lend
    from workbench.analysis.needed import by_examples
    from workbench.analysis.noise import profile_noise
    from workbench.analysis.official import official_overlap
    from workbench.analysis.overlap import jaccard, user_overlap
    from workbench.analysis.position import position
    from workbench.analysis.precision import precision
    from workbench.analysis.recurrence import recurrence
    from workbench.analysis.routing import routing_gain, weight_controls
    from workbench.analysis.sweep import sweep_head_count
    from workbench.analysis.transfer import transfer
    from workbench.data.aspects import with_aspect
    from workbench.data.examples import Example
    from workbench.data.lamp import load_lamp
    from workbench.data.longlamp import load_longlamp
    from workbench.data.neutral import neutral_examples
    from workbench.data.official import read_official, write_official
    from workbench.data.planted import planted_examples
    from workbench.data.prompts import PromptSettings
    from workbench.data.sources import load_examples
    from workbench.discovery.attended import attended
    from workbench.discovery.cluster import RayOptions
    from workbench.discovery.copying import copy_scores, retrieval_heads
    from workbench.discovery.induction import induction_scores
    from workbench.discovery.run import score_heads
    from workbench.discovery.screening import Screen
    from workbench.errors import InputError
    from workbench.evaluation.grid import evaluate
    from workbench.evaluation.protocol import ask
    from workbench.evaluation.results import load_evaluation
    from workbench.evaluation.settings import GridSettings
    from workbench.evaluation.summary import evaluation_table
    from workbench.heads import Gates, Head, HeadSet
    from workbench.lab.explorer import explore
    from workbench.models import load_model
    from workbench.planted import ground_truth, plant
    from workbench.scores import HeadScores
    from workbench.steering.contrast import CAD, DPS, Ablated, DeCoRe, DoLa, Entropy, NoProfile
    from workbench.steering.decode import generate, stream
    from workbench.steering.labels import decide
    from workbench.steering.loop import Sampling
    from workbench.steering.processor import DPSLogitsProcessor, hf_model
    from workbench.steering.reading import next_tokens, token_change
    from workbench.steering.routing import Router
    from workbench.steering.writing import write

_HOMES = {
    "Ablated": "workbench.steering.contrast",
    "CAD": "workbench.steering.contrast",
    "DPS": "workbench.steering.contrast",
    "DPSLogitsProcessor": "workbench.steering.processor",
    "DeCoRe": "workbench.steering.contrast",
    "DoLa": "workbench.steering.contrast",
    "Entropy": "workbench.steering.contrast",
    "Example": "workbench.data.examples",
    "Gates": "workbench.heads",
    "GridSettings": "workbench.evaluation.settings",
    "Head": "workbench.heads",
    "HeadScores": "workbench.scores",
    "HeadSet": "workbench.heads",
    "InputError": "workbench.errors",
    "NoProfile": "workbench.steering.contrast",
    "PromptSettings": "workbench.data.prompts",
    "RayOptions": "workbench.discovery.cluster",
    "Router": "workbench.steering.routing",
    "RoutingSettings": "workbench.analysis.arms",
    "Sampling": "workbench.steering.loop",
    "Screen": "workbench.discovery.screening",
    "ask": "workbench.evaluation.protocol",
    "aspect_scores": "workbench.analysis.aspects",
    "aspects": "workbench.analysis.aspects",
    "attended": "workbench.discovery.attended",
    "by_examples": "workbench.analysis.needed",
    "choose_heads": "workbench.analysis.head_map",
    "class_effects": "workbench.analysis.classes",
    "coherence": "workbench.analysis.coherence",
    "copy_scores": "workbench.discovery.copying",
    "counterfactual_scores": "workbench.analysis.controls",
    "damage": "workbench.analysis.controls",
    "decide": "workbench.steering.labels",
    "evaluate": "workbench.evaluation.grid",
    "evaluation_table": "workbench.evaluation.summary",
    "explore": "workbench.lab.explorer",
    "generate": "workbench.steering.decode",
    "ground_truth": "workbench.planted",
    "head_classes": "workbench.analysis.classes",
    "head_map": "workbench.analysis.head_map",
    "hf_model": "workbench.steering.processor",
    "induction_scores": "workbench.discovery.induction",
    "jaccard": "workbench.analysis.overlap",
    "lend": "workbench.analysis.lending",
    "load_evaluation": "workbench.evaluation.results",
    "load_examples": "workbench.data.sources",
    "load_lamp": "workbench.data.lamp",
    "load_longlamp": "workbench.data.longlamp",
    "load_model": "workbench.models",
    "neutral_examples": "workbench.data.neutral",
    "next_tokens": "workbench.steering.reading",
    "official_overlap": "workbench.analysis.official",
    "plant": "workbench.planted",
    "planted_examples": "workbench.data.planted",
    "position": "workbench.analysis.position",
    "precision": "workbench.analysis.precision",
    "profile_noise": "workbench.analysis.noise",
    "read_official": "workbench.data.official",
    "recurrence": "workbench.analysis.recurrence",
    "retrieval_heads": "workbench.discovery.copying",
    "routing_gain": "workbench.analysis.routing",
    "score_heads": "workbench.discovery.run",
    "specific_scores": "workbench.analysis.head_map",
    "specificity": "workbench.analysis.controls",
    "stream": "workbench.steering.decode",
    "sweep_head_count": "workbench.analysis.sweep",
    "token_change": "workbench.steering.reading",
    "transfer": "workbench.analysis.transfer",
    "user_overlap": "workbench.analysis.overlap",
    "weight_controls": "workbench.analysis.routing",
    "with_aspect": "workbench.data.aspects",
    "write": "workbench.steering.writing",
    "write_official": "workbench.data.official",
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
    "Gates",
    "GridSettings",
    "Head",
    "HeadScores",
    "HeadSet",
    "InputError",
    "NoProfile",
    "PromptSettings",
    "RayOptions",
    "Router",
    "RoutingSettings",
    "Sampling",
    "Screen",
    "ask",
    "aspect_scores",
    "aspects",
    "attended",
    "by_examples",
    "choose_heads",
    "class_effects",
    "coherence",
    "copy_scores",
    "counterfactual_scores",
    "damage",
    "decide",
    "evaluate",
    "evaluation_table",
    "explore",
    "figures",
    "generate",
    "ground_truth",
    "head_classes",
    "head_map",
    "hf_model",
    "induction_scores",
    "jaccard",
    "lend",
    "load_evaluation",
    "load_examples",
    "load_lamp",
    "load_longlamp",
    "load_model",
    "neutral_examples",
    "next_tokens",
    "official_overlap",
    "plant",
    "planted_examples",
    "position",
    "precision",
    "profile_noise",
    "read_official",
    "recurrence",
    "retrieval_heads",
    "routing_gain",
    "score_heads",
    "specific_scores",
    "specificity",
    "stream",
    "sweep_head_count",
    "token_change",
    "transfer",
    "user_overlap",
    "weight_controls",
    "with_aspect",
    "write",
    "write_official",
]


def __getattr__(name: str) -> Any:
    if name == "figures":
        return import_module("workbench.figures")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'workbench' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
