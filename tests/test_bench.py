"""The bench on sizes too small to time: what it says must follow from what it measured."""

import json
import re
from dataclasses import replace

import pytest
import torch
from plain import plain_copy, zero_output_weights
from typer.testing import CliRunner

from workbench.bench import discovery, machine, rivals, run, steering, tables
from workbench.bench.clock import Timed, interleaved, peak_mib, start_over
from workbench.bench.inputs import LlamaSize, corpus_prompts, random_prompts, write_llama
from workbench.bench.scaling import Task
from workbench.bench.steering import Grid
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
    steering=Grid(((1, 24), (8, 24), (3, 40)), new_tokens=3, alone=2, often=200, mixed=4),
    testbed_steering=Grid(((2, 24), (32, 20)), new_tokens=3, often=100, mixed=3),
)
WAYS = [
    *("TransformerLens", "Hugging Face generate", "two passes", "plain"),
    *("DPS masked", "DPS shared", "DPS masked, upper half"),
]
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
    assert not {"shared", "growth", "memory", "steering", "steering_cases"} & set(found)
    with pytest.raises(InputError, match=r"no case 'nonsense'; there are testbed, llama-2x2x32,"):
        run.bench(chosen=["nonsense"], sizes=TINY, device="cpu")


def test_a_model_adds_a_case_of_its_own(one_thread, tmp_path):
    folder = write_llama(replace(TASK.size, vocabulary=203), tmp_path).rename(tmp_path / "mine")
    found = run.bench(str(folder), chosen=["mine"], sizes=TINY, device="cpu")
    assert [row["case"] for row in found["discovery"]] == ["mine"] * len(METHODS)


# Steering


def steered(result, case, **wanted):
    """The steering rows of a case that have these values."""
    return [
        row
        for row in result["steering"]
        if row["case"] == case and all(row[name] == value for name, value in wanted.items())
    ]


def test_steering_has_a_row_for_every_way_batch_and_prompt(result):
    for case, shapes in (
        ("steering", [(1, 24), (8, 24), (3, 40)]),
        ("testbed-steering", [(2, 24)]),
    ):
        for batch, prompt in shapes:
            rows = steered(result, case, batch=batch, prompt=prompt)
            assert [row["method"] for row in rows] == WAYS
    # The heads of the upper half are left out where a batch is run once.
    rows = steered(result, "testbed-steering", batch=32, prompt=20)
    assert [row["method"] for row in rows] == WAYS[:-1]
    wanted = "case model batch prompt tokens_per_second ratio_to_plain peak_mib"
    assert all(set(wanted.split()) <= set(row) for row in result["steering"])


def test_steering_ratios_follow_from_the_seconds(result):
    for row in result["steering"]:
        same = {name: row[name] for name in ("batch", "prompt")}
        (plain,) = steered(result, row["case"], method="plain", **same)
        assert row["ratio_to_plain"] == row["step_seconds"] / plain["step_seconds"]
        assert row["prefill_ratio"] == row["prefill_seconds"] / plain["prefill_seconds"]
        assert row["tokens_per_second"] == pytest.approx(row["batch"] * 3 / row["seconds"])
        assert row["seconds_min"] <= row["seconds"] <= row["seconds_max"]
        assert row["prefill_seconds"] < row["seconds_max"]


def test_two_passes_run_some_rows_and_are_multiplied(testbed_model, monkeypatch):
    given, timed = {}, []

    def write(prompts, new):
        return rivals.Written([], 2.0, [0.25] * (new - 1))

    def in_turn(calls, repeats, device, scales, tell):
        timed.append((repeats, scales))
        for call in calls.values():
            call()
        return {name: Timed(seconds=[1.0]) for name in calls}

    monkeypatch.setattr(steering, "methods", lambda case: dict.fromkeys(WAYS, write))
    monkeypatch.setattr(steering, "interleaved", in_turn)
    grid = Grid(((1, 20), (8, 20)), new_tokens=3, alone=2, often=100)
    case = steering.Case("testbed-steering", "testbed", testbed_model, grid)
    for row in steering.measure(case, 5, lambda line: None):
        given[row["method"], row["batch"]] = row
    # A row's seconds times the rows of the batch; the seconds of 2 rows times 8 / 2.
    alone, together = given["two passes", 8], given["plain", 8]
    assert (alone["rows_timed"], alone["prefill_seconds"], alone["step_seconds"]) == (2, 16.0, 2.0)
    assert (together["rows_timed"], together["prefill_seconds"]) == (8, 2.0)
    assert together["step_seconds"] == 0.25
    assert given["two passes", 1]["prefill_seconds"] == 2.0
    assert alone["ratio_to_plain"] == 8
    assert [repeats for repeats, _ in timed] == [5, 1]
    assert timed[0][1] == dict.fromkeys(WAYS, 1.0)
    assert timed[1][1] == {**dict.fromkeys(WAYS[:-1], 1.0), "two passes": 4.0}


def test_a_call_counts_the_memory_that_it_takes_itself():
    if peak_mib("cpu") is None:
        pytest.skip("this system doesn't tell a process's peak")

    def write(prompts, new):
        torch.ones(2**24)  # 64 MiB, gone at once
        return rivals.Written([], 1.0, [0.5])

    trials = steering.Trials(write, [], 2, "cpu", times=8)
    start_over("cpu")
    trials()
    assert 60 <= trials.extra_mib <= 80
    assert (trials.first, trials.steps) == ([8.0], [4.0])


def test_steering_names_its_heads_and_the_lowest_block(result):
    llama, testbed = result["steering_cases"]
    assert (llama["model"], llama["heads"], llama["heads_without"]) == ("llama-2x2x32", 4, 1)
    assert (testbed["model"], testbed["heads"], testbed["heads_without"]) == ("testbed", 32, 8)
    for case in (llama, testbed):
        for method, block in case["lowest_block"].items():
            rows = steered(result, case["case"], method=method)
            assert all(len(row["heads"]) == case["heads_without"] for row in rows)
            assert all(min(int(head[1]) for head in row["heads"]) == block for row in rows)
        assert case["lowest_block"]["DPS masked, upper half"] >= case["layers"] // 2
    assert all(row["heads"] is None for row in steered(result, "steering", method="plain"))


def test_what_is_to_be_reached_is_told_for_every_prompt(result):
    llama, testbed = (case["numbers"] for case in result["steering_cases"])
    told = {(n["over"], n["under"], n["batch"], n["prompt"]): n for n in llama}
    assert set(told) == {
        ("DPS masked", "plain", 8, 24),
        ("DPS shared", "plain", 8, 24),
        ("two passes", "DPS masked", 1, 24),
        ("two passes", "DPS shared", 1, 24),
        ("plain", "Hugging Face generate", 8, 24),
    }  # no batch of 32 was measured
    assert [(n["batch"], n["at_most"]) for n in testbed] == [(32, 1.5)] * 2
    fast = told["two passes", "DPS shared", 1, 24]
    assert (fast["at_most"], fast["at_least"]) == (None, 1.2)
    (over,) = steered(result, "steering", method="two passes", batch=1)
    (under,) = steered(result, "steering", method="DPS shared", batch=1)
    assert fast["step"] == over["step_seconds"] / under["step_seconds"]
    assert fast["whole"] == over["seconds"] / under["seconds"]


def test_every_row_of_a_mixed_batch_has_the_tokens_that_it_gets_alone(result):
    for case, rows in zip(result["steering_cases"], (4, 3), strict=True):
        same = case["identical"]
        assert same["shortest"] < same["longest"]
        assert (same["rows"], same["plain"], same["shared"]) == (rows, rows, rows)


def test_other_tokens_are_counted_as_other(testbed_model, monkeypatch):
    case = steering.Case("testbed-steering", "testbed", testbed_model, Grid(((1, 24),), 8, mixed=3))
    honest = steering.by_the_loop

    def steered_too_far(model, contrast, prefill):
        strong = None if contrast is None else replace(contrast, gamma=contrast.gamma + 3.0)
        return honest(model, strong, prefill)

    assert steering.identical(case)["plain"] == 3
    monkeypatch.setattr(steering, "by_the_loop", steered_too_far)
    same = steering.identical(case)
    assert same["plain"] < 3
    assert same["shared"] < 3


def test_rivals_write_what_a_plain_loop_over_a_second_copy_writes(testbed_model):
    twin = plain_copy(testbed_model)
    native = rivals.own_modules(testbed_model)
    assert native.config.to_dict() == twin.config.to_dict()
    case = steering.Case("testbed-steering", "testbed", testbed_model, Grid(((1, 24),)))
    prompts = case.prompts(2, 24)
    wanted = []
    for prompt in prompts:
        ids = torch.tensor([prompt.ids])
        for _ in range(6):
            ids = torch.cat((ids, twin(ids).logits[:, -1].argmax(-1, keepdim=True)), dim=1)
        wanted.append(ids[0, 24:].tolist())
    heads = case.heads()["two passes"]
    ways = {
        "TransformerLens": rivals.transformer_lens(testbed_model),
        "Hugging Face generate": rivals.hugging_face(native),
        "two passes": rivals.two_passes(native, heads, 0.0),
        "plain": steering.by_the_loop(testbed_model, None, "masked"),
    }
    for name, write in ways.items():
        written = write(prompts, 6)
        assert written.tokens == wanted, name
        assert len(written.steps) == (10 if name == "two passes" else 5)


def test_no_end_of_text_token_ends_a_row(testbed_model, monkeypatch):
    case = steering.Case("testbed-steering", "testbed", testbed_model, Grid(((1, 24),)))
    prompts = case.prompts(1, 24)
    (wanted,) = steering.by_the_loop(testbed_model, None, "masked")(prompts, 4).tokens
    inner = testbed_model.original_model
    for held in (inner.config, inner.generation_config):
        monkeypatch.setattr(held, "eos_token_id", wanted[0])
    monkeypatch.setattr(testbed_model.cfg, "eos_token_id", wanted[0], raising=False)
    for name, write in steering.methods(case).items():
        assert len(write(prompts, 4).tokens[0]) == 4, name


def test_two_passes_steer_by_the_models_without_the_heads_weights(testbed_model):
    """After the prompt's last token but one, a pass of theirs has the heads' part of W_O zeroed."""
    case = steering.Case("testbed-steering", "testbed", testbed_model, Grid(((1, 24),)))
    heads = case.heads()["two passes"]
    whole, without = plain_copy(testbed_model), plain_copy(testbed_model)
    for head in heads:
        zero_output_weights(without, head, 8)
    (prompt,) = case.prompts(1, 24)
    ids = torch.tensor([prompt.ids])
    with torch.no_grad():
        caches = [whole(ids[:, :-1]).past_key_values for _ in range(2)]
        token, wanted = ids[:, -1:], []
        for _ in range(6):
            full, ablated = (
                model(token, past_key_values=cache).logits[:, -1]
                for model, cache in zip((whole, without), caches, strict=True)
            )
            token = (1.5 * full - 0.5 * ablated).argmax(-1, keepdim=True)
            wanted.append(token.item())
    native = rivals.own_modules(testbed_model)
    assert rivals.two_passes(native, heads, 0.5)([prompt], 6).tokens == [wanted]
    assert rivals.hugging_face(native)([prompt], 6).tokens != [wanted]  # and its hooks are gone


def test_a_steering_case_can_be_chosen(one_thread, monkeypatch):
    small = replace(TINY, testbed_steering=Grid(((1, 8),), new_tokens=2, mixed=2), repeats=1)
    found = run.bench(chosen=["testbed-steering"], sizes=small, device="cpu")
    assert found["discovery"] == []
    assert [row["method"] for row in found["steering"]] == WAYS
    assert {row["model"] for row in found["steering"]} == {"testbed"}


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
    assert len(shown) == 12
    assert all(len(row) == len(table.header) for table in shown for row in table.rows)


def test_steering_tables_print_the_numbers_of_the_result(result):
    by_title = {table.title: table for table in tables.tables(result)}
    table = by_title["steering: llama-2x2x32, 2 layers, 4 heads, vocabulary 100"]
    assert [row[0] for row in table.rows[:2]] == ["1 row, prompts of 24", "TransformerLens"]
    lines = [row for row in table.rows if row[0] == "DPS shared"]
    for line, row in zip(lines, steered(result, "steering", method="DPS shared"), strict=True):
        assert line[1] == tables.number(row["tokens_per_second"])
        assert line[4] == f"{row['ratio_to_plain']:.2f}"
    assert "2 rows were timed at most" in table.note
    wanted = by_title["steering: what is to be reached"]
    assert [row[-1] for row in wanted.rows] == ["≤ 1.35", "≤ 1.35", "≥ 1.2", "≥ 1.2", "≤ 1.25"]
    assert "in 4 of 4 rows, DPS shared and two passes in 4." in wanted.note


def test_a_result_from_before_steering_was_measured_is_still_shown(result):
    older = {name: part for name, part in result.items() if not name.startswith("steering")}
    titles = [table.title for table in tables.tables(older)]
    assert len(titles) == 8
    assert not any("steering" in title for title in titles)


def test_a_stored_result_is_printed_within_80_columns(result, tmp_path):
    stored, again = tmp_path / "bench.json", tmp_path / "again.json"
    stored.write_text(json.dumps(result))
    done = CliRunner().invoke(app, ["bench", "--from", str(stored), "--json", str(again)])
    assert done.exit_code == 0, done.output
    assert max(map(len, done.stdout.splitlines())) <= 80
    shown = re.findall(r"^│ (.+?) +│", done.stdout, re.MULTILINE)
    whole = {"two passes / DPS masked", "plain / Hugging Face generate", "8 rows, prompts of 24"}
    assert whole | set(WAYS) <= set(shown)  # no name is broken into lines
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
