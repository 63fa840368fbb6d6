"""What the steps of an examination share: model, examples, scores, and what costs long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xarray as xr

from workbench import runs
from workbench.analysis import classes, controls
from workbench.data.examples import Example
from workbench.data.lamp import sample_users
from workbench.discovery.cluster import RayOptions
from workbench.discovery.run import score_heads
from workbench.heads import HeadSet, top_k
from workbench.probe.settings import ProbeSettings
from workbench.scores import HeadScores

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

RUNS = "runs"
PAPER_CLUSTER = 100
FEWEST = 3


@dataclass
class Work:
    """What all steps share.

    Attributes:
        model: From `load_model`.
        discovery: Examples of the users on whom heads were found.
        evaluation: Examples of other users.
        neutral: Text that has no user.
        scores: PCS on the discovery users.
        folder: The run folder; other scores are kept in run folders of their own in `runs`.
        settings: What to do.
        counts: Numbers of heads of the sweep.
        ray: Score on the workers of a Ray cluster.
        progress: Show bars.
        tables: What earlier steps made.
    """

    model: TransformerBridge
    discovery: Sequence[Example]
    evaluation: Sequence[Example]
    neutral: Sequence[Example]
    scores: HeadScores
    folder: Path
    settings: ProbeSettings
    counts: Sequence[int]
    ray: RayOptions | None
    progress: bool
    tables: dict[str, xr.Dataset] = field(default_factory=dict)

    @property
    def scoring(self) -> dict[str, Any]:
        """What is the same for everything that scores."""
        return {
            "prompt": self.settings.prompt,
            "batch_tokens": self.settings.batch_tokens,
            "progress": self.progress,
        }

    @property
    def writing(self) -> dict[str, Any]:
        """What is the same for everything that writes answers."""
        return {
            "prompt": self.settings.prompt,
            "folder": self.folder,
            "batch_tokens": self.settings.pass_tokens,
            "max_new_tokens": self.settings.max_new_tokens,
            "seed": self.settings.seed,
            "progress": self.progress,
        }

    def place(self, name: str, *decides: Any) -> Path:
        """A folder for other scores: another one for other settings, so that none is refused.

        Args:
            name: What is scored.
            decides: All that changes it, beside what the run folder itself is refused for.
        """
        return self.folder / RUNS / f"{name}-{runs.digest(list(decides))[:8]}"

    def scored(self, name: str, examples: Sequence[Example], **options: Any) -> HeadScores:
        """Scores of other examples, or by another method, in a run folder of their own."""
        screen = options.get("screen")
        decides = (whole(examples), screen and asdict(screen))
        return score_heads(
            self.model,
            examples,
            self.settings.ablation,
            folder=self.place(name, *decides),
            ray=self.ray,
            **self.scoring,
            **options,
        )

    @cached_property
    def sample(self) -> list[Example]:
        """Examples of some of the discovery users, drawn from the seed."""
        users = min(self.settings.effort.sample, len(self.found_on))
        return sample_users(list(self.discovery), users, self.settings.seed)

    @cached_property
    def counterfactuals(self) -> dict[str, HeadScores]:
        """Scores behind other profiles."""
        return controls.counterfactual_scores(
            self.model,
            self.discovery,
            self.settings.effort.counterfactuals,
            self.settings.ablation,
            folder=self.place("counterfactual", whole(self.discovery), self.settings.seed),
            ray=self.ray,
            seed=self.settings.seed,
            **self.scoring,
        )

    @cached_property
    def neutral_scores(self) -> HeadScores:
        """Scores on text that has no user."""
        return self.scored("neutral", self.neutral)

    @cached_property
    def neutral_halves(self) -> tuple[list[Example], list[Example]]:
        """Text without a user to choose capability heads on, and to measure classes on."""
        return classes.halved(self.neutral, self.settings.seed)

    @property
    def chosen_on(self) -> set[str]:
        """The passages on which capability heads were chosen."""
        return {example.user for example in self.neutral_halves[0]}

    @cached_property
    def head_classes(self) -> dict[str, dict[str, list[HeadSet]]]:
        """Task by task, the classes that preference heads are held against."""
        k, seed = self.settings.k, self.settings.seed
        induction, copying = (self.tables.get(name) for name in ("induction", "copying"))
        return classes.head_classes(
            self.scores,
            self.tables["specificity"],
            self.neutral_scores.select(users=sorted(self.chosen_on)),
            k,
            induction=None if induction is None else induction["induction"],
            retrieval=None
            if copying is None
            else top_k(copying["copying"].mean("probe").values, k),
            draws=self.settings.draws,
            seed=seed,
        )

    @property
    def classed(self) -> list[Example]:
        """Examples to measure on, of the tasks that have head classes."""
        return [example for example in self.evaluation if example.task in self.head_classes]

    @property
    def found_on(self) -> set[str]:
        """The users on whom heads were found."""
        return {example.user for example in self.discovery}

    @property
    def cluster_users(self) -> int:
        """Users a cluster."""
        users = len({example.user for example in self.discovery})
        usual = PAPER_CLUSTER if users >= 4 * PAPER_CLUSTER else max(FEWEST, users // 4)
        return self.settings.cluster_users or usual


def whole(examples: Sequence[Example]) -> str:
    """A digest of examples with all that any step reads of them, shown in a prompt or not."""
    return runs.digest([asdict(example) for example in examples])


def _most(scores: xr.DataArray, k: int) -> HeadSet:
    return top_k(scores.mean("probe").values, k)
