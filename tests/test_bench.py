"""The bench on sizes too small to time: what it says must follow from what it measured."""

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from workbench.bench import discovery, machine, run, tables
from workbench.bench.clock import Timed, interleaved, peak_mib, start_over
from workbench.bench.inputs import LlamaSize, corpus_prompts, random_prompts, write_llama
from workbench.bench.scaling import Task
from workbench.cli.commands import app
from workbench.errors import InputError
from workbench.readme import with_bench

METHODS = ["loop", "batched", "replay", "attribution", "screened"]
TASK = Task(LlamaSize(2, 2, 32, 64, 100), examples=2, tokens=24, target=4)
TINY = run.Sizes(
    repeats=2,
    corpus=(3, 32),
    few=2,
    llama=TASK,
    shared=replace(TASK, examples=3, tokens=40, shared=32),
    growth=replace(TASK, examples=1, tokens=12),
    memory=replace(TASK, examples=1, tokens=64),
)
ROUNDING = 1e-5  # nats per target token, the bound in float32


@pytest.fixture(scope="module", autouse=True)
def small_machine():
    """Products and copies too small to take time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(machine.SHAPES, "cpu", ((64, 64, 64),))
        patch.setitem(machine.COPY_BYTES, "cpu", 2**16)
        yield


@pytest.fixture(scope="module")
def result(one_thread, small_machine):
    lines = []
    found = run.bench(sizes=TINY, device="cpu", tell=lines.append)
    assert any("replay" in line for line in lines)
    return found


# What is in a result


def test_a_result_has_a_row_for_every_case_and_method(result):
    assert result["format"] == "workbench.bench/1"
    assert [(row["case"], row["method"]) for row in result["discovery"]] == [
        (case, method) for case in ("testbed", "llama-2x2x32") for method in METHODS
    ]
    wanted = "case method seconds ratio_to_loop max_abs_diff peak_mib share_of_limit"
    for row in result["discovery"]:
        assert set(wanted.split()) <= set(row)


def test_a_result_is_json_without_nan(result):
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_ratios_and_shares_follow_from_the_seconds(result):
    rate = result["machine"]["rate_operations_per_second"]
    least = {case["case"]: case["minimum_operations"] for case in result["cases"]}
    loops = {row["case"]: row["seconds"] for row in result["discovery"] if row["method"] == "loop"}
    for row in result["discovery"]:
        assert row["seconds_min"] <= row["seconds"] <= row["seconds_max"]
        assert row["ratio_to_loop"] == pytest.approx(loops[row["case"]] / row["seconds"])
        if row["method"] in ("loop", "batched", "replay"):
            limit = least[row["case"]] / row["seconds"]
            # The rate of the end is the median of a few measurements more.
            assert row["share_of_limit"] == pytest.approx(limit / rate, rel=0.9)
        else:
            assert row["share_of_limit"] is None


def test_exact_scores_are_those_of_the_plain_loop(result):
    for row in result["discovery"]:
        if row["method"] == "attribution":
            assert row["max_abs_diff"] is None
        else:
            assert row["max_abs_diff"] <= ROUNDING


def test_memory_is_in_mib_and_holds_the_program(result):
    assert all(50 < row["peak_mib"] < 50_000 for row in result["discovery"])
    assert 50 < result["memory"]["loaded_mib"] <= result["memory"]["peak_mib"] < 50_000


def test_a_large_models_loop_is_timed_on_one_head_of_every_block(result):
    testbed, llama = result["cases"]
    assert testbed["heads_timed_in_the_loop"] == testbed["heads"] == 32
    assert (llama["heads_timed_in_the_loop"], llama["heads"]) == (2, 4)


def test_the_shared_profile_is_run_once_and_changes_nothing(result):
    shared = result["shared"]
    assert (shared["profile_tokens"], shared["query_tokens"]) == (32, 8)
    assert shared["ratio"] == shared["apart"]["seconds"] / shared["shared"]["seconds"]
    assert shared["max_abs_diff"] <= ROUNDING


def test_growth_is_counted_beside_the_time(result):
    counted = {row["what"]: row["counted"] for row in result["growth"] if row["method"] == "replay"}
    assert counted["examples"] == pytest.approx(1)
    assert 0.8 < counted["tokens"] < 2  # what is done at the target's positions doesn't grow
    assert 1.5 < counted["layers"] < 2.5
    assert all(len(row["seconds"]) == len(row["factors"]) == 3 for row in result["growth"])


def test_screening_recalls_between_nothing_and_all(result):
    for row in result["screening"]:
        for name in ("recall", "recall_least", "recall_bound", "attribution_recall"):
            assert 0 <= row[name] <= 1
        assert -1 <= row["attribution_spearman"] <= 1
    assert result["screening"][1]["recall"] == 1  # K is all of its heads


def test_plan_is_held_against_what_was_measured(result):
    measured = {(row["case"], row["method"]): row["seconds"] for row in result["discovery"]}
    assert len(result["plan"]) == len(measured)
    for row in result["plan"]:
        assert row["measured"] == measured[row["case"], row["method"]]
        assert row["ratio"] == row["estimated"] / row["measured"]


def test_a_case_can_be_chosen_and_an_unknown_one_is_refused(one_thread):
    found = run.bench(chosen=["llama-2x2x32"], sizes=TINY, device="cpu")
    assert {row["case"] for row in found["discovery"]} == {"llama-2x2x32"}
    assert not {"shared", "growth", "memory"} & set(found)
    with pytest.raises(InputError, match=r"no case 'nonsense'; there are testbed, llama-2x2x32,"):
        run.bench(chosen=["nonsense"], sizes=TINY, device="cpu")


def test_a_model_adds_a_case_of_its_own(one_thread, tmp_path):
    folder = write_llama(replace(TASK.size, vocabulary=203), tmp_path).rename(tmp_path / "mine")
    found = run.bench(str(folder), chosen=["mine"], sizes=TINY, device="cpu")
    assert [row["case"] for row in found["discovery"]] == ["mine"] * len(METHODS)


# Prompts and clock


def test_random_prompts_share_what_they_are_told_to_share():
    first, second = random_prompts(100, 2, 24, 4, shared=16)
    assert len(first.ids + first.target_ids) == 24
    assert first.ids[:16] == second.ids[:16]
    assert first.ids[16:] != second.ids[16:]
    assert first.example.user == second.example.user
    assert random_prompts(100, 2, 24, 4, shared=16) == [first, second]


def test_corpus_prompts_have_one_length_and_all_tasks(testbed_model):
    prompts = corpus_prompts(testbed_model, 64, 64)
    assert {len(p.ids + p.target_ids) for p in prompts} == {64}
    assert {p.ids[0] for p in prompts} == {testbed_model.tokenizer.bos_token_id}
    assert len({p.example.task for p in prompts}) == 3
    assert {len(p.target_ids) for p in prompts} <= set(range(1, 9))
    with pytest.raises(InputError, match="the model takes 256 tokens, 257 are wanted"):
        corpus_prompts(testbed_model, 1, 257)


def test_calls_take_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    timed = interleaved(calls, 3, "cpu", {"b": 10.0})
    assert order == list("ababab")
    assert [len(entry.seconds) for entry in timed.values()] == [3, 3]
    assert timed["b"].record()["seconds"] == timed["b"].median


def test_a_scale_multiplies_the_seconds():
    once = interleaved({"a": lambda: torch.ones(1)}, 1, "cpu", {"a": 1e6})["a"]
    assert once.median > 1  # a microsecond at least, times a million
    assert Timed(seconds=[3.0, 1.0, 2.0]).record() == {
        "seconds": 2.0,
        "seconds_min": 1.0,
        "seconds_max": 3.0,
    }


def test_peak_memory_counts_what_was_held_and_let_go():
    start_over("cpu")
    before = peak_mib("cpu")
    if before is None:
        pytest.skip("this system doesn't tell a process's peak")
    torch.ones(2**24)  # 64 MiB, gone at once
    assert 60 <= peak_mib("cpu") - before <= 80
    start_over("cpu")
    assert peak_mib("cpu") - before < 30


def test_the_plain_loop_is_the_reference(testbed_model):
    prompts = corpus_prompts(testbed_model, 2, 32)
    case = discovery.Case("testbed", testbed_model, prompts, 8, sampled=False)
    found = {name: method.run() for name, method in discovery.methods(case).items()}
    assert abs(found["loop"] - found["batched"]).max() < ROUNDING


# What is printed


def cells(table):
    return [cell for row in table.rows for cell in row]


def test_tables_print_the_numbers_of_the_result(result):
    shown = list(tables.tables(result))
    by_case = {table.title.split(":")[0]: table for table in shown}
    for row in result["discovery"]:
        line = by_case[row["case"]].rows[METHODS.index(row["method"])]
        assert line[0] == row["method"]
        assert line[1] == tables.number(row["seconds"])
        assert line[3] == tables.number(row["ratio_to_loop"])
    assert len(shown) == 8
    assert all(len(row) == len(table.header) for table in shown for row in table.rows)


def test_a_stored_result_is_printed_within_80_columns(result, tmp_path):
    stored, again = tmp_path / "bench.json", tmp_path / "again.json"
    stored.write_text(json.dumps(result))
    done = CliRunner().invoke(app, ["bench", "--from", str(stored), "--json", str(again)])
    assert done.exit_code == 0, done.output
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "screened" in done.stdout and "Measured in" in done.stdout
    assert json.loads(again.read_text()) == result


def test_the_command_measures_and_writes(monkeypatch, tmp_path, one_thread):
    monkeypatch.setattr(run, "QUICK", TINY)
    out = tmp_path / "bench.json"
    words = ["bench", "--quick", "--case", "llama-2x2x32", "--repeats", "1", "--json", str(out)]
    done = CliRunner().invoke(app, [*words, "--device", "cpu", "--threads", "1"])
    assert done.exit_code == 0, done.output
    assert "llama-2x2x32: replay" in done.stderr
    assert "llama-2x2x32: 2 layers, 4 heads" in done.stdout
    assert json.loads(out.read_text())["repeats"] == 1


def test_the_readmes_bench_tables_come_from_a_stored_result(result, tmp_path):
    stored, readme = tmp_path / "bench.json", tmp_path / "README.md"
    stored.write_text(json.dumps(result))
    readme.write_text("before\n<!-- bench tables: begin -->\n<!-- bench tables: end -->\nafter\n")
    words = ["bench", "--from", str(stored), "--readme", str(readme)]
    assert CliRunner().invoke(app, words).exit_code == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n")
    replay = next(row for row in result["discovery"] if row["method"] == "replay")
    assert f"| replay | {tables.number(replay['seconds'])} |" in text
    assert with_bench(text, result) == text


def test_a_file_that_is_no_bench_is_refused(result, tmp_path):
    path = tmp_path / "other.json"
    path.write_text('{"format": "workbench.scores/2"}')
    with pytest.raises(InputError, match=r"this program reads 'workbench.bench/1'"):
        tables.read(path)
    path.write_text("[]")
    with pytest.raises(InputError, match=r"this program reads 'workbench.bench/1'"):
        tables.read(path)
    with pytest.raises(InputError, match="needs the markers <!-- bench tables: begin -->"):
        with_bench("no markers", result)
