"""An example's own target, token by token: against whole forward passes with hooks and weights."""

import numpy as np
import pytest
import torch

import workbench as wb
from workbench.batches import collate, last_logits, losses
from workbench.data.examples import without_profile
from workbench.data.prompts import build_prompts
from workbench.hooks import head_gates
from workbench.models import context_length, pad_token
from workbench.steering.reading import KEPT, read_target

HEADS = wb.HeadSet.parse("L0H7, L2H6, L1H3")
NONE = wb.HeadSet(())


@pytest.fixture(scope="module")
def example():
    headlines = [e for e in wb.load_examples("testbed", users=4) if e.task == "testbed-headline"]
    return max(headlines, key=lambda e: len(e.target))


def passes(model, example, heads):
    """Log-probabilities [target token, vocabulary] by one forward pass with hooks."""
    prompt = build_prompts([example], model.tokenizer, context_length(model))[0]
    batch = collate([prompt], pad_token(model), model.cfg.device)
    count = len(prompt.target_ids)
    with torch.inference_mode(), head_gates(model, heads.gates((8, 8, 8, 8))):
        logits = last_logits(model, batch, count + 1)[0, :-1].float()
    return logits.log_softmax(-1), list(prompt.target_ids)


def test_each_token_has_the_log_probability_of_a_whole_pass(testbed_model, example):
    plain, ids = passes(testbed_model, example, NONE)
    ablated, _ = passes(testbed_model, example, HEADS)
    assert len(ids) > 3
    table = wb.token_change(testbed_model, example, HEADS, wb.DPS(HEADS, 1.5))
    rows = torch.arange(len(ids))
    # Cached decoding and a whole pass add in another order: float32 rounding.
    np.testing.assert_allclose(table["plain"], plain[rows, ids], atol=2e-4)
    np.testing.assert_allclose(table["ablated"], ablated[rows, ids], atol=2e-4)
    steered = (plain + 1.5 * (plain - ablated)).log_softmax(-1)
    np.testing.assert_allclose(table["steered"], steered[rows, ids], atol=1e-3)
    kl = (steered.exp() * (steered - plain)).sum(-1)
    np.testing.assert_allclose(table["kl"], kl, atol=1e-3)
    assert "".join(table["text"].values.tolist()).strip() == example.target


def test_the_mean_change_is_the_joint_pcs(testbed_model, example):
    prompts = build_prompts([example], testbed_model.tokenizer, context_length(testbed_model))
    plain = losses(testbed_model, prompts)
    with head_gates(testbed_model, HEADS.gates((8, 8, 8, 8))):
        ablated = losses(testbed_model, prompts)
    table = wb.token_change(testbed_model, example, HEADS)
    found = float((table["plain"] - table["ablated"])[table["counted"].values].mean())
    assert found == pytest.approx(float(ablated - plain), abs=1e-4)


def test_no_heads_change_nothing(testbed_model, example):
    table = wb.token_change(testbed_model, example, NONE)
    assert table["plain"].equals(table["ablated"])
    assert table["plain"].equals(table["steered"])
    assert float(abs(table["kl"]).max()) == 0


@pytest.mark.parametrize(
    "contrast",
    [wb.CAD(0.7), wb.DPS(wb.HeadSet.parse("L3H3"), 1.0), wb.DoLa(plausible=0.0), wb.DPS(HEADS, 0)],
    ids=["CAD", "other heads", "DoLa", "no strength"],
)
def test_the_ablated_view_is_of_the_chosen_heads_whatever_steers(testbed_model, example, contrast):
    ablated, ids = passes(testbed_model, example, HEADS)
    table = wb.token_change(testbed_model, example, HEADS, contrast)
    np.testing.assert_allclose(table["ablated"], ablated[torch.arange(len(ids)), ids], atol=2e-4)


def test_cad_is_held_against_the_prompt_without_the_profile(testbed_model, example):
    plain, ids = passes(testbed_model, example, NONE)
    bare, _ = passes(testbed_model, without_profile([example])[0], NONE)
    steered = (plain + 0.7 * (plain - bare)).log_softmax(-1)
    table = wb.token_change(testbed_model, example, HEADS, wb.CAD(0.7))
    np.testing.assert_allclose(table["steered"], steered[torch.arange(len(ids)), ids], atol=1e-3)


def test_next_tokens_are_the_likeliest_of_each_model(testbed_model, example):
    plain, ids = passes(testbed_model, example, NONE)
    ablated, _ = passes(testbed_model, example, HEADS)
    table = wb.next_tokens(testbed_model, example, HEADS, position=2, k=4)
    found = table["candidate"].values.tolist()
    assert set(plain[2].topk(4).indices.tolist()) <= set(found)
    assert set(ablated[2].topk(4).indices.tolist()) <= set(found)
    np.testing.assert_allclose(table["plain"], plain[2, found].exp(), atol=2e-4)
    np.testing.assert_allclose(table["ablated"], ablated[2, found].exp(), atol=2e-4)
    assert (np.diff(table["plain"].values) <= 0).all()
    assert table["candidate"][table["target"]].values.tolist() in ([ids[2]], [])
    texts = wb.token_change(testbed_model, example, HEADS)["text"].values.tolist()
    assert table.attrs["before"] == "".join(texts[:2])


def test_each_model_brings_its_own_likeliest_token(testbed_model, example):
    broken = wb.HeadSet.parse(" ".join(f"L0H{h}" for h in range(8)))
    plain, _ = passes(testbed_model, example, NONE)
    ablated, _ = passes(testbed_model, example, broken)
    places = [i for i in range(len(plain)) if plain[i].argmax() != ablated[i].argmax()]
    assert places
    table = wb.next_tokens(testbed_model, example, broken, position=places[0], k=1)
    best = {int(plain[places[0]].argmax()), int(ablated[places[0]].argmax())}
    assert best <= set(table["candidate"].values.tolist())


def test_a_reading_answers_for_every_position_without_another_pass(
    testbed_model, example, monkeypatch
):
    reading = read_target(testbed_model, example, HEADS)
    monkeypatch.setattr(testbed_model, "forward", None)
    monkeypatch.setattr("workbench.steering.reading.open_engine", None)
    for position in range(len(reading.texts)):
        assert reading.next_tokens(position, 3).sizes["candidate"] >= 3


def test_grouped_queries_and_other_architectures_read_alike(tiny_model):
    model = tiny_model("gpt2")
    example = wb.Example("1", "u", "LaMP-4", "Title it: a b", "c d", ({"text": "x", "title": "y"},))
    heads = wb.HeadSet.parse("L0H1")
    table = wb.token_change(model, example, heads)
    prompts = build_prompts([example], model.tokenizer, context_length(model))
    plain = losses(model, prompts)
    assert float(-table["plain"].mean()) == pytest.approx(float(plain), abs=1e-4)


def test_bad_requests_are_named(testbed_model, example):
    with pytest.raises(wb.InputError, match="L9H0 is not a head of this model"):
        wb.token_change(testbed_model, example, wb.HeadSet.parse("L9H0"))
    with pytest.raises(wb.InputError, match="tokens 0 to"):
        wb.next_tokens(testbed_model, example, HEADS, position=99)
    with pytest.raises(wb.InputError, match=f"between 1 and {KEPT}"):
        wb.next_tokens(testbed_model, example, HEADS, k=0)
    long = wb.Example("1", "u", "testbed-tag", "word " * 4000, "sport", ())
    with pytest.raises(wb.InputError, match="testbed-tag/1: the prompt takes"):
        wb.token_change(testbed_model, long, HEADS)


def test_hooks_are_gone_after_a_failure(testbed_model, example, monkeypatch):
    before, _ = passes(testbed_model, example, NONE)

    def broken(*_args):
        raise RuntimeError("the GPU is gone")

    with monkeypatch.context() as patched:
        patched.setattr("workbench.steering.reading.refuse_nan", broken)
        with pytest.raises(RuntimeError, match="gone"):
            wb.token_change(testbed_model, example, HEADS)
    after, _ = passes(testbed_model, example, NONE)
    assert torch.equal(before, after)
