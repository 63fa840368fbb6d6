"""Texts written token by token, and plain texts held against Hugging Face's own decoding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from loops import prompts_of
from plain import plain_copy

import workbench as wb
from workbench.heads import Head, HeadSet
from workbench.steering.contrast import CAD, DPS, Ablated
from workbench.steering.decode import generate, stream
from workbench.steering.loop import Sampling, Work, end_tokens

NEW = 12
HEADS = HeadSet((Head(1, 1), Head(2, 2)))
HOT = Sampling(temperature=1.3, top_p=0.95, seed=5)


@pytest.fixture(scope="module")
def rows():
    """Eight examples, headlines among them, with histories of 0 to 3 items."""
    examples = wb.load_examples("testbed", "validation", users=9)
    chosen = examples[:: len(examples) // 8 - 1][:8]
    assert len({example.task for example in chosen}) == 3
    return [replace(e, profile=e.profile[: n % 4]) for n, e in enumerate(chosen)]


@pytest.mark.parametrize("prefill", ["masked", "shared"])
@pytest.mark.parametrize("sampling", [None, HOT])
@pytest.mark.parametrize("kind", ["testbed", "llama", "gpt2"])
def test_a_stream_is_what_generate_writes(testbed_model, tiny_model, rows, kind, sampling, prefill):
    # Random models write bytes, most of which are no character or a part of one.
    model = testbed_model if kind == "testbed" else tiny_model(kind)
    options = {"max_new_tokens": NEW, "sampling": sampling, "prefill": prefill}
    for row, contrast in zip(rows[:4], (None, DPS(HEADS), CAD(0.5), Ablated(HEADS)), strict=True):
        steps = list(stream(model, row, contrast, **options))
        whole = generate(model, row, contrast, **options)
        assert tuple(step.token for step in steps) == whole.tokens
        assert tuple(step.logprob for step in steps) == whole.logprobs[: len(steps)]
        assert tuple(step.kl for step in steps) == whole.kl[: len(steps)]
        assert "".join(step.text for step in steps).strip() == whole.text


@pytest.mark.parametrize(
    "text",
    [
        "naïve café",
        "日本語",
        " \n leading",
        "🙂🙃 ok",
        "a \udcff".encode("utf-8", "replace").decode(),
    ],
)
def test_characters_come_whole(tiny_model, rows, monkeypatch, text):
    model = tiny_model("llama")
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) > len(text.split())
    script(monkeypatch, [*ids, model.tokenizer.eos_token_id])
    steps = list(stream(model, rows[0], max_new_tokens=len(ids) + 1))
    assert [step.token for step in steps] == ids
    assert "".join(step.text for step in steps) == text.lstrip()
    assert not any("\ufffd" in step.text for step in steps)


def test_a_character_that_the_limit_cuts_in_two_is_shown_as_generate_shows_it(
    tiny_model, rows, monkeypatch
):
    model = tiny_model("llama")
    ids = model.tokenizer("ab🙂", add_special_tokens=False)["input_ids"][:-1]
    script(monkeypatch, ids)
    steps = list(stream(model, rows[0], max_new_tokens=len(ids)))
    script(monkeypatch, ids)
    whole = generate(model, rows[0], max_new_tokens=len(ids))
    assert "".join(step.text for step in steps) == whole.text
    assert whole.text.startswith("ab\ufffd")


def script(monkeypatch, ids):
    """Let these tokens be chosen, one a step."""
    from workbench.steering.loop import Loop

    left = iter(ids)
    monkeypatch.setattr(
        Loop, "_choose", lambda self, logits, _: torch.tensor([next(left)] * len(logits))
    )


def test_a_stream_that_is_closed_leaves_nothing(tiny_model, rows):
    model = tiny_model("llama")
    before = generate(model, rows, DPS(HEADS), max_new_tokens=4)
    with torch.inference_mode():
        ids = torch.tensor([[5, 6, 7]])
        logits = model(ids, return_type="logits")
    steps = stream(model, rows[0], DPS(HEADS), max_new_tokens=NEW)
    next(steps)
    assert not torch.is_inference_mode_enabled()
    steps.close()
    assert not torch.is_inference_mode_enabled()
    with torch.inference_mode():
        assert torch.equal(model(ids, return_type="logits"), logits)
    assert generate(model, rows, DPS(HEADS), max_new_tokens=4) == before


def test_a_stream_refuses_when_its_first_step_is_asked_for(testbed_model, rows):
    steps = stream(testbed_model, rows[0], DPS(HeadSet((Head(9, 0),))))
    with pytest.raises(wb.InputError, match="L9H0 is not a head of this model"):
        next(steps)


def test_a_stream_ends_where_the_consumer_stops(tiny_model, rows, monkeypatch):
    taken = []
    from workbench.steering.loop import Loop

    take = Loop._take
    monkeypatch.setattr(Loop, "_take", lambda self, *a: taken.append(1) or take(self, *a))
    steps = stream(tiny_model("llama"), rows[0], max_new_tokens=NEW)
    for _ in range(3):
        next(steps)
    steps.close()
    assert len(taken) == 3


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["testbed", "llama", "gpt2", "gemma2", "qwen3"])
def test_no_strength_and_no_heads_give_hugging_faces_greedy_tokens(
    testbed_model, tiny_model, rows, kind, monkeypatch
):
    model = testbed_model if kind == "testbed" else tiny_model(kind)
    twin = plain_copy(model)
    first = generate(model, rows, max_new_tokens=NEW)
    if kind != "testbed":  # random models don't end by themselves
        ends = [model.tokenizer.eos_token_id, *first[1].tokens[3:4], *first[4].tokens[6:7]]
        config = model.original_model.generation_config
        monkeypatch.setattr(config, "eos_token_id", ends, raising=False)
    ends = sorted(end_tokens(model))
    expected = []
    for prompt in prompts_of(model, rows, NEW):
        ids = torch.tensor([prompt.ids])
        out = twin.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=0,
        )
        expected.append(tuple(t for t in out[0, len(prompt.ids) :].tolist() if t not in ends))
    assert len({len(tokens) for tokens in expected}) > 1
    for contrast in (None, DPS(HEADS, 0.0), DPS(HeadSet(()), 2.0), CAD(0.0), Ablated(HeadSet(()))):
        found = generate(model, rows, contrast, max_new_tokens=NEW)
        assert [answer.tokens for answer in found] == expected
    halves = [DPS(HEADS, 0.0 if n % 2 else 1.0) for n in range(len(rows))]
    mixed = generate(model, rows, halves, max_new_tokens=NEW)
    assert [a.tokens for a in mixed[1::2]] == expected[1::2]
    assert all(max(a.kl) == 0 for a in mixed[1::2])


def test_a_prompt_without_room_is_refused(tiny_model, rows):
    model = tiny_model("llama")
    with pytest.raises(
        wb.InputError, match=f"{rows[0].name}: the prompt takes .* tokens even without"
    ):
        generate(model, rows, max_new_tokens=model.cfg.n_ctx - 3)


def test_a_full_context_is_used_to_its_last_token(tiny_model, rows):
    # Learned positions end with the context: one token too many would raise.
    model = tiny_model("gpt2")
    item = {"description": "a tale about a lamp " * 40, "tag": "war"}
    long = replace(rows[0], profile=(item,))
    for prefill in ("masked", "shared"):
        answers = generate(
            model, [long, rows[1]], DPS(HEADS) + CAD(0.2), max_new_tokens=40, prefill=prefill
        )
        assert [len(a.tokens) for a in answers] == [40, 40]
    work = Work(model, [long], None, 40, None)
    assert 256 - 40 - 5 < len(work.prompts[0].ids) <= 256 - 40
