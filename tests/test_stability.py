"""How far head sets can be trusted: on scores worked by hand, on noise, and on the testbed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import xarray as xr
from scipy.stats import spearmanr
from test_figures import make_scores

import workbench as wb
from workbench import tables
from workbench.analysis import needed, noise, precision, recurrence, stability
from workbench.analysis.agreement import layer_chance, spearman, spearman_pairs, top_members
from workbench.data.mixing import with_mixed_profile
from workbench.data.prompts import PromptSettings
from workbench.errors import InputError
from workbench.heads import all_heads, chance_jaccard, jaccard, top_k
from workbench.scores import HeadScores


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def screened(scores, k=2, by="task"):
    return HeadScores(scores.data, {"settings": {"screen": {"k": k, "by": by, "whole": True}}})


def with_settings(scores, **settings):
    return HeadScores(scores.data, {"settings": settings})


# Agreement of rankings


def test_sets_of_many_rankings_are_those_of_one_at_a_time():
    means = np.round(normal(40, 3, 5), 1)  # with ties
    means[:, 1, 3:] = np.nan
    means[:, 2, 2:] = np.nan
    shape = [5, 3, 2]
    assert any(top_k(mean, 4).ties for mean in means)
    for mean, members in zip(means, top_members(means, 4), strict=True):
        held = {h for h in all_heads(shape) if members.reshape(3, 5)[h.layer, h.head]}
        assert held == set(top_k(mean, 4))
        assert members.sum() == 4


def test_rank_correlation_is_scipys():
    means, others = np.round(normal(3, 2, 6), 1), np.round(normal(3, 2, 6, seed=1), 1)
    found, pairs = spearman(means, others), spearman_pairs(means, others)
    for a in range(3):
        assert pairs[a] == pytest.approx(found[a, a])
        for b in range(3):
            expected = spearmanr(means[a].ravel(), others[b].ravel()).statistic
            assert found[a, b] == pytest.approx(expected)


# Examples needed


def test_equal_examples_agree_at_every_count():
    table = needed.by_examples(make_scores(np.tile(normal(1, 2, 4), (9, 1, 1)), list("abc") * 3), 3)
    assert table["count"].values.tolist() == ["1", "2", "5", "all"]
    for name in ("jaccard", "spearman"):
        assert np.allclose(table[name].values, 1)
    assert np.allclose(table["to_all"].values[0, :-1], 1)
    # Halves of users, of which the larger has six examples.
    assert np.allclose(table["apart"].values[0, :-1], 1)


def test_subsets_of_noise_agree_with_all_by_construction_and_not_with_another_half():
    scores = make_scores(normal(120, 4, 8), [f"u{i // 3}" for i in range(120)])
    row = needed.by_examples(scores, 8, draws=60).sel(group="tag")
    chance = chance_jaccard(8, 32)
    assert float(row["to_all"].sel(count="100")) > 3 * chance
    # 60 draws of one sample's halves; a draw has a standard deviation of about 0.07.
    assert np.allclose(row["apart"].sel(count=["1", "10", "50"]), chance, atol=0.05)
    assert np.isnan(row["apart"].sel(count="100"))
    # A draw's smaller subset is a part of its larger one.
    assert float(row["jaccard"].sel(count="50", other="100")) > 2 * chance
    assert "not shown to be above chance" in needed.lines(row.expand_dims("group"))[0]


def test_chance_in_the_same_layers_is_that_of_drawn_sets():
    rng = np.random.default_rng(0)
    first, second, heads = (2, 0, 1), (1, 3, 2), (4, 3, 5)

    def drawn(counts):
        places = enumerate(zip(counts, heads, strict=True))
        return {(i, h) for i, (n, of) in places for h in rng.choice(of, n, replace=False).tolist()}

    pairs = [(drawn(first), drawn(second)) for _ in range(4000)]
    found = [len(a & b) / len(a | b) for a, b in pairs]
    # The standard error of the mean is about 0.002.
    assert layer_chance(first, second, heads) == pytest.approx(np.mean(found), abs=0.008)
    assert layer_chance((2, 0), (0, 2), (3, 3)) == 0
    assert layer_chance((8,), (8,), (32,)) == pytest.approx(chance_jaccard(8, 32))


def test_sets_that_share_a_layer_and_no_head_beyond_luck_are_not_above_chance():
    pcs = normal(240, 4, 8)
    pcs[:, 1] += 100
    users = [f"u{i // 3}" for i in range(240)]
    table = needed.by_examples(make_scores(pcs, users), 4, draws=40)
    # Of 8 heads of one layer 4 are taken; all 32 heads would give less.
    cell = table.sel(group="tag", count="100")
    assert float(cell["apart_chance"]) == pytest.approx(chance_jaccard(4, 8))
    assert float(cell["apart_low"]) > table.attrs["chance"]
    (line,) = needed.lines(table)
    assert "(random heads in the same layers: 0.36, any: 0.07): not shown to be above" in line
    found = recurrence.recurrence(make_scores(pcs, users), 4, draws=20)
    assert float(found["layer_chance"][0]) == pytest.approx(chance_jaccard(4, 8))
    assert "(random heads in the same layers: 0.36, any: 0.07)" in recurrence.lines(found)[0]


def test_two_examples_worked_by_hand():
    # One alone needs head 0, the other head 1; both together head 0.
    scores = make_scores([[[2, 0, 0]], [[0, 1, 0]]], ["a", "b"])
    row = needed.by_examples(scores, 1, counts=[1], draws=400).sel(group="tag")
    # Half of the draws begin with the one; binomial, standard deviation 0.025.
    assert float(row["to_all"].sel(count="1")) == pytest.approx(0.5, abs=0.1)
    assert (float(row["to_all_low"][0]), float(row["to_all_high"][0])) == (0, 1)
    # The halves are the two of them.
    assert float(row["apart"].sel(count="1")) == 0
    # Ranks (3, 1.5, 1.5) and (1.5, 3, 1.5), each against (3, 2, 1).
    both = [spearmanr([3, 2, 1], other).statistic for other in ([2, 0, 0], [0, 1, 0])]
    first = float(row["to_all"].sel(count="1"))
    expected = first * both[0] + (1 - first) * both[1]
    assert float(row["spearman"].sel(count="1", other="all")) == pytest.approx(expected)


def test_independent_halves_share_no_user():
    # Each user needs a head of its own: sets of other users can't hold it.
    pcs = np.zeros((24, 1, 6))
    pcs[np.arange(24), 0, np.arange(24) // 4] = 1
    scores = make_scores(pcs, [f"u{i // 4}" for i in range(24)])
    row = needed.by_examples(scores, 1).sel(group="tag")
    assert np.allclose(row["apart"].sel(count=["1", "2", "5", "10"]), 0)
    assert float(row["to_all"].sel(count="10")) > 0


def test_users_drawn_whole_are_as_few_as_can_be():
    scores = make_scores(normal(24, 2, 4), [f"u{i // 4}" for i in range(24)])
    options = {"counts": [1, 4, 5, 12], "draws": 30}
    few = needed.by_examples(scores, 3, by_users=True, **options)["drawn_users"].values[0]
    assert few.tolist() == [1, 1, 2, 3, 6]
    many = needed.by_examples(scores, 3, **options)["drawn_users"].values[0]
    assert many[1] > 2.5
    assert many[-1] == 6


def test_counts_that_a_group_has_not_are_left_out_and_named():
    scores = make_scores(normal(9, 2, 4), list("abcabcabc"), ["few"] * 3 + ["more"] * 6)
    table = needed.by_examples(scores, 3, counts=[5, 2, 3, 100])
    assert table["count"].values.tolist() == ["2", "3", "5", "all"]
    few = table.sel(group="few")
    assert few["left_out"].item() == "3, 5, 100"
    assert table.sel(group="more")["left_out"].item() == "100"
    assert np.isnan(few["jaccard"].sel(count="3")).all()
    assert float(few["jaccard"].sel(count="all", other="all")) == 1
    assert table["examples"].values.tolist() == [3, 6]


def test_a_single_example_and_a_single_user_give_no_false_number():
    one = needed.by_examples(make_scores(normal(1, 2, 4), ["a"]), 3)
    assert one["count"].values.tolist() == ["all"]
    assert needed.lines(one) == ["tag: 1 example, too few to hold the top 3 of fewer against."]
    user = needed.by_examples(make_scores(normal(9, 2, 4), ["a"] * 9), 3)
    assert user["apart"].isnull().all()
    assert "can't be compared: too few users" in needed.lines(user)[0]
    within = needed.by_examples(make_scores(normal(9, 2, 4), ["a"] * 9), 3, by="user")
    assert within["apart"].sel(count="1").notnull().all()
    assert "the other half of the examples" in needed.lines(within)[0]


def test_a_set_of_all_heads_says_that_it_must_agree():
    table = needed.by_examples(make_scores(normal(9, 2, 4), list("abc") * 3), 8)
    assert needed.lines(table) == ["K = 8 is every head of the model: all sets are equal."]
    table = recurrence.recurrence(make_scores(normal(9, 2, 4), list("abc") * 3), 8)
    assert recurrence.lines(table) == [
        "K = 8 is every head of the model: each is in every resample."
    ]


def test_drawing_repeats_from_its_seed():
    scores = make_scores(normal(20, 2, 4), list("abcd") * 5)
    first, again = (needed.by_examples(scores, 3, seed=1) for _ in range(2))
    xr.testing.assert_identical(first, again)
    assert not first["to_all"].equals(needed.by_examples(scores, 3, seed=2)["to_all"])


@pytest.mark.parametrize(
    "function", [needed.by_examples, recurrence.recurrence, stability.split_half]
)
def test_scores_that_no_ranking_can_be_made_of_are_refused(function):
    scores = make_scores(normal(6, 2, 4), list("abc") * 2)
    with pytest.raises(InputError, match="K must be between 1 and 8"):
        function(scores, 9)
    with pytest.raises(InputError, match="these were screened"):
        function(screened(scores), 2)
    with pytest.raises(InputError, match="all of these are NaN"):
        function(make_scores(np.full((6, 2, 4), np.nan), list("abc") * 2), 2)
    holes = normal(6, 2, 4)
    holes[4, 1, 2] = np.nan
    with pytest.raises(InputError, match="1 examples miss some, e4 the first"):
        function(make_scores(holes, list("abc") * 2), 2)


def test_counts_and_draws_below_one_are_refused():
    scores = make_scores(normal(6, 2, 4), list("abc") * 2)
    for options in ({"counts": [0, 2]}, {"counts": []}, {"draws": 0}):
        with pytest.raises(InputError, match="counted from 1"):
            needed.by_examples(scores, 2, **options)
    with pytest.raises(InputError, match="2 draws or more, got 1"):
        recurrence.recurrence(scores, 2, draws=1)


# Halves


def test_halves_say_in_words_what_they_show():
    pcs = normal(80, 4, 8) * 0.01
    users = [f"u{i // 8}" for i in range(80)]
    for i in range(80):
        pcs[i].flat[(i // 8) * 3 : (i // 8) * 3 + 3] += 1
    table = stability.split_half(make_scores(pcs, users), 3)
    assert "the groups' heads differ beyond noise (+1.000" in stability.lines(table)[0]
    assert table["examples"].values.tolist() == [8] * 10
    table = stability.split_half(make_scores(normal(80, 4, 8), users), 3)
    assert "no difference shown" in stability.lines(table)[0]


def test_halves_that_can_not_be_had_are_said_to_be_so():
    scores = make_scores(normal(4, 2, 4), list("aabb"))
    assert "two groups are too few" in stability.lines(stability.split_half(scores, 3))[0]
    one = stability.split_half(scores, 3, by="all")
    assert "no other group" in stability.lines(one)[0]
    assert one["users"].values.tolist() == [2]
    single = stability.split_half(make_scores(normal(2, 2, 4), list("ab")), 3)
    assert "no group has two examples" in stability.lines(single)[0]


# Recurrence


def test_resamples_of_two_users_worked_by_hand():
    # Drawn: the first twice (1/4), both (1/2), the second twice (1/4). With both, the second's
    # three examples outweigh the first's one, though a mean of users' means would not say so.
    pcs = [[[2, 0, 0]], *[[[0, 1, 0]]] * 3]
    scores = make_scores(pcs, ["a", "b", "b", "b"])
    row = recurrence.recurrence(scores, 1, draws=4000).sel(group="tag")
    # Binomial: a standard deviation of 0.007.
    assert np.allclose(row["share"], [[0.25, 0.75, 0]], atol=0.03)
    assert float(row["overlap"]) == pytest.approx(0.25**2 + 0.75**2, abs=0.03)
    assert row["member"].values.tolist() == [[0, 1, 0]]
    assert (int(row["firm"]), int(row["users"]), int(row["examples"])) == (0, 2, 4)


def test_resamples_of_equal_scores_have_their_mean():
    # Users have 1, 2 and 5 examples, so that resamples differ in size.
    means = recurrence.resampled_means(np.full((8, 1, 2), 3.0), np.array(list("abbccccc")), 50, 0)
    assert np.allclose(means, 3)


def test_heads_that_stand_out_are_firm_and_equal_ones_are_not():
    pcs = normal(60, 2, 4) * 0.1
    pcs[:, 0, :2] += 5
    scores = make_scores(pcs, [f"u{i // 2}" for i in range(60)])
    table = recurrence.recurrence(scores, 3)
    row = table.sel(group="tag")
    assert (row["share"].values[0, :2] == 1).all()
    assert int(row["firm"]) == 2
    assert float(row["share"].sum()) == pytest.approx(3)
    assert float(row["overlap"]) > 0.5
    assert "of the top 3 heads 2 in at least 95%" in recurrence.lines(table)[0]


def test_heads_that_are_not_there_have_no_share():
    pcs = normal(8, 2, 4)
    pcs[:, 1, 2:] = np.nan
    row = recurrence.recurrence(make_scores(pcs, list("abcd") * 2), 3).sel(group="tag")
    assert np.isnan(row["share"].values).tolist() == [[False] * 4, [False, False, True, True]]
    assert np.isnan(row["member"].values[1, 2:]).all()


def test_ties_at_the_cut_are_counted_and_said():
    pcs = np.zeros((6, 1, 4))
    pcs[:, 0, 0] = 1
    table = recurrence.recurrence(make_scores(pcs, list("abc") * 2), 2)
    assert int(table["ties"][0]) == 2
    assert "The tie rule shut out 2." in recurrence.lines(table)[0]


def test_a_single_user_can_not_be_drawn_anew():
    table = recurrence.recurrence(make_scores(normal(5, 2, 4), ["a"] * 5), 3)
    assert table["share"].isnull().all()
    assert table["firm"].isnull().all()
    assert (
        "a single user; which heads would be found again is unknown" in recurrence.lines(table)[0]
    )
    within = recurrence.recurrence(make_scores(normal(5, 2, 4), ["a"] * 5), 3, by="user")
    assert within["share"].notnull().all()
    one = recurrence.recurrence(make_scores(normal(1, 2, 4), ["a"]), 3, by="user")
    assert "a single example" in recurrence.lines(one)[0]


# Strangers' items


def persons(users=4, items=6, rows=2, task="LaMP-4"):
    """Users whose items name them; all rows of a user have the same profile."""
    return [
        wb.Example(
            f"{u}-{n}",
            f"u{u}",
            task,
            "write a title",
            "a title",
            tuple({"title": f"{u}.{i}", "text": f"of user {u}"} for i in range(items)),
        )
        for u in range(users)
        for n in range(rows)
    ]


def owners(example):
    return [item["title"].split(".")[0] for item in example.profile]


@pytest.mark.parametrize(("share", "number"), [(0.25, 2), (0.5, 3), (0.1, 1), (1.0, 6), (0.0, 0)])
def test_a_share_of_the_items_is_a_strangers_and_the_rest_stays_in_place(share, number):
    for own, mixed in zip(persons(), with_mixed_profile(persons(), share), strict=True):
        kept = [a == b for a, b in zip(own.profile, mixed.profile, strict=True)]
        assert kept.count(False) == number
        assert [o == own.user[1:] for o in owners(mixed)] == kept
        assert replace(mixed, profile=own.profile) == own


def test_rows_of_a_user_are_mixed_alike_and_users_get_different_strangers():
    mixed = with_mixed_profile(persons(), 0.5)
    for first, second in zip(mixed[::2], mixed[1::2], strict=True):
        assert first.profile == second.profile
    strangers = [set(owners(e)) - {e.user[1:]} for e in mixed[::2]]
    assert all(len(names) == 1 for names in strangers)
    assert set.union(*strangers) == set("0123")


def test_a_larger_share_swaps_what_a_smaller_one_does():
    small, large = (with_mixed_profile(persons(), share, seed=3) for share in (0.3, 0.8))
    for own, few, many in zip(persons(), small, large, strict=True):
        for mine, a, b in zip(own.profile, few.profile, many.profile, strict=True):
            assert a in (b, mine)


def test_the_draw_of_strangers_follows_its_seed():
    first, again, other = (with_mixed_profile(persons(), 0.5, seed=s) for s in (1, 1, 2))
    assert first == again != other


def test_an_item_that_the_user_has_too_is_no_strangers():
    shared = {"title": "s.0", "text": "seen by all"}
    examples = [replace(e, profile=(shared, *e.profile)) for e in persons(users=3, items=2)]
    for own, mixed in zip(examples, with_mixed_profile(examples, 1.0), strict=True):
        assert not [item for item in mixed.profile if item in own.profile]
    with pytest.raises(InputError, match=r"3 items of its profile are to be swapped, .* have 2"):
        with_mixed_profile([e for e in examples if e.user != "u2"], 1.0)


def test_strangers_are_of_the_same_task_and_needed_in_each():
    other = persons(users=1, task="LaMP-7")
    with pytest.raises(InputError, match="LaMP-7: a stranger's items need two users, got one"):
        with_mixed_profile([*persons(), *other], 0.5)
    for share in (-0.1, 1.5):
        with pytest.raises(InputError, match="must be from 0 to 1"):
            with_mixed_profile(persons(), share)


@pytest.fixture(scope="module")
def ratings():
    """Half of the ratings of four users."""
    examples = wb.load_examples("testbed", users=4, tasks=["testbed-rating"])
    return examples[::2]


@pytest.fixture(scope="module")
def clean(testbed_model, ratings):
    return wb.score_heads(testbed_model, ratings, progress=False)


@pytest.fixture(scope="module")
def runs_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("noise")


@pytest.fixture(scope="module")
def swaps(testbed_model, ratings, clean, runs_folder):
    return noise.profile_noise(
        testbed_model, ratings, 6, [1.0, 0.5], clean=clean, folder=runs_folder, progress=False
    )


def test_profile_noise_equals_scoring_mixed_profiles_by_hand(testbed_model, ratings, clean, swaps):
    assert swaps["share"].values.tolist() == [0.5, 1.0]
    before = clean.data["pcs"].values.astype(float)
    for share in (0.5, 1.0):
        mixed = wb.score_heads(testbed_model, with_mixed_profile(ratings, share), progress=False)
        after = mixed.data["pcs"].values.astype(float)
        row = swaps.sel(group="testbed-rating", share=share)
        expected = jaccard(*(s.top(6, "task")["testbed-rating"] for s in (clean, mixed)))
        assert float(row["jaccard"]) == pytest.approx(expected)
        rho = spearmanr(before.mean(axis=0).ravel(), after.mean(axis=0).ravel()).statistic
        assert float(row["spearman"]) == pytest.approx(rho)
        cost = mixed.data["nll"].values.mean() - clean.data["nll"].values.mean()
        # Float32 losses of size 1.
        assert float(row["cost"]) == pytest.approx(cost, abs=1e-5)
        assert float(row["drop"]) == pytest.approx(float(row["clean"] - row["pcs"]))
        assert float(row["drop_low"]) < float(row["drop"]) < float(row["drop_high"])
        assert float(row["swapped"]) == share
    assert (int(row["examples"]), int(row["users"])) == (len(ratings), 4)


def test_kept_runs_of_mixed_profiles_are_read_and_not_scored_again(
    testbed_model, ratings, clean, swaps, runs_folder, monkeypatch
):
    from workbench.discovery import stages

    def fail(*_args, **_options):
        pytest.fail("scored again")

    monkeypatch.setattr(stages.Local, "__call__", fail)
    again = noise.profile_noise(
        testbed_model, ratings, 6, [0.5, 1.0], clean=clean, folder=runs_folder, progress=False
    )
    xr.testing.assert_identical(again, swaps)
    assert HeadScores.load(runs_folder / "mixed-0.5-seed-0").data.sizes["example"] == len(ratings)


@pytest.fixture(scope="module")
def three_tasks(testbed_model):
    """Headlines, with 2 items a profile; ratings, with more; and tags of a single user."""
    parts = {
        task: wb.load_examples("testbed", users=users, tasks=[f"testbed-{task}"])[::4]
        for task, users in (("headline", 3), ("rating", 3), ("tag", 1))
    }
    examples = [example for part in parts.values() for example in part]
    return parts, examples, wb.score_heads(testbed_model, examples, progress=False)


def test_a_share_that_swaps_the_same_items_is_scored_and_said_once(
    testbed_model, three_tasks, monkeypatch
):
    parts, examples, clean = three_tasks
    assert {len(e.profile) for e in parts["headline"]} == {2}
    scored = []

    def counted(model, given, *args, **options):
        scored.append([e.name for e in given])
        return wb.score_heads(model, given, *args, **options)

    monkeypatch.setattr(noise, "score_heads", counted)
    table = noise.profile_noise(
        testbed_model, examples, 6, [0.25, 0.5, 1.0], clean=clean, progress=False
    )
    names = {task: [e.name for e in part] for task, part in parts.items()}
    both = names["headline"] + names["rating"]
    assert scored == [both, names["rating"], both]
    assert table.attrs["repeated"] == ["testbed-headline: 0.5 swaps the same items as 0.25"]
    assert table["repeats"].sel(share=0.5).values.tolist() == pytest.approx(
        [0.25, np.nan], nan_ok=True
    )
    twins = [table.sel(group="testbed-headline", share=s, drop=True) for s in (0.25, 0.5)]
    xr.testing.assert_identical(*(twin.drop_vars("repeats") for twin in twins))
    told = noise.lines(table)
    assert [line.split(":")[0][8:] for line in told] == [
        *["headline"] * 2,
        *["rating"] * 3,
        "tag",
    ]
    # The copied share is what scoring it again would give.
    mixed = with_mixed_profile(parts["headline"] + parts["rating"], 0.5)
    again = wb.score_heads(testbed_model, mixed, progress=False)
    here = clean.select(tasks=["testbed-headline", "testbed-rating"])
    cost = (again.data["nll"] - here.data["nll"].values).groupby("task").mean()
    np.testing.assert_allclose(table["cost"].sel(share=0.5), cost.values, atol=1e-5)
    whole = noise.profile_noise(
        testbed_model, examples, 6, [0.25, 0.5, 1.0], clean=clean, by="all", progress=False
    )
    assert whole["repeats"].isnull().all()
    total = float((again.data["nll"].values - here.data["nll"].values).mean())
    assert whole["cost"].sel(share=0.5).item() == pytest.approx(total, abs=1e-5)


def test_a_share_that_only_repeats_is_dropped(testbed_model, three_tasks):
    parts, _, clean = three_tasks
    table = noise.profile_noise(
        testbed_model,
        parts["headline"],
        6,
        [0.25, 0.5, 1.0],
        clean=clean.select(tasks=["testbed-headline"]),
        progress=False,
    )
    assert table["share"].values.tolist() == [0.25, 1.0]
    assert table.attrs["repeated"] == ["testbed-headline: 0.5 swaps the same items as 0.25"]
    assert len(noise.lines(table)) == 2


def test_a_task_of_one_user_is_left_out_of_strangers_items_by_name(
    testbed_model, three_tasks, tmp_path
):
    parts, examples, clean = three_tasks
    lone = examples[len(parts["headline"]) :]
    tasks = ["testbed-rating", "testbed-tag"]
    table = noise.profile_noise(
        testbed_model, lone, 6, [1.0], clean=clean.select(tasks=tasks), progress=False
    )
    alone = noise.profile_noise(
        testbed_model,
        parts["rating"],
        6,
        [1.0],
        clean=clean.select(tasks=tasks[:1]),
        progress=False,
    )
    assert (table.attrs["left_out"], alone.attrs["left_out"]) == (["testbed-tag"], [])
    xr.testing.assert_allclose(table, alone, atol=1e-6)
    assert noise.lines(table)[-1] == (
        "testbed-tag: left out; it has a single user, and a stranger is another."
    )
    tables.save(table, tmp_path / "t.json")
    xr.testing.assert_identical(tables.load(tmp_path / "t.json"), table)


def test_profile_noise_refuses_what_it_can_not_compare(testbed_model, ratings, clean):
    def measure(scores=clean, examples=ratings, **options):
        noise.profile_noise(testbed_model, examples, 6, clean=scores, progress=False, **options)

    other = {**clean.manifest["settings"], "tensors": "x"}
    with pytest.raises(InputError, match="the clean run and the model are of different models"):
        measure(HeadScores(clean.data, {"settings": other}))
    with pytest.raises(InputError, match="not the 3 given"):
        measure(examples=ratings[:3])
    with pytest.raises(InputError, match="other prompt settings"):
        measure(prompt=PromptSettings(items=2))
    with pytest.raises(InputError, match="these were screened"):
        measure(screened(clean))
    for shares in ([], [0.0], [1.2]):
        with pytest.raises(InputError, match="lie above 0 and up to 1"):
            measure(shares=shares)
    one = [e for e in ratings if e.user == ratings[0].user]
    with pytest.raises(InputError, match="need two users, got one"):
        measure(clean.select(users=[ratings[0].user]), one)


def faked(monkeypatch, model, clean, after, by="task", k=6):
    """`profile_noise` of hand-made scores before and after."""
    monkeypatch.setattr(noise, "score_heads", lambda *_a, **_o: after)
    users = clean.data["user"].values.tolist()
    examples = [
        replace(e, id=name, user=user, task="tag")
        for e, name, user in zip(
            persons(users=len(users), rows=1), clean.data["example"].values, users, strict=True
        )
    ]
    named = HeadScores(clean.data.assign_coords(example=[e.name for e in examples]), clean.manifest)
    return noise.profile_noise(model, examples, k, [1.0], clean=named, by=by)


def test_heads_chosen_by_luck_do_not_lose_their_score(testbed_model, monkeypatch):
    # No head has any true score. Chosen and measured on the same examples, the clean top K would
    # stand at about +0.15 and fall to 0, eight times the drop's own error.
    users = [f"u{i // 2}" for i in range(160)]
    clean, after = (make_scores(normal(160, 16, 32, seed=s), users) for s in (1, 2))
    assert np.sort(clean.data["pcs"].values.mean(axis=0).ravel())[-40:].mean() > 0.12
    table = faked(monkeypatch, testbed_model, clean, after, k=40)
    row = table.sel(group="tag", share=1.0)
    # Standard error of a mean over 160 examples and 40 heads: 0.0125.
    assert abs(float(row["clean"])) < 0.05
    assert float(row["drop_low"]) < 0 < float(row["drop_high"])
    assert float(row["jaccard_low"]) < chance_jaccard(40, 512) < float(row["jaccard_high"])
    assert "no change shown in the score of the clean heads" in noise.lines(table)[0]


def test_a_score_that_is_lost_is_said_to_fall(testbed_model, monkeypatch):
    users = [f"u{i}" for i in range(40)]
    pcs = normal(40, 4, 8) * 0.1
    high = pcs.copy()
    high[:, 1, :6] += 2
    clean, after = make_scores(high, users), make_scores(pcs, users)
    table = faked(monkeypatch, testbed_model, clean, after)
    assert float(table["drop"][0, 0]) == pytest.approx(2, abs=0.1)
    (line,) = noise.lines(table)
    assert "the clean heads' score falls: +2." in line
    assert "100% of the profiles' items" in line
    (line,) = noise.lines(faked(monkeypatch, testbed_model, after, make_scores(pcs + 2, users)))
    assert "the clean heads' score rises: -2." in line


def test_what_is_resampled_is_the_user(testbed_model, monkeypatch):
    # One user loses nothing and the other 2: two users say little, however many their examples.
    users = ["a"] * 40 + ["b"] * 40
    pcs = normal(80, 2, 4) * 0.1
    less = pcs - 2 * (np.arange(80) >= 40)[:, None, None]
    table = faked(monkeypatch, testbed_model, make_scores(pcs, users), make_scores(less, users))
    row = table.sel(group="tag", share=1.0)
    assert float(row["drop"]) == pytest.approx(1, abs=1e-5)
    ends = [float(row["drop_low"]), float(row["drop_high"])]
    assert ends == pytest.approx([0, 2], abs=1e-5)


def test_users_with_one_example_have_no_interval(testbed_model, monkeypatch):
    scores = make_scores(normal(3, 4, 8), ["a", "b", "c"])
    table = faked(monkeypatch, testbed_model, scores, scores, by="user")
    ends = [name for name in table if name.endswith(("_low", "_high"))]
    assert len(ends) == 12
    assert all(table[name].isnull().all() for name in ends)
    assert (table["jaccard"].values == 1).all()
    assert "can't be told from a single user" in noise.lines(table)[0]


# Cheaper scores


def test_precision_worked_by_hand():
    exact = make_scores([[[4, 3, 2, 1]]] * 2, ["a", "b"])
    other = make_scores([[[4, 1, 3, 2]]] * 2, ["a", "b"])
    table = precision.precision(exact, {"attribution": other}, 2)
    row = table.sel(run="attribution", group="tag")
    assert float(row["precision"]) == 0.5
    # 1 - 6 Σd² / n(n² - 1), with differences of rank 0, 2, 1, 1.
    assert float(row["spearman"]) == pytest.approx(1 - 6 * 6 / 60)
    assert (int(row["compared"]), int(row["ties"])) == (4, 0)
    assert table.attrs["chance"] == 0.5
    assert precision.lines(table) == [
        "tag: attribution finds 1 of the exact top 2 (random sets: 1.0); rank correlation 0.40 "
        "over all scored heads."
    ]


def test_a_screened_run_is_compared_over_the_heads_it_scored():
    pcs = np.tile(np.array([[[4, 3, 2, 1]]], dtype=float), (2, 1, 1))
    part = pcs.copy()
    part[:, 0, 1] = np.nan
    exact, other = make_scores(pcs, ["a", "b"]), screened(make_scores(part, ["a", "b"]))
    row = precision.precision(exact, {"screened": other}, 2).sel(run="screened", group="tag")
    assert (float(row["precision"]), int(row["compared"])) == (0.5, 3)
    assert float(row["spearman"]) == pytest.approx(1)
    with pytest.raises(InputError, match="not the top 3 of each task"):
        precision.precision(exact, {"screened": other}, 3)
    with pytest.raises(InputError, match="these were screened"):
        precision.precision(other, {"exact": exact}, 2)


def test_examples_in_another_order_are_aligned():
    scores = make_scores(normal(6, 2, 4), list("abcabc"), ["x"] * 3 + ["y"] * 3)
    turned = HeadScores(scores.data.isel(example=slice(None, None, -1)), {})
    table = precision.precision(scores, {"turned": turned}, 3)
    assert (table["precision"].values == 1).all()
    assert np.allclose(table["spearman"], 1)


def test_testbed_estimates_are_held_against_exact_scores(testbed_model, ratings, clean):
    estimate = wb.score_heads(testbed_model, ratings, method="attribution", progress=False)
    row = precision.precision(clean, {"attribution": estimate}, 6).isel(run=0, group=0)
    means = [s.data["pcs"].values.astype(float).mean(axis=0).ravel() for s in (clean, estimate)]
    assert float(row["spearman"]) == pytest.approx(spearmanr(*means).statistic)
    tops = [set(np.argsort(-mean)[:6].tolist()) for mean in means]
    assert float(row["precision"]) == pytest.approx(len(tops[0] & tops[1]) / 6)


def test_runs_that_differ_in_more_than_the_method_are_refused():
    scores = make_scores(normal(6, 2, 4), list("abcabc"))
    llama = with_settings(scores, model="llama", tensors="1")

    def compare(other, exact=scores):
        precision.precision(exact, {"fast": other}, 3)

    with pytest.raises(InputError, match=r"different models \(llama and gpt\)"):
        compare(with_settings(scores, model="gpt", tensors="2"), llama)
    with pytest.raises(InputError, match=r"different models \(llama with other weights\)"):
        compare(with_settings(scores, model="llama", tensors="2"), llama)
    with pytest.raises(InputError, match=r"different ablations \(zero and mean\)"):
        compare(with_settings(scores, ablation="mean"), with_settings(scores, ablation="zero"))
    with pytest.raises(InputError, match="6 examples and the fast run 5, not the same ones"):
        compare(HeadScores(scores.data.isel(example=slice(5)), {}))
    with pytest.raises(InputError, match=r"\(2, 4\) and \(2, 3\) layers and heads"):
        compare(make_scores(normal(6, 2, 3), list("abcabc")))
    shifted = scores.data.copy(deep=True)
    shifted["nll"][2] += 0.5
    with pytest.raises(InputError, match=r"loss on e2 differs by 0\.50 nats"):
        compare(HeadScores(shifted, {}))
    with pytest.raises(InputError, match="no run to hold against"):
        precision.precision(scores, {}, 3)


def test_every_table_survives_json(tmp_path, swaps):
    scores = make_scores(normal(9, 2, 4), list("abc") * 3, ["x"] * 8 + ["y"])
    made = [
        needed.by_examples(scores, 3),
        recurrence.recurrence(scores, 3),
        precision.precision(scores, {"same": scores}, 3),
        swaps,
    ]
    for number, table in enumerate(made):
        tables.save(table, tmp_path / f"{number}.json")
        xr.testing.assert_identical(tables.load(tmp_path / f"{number}.json"), table)
