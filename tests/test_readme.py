"""The README's tables are those of stored results, and nothing in them is typed by hand."""

from __future__ import annotations

import copy
import json

import pytest

from workbench import readme
from workbench.errors import InputError

ROW = {
    "task": "testbed-tag",
    "metric": "accuracy",
    "better": "higher",
    "reading": "strict",
    "primary": True,
    "examples": 48,
    "users": 24,
    "seeds": 1,
    "settings": "",
    "note": "",
    "seed_min": None,
    "difference": None,
}
ROWS = [
    {**ROW, "method": "plain", "value": 0.8, "low": 0.7, "high": 0.9},
    {
        **ROW,
        **{"method": "random", "value": 0.75, "low": 0.6, "high": 0.85, "settings": "K 4, γ 1/2/1"},
        **{"seeds": 3, "seed_min": 0.7, "seed_max": 0.8},
        **{"difference": -0.05, "difference_low": -0.1, "difference_high": 0.0, "p_holm": 0.0004},
    },
    {**ROW, "method": "dola", "value": None, "note": "the model has 1 block"},
    {**ROW, "method": "plain", "primary": False, "value": 0.1, "low": 0.0, "high": 0.2},
]
FOUND = {"rows": ROWS, "findings": ["nothing is shown."], "protocol": ["24 users.", "p: paired."]}


@pytest.fixture
def stored(tmp_path):
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps(FOUND))
    return path


def test_an_evaluation_becomes_a_table_a_task(stored):
    assert readme.evaluation_tables(stored) == "\n".join(
        [
            "**testbed-tag**: accuracy (↑), strict reading, 48 examples of 24 users",
            "",
            "| method | value | minus plain | p (Holm) | chosen on validation |",
            "| --- | --- | --- | --- | --- |",
            "| plain | 0.800 [0.700, 0.900] | – | – |  |",
            "| random | 0.750 [0.600, 0.850], 3 sets: 0.700 to 0.800 | -0.050 [-0.100, +0.000] "
            "| < .001 | K 4, γ 1/2/1 |",
            "| dola | – | – | – | the model has 1 block |",
            "",
            "- nothing is shown.",
            "",
            "*24 users. p: paired.*",
        ]
    )


def test_both_evaluations_stand_between_the_markers(stored, tmp_path):
    other = copy.deepcopy(FOUND)
    other["findings"] = ["shared shows nothing either."]
    (tmp_path / "shared.json").write_text(json.dumps(other))
    text = "a\n<!-- evaluation tables: begin -->\nold\n<!-- evaluation tables: end -->\nb\n"
    new = readme.with_evaluation(text, stored, tmp_path / "shared.json")
    assert new.startswith("a\n<!--") and new.endswith("-->\nb\n")
    assert "old" not in new
    assert new.index("nothing is shown") < new.index('prefill="shared"') < new.index("either")
    assert readme.with_evaluation(new, stored, tmp_path / "shared.json") == new


def test_what_is_no_evaluation_is_refused(stored, tmp_path):
    (tmp_path / "other.json").write_text('{"rows": [{"primary": true}]}')
    with pytest.raises(InputError, match=r"other\.json: not what `workbench evaluate --json`"):
        readme.evaluation_tables(tmp_path / "other.json")
    with pytest.raises(InputError, match="needs the markers"):
        readme.with_evaluation("no markers", stored, stored)


def test_the_readmes_evaluation_is_that_of_the_stored_results(root):
    text = (root / "README.md").read_text(encoding="utf-8")
    results = root / "data/testbed/results"
    files = (results / "evaluation.json", results / "evaluation-shared.json")
    assert readme.with_evaluation(text, *files) == text


def test_findings_stand_under_their_titles(tmp_path):
    for name in readme.EXAMINED:
        key = "headline" if name.startswith("examination") else "lines"
        key = "compared" if name.startswith("transfer") else key
        (tmp_path / name).write_text(json.dumps({key: [f"found in {name}"]}))
    text = "a\n<!-- examination: begin -->\nold\n<!-- examination: end -->\nb\n"
    new = readme.with_examination(text, tmp_path)
    assert "old" not in new
    places = [new.index(f"**{t}**\n\n- found in {name}") for name, t in readme.EXAMINED.items()]
    assert places == sorted(places)
    (tmp_path / "planted.json").write_text("[]")
    with pytest.raises(InputError, match=r"planted\.json: holds no findings"):
        readme.with_examination(text, tmp_path)


def test_the_readmes_findings_are_those_of_the_stored_results(root):
    text = (root / "README.md").read_text(encoding="utf-8")
    assert readme.with_examination(text, root / "data/testbed/results") == text
