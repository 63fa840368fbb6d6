"""Decoding held against plain loops without cache, and against Hugging Face's own."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from plain import plain_copy, zero_output_weights

import workbench as wb
from workbench.data.prompts import build_prompts
from workbench.heads import Head, HeadSet
from workbench.models import heads_per_layer
from workbench.steering.contrast import DPS
from workbench.steering.decode import generate
from workbench.steering.loop import Sampling, end_tokens

HEADS = HeadSet((Head(0, 3), Head(1, 6), Head(2, 1)))
NEW = 12


@pytest.fixture(scope="module")
def asked():
    examples = wb.load_examples("testbed", "validation", users=4)
    return [e for e in examples if e.id.endswith(("q0", "q1"))]


def texts(answers):
    return [answer.tokens for answer in answers]


@torch.inference_mode()
def uncached(views, prompt, gamma, ends):
    """The equation as it is printed: two whole passes a token, no cache, no batch."""
    ids, new = list(prompt.ids), []
    for _ in range(NEW):
        full, ablated = (view(torch.tensor([ids])).logits[0, -1] for view in views)
        token = int(((1 + gamma) * full - gamma * ablated).argmax())
        if token in ends:
            break
        new.append(token)
        ids.append(token)
    return tuple(new)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_batched_cached_decoding_equals_two_uncached_models(testbed_model, asked, gamma):
    shape = heads_per_layer(testbed_model)
    full, ablated = plain_copy(testbed_model), plain_copy(testbed_model)
    for head in HEADS:
        zero_output_weights(ablated, head, shape[head.layer])
    prompts = build_prompts(asked, testbed_model.tokenizer, 256)
    ends = end_tokens(testbed_model)
    expected = [uncached((full, ablated), prompt, gamma, ends) for prompt in prompts]
    found = generate(testbed_model, asked, DPS(HEADS, gamma), max_new_tokens=NEW)
    assert texts(found) == expected
    plain = generate(testbed_model, asked, max_new_tokens=NEW)
    assert texts(found) != texts(plain), "the contrast must do something for this to be a test"


def test_zero_gamma_and_empty_set_give_the_plain_models_tokens(testbed_model, asked):
    plain = texts(generate(testbed_model, asked, max_new_tokens=NEW))
    assert texts(generate(testbed_model, asked, DPS(HEADS, 0.0), max_new_tokens=NEW)) == plain
    assert texts(generate(testbed_model, asked, DPS(HeadSet(()), 2), max_new_tokens=NEW)) == plain


@torch.inference_mode()
def test_plain_tokens_equal_hugging_face_greedy(testbed_model, asked):
    twin = plain_copy(testbed_model)
    twin.generation_config = testbed_model.original_model.generation_config
    answers = generate(testbed_model, asked, max_new_tokens=NEW)
    for prompt, answer in zip(
        build_prompts(asked, testbed_model.tokenizer, 256), answers, strict=True
    ):
        ids = torch.tensor([prompt.ids])
        whole = twin.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False
        )
        new = [
            t for t in whole[0, len(prompt.ids) :].tolist() if t not in end_tokens(testbed_model)
        ]
        assert answer.tokens == tuple(new)


def test_users_with_different_heads_in_one_batch_equal_each_alone(testbed_model, asked):
    users = list(dict.fromkeys(e.user for e in asked))
    sets = [HEADS, HeadSet((Head(0, 5),)), HeadSet(()), HeadSet((Head(3, 3), Head(0, 0)))]
    contrasts = {user: DPS(heads, 1.5) for user, heads in zip(users, sets, strict=True)}
    together = generate(testbed_model, asked, contrasts, max_new_tokens=NEW)
    alone = [generate(testbed_model, [e], contrasts[e.user], max_new_tokens=NEW)[0] for e in asked]
    assert texts(together) == texts(alone)


def test_batch_size_does_not_change_texts(testbed_model, asked):
    small = generate(testbed_model, asked, DPS(HEADS), max_new_tokens=NEW, batch_tokens=300)
    large = generate(testbed_model, asked, DPS(HEADS), max_new_tokens=NEW, batch_tokens=10**6)
    assert texts(small) == texts(large)


def test_a_single_example_gives_a_single_answer(testbed_model, asked):
    (listed,) = generate(testbed_model, asked[:1], DPS(HEADS), max_new_tokens=NEW)
    assert generate(testbed_model, asked[0], DPS(HEADS), max_new_tokens=NEW) == listed


def test_rows_end_at_their_own_end_of_text(testbed_model, asked):
    answers = generate(testbed_model, asked, max_new_tokens=NEW)
    assert all(a.finished for a in answers)
    assert len({len(a.tokens) for a in answers}) > 1
    assert not {t for a in answers for t in a.tokens} & end_tokens(testbed_model)
    cut = generate(testbed_model, asked, max_new_tokens=1)
    assert all(len(a.tokens) == 1 and not a.finished for a in cut)


def test_sampling_repeats_from_its_seed_and_ignores_the_rest_of_the_batch(testbed_model, asked):
    hot = Sampling(temperature=1.5, seed=3)
    first = generate(testbed_model, asked, DPS(HEADS), max_new_tokens=NEW, sampling=hot)
    again = generate(
        testbed_model, asked[::-1], DPS(HEADS), max_new_tokens=NEW, sampling=hot, batch_tokens=1
    )
    assert texts(first) == texts(again)[::-1]
    other = generate(
        testbed_model, asked, DPS(HEADS), max_new_tokens=NEW, sampling=replace(hot, seed=4)
    )
    assert texts(first) != texts(other)


def test_sampling_frequencies_follow_the_softmax(testbed_model, asked):
    example = next(e for e in asked if e.task == "testbed-rating")
    many = [replace(example, id=f"copy-{i}") for i in range(600)]
    prompt = build_prompts([example], testbed_model.tokenizer, 256)[0]
    with torch.inference_mode():
        logits = plain_copy(testbed_model)(torch.tensor([prompt.ids])).logits[0, -1]
    expected = (logits / 2.0).softmax(-1)
    drawn = generate(testbed_model, many, max_new_tokens=1, sampling=Sampling(temperature=2.0))
    counts = torch.zeros_like(expected)
    for answer in drawn:
        for token in answer.tokens:
            counts[token] += 1
    top = expected.topk(3).indices
    # Five standard errors of a share of 600 draws are at most 0.102.
    torch.testing.assert_close(counts[top] / 600, expected[top], atol=0.102, rtol=0)


def test_a_tiny_top_p_is_greedy(testbed_model, asked):
    greedy = generate(testbed_model, asked, max_new_tokens=NEW)
    narrow = Sampling(temperature=1.0, top_p=1e-6)
    sampled = generate(testbed_model, asked, max_new_tokens=NEW, sampling=narrow)
    assert texts(greedy) == texts(sampled)


def test_top_p_keeps_the_fewest_tokens_that_reach_the_share(testbed_model, asked):
    example = next(e for e in asked if e.task == "testbed-rating")
    many = [replace(example, id=f"copy-{i}") for i in range(300)]
    prompt = build_prompts([example], testbed_model.tokenizer, 256)[0]
    with torch.inference_mode():
        logits = plain_copy(testbed_model)(torch.tensor([prompt.ids])).logits[0, -1]
    probs, order = (logits / 3.0).softmax(-1).sort(descending=True)
    count = int((probs.cumsum(0) < 0.6).sum()) + 1
    allowed = set(order[:count].tolist())
    drawn = generate(
        testbed_model, many, max_new_tokens=1, sampling=Sampling(temperature=3.0, top_p=0.6)
    )
    seen = {token for answer in drawn for token in answer.tokens}
    assert seen <= allowed
    assert len(seen) > 1


@pytest.mark.parametrize("gamma", [-0.5, math.nan, math.inf])
def test_a_gamma_that_is_no_strength_is_refused(gamma):
    with pytest.raises(wb.InputError, match="gamma must be >= 0, got"):
        DPS(HEADS, gamma)


def test_bad_requests_are_refused(testbed_model, asked):
    with pytest.raises(wb.InputError, match="L9H6 is not a head of this model"):
        generate(testbed_model, asked, DPS(HeadSet((Head(9, 6),))))
    with pytest.raises(wb.InputError, match=f"no contrast for user {asked[0].user}"):
        generate(testbed_model, asked, {"somebody": DPS(HEADS)})
    with pytest.raises(wb.InputError, match="1 contrasts for"):
        generate(testbed_model, asked, [DPS(HEADS)])
    with pytest.raises(wb.InputError, match="max_new_tokens must be >= 1"):
        generate(testbed_model, asked, max_new_tokens=0)
    with pytest.raises(wb.InputError, match="even without its profile"):
        generate(testbed_model, asked, max_new_tokens=250)
    with pytest.raises(wb.InputError, match="temperature must be >= 0"):
        Sampling(temperature=-1)
    with pytest.raises(wb.InputError, match="top_p must be in"):
        Sampling(top_p=0)


def test_nan_logits_are_refused(testbed_model, asked):
    weight = testbed_model.original_model.lm_head.weight
    before = weight.data[7].clone()
    try:
        weight.data[7] = torch.nan
        with pytest.raises(wb.InputError, match=r"testbed-.*: the logits hold NaN"):
            generate(testbed_model, asked[:1], DPS(HEADS))
    finally:
        weight.data[7] = before
