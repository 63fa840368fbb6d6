"""Whether two models share heads, and whether one user's heads do for another."""

import itertools

import numpy as np
import pytest
import torch
import xarray as xr
from plain import plain_copy, plain_nll, zero_output_weights
from scipy.stats import spearmanr

from workbench import tables
from workbench.analysis import depth, lending
from workbench.analysis.lending import lend
from workbench.analysis.transfer import exchangeable, lines, shuffled, transfer
from workbench.data.prompts import build_prompts
from workbench.data.sources import load_examples
from workbench.errors import InputError
from workbench.heads import random_matched, top_k
from workbench.scores import HeadScores


def make_scores(pcs, users=None, tasks="t", names=None):
    """Scores [example, layer, head]; four examples a user unless said otherwise."""
    pcs = np.asarray(pcs, dtype=np.float32)
    count = len(pcs)
    users = [f"u{i // 4}" for i in range(count)] if users is None else users
    data = xr.Dataset(
        {"pcs": (("example", "layer", "head"), pcs), "nll": ("example", np.ones(count))},
        coords={
            "example": [f"e{i}" for i in range(count)] if names is None else names,
            "user": ("example", users),
            "task": ("example", list(tasks) if len(tasks) == count else [tasks] * count),
        },
    )
    return HeadScores(data, {"settings": {}})


def noisy(mean, count=48, seed=0, size=0.3):
    rng = np.random.default_rng(seed)
    mean = np.asarray(mean, dtype=float)
    return mean + rng.normal(0, size, (count, *mean.shape))


MEAN = [[3, 0, 1, 0], [0, 2, 0, 0.5], [0, 0, 0, 0]]


# By place


def test_a_model_held_against_itself_agrees_in_every_way():
    scores = make_scores(noisy(MEAN))
    row = transfer(scores, scores, 3, ("a", "b")).squeeze()
    for name in ("jaccard", "spearman", "matched", "overlap", "depth_rho"):
        assert row[name].item() == pytest.approx(1.0), name
    assert row["spearman_p"] < 0.05
    assert row["matched_p"] == pytest.approx(1 / 201)
    np.testing.assert_allclose(row["mass"][0], row["mass"][1])


def test_agreement_by_place_is_what_scipy_and_a_count_say():
    a, b = make_scores(noisy(MEAN)), make_scores(noisy(MEAN[::-1], seed=1))
    row = transfer(a, b, 3).squeeze()
    means = [s.data["pcs"].mean("example").values.ravel() for s in (a, b)]
    assert row["spearman"].item() == pytest.approx(spearmanr(*means).statistic)
    best = [set(np.argsort(-mean)[:3].tolist()) for mean in means]
    assert row["jaccard"].item() == len(best[0] & best[1]) / len(best[0] | best[1])


def test_heads_in_another_order_within_their_layers_agree_by_depth_and_not_by_place():
    # All of the score in the first layer: whatever the order, the depth is the same.
    mean = np.zeros((3, 24))
    mean[0] = np.linspace(1, 3, 24)
    other = mean.copy()
    other[0] = np.random.default_rng(3).permutation(other[0])
    a, b = make_scores(noisy(mean, size=0.05)), make_scores(noisy(other, seed=1, size=0.05))
    row = transfer(a, b, 8).squeeze()
    assert row["overlap"] > 0.95
    # Depth alone makes the places correlate, and the control knows it.
    assert row["spearman_layer"] > 0.3
    assert row["spearman_p"] > 0.05
    assert row["jaccard_p"] > 0.05
    text = "\n".join(lines(transfer(a, b, 8)))
    assert "no agreement shown beyond that" in text


# By matching


def twins(seed=0, count=60):
    """Two models whose heads do the same in another order, each head with examples of its own."""
    rng = np.random.default_rng(seed)
    part = rng.normal(0, 1, (count, 2, 3))
    order = rng.permutation(6)
    other = part.reshape(count, 6)[:, order].reshape(count, 3, 2)
    return part, other + rng.normal(0, 0.3, other.shape), order


def test_matching_finds_the_same_heads_in_another_order_and_shape():
    first, second, _ = twins()
    row = transfer(make_scores(first), make_scores(second), 2).squeeze()
    assert np.isnan(row["jaccard"])
    assert row["matched"] > 0.85
    assert row["held_out"] > 0.85
    assert abs(row["any_pair"]) < 0.25
    assert row["matched_chance"] < 0.3
    assert (
        "their scores go together" in lines(transfer(make_scores(first), make_scores(second), 2))[1]
    )


def test_the_matching_is_the_best_of_all():
    first, second, _ = twins(count=24)
    row = transfer(make_scores(first), make_scores(second), 2).squeeze()
    a, b = first.reshape(24, 6).T, np.float32(second).reshape(24, 6).T
    table = [[spearmanr(x, y).statistic for y in b] for x in np.float32(a)]
    best = max(
        sum(table[i][j] for i, j in enumerate(order)) / 6
        for order in itertools.permutations(range(6))
    )
    assert row["matched"].item() == pytest.approx(best)


def test_unrelated_models_match_no_better_than_with_users_permuted():
    rng = np.random.default_rng(5)
    p, held = [], []
    for seed in range(20):
        a, b = (make_scores(rng.normal(0, 1, (32, 2, 3))) for _ in range(2))
        table = transfer(a, b, 2, permutations=99, seed=seed).squeeze()
        p.append(table["matched_p"].item())
        held.append(table["held_out"].item() - table["any_pair"].item())
    # Uniform if the null is right: the mean of 20 has a standard error of .065.
    assert np.mean(p) == pytest.approx(0.5, abs=0.2)
    assert min(p) >= 0.01
    # On the half that they were found on, the best of 6 pairs over 16 examples stand at .35.
    assert np.mean(held) == pytest.approx(0, abs=0.08)


def test_difficulty_alone_makes_any_two_heads_go_together_and_no_pair_stands_out():
    rng = np.random.default_rng(6)
    hard = rng.normal(0, 1, (80, 1, 1))
    a, b = (make_scores(hard + rng.normal(0, 0.5, (80, 2, 3))) for _ in range(2))
    row = transfer(a, b, 2).squeeze()
    assert row["matched_p"] < 0.05
    assert row["held_out"].item() == pytest.approx(row["any_pair"].item(), abs=0.1)
    assert row["any_pair"] > 0.6


def held(counts):
    """Users of so many examples each, in a mixed order of rows."""
    names = [f"u{i}" for i, count in enumerate(counts) for _ in range(count)]
    return np.random.default_rng(0).permutation(names)


@pytest.mark.parametrize(
    ("counts", "blocks"),
    [
        ([2, 2, 2], [(3, 2)]),
        ([5, 4, 4, 4, 3, 3, 3, 3], [(4, 4), (4, 3)]),
        ([8, 8, 7, 7, 6, 2, 2], [(4, 7), (3, 2)]),
        ([6, 3], [(2, 3)]),
        # A single user at the end: the others are cut to his number, or he is left out.
        ([20, 20, 20, 20, 19], [(5, 19)]),
        ([4, 4, 4, 4, 1], [(4, 4)]),
        ([7], []),
    ],
)
def test_users_change_places_whole_and_among_equals(counts, blocks):
    users = held(counts)
    found = exchangeable(users)
    assert [block.shape for block in found] == blocks
    places = np.concatenate([block.ravel() for block in found]) if found else []
    assert len(set(places)) == len(places)
    for block in found:
        for row in block:
            (name,) = set(users[row].tolist())
            # His first examples, in their order.
            assert row.tolist() == np.flatnonzero(users == name)[: len(row)].tolist()
    orders = set()
    for seed in range(20 * bool(found)):
        order = shuffled(found, np.random.default_rng(seed))
        assert sorted(order) == sorted(places)
        orders.add(tuple(order.tolist()))
        start = 0
        for count, size in blocks:
            for place in range(start, start + count * size, size):
                assert len(set(users[order[place : place + size]].tolist())) == 1
            start += count * size
    assert len(orders) > 1 or not found


def test_users_of_unequal_numbers_of_examples_give_no_false_matching():
    users = np.repeat([f"u{i:02d}" for i in range(10)], [9, 8, 8, 7, 6, 5, 4, 3, 2, 2])
    _, index = np.unique(users, return_inverse=True)
    rng = np.random.default_rng(0)
    p = []
    for seed in range(40):
        # Each user moves each head of either model by an amount of his own.
        sides = [
            make_scores(
                rng.normal(0, 1, (10, 2, 3))[index] + rng.normal(0, 0.3, (len(users), 2, 3)),
                users.tolist(),
            )
            for _ in range(2)
        ]
        p.append(transfer(*sides, 2, permutations=59, seed=seed)["matched_p"].item())
    # 5 % of 40 are 2; four standard errors are 5.5.
    assert sum(value < 0.05 for value in p) <= 7
    # Uniform: the mean of 40 has a standard error of .046.
    assert np.mean(p) == pytest.approx(0.5, abs=0.18)


def test_a_matching_over_users_cut_alike_says_so_and_still_finds_the_same_heads():
    first, second, _ = twins()
    users = held([12, 11, 10, 9, 8, 4, 3, 3]).tolist()
    table = transfer(make_scores(first, users), make_scores(second, users), 2, ("x", "y"))
    assert table["matched_examples"].item() == 4 * 9 + 4 * 3
    assert table["matched_p"] < 0.05
    assert "over 48 of 60 examples, users cut alike, with users permuted" in lines(table)[1]
    users = held([12, 12, 12, 12, 12]).tolist()
    table = transfer(make_scores(first, users), make_scores(second, users), 2, ("x", "y"))
    assert table["matched_examples"].item() == 60
    assert "over examples, with users permuted" in lines(table)[1]


def test_without_two_users_to_permute_there_is_no_p_and_the_reason_is_said():
    first, second, _ = twins()
    table = transfer(*(make_scores(side, ["u"] * 60) for side in (first, second)), 2)
    assert table["matched"] > 0.8
    assert np.isnan(table["matched_p"].item()) and np.isnan(table["matched_chance"].item())
    assert lines(table)[1].endswith(
        "over 60 examples; whether that is chance can't be told: a single user."
    )
    table = transfer(*(make_scores(side[:3], list("uuv")) for side in (first, second)), 2)
    assert np.isnan(table["matched_p"].item())
    assert lines(table)[1].endswith("can't be told: too few examples of two users each.")


def test_examples_are_matched_by_name_and_not_by_place():
    first, second, _ = twins()
    names = [f"e{i}" for i in range(60)]
    users = [f"u{i // 4}" for i in range(60)]
    turned = make_scores(second[::-1], users=users[::-1], names=names[::-1])
    straight = transfer(make_scores(first), make_scores(second), 2)
    other = transfer(make_scores(first), turned, 2)
    assert other["matched"].item() == pytest.approx(straight["matched"].item())


def test_other_examples_are_refused_for_matching_and_compared_without():
    a = make_scores(noisy(MEAN))
    b = make_scores(noisy(MEAN), names=[f"f{i}" for i in range(48)])
    with pytest.raises(InputError, match=r"e0 is in one run only.*match=False"):
        transfer(a, b, 3)
    row = transfer(a, b, 3, match=False).squeeze()
    assert np.isnan(row["matched"])
    assert row["spearman"] > 0.5


# By depth


def test_a_layer_s_share_is_spread_over_its_part_of_the_depth():
    mean = [[1, 1, -5], [0, 6, -1], [0, 0, 0], [0, 0, 0]]
    scores = make_scores(np.repeat([mean], 8, axis=0))
    row = transfer(scores, scores, 2).squeeze().isel(model=0)
    # A quarter of the depth is two and a half tenths.
    first, second = 2 / 8 / 2.5, 6 / 8 / 2.5
    wanted = [first, first, (first + second) / 2, second, second, 0, 0, 0, 0, 0]
    np.testing.assert_allclose(row["mass"], wanted, atol=1e-6)
    assert row["centre"].item() == pytest.approx(2 / 8 * 1 / 8 + 6 / 8 * 3 / 8)


def test_models_of_other_depths_with_the_same_profile_overlap_fully():
    thin = make_scores(np.repeat([[[2.0], [1.0]]], 8, axis=0))
    thick = make_scores(np.repeat([[[1.0, 1], [2, 0], [1, 0], [0.5, 0.5]]], 8, axis=0))
    row = transfer(thin, thick, 1).squeeze()
    assert row["overlap"].item() == pytest.approx(1.0)
    # Of the 24 orders of four layers those that keep both twos in front: 2 * 2.
    assert row["overlap_p"].item() == pytest.approx(4 / 24)


def test_overlap_and_its_chance_are_those_of_all_orders_by_hand():
    a = make_scores(np.repeat([[[1.0], [0.0]]], 8, axis=0))
    b = make_scores(np.repeat([[[0.75], [0.25]]], 8, axis=0))
    row = transfer(a, b, 1).squeeze()
    assert row["overlap"].item() == pytest.approx(0.75)
    assert row["overlap_chance"].item() == pytest.approx((0.75 + 0.25) / 2)
    assert row["overlap_p"].item() == 0.5


def test_intervals_by_depth_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    inside = 0
    for seed in range(60):
        effects = rng.normal(0, 1, (24, 2, 1)) * 0.3
        pcs = np.array([[2.0], [1.0]]) + np.repeat(effects, 2, axis=0)
        side = depth.Side(pcs, np.repeat(np.arange(24), 2))
        found = depth.by_depth(side, side, 10, 0.95, seed)
        # The first layer's share is 2/3 in expectation, a fifth of it in each tenth.
        inside += found["mass_low"][0, 0] <= 2 / 3 / 5 <= found["mass_high"][0, 0]
    # 95 % of 60 is 57; four standard errors are 7.
    assert inside >= 50


def test_more_than_five_layers_are_permuted_at_random():
    scores = make_scores(noisy(np.eye(7)[:, :2]))
    row = transfer(scores, scores, 2, permutations=50).squeeze()
    assert 1 / 51 <= row["overlap_p"].item() < 1


def test_one_user_has_no_interval():
    scores = make_scores(noisy(MEAN, count=6), users=["u"] * 6)
    row = transfer(scores, scores, 2).squeeze()
    for name in ("spearman", "overlap", "depth_rho", "mass", "centre"):
        assert np.isnan(row[f"{name}_low"]).all()
    assert np.isnan(row["held_out"])


def test_scores_without_a_positive_mean_have_no_depth():
    scores = make_scores(-np.ones((8, 2, 2)))
    row = transfer(scores, scores, 1, match=False).squeeze()
    assert np.isnan(row["overlap"])
    assert np.isnan(row["mass"]).all()
    assert "no head has a positive score" in lines(transfer(scores, scores, 1, match=False))[0]


# The table


def test_the_table_is_by_task_and_keeps_its_numbers_on_disk(tmp_path):
    scores = make_scores(noisy(MEAN), tasks=["x", "y"] * 24)
    table = transfer(scores, scores, 3, ("first", "second"))
    assert table["group"].values.tolist() == ["x", "y"]
    assert table["examples"].values.tolist() == [24, 24]
    tables.save(table, tmp_path / "t.json")
    xr.testing.assert_allclose(tables.load(tmp_path / "t.json"), table)
    whole = transfer(scores, scores, 3, by="all")
    assert whole["group"].values.tolist() == ["all"]


def test_two_runs_that_can_not_be_compared_are_refused():
    a = make_scores(noisy(MEAN))
    holes = noisy(MEAN)
    holes[3, 0, 0] = np.nan
    screened = HeadScores(a.data, {"settings": {"screen": {"k": 1, "by": "task"}}})
    for other, words in (
        (make_scores(noisy(MEAN), tasks="s"), "s, t: scored by one of the two models only"),
        (make_scores(holes), "b: some scores are NaN"),
        (make_scores(np.full((48, 3, 4), np.nan)), "b: some scores are NaN"),
        (screened, "needs exact scores of all heads"),
        (make_scores(noisy([[1.0]])), "K must be between 1 and 1"),
    ):
        with pytest.raises(InputError, match=words):
            transfer(a, other, 3)
    with pytest.raises(InputError, match="two names"):
        transfer(a, a, 3, names=("x", "x"))


# Lending


@pytest.fixture(scope="module")
def testbed_run(testbed_model):
    from workbench.discovery.run import score_heads

    examples = load_examples("testbed", "discovery", users=4, tasks=["testbed-headline"])
    return examples, score_heads(testbed_model, examples, progress=False)


def plain_change(model, prompt, heads, shape):
    """What removing heads does to one loss, by Transformers alone and W_O's rows."""
    twin = plain_copy(model)
    with torch.no_grad():
        before = plain_nll(twin, prompt)
        for head in heads:
            zero_output_weights(twin, head, shape[head.layer])
        return plain_nll(twin, prompt) - before


def test_lending_is_what_a_plain_loop_measures(testbed_model, testbed_run):
    examples, scores = testbed_run
    table = lend(testbed_model, examples, scores, 3, draws=2, progress=False)
    groups, halves = lending._halved(testbed_model, examples, scores, "user", 12, 2, 0)
    shape, users = scores.heads_per_layer, list(groups)
    assert table["group"].values.tolist() == users
    prompts = build_prompts(examples, testbed_model.tokenizer, 256)
    pcs = scores.data["pcs"].values.astype(float)

    def found_on(user, half):
        return top_k(pcs[groups[user]][halves[groups[user]] == half].mean(axis=0), 3)

    own = users[1]
    for lender in (own, users[2]):
        changes = [
            plain_change(testbed_model, prompts[i], found_on(lender, 1 - halves[i]), shape)
            for i in groups[own]
        ]
        found = table["change"].sel(group=own, other=lender).item()
        # float32 losses of about 1, in batches of other shapes
        assert found == pytest.approx(np.mean(changes), abs=1e-5)
    changes = []
    for half in (0, 1):
        rng = np.random.default_rng((0, half, 1))
        for drawn in [random_matched(found_on(own, half), shape, rng) for _ in range(2)]:
            rows = groups[own][halves[groups[own]] != half]
            changes += [plain_change(testbed_model, prompts[i], drawn, shape) for i in rows]
    assert table["random"].sel(group=own).item() == pytest.approx(np.mean(changes), abs=1e-5)


def test_no_example_is_on_both_sides(testbed_model, testbed_run):
    examples, scores = testbed_run
    groups, halves = lending._halved(testbed_model, examples, scores, "user", 12, 1, 0)
    for rows in groups.values():
        assert sorted(halves[rows].tolist()) == [0] * 4 + [1] * 4
    both = [*examples, *load_examples("testbed", "discovery", users=4, tasks=["testbed-tag"])]
    _, halves = lending._halved(testbed_model, both, scores, "task", 12, 1, 0)
    sides = {}
    for example, half in zip(both, halves, strict=True):
        sides.setdefault(example.user, set()).add(int(half))
    assert all(len(side) == 1 for side in sides.values())
    assert {next(iter(side)) for side in sides.values()} == {0, 1}


def test_lending_goes_on_from_its_folder(testbed_model, testbed_run, tmp_path, monkeypatch):
    examples, scores = testbed_run
    options = {"draws": 1, "limit": 2, "folder": tmp_path, "progress": False}
    table = lend(testbed_model, examples, scores, 2, **options)
    monkeypatch.setattr(lending, "losses", None)  # nothing is measured again
    xr.testing.assert_identical(lend(testbed_model, examples, scores, 2, **options), table)
    path = next((tmp_path / "losses").iterdir())
    path.write_bytes(b"no")
    with pytest.raises(InputError, match="damaged"):
        lend(testbed_model, examples, scores, 2, **options)


def made_table(matrix, random, by="user"):
    """A table of users with one example each, without any model."""
    count = len(matrix)
    control = np.where(np.eye(count) == 1, np.reshape(random, (-1, 1)), np.nan)
    groups = {f"u{i}": np.array([i]) for i in range(count)}
    attrs = {"k": 2, "by": by, "draws": 1, "seed": 0}
    return lending._table(
        np.asarray(matrix, dtype=float), control, groups, np.array(list(groups)), attrs
    )


def test_the_gap_and_its_jackknife_are_those_by_hand():
    table = made_table([[3, 1, 2], [0, 4, 1], [1, 1, 5]], [1, 2, 3])
    assert table.attrs["own"] == 4
    assert table.attrs["others"] == 1
    assert (table.attrs["gap"], table.attrs["edge"]) == (3, 2)
    # Without each user: (4 + 5) / 2 - (1 + 1) / 2, (3 + 5) / 2 - 3 / 2, (3 + 4) / 2 - 1 / 2.
    left = np.array([3.5, 2.5, 3.0])
    error = np.sqrt(2 / 3 * ((left - 3) ** 2).sum())
    assert table.attrs["gap_low"] == pytest.approx(3 - 4.302653 * error)
    assert table.attrs["gap_high"] == pytest.approx(3 + 4.302653 * error)


def test_users_alike_are_called_different_as_seldom_as_the_interval_says():
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(300):
        # Users differ in how much any heads cost them, and heads in how much they cost anybody.
        matrix = rng.normal(0, 1, (10, 1)) + rng.normal(0, 1, (1, 10)) + rng.normal(0, 1, (10, 10))
        attrs = made_table(matrix, np.zeros(10)).attrs
        wrong += attrs["gap_low"] > 0 or attrs["gap_high"] < 0
    # 5 % of 300 are 15; four standard errors are 15.
    assert wrong <= 30


def test_the_findings_name_an_effect_only_where_the_interval_leaves_0_out(tmp_path):
    clear = made_table(np.eye(6) + 0.01 * np.random.default_rng(0).normal(size=(6, 6)), np.ones(6))
    first, gap, edge = lending.lines(clear)
    assert "Removing the own top 2 heads of 6 users" in first
    assert gap.startswith("Against another user's: the own heads matter more (+")
    assert edge.startswith("Against random ones: no difference shown (")
    assert "can't be said" in lending.lines(made_table(np.eye(2), np.zeros(2)))[1]
    tables.save(clear, tmp_path / "t.json")
    xr.testing.assert_allclose(tables.load(tmp_path / "t.json"), clear)


def test_a_task_s_interval_leaves_out_users_and_not_tasks():
    rng = np.random.default_rng(1)
    change = rng.normal(0, 1, (8, 2))
    random = rng.normal(0, 1, (8, 2))
    groups = {"x": np.arange(4), "y": np.arange(4, 8)}
    users = np.array(["a", "b", "c", "d"] * 2)
    table = lending._table(change, random, groups, users, {"by": "task", "k": 1})
    gaps = []
    for out in "abcd":
        kept = users != out
        x, y = change[:4][kept[:4]].mean(axis=0), change[4:][kept[4:]].mean(axis=0)
        gaps.append((x[0] + y[1] - x[1] - y[0]) / 2)
    error = np.sqrt(3 / 4 * ((np.array(gaps) - np.mean(gaps)) ** 2).sum())
    assert table.attrs["gap_high"] - table.attrs["gap"] == pytest.approx(3.182446 * error)
    assert table["users"].values.tolist() == [4, 4]


def test_lending_that_can_not_be_measured_is_refused(testbed_model, testbed_run):
    examples, scores = testbed_run
    one = [example for example in examples if example.user == examples[0].user]
    foreign = make_scores(np.ones((4, 2, 2)))
    for change, words in (
        ({"examples": one}, "between two users or more"),
        ({"examples": examples[::8]}, "0 have them"),
        ({"scores": foreign}, "of another model"),
        ({"scores": scores.select(users=[examples[0].user])}, "has no scores, with 24 in all"),
        ({"draws": 0}, "at least 1 draw"),
        ({"limit": 1}, "two or more"),
    ):
        options = {"examples": examples, "scores": scores, "draws": 1, **change}
        given = options.pop("examples"), options.pop("scores")
        with pytest.raises(InputError, match=words):
            lend(testbed_model, *given, 2, progress=False, **options)
