"""Text without a user, and profiles that aren't the user's own."""

from __future__ import annotations

from collections import Counter

import pytest

from workbench.data import testbed
from workbench.data.examples import (
    COUNTERFACTUALS,
    Example,
    counterfactual,
    with_shuffled_profile,
    with_strangers_profile,
)
from workbench.data.neutral import neutral_examples
from workbench.data.prompts import build_prompts
from workbench.data.sources import load_examples
from workbench.data.tasks import TEXT
from workbench.errors import InputError


def example(name, user, *titles, task="LaMP-4"):
    items = tuple({"id": str(i), "title": t, "text": f"{t} news {i}"} for i, t in enumerate(titles))
    return Example(name, user, task, "headline: x", "y", items)


def words(profile, field):
    return Counter(" ".join(item[field] for item in profile).split())


# Counterfactual profiles


def test_shuffling_keeps_a_fields_words_and_every_items_length():
    before = example("a", "u", "one two three", "four", "five six seven eight")
    (after,) = with_shuffled_profile([before])
    for field in ("title", "text"):
        assert words(after.profile, field) == words(before.profile, field)
        lengths = [[len(i[field].split()) for i in e.profile] for e in (before, after)]
        assert lengths[0] == lengths[1]
    assert [i["title"] for i in after.profile] != [i["title"] for i in before.profile]
    assert [i["id"] for i in after.profile] == ["0", "1", "2"]
    assert (after.query, after.target, after.user) == (before.query, before.target, before.user)


def test_shuffling_moves_ratings_between_items():
    rated = load_examples("testbed", "validation", tasks=["testbed-rating"], users=12)
    pairs = [
        ([i["score"] for i in a.profile], [i["score"] for i in b.profile])
        for a, b in zip(rated, with_shuffled_profile(rated), strict=True)
    ]
    assert all(sorted(a) == sorted(b) for a, b in pairs)
    assert sum(a != b for a, b in pairs) > len(pairs) / 2


def test_a_shuffle_depends_on_name_and_seed_and_on_nothing_else():
    rows = [example(n, "u", "one two three", "four five six") for n in ("a", "b")]
    assert with_shuffled_profile(rows)[1] == with_shuffled_profile(rows[1:])[0]
    a, b = with_shuffled_profile(rows)
    assert a.profile != b.profile
    assert with_shuffled_profile(rows, seed=1)[0] != a


def test_each_counterfactual_changes_the_profile_and_nothing_else():
    rows = [example("a", "u", "one two", "three four"), example("b", "v", "five six", "seven")]
    changed = {kind: counterfactual(rows, kind) for kind in COUNTERFACTUALS}
    assert [e.profile for e in changed["none"]] == [(), ()]
    assert changed["stranger"] == with_strangers_profile(rows)
    assert changed["stranger"][0].profile == rows[1].profile
    assert changed["shuffled"] == with_shuffled_profile(rows)
    for part in changed.values():
        assert [(e.name, e.user, e.target) for e in part] == [
            (e.name, e.user, e.target) for e in rows
        ]


def test_one_user_has_no_stranger_and_an_unknown_counterfactual_lists_those_there_are():
    with pytest.raises(InputError, match=r"LaMP-4: .* two users, got one; load more users"):
        counterfactual([example("a", "u", "t")], "stranger")
    with pytest.raises(InputError, match="'twin'; known are none, stranger, shuffled"):
        counterfactual([], "twin")


# Neutral text


def test_builtin_passages_ask_for_the_rest_behind_the_first_sentence():
    found = neutral_examples()
    assert len(found) == len({e.user for e in found}) == len({e.name for e in found}) == 48
    assert {e.task for e in found} == {TEXT}
    for e in found:
        assert e.profile == ()
        assert e.query.count(".") == 1 and e.query.endswith(".")
        assert 1 <= e.target.count(".") <= 3


def test_builtin_passages_fit_a_model(tiny_model):
    model = tiny_model("llama")
    prompts = build_prompts(neutral_examples(count=4), model.tokenizer, 256)
    assert all(p.shown == () and p.target_ids for p in prompts)


def test_fewer_passages_are_drawn_from_the_seed_in_their_order():
    few = neutral_examples(count=5, seed=1)
    assert few == neutral_examples(count=5, seed=1) != neutral_examples(count=5, seed=2)
    assert [int(e.id) for e in few] == sorted(int(e.id) for e in few)
    assert all(e in neutral_examples() for e in few)


def test_nobody_answers_the_testbeds_tasks_as_the_prior_does():
    found = neutral_examples("testbed", count=1500)
    assert Counter(e.task for e in found) == dict.fromkeys(testbed.TASKS, 500)
    assert len({e.user for e in found}) == 1500
    assert all(e.profile == () for e in found)
    openers = Counter(e.target.split()[0] for e in found if e.task == "testbed-headline")
    # The prior halves from each value to the next; the standard error of a share is at most .022.
    assert openers["update"] / 500 == pytest.approx(0.5, abs=0.08)
    assert openers["hey"] / 500 == pytest.approx(0.25, abs=0.08)
    movies = [e for e in found if e.task == "testbed-tag"]
    home = [testbed.CANDIDATES[e.query.split()[-1]][0] == e.target for e in movies]
    assert sum(home) / 500 == pytest.approx(testbed.GENERIC_HOME_GENRE, abs=0.08)


def test_testbed_queries_by_nobody_are_read_as_the_corpus_is():
    corpus = load_examples("testbed", "test", users=3)
    for task in testbed.TASKS:
        theirs = next(e.query for e in corpus if e.task == task)
        ours = next(e.query for e in neutral_examples("testbed", 3) if e.task == task)
        assert theirs.split()[0] == ours.split()[0]
        assert theirs.split()[-1] == ours.split()[-1] or task != "testbed-headline"


def test_an_own_file_is_cut_at_blank_lines_and_after_the_first_sentence(tmp_path):
    path = tmp_path / "own.txt"
    path.write_text("\ufeffIs it so? Yes,\nit is. So.\n \n\nA b. C d.\n", encoding="utf-8")
    found = neutral_examples(path)
    assert [(e.query, e.target) for e in found] == [
        ("Is it so?", "Yes, it is. So."),
        ("A b.", "C d."),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b" \n\n", "own.txt: holds no text; wanted passages"),
        (b"A b. C d.\n\nOnly one here.", "passage 2 .'Only one here.'. is a single sentence"),
        (b"A b. C \xff d.", "own.txt: not UTF-8 .byte 7.; save"),
        (None, "can't be read: No such file .*builtin, testbed or a file"),
    ],
)
def test_an_unusable_file_is_named_with_the_remedy(tmp_path, content, message):
    path = tmp_path / "own.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        neutral_examples(path)


def test_no_neutral_text_at_all_is_refused():
    with pytest.raises(InputError, match="got count=0"):
        neutral_examples(count=0)
