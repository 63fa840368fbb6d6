"""What a contrast asks for: views, strengths, cuts and limits, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

import workbench as wb
from workbench.errors import InputError
from workbench.heads import Head, HeadSet
from workbench.steering.contrast import (
    CAD,
    DPS,
    Ablated,
    DeCoRe,
    DoLa,
    Entropy,
    NoProfile,
    Sum,
    candidate_layers,
)
from workbench.steering.layout import Layout, Views

HEADS = HeadSet((Head(1, 0), Head(2, 3)))
OTHER = HeadSet((Head(2, 1),))
SHAPE = (4, 4, 4)


@pytest.mark.parametrize("make", [lambda g: DPS(HEADS, g), CAD, lambda g: DeCoRe(HEADS, g)])
@pytest.mark.parametrize("gamma", [-0.5, math.nan, math.inf])
def test_a_strength_that_is_none_is_refused(make, gamma):
    with pytest.raises(InputError, match="gamma must be >= 0, got"):
        make(gamma)


@pytest.mark.parametrize("options", [{"factor": -1}, {"factor": math.nan}, {"cap": -0.1}])
def test_an_entropy_strength_below_zero_is_refused(options):
    with pytest.raises(InputError, match=f"{next(iter(options))} must be >= 0"):
        Entropy(**options)


@pytest.mark.parametrize("plausible", [-0.1, 1.0, 1.5, math.nan])
def test_a_cut_outside_zero_and_one_is_refused(plausible):
    with pytest.raises(InputError, match=r"plausible must be in \[0, 1\)"):
        CAD(plausible=plausible)
    with pytest.raises(InputError, match=r"plausible must be in \[0, 1\)"):
        Sum((CAD(),), plausible=plausible)


@pytest.mark.parametrize("max_kl", [-0.1, math.nan])
def test_a_limit_below_zero_is_refused(max_kl):
    with pytest.raises(InputError, match="max_kl must be >= 0 nats"):
        DPS(HEADS, max_kl=max_kl)
    with pytest.raises(InputError, match="max_kl must be >= 0 nats"):
        Sum((CAD(max_kl=1.0),), max_kl=max_kl)


@pytest.mark.parametrize("control", [NoProfile(), Ablated(HEADS)])
def test_a_control_can_not_be_added_up(control):
    with pytest.raises(InputError, match=f"{type(control).__name__} is a control"):
        control + CAD()
    with pytest.raises(InputError, match="is a control"):
        DPS(HEADS) + CAD() + control


def test_the_strictest_cut_and_limit_hold_for_a_sum():
    total = DPS(HEADS, plausible=0.2, max_kl=0.5) + CAD(plausible=0.1, max_kl=0.3)
    assert (total.plausible, total.max_kl) == (0.2, 0.3)
    assert (DPS(HEADS) + CAD()).max_kl is None
    assert (CAD() + DoLa()).plausible == 0.1
    own = Sum((DPS(HEADS, max_kl=0.5), CAD()), plausible=0.4, max_kl=0.2)
    assert (own.plausible, own.max_kl) == (0.4, 0.2)


def test_a_sum_that_is_added_to_keeps_its_own_cut_and_limit():
    own = Sum((DPS(HEADS), CAD()), plausible=0.4, max_kl=0.2)
    for total in (own + DoLa(), DoLa() + own):
        assert (total.plausible, total.max_kl) == (0.4, 0.2)
        assert {type(part) for part in total.parts} == {DPS, CAD, DoLa}


def test_what_changes_nothing_asks_for_no_view():
    empty = HeadSet(())
    for contrast in (
        DPS(HEADS, 0),
        DPS(empty, 2),
        DeCoRe(HEADS, Entropy(cap=0)),
        DeCoRe(HEADS, Entropy(0)),
        CAD(0),
        Ablated(empty),
        DPS(empty) + CAD(0),
    ):
        assert contrast.terms == ()
        assert not contrast.active
    assert len((DPS(HEADS) + CAD(0) + DoLa()).terms) == 2


def test_heads_and_layers_outside_a_model_are_refused():
    above, beside = HeadSet((Head(3, 0),)), HeadSet((Head(0, 4),))
    for contrast in (DPS(above), Ablated(beside), CAD() + DeCoRe(beside)):
        with pytest.raises(InputError, match="is not a head of this model"):
            contrast.check(SHAPE)
    for layers in ((3,), (-1, 1), ()):
        with pytest.raises(InputError, match="wanted layers between 0 and 2"):
            DoLa(layers).check(SHAPE)
    with pytest.raises(InputError, match="layers must be low, high or numbers of blocks"):
        DoLa("middle")


# By hand after the comment in Transformers' `_dola_decoding`: for up to 40 layers range(0, N // 2,
# 2) and range(N // 2, N, 2), for more range(0, 20, 2) and range(N - 20, N, 2); tied embeddings
# begin at 2, and where that is N // 2 it is the only one.
@pytest.mark.parametrize(
    ("blocks", "tied", "low", "high"),
    [
        (2, False, (0,), (1,)),
        (3, False, (0,), (1,)),
        (4, True, (2,), (2,)),
        (5, True, (2,), (2, 4)),
        (6, True, (2,), (3, 5)),
        (12, False, (0, 2, 4), (6, 8, 10)),
        (12, True, (2, 4), (6, 8, 10)),
        (40, False, tuple(range(0, 20, 2)), tuple(range(20, 40, 2))),
        (41, False, tuple(range(0, 20, 2)), tuple(range(21, 41, 2))),
        (80, True, tuple(range(2, 20, 2)), tuple(range(60, 80, 2))),
    ],
)
def test_candidate_layers_are_those_of_transformers(blocks, tied, low, high):
    assert candidate_layers("low", blocks, tied) == low
    assert candidate_layers("high", blocks, tied) == high


def test_layers_that_are_named_are_taken_as_they_are():
    assert candidate_layers((3, 1, 3), 4, True) == (1, 3)
    assert DoLa([1, 2]) == DoLa((1, 2))
    assert hash(DoLa([1, 2])) == hash(DoLa((1, 2)))
    with pytest.raises(InputError, match="no low layers for DoLa; name some"):
        candidate_layers("low", 3, True)


def test_a_view_that_an_example_uses_twice_is_made_once():
    both = DPS(HEADS, 0.5) + DeCoRe(HEADS) + DPS(OTHER) + CAD(0.1) + CAD(0.2)
    layout = Layout.of([None, both, DPS(OTHER), NoProfile()], SHAPE)
    assert layout.gated == (1, 1, 2)
    assert layout.others == (1, 3)
    assert layout.rows == 4 + 2 + 3
    assert layout.split == 1
    assert [(use.example, use.row) for use in layout.uses] == [
        (1, 0),
        (1, 0),
        (1, 1),
        (1, 0),
        (1, 0),
        (2, 2),
        (3, 1),
    ]
    assert Layout.of([None, CAD()], SHAPE).split is None


def test_rows_taken_in_any_order_and_twice_join_as_before():
    generator = torch.Generator().manual_seed(0)
    contrasts = [
        DPS(HEADS, 0.5) + CAD(0.3) + DPS(OTHER, 1.0),
        None,
        NoProfile(),
        DoLa((0, 2), max_kl=0.1),
        Ablated(OTHER),
        DeCoRe(OTHER) + DoLa((1,)),
    ]
    layout = Layout.of(contrasts, SHAPE)
    assert layout.early == (0, 1, 2)

    def draw(*shape):
        return torch.randn(*shape, 20, generator=generator)

    views = Views(draw(6), draw(len(layout.others)), draw(len(layout.gated)), draw(6, 3))
    whole = layout.join(views).logits
    for examples in ([5, 3, 0], [0, 0, 4, 4], [2], [1, 2], [5, 4, 3, 2, 1, 0]):
        part, others, gated = layout.select(examples)
        rows = views.full[examples], views.others[others], views.gated[gated]
        found = part.join(Views(*rows, views.early[examples]))
        assert torch.equal(found.logits, whole[examples])
        again, *_ = part.select(range(len(examples)))
        assert again.uses == part.uses


def test_heads_are_checked_whatever_the_strength(testbed_model):
    example = wb.load_examples("testbed", "validation", users=1)[0]
    nowhere = HeadSet((Head(9, 0),))
    for contrast in (wb.DPS(nowhere, 0.0), wb.DPS(nowhere, 0.0) + wb.CAD(0.0), wb.Ablated(nowhere)):
        with pytest.raises(wb.InputError, match="L9H0 is not a head of this model"):
            wb.generate(testbed_model, example, contrast)
