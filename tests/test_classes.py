"""Head classes from made scores, and their effects against plain loops on the testbed."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from test_controls import noise, scores_of

import workbench as wb
from workbench import stats, tables
from workbench.analysis import classes as module
from workbench.analysis.classes import TESTED, class_effects, halved, head_classes
from workbench.analysis.controls import specificity
from workbench.batches import losses
from workbench.data.neutral import neutral_examples
from workbench.data.prompts import build_prompts
from workbench.data.sources import load_examples
from workbench.errors import InputError
from workbench.evaluation.metrics import get_metric
from workbench.heads import HeadSet
from workbench.hooks import head_gates
from workbench.models import heads_per_layer

TASK = "LaMP-4"


@pytest.fixture(scope="module")
def made():
    own, other, neutral = noise(0), noise(1), noise(2)
    own[:, 0, 0] += 0.6
    own[:, 1, 3] += 1.0
    other[:, 1, 3] += 1.0
    neutral[:, 1, 1] += 1.0
    runs = scores_of(own), scores_of(other), scores_of(neutral, "text", "p")
    return runs[0], specificity(runs[0], {"stranger": runs[1]}, k=1), runs[2]


def test_each_class_is_the_top_of_its_own_score(made):
    induction = xr.DataArray(np.zeros((3, 2, 4)), dims=("probe", "layer", "head"))
    induction[:, 0, 2] = 0.5
    found = head_classes(
        *made, 1, induction=induction, retrieval=HeadSet.parse("L0H3 L0H1"), draws=3
    )[TASK]
    assert list(found) == [
        *("preference", "specific", "capability", "induction", "retrieval", "random"),
    ]
    named = {cls: str(sets[0]) for cls, sets in found.items() if cls != "random"}
    assert named == {
        "preference": "L1H3",
        "specific": "L0H0",
        "capability": "L1H1",
        "induction": "L0H2",
        "retrieval": "L0H3",
    }


def test_random_sets_match_the_preference_heads_layer_by_layer(made):
    found = head_classes(*made, 3, draws=20, seed=1)[TASK]
    layers = sorted(head.layer for head in found["preference"][0])
    assert all(sorted(h.layer for h in heads) == layers for heads in found["random"])
    assert len(set(found["random"])) > 5
    assert found["random"] == head_classes(*made, 3, draws=20, seed=1)[TASK]["random"]
    assert found["random"] != head_classes(*made, 3, draws=20, seed=2)[TASK]["random"]
    assert list(found) == ["preference", "specific", "capability", "random"]


def test_scores_that_classes_cannot_be_made_from_are_refused(made):
    own, specific, neutral = made
    with pytest.raises(InputError, match="wanted 3 retrieval heads, got 1"):
        head_classes(*made, 3, retrieval=HeadSet.parse("L0H0"))
    with pytest.raises(InputError, match="at least 1 draw, got 0"):
        head_classes(*made, 1, draws=0)
    with pytest.raises(InputError, match="these scores have none; score that"):
        head_classes(own, specific.assign_coords(counterfactual=["none"]), neutral, 1)
    with pytest.raises(InputError, match="no specific scores of LaMP-4; take specificity by task"):
        head_classes(own, specific.assign_coords(group=["all"]), neutral, 1)
    with pytest.raises(InputError, match="neutral run is of a model with"):
        head_classes(own, specific, scores_of(np.zeros((48, 3, 4)), "text"), 1)


# On the testbed

TAG = "testbed-tag"
SETS = {
    TAG: {
        "preference": [HeadSet.parse("L0H5 L0H7 L1H2 L1H6")],
        "random": [HeadSet.parse("L0H1 L0H2 L1H1 L1H0"), HeadSet.parse("L0H3 L0H4 L1H7 L1H3")],
    }
}


@pytest.fixture(scope="module")
def examples():
    return load_examples("testbed", "validation", users=6, tasks=[TAG])


@pytest.fixture(scope="module")
def neutral():
    return neutral_examples("testbed", 6)


@pytest.fixture(scope="module")
def table(testbed_model, examples, neutral):
    return class_effects(
        testbed_model, examples, neutral, SETS, 1.0, found_on=["u"], max_new_tokens=3
    )


def test_effects_are_those_of_plain_loops(testbed_model, examples, neutral, table):
    metric = get_metric("accuracy")

    def nll(rows, heads):
        prompts = build_prompts(rows, testbed_model.tokenizer, 256)
        with head_gates(testbed_model, heads.gates(heads_per_layer(testbed_model))):
            return losses(testbed_model, prompts).numpy()

    def score(contrast):
        answers = wb.generate(testbed_model, examples, contrast, max_new_tokens=3)
        return np.array([metric.score(e, a.text) for e, a in zip(examples, answers, strict=True)])

    plain, p, costs = score(None), {}, {}
    for cls, sets in SETS[TAG].items():
        row = table.sel(task=TAG, cls=cls)
        for name, rows in (("user_loss", examples), ("neutral_loss", neutral)):
            change = np.mean([nll(rows, h) - nll(rows, HeadSet(())) for h in sets], axis=0)
            assert float(row[name]) == pytest.approx(change.mean(), abs=1e-5)
            p[cls, name] = stats.sign_flip_p(change, [e.user for e in rows])
            costs[cls, name] = change
        assert float(row["plain"]) == pytest.approx(plain.mean(), abs=1e-12)
        for name, contrast in (("ablated", wb.Ablated), ("dps", lambda h: wb.DPS(h, 1.0))):
            scored = np.mean([score(contrast(heads)) for heads in sets], axis=0)
            assert float(row[f"metric_{name}"]) == pytest.approx(scored.mean(), abs=1e-12)
            change = scored - plain
            assert float(row[f"change_{name}"]) == pytest.approx(change.mean(), abs=1e-12)
            p[cls, f"change_{name}"] = stats.sign_flip_p(change, [e.user for e in examples])
        assert row["user_loss_low"] <= row["user_loss"] <= row["user_loss_high"]
    # All 8 tests are one family.
    for (cls, name), value in zip(p, stats.holm(list(p.values())), strict=True):
        assert float(table[f"{name}_p"].sel(task=TAG, cls=cls)) == pytest.approx(value, abs=1e-12)
    assert len(p) == table.attrs["tests"] == 8 and min(p.values()) < 0.06
    beyond = []
    for name, rows in (("user_loss", examples), ("neutral_loss", neutral)):
        less, users = costs["preference", name] - costs["random", name], [e.user for e in rows]
        found = table.sel(task=TAG, cls="preference")
        ends = [float(found[f"{name}_less_random{end}"]) for end in ("", "_low", "_high")]
        expected = stats.estimate(less, users)
        assert ends == pytest.approx([expected.mean, expected.low, expected.high], abs=1e-5)
        beyond.append(stats.sign_flip_p(less, users))
    p_less = [found[f"{name}_less_random_p"].item() for name in ("user_loss", "neutral_loss")]
    assert p_less == pytest.approx(stats.holm(beyond), abs=1e-12)
    assert table["user_loss_less_random"].sel(cls="random").isnull().all()
    random = [score(wb.DPS(heads, 1.0)).mean() for heads in SETS[TAG]["random"]]
    best = score(wb.DPS(SETS[TAG]["preference"][0], 1.0)).mean()
    assert int(table["beaten"].sel(cls="preference")[0]) == sum(best > one for one in random)
    assert [int(table[n][0]) for n in ("examples", "users", "neutral_examples")] == [24, 6, 6]


def test_kept_effects_are_read_again(testbed_model, examples, neutral, table, tmp_path):
    def ask():
        return class_effects(
            *(testbed_model, examples, neutral, SETS, 1.0),
            **{"found_on": (), "max_new_tokens": 3, "folder": tmp_path},
        )

    xr.testing.assert_allclose(ask(), table)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.parquet")}
    # 3 sets removed and steered with, and the plain model; losses on two texts.
    assert len(before) == 7 + 8
    xr.testing.assert_identical(ask(), ask())
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.parquet")}


def test_the_table_is_kept_as_it_is(table, tmp_path):
    tables.save(table, tmp_path / "t.json")
    xr.testing.assert_allclose(tables.load(tmp_path / "t.json"), table)


def test_heads_found_on_these_users_are_refused(testbed_model, examples, neutral):
    with pytest.raises(InputError, match="were found on 1 of these users"):
        class_effects(testbed_model, examples, neutral, SETS, found_on=[examples[0].user])


def test_halves_of_the_neutral_text_share_no_user_and_hold_every_task(neutral):
    first, second = halved(neutral, seed=3)
    assert (first, second) == halved(neutral, seed=3) != halved(neutral, seed=4)
    assert sorted(e.name for e in (*first, *second)) == sorted(e.name for e in neutral)
    assert not {e.user for e in first} & {e.user for e in second}
    for seed in range(10):  # drawn without regard to tasks, most halves lack one
        assert len({e.task for e in halved(neutral, seed)[0]}) == 3
    of_one_user = [*neutral, *neutral]
    assert [len(half) for half in halved(of_one_user)] == [6, 6]
    assert [len(half) for half in halved(neutral_examples("builtin", 5))] == [2, 3]
    with pytest.raises(InputError, match="1 passages of neutral text can't be halved"):
        halved(neutral[:1])


def test_chance_makes_no_capability_heads_on_the_other_half():
    # No head does anything to this text: those that seem to on some passages don't on others.
    noisy = np.random.default_rng(9).normal(size=(60, 2, 20))
    run = scores_of(noisy, "text", "p")
    examples = [
        wb.Example(str(i), user, "text", query="q", target="t", profile=())
        for i, user in enumerate(run.data["user"].values.tolist())
    ]
    chosen, other = (run.select(users=sorted({e.user for e in half})) for half in halved(examples))
    top = chosen.top(4, "all")["all"]
    seen, there = (
        np.mean([one.data["pcs"].mean("example").values[h.layer, h.head] for h in top])
        for one in (chosen, other)
    )
    # A mean of 30 has a spread of .18, that of four such .09.
    assert seen > 0.25 and abs(there) < 0.25


def test_passages_that_heads_were_chosen_on_are_refused(testbed_model, examples, neutral):
    with pytest.raises(InputError, match=r"chosen on 1 of these passages, .*the other half"):
        class_effects(
            *(testbed_model, examples, neutral, SETS),
            **{"found_on": [], "chosen_on": [neutral[2].user, "somebody"]},
        )


def by_hand(table, p):
    """The first class of a table, with made numbers: (change, ends, adjusted p)."""
    row = table.isel(cls=[0]).copy(deep=True)
    values = {
        "user_loss": (0.3, 0.1, 0.5, p),
        "neutral_loss": (0.3, -0.1, 0.5, 0.001),
        "change_dps": (-0.2, -0.3, -0.1, p),
    }
    for name, numbers in values.items():
        for end, value in zip(("", "_low", "_high", "_p"), numbers, strict=True):
            row[f"{name}{end}"][:] = value
    row["beaten"][:] = 1
    return row


def test_lines_name_an_effect_only_where_its_interval_leaves_zero_out(table):
    row = by_hand(table, p=0.04)
    said, named = module.lines(row)
    assert ", most specific heads: " in module.lines(row.assign_coords(cls=["specific"]))[0]
    assert said == (
        "testbed-tag, preference heads: removed, the loss on the users' text is higher: +0.300 "
        "nats per token (95 % interval +0.100 to +0.500) and on neutral text not shown to change: "
        "+0.300 nats per token (95 % interval -0.100 to +0.500); steered with (gamma = 1), "
        "accuracy is worse: -0.200 (95 % interval -0.300 to -0.100), ahead of 1 of 2 random sets."
    )
    assert named == (
        "An effect is named where its 95% interval leaves 0 out and its p, adjusted for the 8 "
        "tests of this table (Holm), is at most 0.05."
    )
    row["better"][:] = "lower"
    assert "accuracy is better: -0.200" in module.lines(row)[0]


def test_an_effect_that_is_one_of_many_tests_is_not_named(table):
    said = module.lines(by_hand(table, p=0.06))[0]
    assert "users' text is not shown to change: +0.300" in said
    assert "nats per token (95 % interval +0.100 to +0.500) (adjusted p = 0.06) and" in said
    # On neutral text the interval holds 0, and that is why.
    assert "(95 % interval -0.100 to +0.500); steered" in said
    assert "is not shown to change: -0.200 (95 % interval -0.300 to -0.100) (adjusted" in said
    assert {f"{name}_p" for name in TESTED} <= set(table)


def test_lines_say_whether_capability_heads_were_chosen_on_this_text(table):
    row = by_hand(table, 0.5).assign_coords(cls=["capability"])
    assert "may have been chosen on the very passages" in module.lines(row)[-1]
    row.attrs["apart"] = True
    assert module.lines(row)[-1] == (
        "No head was chosen on the 6 passages of neutral text measured here."
    )


def test_a_task_of_one_user_has_no_classes(made):
    own, specific, neutral = made
    twice = xr.concat([specific, specific.assign_coords(group=["lone"])], dim="group")
    data = xr.concat(
        [own.data, own.data.assign_coords(task=("example", ["lone"] * own.data.sizes["example"]))],
        "example",
    )
    both = wb.HeadScores(data, own.manifest)
    twice["specific"].loc[{"group": "lone"}] = np.nan
    assert set(head_classes(both, twice, neutral, 1)) == {TASK}
    twice["specific"][:] = np.nan
    with pytest.raises(InputError, match="every task has a single user"):
        head_classes(both, twice, neutral, 1)
