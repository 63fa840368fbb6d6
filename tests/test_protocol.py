"""Who is asked: users the data doesn't name, users who recur by design, and answers that change."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace

import pandas as pd
import pytest

import workbench as wb
from workbench.data.prompts import build_prompts
from workbench.data.testbed import testbed_path
from workbench.evaluation.grid import evaluate
from workbench.evaluation.protocol import Asked, Found, ask
from workbench.evaluation.record import manifest_of
from workbench.evaluation.settings import GridSettings
from workbench.probe import discovery_and_evaluation

CORPUS = testbed_path() / "corpus"
TAG = "testbed-tag"
PLAIN = GridSettings(methods=("plain",), max_new_tokens=2)


@dataclass
class Known:
    """Scores of which only the rows matter here."""

    data: dict[str, pd.Series]


def found_on(*examples):
    names = [(e.name, e.task, e.user) for e in examples]
    columns = zip(("example", "task", "user"), zip(*names, strict=True), strict=True)
    return Known({name: pd.Series(column) for name, column in columns})


def write_lamp(root, authors, task="LaMP-4", split="dev", first=0):
    """Official files: a row for each name in `authors`, whose profile tells the author alone."""
    folder = root / task
    folder.mkdir(parents=True, exist_ok=True)
    rows, golds = [], []
    for number, author in enumerate(authors, first):
        fields = ("title", "text") if task == "LaMP-4" else ("title", "abstract")
        items = [
            {"id": f"{number}{i}", **dict.fromkeys(fields, f"the western of {author} {i}")}
            for i in range(4)
        ]
        # Each row leaves out another item, as the row's own text does.
        rows.append({"id": str(number), "input": "Write: x", "profile": items[: 3 + number % 2]})
        golds.append({"id": str(number), "output": "the western"})
    (folder / f"{split}_questions.json").write_text(json.dumps(rows))
    (folder / f"{split}_outputs.json").write_text(json.dumps({"golds": golds}))
    return {"source": f"lamp:{task}", "root": root}


def users(examples):
    return {example.user for example in examples}


# LaMP, whose rows name no user


def test_an_author_s_other_rows_are_left_out_when_one_served_for_the_heads(tmp_path):
    data = write_lamp(tmp_path, "abcabcabc")
    rows = wb.load_examples(data["source"], root=tmp_path)
    asked = ask(**data, scores=found_on(rows[4]))
    assert rows[4].user == "LaMP-4:1"
    groups = users(asked.validation), users(asked.test)
    assert sorted(map(sorted, groups)) == [["LaMP-4:0"], ["LaMP-4:2"]]
    assert (asked.left_out, len(asked.validation), len(asked.test)) == (1, 3, 3)
    one_example = Asked([rows[0]], [rows[1]], "dev", "dev", 0, frozenset())
    with pytest.raises(wb.InputError, match="heads were found on this example or on its user"):
        one_example.check(found_on(rows[4]))  # another row of the author of rows[1]


def test_one_author_in_both_groups_is_refused(tmp_path):
    data = write_lamp(tmp_path, "abab")
    rows = wb.load_examples(data["source"], root=tmp_path)
    with pytest.raises(wb.InputError, match=r"LaMP-4:0.* in the validation and in the test group"):
        Asked(rows[:1], rows[2:3], "dev", "dev", 0, frozenset()).check(None)


def test_equal_row_ids_of_two_tasks_name_two_users(tmp_path):
    write_lamp(tmp_path, "ab")
    write_lamp(tmp_path, "xy", task="LaMP-5")
    one, other = (wb.load_examples(f"lamp:{t}", root=tmp_path) for t in ("LaMP-4", "LaMP-5"))
    assert [e.id for e in one] == [e.id for e in other]
    assert not users(one) & users(other)
    assert not any(example in Found(found_on(*other)) for example in one)
    assert all(example in Found(found_on(*one)) for example in one)
    assert replace(one[0], user="by another name") in Found(found_on(one[0]))


def test_an_author_in_two_files_is_one_user(tmp_path):
    data = write_lamp(tmp_path, "b", first=100)
    options = {**data, "split": "dev", "validation_split": "train"}
    write_lamp(tmp_path, "bcc", split="train")
    with pytest.raises(wb.InputError, match=r"\(user LaMP-4:100\) is in the validation and in"):
        ask(**options, scores=None)
    train = wb.load_examples(data["source"], "train", tmp_path)
    assert train[0].user == "LaMP-4:0"  # b, by the other file's row
    with pytest.raises(wb.InputError, match=r"LaMP-4/100 .*heads were found on this example or on"):
        ask(**options, scores=found_on(train[0]))
    write_lamp(tmp_path, "cdd", split="train")
    asked = ask(**options, scores=found_on(train[0]))
    assert (asked.left_out, users(asked.validation)) == (1, {"LaMP-4:1"})
    assert users(asked.test) == {"LaMP-4:100"}


def test_a_person_is_known_in_another_task():
    named = wb.load_examples("testbed", "test", users=2)
    found = Found(found_on(*(e for e in named if e.task == TAG)))
    assert all(example in found for example in named)
    assert not any(e in found for e in wb.load_examples("testbed", "validation", users=2))


# LongLaMP

COLUMNS = {"abstract_generation": "name", "product_review": "reviewerId", "topic_writing": "author"}
ITEM = dict.fromkeys(
    ("title", "abstract", "overall", "description", "summary", "reviewText", "content"), "x"
)
SIX = [f"{task}_{setting}" for task in COLUMNS for setting in ("user", "temporal")]


def write_longlamp(root, config, **splits):
    """A row a user for each letter of a split; files as the hub has them, rows without an id."""
    column = COLUMNS[config.rpartition("_")[0]]
    (root / config).mkdir(parents=True, exist_ok=True)
    for split, names in splits.items():
        rows = [{column: n, "input": "Write", "output": "Text", "profile": [ITEM]} for n in names]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (root / config / f"{split}.jsonl").write_text(lines)
    return {"source": f"longlamp:{config}", "root": root}


@pytest.mark.parametrize("config", SIX)
def test_each_config_of_longlamp_can_be_asked(tmp_path, config):
    recur = config.endswith("_temporal")
    names = ("abc", "abc", "abc") if recur else ("abc", "def", "ghi")
    data = write_longlamp(
        tmp_path, config, **dict(zip(("train", "val", "test"), names, strict=True))
    )
    heads = found_on(*wb.load_examples(data["source"], "train", tmp_path))
    asked = ask(**data, scores=heads)
    task = f"LongLaMP-{config}"
    assert [e.name for e in asked.validation] == [f"{task}/val-{i}" for i in range(3)]
    assert [e.name for e in asked.test] == [f"{task}/test-{i}" for i in range(3)]
    assert users(asked.test) == set(names[2])
    assert (asked.leaked, asked.left_out) == (frozenset(), 0)
    assert (asked.users_recur, asked.users_inferred) == (recur, False)


def test_users_of_a_config_that_keeps_them_apart_may_not_recur(tmp_path):
    data = write_longlamp(tmp_path, "topic_writing_user", train="ax", val="bc", test="ade")
    heads = found_on(wb.load_examples(data["source"], "train", tmp_path)[0])
    with pytest.raises(wb.InputError, match=r"test-0 \(user a\): heads were found on"):
        ask(**data, scores=heads)
    write_longlamp(tmp_path, "topic_writing_user", val="ab")
    with pytest.raises(wb.InputError, match=r"test-0 \(user a\) is in the validation and in"):
        ask(**data, scores=None)


def test_examples_of_a_temporal_config_are_kept_apart(tmp_path):
    data = write_longlamp(tmp_path, "topic_writing_temporal", val="abc", test="abc")
    test = wb.load_examples(data["source"], "test", tmp_path)
    val = wb.load_examples(data["source"], "val", tmp_path)
    with pytest.raises(wb.InputError, match=r"test-1 .*heads were found on"):
        ask(**data, scores=found_on(test[1]))
    marked = ask(**data, scores=found_on(test[1]), same_examples=True)
    assert marked.leaked == {test[1].name}
    # Heads from validation examples: their users leave the validation group, not the later texts.
    asked = ask(**data, scores=found_on(val[0]))
    assert (users(asked.validation), users(asked.test)) == (set("bc"), set("abc"))
    with pytest.raises(wb.InputError, match="in the validation and in the test group"):
        Asked(test, test, "test", "val", 0, frozenset()).check(None)


def test_within_one_split_users_of_a_temporal_config_are_kept_apart(tmp_path):
    data = write_longlamp(tmp_path, "topic_writing_temporal", train="az", test="abcabcabc")
    splits = {"split": "test", "validation_split": "test"}
    rows = wb.load_examples(data["source"], "test", tmp_path)
    asked = ask(**data, **splits, scores=found_on(rows[0]))
    assert users(asked.validation) | users(asked.test) == set("bc")
    assert not users(asked.validation) & users(asked.test)
    earlier = wb.load_examples(data["source"], "train", tmp_path)
    asked = ask(**data, **splits, scores=found_on(*earlier))
    assert (users(asked.validation) | users(asked.test), asked.left_out) == (set("abc"), 0)
    with pytest.raises(wb.InputError, match="in the validation and in the test group"):
        Asked(rows[:1], rows[3:4], "test", "test", 0, frozenset()).check(None)


def test_a_user_recurs_by_design_in_the_same_task_only(tmp_path):
    other = write_longlamp(tmp_path, "topic_writing_user", train="a")
    data = write_longlamp(tmp_path, "topic_writing_temporal", train="a", val="b", test="a")
    heads = found_on(*wb.load_examples(other["source"], "train", tmp_path))
    with pytest.raises(wb.InputError, match=r"test-0 \(user a\): heads were found on"):
        ask(**data, scores=heads)


# What --same-examples allows


def test_same_examples_keep_validation_and_test_users_apart():
    one, *others = [e for e in wb.load_examples("testbed", "test", users=1) if e.task == TAG]
    for allowed in (False, True):
        asked = Asked([one], others, "test", "test", 0, frozenset(), same_examples=allowed)
        with pytest.raises(wb.InputError, match="is in the validation and in the test group"):
            asked.check(found_on(one) if allowed else None)


def test_same_examples_allow_heads_found_on_either_group():
    validation, test = (wb.load_examples("testbed", s, users=1) for s in ("validation", "test"))
    names = frozenset(example.name for example in test)
    asked = Asked(validation, test, "test", "validation", 0, names, same_examples=True)
    asked.check(found_on(*validation, *test))
    with pytest.raises(wb.InputError, match="heads were found on this example"):
        replace(asked, same_examples=False).check(None)  # known to be leaked


# What the folder keeps


def manifest(model, asked):
    groups = {"validation": asked.validation, "test": asked.test}
    prompts = {name: build_prompts(g, model.tokenizer, 512) for name, g in groups.items()}
    return manifest_of(model, PLAIN, asked, prompts, {}, None)


def test_the_manifest_says_whose_names_were_inferred_and_who_recurs(tmp_path, testbed_model):
    lamp = ask(**write_lamp(tmp_path, "ababcc"), scores=None)
    wanted = {"users_inferred": True, "users_recur": False}
    assert wanted.items() <= manifest(testbed_model, lamp).items()
    data = write_longlamp(tmp_path, "topic_writing_temporal", val="a", test="a")
    wanted = {"users_inferred": False, "users_recur": True}
    assert wanted.items() <= manifest(testbed_model, ask(**data, scores=None)).items()
    testbed = ask("testbed", None, users=1, validation_users=1)
    wanted = {"users_inferred": False, "users_recur": False}
    assert wanted.items() <= manifest(testbed_model, testbed).items()


def test_a_run_goes_on_with_the_golds_it_began_with_only(tmp_path, testbed_model):
    shutil.copytree(CORPUS / TAG, tmp_path / TAG)
    options = {"users": 2, "validation_users": 1, "validation_split": "validation"}
    data = {"source": f"lamp:{TAG}", "root": tmp_path, "split": "test", **options}

    def run():
        asked = ask(**data, scores=None)
        return evaluate(testbed_model, asked, tmp_path / "run", PLAIN, progress=False)

    first = run()
    assert run().examples["target"].tolist() == first.examples["target"].tolist()
    path = tmp_path / TAG / "test_outputs.json"
    golds = json.loads(path.read_text())
    for gold in golds["golds"]:
        gold["output"] = "sport" if gold["output"] == "war" else "war"
    path.write_text(json.dumps(golds))
    with pytest.raises(wb.InputError, match="other settings"):
        run()


def test_style_and_everything_else_that_is_kept_of_an_example_is_in_the_digest(testbed_model):
    asked = ask("testbed", None, tasks=["testbed-headline"], users=1, validation_users=1)
    first, *others = asked.test

    def digest(**change):
        changed = replace(asked, test=[replace(first, **change), *others])
        return manifest(testbed_model, changed)["settings"]["data_sha256"]["test"]

    same = digest()
    assert digest() == same
    assert first.style
    for change in ({"style": {}}, {"target": "x"}, {"user": "x"}, {"id": "x"}):
        assert digest(**change) != same


# Who a probe measures on


@pytest.mark.parametrize(
    ("asked", "got"),
    [((None, None), (3, 3)), ((4, None), (4, 2)), ((2, 3), (2, 3)), ((None, 1), (5, 1))],
)
def test_a_probe_measures_on_as_many_users_as_are_left(tmp_path, asked, got):
    data = write_lamp(tmp_path, "abcdefabcdef")
    first, second = discovery_and_evaluation(data["source"], "dev", tmp_path, *asked)
    assert (len(users(first)), len(users(second))) == got
    assert (len(first), len(second)) == (2 * got[0], 2 * got[1])
    assert not users(first) & users(second)


def test_a_probe_measures_on_forty_users_where_there_are_more(tmp_path):
    authors = [f"author {i}" for i in range(90)]
    data = write_lamp(tmp_path, authors)
    for asked, left in ((None, 50), (3, 3)):
        first, second = discovery_and_evaluation(data["source"], "dev", tmp_path, asked)
        assert (len(first), len(second)) == (left, 40)
    _, second = discovery_and_evaluation("testbed", None, None, 1)
    assert len(users(second)) == 40


@pytest.mark.parametrize("asked", [(6, None), (7, None), (3, 4), (None, 6), (0, None)])
def test_a_probe_refuses_users_that_are_not_there(tmp_path, asked):
    data = write_lamp(tmp_path, "abcdef")
    with pytest.raises(wb.InputError, match=r"LaMP-4 has 6 users; .* don't fit in. Lower --users"):
        discovery_and_evaluation(data["source"], "dev", tmp_path, *asked)


def test_a_small_corpus_of_the_testbed_is_measured_on_whole(tmp_path):
    shutil.copytree(CORPUS, tmp_path / "corpus")
    for task in (path.name for path in (tmp_path / "corpus").glob("testbed-*")):
        questions = tmp_path / "corpus" / task / "validation_questions.json"
        outputs = questions.with_name("validation_outputs.json")
        rows = json.loads(questions.read_text())
        few = list(dict.fromkeys(row["user_id"] for row in rows))[:3]
        rows = [row for row in rows if row["user_id"] in few]
        golds = json.loads(outputs.read_text())
        kept = {row["id"] for row in rows}
        golds["golds"] = [gold for gold in golds["golds"] if gold["id"] in kept]
        questions.write_text(json.dumps(rows))
        outputs.write_text(json.dumps(golds))
    _, second = discovery_and_evaluation("testbed", None, tmp_path / "corpus", 2)
    assert len(users(second)) == 3
    with pytest.raises(wb.InputError, match="asked for 4 users, the data has 3"):
        discovery_and_evaluation("testbed", None, tmp_path / "corpus", 2, 4)
