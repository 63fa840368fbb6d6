"""Heads and head sets: names, gates, the tie rule, overlap, and the authors' published sets."""

import csv
import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from workbench.errors import InputError
from workbench.heads import (
    Gates,
    Head,
    HeadSet,
    all_heads,
    chance_jaccard,
    jaccard,
    jaccard_matrix,
    random_matched,
    rank,
    top_k,
)

heads = st.builds(Head, st.integers(0, 99), st.integers(0, 127))
head_sets = st.lists(heads, unique=True, max_size=12).map(lambda h: HeadSet(tuple(h)))
# Of 6 heads only, so that sets often share some or all.
near_heads = st.builds(Head, st.integers(0, 1), st.integers(0, 2))
near_sets = st.lists(near_heads, unique=True).map(lambda h: HeadSet(tuple(h)))


@given(heads)
def test_a_printed_head_parses_back(head):
    assert Head.parse(str(head)) == head
    assert Head.parse(f"{head.layer}-{head.head}") == head  # as the released code writes it


@given(head_sets.filter(len))
def test_a_printed_set_parses_back_in_order(heads):
    assert HeadSet.parse(str(heads)).heads == heads.heads


@pytest.mark.parametrize("text", ["", "L9", "H3", "9", "L9H", "L-1H2", "L9H6x", "9-6-3", "LxHy"])
def test_junk_is_no_head_and_the_message_repeats_it(text):
    with pytest.raises(InputError, match="like L9H6") as caught:
        Head.parse(text)
    assert repr(text) in str(caught.value)


def test_a_set_names_a_head_once():
    with pytest.raises(InputError, match="L3H5 twice"):
        HeadSet.parse("L3H5, L4H0 L3H5")


def test_sets_are_equal_in_any_order_and_whatever_their_ties():
    a, b = HeadSet.parse("L0H1 L2H3"), HeadSet((Head(2, 3), Head(0, 1)), ties=4)
    assert a == b
    assert hash(a) == hash(b)
    assert a != HeadSet.parse("L0H1")
    assert a != "L0H1 L2H3"


def test_gates_are_zero_at_the_heads_and_one_elsewhere():
    gates = HeadSet.parse("L0H1 L2H0").gates((2, 0, 3))
    expected = [[1, 0, 1], [1, 1, 1], [0, 1, 1]]
    np.testing.assert_array_equal(gates, expected)
    assert gates.dtype == np.float32


@pytest.mark.parametrize(
    ("shape", "head", "limits"),
    [
        ((8, 8, 8, 8), Head(4, 0), "4 layers (0 to 3) of 8 heads"),
        ((8, 8, 8, 8), Head(0, 8), "4 layers (0 to 3) of 8 heads"),
        ((4, 0, 2), Head(1, 0), "3 layers (0 to 2) of 0 to 4 heads"),
        ((4, 0, 2), Head(2, 2), "3 layers (0 to 2) of 0 to 4 heads"),
        # Negative numbers would count from the end of the array.
        ((8, 8), Head(-1, 0), "2 layers (0 to 1) of 8 heads"),
        ((8, 8), Head(0, -1), "2 layers (0 to 1) of 8 heads"),
    ],
)
def test_a_head_outside_the_model_is_refused_by_name_with_the_limits(shape, head, limits):
    heads = HeadSet((head,))
    for use in (heads.check, heads.gates, lambda s: random_matched(heads, s, np.random)):
        with pytest.raises(InputError) as caught:
            use(shape)
        assert str(caught.value).startswith(f"{head} is not a head")
        assert limits in str(caught.value)


def test_all_heads_are_listed_by_layer_then_number():
    assert all_heads((2, 0, 1)) == [Head(0, 0), Head(0, 1), Head(2, 0)]


# Ranking


def test_top_k_comes_highest_first():
    scores = np.array([[0.1, -2.0, 0.5], [3.0, 0.0, 0.2]])
    top = top_k(scores, 4)
    assert str(top) == "L1H0, L0H2, L1H2, L0H0"
    assert top.ties == 0


def test_ties_go_to_the_lower_layer_then_the_lower_number():
    scores = np.array([[0.0, 1.0, 1.0], [1.0, 2.0, 1.0]])
    assert [str(h) for h in rank(scores)] == ["L1H1", "L0H1", "L0H2", "L1H0", "L1H2", "L0H0"]


@pytest.mark.parametrize(("k", "ties"), [(1, 0), (2, 3), (3, 2), (4, 1), (5, 0), (6, 0)])
def test_ties_count_the_heads_that_the_rule_shut_out(k, ties):
    assert top_k(np.array([[0.0, 1.0, 1.0], [1.0, 2.0, 1.0]]), k).ties == ties


def test_a_head_without_a_score_is_never_chosen():
    scores = np.array([[np.nan, -1.0], [-2.0, np.nan]])
    assert [str(h) for h in rank(scores)] == ["L0H1", "L1H0"]
    assert str(top_k(scores, 2)) == "L0H1, L1H0"
    with pytest.raises(InputError, match="between 1 and 2"):
        top_k(scores, 3)


@pytest.mark.parametrize("k", [0, -1, 7])
def test_k_outside_the_model_is_refused(k):
    with pytest.raises(InputError, match=f"between 1 and 6 .*got {k}"):
        top_k(np.zeros((2, 3)), k)


# Few distinct values, so that ties are common.
small = hnp.arrays(np.float64, (3, 4), elements=st.sampled_from([-1.0, 0.0, 0.5, np.nan]))


@given(small.filter(lambda a: not np.isnan(a).all()), st.data())
def test_top_k_agrees_with_a_plain_sort(scores, data):
    entries = [
        (-scores[layer, head], layer, head)
        for layer in range(3)
        for head in range(4)
        if not np.isnan(scores[layer, head])
    ]
    k = data.draw(st.integers(1, len(entries)))
    taken, left = sorted(entries)[:k], sorted(entries)[k:]
    top = top_k(scores, k)
    assert top.heads == tuple(Head(layer, head) for _, layer, head in taken)
    assert top.ties == sum(entry[0] == taken[-1][0] for entry in left)


# Overlap


@given(near_sets, near_sets)
def test_jaccard_is_symmetric_bounded_and_zero_only_without_a_shared_head(a, b):
    overlap = jaccard(a, b)
    assert overlap == jaccard(b, a)
    assert 0.0 <= overlap <= 1.0
    assert (overlap == 1.0) == (a == b)
    assert (overlap == 0.0) == (not any(h in b for h in a) and bool(len(a) or len(b)))


@given(st.lists(near_sets, min_size=1, max_size=5))
def test_the_jaccard_matrix_is_symmetric_with_ones_on_the_diagonal(sets):
    matrix = jaccard_matrix(sets)
    np.testing.assert_array_equal(matrix, matrix.T)
    np.testing.assert_array_equal(np.diag(matrix), 1.0)


def test_jaccard_of_a_hand_worked_pair():
    assert jaccard(HeadSet.parse("L0H0 L0H1 L0H2"), HeadSet.parse("L0H1 L0H2 L1H0")) == 2 / 4


@pytest.mark.parametrize("total", [1, 4, 6])
def test_chance_jaccard_is_the_mean_over_all_pairs_of_sets(total):
    for k in range(1, total + 1):
        sets = [set(s) for s in itertools.combinations(range(total), k)]
        overlaps = [len(a & b) / len(a | b) for a in sets for b in sets]
        # Both are sums of a few hundred doubles at most.
        assert chance_jaccard(k, total) == pytest.approx(np.mean(overlaps), rel=1e-12)


def test_chance_jaccard_agrees_with_random_draws_at_the_paper_s_size():
    rng = np.random.default_rng(0)
    overlaps = []
    for _ in range(4000):
        a, b = (set(rng.choice(1024, 40, replace=False).tolist()) for _ in range(2))
        overlaps.append(len(a & b) / len(a | b))
    # Four standard errors of the simulated mean: 1 seed in 16,000 would miss.
    slack = 4 * np.std(overlaps) / np.sqrt(len(overlaps))
    assert abs(chance_jaccard(40, 1024) - np.mean(overlaps)) < slack


@pytest.mark.parametrize("k", [0, 5])
def test_chance_jaccard_refuses_a_k_that_cannot_be_drawn(k):
    with pytest.raises(ValueError, match="between 1 and 4"):
        chance_jaccard(k, 4)


@given(st.integers(0, 2**32 - 1))
def test_random_matched_keeps_the_number_of_heads_in_every_layer(seed):
    shape, heads = (4, 0, 3, 5), HeadSet.parse("L0H0 L0H3 L2H0 L2H1 L2H2 L3H4")
    drawn = random_matched(heads, shape, np.random.default_rng(seed))
    assert sorted(h.layer for h in drawn) == sorted(h.layer for h in heads)
    drawn.check(shape)


def test_random_matched_reaches_every_head_of_a_layer_also_the_set_s_own():
    rng, heads = np.random.default_rng(0), HeadSet.parse("L1H2")
    drawn = {str(random_matched(heads, (4, 4), rng)) for _ in range(200)}
    assert drawn == {"L1H0", "L1H1", "L1H2", "L1H3"}


# Files


@pytest.mark.parametrize("heads", [HeadSet((Head(3, 5), Head(0, 1)), ties=7), HeadSet(())])
def test_a_saved_set_loads_with_its_order_and_ties(tmp_path, heads):
    path = tmp_path / "heads.json"
    heads.save(path)
    loaded = HeadSet.load(path)
    assert (loaded.heads, loaded.ties) == (heads.heads, heads.ties)


def test_the_released_code_s_pairs_are_read_in_their_order(tmp_path):
    path = tmp_path / "x_top_heads.json"
    path.write_text('{"model": "m", "preference_heads": [[28, 18], [2, 15]]}')
    assert str(HeadSet.load(path)) == "L28H18, L2H15"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ('{"format": "workbench.heads/1",\n "heads": ', "malformed JSON at line 2"),
        ("[1, 2]", "not a head set"),
        ('{"heads": ["L0H0"]}', "not a head set"),
        ('{"format": "workbench.heads/1"}', "damaged head set"),
        ('{"format": "workbench.heads/1", "heads": ["first"]}', "a head is written like"),
        ('{"format": "workbench.heads/1", "heads": [7]}', "damaged head set"),
        ('{"preference_heads": [[1, 2, 3]]}', "damaged head set"),
        ('{"preference_heads": [[1, 2], [1, 2]]}', "L1H2 twice"),
    ],
)
def test_a_bad_head_file_is_refused_by_its_path(tmp_path, content, message):
    path = tmp_path / "heads.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        HeadSet.load(path)
    assert str(path) in str(caught.value)


def test_a_folder_in_place_of_a_head_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="can't be read"):
        HeadSet.load(tmp_path)


# The authors' own files


@pytest.fixture(scope="module")
def official(shared):
    return shared / "official"


def test_the_published_overlaps_come_out_to_the_last_printed_digit(official):
    with (official / "headset_jaccard.csv").open(newline="") as file:
        (_, *names), *rows = csv.reader(file)
    paths = [next((official / "LaMP-1" / name).glob("*_top_heads.json")) for name in names]
    matrix = jaccard_matrix([HeadSet.load(path) for path in paths])
    ours = [
        [name, *(f"{value:.4f}" for value in row)] for name, row in zip(names, matrix, strict=True)
    ]
    assert len(rows) == 10
    assert ours == rows


def test_the_published_top_heads_are_the_top_k_of_the_published_ranking(official):
    for path in sorted((official / "LaMP-1").glob("*/*_ranked.json")):
        ranked = json.loads(path.read_text())["ranked_heads"]
        scores = np.full((32, 32), np.nan)
        for entry in ranked:
            scores[entry["layer"], entry["head"]] = entry["avg_pcs"]
        published = HeadSet.load(path.with_name(path.name.replace("_ranked", "_top_heads")))
        cut = scores[published.heads[-1].layer, published.heads[-1].head]
        ours = top_k(scores, len(published))
        # Heads that tie at the cut may differ: the authors' sort breaks ties otherwise.
        clear = {h for h in ours if scores[h.layer, h.head] > cut}
        assert clear == {h for h in published if scores[h.layer, h.head] > cut}
        assert all(scores[h.layer, h.head] >= cut for h in published)


# Gates

GATED = Gates(((1.0, 0.25), (), (0.0, 1.0, 0.9)))


def test_gates_that_are_0_or_1_are_the_arrays_of_a_head_set():
    shape, heads = (2, 0, 3), HeadSet.parse("L0H1 L2H0")
    hard = Gates(((1, 0), (), (0, 1, 1)))
    np.testing.assert_array_equal(hard.gates(shape), heads.gates(shape))
    assert hard.gates(shape).dtype == np.float32
    assert (len(hard), len(heads)) == (2, 2)


def test_gates_are_one_less_the_weights_and_stay_between_0_and_1():
    weights = np.array([[0.0, 0.75, np.nan], [-0.5, 1.0, 2.0]])
    gates = Gates.from_weights(weights, (2, 3))  # the first layer has no third head
    assert gates.values == ((1.0, 0.25), (1.0, 0.0, 0.0))
    np.testing.assert_array_equal(gates.gates((2, 3)), [[1, 0.25, 1], [1, 0, 0]])


def test_only_heads_with_a_gate_below_1_count_and_are_named_the_lowest_first():
    assert len(GATED) == 3
    assert str(GATED) == "L2H0 at 0.00, L0H1 at 0.25, L2H2 at 0.90"
    assert (len(Gates(((1, 1),))), str(Gates(((1, 1),)))) == (0, "no heads")


def test_gates_are_equal_by_value_as_float32_whatever_they_are_made_of():
    a, b = Gates(((0.1, 1),)), Gates(((float(np.float32(0.1)), 1.0),))
    assert a == b
    assert hash(a) == hash(b)
    assert a != Gates(((0.1, 0.99),))
    assert a != HeadSet.parse("L0H0")


@pytest.mark.parametrize("gate", [-0.01, 1.01, float("nan"), float("inf")])
def test_a_gate_outside_0_and_1_is_refused_by_its_head(gate):
    with pytest.raises(InputError, match=r"between 0 \(ablated\) and 1, got .* for L1H1"):
        Gates(((1, 1), (1, gate)))


def test_gates_for_another_shape_are_refused():
    for shape in ((2, 0, 4), (2, 0), (2, 1, 3)):
        with pytest.raises(InputError, match="made for another model"):
            GATED.gates(shape)
    GATED.check((2, 0, 3))
    with pytest.raises(InputError, match=r"weights \[layer, head\] \(2, 3\), got \(3, 2\)"):
        Gates.from_weights(np.zeros((3, 2)), (3, 3))
    with pytest.raises(InputError, match="got nan for L0H1"):
        Gates.from_weights(np.array([[0.0, np.nan]]), (2,))


def test_saved_gates_load_as_they_were_and_save_to_the_same_bytes(tmp_path):
    gates = Gates(((0.1, 1 / 3), (), (1, 0)))
    gates.save(tmp_path / "a.json")
    loaded = Gates.load(tmp_path / "a.json")
    loaded.save(tmp_path / "b.json")
    assert loaded == gates
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ('{"format": "workbench.heads/1", "heads": []}', "no gates; wanted"),
        ("[[1, 0]]", "no gates; wanted"),
        ('{"format": "workbench.gates/1"}', "damaged gates"),
        ('{"format": "workbench.gates/1", "gates": [[1, 2]]}', "damaged gates: .* got 2 for L0H1"),
        ('{"format": "workbench.gates/1", "gates": [["x"]]}', "damaged gates"),
        ('{"format": "workbench.gates/1", "gates": [3]}', "damaged gates"),
    ],
)
def test_a_bad_file_of_gates_is_refused_by_its_path(tmp_path, content, message):
    path = tmp_path / "gates.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        Gates.load(path)
    assert str(path) in str(caught.value)
