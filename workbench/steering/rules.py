"""Joining the logits of several views: strengths, the plausibility cut, the limit in nats.

Everything is computed in float32 and up to a constant a row, which no distribution depends on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.steering.contrast import Entropy, Kind, Strength

HALVINGS = 24  # of the interval in which a scale is looked for: 6e-8, float32's own resolution


@dataclass(frozen=True)
class Share:
    """What one term adds to some rows of a batch.

    Attributes:
        kind: How it joins, as `contrast.Term` says.
        rows: The rows of the batch.
        strengths: One for each of them.
        logits: The view's, for each of them.
    """

    kind: Kind
    rows: Int[Tensor, " some"]
    strengths: tuple[Strength, ...]
    logits: Float[Tensor, "some d_vocab"]


@dataclass(frozen=True)
class Joined:
    """One step's logits.

    Attributes:
        logits: Joined, unnormalised, float32.
        kl: KL(joined, plain) of each row in nats: by how much the step was moved.
        scale: What the strength was multiplied by to stay within the limit; 1 where it was.
    """

    logits: Float[Tensor, "batch d_vocab"]
    kl: Float[Tensor, " batch"]
    scale: Float[Tensor, " batch"]


def join(
    full: Float[Tensor, "batch d_vocab"],
    shares: list[Share],
    plausible: Float[Tensor, " batch"],
    max_kl: Float[Tensor, " batch"],
) -> Joined:
    """The logits to choose a token from.

    1. Every term has a difference: `gamma * (full - view)` of an amplified view, `view - full` of
       a replaced one, `-view` of an early layer. They are added up.
    2. Tokens below the plausible share of the plain model's best are ruled out.
    3. Where KL(joined, plain) is above the limit, the sum is multiplied by the largest scale that
       keeps it. The divergence grows with the scale without exception: its slope is the scale
       times the variance of the sum under the joined distribution. Where the cut alone exceeds
       the limit, the row stays plain.

    A token that the model itself rules out (-inf) stays ruled out.

    Args:
        full: The plain model's logits.
        shares: What the views add; a row may have several, or none.
        plausible: The cut of each row; 0 for none.
        max_kl: The limit of each row in nats; infinity for none.

    Source:
        Section 4 of the paper for `(1 + gamma) * full - gamma * view`; contrastive decoding (arXiv
        2210.15097) for the cut. The limit is ours.
    """
    full = full.float()
    kl, scale = full.new_zeros(len(full)), full.new_ones(len(full))
    if not shares:
        return Joined(full, kl, scale)
    # Over a large vocabulary every pass counts: rows without a term are left out of all of them.
    rows = torch.unique(torch.cat([share.rows for share in shares]))
    whole = len(rows) == len(full)
    base = full if whole else full[rows]
    change = _change(base, shares, rows)
    plain = base.log_softmax(dim=-1)
    cut, limit = _implausible(plain, plausible[rows]), max_kl[rows]
    mixed = base + change
    if cut is not None:
        mixed.masked_fill_(cut, -torch.inf)
    spent, kept = divergence(mixed, plain), torch.ones_like(limit)
    over = ((spent > limit) | (limit == 0)).nonzero()[:, 0]
    if len(over):
        cut_over = None if cut is None else cut[over]
        kept[over], mixed[over] = _within(
            base[over], change[over], cut_over, plain[over], limit[over]
        )
        spent[over] = divergence(mixed[over], plain[over])
    kl[rows], scale[rows] = spent, kept
    if not whole:
        logits = full.clone()
        logits[rows] = mixed
        mixed = logits
    return Joined(mixed, kl, scale)


def _change(
    base: Float[Tensor, "rows d_vocab"], shares: list[Share], rows: Int[Tensor, " rows"]
) -> Float[Tensor, "rows d_vocab"]:
    """The differences of all terms, added up; `rows` says which row of the batch each is."""
    total: Tensor | None = None
    for share in shares:
        places = torch.searchsorted(rows, share.rows)
        if len(places) == len(rows) and torch.equal(share.rows, rows):
            own = _difference(base, share)
            total = own if total is None else total.add_(own)
            continue
        total = torch.zeros_like(base) if total is None else total
        total.index_add_(0, places, _difference(base[places], share))
    if total is None:
        raise ValueError("no terms to add up")
    # Where the plain model or a view rules a token out, no difference is defined. A sum tells of
    # one such token in a row at the cost of reading it.
    if not bool((total.sum(dim=-1) + base.sum(dim=-1)).isfinite().all()):
        total = torch.where(total.isfinite() & base.isfinite(), total, 0.0)
    return total


def _difference(full: Tensor, share: Share) -> Tensor:
    view = share.logits.float()
    if share.kind == "replace":
        return view - full
    if share.kind == "early":
        return -view
    return (full - view).mul_(strengths(full, share.strengths)[:, None])


def strengths(
    full: Float[Tensor, "batch d_vocab"], wanted: tuple[Strength, ...]
) -> Float[Tensor, " batch"]:
    """The strength of each row: the constant, or what its entropy makes of it."""
    constant = [0.0 if isinstance(one, Entropy) else float(one) for one in wanted]
    gamma = full.new_tensor(constant)
    if any(isinstance(one, Entropy) for one in wanted):
        entropies = entropy(full)
        for row, one in enumerate(wanted):
            if isinstance(one, Entropy):
                value = entropies[row]
                if one.normalised:
                    value = value / torch.log(torch.tensor(float(full.shape[-1])))
                value = one.factor * value
                gamma[row] = value if one.cap is None else value.clamp(max=one.cap)
    return gamma


def entropy(logits: Float[Tensor, "batch d_vocab"]) -> Float[Tensor, " batch"]:
    """Shannon entropy of the distribution, in nats."""
    log_probs = logits.float().log_softmax(dim=-1)
    return -(log_probs.exp() * log_probs.nan_to_num(neginf=0.0)).sum(dim=-1)


def divergence(
    logits: Float[Tensor, "batch d_vocab"], plain: Float[Tensor, "batch d_vocab"]
) -> Float[Tensor, " batch"]:
    """KL(logits, plain) in nats; `plain` holds log-probabilities."""
    log_probs = logits.log_softmax(dim=-1)
    apart = log_probs - plain
    terms = log_probs.exp_().mul_(apart)
    total = terms.sum(dim=-1)
    if bool(total.isnan().any()):  # 0 * inf of a token that is out: no part of the sum
        total = terms.nan_to_num_(nan=0.0).sum(dim=-1)
    return total.clamp(min=0.0)


def _implausible(
    plain: Float[Tensor, "batch d_vocab"], plausible: Float[Tensor, " batch"]
) -> Bool[Tensor, "batch d_vocab"] | None:
    """Which tokens are out; None where no row has a cut."""
    if not bool((plausible > 0).any()):
        return None
    best = plain.max(dim=-1, keepdim=True).values
    return plain < best + plausible[:, None].log()  # log(0) = -inf: nothing is below


def _within(
    full: Tensor, change: Tensor, cut: Tensor | None, plain: Tensor, limit: Tensor
) -> tuple[Tensor, Tensor]:
    """The largest scale in [0, 1] that keeps the limit, and its logits."""

    def mixed(scale: Tensor) -> Tensor:
        found = full + scale[:, None] * change
        return found if cut is None else found.masked_fill_(cut, -torch.inf)

    low, high = torch.zeros_like(limit), torch.ones_like(limit)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        fits = divergence(mixed(middle), plain) <= limit
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    logits = mixed(low)
    # Too far already by what was cut. Of a limit of 0 rounding would leave a scale of about 1e-4.
    stays = (divergence(logits, plain) > limit) | (limit == 0)
    return torch.where(stays, 0.0, low), torch.where(stays[:, None], full, logits)


def farthest_layer(
    full: Float[Tensor, "batch d_vocab"],
    early: Float[Tensor, "batch layer d_vocab"],
    allowed: Bool[Tensor, "batch layer"] | None = None,
) -> tuple[Float[Tensor, "batch d_vocab"], Int[Tensor, " batch"]]:
    """The early prediction farthest from the last one, and which it is.

    Args:
        full: The last layer's logits.
        early: The candidates' logits.
        allowed: Which candidates a row chooses among; all by default.

    Source:
        DoLa (arXiv 2309.03883), equations 3 and 4: the largest Jensen-Shannon divergence.
    """
    last = full.float().log_softmax(dim=-1)[:, None]
    layers = early.float().log_softmax(dim=-1)
    middle = torch.logaddexp(last, layers) - torch.log(torch.tensor(2.0))
    halves = [
        (part.exp() * torch.where(part.isneginf(), 0.0, part - middle)).sum(dim=-1)
        for part in (last, layers)
    ]
    apart = halves[0] + halves[1]
    if allowed is not None:
        apart = apart.masked_fill(~allowed, -torch.inf)
    chosen = apart.argmax(dim=-1)
    return early[torch.arange(len(early), device=early.device), chosen], chosen
