"""How a probe keeps its steps, and how its tables become flat ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import xarray as xr

from workbench import tables
from workbench.data.sources import load_examples
from workbench.errors import InputError
from workbench.models import load_model
from workbench.probe import examination, results
from workbench.probe.settings import ProbeSettings
from workbench.probe.steps import Step
from workbench.probe.work import Work, whole


def test_columns_along_other_dimensions_become_tables_of_their_own():
    table = xr.Dataset(
        {
            "plain": ("task", [1.0, 2.0]),
            "dps": (("task", "k"), [[1.0, 2.0], [3.0, 4.0]]),
            "draws": (("task", "k", "draw"), np.arange(12.0).reshape(2, 2, 3)),
            "nested": (("task", "k", "other"), np.arange(8.0).reshape(2, 2, 2)),
        },
        coords={"task": ["a", "b"], "k": [1, 2], "other": [1, 2]},
    )
    found = tables.frames(table)
    assert set(found) == {"draw", "other"}
    assert len(found["draw"]) == 12
    assert set(found["draw"].columns) == {"task", "k", "draw", "plain", "dps", "draws"}
    row = found["other"].query("task == 'b' and k == 2 and other == 1").iloc[0]
    assert (row["plain"], row["dps"], row["nested"]) == (2.0, 4.0, 6.0)


def test_a_single_table_has_no_name_and_no_rows_of_heads_that_are_not_there():
    table = xr.Dataset({"pcs": (("layer", "head"), [[0.0, np.nan], [1.0, 2.0]])})
    found = tables.frames(table)
    assert list(found) == [""]
    assert len(found[""]) == 3


def test_the_same_dimensions_in_another_order_are_one_table():
    table = xr.Dataset({"a": (("x", "y"), [[1.0, 2.0]]), "b": (("y", "x"), [[3.0], [4.0]])})
    (frame,) = tables.frames(table).values()
    assert frame[["a", "b"]].values.tolist() == [[1.0, 3.0], [2.0, 4.0]]


def test_a_kept_table_is_not_made_again_unless_what_it_is_made_of_changed(tmp_path):
    made = []

    def make():
        made.append(1)
        column = ("task", [float(len(made)), np.nan], {"gap": np.nan})
        return xr.Dataset({"x": column}, coords={"task": ["a", "b"]}, attrs={"mean": np.nan})

    first = results.kept(tmp_path, "step", "one", make)
    again = results.kept(tmp_path, "step", "one", make)
    assert len(made) == 1
    xr.testing.assert_identical(first, again)
    assert np.isnan([again.attrs["mean"], again["x"].attrs["gap"]]).all()
    assert float(results.kept(tmp_path, "step", "two", make)["x"][0]) == 2


@pytest.mark.parametrize(
    ("settings", "told"),
    [({"depth": "deep"}, "quick or full"), ({"cluster_users": 0}, "at least 1 user")],
)
def test_settings_that_mean_nothing_are_refused(settings, told):
    with pytest.raises(ValueError, match=told):
        ProbeSettings(**settings)


def test_variants_are_scored_on_whole_users_drawn_from_the_seed(tmp_path):
    examples = load_examples("testbed", users=30)

    def drawn(seed, some=examples):
        settings = ProbeSettings(seed=seed)
        work = Work(None, some, (), (), None, tmp_path, settings, (), None, False)
        return work.sample

    sample = drawn(0)
    users = {example.user for example in sample}
    assert len(users) == ProbeSettings().effort.sample == 16
    assert sample == [example for example in examples if example.user in users]
    assert sample == drawn(0) != drawn(1)
    few = [example for example in examples if example.user == examples[0].user]
    assert drawn(0, few) == few


def test_full_measures_all_that_quick_does_and_more():
    quick, full = (ProbeSettings(depth=depth).effort for depth in ("quick", "full"))
    assert set(quick.counterfactuals) < set(full.counterfactuals)
    assert "stranger" in quick.counterfactuals  # what the verdict is about
    assert quick.resamples < full.resamples


def fake_step(name, made, needs=(), wrong="", depths=("quick", "full")):
    def make(work):
        made.append(name)
        if wrong:
            raise InputError(wrong)
        return xr.Dataset({"x": ("task", [1.0])}, coords={"task": ["a"]})

    return Step(name, name, "heads", make, lambda table, work: [name], depths, needs)


def test_a_step_that_can_not_be_done_is_named_and_the_others_go_on(tmp_path, monkeypatch):
    made, said = [], []
    steps = (
        fake_step("first", made),
        fake_step("broken", made, wrong="needs two users"),
        fake_step("after", made, needs=("broken",)),
        fake_step("long", made, depths=("full",)),
        fake_step("last", made, needs=("first",)),
    )
    monkeypatch.setattr(examination, "STEPS", steps)

    def examine(made_of, depth="quick"):
        settings = ProbeSettings(depth=depth)
        work = Work(None, (), (), (), None, tmp_path, settings, (), None, False)
        return examination._examine(work, made_of, said.append), set(work.tables)

    left_out, found = examine(["model"])
    assert left_out == {"broken": "needs two users", "after": "needs broken"}
    assert found == {"first", "last"}
    assert made == ["first", "broken", "last"]
    assert "  left out: needs two users" in said
    # The same again makes only what could not be made; another model makes all of it.
    made.clear()
    examine(["model"])
    assert made == ["broken"]
    examine(["another model"])
    assert made == ["broken", "first", "broken", "last"]
    assert "long" in examine(["model"], "full")[1]


def test_other_settings_score_in_another_folder_and_the_same_in_the_same(tmp_path):
    model = load_model("testbed-small", device="cpu")
    examples = load_examples("testbed", users=2)[:4]
    settings = ProbeSettings()

    def run(some):
        work = Work(model, some, (), (), None, tmp_path, settings, (), None, False)
        return work.scored("neutral", some)

    assert run(examples).data.sizes["example"] == 4
    assert run(examples[:2]).data.sizes["example"] == 2
    run(examples)
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_a_digest_of_examples_sees_what_no_prompt_shows():
    (example,) = load_examples("testbed", users=1)[:1]
    other = replace(example, profile=(*example.profile[:-1], {"description": "x", "tag": "y"}))
    assert whole([example]) == whole([replace(example)])
    assert whole([example]) != whole([other])
    assert whole([example]) != whole([replace(example, style={"opener": "hey"})])


def test_a_task_without_heads_is_refused_before_work_begins(testbed_model, tmp_path):
    examples = load_examples("testbed", users=2)
    tags = [e for e in examples if e.task == "testbed-tag"]
    with pytest.raises(InputError, match="no discovery user has examples of testbed-headline"):
        examination.probe(testbed_model, tags, examples, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
