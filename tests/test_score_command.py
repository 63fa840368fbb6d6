"""`workbench score`: the methods in words, marks of noise, and runs that stop or fail."""

from __future__ import annotations

import json
import re

import pytest
from test_cli import run

from workbench.scores import HeadScores

SCORE = ("score", "--users", "2", "-k", "3", "--out", "run")


def test_score_says_how_it_was_computed_and_how_fine(tmp_path):
    done = run(*SCORE, cwd=tmp_path)
    words = " ".join(done.stdout.split())
    assert re.search(r"Engine: replay; at most \S+ nats per token from the reference", words)
    pattern = r"Noise: sums in another order move one example's score by up to \S+e-0[678]"
    assert re.search(pattern, words)
    assert "below the floor" not in words  # float32 sums are far finer than any score
    found = json.loads(run(*SCORE, "--json", cwd=tmp_path).stdout)
    assert found["engine"]["difference"] < found["engine"]["tolerance"]
    assert not any(found["below_noise"].values())


def test_heads_below_the_noise_floor_are_marked(tmp_path):
    run(*SCORE, cwd=tmp_path)
    path = tmp_path / "run/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["noise"]["p95"] = 0.045 * 16**0.5  # each task has 16 examples
    path.write_text(json.dumps(manifest))
    done = run(*SCORE, cwd=tmp_path)
    words = " ".join(done.stdout.split())
    scores = HeadScores.load(tmp_path / "run")
    for task in ("testbed-tag", "testbed-rating", "testbed-headline"):
        part = scores.select(tasks=[task]).data["pcs"].values.astype(float).mean(axis=0)
        below = int((abs(part) < 0.045).sum())
        assert f"{task}: {below} of 32 heads are below the noise floor" in words
    below = json.loads(run(*SCORE, "--json", cwd=tmp_path).stdout)["below_noise"]
    assert done.stdout.count("below the floor") == sum(map(len, below.values())) > 0
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_screened_run_says_what_was_scored_and_what_may_be_missed(tmp_path):
    screened = (*SCORE, "--method", "screened", "--candidates", "6", "--audit", "4")
    words = " ".join(run(*screened, cwd=tmp_path).stdout.split())
    assert "testbed-tag: 10 of 32 heads scored exactly, 4 of them drawn at random" in words
    found = json.loads(run(*screened, "--json", cwd=tmp_path).stdout)["screening"]
    assert (found["by"], found["k"], found["audited"]) == ("task", 3, 12)
    assert [group["scored"] for group in found["groups"]] == [10, 10, 10]
    assert found["unscored"] == 3 * 22
    # 0 of 12: the share is below 22.1 % (Clopper and Pearson); of 26 heads a task that is more
    # than the three there are. Half of three would take 6 × 78 / (3 × 3²) audited heads.
    assert (found["hits"], found["upper"]) == (0, 3)
    assert "Too few audited heads to tell how many of the top 3 of a task" in words
    assert "--audit 18 would bound it by half of them" in words


def test_screening_a_user_s_heads_bounds_what_is_missed_in_words(tmp_path):
    done = run(
        *("score", "--users", "3", "-k", "8", "--method", "screened", "--screen-by", "user"),
        *("--candidates", "20", "--audit", "8", "--out", "run", "--json"),
        cwd=tmp_path,
    )
    found = json.loads(done.stdout)
    assert (found["by"], len(found["top"]), found["screening"]["audited"]) == ("user", 3, 24)
    assert re.match(r"At most \d\.\d of the top 8 of a user missed", found["screening"]["words"])


def test_attribution_is_called_an_estimate(tmp_path):
    done = run(*SCORE, "--method", "attribution", cwd=tmp_path)
    assert "testbed-tag: estimate" in done.stdout
    assert "The gradient estimate, no exact score: saturation" in done.stdout


# Replaces the scoring of the second shard.
SPOILED = """
import os, signal, torch
from workbench.discovery.scorer import Scorer
real, calls = Scorer.table, []
def table(*arguments):
    calls.append(arguments)
    if len(calls) == 2:
        {what}
    return real(*arguments)
Scorer.table = table
import workbench.discovery.run as run
run.SHARD_PASSES = 32 * 8
"""


def shards(folder):
    return sorted(path.name for path in (folder / "run/scores").glob("*.parquet"))


FAULTS = {
    "a lost GPU": (
        "raise torch.AcceleratorError('CUDA error: unspecified launch failure\\nCUDA kernel')",
        "error: the GPU failed: CUDA error: unspecified launch failure. nvidia-smi",
    ),
    "a lost GPU, older torch": (
        "raise RuntimeError('CUDA error: the launch timed out')",
        "error: the GPU failed: CUDA error: the launch timed out. nvidia-smi",
    ),
    "memory": (
        "raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB.')",
        "error: out of memory: CUDA out of memory. Tried to allocate 2 GiB. Lower --batch-tokens",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_machine_that_fails_is_told_and_finished_shards_are_kept(name, tmp_path):
    what, message = FAULTS[name]
    done = run(*SCORE, cwd=tmp_path, code=2, first=SPOILED.format(what=what))
    assert message in done.stderr
    assert "what is finished is kept" in done.stderr
    assert "Traceback" not in done.stderr
    assert shards(tmp_path) == ["00000.parquet"]


def test_error_of_the_program_keeps_its_traceback(tmp_path):
    fault = SPOILED.format(what="raise RuntimeError('a bug')")
    assert "Traceback" in run(*SCORE, cwd=tmp_path, code=1, first=fault).stderr


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_stopped_run_says_how_to_go_on_and_goes_on(number, tmp_path):
    stop = SPOILED.format(what=f"os.kill(os.getpid(), signal.{number})")
    done = run(*SCORE, cwd=tmp_path, code=130, first=stop)
    assert "stopped; 2 finished shards are kept in run. Run the same command" in done.stderr
    assert done.stderr.count("stopped; ") == 1
    assert shards(tmp_path) == ["00000.parquet", "00001.parquet"]
    before = (tmp_path / "run/scores/00000.parquet").stat().st_mtime_ns
    run(*SCORE, cwd=tmp_path, first=SPOILED.format(what="pass"))
    assert len(shards(tmp_path)) == 6
    assert (tmp_path / "run/scores/00000.parquet").stat().st_mtime_ns == before


def test_second_ctrl_c_stops_at_once(tmp_path):
    twice = "os.kill(os.getpid(), signal.SIGINT); os.kill(os.getpid(), signal.SIGINT)"
    done = run(*SCORE, cwd=tmp_path, code=130, first=SPOILED.format(what=twice))
    assert "stopped; 1 finished shards are kept in run. Run the same command" in done.stderr
    assert shards(tmp_path) == ["00000.parquet"]
