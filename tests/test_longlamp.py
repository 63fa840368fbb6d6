"""The reader of LongLaMP: local copies in four forms, the hub, bad rows, and its prompts."""

import json
import re

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_cli import run
from test_prompts import Characters
from transformers import AutoTokenizer

from workbench.data.examples import Example
from workbench.data.longlamp import load_longlamp
from workbench.data.prompts import PromptSettings, build_prompts
from workbench.data.retrieval import rank_profile
from workbench.data.sources import load_examples
from workbench.data.tasks import LONGLAMP_TASKS
from workbench.data.testbed import testbed_path
from workbench.errors import InputError
from workbench.probe import discovery_and_evaluation

PAPER = {"abstract": "We weigh stars.", "id": "p1", "title": "Stars", "year": 2012}
REVIEW = {
    "description": "A red kettle",
    "overall": "5.0",
    "reviewText": "It boils.",
    "summary": "Fine",
}
POST = {"author": "ann", "content": "I ran far.", "id": "t1", "summary": "A run"}
# Config: the column that names the user, an item, and how the item reads as an example's.
CONFIGS = {
    "abstract_generation": ("name", PAPER, {**PAPER, "year": "2012", "date": "2012"}),
    "product_review": ("reviewerId", REVIEW, REVIEW),
    "topic_writing": ("author", POST, POST),
}
SIX = [f"{task}_{setting}" for task in CONFIGS for setting in ("user", "temporal")]


def rows_of(config, users=("bo", "al", "cy")):
    """A row a user, in this order."""
    column, item, _ = CONFIGS[config.rpartition("_")[0]]
    return [
        {column: user, "input": f"Write {i}", "output": f"Text {i}", "profile": [item] * (i + 1)}
        for i, user in enumerate(users)
    ]


def write_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def topics(tmp_path, *rows, split="val"):
    """Load rows of topic writing that are written as JSON lines."""
    write_lines(tmp_path / f"topic_writing_user/{split}.jsonl", rows)
    return load_longlamp("topic_writing_user", split, tmp_path)


def post(**other):
    return {"author": "ann", "input": "Write", "output": "Text", "profile": [POST], **other}


# Copies in several forms


@pytest.mark.parametrize("config", SIX)
def test_each_config_loads_from_parquet_in_the_order_of_its_rows(tmp_path, config):
    rows = rows_of(config)
    write_parquet(tmp_path / config / "val-00001-of-00002.parquet", rows[2:])
    write_parquet(tmp_path / config / "val-00000-of-00002.parquet", rows[:2])
    write_parquet(tmp_path / config / "train-00000-of-00001.parquet", rows_of(config, ["no"]))
    item = CONFIGS[config.rpartition("_")[0]][2]
    assert load_examples(f"longlamp:{config}", root=tmp_path) == [
        Example("val-0", "bo", f"LongLaMP-{config}", "Write 0", "Text 0", (item,)),
        Example("val-1", "al", f"LongLaMP-{config}", "Write 1", "Text 1", (item,) * 2),
        Example("val-2", "cy", f"LongLaMP-{config}", "Write 2", "Text 2", (item,) * 3),
    ]
    train = load_examples(f"longlamp:{config}", "train", tmp_path)
    assert [example.user for example in train] == ["no"]


def _saved(root, config, rows):
    split = datasets.Dataset.from_list(rows)
    datasets.DatasetDict({"val": split, "test": split}).save_to_disk(str(root / config))


def _named_by_readme(root, config, rows):
    write_parquet(root / "files/some.parquet", rows)
    lines = ("---", "configs:", f"- config_name: {config}", "  data_files:", "  - split: val")
    (root / "README.md").write_text("\n".join((*lines, "    path: files/some.parquet", "---\n")))


FORMS = {
    "one Parquet file": lambda root, c, rows: write_parquet(root / c / "val.parquet", rows),
    "Parquet in a folder": lambda root, c, rows: write_parquet(root / c / "val/0.parquet", rows),
    "JSON lines": lambda root, c, rows: write_lines(root / c / "val.jsonl", rows),
    "save_to_disk": _saved,
    "a README that names the files": _named_by_readme,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_copy_holds_the_same_examples(tmp_path, capsys, form):
    config = "product_review_user"
    write_parquet(tmp_path / "usual" / config / "val-00000-of-00001.parquet", rows_of(config))
    FORMS[form](tmp_path / "other", config, rows_of(config))
    capsys.readouterr()
    found = load_longlamp(config, "val", tmp_path / "other")
    assert capsys.readouterr() == ("", "")  # no bars of `datasets`
    assert found == load_longlamp(f"LongLaMP-{config}", "val", tmp_path / "usual")


@pytest.mark.parametrize("form", [f for f in FORMS if "README" not in f])
def test_texts_that_look_like_dates_and_numbers_stay_as_they_are(tmp_path, form):
    items = [{**REVIEW, "summary": "2011-01-05", "overall": "5.0"}]
    row = {"reviewerId": "007", "input": "2011-01-05", "output": "1e5", "profile": items}
    FORMS[form](tmp_path, "product_review_user", [row])
    (example,) = load_longlamp("product_review_user", "val", tmp_path)
    assert (example.user, example.query, example.target) == ("007", "2011-01-05", "1e5")
    assert (example.profile[0]["summary"], example.profile[0]["overall"]) == ("2011-01-05", "5.0")


def test_odd_line_separators_inside_a_text_split_no_row(tmp_path):
    path = tmp_path / "topic_writing_user/val.jsonl"
    write_lines(path, [])
    text = "one\u2028two\u0085three"
    path.write_text(json.dumps(post(output=text), ensure_ascii=False) + "\n\n", encoding="utf-8")
    (example,) = load_longlamp("topic_writing_user", "val", tmp_path)
    assert example.target == text


# Users and items


def test_rows_that_name_no_user_are_joined_by_their_profiles(tmp_path):
    other = [{**POST, "content": "I swam."}]
    rows = [post(), post(author=None), post(author=" "), post(author=None, profile=other)]
    one, another = (f"LongLaMP-topic_writing_user:val-{number}" for number in (1, 3))
    assert [e.user for e in topics(tmp_path, *rows)] == ["ann", one, one, another]


def test_only_the_column_of_the_task_names_the_user(tmp_path):
    assert topics(tmp_path, post(name="x", reviewerId="y"))[0].user == "ann"


def test_a_row_keeps_its_own_id(tmp_path):
    assert [e.id for e in topics(tmp_path, post(id="a"), post(id=7), post())] == ["a", "7", "val-2"]


def test_sampled_users_keep_all_their_rows_in_order(tmp_path):
    config = "topic_writing_temporal"
    write_parquet(tmp_path / config / "test-0.parquet", rows_of(config, ("a", "b", "a", "c", "b")))
    drawn = [
        load_examples(f"longlamp:{config}", "test", tmp_path, users=2, seed=seed)
        for seed in range(8)
    ]
    everyone = load_examples(f"longlamp:{config}", "test", tmp_path)
    for examples in drawn:
        names = {example.user for example in examples}
        assert len(names) == 2
        assert examples == [example for example in everyone if example.user in names]
    assert len({tuple(e.id for e in examples) for examples in drawn}) > 1


def test_heads_are_found_and_measured_on_other_users(tmp_path):
    config = "topic_writing_temporal"
    write_parquet(tmp_path / config / "val-0.parquet", rows_of(config, ("a", "b", "a", "c", "b")))
    first, second = discovery_and_evaluation(f"longlamp:{config}", None, tmp_path, None, 1)
    assert {e.user for e in first} | {e.user for e in second} == {"a", "b", "c"}
    assert {e.user for e in first}.isdisjoint(e.user for e in second)
    assert len({e.user for e in second}) == 1


def test_the_newest_paper_is_the_most_recent_item(tmp_path):
    papers = [{**PAPER, "year": year} for year in (1999, 2021, 2012)]
    row = {"name": "ann", "input": "Write", "output": "Text", "profile": papers}
    write_parquet(tmp_path / "abstract_generation_user/val-0.parquet", [row])
    (example,) = load_longlamp("abstract_generation_user", "val", tmp_path)
    assert rank_profile(example, 3, "recency") == [1, 2, 0]


def test_a_field_without_a_value_is_an_empty_text(tmp_path):
    (example,) = topics(tmp_path, post(profile=[{**POST, "summary": None}]))
    assert example.profile == ({**POST, "summary": ""},)


def test_posts_may_be_named_as_in_the_authors_code(tmp_path):
    (example,) = topics(tmp_path, post(profile=[{"input": "A run", "output": "I ran far."}]))
    assert example.profile == ({"summary": "A run", "content": "I ran far."},)


# What is refused


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"author": "a", "text": "x", "output": "y", "profile": [POST]},
            "`input` is missing; columns found: author, text, output, profile",
        ),
        (post(output=None), "`output` is missing"),
        (post(profile=None), "`profile` is missing"),
        (post(output=" \n"), "`output` is empty; make a copy without the row"),
        (post(profile=[]), "`profile` is empty; make a copy without the row"),
        (post(profile="x"), "wanted `profile` to be a list of objects, got 'x'"),
        (post(profile=["x"]), "wanted `profile` to be a list of objects"),
        (
            post(profile=[POST, {"summary": "x", "text": "y"}]),
            "profile item 1 lacks content; fields found: summary, text",
        ),
        (post(profile=[{}]), "profile item 0 lacks summary, content; fields found: none"),
        (post(id="7"), "id '7' stands twice"),
    ],
)
def test_a_bad_row_is_refused_by_file_and_number(tmp_path, row, message):
    path = re.escape(str(tmp_path / "topic_writing_user/val.jsonl"))
    with pytest.raises(InputError, match=f"^{path}: row 1: {message}"):
        topics(tmp_path, post(id="7"), row)


def test_an_unknown_config_is_refused_with_the_six_there_are(tmp_path):
    with pytest.raises(InputError, match="unknown LongLaMP task 'email_user'") as refused:
        load_examples("longlamp:email_user", root=tmp_path)
    assert str(refused.value).split("known are ")[1].split(", ") == SIX
    assert [f"LongLaMP-{config}" for config in SIX] == list(LONGLAMP_TASKS)


def test_an_unknown_split_is_refused(tmp_path):
    with pytest.raises(InputError, match="split 'dev'; known are train, val, test"):
        load_examples("longlamp:topic_writing_user", "dev", tmp_path)


def test_a_split_that_the_copy_lacks_is_refused_with_those_it_has(tmp_path):
    config = "topic_writing_user"
    write_parquet(tmp_path / config / "train-0.parquet", rows_of(config))
    write_lines(tmp_path / config / "test.jsonl", rows_of(config))
    with pytest.raises(InputError, match="holds no split val; splits found here: train, test"):
        load_longlamp(config, "val", tmp_path)
    with pytest.raises(InputError, match="holds no split val; splits found here: none"):
        load_longlamp("product_review_user", "val", tmp_path)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such folder; --root names a local copy"):
        load_longlamp("topic_writing_user", "val", tmp_path / "nowhere")


def test_a_download_that_lacks_a_file_is_refused(tmp_path):
    config = "topic_writing_user"
    for part in (0, 2):
        write_parquet(tmp_path / config / f"val-0000{part}-of-00003.parquet", rows_of(config))
    with pytest.raises(InputError, match="2 of 3 files of split val are there; download the rest"):
        load_longlamp(config, "val", tmp_path)


def test_a_pointer_in_place_of_a_file_is_refused(tmp_path):
    path = tmp_path / "topic_writing_user/val-00000-of-00001.parquet"
    path.parent.mkdir()
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(InputError, match=r"split val can't be read: .* `git lfs pull`"):
        load_longlamp("topic_writing_user", "val", tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"input": ', "line 2: malformed JSON"),
        (b"\xff\xfe{", "line 2: malformed JSON"),
        (b"[1, 2]", "line 2: wanted an object, got b'\\[1, 2\\]'"),
    ],
)
def test_a_broken_line_is_refused_by_its_number(tmp_path, line, message):
    path = tmp_path / "topic_writing_user/val.jsonl"
    path.parent.mkdir()
    path.write_bytes(json.dumps(post()).encode() + b"\n" + line)
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}: {message}"):
        load_longlamp("topic_writing_user", "val", tmp_path)


def test_a_copy_without_rows_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"val\.jsonl: holds no rows"):
        topics(tmp_path)


# The hub


def test_without_a_connection_the_error_says_how_to_get_a_copy():
    with pytest.raises(InputError, match="can't be loaded from the hub") as refused:
        load_examples("longlamp:topic_writing_user")
    text = str(refused.value)
    assert text.startswith("LongLaMP/LongLaMP topic_writing_user val: ")
    assert "hf download LongLaMP/LongLaMP --repo-type dataset" in text
    assert "--root FOLDER" in text
    assert "\n" not in text


def test_the_hub_is_asked_for_config_split_and_revision(monkeypatch):
    asked = []

    def answer(*names, **options):
        asked.append((names, options))
        return datasets.Dataset.from_list(rows_of("product_review_temporal"))

    monkeypatch.setattr(datasets, "load_dataset", answer)
    examples = load_longlamp("product_review_temporal", "test", revision="abc")
    options = {"name": "product_review_temporal", "split": "test", "revision": "abc"}
    assert asked == [(("LongLaMP/LongLaMP",), options)]
    assert [example.user for example in examples] == ["bo", "al", "cy"]


def test_a_revision_of_a_local_copy_is_refused(tmp_path):
    with pytest.raises(InputError, match="revision 'abc' is one of the hub's"):
        load_longlamp("topic_writing_user", "val", tmp_path, revision="abc")


# Prompts

PROMPTS = {
    "abstract_generation": (
        '"We weigh stars." is the abstract for the title "Stars", and "We weigh stars." is the '
        'abstract for the title "Stars". Use the above abstracts as context to understand the '
        "style and language of the user and, Write 1\n"
    ),
    "product_review": (
        '"5.0" is a rating for the product with description "A red kettle". "Fine" is summary '
        'for "It boils.", and "5.0" is a rating for the product with description "A red kettle". '
        '"Fine" is summary for "It boils.". Following the given patterns Write 1\n'
    ),
    "topic_writing": (
        '"A run" is a summary for "I ran far.", and "A run" is a summary for "I ran far.". '
        "Following the given patterns, Write 1\n"
    ),
}


@pytest.mark.parametrize("config", SIX)
def test_a_prompt_shows_items_and_query_in_the_authors_words(tmp_path, config):
    write_parquet(tmp_path / config / "val-0.parquet", rows_of(config))
    example = load_longlamp(config, "val", tmp_path)[1]
    (prompt,) = build_prompts([example], Characters(), 10_000)
    assert Characters().decode(prompt.ids) == PROMPTS[config.rpartition("_")[0]]


@pytest.mark.parametrize("task", CONFIGS)
def test_a_prompt_of_long_items_fits_the_budget(tmp_path, task):
    config = f"{task}_user"
    _, item, _ = CONFIGS[task]
    long = {"abstract": "abstract", "reviewText": "reviewText", "content": "content"}
    field = next(name for name in long if name in item)
    items = [{**item, field: "the mayor builds a bridge . " * 1000} for _ in range(6)]
    write_parquet(
        tmp_path / config / "val-0.parquet",
        [{**rows_of(config)[0], "output": "the western " * 200, "profile": items}],
    )
    (example,) = load_longlamp(config, "val", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(testbed_path())
    (prompt,) = build_prompts([example], tokenizer, 4096, PromptSettings())
    assert 1900 < len(prompt.ids) <= 2048  # the budget is used, too
    assert (prompt.shortened_items, prompt.dropped_items) == (5, 0)
    assert len(prompt.target_ids) == 400


def test_papers_are_ranked_by_the_items_of_the_query_alone(tmp_path):
    papers = [{**PAPER, "title": "An abstract for the title"}, {**PAPER, "title": "Comets"}]
    query = 'Generate an abstract for the title "Stars" using the following items: 1. comets'
    row = {"name": "ann", "input": query, "output": "Text", "profile": papers}
    write_parquet(tmp_path / "abstract_generation_user/val-0.parquet", [row])
    (example,) = load_longlamp("abstract_generation_user", "val", tmp_path)
    assert rank_profile(example, 2) == [1, 0]


def test_posts_are_ranked_by_the_whole_query(tmp_path):
    posts = [{**POST, "content": "a slow walk"}, {**POST, "content": "a red bicycle"}]
    (example,) = topics(tmp_path, post(input="A bicycle trip: what to pack", profile=posts))
    assert rank_profile(example, 2) == [1, 0]


# Commands


def test_heads_are_scored_on_longlamp_from_the_command_line(tmp_path):
    config = "topic_writing_user"
    rows = [{**row, "output": "the western"} for row in rows_of(config, ("a", "b"))]
    write_parquet(tmp_path / "copy" / config / "val-0.parquet", rows)
    data = ("--data", f"longlamp:{config}", "--root", str(tmp_path / "copy"))
    done = run("score", *data, "-k", "3", "--out", "run", "--json", cwd=tmp_path)
    found = json.loads(done.stdout)
    assert "LongLaMP-topic_writing_user" in json.dumps(found)
    refused = run("score", *data, "--split", "dev", cwd=tmp_path, code=2)
    assert "unknown LongLaMP split 'dev'" in " ".join(refused.stderr.split())
