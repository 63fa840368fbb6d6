"""Which views a batch needs, in which rows they are computed, and what they add to the logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.steering.contrast import Contrast, Term, candidate_layers
from workbench.steering.rules import Joined, Share, farthest_layer, join


@dataclass(frozen=True)
class Views:
    """What one step computes: the logits of the next token in every view.

    Attributes:
        full: The plain model's, a row an example.
        others: Behind another prompt, a row for each of `Layout.others`.
        gated: Without some heads, a row for each of `Layout.gated`.
        early: Read out of the layers in `Layout.early`, for every example; None if there are none.
    """

    full: Float[Tensor, "examples d_vocab"]
    others: Float[Tensor, "others d_vocab"]
    gated: Float[Tensor, "gated d_vocab"]
    early: Float[Tensor, "examples layers d_vocab"] | None = None


@dataclass(frozen=True)
class Use:
    """One term of one example's contrast.

    Attributes:
        example: Its row in the batch.
        term: The term.
        row: The view's place among `others` or `gated`.
    """

    example: int
    term: Term
    row: int = 0


@dataclass(frozen=True)
class Layout:
    """The rows of a batch beside its examples'.

    Attributes:
        contrasts: One an example; None for the plain model.
        others: The example of every row with another prompt.
        gated: The example of every view without some heads.
        gates: Those views' gates, [gated, layer, head].
        early: Blocks whose input is read out.
        uses: What becomes of the views.
    """

    contrasts: tuple[Contrast | None, ...]
    others: tuple[int, ...]
    gated: tuple[int, ...]
    gates: Float[Tensor, "gated layer head"]
    early: tuple[int, ...]
    uses: tuple[Use, ...]

    @classmethod
    def of(
        cls, contrasts: Sequence[Contrast | None], shape: Sequence[int], tied: bool = False
    ) -> Layout:
        """The rows that some contrasts need; a view that an example uses twice is made once.

        Args:
            contrasts: One an example; None for the plain model.
            shape: Number of heads in every block.
            tied: Whether embedding and unembedding are the same matrix.
        """
        others: list[int] = []
        gated: list[int] = []
        gates: list[Tensor] = []
        early: set[int] = set()
        uses = []
        for example, contrast in enumerate(contrasts):
            known: dict[object, int] = {}
            for term in contrast.terms if contrast is not None else ():
                key = term.heads if term.where == "heads" else term.where
                used = term
                if term.where == "layers":
                    layers = candidate_layers(term.layers, len(shape), tied)
                    early.update(layers)
                    used = replace(term, layers=layers)
                elif key not in known and term.where == "prompt":
                    known[key] = len(others)
                    others.append(example)
                elif key not in known:
                    known[key] = len(gated)
                    gated.append(example)
                    gates.append(torch.from_numpy(term.heads.gates(shape)))
                uses.append(Use(example, used, known.get(key, 0)))
        none = torch.ones(0, len(shape), max(shape))
        return cls(
            tuple(contrasts),
            tuple(others),
            tuple(gated),
            torch.stack(gates) if gates else none,
            tuple(sorted(early)),
            tuple(uses),
        )

    @property
    def rows(self) -> int:
        """Rows of the batch, a gated view being one."""
        return len(self.contrasts) + len(self.others) + len(self.gated)

    @property
    def split(self) -> int | None:
        """The lowest block in which a view is gated; below it both views are the same."""
        changed = (self.gates != 1).any(dim=-1).any(dim=0).nonzero()
        return int(changed[0]) if len(changed) else None

    def select(self, examples: Sequence[int]) -> tuple[Layout, list[int], list[int]]:
        """The layout of some of the examples, in any order and as often as they are named.

        Returns:
            The layout, and which rows of `others` and of `gated` it takes.
        """
        others: list[tuple[int, int]] = []
        gated: list[tuple[int, int]] = []
        uses: list[Use] = []
        for new, old in enumerate(examples):
            places: dict[tuple[str, int], int] = {}
            for kind, rows, kept in (("prompt", self.others, others), ("heads", self.gated, gated)):
                for row, example in enumerate(rows):
                    if example == old:
                        places[kind, row] = len(kept)
                        kept.append((row, new))
            uses += [
                Use(new, use.term, places.get((use.term.where, use.row), 0))
                for use in self.uses
                if use.example == old
            ]
        layout = Layout(
            tuple(self.contrasts[old] for old in examples),
            tuple(new for _, new in others),
            tuple(new for _, new in gated),
            self.gates[[row for row, _ in gated]],
            self.early,
            tuple(uses),
        )
        return layout, [row for row, _ in others], [row for row, _ in gated]

    def spoilt(self, views: Views) -> int | None:
        """The row of an example that uses a view with NaN in its logits; None if there is none."""
        owners = [*range(len(self.contrasts)), *self.others, *self.gated]
        parts = [views.full, views.others, views.gated]
        if views.early is not None:
            early = sorted({use.example for use in self.uses if use.term.where == "layers"})
            owners += early
            parts.append(views.early[early].sum(dim=1))
        wrong = torch.cat([part.isnan().any(dim=-1) for part in parts])
        return owners[int(wrong.float().argmax())] if bool(wrong.any()) else None

    def join(self, views: Views) -> Joined:
        """The logits to choose the next tokens from."""
        full = views.full.float()
        limits = [
            (0.0, torch.inf)
            if c is None
            else (c.plausible, torch.inf if c.max_kl is None else c.max_kl)
            for c in self.contrasts
        ]
        plausible, max_kl = full.new_tensor(limits).unbind(dim=1)
        shares = [self._share(views, full, uses) for uses in self._groups]
        return join(full, shares, plausible, max_kl)

    @cached_property
    def _groups(self) -> list[list[Use]]:
        """Uses that are computed together: of one kind, about one thing."""
        groups: dict[tuple[str, str], list[Use]] = {}
        for use in self.uses:
            groups.setdefault((use.term.kind, use.term.where), []).append(use)
        return list(groups.values())

    def _share(self, views: Views, full: Tensor, uses: Sequence[Use]) -> Share:
        rows = torch.tensor([use.example for use in uses], device=full.device)
        if uses[0].term.where == "layers":
            logits = self._early(views, full, uses, rows)
        else:
            source = views.others if uses[0].term.where == "prompt" else views.gated
            logits = source[[use.row for use in uses]]
        return Share(uses[0].term.kind, rows, tuple(use.term.strength for use in uses), logits)

    def _early(self, views: Views, full: Tensor, uses: Sequence[Use], rows: Tensor) -> Tensor:
        if views.early is None:
            raise ValueError("an early layer is wanted, and none was read out")
        allowed = [[layer in use.term.layers for layer in self.early] for use in uses]
        mask = torch.tensor(allowed, device=full.device)
        found, _ = farthest_layer(full[rows], views.early[rows], mask)
        return found
