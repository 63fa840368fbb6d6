"""Specific and general damage, on scores made by hand and on the testbed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import xarray as xr
from scipy import stats as sps

from workbench import tables
from workbench.analysis import controls
from workbench.analysis.controls import counterfactual_scores, damage, specificity
from workbench.data.examples import with_strangers_profile, without_profile
from workbench.data.neutral import neutral_examples
from workbench.data.sources import load_examples
from workbench.discovery.run import score_heads
from workbench.errors import InputError
from workbench.figures.controls import specific_heads
from workbench.heads import HeadSet
from workbench.scores import SCHEMA, HeadScores

USERS, EACH = 16, 3


def scores_of(pcs, task="LaMP-4", prefix="u", **settings):
    """HeadScores of [example, layer, head] values, three examples a user."""
    count = len(pcs)
    rows = {
        "example": [f"{task}/{prefix}{i}" for i in range(count)],
        "user": [f"{prefix}{i // EACH}" for i in range(count)],
        "task": [task] * count,
        "nll": [1.0] * count,
        "target_tokens": [3] * count,
        "pcs": np.asarray(pcs, dtype=np.float32).tolist(),
    }
    return HeadScores.from_table(pa.table(rows, schema=SCHEMA), {"settings": settings})


def noise(seed, scale=0.05, users=USERS):
    return np.random.default_rng(seed).normal(scale=scale, size=(users * EACH, 2, 4))


@pytest.fixture
def pair():
    """L0H0 is needed behind the own profile only, L1H3 behind any, L1H2 misleads behind others."""
    own, other = noise(0), noise(1)
    own[:, 0, 0] += 0.6
    own[:, 1, 3] += 1.0
    other[:, 1, 3] += 1.0
    other[:, 1, 2] += 0.3
    return scores_of(own), scores_of(other)


def test_the_head_that_needs_the_own_profile_is_specific_and_the_general_one_is_not(pair):
    own, other = pair
    row = specificity(own, {"stranger": other}, k=2).sel(counterfactual="stranger", group="LaMP-4")
    assert np.argwhere(row["is_specific"].values).tolist() == [[0, 0], [1, 2]]
    assert row["low"].values[0, 0] > 0 > row["high"].values[1, 2]
    difference = own.data["pcs"].values - other.data["pcs"].values
    np.testing.assert_allclose(row["specific"].values, difference.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(row["own"].values - row["other"].values, row["specific"].values)
    assert (row["p"].values[0, 0] < 0.01) and row["p"].values[1, 3] > 0.05
    assert row["top_heads"].item() == "L1H3, L0H0"
    assert (int(row["examples"]), int(row["users"])) == (48, 16)


def test_the_specific_fraction_is_what_the_top_heads_lose_of_their_score(pair):
    own, other = pair
    row = specificity(own, {"none": other}, k=2).isel(counterfactual=0, group=0)
    sums = [np.mean([[e[1][3], e[0][0]] for e in s.data["pcs"].values]) for s in (own, other)]
    assert float(row["specific_fraction"]) == pytest.approx((sums[0] - sums[1]) / sums[0], rel=1e-5)
    # 0.6 of 1.6, give or take 8 errors of .05 / sqrt(48).
    assert float(row["specific_fraction"]) == pytest.approx(0.375, abs=0.04)
    assert row["specific_fraction_low"] < row["specific_fraction"] < row["specific_fraction_high"]


def two_tasks(pair, alone="LaMP-5"):
    """The pair's task, and one of a single user that the other run leaves out."""
    own, other = pair
    lone = scores_of(noise(8, users=1), alone, "v").data
    return HeadScores(xr.concat([lone, own.data], "example"), {}), other


def test_a_task_of_one_user_takes_no_strangers_profile_from_the_others(pair):
    own, other = two_tasks(pair)
    nobody = HeadScores(own.data.assign(pcs=own.data["pcs"] * 0), {})
    table = specificity(own, {"stranger": other, "none": nobody}, k=2)
    assert table["compared"].to_dict()["data"] == [[0, 48], [3, 48]]
    missing = table.sel(group="LaMP-5", counterfactual="stranger")
    for name in ("other", "specific", "low", "high", "p", "specific_fraction"):
        assert np.isnan(missing[name].values).all(), name
    assert not missing["is_specific"].any()
    np.testing.assert_allclose(missing["own"], own.data["pcs"].values[:3].mean(axis=0), rtol=1e-6)
    alone = specificity(pair[0], {"stranger": other}, k=2)
    xr.testing.assert_allclose(table.sel(group=["LaMP-4"], counterfactual=["stranger"]), alone)
    said = controls.lines(table)
    assert said[0] == (
        "LaMP-5, against a stranger's profile: not scored; the task has a single user, and a "
        "stranger is another."
    )
    assert said[1].startswith("LaMP-5, against no profile: no head can be judged")
    assert said[2] == controls.lines(alone)[0]
    specific_heads(table)  # draws the empty group too


def test_a_missing_task_of_several_users_is_refused(pair):
    own, other = pair
    more = scores_of(noise(8, users=2), "LaMP-5", "v").data
    own = HeadScores(xr.concat([more, own.data], "example"), {})
    with pytest.raises(InputError, match=r"stranger run is of other examples .LaMP-5/v0 is in one"):
        specificity(own, {"stranger": other}, k=2)


def test_all_examples_together_are_judged_by_those_with_a_stranger(pair):
    own, other = two_tasks(pair)
    table = specificity(own, {"stranger": other}, by="all", k=2).isel(counterfactual=0, group=0)
    alone = specificity(pair[0], {"stranger": other}, by="all", k=2)
    assert (int(table["compared"]), int(table["examples"])) == (48, 51)
    for name in ("specific", "low", "high", "p"):
        np.testing.assert_allclose(table[name], alone[name].values[0, 0])
    said = controls.lines(specificity(own, {"stranger": other}, by="all", k=2))[0]
    assert "(corrected for the number of heads, over the 48 of 51 examples scored)" in said


def test_examples_in_another_order_are_matched_by_name(pair):
    own, other = pair
    turned = HeadScores(other.data.isel(example=slice(None, None, -1)), other.manifest)
    straight, matched = (specificity(own, {"none": run}, k=2) for run in (other, turned))
    xr.testing.assert_identical(straight, matched)


def test_heads_are_judged_within_their_task():
    tasks = {"LaMP-4": noise(3), "LaMP-5": noise(4)}
    tasks["LaMP-5"][:, 0, 1] += 1.0
    parts = [scores_of(values, task).data for task, values in tasks.items()]
    own = HeadScores(xr.concat(parts, "example"), {})
    nothing = HeadScores(own.data.assign(pcs=own.data["pcs"] * 0), {})
    found = specificity(own, {"none": nothing}, k=2)["is_specific"].isel(counterfactual=0)
    assert np.argwhere(found.sel(group="LaMP-4").values).tolist() == []
    assert np.argwhere(found.sel(group="LaMP-5").values).tolist() == [[0, 1]]


def test_one_user_gives_no_interval_and_no_finding(pair):
    own, other = (run.select(users=["u0"]) for run in pair)
    table = specificity(own, {"none": other}, k=2)
    assert np.isnan(table[["low", "high", "p"]].to_array()).all() and not table["is_specific"].any()
    assert np.isnan(table["specific_fraction_low"]).all()
    # Within one user the examples are what is resampled: six are judged, three are not.
    alone = specificity(own, {"none": other}, by="user", k=2)
    assert alone["low"].isnull().all() and alone["specific_fraction_low"].notnull().all()
    longer = [changed(run, user=np.repeat("u", USERS * EACH)) for run in pair]
    found = specificity(longer[0], {"none": longer[1]}, by="user", k=2)
    assert found["low"].notnull().all() and found["is_specific"].any()
    assert "no head can be judged; there are too few users" in controls.lines(table)[0]


def test_absent_heads_stay_absent(pair):
    own, other = (run.data.copy(deep=True) for run in pair)
    for data in (own, other):
        data["pcs"][:, 0, 3] = np.nan
    table = specificity(HeadScores(own, {}), {"none": HeadScores(other, {})}, k=2)
    row = table.isel(counterfactual=0, group=0)
    for name in ("own", "other", "specific", "low", "high", "p"):
        assert np.argwhere(np.isnan(row[name].values)).tolist() == [[0, 3]]
    assert not row["is_specific"].values[0, 3]


def changed(run, **columns):
    return HeadScores(run.data.assign({k: (run.data[k].dims, v) for k, v in columns.items()}), {})


def test_runs_that_cannot_be_compared_are_refused(pair):
    own, other = pair
    with pytest.raises(InputError, match="nothing to hold the scores against"):
        specificity(own, {})
    tokens = other.data["target_tokens"].values + 1
    with pytest.raises(InputError, match="the none run has other targets"):
        specificity(own, {"none": changed(other, target_tokens=tokens)})
    with pytest.raises(InputError, match=r"none run is of other examples .LaMP-4/u45 is in one"):
        specificity(own, {"none": other.select(users=[f"u{i}" for i in range(15)])})
    with pytest.raises(InputError, match="scores of counterfactual none are all NaN"):
        specificity(own, {"none": changed(other, pcs=other.data["pcs"].values * np.nan)})
    with pytest.raises(InputError, match="scores of the own profiles are all NaN"):
        specificity(changed(own, pcs=own.data["pcs"].values * np.nan), {"none": other})
    with pytest.raises(InputError, match="K must be between 1 and 8"):
        specificity(own, {"none": other}, k=9)
    wide = scores_of(np.zeros((USERS * EACH, 2, 5)))
    with pytest.raises(InputError, match=r"none run is of a model with \(5, 5\) heads"):
        specificity(own, {"none": wide})


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("weights", "its weights is sha256:b, not sha256:a; score both alike"),
        ("ablation", "its ablation is"),
        ("method", "its method is"),
        ("prompt", "other prompt settings"),
    ],
)
def test_runs_of_different_models_or_settings_are_refused(pair, key, message):
    own, other = (
        replace(run, manifest={"settings": {key: value}})
        for run, value in zip(pair, ("sha256:a", "sha256:b"), strict=True)
    )
    with pytest.raises(InputError, match=message):
        specificity(own, {"stranger": other})
    if key != "prompt":  # neutral text has no profile that a prompt could show
        with pytest.raises(InputError, match=message):
            damage(own, other)


def test_screened_runs_are_refused(pair):
    own, other = pair
    screened = replace(other, manifest={"settings": {"screen": {"by": "task", "k": 2}}})
    with pytest.raises(InputError, match="counterfactual none needs exact scores of all heads"):
        specificity(own, {"none": screened})
    with pytest.raises(InputError, match="the neutral text needs exact scores of all heads"):
        damage(own, screened)


# Damage

CLASSES = {
    "LaMP-4": {
        "preference": [HeadSet.parse("L1H3 L0H0")],
        "capability": [HeadSet.parse("L1H3 L1H0")],
        "random": [HeadSet.parse("L0H1"), HeadSet.parse("L0H2")],
    }
}


def test_damage_holds_user_text_against_neutral_text(pair):
    own, _ = pair
    there = noise(5, users=10)
    there[:, 1, 3] += 1.0
    neutral = scores_of(there, "text", "p")
    table = damage(own, neutral, CLASSES)
    row = table.sel(group="LaMP-4")
    np.testing.assert_allclose(row["user"], own.data["pcs"].mean("example"), atol=1e-6)
    np.testing.assert_allclose(row["neutral"], there.mean(axis=0), atol=1e-6)
    means = own.mean("task").isel(group=0)
    assert np.array_equal(row["user_low"], means["low"])
    assert np.array_equal(row["neutral_high"], neutral.mean("all").isel(group=0)["high"])
    rho = sps.spearmanr(row["user"].values.ravel(), row["neutral"].values.ravel()).statistic
    assert float(row["correlation"]) == pytest.approx(rho, abs=1e-12)
    assert row["cls"].values.tolist() == [
        ["preference", "", "", ""],
        ["capability", "", "", "preference"],
    ]
    assert row["all_cls"].values[1, 3] == "preference, capability"
    assert [int(row[n]) for n in ("examples", "users", "neutral_examples")] == [48, 16, 30]


def test_the_same_damage_to_any_text_correlates_and_none_is_not_claimed():
    strength = np.linspace(0, 2, 8).reshape(2, 4)
    own = scores_of(noise(0) + strength)
    same = damage(own, scores_of(noise(1) + strength, "text", "p"))
    said = controls.lines(specificity(own, {"none": scores_of(noise(2))}, k=2), same)
    assert "heads with a high PCS are those that neutral text needs too: rank" in said[-1]
    other = damage(own, scores_of(noise(1), "text", "p"))
    assert float(other["correlation_low"][0]) < 0 < float(other["correlation_high"][0])
    said = controls.lines(specificity(own, {"none": own}, k=2), other)
    assert "PCS is not shown to go with the damage to neutral text" in said[-1]
    assert "no head of 8 is shown to matter more behind" in said[0]


# In words


def test_lines_say_how_many_heads_and_how_much_of_the_score(pair):
    own, other = pair
    specific = specificity(own, {"stranger": other}, k=2)
    first, last = controls.lines(specific, damage(own, scores_of(noise(7), "text", "p"), CLASSES))
    assert first.startswith(
        "LaMP-4, against a stranger's profile: 1 of 8 heads matter more behind the user's own "
        "profile, 1 of the top 2 by PCS among them; 1 matter less (corrected for the number of "
        "heads). What goes with the profile is 3"
    )
    assert "of the PCS of the top 2 (95 % interval" in first
    assert last.endswith(
        "1 of the 2 preference heads are capability heads as well; both classes were chosen by "
        "these scores, and their heads stand too far out by luck."
    )


def test_a_share_whose_interval_holds_zero_is_not_claimed(pair):
    own, _ = pair
    (said,) = controls.lines(specificity(own, {"none": scores_of(own.data["pcs"].values)}, k=2))
    assert "That PCS goes with the profile is not shown: 0% of the PCS" in said


def test_a_share_beyond_the_whole_score_is_explained(pair):
    own, _ = pair
    (said,) = controls.lines(specificity(own, {"none": scores_of(-own.data["pcs"].values)}, k=2))
    assert "200% of the PCS" in said and "behind that profile these heads mislead" in said


# On a model


def test_counterfactual_scores_are_those_of_the_changed_examples(testbed_model, tmp_path):
    examples = load_examples("testbed", "validation", users=2, tasks=["testbed-tag"])
    found = counterfactual_scores(
        testbed_model, examples, ("none", "stranger"), folder=tmp_path, progress=False
    )
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["none", "stranger"]
    none = score_heads(testbed_model, without_profile(examples), progress=False)
    np.testing.assert_array_equal(found["none"].data["pcs"], none.data["pcs"])
    assert not np.array_equal(found["none"].data["pcs"], found["stranger"].data["pcs"])
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.parquet")}
    again = counterfactual_scores(testbed_model, examples, ("none",), folder=tmp_path)
    np.testing.assert_array_equal(again["none"].data["pcs"], none.data["pcs"])
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.parquet")}
    for kinds in ((), ("none", "none")):
        with pytest.raises(InputError, match="wanted different counterfactuals"):
            counterfactual_scores(testbed_model, examples, kinds)


def test_a_task_of_one_user_is_left_out_behind_a_strangers_profile_only(testbed_model):
    tags = load_examples("testbed", "validation", users=2, tasks=["testbed-tag"])
    lone = load_examples("testbed", "validation", users=1, tasks=["testbed-rating"])
    examples = [*lone[:2], *tags[::4]]
    kinds = ("none", "stranger", "shuffled")
    found = counterfactual_scores(testbed_model, examples, kinds, progress=False)
    names = [example.name for example in examples]
    for kind in ("none", "shuffled"):
        assert found[kind].data["example"].values.tolist() == names
    assert found["stranger"].data["example"].values.tolist() == names[2:]
    behind = score_heads(testbed_model, with_strangers_profile(examples[2:]), progress=False)
    np.testing.assert_array_equal(found["stranger"].data["pcs"], behind.data["pcs"])
    with pytest.raises(InputError, match="testbed-rating: a stranger's profile needs two users"):
        counterfactual_scores(testbed_model, lone, kinds, progress=False)


def test_tables_of_the_testbed_are_kept_as_they_are(testbed_model, tmp_path):
    examples = load_examples("testbed", "validation", users=3)
    own = score_heads(testbed_model, examples, progress=False)
    others = counterfactual_scores(testbed_model, examples, ("none",), progress=False)
    neutral = score_heads(testbed_model, neutral_examples("testbed", 6), progress=False)
    for table in (specificity(own, others), damage(own, neutral, {})):
        tables.save(table, tmp_path / "t.json")
        xr.testing.assert_allclose(tables.load(tmp_path / "t.json"), table)
