"""Figures: each takes a labelled table and returns a Plotly figure. Nothing is computed here."""

from workbench.figures.aspects import aspect_heads, aspect_overlap
from workbench.figures.classes import class_effects
from workbench.figures.coherence import coherence
from workbench.figures.controls import damage, specific_heads
from workbench.figures.counts import example_counts
from workbench.figures.export import Saved, save
from workbench.figures.head_map import head_map
from workbench.figures.heatmaps import ranked_heads, user_heatmaps
from workbench.figures.inline import inline
from workbench.figures.official import resolution
from workbench.figures.overlap import overlap
from workbench.figures.position import position
from workbench.figures.recovery import recovery
from workbench.figures.routing import routing
from workbench.figures.stability import precision, profile_noise, recurrence
from workbench.figures.sweep import head_count
from workbench.figures.text import example_text, next_tokens, side_by_side, token_change
from workbench.figures.transfer import lend, transfer
from workbench.figures.weights import head_weights

__all__ = [
    "Saved",
    "aspect_heads",
    "aspect_overlap",
    "class_effects",
    "coherence",
    "damage",
    "example_counts",
    "example_text",
    "head_count",
    "head_map",
    "head_weights",
    "inline",
    "lend",
    "next_tokens",
    "overlap",
    "position",
    "precision",
    "profile_noise",
    "ranked_heads",
    "recovery",
    "recurrence",
    "resolution",
    "routing",
    "save",
    "side_by_side",
    "specific_heads",
    "token_change",
    "transfer",
    "user_heatmaps",
]
