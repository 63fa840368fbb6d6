"""Joining logits: worked by hand, against scipy, and properties of the limit in nats."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.special import log_softmax
from scipy.stats import entropy as scipy_entropy

from workbench.steering.contrast import Entropy
from workbench.steering.rules import Share, divergence, entropy, farthest_layer, join, strengths

INF = math.inf
FULL = torch.tensor([[1.0, 2.0, 0.0], [0.5, -1.0, 3.0]])
VIEW = torch.tensor([[3.0, 1.0, 0.0], [0.0, 1.0, 1.0]])
# float32 holds a divergence of a few nats to about 1e-6, a sum over few tokens to 1e-5.
ROUNDING = 1e-5


def share(kind, rows, logits, strength=1.0):
    given_strengths = (strength,) * len(rows)
    return Share(kind, torch.tensor(rows), given_strengths, logits)


def joined(full, shares, plausible=0.0, max_kl=INF):
    count = len(full)
    return join(full, shares, torch.full((count,), plausible), torch.full((count,), max_kl))


def kl(logits, plain):
    """KL of two rows of logits in nats, by scipy in float64."""
    of, to = (np.exp(log_softmax(np.asarray(x, dtype=np.float64))) for x in (logits, plain))
    return float(scipy_entropy(of, to))


def test_amplified_replaced_and_early_views_worked_by_hand():
    amplified = joined(FULL, [share("amplify", [0, 1], VIEW, 0.5)]).logits
    assert torch.equal(amplified, torch.tensor([[0.0, 2.5, 0.0], [0.75, -2.0, 4.0]]))
    assert torch.equal(joined(FULL, [share("replace", [0, 1], VIEW)]).logits, VIEW)
    early = joined(FULL, [share("early", [0, 1], VIEW)]).logits
    assert torch.equal(early, torch.tensor([[-2.0, 1.0, 0.0], [0.5, -2.0, 2.0]]))


def test_terms_of_a_sum_add_their_differences_row_by_row():
    other = torch.tensor([[0.0, 0.0, 4.0]])
    shares = [
        share("amplify", [0, 1], VIEW, 0.5),
        share("amplify", [0, 0], torch.cat((other, other)), 0.25),  # twice the same row
        share("early", [1], other),
    ]
    # Row 0: [0, 2.5, 0] + 2 * 0.25 * ([1, 2, 0] - [0, 0, 4]); row 1: [.75, -2, 4] - [0, 0, 4].
    expected = torch.tensor([[0.5, 3.5, -2.0], [0.75, -2.0, 0.0]])
    assert torch.equal(joined(FULL, shares).logits, expected)


def test_a_row_without_terms_is_left_as_it_is_bit_for_bit():
    full = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    found = joined(full, [share("amplify", [1], full[:1], 2.0)], plausible=0.9, max_kl=0.0)
    assert torch.equal(found.logits[[0, 2]], full[[0, 2]])
    assert found.kl[[0, 2]].tolist() == [0, 0]
    nothing = joined(full, [], plausible=0.9, max_kl=0.0)
    assert torch.equal(nothing.logits, full)
    assert nothing.scale.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("strength", "expected"),
    [
        (Entropy(), 1.0397208),  # 1/2 ln 2 + 2 * 1/4 ln 4 = 3/2 ln 2
        (Entropy(normalised=True), 0.9463946),  # / ln 3
        (Entropy(2.0), 2.0794415),
        (Entropy(2.0, cap=1.5), 1.5),
        (Entropy(cap=3.0), 1.0397208),
        (Entropy(cap=0.0), 0.0),
        (0.25, 0.25),
    ],
)
def test_the_entropy_of_a_half_and_two_quarters(strength, expected):
    halves = torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25]]).log() + 7.0
    found = strengths(halves, (strength, 1.0))
    torch.testing.assert_close(found, torch.tensor([expected, 1.0]), atol=1e-6, rtol=0)


def test_entropy_is_that_of_scipy_and_knows_tokens_that_are_ruled_out():
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(1)) * 3
    logits[2, 5:] = -INF
    expected = scipy_entropy(logits.double().softmax(-1).numpy(), axis=-1)
    torch.testing.assert_close(
        entropy(logits), torch.from_numpy(expected).float(), atol=ROUNDING, rtol=0
    )


def test_the_plausibility_cut_worked_by_hand():
    # Probabilities .5, .25, .2, .05: with a share of .4, what is below .2 goes; .2 itself stays.
    full = torch.tensor([[0.5, 0.25, 0.2001, 0.0499]]).log()
    view = torch.tensor([[2.0, 0.0, -1.0, -5.0]])
    found = joined(full, [share("amplify", [0], view, 1.0)], plausible=0.4).logits
    expected = 2 * full - view
    assert torch.equal(found[0, :3], expected[0, :3])
    assert found[0, 3] == -INF
    assert expected[0].argmax() == 3, "without the cut the implausible token would win"
    assert found.argmax() == 2
    half = torch.tensor([[1.0, 0.5]]).log()
    kept = joined(half, [share("amplify", [0], half, 1.0)], plausible=0.5).logits
    assert kept.isfinite().all(), "what has just the share stays in"
    all_in = joined(full, [share("amplify", [0], view, 1.0)]).logits
    assert torch.equal(all_in, expected)


def test_what_the_model_rules_out_stays_out_and_brings_no_nan():
    full = torch.tensor([[1.0, -INF, 0.0, 2.0]])
    for view in ([[0.0, -INF, 0.0, 0.0]], [[0.0, 9.0, -INF, 0.0]]):
        for kind in ("amplify", "replace", "early"):
            found = joined(full, [share(kind, [0], torch.tensor(view))], 0.01, 0.05)
            assert found.logits[0, 1] == -INF
            assert found.logits[0, [0, 3]].isfinite().all()
            assert found.kl.isfinite().all()


def test_the_reported_divergence_is_that_of_scipy():
    generator = torch.Generator().manual_seed(2)
    full, view = torch.randn(2, 3, 40, generator=generator) * 2
    found = joined(full, [share("amplify", [0, 1, 2], view, 1.5)], plausible=0.01)
    for row in range(3):
        assert found.kl[row] == pytest.approx(kl(found.logits[row], full[row]), abs=ROUNDING)
    assert found.kl.min() > 0.1


ROWS = hnp.arrays(np.float32, (2, 8), elements=st.floats(-6, 6, width=32))


@given(ROWS, st.floats(0, 3), st.floats(0.001, 2), st.sampled_from([0.0, 0.1, 0.5]))
@settings(deadline=None, max_examples=150)
def test_the_limit_holds_and_is_used_up_where_it_binds(logits, gamma, limit, plausible):
    full, view = torch.from_numpy(logits)[:, None]
    free = joined(full, [share("amplify", [0], view, gamma)], plausible)
    found = joined(full, [share("amplify", [0], view, gamma)], plausible, limit)
    moved = kl(found.logits[0], full[0])
    assert moved <= limit + ROUNDING
    assert 0 <= found.scale[0] <= 1
    cut_alone = kl(full[0].masked_fill(free.logits[0].isneginf(), -INF), full[0])
    if cut_alone > limit + ROUNDING:
        assert torch.equal(found.logits, full)
    elif free.kl[0] > limit and cut_alone < limit - ROUNDING:
        assert moved == pytest.approx(limit, abs=1e-4)
        assert found.scale[0] < 1
    elif free.kl[0] <= limit:
        assert torch.equal(found.logits, free.logits)


@given(ROWS, st.floats(0, 2), st.floats(0, 2))
@settings(deadline=None, max_examples=100)
def test_a_stronger_contrast_moves_a_step_further(logits, one, other):
    full, view = torch.from_numpy(logits)[:, None]
    low, high = sorted((one, other))
    moved = [float(joined(full, [share("amplify", [0], view, g)]).kl[0]) for g in (low, high)]
    assert moved[0] <= moved[1] + ROUNDING


def test_a_tighter_limit_gives_a_smaller_scale():
    generator = torch.Generator().manual_seed(3)
    full, view = torch.randn(2, 1, 60, generator=generator) * 2
    scales = [
        float(joined(full, [share("amplify", [0], view, 2.0)], max_kl=limit).scale[0])
        for limit in (0.0, 1e-4, 1e-2, 0.1, 0.5, INF)
    ]
    assert scales == sorted(scales)
    assert scales[0] == 0
    assert scales[-1] == 1
    assert len(set(scales)) == len(scales)


def test_a_limit_of_zero_nats_is_the_plain_model_bit_for_bit():
    generator = torch.Generator().manual_seed(4)
    for size in (0.01, 1.0, 10.0):
        full, view = torch.randn(2, 20, 100, generator=generator) * size
        rows = list(range(20))
        found = joined(full, [share("amplify", rows, view, 3.0)], max_kl=0.0)
        assert torch.equal(found.logits, full)
        assert found.kl.tolist() == [0] * 20
        # A divergence that rounds to 0 is not yet none.
        weak = joined(full, [share("amplify", rows, view, 1e-4)], max_kl=0.0)
        assert torch.equal(weak.logits, full)


def test_a_cut_that_alone_exceeds_the_limit_leaves_the_row_plain():
    # Half of the mass is cut: KL = ln 2.
    full = torch.tensor([[0.5, 0.2, 0.2, 0.1], [0.5, 0.2, 0.2, 0.1]]).log()
    shares = [share("amplify", [0, 1], torch.zeros(2, 4), 0.5)]
    limits = torch.tensor([0.69, 0.70])
    found = join(full, shares, torch.tensor([0.9, 0.9]), limits)
    assert torch.equal(found.logits[0], full[0])
    assert found.scale.tolist() == [0.0, 1.0]
    assert found.logits[1, 1:].tolist() == [-INF] * 3
    assert found.kl.tolist() == pytest.approx([0, math.log(2)], abs=1e-6)


def test_divergence_of_a_fair_and_a_loaded_coin():
    plain = torch.tensor([[0.25, 0.75]]).log()
    fair = torch.zeros(1, 2)
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert float(divergence(fair, plain)) == pytest.approx(expected, abs=1e-6)


def test_the_farthest_layer_is_that_of_scipys_jensen_shannon_distance():
    from scipy.spatial.distance import jensenshannon

    generator = torch.Generator().manual_seed(5)
    full = torch.randn(6, 30, generator=generator) * 2
    early = torch.randn(6, 4, 30, generator=generator) * torch.rand(6, 4, 1, generator=generator)
    found, chosen = farthest_layer(full, early)
    last, layers = full.softmax(-1).numpy(), early.softmax(-1).numpy()
    expected = [
        int(np.argmax([jensenshannon(last[row], layers[row, n]) for n in range(4)]))
        for row in range(6)
    ]
    assert chosen.tolist() == expected
    assert len(set(expected)) > 1
    assert torch.equal(found, early[range(6), expected])
