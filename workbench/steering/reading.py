"""An example's own target, token by token, as three models see it: the plain one, the one without
some heads, and the one that is decoded by a contrast.

1. The prompt is read once, in every view; the target's tokens are fed one by one behind it.
2. At each step the three distributions of the next token are kept: the probability of the token
   that the user really wrote, and the likeliest tokens of each model.

Fed what the user wrote, not what a model would write: the numbers add up to the loss that PCS is
a difference of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from workbench.data.examples import Example, without_profile
from workbench.data.prompts import Prompt, PromptSettings
from workbench.errors import InputError
from workbench.heads import HeadSet
from workbench.models import heads_per_layer, token_texts
from workbench.steering.contrast import DPS, Ablated, Contrast, contrast_name
from workbench.steering.engines import open_engine
from workbench.steering.layout import Layout, Views
from workbench.steering.loop import refuse_nan
from workbench.steering.prompts import PromptCache
from workbench.steering.room import batch_in_memory
from workbench.steering.session import Session

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

VIEWS = ("plain", "ablated", "steered")
KEPT = 20  # likeliest tokens of each view that a reading keeps
Candidate = tuple[int, tuple[float, ...]]


@dataclass(frozen=True)
class Reading:
    """An example's target under the plain, the ablated and the steered model.

    Attributes:
        prompt: The prompt with its target.
        heads: The heads that the ablated model goes without.
        contrast: What the steered model is decoded by.
        texts: The target's tokens as text.
        logprobs: Log-probability of each of them in the order of `VIEWS`, in nats.
        kl: KL(steered, plain) of the distribution at each token, in nats.
        likeliest: For each token, the likeliest ones of any view in its place: their ids with
            their probability in each view.
        model: Whose tokens they are.
    """

    prompt: Prompt
    heads: HeadSet
    contrast: Contrast
    texts: tuple[str, ...]
    logprobs: Float[NDArray[np.float32], "token view"]
    kl: Float[NDArray[np.float32], " token"]
    likeliest: tuple[tuple[Candidate, ...], ...]
    model: TransformerBridge = field(repr=False)

    def token_change(self) -> xr.Dataset:
        """What each token of the target gains or loses; see `token_change`."""
        columns = {
            name: ("token", self.logprobs[:, i].astype(np.float64)) for i, name in enumerate(VIEWS)
        }
        counted = np.isin(np.arange(len(self.texts)), self.prompt.scored)
        return xr.Dataset(
            {**columns, "kl": ("token", self.kl.astype(np.float64))},
            coords={
                "token": np.arange(len(self.texts)),
                "text": ("token", list(self.texts)),
                "counted": ("token", counted),
            },
            attrs=self._attributes(),
        )

    def next_tokens(self, position: int = 0, k: int = 10) -> xr.Dataset:
        """The likeliest next tokens at one place of the target; see `next_tokens`."""
        if not 0 <= position < len(self.texts):
            raise InputError(
                f"{self.prompt.example.name}: the target has tokens 0 to {len(self.texts) - 1}, "
                f"got position {position}"
            )
        if not 1 <= k <= KEPT:
            raise InputError(f"k must be between 1 and {KEPT}, got {k}")
        found = self.likeliest[position]
        best = {
            token
            for view in range(len(VIEWS))
            for token, _ in sorted(found, key=lambda one: -one[1][view])[:k]
        }
        rows = sorted((one for one in found if one[0] in best), key=lambda one: -one[1][0])
        before = (self.prompt.ids[-1:] + self.prompt.target_ids)[position]
        target = self.prompt.target_ids[position]
        return xr.Dataset(
            {name: ("candidate", [row[1][i] for row in rows]) for i, name in enumerate(VIEWS)},
            coords={
                "candidate": [row[0] for row in rows],
                "text": (
                    "candidate",
                    [token_texts(self.model, (before, token))[1] for token, _ in rows],
                ),
                "target": ("candidate", [row[0] == target for row in rows]),
            },
            attrs={
                **self._attributes(),
                "position": position,
                "before": "".join(self.texts[:position]),
            },
        )

    def _attributes(self) -> dict[str, str]:
        example = self.prompt.example
        return {
            "example": example.name,
            "user": example.user,
            "heads": str(self.heads),
            "contrast": contrast_name(self.contrast),
        }


def read_target(
    model: TransformerBridge,
    example: Example,
    heads: HeadSet,
    contrast: Contrast | None = None,
    *,
    prompt: PromptSettings | None = None,
    prompts: PromptCache | None = None,
) -> Reading:
    """Follow an example's target under the plain, the ablated and the steered model.

    Args:
        model: From `load_model`.
        example: With the target that the user really wrote.
        heads: What the ablated model goes without; none leaves it the plain one.
        contrast: What the steered model is decoded by; DPS with these heads by default.
        prompt: How the prompt is built.
        prompts: Prompts of this model that were built before.

    Raises:
        InputError: A head or layer is outside the model, the prompt can't be built, the target is
            empty, the logits hold NaN, or memory runs out.
    """
    contrast = DPS(heads) if contrast is None else contrast
    shape = heads_per_layer(model)
    heads.check(shape)
    contrast.check(shape)
    kept = PromptCache(model) if prompts is None else prompts
    built = kept.build([example], prompt, 0)[0]
    if not built.target_ids:
        raise InputError(f"{example.name}: there is no target to follow; give one")
    tied = bool(getattr(model.original_model.config, "tie_word_embeddings", False))
    layout, at = _layout(heads, contrast, shape, tied)
    rows = [built.ids] * len(layout.contrasts)
    if layout.others:
        bare = kept.build(without_profile([example]), prompt, 0)[0]
        rows += [bare.ids] * len(layout.others)
    target = built.target_ids
    tokens = len(rows) * (len(built.ids) + len(target))
    with torch.inference_mode(), batch_in_memory([example.name], tokens):
        session = open_engine(model).session(rows, layout, len(target))
        steps = _follow(session, target, at, example.name)
    logprobs, kl, likeliest = zip(*steps, strict=True)
    return Reading(
        built,
        heads,
        contrast,
        tuple(token_texts(model, (*built.ids[-1:], *target))[1:]),
        np.array(logprobs, dtype=np.float32),
        np.array(kl, dtype=np.float32),
        likeliest,
        model,
    )


def token_change(
    model: TransformerBridge,
    example: Example,
    heads: HeadSet,
    contrast: Contrast | None = None,
    *,
    prompt: PromptSettings | None = None,
) -> xr.Dataset:
    """What each token of an example's target gains or loses without some heads, and steered.

    Args:
        model: From `load_model`.
        example: With the target that the user really wrote.
        heads: What the ablated model goes without.
        contrast: What the steered model is decoded by; DPS with these heads by default.
        prompt: How the prompt is built.

    Returns:
        For each `token` of the target, in nats: its log-probability under the `plain`, the
        `ablated` and the `steered` model, and `kl`, by how much the whole distribution was moved
        by steering, KL(steered, plain). Coordinates `text`, and `counted`, whether the token
        counts in the loss. The mean of `plain - ablated` over the counted tokens is the PCS of
        the heads, removed together, on this example.

    Raises:
        InputError: As `read_target`.
    """
    return read_target(model, example, heads, contrast, prompt=prompt).token_change()


def next_tokens(
    model: TransformerBridge,
    example: Example,
    heads: HeadSet,
    contrast: Contrast | None = None,
    *,
    position: int = 0,
    k: int = 10,
    prompt: PromptSettings | None = None,
) -> xr.Dataset:
    """The likeliest next tokens at one place of an example's target: plain, ablated and steered.

    Args:
        model: From `load_model`.
        example: With the target that the user really wrote.
        heads: What the ablated model goes without.
        contrast: What the steered model is decoded by; DPS with these heads by default.
        position: Behind how many tokens of the target.
        k: The likeliest so many of each model.
        prompt: How the prompt is built.

    Returns:
        For each `candidate`, any of the K likeliest of one of the models, by its token id, the
        highest of the plain model first: its probability under the `plain`, the `ablated` and the
        `steered` model. Coordinates `text`, and `target`, whether it is what the user wrote.

    Raises:
        InputError: As `read_target`; or the target has no such position, or k is out of range.
    """
    reading = read_target(model, example, heads, contrast, prompt=prompt)
    return reading.next_tokens(position, k)


def _layout(
    heads: HeadSet, contrast: Contrast, shape: Sequence[int], tied: bool
) -> tuple[Layout, tuple[str, int]]:
    """The rows, and where the ablated model's logits are: a view of its own, or a whole row."""
    alone = Layout.of([contrast], shape, tied)
    if not len(heads):
        return alone, ("plain", 0)
    for use in alone.uses:
        # DPS looks at the very same ablated model: it needs no second one.
        if use.term.where == "heads" and use.term.heads == heads:
            return alone, ("gated", use.row)
    return Layout.of([contrast, Ablated(heads)], shape, tied), ("joined", 1)


def _follow(
    session: Session, target: Sequence[int], at: tuple[str, int], name: str
) -> list[tuple[list[float], float, tuple[Candidate, ...]]]:
    """For each token of the target: its log-probabilities, the KL, and the likeliest tokens."""
    views = session.start()
    found = []
    for i, token in enumerate(target):
        if i:
            fed = torch.tensor([target[i - 1]] * session.examples, device=session.device)
            views = session.step(fed)
        refuse_nan(views, session.layout, [name] * session.examples)
        logits, kl = _three(session.layout, views, at)
        logprobs = logits.log_softmax(dim=-1)
        likely = torch.unique(logprobs.topk(min(KEPT, logprobs.shape[-1])).indices).tolist()
        chances = logprobs[:, likely].exp().T.tolist()
        pairs = tuple((one, tuple(row)) for one, row in zip(likely, chances, strict=True))
        found.append((logprobs[:, token].tolist(), kl, pairs))
    return found


def _three(
    layout: Layout, views: Views, at: tuple[str, int]
) -> tuple[Float[Tensor, "view d_vocab"], float]:
    joined = layout.join(views)
    plain = views.full[0].float()
    where, row = at
    ablated = {"plain": plain, "joined": joined.logits[-1]}.get(where)
    if ablated is None:
        ablated = views.gated[row].float()
    return torch.stack((plain, ablated, joined.logits[0])), float(joined.kl[0])
