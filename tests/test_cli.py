"""The command line as a person meets it: results, one clear error, exit codes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from workbench.runs import hold
from workbench.scores import HeadScores

WORKBENCH = [sys.executable, "-c", "from workbench.cli import main; main()"]


def run(*arguments, cwd, code=0, first=""):
    """Run the command line, after some Python that changes what it meets."""
    environment = {**os.environ, "COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"}
    done = subprocess.run(
        [*WORKBENCH[:2], first + WORKBENCH[2], *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,  # the code is looked at below, with what was printed
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


# The figures of a quick probe.
DRAWN = (
    *("figure-3-user-heatmaps", "task-heatmaps", "ranked-heads", "specific-heads", "damage"),
    *("class-effects", "figure-7-examples", "recurrence", "aspect-heads", "aspect-overlap"),
    *("figure-4-user-overlap", "figure-6-head-count", "coherence"),
)
PROBE = ("--users", "2", "--eval-users", "2", "-k", "2", "--sweep-k", "1,2", "--draws", "1")


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe")
    done = run("probe", *PROBE, "--max-new-tokens", "12", "--out", "run", cwd=folder)
    return folder, done


def test_probe_says_what_it_found_and_writes_a_whole_run(probed):
    folder, done = probed
    assert done.stdout.startswith("Verdict\n- ")
    for title in ("Does the profile help?", "Which heads", "Preference or damage?", "How sure?"):
        assert title in done.stdout
    assert "Prompts, discovery: 0 of 48 cut" in done.stdout
    summary = json.loads((folder / "run/summary.json").read_text())
    assert summary["users"] == {"discovery": 2, "evaluation": 2, "inferred": False}
    assert summary["left_out"] == {}
    assert len(summary["samples"]) == 6
    written = {path.name for path in (folder / "run/figures").iterdir()}
    for name in ("figure-3-user-heatmaps", "figure-4-user-overlap", "specific-heads", "coherence"):
        assert {f"{name}.html", f"{name}.csv"} <= written
    assert {"figure-6-head-count-draw.csv", "figure-6-head-count-other.csv"} <= written
    assert (folder / "run/heads/task-testbed-tag.json").is_file()
    assert max(map(len, done.stdout.replace(str(folder), "").splitlines())) <= 80


def test_probe_goes_on_where_it_was_and_prints_json(probed):
    folder, _ = probed
    shards = list((folder / "run/scores").glob("*.parquet"))
    before = {path: path.stat().st_mtime_ns for path in shards}
    done = run(*("probe", *PROBE, "--max-new-tokens", "12", "--out", "run", "--json"), cwd=folder)
    summary = json.loads(done.stdout)
    assert set(summary["findings"]) == {
        *("profile", "heads", "controls", "stability", "aspects", "users", "steering", "origin"),
    }
    assert {path: path.stat().st_mtime_ns for path in shards} == before


def test_probe_refuses_to_overwrite_a_run_of_other_settings(probed):
    folder, _ = probed
    done = run("probe", *PROBE, "--ablation", "mean", "--out", "run", cwd=folder, code=2)
    assert "ablation (was 'zero', now 'mean')" in done.stderr
    assert "Name another folder" in done.stderr


def evil_report(folder):
    """The report of the run, with texts that would do something if they were taken for HTML."""
    from workbench.probe import load_probe
    from workbench.report import write_report

    result = load_probe(folder / "run")
    result.samples[0]["query"] = "<script>document.title = 'owned'</script>"
    result.samples[0]["steered"] = "<img src=x onerror=\"document.title = 'owned'\">"
    tokens = result.attention[0]["token"].values.astype(object)
    tokens[3] = "<img src=y onerror=\"document.title = 'owned'\">"
    result.attention[0]["token"] = ("position", tokens)
    (folder / "evil").mkdir(exist_ok=True)
    return write_report(result, folder / "evil")


def test_report_is_one_small_file_and_shows_texts_as_text(probed):
    folder, _ = probed
    page = evil_report(folder).read_text(encoding="utf-8")
    assert "<script src" not in page
    assert "<link" not in page.split("</style>")[0]
    assert len(page) < 15e6
    assert "<script>document.title" not in page
    assert "<img src=x" not in page
    assert "&lt;script&gt;document.title" in page
    assert "<li>Engine: replay; at most " in page


@pytest.mark.browser
def test_report_draws_without_a_network_and_runs_no_text_from_the_data(probed, rendered):
    folder, _ = probed
    page = rendered(evil_report(folder))
    assert "<title>Preference heads" in page
    assert page.count('class="plot-container') == len(DRAWN)
    assert page.count('class="main-svg"') >= len(DRAWN)
    assert "owned'&lt;/script&gt;" in page
    assert "<img" not in page
    # CircuitsVis has filled the place of an example of each task.
    assert len(re.findall(r'<div id="attention-\d"><\w', page)) == 3
    shown = re.findall(r"<section id=\"(\w+)\"( hidden)?", page)
    assert [key for key, hidden in shown if not hidden] == ["profile"]
    assert page.count('href="data:text/csv') > len(DRAWN)


def test_figures_are_drawn_again_from_a_run(probed):
    folder, _ = probed
    drawn = folder / "run/figures/figure-6-head-count.html"
    drawn.unlink()
    done = run("figures", "run", "--json", cwd=folder)
    assert str(drawn.relative_to(folder)) in json.loads(done.stdout)["written"]
    assert drawn.is_file()


@pytest.mark.browser
def test_figures_are_laid_out_as_in_the_paper(probed, browser):
    folder, _ = probed
    found = json.loads(run("figures", "run", "--paper", "--json", cwd=folder).stdout)
    written = {path.rpartition("paper/")[2] for path in found["written"] if "paper/" in path}
    numbers = (3, 4, 6, 7)
    pictures = {f"figure-{n}.{kind}" for n in numbers for kind in ("pdf", "svg", "png")}
    assert written == {*pictures, "figures.tex", "figures.html"}
    assert "No figure 5, 8 of the paper: probe with --full" in found["note"]
    tex = (folder / "run/paper/figures.tex").read_text()
    assert re.findall(r"includegraphics\[width=[\d.]+in\]\{figure-(\d)\}", tex) == list("3467")
    overlap = json.loads((folder / "run/tables/overlap.json").read_text())
    mean = overlap["data_vars"]["jaccard"]["attrs"]["mean"]
    assert f"mean {mean:.3f} over all pairs of 2 users" in tex
    assert "nan" not in tex  # two users: a gap without an interval
    page = (folder / "run/paper/figures.html").read_text()
    assert page.index("Figure 3.") < page.index("Figure 4.") < page.index("Figure 6.")
    svg = (folder / "run/paper/figure-4.svg").read_text()
    assert "gtitle" not in svg or "Jaccard overlap of" not in svg  # the caption says it


def test_run_in_use_is_drawn_by_nobody_else(probed):
    folder, _ = probed
    with hold(folder / "run"):
        for command in (["figures", "run"], ["probe", *PROBE, "--out", "run"]):
            done = run(*command, cwd=folder, code=2)
            assert f"run is in use by process {os.getpid()} on" in done.stderr


def test_probe_of_another_version_is_refused(probed, tmp_path):
    folder, _ = probed
    shutil.copytree(folder / "run", tmp_path / "run")
    path = tmp_path / "run/summary.json"
    path.write_text(path.read_text().replace("workbench.probe/3", "workbench.probe/99"))
    done = run("figures", "run", cwd=tmp_path, code=2)
    assert "probe/99', written by a newer version" in done.stderr


def test_steer_takes_a_run_a_file_or_heads(probed):
    folder, _ = probed
    common = ("--gamma", "2", "--limit", "2", "--max-new-tokens", "12", "--json")
    for heads in ("run", "run/heads/all.json", "L0H3,L0H5"):
        done = run("steer", "testbed", "--heads", heads, *common, cwd=folder)
        answers = json.loads(done.stdout)["answers"]
        assert len(answers) == 2
        assert all(a["plain"] and a["heads"] for a in answers)
    zero = run("steer", "--heads", "L0H3", *common, "--gamma", "0", cwd=folder)
    assert all(a["plain"] == a["steered"] for a in json.loads(zero.stdout)["answers"])


def test_steer_says_where_its_heads_come_from(probed):
    folder, _ = probed
    common = ("--heads", "run", "--limit", "1", "--max-new-tokens", "12", "--json")
    user = json.loads((folder / "run/summary.json").read_text())["samples"][0]["user"]
    other = run("steer", *common, "--split", "validation", "--user", user, cwd=folder)
    (answer,) = json.loads(other.stdout)["answers"]
    assert answer["heads_from"] == "other users' answers to this task"
    assert len(answer["heads"].split(",")) == 2  # the run's own k
    own = HeadScores.load(folder / "run").data["user"].values[0]
    leak = run("steer", *common, "--user", str(own), cwd=folder)
    (answer,) = json.loads(leak.stdout)["answers"]
    assert "this one among them: no evidence" in answer["heads_from"]


def test_steer_prints_answers_side_by_side(probed):
    folder, _ = probed
    done = run("steer", "--heads", "run", "--max-new-tokens", "12", cwd=folder)
    assert "plain" in done.stdout
    assert "DPS, γ = 0.5" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_score_writes_a_run_that_datasets_opens(tmp_path):
    from datasets import load_dataset

    done = run(*("score", "--users", "1", "-k", "2", "--out", "run", "--json"), cwd=tmp_path)
    assert set(json.loads(done.stdout)["top"]) == {
        "testbed-tag",
        "testbed-rating",
        "testbed-headline",
    }
    files = str(tmp_path / "run/scores/*.parquet")
    rows = load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "c"))
    assert len(rows) == 24
    assert len(rows[0]["pcs"]) == 4


def test_testbed_data_writes_official_files(tmp_path):
    made = run("testbed", "data", "--out", "corpus", "--json", cwd=tmp_path)
    assert len(json.loads(made.stdout)["written"]) == 21
    done = run(
        *("score", "--data", "lamp:testbed-tag", "--root", "corpus", "--split", "validation"),
        *("--users", "2", "-k", "1", "--out", "run", "--json"),
        cwd=tmp_path,
    )
    assert list(json.loads(done.stdout)["top"]) == ["testbed-tag"]


def test_training_repeats_to_the_digest_from_its_seed(tmp_path):
    lines = []
    for name in ("a", "b"):
        done = run("testbed", "train", "--steps", "3,2", "--out", name, cwd=tmp_path)
        lines.append(done.stdout.splitlines()[-1])
    assert lines[0] == lines[1]
    assert lines[0].startswith("weights sha256 ")
    other = run("testbed", "train", "--steps", "3,2", "--seed", "1", "--out", "c", cwd=tmp_path)
    assert other.stdout.splitlines()[-1] != lines[0]
    from workbench.models import heads_per_layer, load_model

    assert heads_per_layer(load_model(tmp_path / "a")) == (8, 8, 8, 8)


PLAN = ("plan", "testbed", "--examples", "20", "--tokens", "200", "--target", "8")


def test_plan_counts_a_job_before_a_model_is_loaded(tmp_path):
    done = run(*PLAN, "--rate", "0.1", "--gpus", "3", cwd=tmp_path)
    assert "4 layers, 32 heads, 642,944 parameters in float32" in " ".join(done.stdout.split())
    for method in ("loop", "reference", "replay", "attribution", "screened"):
        assert method in done.stdout
    assert "0.1 TFLOP/s a GPU, as given" in done.stdout
    assert "ASSUMED: 60 % of an H100's" in done.stdout
    assert "s, 3 GPUs" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert list(tmp_path.iterdir()) == []


def test_plan_reads_a_config_without_weights_and_prints_json(root, tmp_path):
    config = json.loads((root / "data/testbed/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 8}))
    job = ("--examples", "20", "--tokens", "200", "--target", "8", "-k", "2", "--json")
    small = json.loads(run("plan", *job, cwd=tmp_path).stdout)
    large = json.loads(run("plan", tmp_path, *job, "--gpus", "6", cwd=tmp_path).stdout)
    assert (small["heads"], large["heads"]) == (32, 64)
    assert large["heads_replayed_by_screened"] == 12
    assert any("ASSUMED: 40 % of an H100's 67 TFLOP/s" in line for line in large["assumptions"])
    for few, many in zip(small["methods"], large["methods"], strict=True):
        assert few["method"] == many["method"]
        assert few["operations"]["total"] < many["operations"]["total"]
        # 6 GPUs: the first two take 4 of the 20 examples
        assert many["hours"] == pytest.approx(many["hours_one_gpu"] * 4 / 20)


BAD = {
    "plan of nothing": (["plan", "./nowhere", *PLAN[2:]], "./nowhere: no such folder; give a"),
    "plan of a hub id": (["plan", "nobody/nothing", *PLAN[2:]], "its config can't be read"),
    "plan, no prompt": ([*PLAN, "--tokens", "8"], "8 tokens can't hold a prompt and 8 target"),
    "plan, long": ([*PLAN, "--tokens", "999"], "more than the model's context of 256"),
    "plan, rate": ([*PLAN, "--rate", "0"], "the rate must be > 0 TFLOP/s, got 0"),
    "plan, bandwidth": ([*PLAN, "--bandwidth", "-1"], "the bandwidth must be > 0 GB/s, got -1"),
    "plan, large k": ([*PLAN, "-k", "33"], "K must be between 1 and 32"),
    "plan, dtype": ([*PLAN, "--dtype", "int8"], "unknown dtype 'int8'"),
    "missing model": (["probe", "./nowhere"], "./nowhere: no such folder"),
    "no root": (["probe", "--data", "lamp:LaMP-4"], "needs a root"),
    "missing root": (["probe", "--data", "lamp:LaMP-4", "--root", "nowhere"], "no such folder"),
    "unknown task": (["probe", "--data", "lamp:LaMP-6", "--root", "."], "unknown task 'LaMP-6'"),
    "unknown data": (["probe", "--data", "imdb"], "unknown data 'imdb'"),
    "unknown split": (["score", "--split", "dev"], "no such file"),
    "negative gamma": (["probe", "--gamma", "-0.5"], "gamma must be >= 0, got -0.5"),
    "large k": (["probe", "-k", "33"], "K must be between 1 and 32"),
    "large k of score": (["score", "-k", "33", "--users", "1"], "K must be between 1 and 32"),
    "large k in sweep": (["probe", "--sweep-k", "1,64"], "K must be between 1 and 32"),
    "zero k in sweep": (["probe", "--sweep-k", "0"], "K must be between 1 and 32"),
    "unknown ablation": (["probe", "--ablation", "half"], "ablation must be zero or mean"),
    "unknown device": (["score", "--device", "abacus"], "unknown device 'abacus'"),
    "unknown dtype": (["score", "--dtype", "int8"], "unknown dtype 'int8'"),
    "too many users": (["score", "--users", "999"], "asked for 999 users"),
    "bad sweep": (["probe", "--sweep-k", "one"], "wanted numbers like 1,2,4"),
    "no chat template": (["score", "--style", "chat"], "no chat template"),
    "unknown ranking": (["score", "--ranking", "dense"], "unknown ranking 'dense'"),
    "unknown style": (["score", "--style", "poem"], "prompt style must be plain or chat"),
    "no run": (["figures", "nowhere"], "no such run folder"),
    "no heads": (["steer"], "--heads is needed"),
    "head outside": (["steer", "--heads", "L9H0"], "L9H0 is not a head of this model"),
    "no such head file": (["steer", "--heads", "nowhere.json"], "a head is written like L9H6"),
    "unknown method": (["score", "--method", "magic"], "method must be exact or attribution or"),
    "exact, audited": (["score", "--audit", "2"], "--audit: only for --method screened"),
    "screen by day": (
        ["score", "--method", "screened", "--screen-by", "day"],
        "--screen-by must be task or user, got 'day'",
    ),
    "few candidates": (
        ["score", "--method", "screened", "--candidates", "3", "--users", "1"],
        "8 heads can't be found among 3 candidates",
    ),
    "unknown user": (["steer", "--heads", "L0H0", "--user", "nobody"], "no user 'nobody'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_in_one_message_and_code_2(name, tmp_path):
    arguments, message = BAD[name]
    done = run(*arguments, cwd=tmp_path, code=2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists(), "nothing is written for a command that can't work"


def test_help_reads_in_80_columns(tmp_path):
    for command in ([], ["probe"], ["score"], ["figures"], ["steer"], ["plan"], ["testbed"]):
        done = run(*command, "--help", cwd=tmp_path)
        assert max(map(len, done.stdout.splitlines())) <= 80
        assert "Usage" in done.stdout


def test_probe_ends_well_on_a_foreign_model_and_real_lamp_rows(shared, tmp_path):
    done = run(
        *("probe", shared / "stories260k", "--data", "lamp:LaMP-4"),
        *("--root", shared / "lamp-sample", "--split", "dev", "--users", "3", "--eval-users", "3"),
        *("-k", "4", "--sweep-k", "4", "--draws", "1", "--max-new-tokens", "8", "--out", "run"),
        cwd=tmp_path,
    )
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["users"] == {"discovery": 3, "evaluation": 3, "inferred": True}
    assert "users were inferred" in " ".join((tmp_path / "run/report.html").read_text().split())
    cut = summary["truncation"]["discovery"]
    assert cut["prompts"] > 3  # an author has several rows
    assert cut["prompts_cut"] > 0
    assert cut["tokens_cut"] > 0
    assert f"{cut['prompts_cut']} of {cut['prompts']} cut" in done.stdout
    assert "the plain model" in done.stdout
