"""`workbench evaluate`: one command from a run of head scores to a table with intervals."""

from __future__ import annotations

import json
import re

import pytest
from test_cli import run
from typer.testing import CliRunner

from workbench.cli.commands import app
from workbench.data.sources import load_examples
from workbench.errors import InputError
from workbench.scores import HeadScores

TINY = ("--users", "3", "--validation-users", "2", "-k", "1,2", "--gamma", "0.5", "--seeds", "2")
TAGS = ("--tasks", "testbed-tag", "--max-new-tokens", "3")


def here(*arguments, code=0):
    """Run the command line in this process, in the working directory."""
    environment = {"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"}
    done = CliRunner().invoke(app, list(map(str, arguments)), env=environment)
    assert done.exit_code == code, done.output + repr(done.exception)
    return done


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the head scores of two discovery users."""
    folder = tmp_path_factory.mktemp("evaluate")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        here("score", "--users", "2", "-k", "3", "--out", "heads", "--json")
        yield folder


@pytest.fixture(scope="module")
def whole(home):
    """All methods on all tasks, by a process of its own."""
    return run("evaluate", "--heads", "heads", *TINY, "--out", "whole", cwd=home)


def test_evaluate_prints_a_table_a_task_in_80_columns(whole, home):
    for task in ("testbed-tag", "testbed-rating", "testbed-headline"):
        assert f"{task}: " in whole.stdout
    methods = ["plain", "no-profile", "cad", "dola", "decore", "random", "dps", "dps+cad"]
    first = whole.stdout.split("testbed-rating: ")[0]
    named = re.findall(r"^(\S+) +[-\d–]", first, re.MULTILINE)
    assert [name for name in named if name in methods] == methods * 3  # three tables
    assert max(map(len, whole.stdout.splitlines())) <= 80
    words = " ".join(whole.stdout.split())
    assert "accuracy (higher is better), strict reading; 6 examples of 3 users" in words
    assert "2 users of the validation split" in words
    assert "random: mean of 2 seeds, which lie at" in words
    assert (home / "whole/choices.json").is_file()


def test_json_is_the_table_and_nothing_is_written_again(whole, home):
    folder = home / "whole"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")}
    again = here("evaluate", "--heads", "heads", *TINY, "--out", "whole", "--json")
    found = json.loads(again.stdout)
    assert set(found) == {"run", "rows", "qualities", "findings", "protocol"}
    assert found["rows"] == json.loads((folder / "tables/evaluation.json").read_text())
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")} == before
    wide = [row for row in found["rows"] if row["primary"]]
    assert {row["examples"] for row in wide} == {6}
    assert f"{wide[0]['value']:.3f} [{wide[0]['low']:.3f}" in whole.stdout


def test_rows_are_in_the_order_of_the_methods(home):
    options = ("--methods", "random,plain,cad", "--out", "order", "--json")
    done = here("evaluate", "--heads", "heads", *TINY, *TAGS, *options)
    rows = [row for row in json.loads(done.stdout)["rows"] if row["primary"]]
    assert [row["method"] for row in rows] == ["plain", "random", "cad"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--methods", "plain,dsp"), "unknown method 'dsp'; known are plain, no-profile, cad"),
        (("--tasks", "testbed-tags"), "testbed holds no task testbed-tags"),
        (("-k", "0,4"), "K must be >= 1, got 0"),
        (("-k", "4,33"), "K must be between 1 and 32 (the model's heads), got 33"),
        (("-k", "four"), "-k: wanted numbers like 1,2,4, got 'four'"),
        (("--gamma", "0.5,-1"), "gamma must be >= 0, got -1.0"),
        (("--gamma", "0.5,H"), "--gamma: wanted numbers like 0.5,1, or entropy or entropy-share"),
        (("--items", "4"), "items 5 there, 4 here. Ask with theirs (--items 5), score heads with"),
        (("--split", "discovery"), "name another split, or ask for it by name: --same-examples"),
        (("--heads", "nowhere"), "nowhere: no such run folder"),
        (("--retrieval-heads", "heads/manifest.json"), "manifest.json"),
        (("--workers", "2"), "only with --ray"),
    ],
)
def test_what_cannot_work_is_told_in_a_line_before_a_folder_is_made(options, told, home):
    assert told in refused("--heads", "heads", *options)
    assert not (home / "no/manifest.json").exists()


def refused(*options):
    done = here("evaluate", *options, "--out", "no", code=1)
    assert isinstance(done.exception, InputError)
    return str(done.exception)


def test_methods_on_heads_need_a_run(home):
    told = refused("--methods", "cad,dps")
    assert told == "dps: needs --heads, the run folder of a `workbench score` or `probe`"
    options = ("--methods", "cad", "--out", "headless", *TINY, *TAGS)
    assert "cad" in here("evaluate", *options).stdout


def test_an_empty_test_split_is_refused(home):
    folder = home / "data/testbed-tag"
    folder.mkdir(parents=True)
    (folder / "empty_questions.json").write_text("[]")
    (folder / "empty_outputs.json").write_text('{"task": "testbed_tag", "golds": []}')
    options = ("--data", "lamp:testbed-tag", "--root", "data", "--split", "empty")
    assert "empty_questions.json: holds no rows" in refused("--heads", "heads", *options)


def test_examples_that_heads_were_found_on_are_marked_in_every_table(home):
    options = ("--split", "discovery", "--same-examples", "--methods", "cad,dps", "--out", "leak")
    done = run(*("evaluate", "--heads", "heads", *TINY, *TAGS, *options, "--users", "48"), cwd=home)
    for method in ("plain", "cad", "dps"):
        assert f"{method} †" in done.stdout
    words = " ".join(done.stdout.split())
    leaked = HeadScores.load(home / "heads").select(tasks=["testbed-tag"]).data.sizes["example"]
    assert f"LEAKED: heads were found on {leaked} of the test examples" in words
    assert "testbed-tag (LEAKED: heads were found on these examples or users)" in words
    assert json.loads((home / "leak/manifest.json").read_text())["settings"]["same_examples"]


def test_heads_of_other_prompts_serve_if_they_are_asked_for_by_name(home):
    options = ("--methods", "dps", "--items", "4", "--other-prompt", "--out", "other", "--json")
    done = here("evaluate", "--heads", "heads", *TINY, *TAGS, *options)
    told = "Heads were found with other prompts, as --other-prompt allows: items 5 there, 4 here."
    assert told in json.loads(done.stdout)["protocol"]


def test_gamma_takes_the_words_that_steer_takes(home):
    options = ("--methods", "cad", "--out", "words", "--json")
    few = ("--users", "1", "--validation-users", "1", "--gamma", "entropy,0.5, entropy-share")
    here("evaluate", *few, *TAGS, *options)
    choice = json.loads((home / "words/choices.json").read_text())["testbed-tag"]["cad"]
    assert [c["gamma"] for c in choice["candidates"]] == [0.5, "H/lnV", "H"]


def lamp_files(root):
    """Two LaMP tasks of six authors each, the second in a folder with a low line."""
    for folder, fields, golds in (
        ("LaMP-2", ("description", "tag"), ("comedy", "war")),
        ("LaMP_3", ("text", "score"), ("4", "5")),
    ):
        questions, outputs = [], []
        for i in range(6):
            items = [{"id": str(n), fields[0]: f"text {i} {n}", fields[1]: "4"} for n in range(2)]
            name = f"{folder[-1]}{i}"
            questions.append({"id": name, "input": f"Which one? review: {i}", "profile": items})
            outputs.append({"id": name, "output": golds[i % 2].replace("war", "violence")})
        (root / folder).mkdir(parents=True)
        (root / folder / "dev_questions.json").write_text(json.dumps(questions))
        (root / folder / "dev_outputs.json").write_text(json.dumps({"golds": outputs}))


def test_several_lamp_tasks_are_one_run_and_one_family_of_tests(home):
    lamp_files(home / "lamp")
    (home / "lamp/LaMP-1").mkdir()  # not asked for, and without files
    data = ("--data", "lamp", "--root", "lamp", "--tasks", "LaMP-2,LaMP-3")
    here("score", *data, "--users", "4", "-k", "2", "--out", "lamp-heads", "--json")
    scored = HeadScores.load(home / "lamp-heads").data
    assert set(scored["task"].values.tolist()) == {"LaMP-2", "LaMP-3"}
    few = ("-k", "1", "--gamma", "0.5", "--max-new-tokens", "2", "--methods", "cad,dps")
    options = ("--validation-users", "4", "--out", "lamp-run", "--seed", "1")
    done = here("evaluate", *data, "--heads", "lamp-heads", *few, *options, "--json")
    rows = [row for row in json.loads(done.stdout)["rows"] if row["primary"]]
    assert [(row["task"], row["method"]) for row in rows] == [
        (task, method) for task in ("LaMP-2", "LaMP-3") for method in ("plain", "cad", "dps")
    ]
    tested = [row for row in rows if row["p"] is not None]
    smallest = min(tested, key=lambda row: row["p"])
    assert smallest["p_holm"] == min(1, smallest["p"] * len(tested))
    assert len(tested) == 4
    titles = [
        one["title"] for one in json.loads(here("tables", "lamp-run", "--json").stdout)["tables"]
    ]
    assert titles[:2] == ["Table 2. Classification", "Table 2. Rating"]


def test_lamp_without_tasks_is_what_its_folder_holds(home):
    lamp_files(home / "lamp2")
    found = load_examples("lamp", root=home / "lamp2")
    assert [e.task for e in found] == ["LaMP-2"] * 6 + ["LaMP-3"] * 6
    twice = load_examples("lamp", root=home / "lamp2", tasks=["LaMP-3", "LaMP-3"])
    assert [e.name for e in twice] == [f"LaMP-3/3{i}" for i in range(6)]
    for tasks, told in (
        (["LaMP-9"], "lamp holds no task LaMP-9; known are LaMP-1"),
        (["LaMP-4"], "holds no folder LaMP-4 or LaMP_4"),
    ):
        with pytest.raises(InputError, match=told):
            load_examples("lamp", root=home / "lamp2", tasks=tasks)
    with pytest.raises(InputError, match="holds no LaMP task folder"):
        load_examples("lamp", root=home / "heads")


STOP = """
import os, signal
from workbench.evaluation import writing
real, calls = writing.write_rows, []
def write(*arguments):
    calls.append(arguments)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.{name})
    real(*arguments)
writing.write_rows = write
"""


@pytest.mark.parametrize(("name", "code", "kept"), [("SIGINT", 130, 3), ("SIGKILL", -9, 2)])
def test_a_run_that_was_stopped_or_killed_goes_on(name, code, kept, home):
    out = f"stopped-{name}"
    options = ("--heads", "heads", *TINY, *TAGS, "--methods", "dps,cad", "--out", out)
    done = run("evaluate", *options, cwd=home, code=code, first=STOP.format(name=name))
    if name == "SIGINT":
        assert f"stopped; 3 finished shards are kept in {out}. Run the same" in done.stderr
    shards = [*(home / out).glob("answers/*/*/*.parquet")]
    shards += (home / out).glob("validation/*/*/*.parquet")
    before = {path: path.stat().st_mtime_ns for path in shards}
    assert len(before) == kept
    table = json.loads(here("evaluate", *options, "--json").stdout)["rows"]
    assert {path: path.stat().st_mtime_ns for path in shards} == before
    unbroken = (*options[:-1], f"whole-{name}", "--json")
    assert json.loads(here("evaluate", *unbroken).stdout)["rows"] == table
