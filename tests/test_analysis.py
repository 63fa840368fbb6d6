"""Analyses on scores made by hand and on the testbed."""

from __future__ import annotations

import json
import re

import numpy as np
import pyarrow as pa
import pytest
import torch
import xarray as xr
from test_discovery import plain_nll
from test_hooks import plain_copy

import workbench as wb
from workbench import readme, tables
from workbench.analysis import verdict
from workbench.analysis.gain import steering_gain
from workbench.analysis.overlap import user_overlap
from workbench.analysis.profiles import profile_value
from workbench.analysis.sparsity import sparsity
from workbench.analysis.stability import split_half
from workbench.analysis.sweep import beaten_draws
from workbench.data.examples import with_strangers_profile, without_profile
from workbench.data.prompts import build_prompts
from workbench.heads import Head, chance_jaccard
from workbench.scores import SCHEMA, HeadScores


def scores_of(pcs, users, tasks=None):
    """HeadScores of [example, layer, head] values."""
    pcs = np.asarray(pcs, dtype=np.float32)
    rows = {
        "example": [f"e{i}" for i in range(len(pcs))],
        "user": list(users),
        "task": list(tasks or ["LaMP-4"] * len(pcs)),
        "nll": [1.0] * len(pcs),
        "target_tokens": [3] * len(pcs),
        "pcs": pcs.tolist(),
    }
    return HeadScores.from_table(pa.table(rows, schema=SCHEMA), {})


def noise(examples, seed=0):
    return np.random.default_rng(seed).normal(size=(examples, 4, 8))


def test_users_who_share_nothing_but_noise_overlap_as_chance_says():
    users = [f"u{i // 4}" for i in range(160)]
    table = user_overlap(scores_of(noise(160), users), k=8)
    # 40 users, 780 pairs; the mean of that many has a standard error of about 0.01.
    assert table.attrs["mean"] == pytest.approx(table.attrs["chance"], abs=0.03)
    assert table.attrs["same"] == pytest.approx(chance_jaccard(8, 32), abs=0.05)
    assert table.attrs["others"] == pytest.approx(chance_jaccard(8, 32), abs=0.03)
    assert table.attrs["gap_low"] < 0 < table.attrs["gap_high"]
    assert "are not shown to differ" in verdict.overlap_line(table.attrs)
    # No layer is preferred here, so matching the layers changes nothing.
    assert table.attrs["layer_chance"] == pytest.approx(table.attrs["chance"], abs=0.02)


def test_sets_that_share_a_layer_overlap_by_chance_as_the_layers_heads_do():
    pcs = noise(40)
    pcs[:, 1] += 100
    table = user_overlap(scores_of(pcs, [f"u{i // 4}" for i in range(40)]), k=4)
    # 4 of the 8 heads of one layer, not 4 of 32; 45 pairs in each of 200 draws.
    assert table.attrs["layer_chance"] == pytest.approx(chance_jaccard(4, 8), abs=0.02)
    assert table.attrs["chance"] == chance_jaccard(4, 32)


def test_a_users_own_heads_show_in_split_halves_and_not_between_users():
    pcs = noise(80) * 0.01
    users = [f"u{i // 8}" for i in range(80)]
    for i in range(80):
        pcs[i].flat[(i // 8) * 3 : (i // 8) * 3 + 3] += 1.0
    table = user_overlap(scores_of(pcs, users), k=3)
    assert (table.attrs["same"], table.attrs["others"], table.attrs["gap_low"]) == (1, 0, 1)
    assert table.attrs["mean"] == 0.0
    line = verdict.overlap_line(table.attrs)
    assert "differ beyond the noise of examples (+1.000" in line
    assert "Both halves of a user stand behind the same profile" in line
    assert np.array_equal(table.values, np.eye(10))


def test_split_half_of_a_single_example_cannot_be_had():
    halves = split_half(scores_of(noise(3), ["a", "b", "b"]), k=4)
    assert np.isnan(halves["same"].sel(group="a"))
    assert 0 <= halves["same"].sel(group="b") <= 1
    # The one user with two examples has no other user to be held against.
    assert np.isnan(halves["others"].sel(group="b"))
    attrs = user_overlap(scores_of(noise(2), ["a", "b"]), k=4).attrs
    assert all(np.isnan(attrs[name]) for name in ("same", "others", "gap", "gap_low"))
    assert "is unknown" in verdict.overlap_line(attrs)


def test_a_task_that_needs_other_heads_does_not_part_the_halves_of_a_user():
    # Three tasks with heads of their own and no difference between users at all.
    users, tasks, gaps = [f"u{i // 12}" for i in range(120)], ["a", "b", "c"] * 40, []
    for seed in range(8):
        pcs = noise(120, seed) * 0.3
        pcs[np.arange(120), 0, np.arange(120) % 3] += 1.0
        gaps.append(split_half(scores_of(pcs, users, tasks), k=8, splits=5).attrs["gap"])
    # One gap has a standard deviation of 0.025. Halves of another mix of tasks give -0.09.
    assert np.mean(gaps) == pytest.approx(0, abs=0.03)


def test_gap_interval_holds_zero_as_often_as_it_says_without_a_difference():
    missed = 0
    for seed in range(40):
        halves = split_half(
            scores_of(noise(60, seed), [f"u{i // 6}" for i in range(60)]), k=8, splits=5, seed=seed
        )
        missed += not halves.attrs["gap_low"] < 0 < halves.attrs["gap_high"]
    # Binomial: at 5 % a count above 6 of 40 has probability 0.003; the naive bootstrap has 12.
    assert missed <= 6


def test_overlap_of_many_users_shows_the_first_and_averages_all():
    users = [f"u{i:03d}" for i in range(70)]
    table = user_overlap(scores_of(noise(70), users), k=4)
    assert table.shape == (50, 50)
    assert table.attrs["sets"] == 70
    sets = list(scores_of(noise(70), users).top(4, "user").values())
    pairs = [
        len(set(a) & set(b)) / len(set(a) | set(b)) for i, a in enumerate(sets) for b in sets[:i]
    ]
    assert table.attrs["mean"] == pytest.approx(np.mean(pairs))


def test_halves_of_one_user_share_no_example():
    # Example i of the user needs head i alone: sets from disjoint examples can't overlap.
    pcs = np.zeros((8, 1, 8))
    pcs[np.arange(8), 0, np.arange(8)] = 1
    halves = split_half(scores_of(pcs, ["a"] * 8), k=4)
    assert float(halves["same"].sel(group="a")) == 0


def test_overlap_of_one_user_has_no_pairs():
    table = user_overlap(scores_of(noise(4), ["a"] * 4), k=4)
    assert np.isnan(table.attrs["mean"])
    assert "there is one" in verdict.overlap_line(table.attrs)


def test_sparsity_counts_on_scores_worked_by_hand():
    pcs = np.zeros((6, 2, 2))
    pcs[:, 0, 0] = 3.0
    pcs[:, 0, 1] = 2.0
    pcs[:, 1, 0] = 1.0
    pcs[:, 1, 1] = -1.0
    row = sparsity(scores_of(pcs, list("abcdef")), by="all").sel(group="all")
    assert (float(row["top"]), row["top_head"].item()) == (3.0, "L0H0")
    assert int(row["half"]) == 1  # 3 of 6
    assert (int(row["positive"]), int(row["negative"]), int(row["heads"])) == (3, 1, 4)
    assert int(row["units"]) == 6
    of_one = scores_of(pcs, ["a", "a", "a", "a", "b", "b"])
    assert sparsity(of_one)["units"].values.tolist() == [2]
    assert sparsity(of_one, by="user")["units"].values.tolist() == [4, 2]


@pytest.mark.parametrize("users", [6, 8, 12, 20, 48])
def test_as_many_intervals_of_inert_heads_lie_above_0_as_the_line_expects(users):
    # 40 models of 32 inert heads, each head by itself; a user has one example.
    pcs = np.random.default_rng(users).normal(size=(users, 40, 32))
    (said,) = verdict.sparsity_lines(sparsity(scores_of(pcs, [f"u{i}" for i in range(users)])))
    above, below, expected = (
        float(re.search(pattern, said)[1])
        for pattern in (r"(\d+) intervals lie above", r"and (\d+) below", r"about ([\d.]+) each")
    )
    # Of 2560 ends each outside with p of .03 to .06: a standard deviation of 9 to 13 in all.
    assert (above + below) / 2 == pytest.approx(expected, abs=17)
    assert expected > 1280 * 0.025


@pytest.fixture(scope="module")
def discovery():
    return wb.load_examples("testbed", users=3)


@pytest.fixture(scope="module")
def scores(testbed_model, discovery):
    return wb.score_heads(testbed_model, discovery, progress=False)


@pytest.fixture(scope="module")
def held_out():
    return wb.load_examples("testbed", "validation", users=3)


@torch.inference_mode()
def test_profile_value_equals_a_plain_loop(testbed_model, held_out):
    table = profile_value(testbed_model, held_out)
    twin = plain_copy(testbed_model)
    variants = {
        "own": held_out,
        "none": without_profile(held_out),
        "stranger": with_strangers_profile(held_out),
    }
    for task in table["task"].values:
        for name, examples in variants.items():
            part = [e for e in examples if e.task == task]
            prompts = build_prompts(part, testbed_model.tokenizer, 256)
            expected = np.mean([plain_nll(twin, prompt) for prompt in prompts])
            cell = table.sel(task=task, profile=name)
            # Float32 sums in another order, losses of size about 1.
            assert float(cell["nll"]) == pytest.approx(expected, abs=1e-5)
            own = float(table.sel(task=task, profile="own")["nll"])
            assert float(cell["cost"]) == pytest.approx(expected - own, abs=1e-5)


def test_strangers_profile_is_another_users_of_the_same_task(held_out):
    for own, other in zip(held_out, with_strangers_profile(held_out), strict=True):
        assert (own.id, own.task, own.target) == (other.id, other.task, other.target)
        owners = {e.user for e in held_out if e.profile == other.profile}
        assert own.user not in owners
    with pytest.raises(ValueError, match="needs two users"):
        with_strangers_profile([e for e in held_out if e.user == held_out[0].user])


@pytest.fixture(scope="module")
def sweep(testbed_model, held_out, scores):
    return wb.sweep_head_count(
        testbed_model, held_out, scores, [4, 1], 1.0, draws=2, max_new_tokens=12, progress=False
    )


def test_sweep_equals_generating_and_scoring_by_hand(testbed_model, held_out, scores, sweep):
    part = [e for e in held_out if e.task == "testbed-tag"]
    heads = scores.select(tasks=["testbed-tag"]).top(4, "all")["all"]
    answers = wb.generate(testbed_model, part, wb.DPS(heads, 1.0), max_new_tokens=12)
    expected = np.mean([a.text == e.target for a, e in zip(answers, part, strict=True)])
    row = sweep.sel(task="testbed-tag", k=4)
    assert float(row["dps"]) == pytest.approx(expected)
    assert float(row["gain"]) == pytest.approx(float(row["dps"] - row["plain"]))
    assert float(row["random"]) == pytest.approx(float(row["random_draws"].mean()))
    assert row["heads"].item() == str(heads)


def test_sweep_orders_k_and_nests_the_sets(sweep):
    assert sweep["k"].values.tolist() == [1, 4]
    nested = sweep["nested"].sel(task="testbed-tag").values
    assert np.allclose(nested, [[1, 0.25], [0.25, 1]])


def test_sweep_repeats_from_its_seed(testbed_model, held_out, scores, sweep):
    again = wb.sweep_head_count(
        testbed_model, held_out, scores, [1, 4], 1.0, draws=2, max_new_tokens=12, progress=False
    )
    xr.testing.assert_identical(sweep, again)


def test_sweep_refuses_what_would_mislead(testbed_model, tiny_model, discovery, held_out, scores):
    for k in ([0], [33]):
        with pytest.raises(wb.InputError, match="K must be between 1 and 32"):
            wb.sweep_head_count(testbed_model, held_out, scores, k)
    with pytest.raises(wb.InputError, match="no number of heads"):
        wb.sweep_head_count(testbed_model, held_out, scores, [])
    with pytest.raises(wb.InputError, match=r"3 users, discovery-.* are in the scores"):
        wb.sweep_head_count(testbed_model, discovery, scores, [1])
    with pytest.raises(wb.InputError, match="scores are of a model with 32 heads"):
        wb.sweep_head_count(tiny_model("llama"), held_out, scores, [1])
    tags = scores.select(tasks=["testbed-tag"])
    with pytest.raises(wb.InputError, match="no scores for testbed-headline, testbed-rating"):
        wb.sweep_head_count(testbed_model, held_out, tags, [1])
    with pytest.raises(wb.InputError, match="at least 1 draw"):
        wb.sweep_head_count(testbed_model, held_out, scores, [1], draws=0)


def test_sweep_on_the_same_users_is_marked(testbed_model, discovery, scores):
    part = [e for e in discovery if e.task == "testbed-rating"][:2]
    table = wb.sweep_head_count(
        testbed_model, part, scores, [1], draws=1, same_users=True, progress=False
    )
    assert table.attrs["heads_from"] == "the same users"


def test_gain_chooses_on_validation_and_measures_on_test(testbed_model, held_out, scores):
    test = [e for e in wb.load_examples("testbed", "test", users=3) if e.task == "testbed-rating"]
    chosen = [e for e in held_out if e.task == "testbed-rating"]
    table = steering_gain(
        testbed_model, scores, chosen, test, k=(1, 3), gamma=(0.5, 2.0), draws=2, max_new_tokens=3
    )
    grid = {}
    for gamma in (0.5, 2.0):
        for k in (1, 3):
            heads = scores.select(tasks=["testbed-rating"]).top(k, "all")["all"]
            answers = wb.generate(testbed_model, chosen, wb.DPS(heads, gamma), max_new_tokens=3)
            errors = [abs(float(a.text) - float(a.example.target)) for a in answers]
            grid[k, gamma] = np.mean(errors)
    best = min(grid, key=lambda cell: (grid[cell], cell[1], cell[0]))
    row = table.sel(task="testbed-rating")
    assert (int(row["k"]), float(row["gamma"])) == best
    heads = scores.select(tasks=["testbed-rating"]).top(best[0], "all")["all"]
    answers = wb.generate(testbed_model, test, wb.DPS(heads, best[1]), max_new_tokens=3)
    expected = np.mean([abs(float(a.text) - float(a.example.target)) for a in answers])
    assert float(row["dps"]) == pytest.approx(expected)


def test_gain_refuses_users_in_two_groups(testbed_model, discovery, held_out, scores):
    options = {"k": [1], "gamma": [1.0]}
    with pytest.raises(wb.InputError, match="is in validation and in test"):
        steering_gain(testbed_model, scores, held_out, held_out, **options)
    with pytest.raises(wb.InputError, match="is in discovery and in test"):
        steering_gain(testbed_model, scores, held_out, discovery, **options)


def one_row_sweep(better, gain, unreadable=0.0):
    mean, low, high = gain
    columns = {"plain": 0.5, "dps": 0.5 + mean, "random": 0.4, "beaten": 4}
    columns |= {"gain": mean, "gain_low": low, "gain_high": high}
    data = {name: (("task", "k"), [[value]]) for name, value in columns.items()}
    data |= {"metric": ("task", ["accuracy"]), "better": ("task", [better])}
    data |= {"unreadable": ("task", [unreadable])}
    attrs = {"gamma": 0.5, "draws": 5}
    return xr.Dataset(data, coords={"task": ["t"], "k": [4]}, attrs=attrs)


@pytest.mark.parametrize(
    ("better", "gain", "words"),
    [
        ("higher", (0.1, 0.05, 0.2), "better than the plain model"),
        ("higher", (-0.1, -0.2, -0.05), "worse than the plain model"),
        ("lower", (-0.1, -0.2, -0.05), "better than the plain model"),
        ("lower", (0.1, 0.05, 0.2), "worse than the plain model"),
        ("higher", (0.1, -0.01, 0.2), "no effect shown against the plain model"),
        ("higher", (0.1, 0.0, 0.2), "no effect shown against the plain model"),
        ("higher", (0.1, np.nan, np.nan), "no effect shown against the plain model"),
    ],
)
def test_verdict_names_an_effect_only_where_the_interval_leaves_zero_out(better, gain, words):
    (line,) = verdict.sweep_lines(one_row_sweep(better, gain), 4)
    assert words in line
    # 4 of 5 beaten: second best of six, as chance alone is in 2 of 6 cases.
    assert "beats 4 of 5 random sets (chance alone does as well with probability 0.33)" in line


def test_verdict_warns_of_answers_that_are_no_label():
    (line,) = verdict.sweep_lines(one_row_sweep("higher", (0.1, 0.05, 0.2), unreadable=0.9), 4)
    assert "90% of the plain answers are no label" in line


@pytest.mark.parametrize(
    ("better", "value", "beaten"),
    [("higher", 0.5, 2), ("lower", 0.5, 1), ("higher", 0.1, 0), ("higher", 0.5 + 1e-15, 2)],
)
def test_random_sets_are_beaten_by_strictly_better_values(better, value, beaten):
    assert beaten_draws(value, np.array([0.2, 0.5, 0.6, 0.4]), better) == beaten


def test_verdict_says_when_a_profile_does_not_help():
    cells = {"cost": 0.02, "cost_low": -0.01, "cost_high": 0.05}
    data = {name: (("task", "profile"), [[value]]) for name, value in cells.items()}
    table = xr.Dataset(data, coords={"task": ["t"], "profile": ["none"]})
    (line,) = verdict.profile_lines(table)
    assert "is not shown to help" in line
    assert "can't be read as preference" in line


def test_tables_survive_json_with_missing_numbers(tmp_path, sweep):
    broken = sweep.copy(deep=True)
    broken["gain_low"][0, 0] = np.nan
    broken["gain_low"][1] = np.nan
    tables.save(broken, tmp_path / "sweep.json")
    text = (tmp_path / "sweep.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    xr.testing.assert_identical(tables.load(tmp_path / "sweep.json"), broken)


def test_readme_tables_are_those_of_the_measured_results(root):
    text = (root / "README.md").read_text(encoding="utf-8")
    assert readme.with_tables(text, root / "data/testbed/results") == text


def test_shipped_seed_is_the_one_the_rule_picks(root):
    results = [
        json.loads(path.read_text()) for path in (root / "data/testbed/results").glob("seed-*.json")
    ]
    assert len(results) >= 3
    shipped = json.loads((root / "data/testbed/training.json").read_text())
    assert shipped["recipe"]["seed"] == min(results, key=lambda r: r["selection_nll"])["seed"]


def test_shipped_checkpoint_is_the_measured_one(root, testbed_model):
    from workbench.models import weights_id

    shipped = json.loads((root / "data/testbed/training.json").read_text())
    result = root / f"data/testbed/results/seed-{shipped['recipe']['seed']}.json"
    assert json.loads(result.read_text())["model"]["weights"] == weights_id(testbed_model)


def test_heads_are_found_where_the_scores_are(scores):
    top = scores.top(1, "task")["testbed-headline"]
    mean = scores.select(tasks=["testbed-headline"]).data["pcs"].values.mean(axis=0)
    layer, head = np.unravel_index(mean.argmax(), mean.shape)
    assert list(top) == [Head(int(layer), int(head))]


def test_stopped_sweep_goes_on_and_equals_an_uninterrupted_one(
    testbed_model, held_out, scores, sweep, tmp_path, monkeypatch
):
    from workbench.analysis import answers as module

    real, calls = module.generate, []

    def stop_at_the_fourth(*args, **options):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(module, "generate", stop_at_the_fourth)

    def run():
        return wb.sweep_head_count(
            testbed_model,
            held_out,
            scores,
            [1, 4],
            1.0,
            draws=2,
            max_new_tokens=12,
            folder=tmp_path,
            progress=False,
        )

    with pytest.raises(KeyboardInterrupt):
        run()
    xr.testing.assert_identical(run(), sweep)
    kept = len(list((tmp_path / "answers").glob("*.parquet")))
    written = len(calls) - 1
    assert kept == written <= 3 * 7  # a random set may be drawn twice
    xr.testing.assert_identical(run(), sweep)
    assert len(calls) - 1 == written
