"""Users that the data doesn't name: rows whose profiles agree are one user's, others are not."""

import json
import random
from collections import Counter

import pytest

from workbench.data.authors import infer_users
from workbench.data.examples import Example
from workbench.data.lamp import load_lamp


def movie(name, row_id=""):
    return {"id": f"{row_id}{name}", "description": f"Movie {name}", "tag": "comedy"}


def row(row_id, *names, task="LaMP-2", user="", inferred=True):
    profile = tuple(movie(name, row_id) for name in names)
    return Example(row_id, user, task, "q", "t", profile, inferred=inferred)


def users(*rows):
    return [example.user for example in infer_users(rows)]


def test_rows_that_share_half_of_the_smaller_profile_are_one_user_s():
    half = users(row("7", *"abcd"), row("8", *"abxyz"), row("9", *"avw"))
    assert half == ["LaMP-2:7", "LaMP-2:7", "LaMP-2:9"]  # 2 of 4; 1 of 3 and 1 of 3


def test_an_item_that_stands_twice_counts_once():
    assert users(row("1", *"aaab"), row("2", *"acd"))[1] == "LaMP-2:1"  # 1 of 2 different items
    assert users(row("1", *"aaabc"), row("2", *"aaade"))[1] == "LaMP-2:2"  # 1 of 3, not 3 of 5


def test_a_third_row_joins_two_that_share_nothing_and_the_first_row_names_them():
    rows = [row("5", *"abcd"), row("6", *"wxyz"), row("4", *"pq"), row("3", *"abwx")]
    assert users(*rows) == ["LaMP-2:5", "LaMP-2:5", "LaMP-2:4", "LaMP-2:5"]


def test_items_are_equal_by_all_their_fields_and_not_by_their_ids():
    one, other = row("1", "a"), row("2", "a")
    assert one.profile[0]["id"] != other.profile[0]["id"]
    assert users(one, other) == ["LaMP-2:1"] * 2
    retagged = Example(
        "2", "", "LaMP-2", "q", "t", ({**movie("a"), "tag": "action"},), inferred=True
    )
    assert users(one, retagged) == ["LaMP-2:1", "LaMP-2:2"]


def test_equal_items_of_two_tasks_join_nobody():
    text = {"text": "We weigh stars.", "title": "Stars", "abstract": "We weigh stars."}
    rows = [
        Example("1", "", task, "q", "t", (text,), inferred=True) for task in ("LaMP-1", "LaMP-5")
    ]
    assert users(*rows) == ["LaMP-1:1", "LaMP-5:1"]


def test_rows_that_name_their_user_keep_it_and_join_nobody():
    named = [
        row("1", *"ab", user="ann", inferred=False),
        row("2", *"ab", user="bo", inferred=False),
    ]
    nameless = [row("3", *"ab"), row("4", *"ab")]
    assert users(*named) == ["ann", "bo"]
    assert users(named[0], *nameless, named[1]) == ["ann", "LaMP-2:3", "LaMP-2:3", "bo"]
    assert users() == []


def test_nothing_but_the_user_changes_and_a_second_time_changes_nothing():
    rows = [row("1", *"ab"), row("2", *"ab"), row("3", "c")]
    once = infer_users(rows)
    assert [(e.id, e.profile, e.inferred) for e in once] == [(e.id, e.profile, True) for e in rows]
    assert infer_users(once) == once


def test_users_who_tag_the_same_popular_movies_stay_apart():
    # 60 users with two rows each; of 50 movies of a profile 20 are among the 40 that all know.
    # A second row shows 45 of them, as a later crawl or a cut profile would.
    rng = random.Random(0)
    popular = [f"popular {i}" for i in range(40)]
    rows, truth = [], []
    for user in range(60):
        names = rng.sample(popular, 20) + [f"{user} own {i}" for i in range(30)]
        for part in (names, rng.sample(names, 45)):
            rows.append(row(str(len(rows)), *part))
            truth.append(user)
    sharing = [set(a) & set(b) for a in _names(rows)[::2] for b in _names(rows)[::2] if a != b]
    assert min(map(len, sharing)) > 0  # any shared movie would make them all one
    order = rng.sample(range(len(rows)), len(rows))
    found = users(*(rows[i] for i in order))
    pairs = set(zip((truth[i] for i in order), found, strict=True))
    assert len(pairs) == len(set(found)) == 60


def _names(rows):
    return [[item["description"] for item in example.profile] for example in rows]


@pytest.mark.parametrize(
    ("task", "length", "joined"),
    [
        ("LaMP-4", 60, True),
        ("LaMP-4", 59, False),
        ("LaMP-5", 60, False),  # a paper may have several authors
        ("LaMP-1", 60, False),
    ],
)
def test_one_long_text_of_a_single_writer_joins_rows(task, length, joined):
    items = {"LaMP-4": "text", "LaMP-5": "abstract", "LaMP-1": "abstract"}
    shared, *rest = [{"title": f"{i:5}", items[task]: "w" * (length - 5)} for i in range(21)]
    profiles = [(shared, *rest[:10]), (*rest[10:], shared)]
    rows = [Example(f"{i}", "", task, "q", "t", p, inferred=True) for i, p in enumerate(profiles)]
    assert (len(set(users(*rows))) == 1) == joined


@pytest.mark.parametrize("task", ["LaMP-3", "LaMP-7"])
def test_reviews_and_tweets_join_rows_only_if_they_are_long(task):
    for shared, joined in (("Great, thank you!", False), ("It boils and it sings. " * 4, True)):
        profiles = [[{"text": f"{row} {i}", "score": "5"} for i in range(9)] for row in ("a", "b")]
        rows = [
            Example(str(i), "", task, "q", "t", (*p, {"text": shared, "score": "5"}), inferred=True)
            for i, p in enumerate(profiles)
        ]
        assert (len(set(users(*rows))) == 1) == joined


def test_rows_beyond_the_first_block_are_compared_with_all(monkeypatch):
    rows = [row(str(i), *(f"{i % 7}{name}" for name in "abc")) for i in range(50)]
    whole = users(*rows)
    assert whole == [f"LaMP-2:{i % 7}" for i in range(50)]
    monkeypatch.setattr("workbench.data.authors.BLOCK", 8)
    assert users(*rows) == whole


def test_the_sample_s_rows_are_of_eighteen_authors(shared):
    examples = load_lamp("LaMP-4", "dev", shared / "lamp-sample")
    texts = [{(item["title"], item["text"]) for item in e.profile} for e in examples]
    count = Counter(example.user for example in examples)
    assert len(count) == 18
    assert sum(count.values()) == 120
    # By another route, spreading from a row to those that share a text with it.
    for start, example in enumerate(examples):
        reached, new = {start}, {start}
        while new:
            known = set().union(*(texts[index] for index in new))
            new = {i for i, held in enumerate(texts) if held & known} - reached
            reached |= new
        assert {examples[i].user for i in reached} == {example.user}
        assert count[example.user] == len(reached)
        assert example.user == f"LaMP-4:{examples[min(reached)].id}"


@pytest.mark.parametrize("user_id", [None, " "])
def test_a_row_without_a_user_id_has_its_user_inferred(tmp_path, user_id):
    folder = tmp_path / "LaMP-2"
    folder.mkdir()
    rows = [
        {"id": str(i), "input": "q", "profile": [movie(name, i)], "user_id": user_id}
        for i, name in enumerate("aba")
    ]
    golds = [{"id": str(i), "output": "comedy"} for i in range(3)]
    (folder / "dev_questions.json").write_text(json.dumps(rows))
    (folder / "dev_outputs.json").write_text(json.dumps({"golds": golds}))
    examples = load_lamp("LaMP-2", "dev", tmp_path)
    assert [e.user for e in examples] == ["LaMP-2:0", "LaMP-2:1", "LaMP-2:0"]
    assert all(e.inferred for e in examples)
