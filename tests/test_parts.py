"""Scoring part by part gives what scoring at once gives."""

import numpy as np
import pytest

import workbench as wb
from workbench.discovery.parts import joined, score_in_parts


@pytest.fixture(scope="module")
def examples():
    return wb.load_examples("testbed", users=2)[:20]


def test_parts_add_up_to_the_whole(testbed_model, examples):
    whole = wb.score_heads(testbed_model, examples, progress=False)
    parts = list(score_in_parts(testbed_model, examples, size=8))
    assert [len(part.data["example"]) for part in parts] == [8, 16, 20]
    last = parts[-1]
    assert last.data["example"].equals(whole.data["example"])
    # Other batches add in another order; ten times what the run itself measured as noise.
    tolerance = 10 * whole.manifest["noise"]["largest"]
    np.testing.assert_allclose(last.data["pcs"], whole.data["pcs"], atol=tolerance)
    own, all_at_once = (dict(run.manifest["settings"]) for run in (last, whole))
    assert own.pop("shard_examples") == all_at_once.pop("shard_examples")
    assert own == all_at_once


def test_the_noise_is_that_of_the_noisiest_part(testbed_model, examples, monkeypatch):
    from workbench.discovery import parts

    told = iter([0.1, 0.3, 0.2])

    def scored(*args, **options):
        found = wb.score_heads(*args, **options)
        return wb.HeadScores(found.data, {**found.manifest, "noise": {"p95": next(told)}})

    monkeypatch.setattr(parts, "score_heads", scored)
    found = list(score_in_parts(testbed_model, examples, size=8))
    assert [part.noise_floor(1) for part in found] == [0.1, 0.3, 0.3]


def test_two_lots_are_joined(testbed_model, examples):
    first = wb.score_heads(testbed_model, examples[:8], progress=False)
    second = wb.score_heads(testbed_model, examples[8:], progress=False)
    both = joined(first, second)
    assert both.data["example"].values.tolist() == [e.name for e in examples]
    np.testing.assert_array_equal(both.data["pcs"][:8], first.data["pcs"])
    np.testing.assert_array_equal(both.data["pcs"][8:], second.data["pcs"])
    assert both.manifest["settings"]["examples"] == len(examples)
    assert both.noise_floor(1) == max(first.noise_floor(1), second.noise_floor(1))


def test_what_is_done_so_far_can_be_kept(testbed_model, examples, tmp_path):
    steps = score_in_parts(testbed_model, examples, size=8)
    first = next(steps)
    steps.close()
    first.save(tmp_path / "run")
    kept = wb.HeadScores.load(tmp_path / "run")
    assert kept.data["pcs"].equals(first.data["pcs"])
    assert kept.manifest["settings"]["examples"] == 8


def test_a_prompt_that_cannot_be_built_stops_it_before_the_first_part(testbed_model, examples):
    long = wb.Example("long", "u", "testbed-tag", "word " * 4000, "sport", ())
    with pytest.raises(wb.InputError, match="testbed-tag/long"):
        next(score_in_parts(testbed_model, [*examples, long], size=8))
