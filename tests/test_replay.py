"""The exact engine held against the reference, on every architecture."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, WINDOW
from hypothesis import given
from hypothesis import strategies as st

import workbench as wb
from workbench.batches import collate
from workbench.data.prompts import Prompt, build_prompts
from workbench.discovery import check
from workbench.discovery.ablation import score_batch
from workbench.discovery.check import choose_engine
from workbench.discovery.prefixes import LEAST_SHARE, SHORTEST, shared_prefixes
from workbench.discovery.replay import Replay
from workbench.discovery.rerun import PartialModel, Rerun
from workbench.discovery.scorer import ENGINES, REFERENCE, Job, Scorer
from workbench.hooks import mean_z
from workbench.models import pad_token

# Sums in another order (other batch shapes, torch's attention for eager) in float32, on losses of
# size 5. What is asked for is 1e-5.
ROUNDING = 1e-5
# What can't be run the fastest way, and the way that is left.
SLOWER = {
    "bloom": "replay, eager attention",  # ALiBi in its own attention code
    "falcon": "replay, PyTorch's attention",  # no function of ours is let into its own
    "falcon_h1": "replay, last block whole",  # a Mamba beside the last block's attention
}


def random_prompts(example):
    """Prompts of several lengths, all past the window; the others begin alike."""
    generator = torch.Generator().manual_seed(1)

    def draw(length):
        return tuple(torch.randint(3, 300, (length,), generator=generator).tolist())

    alone = [Prompt(example, draw(n), draw(t), shown=()) for n, t in ((20, 5), (31, 3), (37, 1))]
    profile = draw(40)
    together = [
        Prompt(example, profile + draw(n), draw(t), shown=()) for n, t in ((3, 2), (9, 4), (6, 1))
    ]
    # One prompt with two answers that begin alike: what is shared must end before them.
    one = Prompt(example, draw(30), draw(4), shown=())
    other = replace(one, target_ids=(*one.target_ids[:2], *draw(3)))
    prompts = [*alone, *together, one, other]
    assert min(len(prompt.ids) for prompt in prompts) > WINDOW
    return prompts


@pytest.fixture(scope="module")
def prompts():
    return random_prompts(wb.load_examples("testbed", users=1)[0])


def reference(model, prompts, means=None):
    return score_batch(model, collate(prompts, pad_token(model), "cpu"), means)


def distance(a, b):
    assert torch.equal(a.isnan(), b.isnan())
    return float((a - b).nan_to_num(0).abs().max())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_replay_equals_the_reference_on_every_architecture(tiny_model, name, prompts, listing):
    model = tiny_model(name)
    engine = choose_engine(model, prompts, batch_tokens=256)
    assert engine.name == SLOWER.get(name, "replay"), engine.passed_over
    pcs, nll = Scorer(model, Job("exact", engine.name, 256)).scores(prompts)
    expected, full = reference(model, prompts)
    off = max(distance(pcs, expected), distance(nll, full))
    listing("replay against the reference", f"{name:<20} {off:.1e} nat  {engine.name}")
    assert off < ROUNDING


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt2", "gpt_neox", "lfm2"])
def test_every_shortcut_gives_the_same_scores(tiny_model, name, prompts):
    model = tiny_model(name)
    expected, _ = reference(model, prompts)
    for options in ({}, {"shared": False}, *ENGINES.values()):
        if options.get("attention") == "sdpa" and name == "gemma2":
            continue  # its capped scores are refused by Transformers itself
        for batch_tokens in (1, 100, 10_000):
            pcs, _ = Replay(model, batch_tokens, **options).score(prompts)
            assert distance(pcs, expected) < ROUNDING, (options, batch_tokens)


@pytest.mark.parametrize("name", ["llama", "gpt2", "granitemoehybrid"])
def test_mean_ablation_equals_the_reference(tiny_model, name, prompts):
    model = tiny_model(name)
    means = mean_z(model, [collate(prompts, pad_token(model), "cpu")])
    pcs, _ = Replay(model, 256).score(prompts, means)
    assert distance(pcs, reference(model, prompts, means)[0]) < ROUNDING
    assert distance(pcs, reference(model, prompts)[0]) > 100 * ROUNDING


def test_only_wanted_heads_are_scored(tiny_model, prompts):
    model = tiny_model("llama")
    wanted = torch.rand(len(prompts), 3, 4, generator=torch.Generator().manual_seed(2)) < 0.3
    wanted[0] = False
    expected, full = reference(model, prompts)
    for engine in (*ENGINES, REFERENCE):
        done = []
        scorer = Scorer(model, Job("exact", engine, 100))
        pcs, nll = scorer.scores(prompts, wanted, done.append)
        assert distance(pcs, expected.where(wanted, torch.nan)) < ROUNDING
        assert distance(nll, full) < ROUNDING
    assert sum(done) >= int(wanted.sum())


def test_the_twin_takes_no_memory_and_leaves_the_bridge_alone(tiny_model, prompts):
    model = tiny_model("llama")
    batch = collate(prompts, pad_token(model), "cpu")
    before = model(batch.tokens, attention_mask=batch.attention_mask)
    engine = Replay(model)
    engine.score(prompts)
    held = {tensor.data_ptr() for tensor in model.original_model.parameters()}
    assert all(parameter.data_ptr() in held for parameter in engine.partial.twin.parameters())
    assert torch.equal(model(batch.tokens, attention_mask=batch.attention_mask), before)


def test_blocks_below_are_not_run_and_the_last_only_where_targets_are(tiny_model, prompts):
    model = tiny_model("llama")
    partial = PartialModel(model)
    rows = Replay(model).rows(prompts[:2])
    calls = []
    for layer, place in enumerate(partial.places):
        for name, part in place.block.named_modules():
            if name in ("mlp", "self_attn.k_proj"):
                part.register_forward_hook(
                    lambda module, args, out, at=(layer, name): calls.append((at, out.shape[1]))
                )
    hidden = torch.zeros(*rows.tokens.shape, 32)
    width, kept = rows.tokens.shape[1], rows.keep.shape[1]
    with torch.inference_mode():
        partial.run(Rerun(rows.tokens, rows.keep))
        calls.clear()
        partial.run(Rerun(rows.tokens, rows.keep, first=1, hidden=hidden, attn_out=hidden))
    assert calls == [
        ((1, "mlp"), width),
        ((2, "self_attn.k_proj"), width),
        ((2, "self_attn.k_proj"), kept),
        ((2, "mlp"), kept),
    ]


def test_a_shared_profile_is_run_once_a_head(testbed_model, monkeypatch):
    user = wb.load_examples("testbed", "discovery", users=1)
    items = user[0].profile[:4]
    same = [replace(example, profile=items) for example in user if example.task == user[0].task]
    prompts = build_prompts(same, testbed_model.tokenizer, 256)
    tokens = {}
    for shared in (True, False):
        engine, seen = Replay(testbed_model, shared=shared), []
        forward = engine.partial._forward
        monkeypatch.setattr(
            engine.partial,
            "_forward",
            lambda now, forward=forward, seen=seen: (seen.append(now.tokens.numel()), forward(now))[
                1
            ],
        )
        found, _ = engine.score(prompts)
        tokens[shared] = sum(seen)
        assert distance(found, reference(testbed_model, prompts)[0]) < ROUNDING
    assert tokens[True] < tokens[False] / 2


@given(
    st.lists(st.lists(st.integers(0, 1), min_size=2, max_size=60), min_size=1, max_size=12),
    st.lists(st.integers(0, 1), min_size=0, max_size=80),
)
def test_groups_divide_the_prompts_and_share_what_they_say(tails, beginning):
    ids = [tuple(beginning + tail) for tail in tails]
    limits = [len(row) - 2 for row in ids]
    seen = []
    for length, members in shared_prefixes(ids, limits):
        seen += members
        assert len({ids[i][:length] for i in members}) == 1
        assert [len(ids[i]) for i in members] == sorted(len(ids[i]) for i in members)
        if length:
            assert all(length <= limits[i] for i in members)
            total = sum(len(ids[i]) for i in members)
            assert length >= SHORTEST
            assert length * (len(members) - 1) >= LEAST_SHARE * total
    assert sorted(seen) == list(range(len(ids)))


def test_a_wrong_engine_is_passed_over_and_the_run_says_so(testbed_model, monkeypatch, capsys):
    real = Replay.score

    def wrong(self, prompts, *rest):
        pcs, nll = real(self, prompts, *rest)
        return pcs * 1.001, nll

    monkeypatch.setattr(Replay, "score", wrong)
    few = wb.load_examples("testbed", "discovery", users=1)[:2]
    scores = wb.score_heads(testbed_model, few, progress=False)
    assert scores.manifest["engine"]["name"] == REFERENCE
    assert "off by" in scores.manifest["engine"]["passed_over"][0]
    assert "scoring by the reference" in capsys.readouterr().err
    prompts = build_prompts(few, testbed_model.tokenizer, 256)
    expected, _ = reference(testbed_model, prompts)
    assert distance(torch.tensor(scores.data["pcs"].values), expected) < ROUNDING
    with pytest.raises(wb.InputError, match="attribution method needs the replay engine"):
        wb.score_heads(testbed_model, few, method="attribution", progress=False)


def test_the_check_looks_at_every_block_and_at_shared_beginnings(tiny_model, prompts):
    chosen = check.sample(prompts)
    lengths = [len(prompt.ids) + len(prompt.target_ids) for prompt in prompts]
    assert {len(p.ids) + len(p.target_ids) for p in chosen} >= {min(lengths), max(lengths)}
    assert len({p.ids[:40] for p in chosen}) < len(chosen)
    mask = check.one_head_a_block(tiny_model("lfm2"), 2)
    assert mask.sum(dim=2).tolist() == [[1, 0, 1]] * 2


def test_memory_that_runs_out_halves_the_passes_and_nothing_is_lost(testbed_model, monkeypatch):
    few = wb.load_examples("testbed", "discovery", users=1)[:4]
    prompts = build_prompts(few, testbed_model.tokenizer, 256)
    whole, _ = Scorer(testbed_model, Job("exact", "replay", 8192)).scores(prompts)
    real, tried = Replay._score_rows, []

    def crowded(self, rows, *rest):
        tried.append(self.batch_tokens)
        if self.batch_tokens > 2000:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(self, rows, *rest)

    monkeypatch.setattr(Replay, "_score_rows", crowded)
    done = []
    scorer = Scorer(testbed_model, Job("exact", "replay", 8192))
    pcs, _ = scorer.scores(prompts, tick=done.append)
    assert distance(pcs, whole) < ROUNDING
    assert tried[:3] == [8192, 4096, 2048]
    assert scorer.batch_tokens == 1024
    assert sum(done) == 4 * 32

    def full(self, rows, *rest):
        raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate")

    monkeypatch.setattr(Replay, "_score_rows", full)
    with pytest.raises(wb.InputError, match=r"single example of \d+ tokens"):
        scorer.scores(prompts)


def test_other_errors_are_not_taken_for_memory(testbed_model, monkeypatch):
    few = wb.load_examples("testbed", "discovery", users=1)[:1]
    prompts = build_prompts(few, testbed_model.tokenizer, 256)

    def broken(*_):
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(Replay, "_score_rows", broken)
    with pytest.raises(RuntimeError, match="device-side assert"):
        Scorer(testbed_model, Job("exact", "replay", 8192)).scores(prompts)


def test_a_run_keeps_its_batch_size_and_its_noise(testbed_model, tmp_path, monkeypatch):
    few = wb.load_examples("testbed", "discovery", users=1)[:3]
    options = {"folder": tmp_path, "shard_examples": 1, "progress": False}
    first = wb.score_heads(testbed_model, few, batch_tokens=333, **options)
    (tmp_path / "scores" / "00001.parquet").unlink()
    monkeypatch.setattr("workbench.discovery.check.noise", lambda *_: pytest.fail("measured again"))
    again = wb.score_heads(testbed_model, few, **options)
    assert again.manifest["batch_tokens"] == 333
    assert again.manifest["noise"] == first.manifest["noise"]
    np.testing.assert_array_equal(again.data["pcs"].values, first.data["pcs"].values)
    assert 0 < first.manifest["noise"]["p95"] < ROUNDING


def test_sixteen_bits_are_noisier_and_still_take_the_fast_engine():
    model = wb.load_model("testbed", device="cpu", dtype="bfloat16")
    few = wb.load_examples("testbed", "discovery", users=1)[:8]
    scores = wb.score_heads(model, few, progress=False)
    assert scores.manifest["engine"]["name"] == "replay"
    floor = scores.noise_floor(8)
    # bfloat16 keeps 8 bits; on the testbed that moves 1 score in 20 by 0.03 or more.
    assert 0.003 < floor * 8**0.5 < 0.3
    assert floor == pytest.approx(scores.noise_floor(2) / 2)
    mean = scores.mean("all")
    small = np.abs(mean["mean"].values) < floor
    assert small.any()
    np.testing.assert_array_equal(mean["below_noise"].values, small)
