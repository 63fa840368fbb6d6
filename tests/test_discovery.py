"""PCS held against plain loops over the weights, and runs that stop and go on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from plain import plain_copy, plain_nll, zero_output_weights
from torch.nn.functional import cross_entropy

import workbench as wb
from workbench.batches import Batch, collate, losses, target_nll
from workbench.data.prompts import PromptSettings, build_prompts
from workbench.discovery.scorer import Scorer
from workbench.heads import all_heads
from workbench.models import heads_per_layer, pad_token
from workbench.scores import HeadScores

# Sums in another order (padding, batch shape) in float32, losses of size about 1.
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def examples():
    return wb.load_examples("testbed", users=2)


@pytest.fixture(scope="module")
def few(examples):
    # Three tasks, so three lengths: the batch is padded.
    return [
        next(e for e in examples if e.task == task) for task in sorted({e.task for e in examples})
    ]


@pytest.fixture(scope="module")
def prompts(testbed_model, few):
    return build_prompts(few, testbed_model.tokenizer, testbed_model.cfg.n_ctx)


@torch.inference_mode()
def test_pcs_equals_a_plain_loop_over_zeroed_weights(testbed_model, few, prompts):
    scores = wb.score_heads(testbed_model, few, progress=False)
    shape = heads_per_layer(testbed_model)
    for i, prompt in enumerate(prompts):
        full = plain_nll(plain_copy(testbed_model), prompt)
        assert scores.data["nll"].values[i] == pytest.approx(full, abs=ROUNDING)
        for head in all_heads(shape):
            twin = plain_copy(testbed_model)
            zero_output_weights(twin, head, shape[head.layer])
            found = scores.data["pcs"].values[i, head.layer, head.head]
            assert found == pytest.approx(plain_nll(twin, prompt) - full, abs=ROUNDING), head


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral", "gpt2"])
def test_padded_batch_equals_single_examples(tiny_model, kind, examples):
    model = tiny_model(kind)
    chosen = [replace(e, profile=e.profile[:n]) for n, e in enumerate(examples[:4])]
    prompts = build_prompts(chosen, model.tokenizer, model.cfg.n_ctx)
    assert len({len(p.ids) for p in prompts}) > 1
    together = losses(model, prompts)
    twin = plain_copy(model)
    for prompt, loss in zip(prompts, together, strict=True):
        assert loss.item() == pytest.approx(plain_nll(twin, prompt), abs=ROUNDING)


def test_target_nll_equals_cross_entropy_on_targets_only():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 11, (2, 6), generator=generator)
    mask = torch.tensor([[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1]], dtype=torch.bool)
    batch = Batch(tokens, torch.ones_like(tokens), mask)
    logits = torch.randn(2, 6, 11, generator=generator)
    expected = [
        cross_entropy(logits[i, :-1][m[1:]], tokens[i, 1:][m[1:]]) for i, m in enumerate(mask)
    ]
    # The same numbers through one softmax; only float32 rounding lies between.
    torch.testing.assert_close(target_nll(logits, batch), torch.stack(expected), atol=1e-6, rtol=0)
    torch.testing.assert_close(
        target_nll(logits[:, -4:], batch), torch.stack(expected), atol=1e-6, rtol=0
    )


def test_target_nll_refuses_a_row_without_target_and_too_few_logits():
    tokens = torch.zeros((1, 4), dtype=torch.long)
    empty = Batch(tokens, torch.ones_like(tokens), torch.zeros((1, 4), dtype=torch.bool))
    with pytest.raises(ValueError, match="row 0 has no target token"):
        target_nll(torch.zeros(1, 4, 5), empty)
    full = Batch(tokens, torch.ones_like(tokens), torch.ones((1, 4), dtype=torch.bool))
    with pytest.raises(ValueError, match="don't cover a target of 4 tokens"):
        target_nll(torch.zeros(1, 4, 5), full)


def test_scores_are_not_quantised(testbed_model, few):
    pcs = wb.score_heads(testbed_model, few, progress=False).data["pcs"].values
    on_grid = np.isclose(pcs * 64, np.round(pcs * 64), atol=1e-4)
    assert on_grid.mean() < 0.2  # in the released scores it is 1.0


def test_batching_and_shards_do_not_change_scores(testbed_model, few, tmp_path):
    whole = wb.score_heads(testbed_model, few, progress=False)
    pieces = wb.score_heads(
        testbed_model, few, folder=tmp_path, shard_examples=1, batch_tokens=1, progress=False
    )
    np.testing.assert_allclose(
        whole.data["pcs"].values, pieces.data["pcs"].values, atol=ROUNDING, rtol=0
    )
    assert whole.data["example"].values.tolist() == [e.name for e in few]


def test_mean_ablation_differs_from_zero_and_is_marked(testbed_model, few):
    zero = wb.score_heads(testbed_model, few, progress=False)
    mean = wb.score_heads(testbed_model, few, "mean", progress=False)
    assert mean.manifest["settings"]["ablation"] == "mean"
    assert not np.allclose(zero.data["pcs"].values, mean.data["pcs"].values, atol=1e-3)
    np.testing.assert_allclose(zero.data["nll"].values, mean.data["nll"].values, atol=ROUNDING)


def test_stopped_run_goes_on_and_equals_an_uninterrupted_one(
    testbed_model, few, tmp_path, monkeypatch
):
    whole = wb.score_heads(testbed_model, few, shard_examples=1, progress=False)
    real, calls = Scorer.table, []

    def stop_at_the_second(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(Scorer, "table", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        wb.score_heads(testbed_model, few, folder=tmp_path, shard_examples=1, progress=False)
    with pytest.raises(wb.InputError, match="1 of 3 examples are scored"):
        HeadScores.load(tmp_path)
    wb.score_heads(testbed_model, few, folder=tmp_path, shard_examples=1, progress=False)
    assert len(calls) == 4  # the finished shard was not computed again
    assert HeadScores.load(tmp_path).table().equals(whole.table())


def test_run_folder_of_other_settings_is_refused(testbed_model, few, tmp_path):
    wb.score_heads(testbed_model, few, folder=tmp_path, progress=False)
    with pytest.raises(wb.InputError, match="ablation \\(was 'zero', now 'mean'\\)"):
        wb.score_heads(testbed_model, few, "mean", folder=tmp_path, progress=False)
    with pytest.raises(wb.InputError, match="data_sha256"):
        wb.score_heads(
            testbed_model, few, prompt=PromptSettings(items=1), folder=tmp_path, progress=False
        )


def test_nan_logits_name_the_example(testbed_model, few):
    weight = testbed_model.original_model.lm_head.weight
    before = weight.data[5].clone()
    try:
        weight.data[5] = torch.nan
        with pytest.raises(wb.InputError, match=f"{few[0].task}/.*NaN"):
            wb.score_heads(testbed_model, few[:1], progress=False)
    finally:
        weight.data[5] = before


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_a_head_without_a_finite_loss_is_named(testbed_model, few, monkeypatch, broken):
    real = Scorer._scores

    def spoil(*args):
        pcs, nll = real(*args)
        pcs[0, 2, 5] = broken  # the head of this block that the check before a run looks at
        return pcs, nll

    monkeypatch.setattr(Scorer, "_scores", spoil)
    with pytest.raises(wb.InputError, match="without L2H5 the model's loss is NaN or infinite"):
        wb.score_heads(testbed_model, few[:1], progress=False)


def test_scoring_and_decoding_see_the_same_prompt_where_the_context_binds(testbed_model, few):
    settings = PromptSettings(answer_tokens=40)
    long = [replace(e, profile=e.profile * 9) for e in few]
    tokenizer = testbed_model.tokenizer
    scored = build_prompts(long, tokenizer, 128, replace(settings, items=36))
    asked = build_prompts(long, tokenizer, 128, replace(settings, items=36), new_tokens=40)
    assert any(prompt.cut_tokens for prompt in scored)
    assert [p.ids for p in scored] == [p.ids for p in asked]


def test_bad_requests_are_refused_before_any_work(testbed_model, few, monkeypatch):
    monkeypatch.setattr(Scorer, "_scores", lambda *_: pytest.fail("work was begun"))
    with pytest.raises(wb.InputError, match="no examples"):
        wb.score_heads(testbed_model, [])
    with pytest.raises(wb.InputError, match="given twice"):
        wb.score_heads(testbed_model, [few[0], few[0]])
    with pytest.raises(wb.InputError, match="ablation must be"):
        wb.score_heads(testbed_model, few, "resample")
    with pytest.raises(wb.InputError, match="target is empty"):
        wb.score_heads(testbed_model, [replace(few[0], target=" ")])
    long = replace(few[0], query="movie : " + "dark " * 300)
    with pytest.raises(wb.InputError, match="even without its profile"):
        wb.score_heads(testbed_model, [long])


def test_collate_pads_on_the_left(testbed_model, prompts):
    batch = collate(prompts, pad_token(testbed_model), "cpu")
    assert batch.target_mask[:, -1].all()
    for row, prompt in enumerate(prompts):
        real = batch.tokens[row][batch.attention_mask[row].bool()].tolist()
        assert real == [*prompt.ids, *prompt.target_ids]
        assert batch.tokens[row][batch.target_mask[row]].tolist() == list(prompt.target_ids)
