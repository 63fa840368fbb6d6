"""The gradient estimate against differences of losses, and what screening says it missed."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

import workbench as wb
from workbench.analysis.sparsity import sparsity
from workbench.analysis.stability import split_half
from workbench.batches import batch_nll, collate
from workbench.data.prompts import Prompt, build_prompts
from workbench.discovery.attribution import attribute
from workbench.discovery.replay import Replay
from workbench.discovery.scorer import ENGINES, Job, Scorer
from workbench.discovery.screening import Screen, choose, correction, missed, pilot
from workbench.heads import all_heads
from workbench.hooks import head_gates, mean_z
from workbench.models import heads_per_layer, pad_token
from workbench.scores import HeadScores, read_shard, write_shard

KINDS = ("llama", "mistral", "gemma2", "gpt2", "gpt_neox", "mixtral", "gpt_oss", "lfm2", "jamba")


@pytest.fixture(scope="module")
def prompts():
    (example,) = wb.load_examples("testbed", users=1)[:1]
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, 300, (n,), generator=generator).tolist() for n in (24, 33, 29)]
    return [Prompt(example, tuple(row[:-4]), tuple(row[-4:]), shown=()) for row in rows]


@pytest.fixture(scope="module")
def examples():
    return wb.load_examples("testbed", "discovery", users=16)


@pytest.fixture(scope="module")
def exact(testbed_model, examples):
    return wb.score_heads(testbed_model, examples, progress=False)


def rows(scores):
    """Every value to the last bit; as text, in which a NaN equals a NaN."""
    return str(scores.table().to_pylist())


@pytest.mark.parametrize("ablation", ["zero", "mean"])
@pytest.mark.parametrize("kind", KINDS)
def test_estimate_equals_the_slope_at_gate_one(tiny_model, kind, ablation, prompts):
    model = tiny_model(kind)
    batch = collate(prompts, pad_token(model), "cpu")
    means = mean_z(model, [batch]) if ablation == "mean" else None
    engine = Replay(model, reduced=kind != "jamba")
    found, nll = attribute(engine, engine.rows(prompts), means)
    torch.testing.assert_close(nll, batch_nll(model, batch), atol=1e-5, rtol=0)
    shape = heads_per_layer(model)
    step = 0.0005  # small, lest a token be sent to another expert on the way
    for head in all_heads(shape):
        gates = torch.ones(len(shape), max(shape))
        sides = []
        for gate in (1.0, 1 - step, 1 - 2 * step):  # gates end at 1: a one-sided slope
            gates[head.layer, head.head] = gate
            with head_gates(model, gates, means):
                sides.append(batch_nll(model, batch).double())
        slope = -(3 * sides[0] - 4 * sides[1] + sides[2]) / (2 * step)
        # Float32 losses of size 5 over a step of 0.0005: about 3e-3.
        torch.testing.assert_close(
            found[:, head.layer, head.head].double(), slope, atol=6e-3, rtol=0.03
        )
    assert found.nan_to_num(0).abs().max() > 0.05


def test_estimate_leaves_the_weights_as_it_found_them(tiny_model, prompts):
    model = tiny_model("llama")
    before = [p.requires_grad for p in model.parameters()]
    engine = Replay(model)
    attribute(engine, engine.rows(prompts))
    assert [p.requires_grad for p in model.parameters()] == before
    assert any(before)
    assert all(p.grad is None for p in model.parameters())


def test_estimate_does_not_depend_on_batches_or_engine(tiny_model, prompts):
    model = tiny_model("llama")
    first = Scorer(model, Job("attribution", "replay", 10_000)).scores(prompts)[0]
    for engine in ENGINES:
        for tokens in (1, 300):
            done = []
            scorer = Scorer(model, Job("attribution", engine, tokens))
            found, _ = scorer.scores(prompts, tick=done.append)
            # Float32 sums in another order.
            torch.testing.assert_close(found, first, atol=1e-5, rtol=1e-4)
            assert sum(done) == len(prompts) * 12


def test_a_model_loaded_in_inference_mode_has_gradients_all_the_same(prompts):
    with torch.inference_mode():
        model = wb.load_model("testbed", device="cpu")
    short = [Prompt(p.example, tuple(i % 200 for i in p.ids), (5,), shown=()) for p in prompts]
    engine = Replay(model)
    assert attribute(engine, engine.rows(short))[0].isfinite().all()


def test_a_backward_pass_takes_an_eighth_of_the_tokens(tiny_model, prompts):
    lengths = [len(prompt.ids) + len(prompt.target_ids) for prompt in prompts * 4]
    batches = list(Replay(tiny_model("llama"), 8 * 100).attribution_batches(prompts * 4))
    assert sorted(i for members in batches for i in members) == list(range(12))
    assert all(len(m) == 1 or len(m) * max(lengths[i] for i in m) <= 100 for m in batches)
    assert len(batches) < 12


def test_estimate_ranks_heads_much_as_exact_scores_do(testbed_model, examples, exact):
    rough = wb.score_heads(testbed_model, examples, method="attribution", progress=False)
    assert rough.manifest["settings"]["method"] == "attribution"
    rank = spearmanr(rough.mean()["mean"].values.ravel(), exact.mean()["mean"].values.ravel())
    assert 0.6 < rank.statistic < 0.99  # an estimate: if it were exact, it wouldn't be one


@pytest.mark.parametrize("by", ["task", "user"])
def test_screened_scores_are_the_exact_ones_and_find_the_top(
    testbed_model, examples, exact, tmp_path, by
):
    screen = Screen(8, by)
    found = wb.score_heads(
        testbed_model, examples, method="screened", screen=screen, folder=tmp_path, progress=False
    )
    scores, everything = found.data["pcs"].values, exact.data["pcs"].values
    scored = ~np.isnan(scores)
    np.testing.assert_allclose(scores[scored], everything[scored], atol=1e-5)
    assert 0.5 < scored.mean() < 0.7  # 16 candidates and 2 audited of 32, and the pilot
    tops = zip(exact.top(8, by).values(), found.top(8, by).values(), strict=True)
    recall = np.mean([len(set(a) & set(b)) / 8 for a, b in tops])
    assert recall >= 0.95
    again = HeadScores.load(tmp_path)
    assert rows(again) == rows(found)
    assert again.heads_per_layer == (8,) * 4
    bound = missed(scores, found.data["audited"].values, found.groups(by), 8, 32)
    assert bound.recall <= recall
    other = "user" if by == "task" else "task"
    with pytest.raises(wb.InputError, match=f"screened for the top 8 of each {by}"):
        found.top(8, other)
    with pytest.raises(wb.InputError, match="not the top 9"):
        found.top(9, by)


def test_a_stopped_screened_run_goes_on(testbed_model, examples, tmp_path, monkeypatch):
    options = {
        "method": "screened",
        "screen": Screen(8, "task"),
        "shard_examples": 30,
        "progress": False,
    }
    whole = wb.score_heads(testbed_model, examples[:90], **options)
    real, calls = Scorer.table, []

    def stop(*args):
        calls.append(args)
        if len(calls) in (2, 5, 6):
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(Scorer, "table", stop)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            wb.score_heads(testbed_model, examples[:90], folder=tmp_path, **options)
    found = wb.score_heads(testbed_model, examples[:90], folder=tmp_path, **options)
    assert len(calls) == 3 + 7  # three shards estimated, one of the pilot, three exact
    assert rows(found) == rows(whole)
    with pytest.raises(wb.InputError, match="screen"):
        wb.score_heads(
            testbed_model,
            examples[:90],
            folder=tmp_path,
            **options | {"screen": Screen(4, "task")},
        )


@given(st.integers(1, 12), st.integers(0, 10_000))
@settings(deadline=None)
def test_candidates_and_audit_are_apart_and_as_many_as_asked(k, seed):
    rng = np.random.default_rng(seed)
    estimate = rng.normal(size=(6, 4, 8)).astype(np.float32)
    estimate[:, 1, 5:] = np.nan  # a block with fewer heads
    groups = {"a": np.array([0, 2, 3]), "b": np.array([1, 4, 5])}
    screen = Screen(k, seed=seed)
    shift = rng.normal(size=(4, 8)).astype(np.float32)
    chosen, audited = choose(estimate, estimate + shift, groups, screen)
    candidates, audit = screen.sizes(29)
    assert not (chosen & audited).any()
    assert not (chosen | audited)[np.isnan(estimate)].any()
    assert (chosen.sum(axis=(1, 2)) == candidates).all()
    assert (audited.sum(axis=(1, 2)) == audit).all()
    for members in groups.values():
        for ranking, share in ((estimate, 5), (estimate + shift, 5), (np.abs(estimate), 10)):
            order = np.argsort(-ranking[members].mean(axis=0), axis=None)  # NaN comes last
            assert chosen[members[0]].ravel()[order[: 2 * candidates // share]].all()
        assert (chosen[members] == chosen[members[0]]).all()


def test_correction_brings_in_a_head_that_the_estimate_overlooks():
    rng = np.random.default_rng(0)
    exact = rng.normal(size=(40, 4, 8)).astype(np.float32) * 0.1
    exact[:, 2, 6] += 5
    estimate = exact.copy()
    estimate[:, 2, 6] = 0  # saturated: the gradient says that it does nothing
    tasks = ["t"] * 40
    members = pilot(tasks, 0)
    assert len(members) == 4
    corrected = estimate + correction(estimate, exact[members], members, tasks)
    groups = {"t": np.arange(40)}
    assert not choose(estimate, estimate, groups, Screen(3))[0][0, 2, 6]
    assert choose(estimate, corrected, groups, Screen(3))[0][0, 2, 6]


def test_pilot_takes_few_of_every_task():
    tasks = ["a"] * 7 + ["b"] * 20 + ["c"] * 1000
    members = pilot(tasks, 1)
    assert [tasks[i] for i in members].count("a") == 0
    assert [tasks[i] for i in members].count("b") == 2
    assert [tasks[i] for i in members].count("c") == 4
    assert pilot(tasks, 1) == members != pilot(tasks, 2)


def test_bound_on_what_was_missed_holds_in_19_of_20_runs():
    """Candidates at random: many of the top are missed, and the bound must know."""
    rng = np.random.default_rng(5)
    users, heads, k = 40, 64, 8
    held = 0
    for trial in range(200):
        exact = rng.normal(size=(users, 1, heads)).astype(np.float32)
        noisy = exact + rng.normal(size=exact.shape).astype(np.float32) * rng.uniform(0.1, 2)
        groups = {str(i): np.array([i]) for i in range(users)}
        chosen, audited = choose(noisy, noisy, groups, Screen(k, "user", audit=4, seed=trial))
        seen = np.where(chosen | audited, exact, np.nan)
        bound = missed(seen, audited, groups, k, heads)
        top = np.argsort(-exact[:, 0], axis=1)[:, :k]
        unseen = np.isnan(seen[:, 0])
        true = np.mean([unseen[i, top[i]].sum() for i in range(users)])
        held += true <= bound.upper
        assert bound.audited == users * 4
        assert bound.unscored == users * (heads - k - 8 - 4)
    assert held >= 190


def test_bound_is_nothing_when_all_was_scored_and_all_when_all_audits_hit():
    scores = np.arange(8, dtype=np.float32).reshape(1, 1, 8)
    groups = {"a": np.array([0])}
    everything = missed(scores, np.zeros((1, 1, 8), dtype=bool), groups, 2, 8)
    assert (everything.unscored, everything.upper, everything.recall) == (0, 0, 1)
    scores[0, 0, :4] = np.nan
    audited = np.zeros((1, 1, 8), dtype=bool)
    audited[0, 0, 6:] = True
    assert missed(scores, audited, groups, 2, 8).upper == 2  # of two no more can be missed


@pytest.mark.parametrize(
    ("screen", "message"),
    [
        (Screen(33), "33"),
        (Screen(0), "0"),
        (Screen(8, candidates=7), "can't be found among 7 candidates"),
        (Screen(8, audit=0), "with 0 audited"),
    ],
)
def test_impossible_screens_are_refused_before_any_work(
    testbed_model, examples, monkeypatch, screen, message
):
    monkeypatch.setattr(Scorer, "_scores", lambda *_: pytest.fail("work was begun"))
    with pytest.raises(wb.InputError, match=message):
        wb.score_heads(testbed_model, examples[:2], method="screened", screen=screen)


def test_unknown_method_is_refused(testbed_model, examples):
    with pytest.raises(wb.InputError, match="method must be exact or attribution or screened"):
        wb.score_heads(testbed_model, examples[:1], method="guess")


def test_the_estimate_of_stories_finds_the_top(shared):
    model = wb.load_model(shared / "stories260k", device="cpu")
    rows = wb.load_lamp("LaMP-4", split="dev", root=shared / "lamp-sample")[:12]
    options = {"progress": False}
    everything = wb.score_heads(model, rows, **options)
    found = wb.score_heads(model, rows, method="screened", screen=Screen(8, "user"), **options)
    tops = zip(everything.top(8).values(), found.top(8).values(), strict=True)
    assert np.mean([len(set(a) & set(b)) / 8 for a, b in tops]) >= 0.95
    prompts = build_prompts(rows[:2], model.tokenizer, 512)
    assert max(len(prompt.ids) for prompt in prompts) > 300


def test_what_needs_all_heads_refuses_a_screened_run(testbed_model, examples):
    options = {"method": "screened", "screen": Screen(4, "user"), "progress": False}
    found = wb.score_heads(testbed_model, examples[::5], **options)  # of every task
    for use in (sparsity, lambda s: split_half(s, 4), lambda s: wb.user_overlap(s, 4)):
        with pytest.raises(wb.InputError, match="needs exact scores of all heads"):
            use(found)
    users = list(dict.fromkeys(found.data["user"].values.tolist()))
    assert len(found.select(users=users[:1]).top(4, "user")) == 1  # a whole group is left
    with pytest.raises(wb.InputError, match="only a part of the examples"):
        found.select(tasks=["testbed-tag"]).top(4, "user")
    with pytest.raises(wb.InputError, match="method is exact"):
        wb.score_heads(testbed_model, examples[:2], screen=Screen(4))


def test_a_model_changed_in_memory_is_another_model(testbed_model, examples, tmp_path):
    options = {"folder": tmp_path, "progress": False}
    wb.score_heads(testbed_model, examples[:2], **options)
    weight = testbed_model.blocks[1].attn.o.original_component.weight
    before = weight.data[3, 7].clone()
    try:
        weight.data[3, 7] += 0.5
        with pytest.raises(wb.InputError, match="tensors"):
            wb.score_heads(testbed_model, examples[:2], **options)
    finally:
        weight.data[3, 7] = before
    wb.score_heads(testbed_model, examples[:2], **options)


def test_a_kept_shard_of_other_heads_is_scored_again(testbed_model, examples, tmp_path):
    options = {"method": "screened", "screen": Screen(4), "progress": False, "folder": tmp_path}
    first = wb.score_heads(testbed_model, examples[:24], **options)
    (shard,) = (tmp_path / "chosen").glob("*.parquet")
    table = read_shard(shard)
    pcs = [[[*layer[1:], layer[0]] for layer in row] for row in table["pcs"].to_pylist()]
    place = table.column_names.index("pcs")
    column = pa.array(pcs, type=table.schema.field("pcs").type)
    write_shard(table.set_column(place, "pcs", column), shard)
    for done in (tmp_path / "scores").glob("*.parquet"):
        done.unlink()
    assert rows(wb.score_heads(testbed_model, examples[:24], **options)) == rows(first)
