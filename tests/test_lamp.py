"""The reader of LaMP files: what it takes, what it refuses, and the authors' prompts."""

import json

import pytest
from test_prompts import Characters

from workbench.data.examples import Example, with_strangers_profile, without_profile
from workbench.data.lamp import load_lamp, sample_users
from workbench.data.prompts import PromptSettings, build_prompts
from workbench.data.sources import load_examples
from workbench.data.tasks import LAMP_TASKS, TASKS, get_task
from workbench.errors import InputError

ITEM = {"id": "p1", "title": "Old title", "text": "old article"}


def row(row_id, **other):
    return {"id": row_id, "input": "Generate: x", "profile": [ITEM], **other}


def golds(*ids):
    return {"task": "LaMP_4", "golds": [{"id": i, "output": f"answer {i}"} for i in ids]}


@pytest.fixture
def write(tmp_path):
    """Write questions and outputs, as values or as raw text, and give the root folder."""

    def write(questions, outputs, folder="LaMP-4"):
        (tmp_path / folder).mkdir()
        for name, value in (("questions", questions), ("outputs", outputs)):
            text = value if isinstance(value, str) else json.dumps(value)
            (tmp_path / folder / f"dev_{name}.json").write_text(text, encoding="utf-8")
        return tmp_path

    return write


# What it takes


@pytest.mark.parametrize("folder", ["LaMP-4", "LaMP_4"])
def test_a_row_becomes_an_example_from_a_folder_of_either_name(write, folder):
    root = write([row("1"), row("2")], golds("2", "1"), folder)  # outputs in another order
    examples = load_lamp("LaMP-4", "dev", root)
    assert examples == [
        Example("1", "LaMP-4:1", "LaMP-4", "Generate: x", "answer 1", (ITEM,)),
        Example("2", "LaMP-4:1", "LaMP-4", "Generate: x", "answer 2", (ITEM,)),
    ]
    assert examples[0].name == "LaMP-4/1"


@pytest.mark.parametrize(
    ("questions", "outputs"),
    [((1, 2), (1, 2)), ((1, 2), ("1", "2")), (("1", "2"), (1, 2)), (("1", 2), (1, 2))],
)
def test_ids_may_be_numbers_or_strings(write, questions, outputs):
    root = write([row(i) for i in questions], golds(*outputs))
    assert [e.id for e in load_lamp("LaMP-4", "dev", root)] == ["1", "2"]


def test_an_id_keeps_its_leading_zeros_and_an_output_its_spelling(write):
    outputs = {"golds": [{"id": "007", "output": "5.0"}, {"id": "7", "output": "1e5"}]}
    examples = load_lamp("LaMP-4", "dev", write([row("007"), row("7")], outputs))
    assert [(e.id, e.target) for e in examples] == [("007", "5.0"), ("7", "1e5")]


def test_a_user_id_names_the_user_also_if_it_is_zero(write):
    root = write([row("1", user_id=0), row("2", user_id=7), row("3")], golds("1", "2", "3"))
    examples = load_lamp("LaMP-4", "dev", root)
    assert [e.user for e in examples] == ["0", "7", "LaMP-4:3"]
    assert [e.inferred for e in examples] == [False, False, True]


def test_items_may_differ_in_further_fields(write):
    questions = [
        row("1"),
        row("2", profile=[ITEM, {**ITEM, "date": "2012-01-01"}]),
        row("3", profile=[{**ITEM, "date": 2013, "extra": {"a": [1]}}]),
    ]
    examples = load_lamp("LaMP-4", "dev", write(questions, golds("1", "2", "3")))
    assert [[item.get("date") for item in e.profile] for e in examples] == [
        [None],
        [None, "2012-01-01"],
        ["2013"],
    ]
    assert all(isinstance(v, str) for e in examples for item in e.profile for v in item.values())


def test_a_field_without_a_value_is_left_out(write):
    dated = {**ITEM, "date": "2012-01-01"}
    questions = [row("1", profile=[{**ITEM, "date": None}]), row("2", profile=[dated, ITEM])]
    first, second = load_lamp("LaMP-4", "dev", write(questions, golds("1", "2")))
    assert first.profile == (ITEM,)
    assert second.profile == (dated, ITEM)


def test_a_field_may_appear_far_down_a_large_file(write):
    # `datasets` reads larger files in blocks and decides on the fields of each.
    text = "a long article " * 20
    items = [{**ITEM, "text": text, **({"date": "2012"} if i > 1500 else {})} for i in range(2000)]
    questions = [row(str(i), profile=[item]) for i, item in enumerate(items)]
    root = write(questions, golds(*map(str, range(2000))))
    assert [e.profile[0] for e in load_lamp("LaMP-4", "dev", root)] == items


def test_a_number_where_text_is_wanted_becomes_its_text(write):
    items = [{"id": 1, "text": "fine", "score": "5"}, {"id": 2, "text": "bad", "score": 1}]
    outputs = {"golds": [{"id": "1", "output": 4}]}
    root = write([row("1", profile=items)], outputs, "LaMP-3")
    (example,) = load_lamp("LaMP-3", "dev", root)
    assert [item["score"] for item in example.profile] == ["5", "1"]
    assert example.target == "4"


def test_odd_line_separators_inside_a_text_split_no_row(write):
    text = "one\u2028two\u0085three\r\nfour"
    root = write([row("1", input=text), row("2")], golds("1", "2"))
    assert load_lamp("LaMP-4", "dev", root)[0].query == text


def test_the_sample_of_real_rows_loads(shared):
    folder = shared / "lamp-sample"
    examples = load_lamp("LaMP-4", "dev", folder)
    raw = json.loads((folder / "LaMP_4" / "dev_questions.json").read_text(encoding="utf-8"))
    answers = json.loads((folder / "LaMP_4" / "dev_outputs.json").read_text(encoding="utf-8"))
    by_id = {str(gold["id"]): gold["output"] for gold in answers["golds"]}
    assert len(examples) == 120
    for example, wanted in zip(examples, raw, strict=True):
        assert (example.id, example.query) == (str(wanted["id"]), wanted["input"])
        assert example.target == by_id[example.id]
        assert [i["title"] for i in example.profile] == [i["title"] for i in wanted["profile"]]
        assert [i["text"] for i in example.profile] == [i["text"] for i in wanted["profile"]]
    assert examples == load_examples("lamp:LaMP-4", root=folder)


# What it refuses. A message names the file, the row and what is wrong there.

QUESTIONS, OUTPUTS = "dev_questions.json", "dev_outputs.json"
BAD = {
    "malformed questions": (
        '[\n{"id": "1",\n"input" "x"}]',
        golds("1"),
        [QUESTIONS, "malformed JSON at line 3"],
    ),
    "cut questions": ('[{"id": "1",\n"inp', golds("1"), [QUESTIONS, "malformed JSON at line 2"]),
    "empty questions": ("", golds("1"), [QUESTIONS, "malformed JSON at line 1"]),
    "malformed outputs": ([row("1")], '{"golds": [\n{"id" 1}]}', [OUTPUTS, "line 2"]),
    "empty outputs": ([row("1")], "", [OUTPUTS, "malformed JSON at line 1"]),
    "no rows": ([], golds("1"), [QUESTIONS, "holds no rows"]),
    "no golds": ([row("1")], golds(), [OUTPUTS, "holds no rows"]),
    "a number": ("5", golds("1"), [QUESTIONS, "wanted a list of rows"]),
    "rows of text": (["x"], golds("1"), [QUESTIONS, "row 0", "`id` is missing"]),
    "outputs without golds": ([row("1")], {"task": "x"}, [OUTPUTS, "a list `golds`"]),
    "outputs as a list": ([row("1")], golds("1")["golds"], [OUTPUTS, "a list `golds`"]),
    "gold of text": ([row("1")], {"golds": ["x"]}, [OUTPUTS, "gold 0", "`id` and `output`"]),
    "gold without output": (
        [row("1")],
        {"golds": [{"id": "1", "output": "a"}, {"id": "2"}]},
        [OUTPUTS, "gold 1", "`id` and `output`"],
    ),
    "gold twice": ([row("1")], golds("1", "1"), [OUTPUTS, "gold 1", "'1' stands twice"]),
    "golds of mixed types": ([row("1"), row("2")], golds("1", 2), [OUTPUTS, "same type in every"]),
    "gold missing": ([row("1"), row("2")], golds("1"), [QUESTIONS, "row 1", "no gold", "'2'"]),
    "gold too many": ([row("1")], golds("1", "9"), [OUTPUTS, "'9'", "belong together"]),
    "ids that differ": ([row("a")], golds("b"), [QUESTIONS, "row 0", "no gold", "'a'"]),
    "empty target": (
        [row("1")],
        {"golds": [{"id": "1", "output": " \n"}]},
        [QUESTIONS, "row 0", "'1' is empty", "remove the row"],
    ),
    "id twice": ([row("1"), row("1")], golds("1"), [QUESTIONS, "row 1", "'1' stands twice"]),
    "no id": ([row("1"), {"input": "x", "profile": [ITEM]}], golds("1"), ["row 1", "`id`"]),
    "no input": ([row("1"), {"id": "2", "profile": [ITEM]}], golds("1", "2"), ["row 1", "`input`"]),
    "no profile": ([row("1"), {"id": "2", "input": "x"}], golds("1", "2"), ["row 1", "`profile`"]),
    "empty profile": (
        [row("1"), row("2", profile=[])],
        golds("1", "2"),
        [QUESTIONS, "row 1", "profile of id '2' is empty", "remove the row"],
    ),
    "profile of text": ([row("1", profile="x")], golds("1"), ["row 0", "a list of objects"]),
    "profile of texts": ([row("1", profile=["x"])], golds("1"), ["row 0", "a list of objects"]),
    "profile no list": ([row("1", profile=ITEM)], golds("1"), ["row 0", "a list of objects"]),
    "item lacks a field": (
        [row("1"), row("2", profile=[ITEM, {"id": "p2", "text": "x"}])],
        golds("1", "2"),
        [QUESTIONS, "row 1", "item 1 lacks title", "LaMP-4 items have title, text"],
    ),
    "item with a null": (
        [row("1", profile=[{"id": "p", "title": None, "text": None}])],
        golds("1"),
        ["row 0", "item 0 lacks title, text"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data_is_refused_by_its_place(write, case):
    questions, outputs, parts = BAD[case]
    root = write(questions, outputs)
    with pytest.raises(InputError) as caught:
        load_lamp("LaMP-4", "dev", root)
    message = str(caught.value)
    assert message.startswith(str(root / "LaMP-4"))
    assert [part for part in parts if part not in message] == []


def test_a_missing_root_is_refused(tmp_path):
    with pytest.raises(InputError, match="nowhere: no such folder; --root"):
        load_lamp("LaMP-4", "dev", tmp_path / "nowhere")


def test_a_root_without_the_task_is_refused_with_both_names(tmp_path):
    with pytest.raises(InputError, match="holds no folder LaMP-4 or LaMP_4"):
        load_lamp("LaMP-4", "dev", tmp_path)


def test_a_missing_split_is_refused_with_those_there_are(write):
    root = write([row("1")], golds("1"))
    with pytest.raises(InputError, match=r"test_questions\.json: no such file; .* here: dev"):
        load_lamp("LaMP-4", "test", root)
    (root / "LaMP-4" / OUTPUTS).unlink()
    with pytest.raises(InputError, match=r"dev_outputs\.json: no such file"):
        load_lamp("LaMP-4", "dev", root)


def test_an_unknown_task_is_refused_with_those_there_are(tmp_path):
    with pytest.raises(InputError, match=r"unknown task 'LaMP-6'; known are LaMP-1, .*LaMP-7"):
        load_lamp("LaMP-6", "dev", tmp_path)


def test_unknown_data_is_refused_with_what_can_be_given(tmp_path):
    with pytest.raises(InputError, match="unknown data 'LaMP-4'; give testbed, lamp:TASK"):
        load_examples("LaMP-4", root=tmp_path)
    with pytest.raises(InputError, match="lamp:LaMP-4 needs a root"):
        load_examples("lamp:LaMP-4")


# Users

MANY = [Example(f"{u}{i}", u, "LaMP-4", "q", "t", (ITEM,)) for i in range(3) for u in "abcdefgh"]


def test_sampled_users_come_with_all_their_examples_in_order():
    kept = sample_users(MANY, 3, seed=1)
    users = {e.user for e in kept}
    assert len(users) == 3
    assert kept == [e for e in MANY if e.user in users]


def test_the_sample_of_users_depends_on_the_seed_alone():
    assert sample_users(MANY, 3, seed=5) == sample_users(MANY, 3, seed=5)
    draws = {frozenset(e.user for e in sample_users(MANY, 3, seed=s)) for s in range(20)}
    assert len(draws) > 5
    assert sample_users(MANY, None) == MANY


@pytest.mark.parametrize("users", [0, -1, 9])
def test_more_users_than_there_are_or_none_are_refused(users):
    with pytest.raises(InputError, match=f"asked for {users} users, the data has 8"):
        sample_users(MANY, users)


def test_the_controls_change_the_profile_and_nothing_else():
    rows = [Example(f"{u}{i}", u, "t", "q", u, ({"text": u},)) for u in "abc" for i in range(2)]
    assert [(e.id, e.target, e.profile) for e in without_profile(rows)] == [
        (e.id, e.target, ()) for e in rows
    ]
    strangers = with_strangers_profile(rows)
    assert [e.profile[0]["text"] for e in strangers] == list("bbccaa")
    assert [(e.id, e.query, e.target) for e in strangers] == [
        (e.id, e.query, e.target) for e in rows
    ]
    with pytest.raises(ValueError, match="needs two users"):
        with_strangers_profile(rows[:2])


# The prompts as the LaMP authors publish them (LaMP, the table of prompts in the appendix; their
# released code puts a space behind each item and writes "is a title for" in LaMP-5).

PUBLISHED = {
    "LaMP-1": (
        'For an author who has written the paper with the title "T", which reference is related? '
        'Just answer with [1] or [2] without explanation. [1]: "R1" [2]: "R2"',
        [{"title": "A", "abstract": "aa"}, {"title": "B", "abstract": "bb"}],
        'For an author who has written the paper with the title "T", and "A", and "B", which '
        "reference is related? Just answer with [1] or [2] without explanation. "
        '[1]: "R1" [2]: "R2"',
    ),
    "LaMP-2": (
        "Which tag does this movie relate to among the following tags? Just answer with the tag "
        "name without further explanation. tags: [sci-fi, comedy] description: d",
        [{"description": "D1", "tag": "comedy"}, {"description": "D2", "tag": "sci-fi"}],
        'the tag for the movie: "D1" is "comedy", and the tag for the movie: "D2" is "sci-fi". '
        "Which tag does this movie relate to among the following tags? Just answer with the tag "
        "name without further explanation. tags: [sci-fi, comedy] description: d",
    ),
    "LaMP-3": (
        "What is the score of the following review on a scale of 1 to 5? just answer with 1, 2, "
        "3, 4, or 5 without further explanation. review: r",
        [{"text": "R1", "score": "5"}, {"text": "R2", "score": "2"}],
        '5 is the score for "R1", and 2 is the score for "R2". What is the score of the following '
        "review on a scale of 1 to 5? just answer with 1, 2, 3, 4, or 5 without further "
        "explanation. review: r",
    ),
    "LaMP-4": (
        "Generate a headline for the following article: a",
        [{"title": "T1", "text": "A1"}, {"title": "T2", "text": "A2"}],
        '"T1" is the title for "A1", and "T2" is the title for "A2". Generate a headline for the '
        "following article: a",
    ),
    "LaMP-5": (
        "Generate a title for the following abstract of a paper: a",
        [{"title": "T1", "abstract": "A1"}, {"title": "T2", "abstract": "A2"}],
        '"T1" is the title for "A1", and "T2" is the title for "A2". Following the given patterns '
        "Generate a title for the following abstract of a paper: a",
    ),
    "LaMP-7": (
        "Paraphrase the following tweet without any explanation before or after it: t",
        [{"text": "W1"}, {"text": "W2"}],
        '"W1", and "W2" are written by a person. Following the given patterns Paraphrase the '
        "following tweet without any explanation before or after it: t",
    ),
}


def prompt_text(task, query, items):
    example = Example("1", "1", task, query, "answer", tuple(items))
    (prompt,) = build_prompts([example], Characters(), 10_000, PromptSettings(ranking="first"))
    return Characters().decode(prompt.ids)


def test_every_lamp_task_has_a_published_prompt():
    assert tuple(PUBLISHED) == LAMP_TASKS


@pytest.mark.parametrize("task", PUBLISHED)
def test_a_prompt_is_the_one_that_lamp_publishes(task):
    query, items, published = PUBLISHED[task]
    # A plain prompt ends with a line break: the answer stands on a line of its own.
    assert prompt_text(task, query, items) == published + "\n"


@pytest.mark.parametrize("task", PUBLISHED)
def test_without_a_profile_the_prompt_is_the_query(task):
    query, _, _ = PUBLISHED[task]
    assert prompt_text(task, query, []) == query + "\n"


def test_a_title_with_quotes_and_commas_keeps_the_history_behind_it():
    title = 'On "deep", and wide, nets'
    query = PUBLISHED["LaMP-1"][0].replace('"T"', f'"{title}"')
    text = prompt_text("LaMP-1", query, [{"title": "A", "abstract": "a"}])
    assert f'with the title "{title}", and "A", which reference is related?' in text


def test_braces_in_a_profile_are_plain_text():
    item = {"title": "{text} {0}", "text": "{title}"}
    text = prompt_text("LaMP-4", "Generate: x", [item])
    assert text == '"{text} {0}" is the title for "{title}". Generate: x\n'


@pytest.mark.parametrize("task", TASKS)
def test_the_table_of_tasks_is_consistent(task):
    spec = get_task(task)
    sample = dict.fromkeys(spec.fields, "x")
    assert spec.item.format(**sample)  # needs no other field than the required ones
    assert spec.shorten in spec.fields
    assert set(spec.search) <= set(spec.fields)
    assert bool(spec.labels) == (spec.kind != "generation")


def test_texts_that_look_like_dates_and_mixed_numbers_stay_as_they_are(tmp_path):
    folder = tmp_path / "LaMP_3"
    folder.mkdir()
    rows = [
        {
            "id": str(i),
            "input": "2011-01-05",
            "profile": [{"id": "p", "text": "2011-01-05", "score": s}],
        }
        for i, s in enumerate((5, 4.0))
    ]
    golds = [{"id": str(i), "output": "4"} for i in range(2)]
    (folder / "dev_questions.json").write_text(json.dumps(rows))
    (folder / "dev_outputs.json").write_text(json.dumps({"task": "LaMP_3", "golds": golds}))
    examples = load_lamp("LaMP-3", "dev", tmp_path)
    assert [e.query for e in examples] == ["2011-01-05"] * 2
    assert [e.profile[0]["text"] for e in examples] == ["2011-01-05"] * 2
    assert [e.profile[0]["score"] for e in examples] == ["5", "4.0"]


def test_gold_that_is_no_rating_is_refused(tmp_path):
    folder = tmp_path / "LaMP_3"
    folder.mkdir()
    rows = [{"id": "7", "input": "x", "profile": [{"id": "p", "text": "t", "score": "3"}]}]
    golds = {"task": "LaMP_3", "golds": [{"id": "7", "output": "good"}]}
    (folder / "dev_questions.json").write_text(json.dumps(rows))
    (folder / "dev_outputs.json").write_text(json.dumps(golds))
    with pytest.raises(InputError, match="row 0: the gold output for id '7' is 'good', no rating"):
        load_lamp("LaMP-3", "dev", tmp_path)
