"""Clusters, weights, routing and gates by hand; the comparison of arms on the testbed."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import xarray as xr
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import entropy
from test_analysis import scores_of
from test_routing_figures import make_routing

import workbench as wb
from workbench import stats, tables
from workbench.analysis import answers as kept
from workbench.analysis.arms import ARMS, MAPS, RIVALS, plan_arms, random_maps
from workbench.analysis.routing import RoutingSettings, lines, routing_gain, weight_controls
from workbench.data.examples import Example
from workbench.errors import InputError
from workbench.evaluation.metrics import get_metric
from workbench.heads import Gates
from workbench.scores import HeadScores
from workbench.steering.contrast import DPS
from workbench.steering.routing import (
    Router,
    find_clusters,
    gates_of,
    head_weights,
    is_uniform,
    route,
    routing_entropy,
    temperature_from_distances,
)

# Clusters


def blobs(*sizes, seed=0):
    """Points around distant places, shuffled, and which place each is at."""
    rng = np.random.default_rng(seed)
    places = np.repeat(np.arange(len(sizes)), sizes)
    rng.shuffle(places)
    return np.eye(len(sizes) + 1)[places] * 9 + rng.normal(
        0, 0.1, (len(places), len(sizes) + 1)
    ), places


def names(count):
    return [f"u{i}" for i in range(count)]


def test_users_apart_are_found_and_the_largest_cluster_comes_first():
    points, places = blobs(3, 9, 6)
    found = find_clusters(points, names(18), clusters=3)
    assert found.sizes == (9, 6, 3)
    order = [1, 2, 0]  # of the places by size
    assert found.labels.tolist() == [order.index(place) for place in places]
    for label in range(3):
        mean = points[found.labels == label].mean(axis=0)
        np.testing.assert_allclose(found.centroids[label], mean, atol=1e-5)
    assert found.by_user == dict(zip(names(18), found.labels.tolist(), strict=True))


@pytest.mark.parametrize(
    ("users", "size", "count"), [(48, 100, 1), (48, 12, 4), (260, 100, 3), (5, 1, 5), (7, 2, 4)]
)
def test_the_number_of_clusters_is_users_over_size_rounded_and_one_at_least(users, size, count):
    points = np.random.default_rng(0).normal(size=(users, 3))
    found = find_clusters(points, names(users), size)
    assert len(found.centroids) == count
    assert min(found.sizes) > 0
    assert sum(found.sizes) == users


def test_what_can_not_be_clustered_is_refused_with_what_to_do():
    points = np.random.default_rng(0).normal(size=(4, 2))
    with pytest.raises(InputError, match="two users or more, got 1; take one head set"):
        find_clusters(points[:1], ["u"])
    with pytest.raises(InputError, match="5 clusters of 4 users; ask for 4 or fewer"):
        find_clusters(points, names(4), clusters=5)
    with pytest.raises(InputError, match="only 2 have profiles that differ; ask for 2 or fewer"):
        find_clusters(points[[0, 1, 0, 1]], names(4), size=1)
    with pytest.raises(InputError, match="4 embeddings for 3 users"):
        find_clusters(points, names(3))
    for options in ({"size": 0}, {"clusters": 0}):
        with pytest.raises(InputError, match="must be 1 or more"):
            find_clusters(points, names(4), **options)


# Weights


def test_weights_are_the_mean_scores_clipped_cut_and_divided_by_the_largest():
    pcs = np.zeros((4, 2, 3))
    pcs[:2] = [[4.0, 1.0, -1.0], [2.0, 0.5, 0.0]]
    pcs[1, 0, 0] = 6.0  # the mean of this head in the first cluster is 5
    pcs[2] = [[0.0, -3.0, 8.0], [-1.0, -1.0, -1.0]]
    labels = {"a": 0, "b": 0, "c": 1, "d": 2}
    weights = head_weights(scores_of(pcs, "abcd"), labels, share=0.5, power=2)
    # Three of six are kept: 5, 2 and 1 of the first cluster; 8, 0 and one below 0 of the second.
    np.testing.assert_allclose(weights[0], [[1, 0.2**2, 0], [0.4**2, 0, 0]], atol=1e-12)
    np.testing.assert_array_equal(weights[1], [[0, 0, 1], [0, 0, 0]])
    assert not weights[2].any()  # all 0: no head is weighed


def test_a_share_of_4_percent_keeps_40_of_1024_heads_and_one_at_least():
    rng = np.random.default_rng(0)
    pcs = rng.random((2, 32, 32)) + 1
    weights = head_weights(scores_of(pcs, "ab"), {"a": 0, "b": 0})[0]
    assert (weights > 0).sum() == 40
    small = head_weights(scores_of(pcs[:, :2, :3], "ab"), {"a": 0, "b": 0})[0]
    assert (small > 0).sum() == 1


def test_layers_without_some_heads_have_no_weight_there():
    pcs = np.ones((2, 2, 3))
    pcs[:, 0, 2] = np.nan
    weights = head_weights(scores_of(pcs, "ab"), {"a": 0, "b": 1}, share=1.0)
    assert np.isnan(weights[:, 0, 2]).all()
    assert np.isnan(weights).sum() == 2
    gates = gates_of(np.array([[0.5, 0.25]]), weights, (2, 3))
    assert gates == [Gates(((0.25, 0.25), (0.25, 0.25, 0.25)))]


def test_scores_that_give_no_weights_are_refused():
    pcs = np.ones((2, 2, 3))
    with pytest.raises(InputError, match="user b has scores and is in no cluster"):
        head_weights(scores_of(pcs, "ab"), {"a": 0})
    with pytest.raises(InputError, match="cluster 1 has no scored example"):
        head_weights(scores_of(pcs, "ab"), {"a": 0, "b": 0, "c": 1})
    with pytest.raises(InputError, match="cluster 0: all scores are NaN"):
        head_weights(scores_of(pcs * np.nan, "ab"), {"a": 0, "b": 0})
    screened = HeadScores(scores_of(pcs, "ab").data, {"settings": {"screen": {"k": 1}}})
    with pytest.raises(InputError, match="needs exact scores of all heads"):
        head_weights(screened, {"a": 0, "b": 0})
    for options in ({"share": 0}, {"share": 1.1}, {"power": 0}):
        with pytest.raises(InputError, match="share must be in"):
            head_weights(scores_of(pcs, "ab"), {"a": 0, "b": 0}, **options)


# Routing


def test_soft_shares_are_the_exponentials_of_distances_over_the_temperature():
    distances = np.array([[1.0, 2.0, 4.0], [3.0, 3.0, 0.5]])
    for temperature in (0.3, 1.0, 5.0):
        shares = route(distances, "soft", temperature)
        for row, share in zip(distances, shares, strict=True):
            each = [math.exp(-d / temperature) for d in row]
            np.testing.assert_allclose(share, [e / sum(each) for e in each], rtol=1e-12)
    # As the temperature falls soft routing becomes hard routing.
    np.testing.assert_allclose(route(distances, "soft", 1e-3), route(distances), atol=1e-12)


def test_hard_routing_takes_the_nearest_and_of_equals_the_first():
    shares = route(np.array([[2.0, 1.0, 3.0], [1.0, 0.0, 0.0]]), "hard")
    assert shares.tolist() == [[0, 1, 0], [0, 1, 0]]


def test_a_routing_or_temperature_that_is_none_is_refused():
    distances = np.ones((1, 2))
    with pytest.raises(InputError, match="hard or soft, got 'warm'"):
        route(distances, "warm")
    for temperature in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(InputError, match="temperature must be above 0"):
            route(distances, "soft", temperature)


def test_entropy_is_0_for_one_cluster_and_1_for_all_alike():
    shares = np.array([[1, 0, 0, 0], [0.25] * 4, [0.5, 0.5, 0, 0], [0.7, 0.1, 0.1, 0.1]])
    wanted = [0, 1, 0.5, entropy(shares[3], base=4)]
    np.testing.assert_allclose(routing_entropy(shares), wanted, atol=1e-12)
    assert np.isnan(routing_entropy(np.ones((2, 1)))).all()


def test_routing_is_called_uniform_from_99_hundredths_on():
    # Distances that hardly differ, as those of the published runs, whose entropy is .994.
    flat = route(np.random.default_rng(0).normal(1.0, 0.2, (500, 25)), "soft")
    assert float(routing_entropy(flat).mean()) == pytest.approx(0.994, abs=0.001)
    assert is_uniform(flat)
    spread = route(np.random.default_rng(0).normal(1.0, 0.4, (500, 25)), "soft")
    assert float(routing_entropy(spread).mean()) == pytest.approx(0.976, abs=0.002)
    assert not is_uniform(spread)
    assert not is_uniform(np.ones((3, 1)))


rows = hnp.arrays(
    np.float64, st.tuples(st.integers(1, 6), st.integers(2, 5)), elements=st.floats(0, 2)
)


@given(rows, st.sampled_from([0.2, 0.5, 0.8]))
@settings(deadline=None)
def test_the_temperature_chosen_gives_the_entropy_asked_for(distances, target):
    ordered = np.sort(distances, axis=1)
    assume((ordered[:, 1] - ordered[:, 0] > 1e-3).all())  # nobody is between two centroids
    temperature = temperature_from_distances(distances, target)
    each = np.exp(-(distances - ordered[:, :1]) / temperature)
    found = entropy(each, axis=1, base=distances.shape[1]).mean()
    assert found == pytest.approx(target, abs=1e-6)  # bisected 80 times


@pytest.mark.parametrize(
    ("distances", "message"),
    [
        (np.ones((3, 2)), "no temperature tells them apart"),
        (np.array([[1.0, 1.0, 5.0]]), "no temperature tells them apart"),  # at least ln 2 / ln 3
        (np.ones((3, 1)), "two clusters or more"),
    ],
)
def test_distances_that_no_temperature_parts_are_refused(distances, message):
    with pytest.raises(InputError, match=message):
        temperature_from_distances(distances)
    with pytest.raises(InputError, match="target must be between 0 and 1, got 1"):
        temperature_from_distances(distances, 1.0)


def test_gates_are_one_less_the_mixed_weights_and_never_below_0():
    rng = np.random.default_rng(0)
    shares, weights = rng.random((3, 2)), rng.random((2, 2, 4)) * 1.5
    for share, gates in zip(shares, gates_of(shares, weights, (4, 4)), strict=True):
        for layer in range(2):
            for head in range(4):
                removed = sum(share[c] * weights[c, layer, head] for c in range(2))
                assert gates.values[layer][head] == pytest.approx(max(0, 1 - removed), abs=1e-6)


# Clusters of scores


def test_scores_are_grouped_and_averaged_by_the_clusters_that_users_are_given():
    pcs = np.random.default_rng(0).random((5, 2, 3)).astype(np.float32)
    scores = scores_of(pcs, ["a", "b", "a", "c", "b"])
    with pytest.raises(InputError, match="no clusters; name them with assign_clusters"):
        scores.groups("cluster")
    with pytest.raises(InputError, match="user c has scores and is in no cluster"):
        scores.assign_clusters({"a": 0, "b": 1})
    named = scores.assign_clusters({"a": 3, "b": 0, "c": 3, "nobody": 7})
    assert {name: rows.tolist() for name, rows in named.groups("cluster").items()} == {
        "3": [0, 2, 3],
        "0": [1, 4],
    }
    means = named.mean("cluster")
    np.testing.assert_allclose(means["mean"].sel(group="0"), pcs[[1, 4]].mean(axis=0), rtol=1e-6)
    assert len(named.top(2, "cluster")["3"]) == 2
    assert "cluster" not in scores.data.coords


# The router


def history(user, words, task="LaMP-3", query="q"):
    items = tuple({"text": f"{word} thing", "score": "4"} for word in words)
    return Example(f"{user}-{query}", user, task, f"what score for review: {query}", "4", items)


@pytest.fixture
def fitted():
    """Two kinds of users, of whose words and heads nothing is shared."""
    users = [history(f"tomcat{i}", ("purr", "milk")) for i in range(4)]
    users += [history(f"dog{i}", ("bark", "bone", "leash")) for i in range(6)]
    pcs = np.zeros((10, 2, 3))
    pcs[:4, 0, 1], pcs[4:, 1, 2], pcs[4:, 0, 0] = 1.0, 2.0, 1.0
    scores = scores_of(pcs, [e.user for e in users])
    return Router.fit(scores, users, clusters=2, share=0.34), users


def test_a_router_sends_users_seen_or_new_to_the_heads_of_their_kind(fitted):
    router, users = fitted
    assert router.clusters.sizes == (6, 4)
    new = [history("new-cat", ("milk",)), history("new-dog", ("leash", "bone"))]
    gates = {user: dps.heads for user, dps in router.contrasts([*users, *new]).items()}
    dog, cat = Gates(((0.5, 1, 1), (1, 1, 0))), Gates(((1, 0, 1), (1, 1, 1)))
    assert all(one == (cat if "cat" in user else dog) for user, one in gates.items())
    assert set(gates) >= {"new-cat", "new-dog"}


def test_soft_contrasts_mix_the_clusters_by_their_shares(fitted):
    router, users = fitted
    found = router.contrasts(users[:1], 0.7, "soft", 0.5)
    apart = router.distances(users[:1])[1][0]
    dog, cat = (math.exp(-d / 0.5) / sum(math.exp(-e / 0.5) for e in apart) for d in apart)
    wanted = Gates(((1 - dog / 2, 1 - cat, 1), (1, 1, 1 - dog)))
    assert found["tomcat0"].gamma == 0.7
    for ours, theirs in zip(found["tomcat0"].heads.values, wanted.values, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_distances_are_those_between_points(fitted):
    router, users = fitted
    who, distances = router.distances(users[3:6])
    vectors = router.embedder.embed(
        ["purr thing 4\nmilk thing 4", "bark thing 4\nbone thing 4\nleash thing 4"]
    )
    assert who == ["tomcat3", "dog0", "dog1"]
    for row, vector in zip(distances, vectors[[0, 1, 1]], strict=True):
        wanted = [math.dist(vector, centroid) for centroid in router.clusters.centroids]
        np.testing.assert_allclose(row, wanted, atol=1e-6)


def test_a_saved_router_routes_as_before_and_saves_to_the_same_bytes(fitted, tmp_path):
    router, users = fitted
    router.save(tmp_path / "a")
    loaded = Router.load(tmp_path / "a")
    loaded.save(tmp_path / "b")
    for name in ("router.json", "router.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    new = [*users, history("new", ("milk", "bone"))]
    assert loaded.contrasts(new, mode="soft") == router.contrasts(new, mode="soft")
    assert loaded.clusters.by_user == router.clusters.by_user
    assert loaded.clusters.users == router.clusters.users


def test_a_damaged_or_missing_router_is_refused_by_its_folder(fitted, tmp_path):
    with pytest.raises(InputError, match="no such file"):
        Router.load(tmp_path)
    fitted[0].save(tmp_path)
    (tmp_path / "router.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match=f"{tmp_path}: a damaged router"):
        Router.load(tmp_path)
    (tmp_path / "router.safetensors").unlink()
    with pytest.raises(InputError, match="a damaged router"):
        Router.load(tmp_path)
    (tmp_path / "router.json").write_text('{"format": "workbench.heads/1"}')
    with pytest.raises(InputError, match="no router; wanted a file of format"):
        Router.load(tmp_path)


def test_a_user_with_scores_and_no_example_is_refused(fitted):
    _, users = fitted
    scores = scores_of(np.ones((2, 2, 3)), ["tomcat0", "gone"])
    with pytest.raises(InputError, match="user gone has scores and no example"):
        Router.fit(scores, users)


# Maps at random


def test_random_maps_keep_the_weights_of_every_layer_and_the_number_of_heads():
    weights = np.array([[0.0, 0.2, 1.0, 0.0], [0.0, 0.0, np.nan, np.nan], [0.5, 0.0, 0.0, 0.0]])
    found = random_maps(weights, 20, seed=0, task="t")
    np.testing.assert_array_equal(found["global"], weights[None])
    for name in ("random-weights", "random-mask"):
        assert len(found[name]) == 20
        assert len({one.tobytes() for one in found[name]}) > 5
        for one in found[name]:
            assert np.array_equal(np.isnan(one), np.isnan(weights))
            wanted = weights if name == "random-weights" else np.ceil(weights)
            np.testing.assert_array_equal(np.sort(one, axis=1), np.sort(wanted, axis=1))
    again = random_maps(weights, 20, seed=0, task="t")
    np.testing.assert_array_equal(again["random-mask"], found["random-mask"])
    other = random_maps(weights, 20, seed=0, task="other")
    assert not np.array_equal(other["random-mask"], found["random-mask"], equal_nan=True)


# The comparison of arms

TASKS = ("testbed-tag", "testbed-headline")
OPTIONS = {"gamma": 4.0, "draws": 2, "seed": 3, "max_new_tokens": 5, "progress": False}
SETTINGS = RoutingSettings(size=3, share=0.15)


@pytest.fixture(scope="module")
def users():
    """Examples of eight users with scores, and of six others."""
    tasks = list(TASKS)
    return (
        wb.load_examples("testbed", "discovery", users=8, tasks=tasks),
        wb.load_examples("testbed", "validation", users=6, tasks=tasks),
    )


@pytest.fixture(scope="module")
def scores(users):
    """Scores drawn at random: whom they say nothing of must not matter to the arithmetic."""
    rows = users[0]
    pcs = np.random.default_rng(0).normal(size=(len(rows), 4, 8))
    return scores_of(pcs, [e.user for e in rows], [e.task for e in rows])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("routing")


@pytest.fixture(scope="module")
def table(testbed_model, users, scores, folder):
    return routing_gain(testbed_model, scores, *users, SETTINGS, folder=folder, **OPTIONS)


def measured(model, rows, contrast):
    """The task's first metric of each answer, by `generate` alone."""
    metric = get_metric({"testbed-tag": "accuracy", "testbed-headline": "style"}[rows[0].task])
    return [
        metric.score(a.example, a.text)
        for a in wb.generate(model, rows, contrast, max_new_tokens=5)
    ]


@pytest.mark.parametrize("task", TASKS)
def test_every_arm_is_what_generate_writes_under_its_gates(
    testbed_model, users, scores, table, task
):
    seen, asked = ([e for e in rows if e.task == task] for rows in users)
    part, row = scores.select(tasks=[task]), table.sel(task=task)
    router = Router.fit(part, seen, size=3, share=0.15, seed=3)
    everybody = dict.fromkeys((e.user for e in seen), 0)
    one = head_weights(part, everybody, share=0.15)[0]
    drawn = random_maps(one, 2, 3, task)
    tempered = float(row["temperature"].sel(arm="soft-tempered"))
    wanted = {
        "plain": [None],
        "global": [DPS(Gates.from_weights(one, (8,) * 4), 4.0)],
        "hard": [router.contrasts(asked, 4.0)],
        "soft": [router.contrasts(asked, 4.0, "soft")],
        "soft-tempered": [router.contrasts(asked, 4.0, "soft", tempered)],
    }
    for name in ("random-weights", "random-mask"):
        wanted[name] = [DPS(Gates.from_weights(w, (8,) * 4), 4.0) for w in drawn[name]]
    plain = np.array(measured(testbed_model, asked, None))
    who = [e.user for e in asked]
    for arm, contrasts in wanted.items():
        found = np.array([measured(testbed_model, asked, c) for c in contrasts]).mean(axis=0)
        assert float(row["value"].sel(arm=arm)) == pytest.approx(found.mean(), abs=1e-12), arm
        gain = stats.estimate(found - plain, who, seed=3)
        ends = [float(row["gain" + end].sel(arm=arm)) for end in ("", "_low", "_high")]
        assert ends == pytest.approx([gain.mean, gain.low, gain.high], abs=1e-12), arm
    assert np.ptp(row["value"].values) > 0  # the arms are not all the same
    # The temperature is chosen on the discovery users.
    shares = route(router.distances(seen)[1], "soft", tempered)
    assert float(routing_entropy(shares).mean()) == pytest.approx(0.5, abs=1e-6)
    now = route(router.distances(asked)[1], "soft", tempered)
    entropies = row["entropy"].sel(arm=["hard", "soft-tempered"]).values
    np.testing.assert_allclose(entropies, [0, routing_entropy(now).mean()], atol=1e-9)


def test_users_are_dealt_to_clusters_of_the_same_sizes_at_random(testbed_model, users, scores):
    asked = [e for e in users[1] if e.task == TASKS[0]]
    plan = plan_arms(testbed_model, scores, users[0], asked, (SETTINGS, 30, 0))
    sizes = sorted(map(int, plan.known["sizes"].split(", ")))
    part = scores.select(tasks=TASKS[:1])
    who = list(dict.fromkeys(part.data["user"].values.tolist()))
    # Every way of dealing the users: each user's gates are some group of the right size's.
    possible = set()
    for size in set(sizes):
        for group in itertools.combinations(who, size):
            labels = {user: int(user not in group) for user in who}
            weights = head_weights(part, labels, share=0.15)[0]
            possible.add(Gates.from_weights(weights, (8,) * 4))
    dealt = plan.gates["random-clusters"]
    assert len(dealt) == 30
    assert all(set(one.values()) <= possible for one in dealt)
    assert len({gates for one in dealt for gates in one.values()}) > 10
    assert any(len(set(one.values())) == len(sizes) for one in dealt)


def test_p_values_are_corrected_over_all_arms_and_tasks(
    testbed_model, users, scores, folder, table, monkeypatch
):
    # In the order of tasks and arms, the difference to plain before that to the global set.
    raw = np.random.default_rng(0).random((2, 7, 2)) * 0.1
    order = iter([p for task in raw for i, arm in enumerate(task) for p in arm[: 1 + (i > 0)]])
    monkeypatch.setattr(stats, "sign_flip_p", lambda *_, **__: next(order))
    found = routing_gain(testbed_model, scores, *users, SETTINGS, folder=folder, **OPTIONS)
    for name, values in (("gain_p", raw[..., 0]), ("edge_p", raw[:, 1:, 1])):
        wanted, highest = {}, 0.0
        for rank, p in enumerate(sorted(values.ravel())):  # Holm's steps, one by one
            highest = max(highest, p * (values.size - rank))
            wanted[p] = min(1.0, highest)
        left_out = len(ARMS) - values.shape[1]
        assert found[name][:, :left_out].isnull().all()
        corrected = [[wanted[p] for p in row] for row in values]
        np.testing.assert_allclose(found[name][:, left_out:], corrected, rtol=1e-12)


def test_a_random_arm_is_ranked_by_what_stands_in_its_place(table):
    for task in TASKS:
        row = table.sel(task=task)
        for arm in ARMS:
            if arm not in RIVALS:
                assert np.isnan(row["beaten"].sel(arm=arm))
                assert np.isnan(row["draw_values"].sel(arm=arm)).all()
                continue
            draws = row["draw_values"].sel(arm=arm).values
            rival = float(row["value"].sel(arm=RIVALS[arm]))
            assert float(row["value"].sel(arm=arm)) == pytest.approx(draws.mean(), abs=1e-12)
            assert int(row["beaten"].sel(arm=arm)) == sum(rival > d + 1e-9 for d in draws)


def test_a_comparison_that_was_kept_is_read_and_not_written_again(
    testbed_model, users, scores, folder, table, monkeypatch
):
    monkeypatch.setattr(kept, "generate", lambda *_, **__: pytest.fail("asked again"))
    again = routing_gain(testbed_model, scores, *users, SETTINGS, folder=folder, **OPTIONS)
    assert again.identical(table)


def test_with_one_cluster_routing_is_the_one_set(testbed_model, users, scores):
    rows = [[e for e in part if e.task == TASKS[0]] for part in users]
    one = routing_gain(testbed_model, scores, *rows, RoutingSettings(share=0.15), **OPTIONS)
    row = one.isel(task=0)
    assert (int(row["clusters"]), row["sizes"].item()) == (1, "8")
    for arm in ("hard", "soft", "soft-tempered", "random-clusters"):
        assert float(row["value"].sel(arm=arm)) == float(row["value"].sel(arm="global"))
        assert float(row["edge"].sel(arm=arm)) == 0
    assert row["entropy"].isnull().all()
    assert not row["uniform"].any()
    assert any("with one cluster routing is the one global set" in line for line in lines(one))


def test_what_can_not_be_compared_is_refused(testbed_model, tiny_model, users, scores):
    seen, asked = users

    def run(model=testbed_model, scores=scores, asked=asked, **options):
        routing_gain(model, scores, seen, asked, SETTINGS, **{**OPTIONS, **options})

    with pytest.raises(InputError, match="are in the scores and in the evaluation"):
        run(asked=seen)
    with pytest.raises(InputError, match="no scores for testbed-headline"):
        run(scores=scores.select(tasks=TASKS[:1]))
    with pytest.raises(InputError, match="no scores for an empty list"):
        run(asked=[])
    with pytest.raises(InputError, match="32 heads in 4 layers, this one has 12 in 3"):
        run(model=tiny_model("llama"))
    with pytest.raises(InputError, match="at least 1 draw, got 0"):
        run(draws=0)
    alone = scores.select(users=[seen[0].user])
    with pytest.raises(InputError, match="two users or more, got 1"):
        run(scores=alone)


def test_the_table_and_its_weights_are_kept_as_json(table, scores, tmp_path):
    weights = weight_controls(scores, table)
    for name, one in (("routing", table), ("weights", weights)):
        tables.save(one, tmp_path / name)
        xr.testing.assert_identical(tables.load(tmp_path / name).drop_attrs(), one.drop_attrs())
        assert tables.load(tmp_path / name).attrs == one.attrs


def test_the_maps_drawn_are_those_that_were_measured(table, scores):
    found = weight_controls(scores, table)
    assert found["map"].values.tolist() == list(MAPS)
    for task in TASKS:
        everybody = dict.fromkeys(scores.data["user"].values.tolist(), 0)
        one = head_weights(scores.select(tasks=[task]), everybody, share=0.15)[0]
        drawn = random_maps(one, 2, 3, task)
        for name in MAPS:
            np.testing.assert_array_equal(found["weight"].sel(task=task, map=name), drawn[name][0])
            at = {"task": task, "arm": name}
            assert float(found["value"].sel(task=task, map=name)) == float(table["value"].sel(at))


# In words


def said(table):
    return " ".join(line for line in lines(table) if line.startswith("tag"))


def test_an_effect_is_named_only_beyond_its_interval_and_the_correction():
    for edge in ((0.1, 0.06), (0.01, 0.01)):
        text = said(make_routing(hard=edge))
        assert "routing is not shown to add anything to one global set: hard shows no" in text
    text = said(make_routing(hard=(0.1, 0.01)))
    assert "routing adds to one global set: hard is better than it (+0.100" in text
    text = said(make_routing(soft=(-0.1, 0.01)))
    assert "routing takes away from one global set" in text
    assert "soft is worse than it (-0.100, 95 % interval -0.120 to -0.080, Holm p 0.01)" in text


def test_a_lower_error_is_better():
    rating = [line for line in lines(make_routing(hard=(-0.1, 0.01))) if line.startswith("rating")]
    assert any("hard is better than it (-0.100" in line for line in rating)


def test_uniform_routing_says_so_with_its_numbers():
    text = said(make_routing())
    assert (
        "soft routing is uniform to two digits (normalised entropy 0.996 at temperature 1): every "
        "user gets nearly the mean of all clusters (cosine 0.9998)."
    ) in text
    assert "soft-tempered routing has a normalised entropy of 0.50 at temperature 0.05." in text


def test_clusters_controls_and_a_single_user_are_said():
    table = make_routing(users=1)
    table["idle"] = ("task", [2, 0])
    text = said(table)
    assert "12 users in 3 clusters (4, 4, 4)" in text
    assert "In 2 of the clusters no head has a positive mean score." in text
    assert "no interval: a single user" in text
    assert "hard beats 3 of 5 draws of random-clusters" in text
    assert (
        "global beats 3 of 5 draws of random-mask (mean 0.600; chance alone does as well with "
        "probability 0.50)"
    ) in text
