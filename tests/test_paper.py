"""The paper's format: what LaTeX would take for its own, and pictures without their titles."""

from __future__ import annotations

import pytest
from test_figures import make_sweep

from workbench import figures
from workbench.figures.grid import HEADER
from workbench.report.paper import _tex, without_title


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("95 % of L0_H1 & more", r"95 \% of L0\_H1 \& more"),
        (
            r"\input{x} ~ ^ # $",
            r"\textbackslash{}input\{x\} \textasciitilde{} \textasciicircum{} \# \$",
        ),
        ("γ = 1", r"$\gamma$ = 1"),
    ],
)
def test_captions_hold_no_commands(text, told):
    assert _tex(text) == told


def test_only_title_and_its_room_go():
    whole = figures.head_count(make_sweep())
    bare = without_title(whole)
    assert whole.layout.title.text
    assert not bare.layout.title.text
    assert not bare.layout.title.subtitle.text
    assert whole.layout.height - bare.layout.height == HEADER
    assert whole.layout.margin.t - bare.layout.margin.t == HEADER
    assert len(bare.data) == len(whole.data)
