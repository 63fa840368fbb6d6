"""What steering costs, against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr
from plain import plain_copy, zero_output_weights
from torch.nn.functional import cross_entropy

from workbench import stats, tables
from workbench.analysis import coherence as module
from workbench.analysis.coherence import Losses, coherence, steered_losses
from workbench.analysis.tested import adjusted
from workbench.batches import losses
from workbench.data.neutral import neutral_examples
from workbench.data.prompts import build_prompts
from workbench.data.sources import load_examples
from workbench.errors import InputError
from workbench.evaluation.metrics import get_metric
from workbench.figures.coherence import coherence as draw
from workbench.heads import HeadSet
from workbench.models import heads_per_layer
from workbench.steering.contrast import DPS
from workbench.steering.decode import generate

HEADS = HeadSet.parse("L0H5 L1H2")
SETS = {
    task: {
        "preference": [HEADS],
        "random": [HeadSet.parse("L0H1 L1H1"), HeadSet.parse("L0H3 L1H7")],
    }
    for task in ("testbed-tag", "testbed-headline")
}


NEUTRAL = neutral_examples("testbed", 6)


@pytest.fixture(scope="module")
def examples():
    return load_examples(
        "testbed", "validation", users=3, tasks=["testbed-tag", "testbed-headline"]
    )


@pytest.fixture(scope="module")
def prompts(testbed_model, examples):
    return build_prompts(examples, testbed_model.tokenizer, 256)


@pytest.fixture(scope="module")
def table(testbed_model, examples):
    return coherence(
        testbed_model, examples, NEUTRAL, SETS, (2.0, 0.5), found_on=(), max_new_tokens=8
    )


def test_steered_losses_are_those_of_a_plain_loop(testbed_model, prompts):
    gammas = (0.5, 2.0)
    found = steered_losses(testbed_model, prompts, HEADS, gammas)
    full, without = plain_copy(testbed_model), plain_copy(testbed_model)
    for head in HEADS:
        zero_output_weights(without, head, heads_per_layer(testbed_model)[head.layer])
    for place in (0, len(prompts) - 1):
        prompt = prompts[place]
        ids = torch.tensor([[*prompt.ids, *prompt.target_ids]])
        with torch.no_grad():
            a, b = full(ids).logits[0], without(ids).logits[0]
        for row, gamma in enumerate(gammas):
            mixed = (1 + gamma) * a - gamma * b
            start = len(prompt.ids)
            wanted = cross_entropy(mixed[start - 1 : -1], ids[0, start:]).item()
            # float32 logits through another route, amplified by up to 3.
            assert found[row, place].item() == pytest.approx(wanted, abs=2e-4)


def test_no_strength_is_the_plain_loss_bit_for_bit(testbed_model, prompts):
    found = steered_losses(testbed_model, prompts, HEADS, (0.0, 1.0), batch_tokens=512)
    assert torch.equal(found[0], losses(testbed_model, prompts, 512))
    assert not torch.allclose(found[1], found[0], atol=1e-3)


def test_steering_with_no_heads_changes_nothing(testbed_model, prompts):
    found = steered_losses(testbed_model, prompts[:2], HeadSet(()), (3.0,))
    assert torch.equal(found[0], losses(testbed_model, prompts[:2]))


def test_a_token_that_the_model_rules_out_does_not_make_the_loss_nan(testbed_model, prompts):
    last = testbed_model.original_model.lm_head
    with torch.no_grad():
        handle = last.register_forward_hook(
            lambda module, args, out: out.index_fill(-1, torch.tensor([0]), -torch.inf)
        )
    try:
        assert steered_losses(testbed_model, prompts[:2], HEADS, (1.0,)).isfinite().all()
    finally:
        handle.remove()


def test_a_loss_that_is_no_number_names_the_example(testbed_model, prompts):
    handle = testbed_model.original_model.lm_head.register_forward_hook(
        lambda module, args, out: out * torch.nan
    )
    try:
        with pytest.raises(InputError, match=f"{prompts[0].example.name}: a steered loss is NaN"):
            steered_losses(testbed_model, prompts[:1], HEADS, (1.0,))
    finally:
        handle.remove()


def test_kept_losses_are_read_and_not_measured_again(
    testbed_model, examples, tmp_path, monkeypatch
):
    first = Losses(testbed_model, examples, folder=tmp_path)
    measured = first.steered(HEADS, (0.5, 1.0)), first.ablated(HEADS), first.ablated(HeadSet(()))
    monkeypatch.setattr(module, "steered_losses", None)
    monkeypatch.setattr(module, "losses", None)
    second = Losses(testbed_model, examples, folder=tmp_path)
    again = second.steered(HEADS, (0.5, 1.0)), second.ablated(HEADS), second.ablated(HeadSet(()))
    for a, b in zip(measured, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert len(list(tmp_path.rglob("*.parquet"))) == 3
    with pytest.raises(TypeError):  # another request isn't mistaken for a kept one
        second.steered(HEADS, (0.5,))
    for path in tmp_path.rglob("*.parquet"):
        path.write_bytes(b"x")
    with pytest.raises(InputError, match=r"damaged .*; delete it and run again"):
        Losses(testbed_model, examples, folder=tmp_path).ablated(HEADS)


def test_the_table_holds_what_loops_over_sets_give(testbed_model, examples, table):
    part = [e for e in examples if e.task == "testbed-headline"]
    prompts = build_prompts(part, testbed_model.tokenizer, 256)
    plain = [a.text for a in generate(testbed_model, part, max_new_tokens=8)]
    metric = get_metric("style")
    row = table.sel(task="testbed-headline", gamma=2.0)
    for cls, sets in SETS["testbed-headline"].items():
        costs, scores, same = [], [], []
        for heads in sets:
            costs.append(steered_losses(testbed_model, prompts, heads, (2.0,)).mean())
            texts = [
                a.text for a in generate(testbed_model, part, DPS(heads, 2.0), max_new_tokens=8)
            ]
            scores.append(metric.value(part, texts))
            same.append(np.mean([a == b for a, b in zip(texts, plain, strict=True)]))
        found = row.sel(cls=cls)
        base = losses(testbed_model, prompts).mean()
        assert float(found["user_nll"]) == pytest.approx(float(np.mean(costs) - base), abs=1e-5)
        assert float(found["metric"]) == pytest.approx(np.mean(scores), abs=1e-12)
        assert float(found["gain"]) == pytest.approx(
            np.mean(scores) - metric.value(part, plain), abs=1e-12
        )
        assert float(found["agreement"]) == pytest.approx(np.mean(same), abs=1e-12)
        assert float(found["word_agreement"]) >= float(found["agreement"])
    assert float(row["plain"]) == pytest.approx(metric.value(part, plain))
    assert row["gain_low"].sel(cls="preference") <= row["gain"].sel(cls="preference")


def test_neutral_cost_is_that_of_the_neutral_text(testbed_model, table):
    neutral = build_prompts(neutral_examples("testbed", 6), testbed_model.tokenizer, 256)
    cost = (
        steered_losses(testbed_model, neutral, HEADS, (0.5,)).mean()
        - losses(testbed_model, neutral).mean()
    )
    found = table["neutral_nll"].sel(cls="preference", gamma=0.5)
    assert found.values == pytest.approx([float(cost)] * 2, abs=1e-5)
    assert table["neutral_examples"].values.tolist() == [6, 6]


def test_p_of_all_changes_are_those_of_loops(testbed_model, examples, monkeypatch):
    p = {}
    # Three users can't have a small p: all 24 would be 1 if adjusted.
    monkeypatch.setattr(module.stats, "holm", np.asarray)
    table = coherence(
        testbed_model, examples, NEUTRAL, SETS, (2.0, 0.5), found_on=(), max_new_tokens=8
    )

    def keep(key, changes, rows):
        p[key] = stats.sign_flip_p(np.mean(changes, axis=0), [e.user for e in rows])

    def cost(rows, heads, gamma):
        prompts = build_prompts(rows, testbed_model.tokenizer, 256)
        found = steered_losses(testbed_model, prompts, heads, (gamma,))[0]
        return (found - losses(testbed_model, prompts)).numpy()

    for task, named in SETS.items():
        rows = [e for e in examples if e.task == task]
        metric = get_metric({"testbed-tag": "accuracy"}.get(task, "style"))

        def score(heads, gamma, rows=rows, metric=metric):
            answers = generate(testbed_model, rows, DPS(heads, gamma), max_new_tokens=8)
            return np.array([metric.score(e, a.text) for e, a in zip(rows, answers, strict=True)])

        for cls, sets in named.items():
            for gamma in (0.5, 2.0):
                key = {"task": task, "cls": cls, "gamma": gamma}.items()
                for name, part in (("user_nll", rows), ("neutral_nll", NEUTRAL)):
                    keep((name, *key), [cost(part, heads, gamma) for heads in sets], part)
                gains = [score(heads, gamma) - score(HeadSet(()), 1.0) for heads in sets]
                keep(("gain", *key), gains, rows)
    assert len(p) == table.attrs["tests"] == 24 and len(set(p.values())) > 3
    for (name, *key), value in p.items():
        assert float(table[f"{name}_p"].sel(dict(key))) == pytest.approx(value, abs=1e-12)


def test_holm_goes_over_all_columns_of_a_table():
    # Sorted .005 .01 .03 .04 times 4 3 2 1 is .02 .03 .06 .04; the last may not fall below .06.
    table = xr.Dataset({"a_p": ("x", [0.01, 0.04]), "b_p": (("y", "x"), [[0.03, 0.005]])})
    found = adjusted(table, ("a", "b"))
    np.testing.assert_allclose(found["a_p"], [0.03, 0.06], rtol=1e-12)
    np.testing.assert_allclose(found["b_p"], [[0.06, 0.02]], rtol=1e-12)
    assert found.attrs == {"tests": 4}
    found = adjusted(table.assign(a_p=("x", [0.01, np.nan])), ("a", "b"))
    np.testing.assert_allclose(found["a_p"], [0.02, np.nan], rtol=1e-12)
    assert found.attrs == {"tests": 3}


def test_strengths_are_sorted_and_one_word_answers_have_no_pairs_of_words(table):
    assert table["gamma"].values.tolist() == [0.5, 2.0]
    assert table["distinct2"].sel(task="testbed-tag").isnull().all()
    assert table["distinct2"].sel(task="testbed-headline").notnull().all()
    assert (table["examples"].values > 0).all() and table["users"].values.tolist() == [3, 3]


def test_the_table_is_kept_as_it_is(table, tmp_path):
    tables.save(table, tmp_path / "t.json")
    xr.testing.assert_allclose(tables.load(tmp_path / "t.json"), table)


def test_a_word_out_of_place_does_not_agree():
    assert module._shared_words("a b c", "a x c d") == 0.5
    assert module._shared_words("", "") == 1 and module._shared_words("a", "") == 0


def by_hand(gain, cost, better="higher"):
    """A table of one task and class; each number is given with its ends and adjusted p."""
    gammas = [0.5, 1.0]
    columns = {"gain": gain, "neutral_nll": cost}
    data = {
        f"{name}{end}": (("task", "cls", "gamma"), [[[row[i] for row in rows]]])
        for name, rows in columns.items()
        for i, end in enumerate(("", "_low", "_high", "_p"))
    }
    data["agreement"] = (("task", "cls", "gamma"), [[[0.9, 0.25]]])
    data["metric_name"], data["better"] = ("task", ["accuracy"]), ("task", [better])
    coords = {"task": ["tag"], "cls": ["preference"], "gamma": gammas}
    return xr.Dataset(data, coords, {"level": 0.95, "tests": 6})


def test_lines_name_an_effect_only_where_its_interval_leaves_zero_out():
    nothing, up = (0.1, -0.1, 0.2, 0.001), (0.2, 0.1, 0.3, 0.04)
    said, named = module.lines(by_hand([nothing, nothing], [nothing, nothing]))
    assert said == (
        "tag, steered with preference heads: accuracy: no effect shown at any gamma; loss on "
        "neutral text: no change shown at any gamma; at gamma = 1, 25% of the answers are the "
        "plain model's."
    )
    assert "adjusted for the 6 tests of this table (Holm), is at most 0.05." in named
    said, _ = module.lines(by_hand([up, nothing], [nothing, up]))
    assert "better at gamma = 0.5, by +0.200 at 0.5 (95 % interval +0.100 to +0.300)" in said
    assert "loss on neutral text: higher at gamma = 1, by +0.200 at 1 (95" in said
    said, _ = module.lines(by_hand([up, up], [nothing, nothing], better="lower"))
    assert "accuracy: worse at gamma = 0.5, 1, by +0.200 at 1 (95" in said


def test_an_effect_that_is_one_of_many_tests_is_not_named():
    one_of_many, down = (0.2, 0.1, 0.3, 0.06), (-0.2, -0.3, -0.1, 0.01)
    said, _ = module.lines(by_hand([one_of_many, down], [one_of_many, one_of_many]))
    assert "accuracy: worse at gamma = 1, by -0.200 at 1 (95" in said
    assert "loss on neutral text: no change shown at any gamma (smallest adjusted p = 0.06)" in said


def test_the_most_specific_heads_are_called_so():
    nothing = (0.1, -0.1, 0.2, 0.001)
    row = by_hand([nothing] * 2, [nothing] * 2).assign_coords(cls=["specific"])
    assert module.lines(row)[0].startswith("tag, steered with most specific heads: accuracy: no e")


def test_a_class_that_lies_upon_another_is_dashed_so_that_both_are_seen(table):
    pair = [table.isel(cls=[0]).assign_coords(cls=[cls]) for cls in ("preference", "specific")]
    drawn = draw(xr.concat([*pair, table.sel(cls=["random"])], "cls", data_vars="minimal")).data
    dashes = {trace.name: trace.line.dash for trace in drawn if trace.line.dash}
    assert dashes == {
        "preference heads": "solid",
        "most specific heads": "dash",
        "random heads": "solid",
    }


def test_bad_input_is_refused_before_any_pass(testbed_model, examples):
    neutral = neutral_examples("testbed", 3)

    def ask(evaluation=examples, other=neutral, sets=SETS, gammas=(1.0,), found_on=()):
        coherence(testbed_model, evaluation, other, sets, gammas, found_on=found_on)

    with pytest.raises(InputError, match=f"found on 1 of these users, {examples[0].user} among"):
        ask(found_on=[examples[0].user, "somebody"])
    with pytest.raises(InputError, match="no head sets for testbed-headline"):
        ask(sets={"testbed-tag": SETS["testbed-tag"]})
    with pytest.raises(InputError, match="each task needs the same classes, none empty"):
        ask(sets=SETS | {"testbed-tag": {"preference": [HEADS]}})
    with pytest.raises(InputError, match="each task needs the same classes, none empty"):
        ask(sets={task: {"preference": []} for task in SETS})
    with pytest.raises(InputError, match=r"users' examples and neutral text, got \d+ and 0"):
        ask(other=[])
    for gammas in ((), (0.0, 1.0), (-1.0,), (float("nan"),)):
        with pytest.raises(InputError, match="wanted strengths gamma above 0"):
            ask(gammas=gammas)
