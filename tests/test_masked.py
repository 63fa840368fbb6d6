"""The equation's prefill on every architecture, held against models with zeroed output weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from architectures import ARCHITECTURES, WINDOW, write_model
from loops import ROUNDING, behind, check_answer, gated, prompts_of
from plain import plain_copy

import workbench as wb
from workbench.heads import Head, HeadSet, all_heads
from workbench.models import heads_per_layer, load_model
from workbench.steering.contrast import DPS, Ablated, DeCoRe, Entropy
from workbench.steering.decode import generate
from workbench.steering.engines import open_engine
from workbench.steering.layout import Layout
from workbench.steering.loop import end_tokens

NEW = 6
IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


@pytest.fixture(scope="module")
def rows():
    """Eight examples with histories of 0 to 3 items, prompts of 28 to 125 tokens."""
    examples = [e for e in wb.load_examples("testbed", "validation", users=8) if "q0" in e.id]
    return [replace(e, profile=e.profile[: n % 4]) for n, e in enumerate(examples[:8])]


def contrasts(shape):
    """A contrast a row: one head low, one high, several, all, two views, none."""
    low, high = min(all_heads(shape)), max(all_heads(shape))
    several = HeadSet((Head(low.layer, 1), Head(high.layer, 0), Head(high.layer, 2)))
    return [
        DPS(several, 0.7),
        None,
        DPS(HeadSet((low,)), 1.3),
        DPS(HeadSet((high,)), 2.0),
        DPS(HeadSet(tuple(all_heads(shape))), 0.3),
        Ablated(several),
        DPS(HeadSet((high,)), 0.5) + DeCoRe(HeadSet((low,)), Entropy(0.2)),
        DPS(several, 0.0),
    ]


def joined(twin, shape, contrast, prompt, new):
    """The contrasted and the plain logits of every step, as the equations say."""
    full = behind(twin, prompt, new)
    if contrast is None:
        return full, full
    change = torch.zeros_like(full)
    for part in getattr(contrast, "parts", (contrast,)):
        view = gated(twin, part.heads, shape, prompt, new)
        if isinstance(part, Ablated):
            return view, full
        gamma = part.gamma
        if isinstance(gamma, Entropy):
            entropy = torch.distributions.Categorical(logits=full).entropy()
            gamma = gamma.factor * entropy[:, None]
        change += gamma * (full - view)
    return full + change, full


def end_early(monkeypatch, model, answers):
    """Let tokens that were written end texts, so that rows leave after two steps and later."""
    ends = [token for row in (1, 4, 6) for token in answers[row].tokens[1:4:2]]
    config = model.original_model.generation_config
    monkeypatch.setattr(config, "eos_token_id", ends, raising=False)


@torch.inference_mode()
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_mixed_batch_equals_uncached_models_with_zeroed_output_weights(
    tiny_model, rows, kind, listing, monkeypatch
):
    model = tiny_model(kind)
    shape, twin = heads_per_layer(model), plain_copy(model)
    prompts = prompts_of(model, rows, NEW)
    lengths = [len(prompt.ids) for prompt in prompts]
    assert len(set(lengths)) >= 6
    assert max(lengths) > 2 * WINDOW
    chosen = contrasts(shape)
    end_early(monkeypatch, model, generate(model, rows, chosen, max_new_tokens=NEW))
    answers = generate(model, rows, chosen, max_new_tokens=NEW)
    assert any(answer.finished for answer in answers)
    for prompt, contrast, answer in zip(prompts, chosen, answers, strict=True):
        logits = joined(twin, shape, contrast, prompt.ids, answer.tokens)
        check_answer(answer, *logits, end_tokens(model))
    moved = [max(answer.kl) > 1e-3 for answer in answers]
    assert moved == [True, False, True, True, True, True, True, False]
    engine = open_engine(model)
    native = engine.native
    # BLOOM folds rows and heads of its biases into one dimension.
    assert native is not None
    assert native.splits == (kind != "bloom")
    way = native.twin.config._attn_implementation
    assert (way == "eager") == (kind in ("bloom", "falcon")), "these have attention of their own"
    way += "" if native.splits else ", views apart from the input on"
    why = f" ({engine.why_not[0][:90]})" if engine.why_not else ""
    listing("Ways of decoding", f"{kind}: {way}{why}")


def mpt(vocab_size):
    import transformers as hf

    shape = {"d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 256}
    config = hf.MptConfig(vocab_size=vocab_size, initializer_range=0.2, **shape, **IDS)
    return hf.AutoModelForCausalLM.from_config(config)


def test_biases_by_head_are_not_taken_for_rows(tmp_path, rows, monkeypatch):
    # MPT hands its blocks a tensor of [heads, 1, pos]: in a batch of as many rows as heads it
    # looks like one of rows.
    monkeypatch.setitem(ARCHITECTURES, "mpt", mpt)
    write_model("mpt", tmp_path)
    model = load_model(tmp_path, device="cpu")
    contrast = DPS(HeadSet((Head(1, 1), Head(2, 2))), 0.7)
    alone = [generate(model, row, contrast, max_new_tokens=4).tokens for row in rows]
    for count in (3, 4, 5):
        found = generate(model, rows[:count], contrast, max_new_tokens=4)
        assert [answer.tokens for answer in found] == alone[:count]


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["llama", "jamba", "bloom"])
def test_the_lowest_gated_heads_row_may_leave_before_the_others(tiny_model, kind):
    # What was read with views apart from block 0 on goes on so, also when no head there is gated.
    model = tiny_model(kind)
    shape, twin = heads_per_layer(model), plain_copy(model)
    low, high = (HeadSet((head(all_heads(shape)),)) for head in (min, max))
    sets = [low, high, None, high]
    prompts = [tuple(range(3 + n, 25 + 5 * n)) for n in range(4)]
    contrasts = [None if heads is None else DPS(heads) for heads in sets]
    session = open_engine(model).session(prompts, Layout.of(contrasts, shape), 4)
    session.start()
    rows, new = [0, 1, 2, 3], [[], [], [], []]
    for kept in ([3, 1, 2], [1, 2, 1], [2, 1], [1]):  # the last is plain
        session.select(kept)
        rows, new = [rows[at] for at in kept], [[*new[at], 7 + at] for at in kept]
        views = session.step(torch.tensor([ids[-1] for ids in new]))
        for at, row in enumerate(rows):
            full = behind(twin, prompts[row], new[at])[-1]
            torch.testing.assert_close(views.full[at], full, atol=ROUNDING, rtol=0)
        for at, place in enumerate(session.layout.gated):
            view = gated(twin, sets[rows[place]], shape, prompts[rows[place]], new[place])[-1]
            torch.testing.assert_close(views.gated[at], view, atol=ROUNDING, rtol=0)
