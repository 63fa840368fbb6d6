"""The main job: the whole examination of a model, kept in one run folder."""

from workbench.probe.examination import probe
from workbench.probe.results import Probe, load_probe
from workbench.probe.settings import ProbeSettings, discovery_and_evaluation

__all__ = ["Probe", "ProbeSettings", "discovery_and_evaluation", "load_probe", "probe"]
