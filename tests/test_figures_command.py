"""`workbench figures`: of a scoring, of two runs, of files in the authors' format."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

import workbench as wb
from workbench.cli.commands import app
from workbench.cli.pictures import _file_names
from workbench.data.official import read_official


@pytest.fixture(scope="module")
def runs(tmp_path_factory, testbed_model):
    """Scores of two models on the same examples."""
    folder = tmp_path_factory.mktemp("runs")
    examples = wb.load_examples("testbed", users=4)
    small = wb.load_model("testbed-small", device="cpu")
    for name, model in (("base", testbed_model), ("small", small)):
        wb.score_heads(model, examples, folder=folder / name, progress=False)
    return folder


@pytest.fixture(autouse=True)
def no_browser(monkeypatch):
    monkeypatch.setenv("BROWSER_PATH", "/nowhere/chromium")


def figures(*arguments):
    done = CliRunner().invoke(app, ["figures", *map(str, arguments), "--json"])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return json.loads(done.stdout)


def names(found):
    return {path.rsplit("/", 1)[-1] for path in found["written"]}


def test_scores_alone_give_their_heads_and_how_firm_they_are(runs):
    found = figures(runs / "base", "-k", 4)
    assert {"figure-3-user-heatmaps.html", "recurrence.html", "recurrence.csv"} <= names(found)
    assert "figure-7-examples.html" in names(found)
    assert any("of the top 4 heads" in line for one in found["lines"].values() for line in one)
    assert "no Chrome or Chromium was found" in found["note"]


def test_two_runs_are_compared(runs):
    found = figures(runs / "base", runs / "small", "-k", 4)
    assert "transfer-small.html" in names(found)
    assert (runs / "base/compared/transfer-small.html").is_file()
    assert any("small" in line for line in found["compared"])


def test_files_in_the_authors_format_are_written_and_drawn(runs, tmp_path):
    figures(runs / "base", "-k", 4, "--export-official", tmp_path / "files")
    scores = wb.HeadScores.load(runs / "base")
    read = read_official(tmp_path / "files")
    assert set(read.tasks) == set(scores.data["task"].values.tolist())
    mean = scores.select(tasks=["testbed-tag"]).data["pcs"].mean("example")
    (group,) = read.tasks["testbed-tag"].values()
    # JSON keeps every digit of a float; the mean is taken over float32 here.
    np.testing.assert_allclose(group.mean, mean, atol=1e-7)
    found = figures("--official", tmp_path / "files", "--out", tmp_path / "drawn")
    assert {"figure-7-testbed-tag.csv", "resolution-testbed-tag.csv"} <= names(found)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "name a run folder, or --official"),
        (["--paper"], "are about a run"),
        (["--export-official", "x"], "are about a run"),
        (["nowhere"], "nowhere"),
        (["--official", "nowhere"], "nowhere"),
    ],
)
def test_what_can_not_be_drawn_is_refused(arguments, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(wb.InputError, match=told):
        figures(*arguments)
    assert list(tmp_path.iterdir()) == []


def test_the_papers_format_is_of_a_probe_only(runs):
    with pytest.raises(wb.InputError, match="the probe isn't finished"):
        figures(runs / "base", "--paper")


def test_names_become_file_names_no_two_alike():
    names = ["my run", "my-run", "my run", "a/b", "plain"]
    assert _file_names(names) == ["my-run", "my-run-2", "my-run-3", "a-b", "plain"]
