"""The evaluation grid: who is asked, what is chosen, what is kept, and what the table says."""

from __future__ import annotations

import json
import math
import os
import signal
from collections import Counter
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import pandas as pd
import pytest

import workbench as wb
from workbench import runs
from workbench.data.prompts import build_prompts
from workbench.data.tasks import get_task
from workbench.data.testbed import testbed_path
from workbench.evaluation import grid, methods, record, writing
from workbench.evaluation.choosing import choose, first_best
from workbench.evaluation.findings import (
    COPYING,
    MACRO_F1,
    findings,
    protocol_lines,
    summarise,
)
from workbench.evaluation.grid import evaluate
from workbench.evaluation.metrics import get_metric
from workbench.evaluation.protocol import ask, check_model
from workbench.evaluation.results import ANSWER, Evaluation, read_rows
from workbench.evaluation.settings import (
    GridSettings,
    check_scores,
    head_sets,
    read_retrieval,
    usual_counts,
)
from workbench.evaluation.summary import evaluation_table, qualities
from workbench.heads import HeadSet
from workbench.steering.contrast import CAD, DPS, DoLa, Entropy
from workbench.steering.labels import decide

CORPUS = testbed_path() / "corpus"
TAG, HEADLINE = "testbed-tag", "testbed-headline"
SMALL = GridSettings(k=(1, 2), gamma=(0.5, 2.0), seeds=2, max_new_tokens=14)
HEADS = HeadSet.parse("L0H1, L2H3")


@pytest.fixture(scope="module")
def scores(testbed_model):
    return wb.score_heads(testbed_model, wb.load_examples("testbed", users=2), progress=False)


def small(scores, **options):
    asked = ask("testbed", scores, tasks=[TAG, HEADLINE], users=4, validation_users=2)
    return replace(asked, **options)


@pytest.fixture(scope="module")
def done(testbed_model, scores, tmp_path_factory):
    """A small grid of all methods, and its table."""
    folder = tmp_path_factory.mktemp("grid") / "run"
    asked = small(scores)
    return evaluate(testbed_model, asked, folder, SMALL, scores=scores, progress=False)


@pytest.fixture(scope="module")
def rows(done):
    return evaluation_table(done)


def only(rows, **wanted):
    (row,) = (row for row in rows if all(row[key] == value for key, value in wanted.items()))
    return row


# Who is asked


def test_heads_settings_and_table_are_of_different_users(scores):
    asked = ask("testbed", scores, users=5, validation_users=6)
    groups = [{e.user for e in group} for group in (asked.validation, asked.test)]
    assert [len(group) for group in groups] == [6, 5]
    assert not set.intersection(*groups)
    assert not set(scores.data["user"].values) & set.union(*groups)
    assert (asked.validation_split, asked.split) == ("validation", "test")


def test_users_that_heads_were_found_on_are_refused_and_marked_if_asked_for(scores):
    with pytest.raises(wb.InputError, match=r"heads were found on this.*--same-examples"):
        ask("testbed", scores, split="discovery")
    asked = ask("testbed", scores, split="discovery", same_examples=True)
    mine = set(scores.data["user"].values)
    assert asked.leaked == {e.name for e in asked.test if e.user in mine}
    assert 0 < len(asked.leaked) < len(asked.test)


def test_one_split_is_divided_among_users_that_heads_were_not_found_on(scores):
    data = {"source": f"lamp:{TAG}", "root": CORPUS, "split": "discovery"}
    asked = ask(**data, validation_split="discovery", scores=scores)
    groups = [{e.user for e in group} for group in (asked.validation, asked.test)]
    assert [len(group) for group in groups] == [9, 37]  # of 48: 2 with heads, a fifth of 46
    assert not set.intersection(*groups)
    assert not set(scores.data["user"].values) & set.union(*groups)
    assert (asked.left_out, asked.leaked) == (2, frozenset())
    again = ask(**data, validation_split="discovery", scores=scores)
    assert again.validation == asked.validation
    with pytest.raises(wb.InputError, match="40 validation and 9 test users are wanted, and 46"):
        options = {"users": 9, "validation_users": 40}
        ask(**data, validation_split="discovery", scores=scores, **options)


@dataclass
class Known:
    """Scores of which only the rows matter here."""

    data: pd.DataFrame


def found_on(examples):
    names = ("example", "task", "user")
    found = [(e.name, e.task, e.user) for e in examples]
    return Known({n: pd.Series(c) for n, c in zip(names, zip(*found, strict=True), strict=True)})


def test_a_split_of_which_all_users_served_for_heads_is_refused():
    every = found_on(wb.load_examples("testbed", "validation"))
    with pytest.raises(wb.InputError, match="heads were found on all users of the validation"):
        ask("testbed", every, users=3)


def test_groups_that_are_empty_or_share_an_example_are_refused(testbed_model, scores, tmp_path):
    asked = small(scores)
    for options, told in (
        ({"test": ()}, "no test examples: the split is empty"),
        ({"validation": ()}, "no validation examples"),
        ({"validation": asked.test}, "in the validation and in the test group"),
        (
            {"validation": [e for e in asked.validation if e.task == TAG]},
            f"no validation examples of {HEADLINE}",
        ),
    ):
        wrong = replace(asked, **options)
        with pytest.raises(wb.InputError, match=told):
            evaluate(testbed_model, wrong, tmp_path / "run", SMALL, scores=scores)
    assert not (tmp_path / "run").exists()


# What is refused before anything is done


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"methods": ("plain", "dpss")}, "unknown method 'dpss'; known are plain, no-profile"),
        ({"methods": ("cad", "cad")}, "cad is named twice"),
        ({"methods": ()}, "no method"),
        ({"k": (0, 2)}, "K must be >= 1, got 0"),
        ({"gamma": (0.5, -1.0)}, "gamma must be >= 0, got -1"),
        ({"gamma": (math.nan,)}, "gamma must be >= 0"),
        ({"gamma": ()}, "at least one"),
        ({"seeds": 0}, "seeds"),
        ({"decide": "vote"}, "decide must be generate or likelihood, got 'vote'"),
        ({"prefill": "none"}, "prefill must be masked or shared"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, told):
    with pytest.raises(wb.InputError, match=told):
        GridSettings(**options)


def test_heads_that_cannot_serve_are_refused_before_a_model_is_there(scores):
    with pytest.raises(wb.InputError, match="random, dps: needs --heads"):
        check_scores(GridSettings(methods=("random", "dps", "cad")), None, [TAG])
    with pytest.raises(wb.InputError, match=r"no head scores of LaMP-1, only of testbed-headline"):
        check_scores(SMALL, scores, [TAG, "LaMP-1"])
    with pytest.raises(wb.InputError, match=r"K must be between 1 and 32 .*got 33"):
        check_scores(GridSettings(k=(4, 33)), scores, [TAG])
    check_scores(GridSettings(methods=("cad",), k=(99,)), None, ["LaMP-1"])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"items": 4}, r"items 5 there, 4 here\. Ask with theirs \(--items 5\)"),
        ({"style": "chat"}, "style plain there, chat here"),
        ({"ranking": "bm25"}, r"ranking the task's own there, bm25 here.*\(no --ranking\)"),
        ({"max_tokens": 512}, r"max-prompt-tokens 2048 there, 512 here"),
    ],
)
def test_heads_that_were_found_with_other_prompts_are_refused_unless_allowed(changes, told, scores):
    other = replace(SMALL, prompt=wb.PromptSettings(**changes))
    with pytest.raises(wb.InputError, match=f"found with other prompts: {told}.*--other-prompt"):
        check_scores(other, scores, [TAG, "testbed-rating"])
    check_scores(replace(other, other_prompt=True), scores, [TAG])
    check_scores(replace(other, methods=("cad",)), scores, [TAG])  # no method takes the heads


def test_prompts_are_the_same_if_the_room_for_answers_or_the_ranking_s_name_alone_differs(scores):
    ranking = get_task(TAG).ranking
    assert ranking != "bm25"
    for changes in ({"answer_tokens": 99}, {"ranking": ranking}):
        check_scores(replace(SMALL, prompt=wb.PromptSettings(**changes)), scores, [TAG])
    check_scores(
        replace(SMALL, prompt=wb.PromptSettings(items=3)), replace(scores, manifest={}), [TAG]
    )


def test_the_usual_head_counts_grow_with_the_model():
    expected = {
        3: (1, 2),
        32: (1, 2, 4, 8),
        64: (1, 2, 4, 8),
        144: (1, 2, 4, 8),
        784: (4, 8, 15, 30),
        1024: (5, 10, 20, 40),
        5120: (25, 50, 100, 200),
    }
    assert {heads: usual_counts(heads) for heads in expected} == expected
    assert GridSettings().head_counts(1024) == (5, 10, 20, 40)
    assert GridSettings(k=(3,)).head_counts(1024) == (3,)


def test_more_heads_than_were_screened_for_are_refused_with_a_smaller_k_as_remedy(scores):
    screen = {"screen": {"k": 2, "by": "task", "whole": True}}
    screened = replace(scores, manifest={"settings": screen})
    assert set(head_sets(screened, [TAG], (1, 2))[TAG]) == {1, 2}
    with pytest.raises(wb.InputError, match=r"K = 4 is to be tried.*top 2: name no larger -k"):
        head_sets(screened, [TAG], (1, 4))


def test_scores_of_another_model_are_refused_with_both_names(
    testbed_model, tiny_model, scores, tmp_path
):
    other = tiny_model("llama")
    with pytest.raises(wb.InputError, match=r"run holds head scores of .*32 heads.*12 heads"):
        evaluate(other, small(scores), tmp_path / "run", SMALL, scores=scores, heads_from="run")
    settings = dict(scores.manifest["settings"])
    changed = [{"tensors": "of a model changed in memory"}, {"weights": "sha256:0"}]
    for change in changed:
        manifest = {"settings": settings | change}
        with pytest.raises(wb.InputError, match=f"other {next(iter(change))}"):
            check_model(replace(scores, manifest=manifest), testbed_model, "run")
    half = settings | {"dtype": "bfloat16", "tensors": "the same weights, rounded"}
    check_model(replace(scores, manifest={"settings": half}), testbed_model, "run")


def test_a_prompt_without_room_is_refused_before_a_file_is_made(testbed_model, scores, tmp_path):
    settings = replace(SMALL, prompt=wb.PromptSettings(max_tokens=5), other_prompt=True)
    with pytest.raises(wb.InputError, match="without its profile"):
        evaluate(testbed_model, small(scores), tmp_path / "run", settings, scores=scores)
    assert not (tmp_path / "run").exists()


# Methods and candidates


def test_plain_comes_first_and_the_others_as_they_were_named():
    names = ("dps", "cad", "plain", "random")
    assert GridSettings(methods=names).methods == ("plain", "dps", "cad", "random")


def test_candidates_go_from_less_steering_to_more():
    sets = {2: HEADS, 1: HeadSet(HEADS.heads[:1])}
    found = [(c.settings["gamma"], c.settings["k"]) for c in methods.dps(sets, [1.0, 0.5])]
    assert found == [(0.5, 1), (0.5, 2), (1.0, 1), (1.0, 2)]
    last = methods.decore(sets, [0.5])[-1]
    assert (last.contrast.gamma, last.settings["gamma"]) == (Entropy(), "H")
    pairs = [(c.settings["gamma"], c.settings["cad"]) for c in methods.both(HEADS, [1.0, 0.5])]
    assert pairs == [(0.5, 0.5), (0.5, 1.0), (1.0, 0.5), (1.0, 1.0)]
    keys = [c.key for c in (*methods.dps(sets, [1.0, 0.5]), *methods.dola())]
    assert len(set(keys)) == len(keys)


def test_strengths_that_follow_the_entropy_come_after_the_constants_everywhere():
    sets, share = {2: HEADS}, Entropy(normalised=True)
    given = [Entropy(), 1.0, share, 0.5]
    words = [0.5, 1.0, "H/lnV", "H"]
    for found in (
        methods.dps(sets, given),
        methods.decore(sets, given),  # whose own is the last of these, and there once
        methods.random(HEADS, given),
        methods.cad(given),
    ):
        assert [c.settings["gamma"] for c in found] == words
        assert [c.contrast.gamma for c in found] == [0.5, 1.0, share, Entropy()]
        assert not any("/" in c.key for c in found)  # a key names a folder
    pairs = methods.both(HEADS, [Entropy(), 1.0, 0.5])
    assert [(c.settings["gamma"], c.settings["cad"]) for c in pairs] == [
        *((0.5, 0.5), (0.5, 1.0), (1.0, 0.5), (1.0, 1.0)),
        *((0.5, "H"), ("H", 0.5), (1.0, "H"), ("H", 1.0)),
        ("H", "H"),
    ]
    assert pairs[4].words == "K 2, γ 0.5, CAD H"
    assert len({c.key for c in methods.both(HEADS, given)}) == 16


def test_a_candidate_s_answers_are_known_by_heads_and_strengths():
    same = methods.random(HeadSet.parse("L2H3, L0H1"), [0.5])[0]
    (one,) = methods.random(HEADS, [0.5])
    assert one.digest() == same.digest()  # a set has no order
    others = [
        *methods.random(HeadSet.parse("L0H1, L2H2"), [0.5]),
        *methods.random(HEADS, [1.0]),
        *methods.dps({2: HEADS}, [0.5]),
        methods.fixed("plain"),
        methods.fixed("no-profile"),
    ]
    assert len({one.digest(), *(other.digest() for other in others)}) == 6


def test_the_first_of_equally_good_candidates_is_taken():
    assert first_best([0.2, 0.5, 0.5, 0.4]) == 1
    assert first_best([None, 0.1, None]) == 1
    assert first_best([None, None]) is None


def test_choices_follow_the_validation_users_answers():
    examples = [e for e in wb.load_examples("testbed", "validation", users=1) if e.task == TAG]
    right, wrong = [e.target for e in examples], ["no genre"] * 4
    half = [*right[:2], *wrong[:2]]
    options = methods.cad([0.25, 0.5, 1.0, 2.0])
    outcomes = zip(options, (wrong, half, "logits hold NaN", list(half)), strict=True)
    choice = choose(examples, list(outcomes))
    assert choice.candidate.contrast == CAD(0.5)
    assert choice.record()["validation"] == 0.5
    listed = choice.record()["candidates"]
    assert [entry.get("value") for entry in listed] == [0.0, 0.5, None, 0.5]
    assert listed[2] == {"gamma": 1.0, "failed": "logits hold NaN"}
    none = choose(examples, [(options[0], "too few layers"), (options[1], "too few layers")])
    assert none.candidate is None
    assert none.record()["failed"] == "too few layers"


def test_candidates_that_are_all_equal_are_told_and_the_gentlest_is_taken():
    examples = [e for e in wb.load_examples("testbed", "validation", users=1) if e.task == TAG]
    right, wrong = [e.target for e in examples], ["no genre"] * 4
    options = methods.cad([0.5, 1.0, 2.0])
    same = choose(examples, list(zip(options, (wrong, "logits hold NaN", wrong), strict=True)))
    assert same.record()["all_equal"] is True
    assert same.candidate.contrast == CAD(0.5)
    differ = choose(examples, list(zip(options, (wrong, wrong, right), strict=True)))
    one = choose(examples, [(options[0], wrong), (options[1], "logits hold NaN")])
    assert "all_equal" not in differ.record()
    assert "all_equal" not in one.record()  # there was nothing to tell apart


def test_of_errors_the_smallest_is_chosen():
    examples = [e for e in wb.load_examples("testbed", "test", users=1) if "rating" in e.task]
    far = ["1" if int(e.target) > 3 else "5" for e in examples]
    outcomes = list(zip(methods.cad([0.5, 1.0]), (far, [e.target for e in examples]), strict=True))
    assert choose(examples, outcomes).candidate.contrast == CAD(1.0)


# What a grid keeps


def test_random_heads_are_matched_to_the_chosen_set_and_tuned_as_it_was(done):
    for task in (TAG, HEADLINE):
        choice = done.choices[task]
        layers = Counter(head.partition("H")[0] for head in choice["dps"]["heads"])
        assert len(choice["random"]["seeds"]) == 2
        for seed in choice["random"]["seeds"]:
            assert Counter(head.partition("H")[0] for head in seed["heads"]) == layers
            assert [c["gamma"] for c in seed["candidates"]] == [0.5, 2.0]
        assert {c["gamma"] for c in choice["dps+cad"]["candidates"]} == {0.5, 2.0}
        assert choice["dps+cad"]["heads"] == choice["dps"]["heads"]
        assert len(choice["decore"]["candidates"]) == 2 * 3  # K × (two gammas and the entropy)


def test_the_chosen_heads_are_the_task_s_own_from_the_run(done, scores):
    for task in (TAG, HEADLINE):
        k = done.choices[task]["dps"]["k"]
        top = scores.select(tasks=[task]).top(k, "all")["all"]
        assert done.choices[task]["dps"]["heads"] == [str(head) for head in top]


def test_answers_are_those_that_generate_writes(done, testbed_model, scores):
    asked = [e for e in small(scores).test if e.task == HEADLINE]
    choice = done.choices[HEADLINE]["dps"]
    heads = HeadSet.parse(", ".join(choice["heads"]))
    contrast = wb.DPS(heads, choice["gamma"])
    written = wb.generate(testbed_model, asked, contrast, max_new_tokens=14)
    kept = done.answers[(done.answers["method"] == "dps") & (done.answers["task"] == HEADLINE)]
    assert kept["text"].tolist() == [answer.text for answer in written]
    assert kept["example"].tolist() == [e.name for e in asked]
    expected = [np.mean(answer.logprobs) for answer in written]
    # The same passes; only the sum of a dozen numbers is taken in another order.
    np.testing.assert_allclose(kept["logprob"], expected, rtol=1e-9)


def test_examples_keep_the_items_that_the_prompt_shows(done):
    row = done.examples.iloc[0]
    assert len(row["profile"]) == 4
    assert row["profile"][0].startswith("movie : ")
    assert not done.examples["leaked"].any()


def files(folder):
    return {
        path.relative_to(folder): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in folder.rglob("*.parquet")
    }


def stop_after(count, monkeypatch):
    """Press Ctrl-C while the shard of this number is written."""
    real, calls = writing.write_rows, []

    def write(*arguments):
        calls.append(arguments)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGINT)
        real(*arguments)

    monkeypatch.setattr(writing, "write_rows", write)


@pytest.mark.parametrize("count", [3, 25])  # among the candidates, among the test answers
def test_a_stopped_grid_goes_on_and_gives_the_same_table(
    count, testbed_model, scores, tmp_path, monkeypatch
):
    settings = replace(SMALL, methods=("cad", "random", "dps"))
    asked, whole, folder = small(scores), tmp_path / "whole", tmp_path / "stopped"
    monkeypatch.setattr(record, "LEAST_SHARD", 3)
    monkeypatch.setattr(record, "SHARD_WORK", 1)
    expected = evaluate(testbed_model, asked, whole, settings, scores=scores, progress=False)
    stop_after(count, monkeypatch)
    with pytest.raises(runs.Stopped, match=f"{count} finished shards are kept"):
        evaluate(testbed_model, asked, folder, settings, scores=scores, progress=False)
    monkeypatch.undo()
    monkeypatch.setattr(record, "LEAST_SHARD", 3)
    monkeypatch.setattr(record, "SHARD_WORK", 1)
    before = files(folder)
    assert len(before) == count + 1  # and the examples
    left = folder / "validation" / TAG / "dps-k1-gamma0.5" / ".00009.parquet.1-2.part"
    left.write_text("half a file")
    found = evaluate(testbed_model, asked, folder, settings, scores=scores, progress=False)
    assert before.items() <= files(folder).items()
    assert not left.exists()
    assert evaluation_table(found) == evaluation_table(expected)
    assert found.choices == expected.choices
    again = files(folder)
    evaluate(testbed_model, asked, folder, settings, scores=scores, progress=False)
    assert files(folder) == again


def test_a_shard_of_other_heads_is_written_again(testbed_model, scores, tmp_path):
    settings = replace(SMALL, methods=("dps",))
    asked = small(scores)
    found = evaluate(testbed_model, asked, tmp_path, settings, scores=scores, progress=False)
    path = next((tmp_path / "answers" / TAG / "dps-0").glob("*.parquet"))
    table = read_rows(path, ANSWER)
    spoilt = table.to_pylist()
    spoilt[0]["text"] = "by others"
    writing.write_rows(spoilt, ANSWER.with_metadata({b"made by": b"another"}), path)
    again = evaluate(testbed_model, asked, tmp_path, settings, scores=scores, progress=False)
    pd.testing.assert_frame_equal(found.answers, again.answers)


def test_a_run_of_other_settings_is_refused(done, testbed_model, scores):
    settings = replace(SMALL, gamma=(0.5,))
    with pytest.raises(wb.InputError, match=r"other settings: gamma \(was"):
        evaluate(testbed_model, small(scores), done.folder, settings, scores=scores)
    with pytest.raises(wb.InputError, match="leaked"):
        leaky = small(scores, leaked=frozenset({"testbed-tag/x"}))
        evaluate(testbed_model, leaky, done.folder, SMALL, scores=scores)


def test_a_method_that_cannot_answer_gets_a_cell_that_says_why(
    testbed_model, tmp_path, monkeypatch
):
    outside = methods.Candidate("dola", DoLa((5,)), {"layers": "5"})
    high = methods.Candidate("dola", DoLa("high"), {"layers": "high"})
    asked = ask("testbed", None, tasks=[TAG], users=2, validation_users=2)
    settings = GridSettings(methods=("dola", "cad"), gamma=(0.5,), max_new_tokens=2)
    monkeypatch.setattr(methods, "dola", lambda: [outside])
    found = evaluate(testbed_model, asked, tmp_path / "none", settings, progress=False)
    rows = evaluation_table(found)
    row = only(rows, method="dola", name="accuracy", reading="strict")
    assert row["note"] == "wanted layers between 0 and 3, got 5"
    assert (row["value"], row["p_holm"], row["examples"]) == (None, None, 0)
    assert only(rows, method="cad", name="f1", reading="strict")["examples"] == 4
    assert set(found.answers["method"]) == {"plain", "cad"}
    monkeypatch.setattr(methods, "dola", lambda: [outside, high])
    some = evaluate(testbed_model, asked, tmp_path / "some", settings, progress=False)
    choice = some.choices[TAG]["dola"]
    assert choice["layers"] == "high"
    assert choice["candidates"][0] == {"layers": "5", "failed": row["note"]}
    assert only(evaluation_table(some), method="dola", primary=True)["examples"] == 4


def test_heads_that_cannot_be_detected_leave_a_cell_that_says_why(
    testbed_model, scores, monkeypatch, tmp_path
):
    def unreadable(model, progress):
        raise wb.InputError("the attention pattern of layer 0 can't be read")

    monkeypatch.setattr(grid, "copy_scores", unreadable)
    settings = replace(SMALL, methods=("decore", "cad"), gamma=(0.5,))
    found = evaluate(testbed_model, small(scores), tmp_path, settings, progress=False)
    notes = {(row["method"], row["note"]) for row in evaluation_table(found)}
    told = "retrieval heads can't be detected: the attention pattern of layer 0 can't be read"
    assert notes == {("plain", ""), ("cad", ""), ("decore", told)}


def test_memory_that_runs_out_is_answered_with_smaller_passes(
    testbed_model, scores, monkeypatch, tmp_path
):
    import torch

    real, sizes = writing.generate, []

    def tight(*arguments, batch_tokens, **options):
        sizes.append(batch_tokens)
        if batch_tokens > 4096:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*arguments, batch_tokens=batch_tokens, **options)

    monkeypatch.setattr(writing, "generate", tight)
    settings = replace(SMALL, methods=("plain",))
    evaluate(testbed_model, small(scores), tmp_path, settings, progress=False)
    assert sizes == [16384, 8192, 4096, 4096]


def test_retrieval_heads_come_from_a_set_or_a_published_list(tmp_path, testbed_model, scores):
    listed = tmp_path / "list.json"
    listed.write_text(json.dumps({"3-1": [0.1, 0.2], "2-5": [0.9], "0-0": [0.0]}))
    assert [str(head) for head in read_retrieval(listed)] == ["L2H5", "L3H1", "L0H0"]
    HEADS.save(tmp_path / "set.json")
    assert read_retrieval(tmp_path / "set.json").heads == HEADS.heads
    settings = GridSettings(methods=("decore",), k=(2, 4), gamma=(0.5,), max_new_tokens=14)
    folder, asked = tmp_path / "run", small(scores)
    options = {"retrieval": HEADS, "progress": False}
    choices = evaluate(testbed_model, asked, folder, settings, **options).choices[TAG]
    assert {c["k"] for c in choices["decore"]["candidates"]} == {2}  # four are not listed
    assert choices["decore"]["heads"] == ["L0H1", "L2H3"]
    with pytest.raises(wb.InputError, match="2 retrieval heads are too few for K = 4"):
        four = replace(settings, k=(4,))
        evaluate(testbed_model, asked, tmp_path / "run4", four, **options)


def test_detected_retrieval_heads_are_kept_in_the_run(done, testbed_model):
    from workbench.discovery.copying import copy_scores, retrieval_heads

    kept = read_retrieval(done.folder / grid.RETRIEVAL)
    expected = retrieval_heads(copy_scores(testbed_model, progress=False), 2)
    assert kept.heads[:2] == expected.heads.heads
    note = expected.note
    assert json.loads((done.folder / COPYING).read_text()) == {"note": note}
    (told,) = (line for line in protocol_lines(done) if line.startswith("DeCoRe's heads"))
    assert told == (f"DeCoRe's heads were detected with random-token needle probes: {note}.")


def test_an_entropy_is_a_strength_of_every_method_and_prefill(testbed_model, scores, tmp_path):
    settings = replace(
        SMALL,
        methods=("cad", "decore", "random", "dps", "dps+cad"),
        k=(2,),
        gamma=(Entropy(normalised=True), Entropy()),
        seeds=1,
        prefill="shared",
        max_new_tokens=3,
    )
    asked = ask("testbed", scores, tasks=[HEADLINE], users=2, validation_users=1)
    options = {"scores": scores, "retrieval": HEADS, "retrieval_from": "l.json", "progress": False}
    found = evaluate(testbed_model, asked, tmp_path, settings, **options)
    assert found.manifest["settings"]["gamma"] == ["H/lnV", "H"]
    choice = found.choices[HEADLINE]
    for method in ("cad", "decore", "dps"):
        assert [c["gamma"] for c in choice[method]["candidates"]] == ["H/lnV", "H"]
    heads = HeadSet.parse(", ".join(choice["dps"]["heads"]))
    strength = Entropy(normalised=choice["dps"]["gamma"] == "H/lnV")
    written = wb.generate(
        testbed_model, asked.test, DPS(heads, strength), prefill="shared", max_new_tokens=3
    )
    kept = found.answers[found.answers["method"] == "dps"]
    assert kept["text"].tolist() == [answer.text for answer in written]
    rows = evaluation_table(found)
    assert only(rows, method="random", primary=True)["settings"].startswith("K 2, γ H")
    lines = protocol_lines(found)
    assert "DeCoRe's heads are those of l.json." in lines
    assert evaluate(testbed_model, asked, tmp_path, settings, **options).choices == found.choices


def test_heads_of_other_prompts_are_named_below_the_table(testbed_model, scores, tmp_path):
    prompt = wb.PromptSettings(items=2)
    settings = replace(SMALL, methods=("dps",), k=(1,), gamma=(0.5,), prompt=prompt)
    asked = ask("testbed", scores, tasks=[TAG], users=1, validation_users=1)
    with pytest.raises(wb.InputError, match="items 5 there, 2 here"):
        evaluate(testbed_model, asked, tmp_path, settings, scores=scores)
    allowed = replace(settings, other_prompt=True)
    found = evaluate(testbed_model, asked, tmp_path, allowed, scores=scores, progress=False)
    told = "Heads were found with other prompts, as --other-prompt allows: items 5 there, 2 here."
    assert told in protocol_lines(found)
    alone = wb.PromptSettings(items=0)
    lengths = [
        len(p.ids)
        for p in build_prompts(asked.test, testbed_model.tokenizer, 512, alone, new_tokens=14)
    ]
    assert found.manifest["query_tokens"] == pytest.approx(sum(lengths) / len(lengths))


def test_labels_are_decided_by_likelihood_and_texts_are_written(testbed_model, scores, tmp_path):
    settings = replace(SMALL, methods=("cad",), gamma=(2.0,), decide="likelihood")
    asked = small(scores)
    found = evaluate(testbed_model, asked, tmp_path, settings, progress=False)
    tagged = [e for e in asked.test if e.task == TAG]
    expected = decide(testbed_model, tagged, CAD(2.0), prompt=settings.prompt)
    kept = found.answers[(found.answers["task"] == TAG) & (found.answers["method"] == "cad")]
    assert kept["text"].tolist() == [decision.label for decision in expected]
    assert kept["tokens"].tolist() == [0] * len(tagged)
    logprobs = [decision.plain[decision.label] for decision in expected]
    np.testing.assert_allclose(kept["logprob"], logprobs, rtol=1e-9)  # the same pass
    assert (found.answers[found.answers["task"] == HEADLINE]["tokens"] > 5).all()
    readings = {(row["task"], row["reading"]) for row in evaluation_table(found)}
    assert readings == {(TAG, "likelihood"), (HEADLINE, None)}


# The table


def test_values_and_differences_are_those_of_a_plain_loop(done, rows, scores):
    by_name = {e.name: e for e in small(scores).test}
    for task, name, reading in ((TAG, "accuracy", "strict"), (HEADLINE, "rouge1", None)):
        score = get_metric(name).score
        means = {}
        for method in done.manifest["settings"]["methods"]:
            part = done.answers[(done.answers["task"] == task) & (done.answers["method"] == method)]
            values = [
                score(by_name[n], t) for n, t in zip(part["example"], part["text"], strict=True)
            ]
            means[method] = sum(values) / len(values)
        for method, mean in means.items():
            row = only(rows, task=task, method=method, name=name, reading=reading)
            assert row["value"] == pytest.approx(mean, abs=1e-12)
            assert (row["examples"], row["users"]) == (8, 4)
            if method != "plain":
                assert row["difference"] == pytest.approx(mean - means["plain"], abs=1e-12)


def made(tmp_path, texts, targets, users, seeds=1, leaked=False, task=TAG, **settings):
    """An evaluation with these answers: method -> texts, a list for each seed of random."""
    names = [f"{task}/{i}" for i in range(len(targets))]
    columns = {"query": "q", "style": "{}", "leaked": leaked, "profile": None, "task": task}
    examples = pd.DataFrame({"example": names, "user": users, "target": targets, **columns})
    answers = []
    for method, lists in texts.items():
        for seed, answered in enumerate(lists if method == "random" else [lists]):
            cell = {"example": names, "text": answered, "method": method, "seed": seed}
            more = {"task": task, "finished": True, "tokens": 1, "logprob": -1.0, "kl": 0.0}
            answers.append(pd.DataFrame(cell).assign(**more))
    manifest = {
        "settings": {
            "tasks": [task],
            "methods": list(texts),
            "seeds": seeds,
            "seed": 0,
            "decide": "generate",
            "splits": {"validation": "validation", "test": "test"},
            "leaked": names if leaked else [],
            **settings,
        },
        "users": {"validation": 3, "test": len(set(users))},
        "left_out_users": 0,
    }
    return Evaluation(tmp_path, manifest, {}, examples, pd.concat(answers, ignore_index=True))


def test_p_is_the_share_of_all_swaps_of_users_that_reach_the_difference(tmp_path):
    hits = {"plain": "000000000000", "dps": "111111010100"}  # two examples of each of six users
    texts = {m: ["war" if h == "1" else "sport" for h in s] for m, s in hits.items()}
    users = [f"u{i // 2}" for i in range(12)]
    row = only(
        evaluation_table(made(tmp_path, texts, ["war"] * 12, users)),
        method="dps",
        primary=True,
    )
    sums = [2, 2, 2, 1, 1, 0]
    swaps = np.array(list(product((1, -1), repeat=6)))
    reached = abs(swaps @ sums) >= 8
    # 10,000 random assignments of the 64: a standard error of 0.0024.
    assert row["p"] == pytest.approx(np.mean(reached), abs=0.01)
    assert row["difference"] == pytest.approx(8 / 12)


def random_answers(rng, count):
    return ["war" if hit else "sport" for hit in rng.random(count) < 0.5]


def test_answers_that_differ_by_chance_show_no_effect(tmp_path):
    rng = np.random.default_rng(5)
    texts = {name: random_answers(rng, 200) for name in ("plain", "cad", "dps")}
    texts["random"] = [random_answers(rng, 200) for _ in range(3)]
    users = [f"u{i // 2}" for i in range(200)]
    found = made(tmp_path, texts, ["war"] * 200, users, seeds=3)
    first, second = findings(evaluation_table(found))
    assert "no effect shown: cad" in first
    assert "better:" not in first
    assert "worse:" not in first
    assert "DPS against these 3 random sets on average: no effect shown" in second


def test_effects_are_called_by_the_side_that_is_better(tmp_path):
    users = [f"u{i}" for i in range(40)]
    right, off = ["3"] * 40, ["4"] * 40
    texts = {"plain": off, "dps": right, "cad": ["5"] * 40, "random": [off, right, off]}
    rows = evaluation_table(
        made(tmp_path, texts, right, users, seeds=3, task="testbed-rating", leaked=True)
    )
    first, second = findings(rows)
    assert "better: dps (-1.000), random (-0.333)" in first
    assert "worse: cad (+1.000)" in first
    assert "LEAKED" in first
    assert "DPS is better than these 3 random sets on average (-0.667" in second
    assert second.endswith("it beats 2 of 3, as random heads do with probability 0.50.")
    row = only(rows, method="random", primary=True)
    assert (row["value"], row["seed_min"], row["seed_max"]) == (pytest.approx(2 / 3), 0.0, 1.0)
    assert all(row["leaked"] for row in rows)


def test_harm_of_random_heads_is_not_called_a_gain_of_dps(tmp_path):
    users = [f"u{i}" for i in range(40)]
    right, off = ["3"] * 40, ["4"] * 40
    texts = {"plain": right, "dps": right, "random": [off]}
    lines = findings(evaluation_table(made(tmp_path, texts, right, users, task="testbed-rating")))
    assert "DPS is better than this random set (-1.000" in lines[1]
    assert lines[1].endswith("; against plain it shows no gain.")


def test_pooled_metrics_of_random_heads_are_means_over_seeds(tmp_path):
    from sklearn.metrics import f1_score

    rng = np.random.default_rng(2)
    labels = ["war", "sport", "crime"]
    targets, plain, *seeds = (list(rng.choice(labels, 30)) for _ in range(4))
    texts = {"plain": plain, "random": seeds}
    users = [f"u{i // 3}" for i in range(30)]
    rows = evaluation_table(made(tmp_path, texts, targets, users, seeds=2))
    row = only(rows, method="random", name="f1", reading="strict")
    options = {"labels": get_task(TAG).labels, "average": "macro", "zero_division": 0}
    each = [f1_score(targets, seed, **options) for seed in seeds]
    assert row["value"] == pytest.approx(np.mean(each))
    assert (row["seed_min"], row["seed_max"]) == pytest.approx((min(each), max(each)))
    base = f1_score(targets, plain, **options)
    assert row["difference"] == pytest.approx(np.mean(each) - base)
    assert row["p"] is None  # the primary metric alone has one


def test_holm_is_taken_over_all_methods_and_tasks(rows):
    tested = [row for row in rows if row["p"] is not None]
    assert len(tested) == 2 * 7
    assert all(row["primary"] for row in tested)
    smallest = min(tested, key=lambda row: row["p"])
    assert smallest["p_holm"] == pytest.approx(min(1, smallest["p"] * 14))


def test_readings_differ_where_a_model_wraps_its_answer(tmp_path):
    targets = ["war", "sport"]
    texts = {"plain": ["war", "sport"], "cad": ["The answer is war.", "sport"]}
    rows = evaluation_table(made(tmp_path, texts, targets, ["a", "b"]))
    values = {
        r["reading"]: r["value"] for r in rows if (r["method"], r["name"]) == ("cad", "accuracy")
    }
    assert values == {"strict": 0.5, "lenient": 1.0}
    told = {
        q["method"]: (q["unreadable"], q["unreadable_lenient"])
        for q in qualities(made(tmp_path, texts, targets, ["a", "b"]))
    }
    assert told == {"plain": (0.0, 0.0), "cad": (0.5, 0.0)}


def test_a_cell_that_is_not_finished_has_no_numbers(tmp_path):
    found = made(tmp_path, {"plain": ["war"] * 4, "cad": ["war"] * 4}, ["war"] * 4, list("abcd"))
    kept = found.answers[(found.answers["method"] == "plain") | (found.answers.index < 6)]
    row = only(evaluation_table(replace(found, answers=kept)), method="cad", primary=True)
    assert (row["value"], row["examples"]) == (None, 0)
    assert row["note"] == "2 of 4 answers are there; run the command again"


def test_the_table_is_written_as_plain_json(done, rows):
    found = summarise(done)
    assert json.loads((done.folder / "tables/evaluation.json").read_text()) == rows == found["rows"]
    words = json.loads((done.folder / "tables/findings.json").read_text())
    assert words["findings"] == found["findings"]
    assert "2 users of the validation split" in words["protocol"][0]
    assert not any("other prompts" in line for line in words["protocol"])
    told = only(found["qualities"], task=HEADLINE, method="no-profile")
    assert told["kl"] > 0.01
    assert only(found["qualities"], task=HEADLINE, method="plain")["kl"] == 0
    assert told["unreadable"] is None


CHOSEN = {
    "dps": {"k": 8, "gamma": 2.0, "candidates": []},
    "decore": {"k": 8, "gamma": "H"},
    "cad": {"gamma": 1.0, "all_equal": True},
    "random": {"seeds": [{"k": 8, "gamma": 0.5}, {"k": 8, "gamma": 0.5, "all_equal": True}]},
    "dps+cad": {"k": 8, "gamma": 0.5, "cad": 2.0},
    "dola": {"failed": "too few layers"},
}


def lines_of(tmp_path, choices, methods=("plain", "cad", "dps"), task=TAG, **more):
    texts = {name: [["1"]] if name == "random" else ["1"] for name in methods}
    tried = {"k": [4, 8], "gamma": [0.5, 1.0, 2.0, "H"]}
    found = made(tmp_path, texts, ["1"], ["a"], task=task, **tried)
    return protocol_lines(replace(found, choices={task: choices}, manifest=found.manifest | more))


def test_the_largest_k_and_the_largest_gamma_are_warned_of_where_they_were_chosen(tmp_path):
    (line,) = (one for one in lines_of(tmp_path, CHOSEN) if one.startswith("The largest"))
    assert line == (
        "The largest K (8) or gamma (2) tried was chosen, a larger one may do better: dps on "
        f"{TAG} (K, gamma), decore on {TAG} (K), dps+cad on {TAG} (gamma)."
    )
    small = {"dps": {"k": 4, "gamma": 2.0}}
    (line,) = (one for one in lines_of(tmp_path, small) if one.startswith("The largest"))
    assert line.startswith("The largest gamma (2) tried was chosen")
    inside = {"dps": {"k": 4, "gamma": "H"}}
    assert not any("largest" in one for one in lines_of(tmp_path, inside))


def test_cells_where_validation_told_nothing_apart_are_named(tmp_path):
    told = "All candidates were equal on validation; the gentlest was taken"
    assert f"{told}: cad on {TAG}, random on {TAG}." in lines_of(tmp_path, CHOSEN)
    assert not any(told in line for line in lines_of(tmp_path, {"cad": {"gamma": 1.0}}))


def test_the_protocol_says_among_what_each_method_s_settings_were_chosen(tmp_path):
    names = ("plain", "random", "dps", "dps+cad")
    (line,) = (one for one in lines_of(tmp_path, {}, names) if one.startswith("Chosen on"))
    assert line == (
        "Chosen on validation: DPS among K x gamma; random heads, a set a seed at DPS's K, among "
        "gamma alone; DPS + CAD, with DPS's heads, among pairs of strengths and no other K."
    )
    assert not any("Chosen on" in line for line in lines_of(tmp_path, {}, ("plain", "no-profile")))


def test_the_interval_of_macro_f1_is_explained_where_there_is_one(tmp_path):
    rare = MACRO_F1[1:]
    assert any(rare in line for line in lines_of(tmp_path, {}))
    for task in ("testbed-rating", HEADLINE):
        assert not any(rare in line for line in lines_of(tmp_path, {}, task=task))


def test_what_is_special_about_the_users_is_said(tmp_path):
    plain = lines_of(tmp_path, {}, users_inferred=False, users_recur=False)
    inferred = set(lines_of(tmp_path, {}, users_inferred=True)) - set(plain)
    recur = set(lines_of(tmp_path, {}, users_recur=True)) - set(plain)
    assert [line[:25] for line in (*inferred, *recur)] == [
        "Users were inferred, sinc",
        "Users recur across splits",
    ]


# Many machines


def test_two_workers_give_the_answers_of_one(testbed_model, scores, tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed")
    import warnings

    settings = replace(SMALL, methods=("cad", "dps"), gamma=(0.5,))
    asked = small(scores)
    local = evaluate(testbed_model, asked, tmp_path / "a", settings, scores=scores, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray leaves sockets and processes to the collector
        import ray

        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        try:
            far = evaluate(
                *(testbed_model, asked, tmp_path / "b", settings),
                scores=scores,
                ray=wb.RayOptions(workers=2),
                progress=False,
            )
        finally:
            ray.shutdown()
    assert far.choices == local.choices
    pd.testing.assert_frame_equal(
        far.answers.drop(columns=["logprob", "kl"]), local.answers.drop(columns=["logprob", "kl"])
    )
