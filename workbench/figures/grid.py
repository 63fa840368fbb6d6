"""Panels laid out in pixels, so that text and cells keep their size whatever a table holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from workbench.figures.template import BODY

# The title and two lines of subtitle.
HEADER = 84
# What a title needs, however few panels there are.
NARROWEST = 720


@dataclass(frozen=True)
class Grid:
    """Panels in rows, filled from the upper left.

    Attributes:
        number: How many panels.
        widths: Pixels across the panels of each column.
        height: Pixels from the bottom to the top of a panel.
        gap: Pixels between columns and between rows.
        left: Pixels left of the panels.
        right: Pixels right of them, at least.
        bottom: Pixels below them.
        top: Pixels between the header and the first row.
    """

    number: int
    widths: tuple[float, ...]
    height: float
    gap: tuple[int, int]
    left: int
    right: int
    bottom: int
    top: int = 24

    @property
    def columns(self) -> int:
        """Panels in a full row."""
        return len(self.widths)

    @property
    def rows(self) -> int:
        """Rows, the last of which may be short."""
        return math.ceil(self.number / self.columns)

    @property
    def inner(self) -> tuple[float, float]:
        """Width and height of all panels with the gaps between them."""
        across = sum(self.widths) + (self.columns - 1) * self.gap[0]
        return across, self.rows * self.height + (self.rows - 1) * self.gap[1]

    def figure(self, titles: Sequence[str]) -> go.Figure:
        """An empty figure of the right size, with a title over each panel."""
        across, down = self.inner
        width = max(round(across) + self.left + self.right, NARROWEST)
        figure = make_subplots(
            self.rows,
            self.columns,
            specs=[
                [{} if r * self.columns + c < self.number else None for c in range(self.columns)]
                for r in range(self.rows)
            ],
            subplot_titles=titles,
            column_widths=[w / sum(self.widths) for w in self.widths],
            # Plotly refuses a gap wider than the panels, even where there is none to leave.
            horizontal_spacing=self.gap[0] / across if self.columns > 1 else 0,
            vertical_spacing=self.gap[1] / down if self.rows > 1 else 0,
        )
        # The template is applied later and would not reach titles that have a size already.
        figure.update_annotations(font_size=BODY)
        return figure.update_layout(
            width=width,
            height=round(down) + HEADER + self.top + self.bottom,
            margin={
                "l": self.left,
                "r": width - self.left - round(across),
                "t": HEADER + self.top,
                "b": self.bottom,
            },
        )

    def place(self, panel: int) -> dict[str, int]:
        """Row and column of a panel, as Plotly counts them."""
        return {"row": panel // self.columns + 1, "col": panel % self.columns + 1}

    def leftmost(self, panel: int) -> bool:
        """Whether no panel is left of this one."""
        return panel % self.columns == 0

    def lowest(self, panel: int) -> bool:
        """Whether no panel is below this one."""
        return panel + self.columns >= self.number
