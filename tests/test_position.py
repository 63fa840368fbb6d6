"""The same queries further from the profile, behind less of it, and later in a conversation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr
from plain import plain_copy, plain_nll
from scipy.stats import spearmanr

from workbench import tables
from workbench.analysis.position import lines, position
from workbench.data.examples import Example
from workbench.data.prompts import PromptSettings, build_prompts
from workbench.data.retrieval import rank_profile
from workbench.data.sources import load_examples
from workbench.data.variants import (
    as_shown,
    with_first_items,
    with_strangers_between,
    with_turns,
)
from workbench.discovery.run import score_heads
from workbench.errors import InputError
from workbench.heads import top_k
from workbench.models import context_length


def people(users=3, queries=2, items=2):
    """Examples in which every text names its user, so that none can be mistaken."""
    return [
        Example(
            f"u{u}-q{q}",
            f"u{u}",
            "testbed-tag",
            f"movie : query {q} of u{u}",
            f"answer {q}",
            tuple({"description": f"item {i} of u{u}", "tag": "war"} for i in range(items)),
        )
        for u in range(users)
        for q in range(queries)
    ]


def owners(example):
    return [item["description"].split()[-1] for item in example.profile]


# Variants


def test_strangers_stand_behind_the_own_items_and_are_never_the_user():
    examples = people()
    for number in (0, 1, 3):
        for own, changed in zip(examples, with_strangers_between(examples, number), strict=True):
            assert changed.profile[:2] == own.profile
            assert len(changed.profile) == 2 + number
            assert own.user not in owners(changed)[2:]
            texts = [item["description"] for item in changed.profile]
            assert len(set(texts)) == len(texts)


def test_more_strangers_go_behind_fewer_and_are_one_users_for_all_queries():
    examples = people(users=8)
    few, many = (with_strangers_between(examples, n) for n in (2, 5))
    assert all(b.profile[:4] == a.profile for a, b in zip(few, many, strict=True))
    assert many[0].profile == many[1].profile  # two queries of u0
    assert many[0].profile[2:] != many[2].profile[2:]
    other = with_strangers_between(examples, 5, seed=1)
    assert [e.profile for e in other] != [e.profile for e in many]


def test_too_few_strangers_are_refused():
    with pytest.raises(InputError, match=r"5 items of strangers .* u0, and there are 4"):
        with_strangers_between(people(), 5)


def test_turns_are_the_users_own_queries_before_this_one():
    changed = with_turns(people(users=2, queries=3), 2)
    first, last = changed[0], changed[2]
    assert last.turns == (
        ("movie : query 0 of u0", "answer 0"),
        ("movie : query 1 of u0", "answer 1"),
    )
    # Before the first query come the last ones again, the nearest last.
    assert [query for query, _ in first.turns] == ["movie : query 1 of u0", "movie : query 2 of u0"]
    for example in changed:
        assert all(example.user in query and query != example.query for query, _ in example.turns)
    assert with_turns(people(), 0) == people()
    with pytest.raises(InputError, match="u0 has 2 queries of testbed-tag, and 2 turns need 3"):
        with_turns(people(), 2)


def test_a_profile_as_shown_is_the_prompts_own_items_in_its_order():
    items = [{"title": t, "text": f"{t} of the day"} for t in ("rain", "sun", "snow", "wind")]
    query = "Generate a headline for the following article: snow and wind"
    example = Example("1", "u", "LaMP-4", query, "Snow", tuple(items))
    settings = PromptSettings(items=3)
    (shown,) = as_shown([example], settings)
    assert shown.profile == tuple(items[i] for i in rank_profile(example, 3))
    assert shown.profile[0]["title"] in ("snow", "wind")
    assert with_first_items([shown], 2)[0].profile == shown.profile[:2]


# The table


@pytest.fixture(scope="module")
def examples():
    found = load_examples(
        "testbed", "discovery", users=4, tasks=["testbed-tag", "testbed-headline"]
    )
    return [e for e in found if int(e.id[-1]) < 3]


def test_distance_is_measured_against_the_same_prompts_by_hand(testbed_model, examples):
    table = position(testbed_model, examples, "distance", [2, 0], k=4, progress=False)
    twin = plain_copy(testbed_model)
    changed = with_strangers_between(examples, 2)
    own = [e for e in changed if e.task == "testbed-tag"]
    # The own items first, as the testbed shows them in the file's order.
    without = [replace(e, profile=e.profile[4:]) for e in own]
    settings = PromptSettings(items=9)
    full, bare = (
        np.array([plain_nll(twin, p) for p in built(testbed_model, part, settings)])
        for part in (own, without)
    )
    cell = table.sel(task="testbed-tag", step=2)
    assert float(cell["nll"]) == pytest.approx(full.mean(), abs=3e-5)  # float32
    assert float(cell["profile_value"]) == pytest.approx((bare - full).mean(), abs=6e-5)
    assert table["step"].values.tolist() == [0, 2]
    assert table.attrs["reference"] == 0
    assert float(cell["prompt_tokens"]) == np.mean(
        [len(p.ids) for p in built(testbed_model, own, settings)]
    )


def built(model, examples, settings):
    return build_prompts(examples, model.tokenizer, context_length(model), settings)


def test_the_first_step_is_the_unchanged_run(testbed_model, examples):
    table = position(testbed_model, examples, "turns", [0, 1], k=4, progress=False)
    scores = score_heads(testbed_model, examples, progress=False)
    for task in ("testbed-tag", "testbed-headline"):
        part = scores.select(tasks=[task])
        first = table.sel(task=task, step=0)
        nll = float(part.data["nll"].mean())
        assert float(first["nll"]) == pytest.approx(nll, abs=1e-5)
        assert [float(first[name]) for name in ("jaccard", "spearman")] == pytest.approx([1, 1])
        assert float(first["top_change"]) == float(first["value_change"]) == 0
        assert np.isnan(float(first["gap"]))
    # One user of another half found the heads: the mean of PCS there is by hand.
    tag = scores.select(tasks=["testbed-tag"])
    users = tag.data["user"].values
    names = np.random.default_rng(0).permutation(list(tag.groups("user")))
    wanted = np.empty(len(users))
    for mine, others in ((names[:2], names[2:]), (names[2:], names[:2])):
        heads = tag.select(users=list(others)).top(4, "all")["all"]
        for i in np.flatnonzero(np.isin(users, mine)):
            wanted[i] = np.mean([tag.data["pcs"].values[i, h.layer, h.head] for h in heads])
    found = float(table["top_pcs"].sel(task="testbed-tag", step=0))
    assert found == pytest.approx(wanted.mean(), abs=1e-5)


def test_overlap_and_rank_correlation_are_those_of_two_runs(testbed_model, examples):
    table = position(testbed_model, examples, "length", [1, 4], k=6, progress=False)
    assert table.attrs["reference"] == 4
    means = []
    for number in (1, 4):
        changed = with_first_items([e for e in examples if e.task == "testbed-tag"], number)
        run = score_heads(testbed_model, changed, progress=False)
        means.append(run.data["pcs"].values.astype(float).mean(axis=0))
    a, b = (set(top_k(mean, 6)) for mean in means)
    cell = table.sel(task="testbed-tag", step=1)
    assert float(cell["jaccard"]) == pytest.approx(len(a & b) / len(a | b))
    rho = spearmanr(*(mean.ravel() for mean in means)).statistic
    assert float(cell["spearman"]) == pytest.approx(rho, abs=0.01)  # ranks of near-equal scores
    assert float(cell["jaccard_low"]) <= float(cell["jaccard_high"])
    # A headline's profile has two items: four of them are the same prompts as two.
    whole = position(
        testbed_model,
        [e for e in examples if e.task == "testbed-headline"],
        "length",
        [2, 4],
        progress=False,
    )
    assert lines(whole) == [
        "testbed-headline, items of the profile: 2 against 4: the prompts are the same, no "
        "profile has more items."
    ]


def test_the_table_is_kept_goes_on_and_is_said_in_words(testbed_model, examples, tmp_path):
    options = {"folder": tmp_path, "progress": False, "steps": [0, 1]}
    table = position(testbed_model, examples, "distance", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["distance-0", "distance-1"]
    tables.save(table, tmp_path / "table.json")
    back = tables.load(tmp_path / "table.json")
    xr.testing.assert_allclose(back, table)
    kept = [path.stat().st_mtime_ns for path in tmp_path.glob("*/scores/*")]
    again = position(testbed_model, examples, "distance", **options)
    assert [path.stat().st_mtime_ns for path in tmp_path.glob("*/scores/*")] == kept
    xr.testing.assert_allclose(again, table, atol=1e-6)
    told = lines(back)
    assert len(told) == 2
    assert told[0].startswith("testbed-tag, strangers' items between: 1 against 0: the profile is")


def test_one_user_has_numbers_and_no_interval(testbed_model, examples):
    alone = [e for e in examples if e.user == examples[0].user]
    table = position(testbed_model, alone, "turns", [0, 1], progress=False)
    assert np.isfinite(table["nll"].values).all()
    for name in ("nll_low", "top_pcs", "jaccard_low", "gap_low", "value_change_high"):
        assert np.isnan(table[name].values).all(), name
    assert all("no interval: a single user" in line for line in lines(table))


def test_a_change_is_named_only_where_its_interval_leaves_0_out(testbed_model, examples):
    table = position(testbed_model, examples, "turns", [0, 1], progress=False).sel(
        task=["testbed-tag"]
    )
    at = {"task": "testbed-tag", "step": 1}
    for low, high, word in ((0.1, 0.3, "more"), (-0.3, -0.1, "less"), (-0.1, 0.1, "no change")):
        for name, value in (("value_change_low", low), ("value_change_high", high)):
            table[name].loc[at] = value
        assert word in lines(table)[0].split(";")[0]
    for name, value in (("gap_low", 0.1), ("gap_high", 0.2), ("gap_p", 0.2)):
        table[name].loc[at] = value
    assert "are not shown to differ" in lines(table)[0]
    table["gap_p"].loc[at] = 0.01
    assert "differ beyond noise" in lines(table)[0]
    assert "not shown to differ" not in lines(table)[0]


@pytest.mark.parametrize(
    ("kind", "steps", "k", "message"),
    [
        ("time", None, 8, "distance, length, turns, got 'time'"),
        ("length", [], 8, "one number"),
        ("length", [-1], 8, "got \\[-1\\]"),
        ("distance", [0, 99], 8, "99 items of strangers"),
        ("turns", [0, 9], 8, "no user has the 10 queries"),
        ("turns", [0, 1], 33, "K must be between 1 and 32"),
    ],
)
def test_what_cannot_be_measured_is_refused_first(
    testbed_model, examples, kind, steps, k, message, monkeypatch
):
    monkeypatch.setattr(torch.nn.Module, "__call__", None)  # nothing is run
    with pytest.raises(InputError, match=message):
        position(testbed_model, examples, kind, steps, k, progress=False)
    with pytest.raises(InputError, match=r"no examples|" + message):
        position(testbed_model, [], kind, steps, k, progress=False)


def test_where_the_largest_step_has_no_room_own_items_go_from_all_steps(testbed_model, examples):
    some = [e for e in examples if e.task == "testbed-headline"]
    # 15 tokens hold an item whose text is one word: room for a query and three such items.
    prompt = PromptSettings(max_tokens=62)
    table = position(testbed_model, some, "distance", [0, 2], prompt=prompt, progress=False)
    assert float(table["fewer_items"][0]) == 1
    one = [replace(e, profile=e.profile[:1]) for e in some]
    prompts = built(testbed_model, one, prompt)
    first = table.isel(task=0).sel(step=0)
    assert float(first["prompt_tokens"]) == np.mean([len(p.ids) for p in prompts])
    assert "100% of the examples show fewer items at every step" in lines(table)[0]
    with pytest.raises(InputError, match=r"headline.*strangers' items between: .* no room for an"):
        position(testbed_model, some, "distance", [0, 4], prompt=prompt, progress=False)


def test_an_example_without_room_is_left_out_and_counted(testbed_model, examples):
    some = [e for e in examples if e.task == "testbed-headline"]
    # Of 62 tokens the longer query leaves none for an own item behind two strangers'.
    long = replace(some[0], id="long", query=some[0].query + " the" * 20)
    given = [long, *some]
    prompt = PromptSettings(max_tokens=62)
    table = position(testbed_model, given, "distance", [0, 2], prompt=prompt, progress=False)
    assert (table["no_room"].item(), table["examples"].item()) == (1, len(some))
    # The others stand as without it: its user has the same profile in their rows.
    alone = position(testbed_model, some, "distance", [0, 2], prompt=prompt, progress=False)
    xr.testing.assert_allclose(table.drop_vars("no_room"), alone.drop_vars("no_room"), atol=1e-5)
    (said,) = lines(table)
    assert said == f"{lines(alone)[0]} Left out for want of room: 1 of {len(given)} examples."


def test_a_turn_that_leaves_no_room_leaves_out_the_query_behind_it_alone(testbed_model, examples):
    some = [e for e in examples if e.task == "testbed-tag"]
    # Its answer is a turn before the user's second query, which then passes the budget.
    given = [replace(some[0], target="war " * 90), *some[1:]]
    prompt = PromptSettings(max_tokens=100)
    with pytest.raises(InputError, match="even without its profile"):
        built(testbed_model, with_turns(given, 1), prompt)
    table = position(testbed_model, given, "turns", [0, 1], prompt=prompt, progress=False)
    assert (table["no_room"].item(), table["examples"].item()) == (1, len(some) - 1)
    left = [e for i, e in enumerate(given) if i != 1]
    alone = score_heads(testbed_model, left, prompt=prompt, progress=False)
    nll = alone.data["nll"].values.mean()
    assert float(table["nll"].sel(step=0).item()) == pytest.approx(nll, abs=1e-5)
    # What can't be asked without any turn either is refused as ever.
    with pytest.raises(InputError, match="the target is empty"):
        wrong = [replace(some[0], target=" "), *some[1:]]
        position(testbed_model, wrong, "turns", [0, 1], progress=False)


def test_tasks_without_strangers_are_left_out_by_name(testbed_model, examples):
    users = list(dict.fromkeys(e.user for e in examples))
    lone = [e for e in examples if e.task == "testbed-headline" and e.user == users[0]]
    tags = [e for e in examples if e.task == "testbed-tag"]
    table = position(testbed_model, [*lone, *tags], "distance", [0, 1], progress=False)
    alone = position(testbed_model, tags, "distance", [0, 1], progress=False)
    assert table["task"].values.tolist() == ["testbed-tag"]
    assert table.attrs["left_out"] == ["testbed-headline"]
    assert alone.attrs["left_out"] == []
    xr.testing.assert_allclose(table, alone, atol=1e-6)
    assert lines(table)[1:] == [
        "testbed-headline, strangers' items between: left out; it has a single user, and a "
        "stranger is another."
    ]
    # Without strangers nobody is missed.
    whole = position(testbed_model, [*lone, *tags], "length", [1, 2], progress=False)
    assert sorted(whole["task"].values.tolist()) == ["testbed-headline", "testbed-tag"]
    with pytest.raises(InputError, match="testbed-headline: 1 items of strangers"):
        position(testbed_model, lone, "distance", [0, 1], progress=False)


def test_shortened_items_are_said(testbed_model, examples):
    prompt = PromptSettings(max_tokens=46)
    some = [e for e in examples if e.task == "testbed-tag"]
    table = position(testbed_model, some, "length", [1, 4], prompt=prompt, progress=False)
    table = table.assign_attrs(reference=1)
    assert "shortened items in 100% of the prompts (0% at 1)" in lines(table)[0]
