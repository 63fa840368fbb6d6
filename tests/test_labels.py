"""Answers decided by the likelihood of labels, against plain sums of log-probabilities."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from loops import ROUNDING, bare_prompts_of, behind, gated, prompts_of
from plain import plain_copy
from test_shared import going_on

import workbench as wb
from workbench.data.examples import Example
from workbench.data.tasks import TASKS, get_task
from workbench.errors import InputError
from workbench.heads import Head, HeadSet
from workbench.models import heads_per_layer
from workbench.steering.contrast import CAD, DPS, DoLa
from workbench.steering.labels import decide, label_tokens

HEADS = HeadSet((Head(1, 1), Head(2, 2)))
LOW = HeadSet((Head(0, 0),))
TAGS = get_task("LaMP-2").labels


@pytest.fixture(scope="module")
def movies():
    """Five examples of LaMP-2's kind, with histories of 0 to 2 short items."""
    shown = [
        {"description": f"a tale {word}", "tag": tag}
        for word, tag in (("of bridges", "comedy"), ("of lamps", "true story"))
    ]
    return [
        Example(
            f"m{n}",
            f"u{n}",
            "LaMP-2",
            f"description: a film {'x' * n}",
            "action",
            tuple(shown[: n % 3]),
        )
        for n in range(5)
    ]


def by_hand(model, example):
    """The tokens of each label by the tokenizer alone."""
    return {tag: tuple(model.tokenizer(tag, add_special_tokens=False)["input_ids"]) for tag in TAGS}


def summed(logits, ids):
    return float(logits.log_softmax(-1)[range(len(ids)), ids].sum())


@torch.inference_mode()
@pytest.mark.parametrize("prefill", ["masked", "shared"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_labels_of_several_tokens_score_the_sum_of_their_log_probabilities(
    tiny_model, movies, kind, prefill
):
    model = tiny_model(kind)
    twin, shape = plain_copy(model), heads_per_layer(model)
    contrasts = [DPS(HEADS, 0.7), None, DPS(LOW, 1.0) + CAD(0.5), CAD(1.0), DPS(LOW, 0.4)]
    decisions = decide(model, movies, contrasts, prefill=prefill)
    prompts = prompts_of(model, movies, 32), bare_prompts_of(model, movies, 32)
    view_of = gated if prefill == "masked" else going_on
    for decision, contrast, prompt, bare in zip(decisions, contrasts, *prompts, strict=True):
        labels = by_hand(model, decision.example)
        assert max(map(len, labels.values())) > 5
        scores = {}
        for tag, ids in labels.items():
            full = behind(twin, prompt.ids, ids[:-1])
            total = full.clone()
            for part in getattr(contrast, "parts", (contrast,)) if contrast else ():
                if isinstance(part, CAD):
                    view = behind(twin, bare.ids, ids[:-1])
                else:
                    view = view_of(twin, part.heads, shape, prompt.ids, ids[:-1])
                total += part.gamma * (full - view)
            scores[tag] = summed(total, ids)
            tolerance = ROUNDING * len(ids)
            assert decision.plain[tag] == pytest.approx(summed(full, ids), abs=tolerance)
            assert decision.log_probs[tag] == pytest.approx(scores[tag], abs=tolerance)
        assert scores[decision.label] == pytest.approx(max(scores.values()), abs=ROUNDING)
        assert decision.ties == 0
        assert (decision.kl > 1e-4) == (
            contrast is not None
            and (bool(decision.example.profile) or not isinstance(contrast, CAD))
        )


def test_labels_that_begin_alike_share_their_rows(tiny_model, movies, monkeypatch):
    from workbench.steering.session import MaskedSession

    model, sizes = tiny_model("llama"), []
    select = MaskedSession.select
    monkeypatch.setattr(
        MaskedSession,
        "select",
        lambda self, rows: sizes.append(len(rows)) or select(self, rows),
    )
    decide(model, movies[:1])
    labels = by_hand(model, movies[0]).values()
    beginnings = [
        len({ids[:depth] for ids in labels if len(ids) > depth})
        for depth in range(1, max(map(len, labels)))
    ]
    assert sizes == beginnings
    assert sizes[0] < len(TAGS), "some of the fifteen labels begin alike"


@pytest.mark.parametrize("batch_tokens", [1, 3000])
def test_batches_do_not_change_decisions_and_tasks_may_be_mixed(testbed_model, batch_tokens):
    examples = [
        e for e in wb.load_examples("testbed", "validation", users=3) if get_task(e.task).labels
    ]
    assert len({example.task for example in examples}) == 2
    users = {example.user: DPS(HEADS, 1.0) for example in examples}
    whole = decide(testbed_model, examples, users, batch_tokens=10**6)
    parts = decide(testbed_model, examples, users, batch_tokens=batch_tokens)
    assert [one.example for one in parts] == examples
    for one, other in zip(parts, whole, strict=True):
        assert one.label == other.label
        assert one.label in get_task(one.example.task).labels
        assert dict(one.log_probs) == pytest.approx(dict(other.log_probs), abs=ROUNDING)


def test_a_cut_leaves_labels_out_and_where_it_leaves_none_the_plain_model_decides(
    tiny_model, movies
):
    model = tiny_model("llama")
    plain = decide(model, movies)
    decisions = decide(model, movies, DoLa((1,), plausible=0.9))
    for decision, before in zip(decisions, plain, strict=True):
        assert set(decision.log_probs.values()) == {-float("inf")}
        assert decision.ties == len(TAGS) - 1
        assert decision.label == before.label
    assert plain[0].label != TAGS[0], "or the first of the list could have been taken"
    some = decide(model, movies, DoLa((1,), plausible=0.01))
    ruled = [sum(v == -float("inf") for v in one.log_probs.values()) for one in some]
    assert any(0 < count < len(TAGS) for count in ruled)


def test_a_label_that_begins_another_is_refused_by_name(tiny_model, movies, monkeypatch):
    labels = ("comedy", "dark comedy", "dark")
    monkeypatch.setitem(TASKS, "LaMP-2", replace(get_task("LaMP-2"), labels=labels))
    with pytest.raises(
        InputError, match="LaMP-2: the label 'dark' has the tokens that 'dark comedy' begins"
    ):
        decide(tiny_model("llama"), movies)


def test_a_task_without_labels_is_refused(testbed_model):
    headline = next(
        e
        for e in wb.load_examples("testbed", "validation", users=1)
        if e.task == "testbed-headline"
    )
    with pytest.raises(InputError, match="testbed-headline has no labels to decide between"):
        decide(testbed_model, [headline])


def test_label_tokens_are_those_of_the_target_behind_a_prompt(tiny_model, movies):
    model = tiny_model("gpt2")
    assert label_tokens(model, movies[0]) == by_hand(model, movies[0])


def test_no_examples_are_no_decisions(testbed_model):
    assert decide(testbed_model, []) == []


def test_labels_spelled_otherwise_behind_another_prompt_are_refused(tiny_model):
    tags = [e for e in wb.load_examples("testbed", "validation", users=2) if "tag" in e.task][:2]
    spaced = [tags[0], replace(tags[1], query=tags[1].query + " ")]
    with pytest.raises(InputError, match=f"{tags[1].name}: behind this prompt the labels have"):
        decide(tiny_model("llama"), spaced)
