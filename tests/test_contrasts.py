"""What a contrast asks for: views, strengths, cuts and limits, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from loops import check_answer, prompts_of

import workbench as wb
from workbench.analysis.answers import Answers
from workbench.errors import InputError
from workbench.heads import Gates, Head, HeadSet
from workbench.hooks import head_gates
from workbench.models import heads_per_layer, pad_token
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
from workbench.steering.engines import HookedSession, open_engine
from workbench.steering.labels import label_tokens
from workbench.steering.layout import Layout, Views
from workbench.steering.loop import end_tokens

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


# Soft gates

SOFT = Gates(((1, 1, 1, 1), (0.25, 1, 1, 0.6), (1, 0, 1, 0.9)))


def test_soft_gates_are_a_view_and_gates_that_are_all_1_are_none():
    both = DPS(SOFT, 0.5) + DeCoRe(SOFT) + DPS(HEADS)
    layout = Layout.of([both, Ablated(SOFT), None], SHAPE)
    assert layout.gated == (0, 0, 1)
    assert torch.equal(layout.gates[0], torch.from_numpy(SOFT.gates(SHAPE)))
    assert layout.split == 1
    open_ones = Gates(((1,) * 4,) * 3)
    assert not DPS(open_ones).active
    assert not Ablated(open_ones).active
    with pytest.raises(InputError, match="made for another model"):
        DPS(SOFT, 0.0).check((4, 4))


@pytest.fixture(scope="module")
def asked():
    """Six headlines, whose prompts differ in length."""
    rows = wb.load_examples("testbed", "validation", tasks=["testbed-headline"])[::40]
    return [replace(e, profile=e.profile[: n % 3]) for n, e in enumerate(rows)]


def soft_gates(model, seed):
    shape = heads_per_layer(model)
    rng = np.random.default_rng(seed)
    some = rng.random((len(shape), max(shape))) < 0.5
    return Gates.from_weights(some * rng.random(some.shape), shape)


@torch.inference_mode()
def gated_logits(model, gates, ids):
    """The bridge's logits of a whole text, no cache, with gates at z."""
    with head_gates(model, gates.gates(heads_per_layer(model))):
        return model(torch.tensor([ids]), return_type="logits")[0].float()


@torch.inference_mode()
def plain_loop(model, gates, prompt, new):
    """Both views' logits at every step, each from a whole pass of the bridge."""
    ids = [*prompt.ids, *new]
    full = model(torch.tensor([ids]), return_type="logits")[0].float()
    at = slice(len(prompt.ids) - 1, None)
    return full[at], gated_logits(model, gates, ids)[at]


NEW = 8


def test_masked_decoding_with_soft_gates_is_the_uncached_loop_with_gates_at_z(testbed_model, asked):
    gates = [soft_gates(testbed_model, seed) for seed in range(len(asked))]
    assert all(0 < gate < 1 for gate in np.unique(gates[0].values)[:-1])
    contrasts = [Ablated(one) if n == 2 else DPS(one, 0.5 + n / 4) for n, one in enumerate(gates)]
    answers = wb.generate(testbed_model, asked, contrasts, max_new_tokens=NEW)
    prompts = prompts_of(testbed_model, asked, NEW)
    for n, (answer, prompt) in enumerate(zip(answers, prompts, strict=True)):
        full, view = plain_loop(testbed_model, gates[n], prompt, answer.tokens)
        joined = view if n == 2 else full + (0.5 + n / 4) * (full - view)
        check_answer(answer, joined, full, end_tokens(testbed_model))
    assert max(max(answer.kl) for answer in answers) > 0.1  # the gates do something


def test_a_shared_prefill_gates_softly_from_the_last_token_of_the_prompt_on(testbed_model, asked):
    gates = soft_gates(testbed_model, 3)
    answers = wb.generate(
        testbed_model, asked, DPS(gates, 0.7), max_new_tokens=NEW, prefill="shared"
    )
    for answer, prompt in zip(answers, prompts_of(testbed_model, asked, NEW), strict=True):
        full, _ = plain_loop(testbed_model, gates, prompt, answer.tokens)
        view = []
        with torch.inference_mode():
            ids = torch.tensor([prompt.ids])
            _, cache = testbed_model(ids[:, :-1], return_type="logits_and_cache", use_cache=True)
            with head_gates(testbed_model, gates.gates(heads_per_layer(testbed_model))):
                for token in (prompt.ids[-1], *answer.tokens):
                    logits, cache = testbed_model(
                        torch.tensor([[token]]),
                        return_type="logits_and_cache",
                        past_key_values=cache,
                    )
                    view.append(logits[0, -1].float())
        joined = full + 0.7 * (full - torch.stack(view))
        check_answer(answer, joined, full, end_tokens(testbed_model))


def test_the_hooked_engine_gates_softly_as_the_models_own_modules_do(testbed_model, asked):
    shape, gates = heads_per_layer(testbed_model), soft_gates(testbed_model, 1)
    rows = [prompt.ids for prompt in prompts_of(testbed_model, asked, NEW)]
    layout = Layout.of([DPS(gates, 1.0)] * len(rows), shape)
    engine = open_engine(testbed_model)
    assert engine.native is not None
    with torch.inference_mode():
        own = engine.session(rows, layout, NEW).start()
        hooked = HookedSession(testbed_model, rows, layout, NEW, pad_token(testbed_model)).start()
    for a, b in ((own.full, hooked.full), (own.gated, hooked.gated)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)  # sums in another order
    assert (own.full - own.gated).abs().max() > 0.1


def test_gates_of_0_and_1_give_a_head_sets_answers_token_by_token(testbed_model, asked):
    shape, heads = heads_per_layer(testbed_model), HeadSet.parse("L1H3 L2H5 L3H0")
    hard = Gates.from_weights(1 - heads.gates(shape), shape)
    for prefill in ("masked", "shared"):
        options = {"max_new_tokens": NEW, "prefill": prefill}
        of_set = wb.generate(testbed_model, asked, DPS(heads, 1.0), **options)
        of_gates = wb.generate(testbed_model, asked, DPS(hard, 1.0), **options)
        assert of_set == of_gates
    assert wb.decide(testbed_model, [label_example()], DPS(heads)) == wb.decide(
        testbed_model, [label_example()], DPS(hard)
    )


def label_example():
    return wb.load_examples("testbed", "validation", tasks=["testbed-tag"], users=1)[0]


def test_labels_are_decided_under_soft_gates(testbed_model):
    example, gates = label_example(), soft_gates(testbed_model, 2)
    (decision,) = wb.decide(testbed_model, [example], Ablated(gates))
    (prompt,) = prompts_of(testbed_model, [example], 1)
    for label, log_prob in decision.log_probs.items():
        (spelled,) = label_tokens(testbed_model, example)[label]  # the testbed's are single words
        view = gated_logits(testbed_model, gates, prompt.ids)[-1].log_softmax(-1)
        assert log_prob == pytest.approx(float(view[spelled]), abs=1e-4)


def test_the_processor_gates_softly_as_generate_does(testbed_model, asked):
    gates, asked = soft_gates(testbed_model, 4), asked[:3]
    answers = wb.generate(testbed_model, asked, DPS(gates, 0.8), max_new_tokens=NEW)
    native = wb.hf_model(testbed_model)
    for answer, prompt in zip(answers, prompts_of(testbed_model, asked, NEW), strict=True):
        ids = torch.tensor([prompt.ids])
        processor = wb.DPSLogitsProcessor(testbed_model, DPS(gates, 0.8), torch.ones_like(ids))
        written = native.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW,
            do_sample=False,
            logits_processor=[processor],
        )
        assert tuple(written[0, len(prompt.ids) :][: len(answer.tokens)].tolist()) == answer.tokens


def test_kept_answers_are_told_apart_by_gate_and_by_user(testbed_model, asked, tmp_path):
    shape, heads = heads_per_layer(testbed_model), HeadSet.parse("L2H5")
    answers = Answers(testbed_model, asked, 2, folder=tmp_path)

    def files():
        return len(list((tmp_path / "answers").glob("*.parquet")))

    half, most = (Gates.from_weights((1 - heads.gates(shape)) * w, shape) for w in (0.5, 0.9))
    for count, one in enumerate((DPS(heads), DPS(half), DPS(most), DPS(half, 0.7)), start=1):
        answers.texts(one)
        assert files() == count
    users = {e.user for e in asked}
    texts = answers.texts(dict.fromkeys(users, DPS(half)))
    assert files() == 4  # as one contrast for all
    assert texts == answers.texts(DPS(half))
    first = asked[0].user
    mixed = {user: DPS(half if user == first else most) for user in users}
    texts = answers.texts(mixed)
    assert files() == 5
    assert texts == [
        a if e.user == first else b
        for e, a, b in zip(asked, answers.texts(DPS(half)), answers.texts(DPS(most)), strict=True)
    ]
    with pytest.raises(InputError, match="no contrast for user"):
        answers.texts({first: DPS(half)})
