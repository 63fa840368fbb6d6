"""DPS inside Transformers' `generate`, held against the loop and against uncached models."""

from __future__ import annotations

import pytest
import torch
from plain import plain_copy, zero_output_weights
from transformers import LogitsProcessor, TextIteratorStreamer

import workbench as wb
from workbench.data.prompts import build_prompts
from workbench.heads import Head, HeadSet
from workbench.models import heads_per_layer
from workbench.steering.contrast import CAD, DPS, DeCoRe
from workbench.steering.loop import end_tokens
from workbench.steering.processor import DPSLogitsProcessor, hf_model

HEADS = HeadSet((Head(0, 3), Head(1, 6), Head(2, 1)))
OTHERS = HeadSet((Head(0, 0), Head(3, 2)))
NEW = 10


@pytest.fixture(scope="module")
def asked():
    examples = wb.load_examples("testbed", "validation", users=4)
    return [e for e in examples if e.id.endswith("q0")]


@pytest.fixture(scope="module")
def padded(testbed_model, asked):
    """Prompts as Transformers wants them, with their mask."""
    prompts = build_prompts(asked, testbed_model.tokenizer, 256, new_tokens=NEW)
    width = max(len(p.ids) for p in prompts)
    pad = testbed_model.tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(p.ids)) + list(p.ids) for p in prompts])
    assert len({len(p.ids) for p in prompts}) > 1, "rows of several lengths make it a test"
    return {"input_ids": ids, "attention_mask": (ids != pad).long()}


class Uncached(LogitsProcessor):
    """The equation as it is printed: the whole of every row through a model without the heads."""

    def __init__(self, model, heads, gamma, pad):
        self.without = plain_copy(model)
        shape = heads_per_layer(model)
        for head in heads:
            zero_output_weights(self.without, head, shape[head.layer])
        self.gamma, self.pad = gamma, pad

    def __call__(self, ids, scores):
        rows = []
        for row in ids:
            real = row[int((row != self.pad).float().argmax()) :]
            rows.append(self.without(real[None]).logits[0, -1])
        mixed = (1 + self.gamma) * scores - self.gamma * torch.stack(rows)
        return mixed.log_softmax(dim=-1)


def new_tokens(model, out, width):
    ends = end_tokens(model) | {model.tokenizer.pad_token_id}
    return [tuple(t for t in row[width:].tolist() if t not in ends) for row in out]


def run(model, padded, processor, **options):
    out = hf_model(model).generate(
        **padded,
        max_new_tokens=NEW,
        logits_processor=[] if processor is None else [processor],
        pad_token_id=model.tokenizer.pad_token_id,
        **({"do_sample": False} | options),
    )
    return new_tokens(model, out, padded["input_ids"].shape[1])


def test_greedy_generate_with_the_processor_equals_the_loop(testbed_model, asked, padded):
    contrast = DPS(HEADS, 1.5)
    found = run(testbed_model, padded, DPSLogitsProcessor(testbed_model, contrast))
    loop = wb.generate(testbed_model, asked, contrast, max_new_tokens=NEW)
    assert found == [answer.tokens for answer in loop]
    assert found != run(testbed_model, padded, None), "the contrast must do something"


@torch.inference_mode()
@pytest.mark.parametrize("beams", [2, 4])
def test_beam_search_equals_an_uncached_model_without_the_heads(testbed_model, padded, beams):
    processor = DPSLogitsProcessor(testbed_model, DPS(HEADS, 1.5))
    plain = Uncached(testbed_model, HEADS, 1.5, testbed_model.tokenizer.pad_token_id)
    expected = run(testbed_model, padded, plain, num_beams=beams)
    assert run(testbed_model, padded, processor, num_beams=beams) == expected
    assert expected != run(testbed_model, padded, None, num_beams=beams)


def test_each_prompt_may_have_its_own_contrast(testbed_model, asked, padded):
    contrasts = [DPS((HEADS, OTHERS)[i % 2], 1.5 * (i % 3)) for i in range(len(asked))]
    found = run(testbed_model, padded, DPSLogitsProcessor(testbed_model, contrasts), num_beams=3)
    ids = padded["input_ids"]
    alone = []
    for i, contrast in enumerate(contrasts):
        one = {name: tensor[i : i + 1] for name, tensor in padded.items()}
        processor = DPSLogitsProcessor(testbed_model, contrast)
        alone += run(testbed_model, one, processor, num_beams=3)
    assert found == alone
    assert len(ids) == len(alone)


def test_equal_prompts_with_other_contrasts_keep_their_own_caches(testbed_model, asked, padded):
    twice = {name: tensor[[1, 1]] for name, tensor in padded.items()}
    contrasts = [DPS(HEADS, 2.0), DPS(OTHERS, 2.0)]
    processor = DPSLogitsProcessor(testbed_model, contrasts)
    ids, scores = twice["input_ids"], torch.zeros(2, 203)
    processor(ids, scores)
    longer = torch.cat((ids, ids[:, -1:]), dim=1)
    fresh = DPSLogitsProcessor(testbed_model, contrasts)
    torch.testing.assert_close(processor(longer, scores), fresh(longer, scores))


def test_what_beams_are_added_up_from_are_log_probabilities(testbed_model, padded):
    ids = padded["input_ids"]
    scores = torch.randn(len(ids), 203, generator=torch.Generator().manual_seed(0))
    found = DPSLogitsProcessor(testbed_model, DPS(HEADS, 1.5))(ids, scores)
    torch.testing.assert_close(found.exp().sum(dim=-1), torch.ones(len(ids)))
    shifted = DPSLogitsProcessor(testbed_model, DPS(HEADS, 1.5))(ids, scores + 3)
    # float32's resolution at logits of about 10
    torch.testing.assert_close(found, shifted, atol=1e-5, rtol=0)


def test_rows_of_another_batch_are_read_anew(testbed_model, padded):
    ids = padded["input_ids"]
    used = DPSLogitsProcessor(testbed_model, DPS(HEADS, 1.5))
    used(ids[:3], torch.zeros(3, 203))
    longer = torch.cat((ids[3:4], ids[3:4, -1:]), dim=1)
    fresh = DPSLogitsProcessor(testbed_model, DPS(HEADS, 1.5))
    assert torch.equal(used(longer, torch.zeros(1, 203)), fresh(longer, torch.zeros(1, 203)))


def test_two_sets_of_heads_add_up_under_beams(testbed_model, asked, padded):
    both = DPS(HEADS, 0.7) + DeCoRe(OTHERS)
    found = run(testbed_model, padded, DPSLogitsProcessor(testbed_model, both))
    loop = wb.generate(testbed_model, asked, both, max_new_tokens=NEW)
    assert found == [answer.tokens for answer in loop]


def test_one_processor_serves_one_generate_after_the_other(testbed_model, padded):
    processor = DPSLogitsProcessor(testbed_model, DPS(HEADS, 1.5))
    first = run(testbed_model, padded, processor)
    assert run(testbed_model, padded, processor) == first


def test_a_mask_that_is_given_is_taken(testbed_model, asked, padded):
    # The padding is an ordinary word here, so that only the mask tells it from the prompt.
    ids = padded["input_ids"].clone()
    ids[padded["attention_mask"] == 0] = 10
    rows = {"input_ids": ids, "attention_mask": padded["attention_mask"]}
    processor = DPSLogitsProcessor(
        testbed_model, DPS(HEADS, 1.5), attention_mask=padded["attention_mask"]
    )
    expected = wb.generate(testbed_model, asked, DPS(HEADS, 1.5), max_new_tokens=NEW)
    assert run(testbed_model, rows, processor) == [answer.tokens for answer in expected]
    wrong = DPSLogitsProcessor(testbed_model, DPS(HEADS), attention_mask=torch.ones(5, 3))
    with pytest.raises(wb.InputError, match="doesn't fit ids"):
        run(testbed_model, rows, wrong)


def test_padding_that_can_not_be_told_from_the_prompt_asks_for_the_mask(testbed_model, padded):
    ids = padded["input_ids"].clone()
    ids[padded["attention_mask"] == 0] = 3  # another padding token than the model's
    processor = DPSLogitsProcessor(testbed_model, DPS(HEADS))
    with pytest.raises(wb.InputError, match="give attention_mask="):
        processor(ids, torch.zeros(len(ids), 203))
    processor.pad = processor.first  # a model that pads with its first token
    with pytest.raises(wb.InputError, match="give attention_mask="):
        processor(
            ids[:, -5:].clone().index_fill_(1, torch.tensor([0]), processor.first),
            torch.zeros(len(ids), 203),
        )


def test_nan_without_the_heads_is_refused(testbed_model, padded, monkeypatch):
    processor = DPSLogitsProcessor(testbed_model, DPS(HEADS))
    run_view = DPSLogitsProcessor._run
    monkeypatch.setattr(
        DPSLogitsProcessor, "_run", lambda self, fed: run_view(self, fed) * torch.nan
    )
    with pytest.raises(wb.InputError, match="without the heads hold NaN"):
        processor(padded["input_ids"], torch.zeros(len(padded["input_ids"]), 203))


def test_a_streamer_gets_the_text(testbed_model, asked, padded):
    one = {name: tensor[:1] for name, tensor in padded.items()}
    streamer = TextIteratorStreamer(
        testbed_model.tokenizer, skip_prompt=True, skip_special_tokens=True
    )
    processor = DPSLogitsProcessor(testbed_model, DPS(HEADS, 1.5))
    run(testbed_model, one, processor, streamer=streamer)
    answer = wb.generate(testbed_model, asked[0], DPS(HEADS, 1.5), max_new_tokens=NEW)
    assert "".join(streamer).strip() == answer.text


def test_an_empty_set_is_the_plain_model(testbed_model, padded):
    processor = DPSLogitsProcessor(testbed_model, DPS(HeadSet(()), 2.0))
    assert run(testbed_model, padded, processor) == run(testbed_model, padded, None)


def test_the_twin_copies_no_weight(testbed_model):
    held = {id(p) for p in testbed_model.original_model.parameters()}
    assert {id(p) for p in hf_model(testbed_model).parameters()} <= held


def test_contrasts_that_need_another_view_are_refused(testbed_model):
    with pytest.raises(wb.InputError, match=r"CAD needs another view \(prompt\)"):
        DPSLogitsProcessor(testbed_model, CAD())
    with pytest.raises(wb.InputError, match="L9H6 is not a head of this model"):
        DPSLogitsProcessor(testbed_model, DPS(HeadSet((Head(9, 6),))))


def test_contrasts_and_rows_must_match(testbed_model, padded):
    processor = DPSLogitsProcessor(testbed_model, [DPS(HEADS)] * (len(padded["input_ids"]) + 1))
    with pytest.raises(wb.InputError, match=r"contrasts for \d+ rows; give one for each prompt"):
        run(testbed_model, padded, processor)
