"""Judged pairs: out with the methods hidden, back in by people or by an endpoint, and table 4."""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score
from typer.testing import CliRunner

from workbench.cli.commands import app
from workbench.errors import InputError
from workbench.evaluation import endpoint as asking
from workbench.evaluation import judge as judging
from workbench.evaluation import pairwise
from workbench.evaluation.annotations import read_annotations
from workbench.evaluation.results import (
    ANSWER,
    EXAMPLE,
    EXAMPLES,
    FORMAT,
    load_evaluation,
    stage,
    write_rows,
)

TASKS = {"LaMP-4": 20, "LaMP-7": 9}
SAME = 4  # in each task both methods say the same to every fourth example


def text_of(method, number):
    return (
        "the same" if number % SAME == 0 else f"{method} \u2028says {'so ' * (number % 5)}{number}"
    )


@pytest.fixture
def run(tmp_path):
    """An evaluation of three methods, two examples a user."""
    folder = tmp_path / "run"
    folder.mkdir()
    settings = {"model": "tiny", "tasks": list(TASKS), "methods": ["plain", "cad", "dps"]}
    (folder / "manifest.json").write_text(json.dumps({"format": FORMAT, "settings": settings}))
    examples = []
    for task, count in TASKS.items():
        for i in range(count):
            examples.append(
                {
                    "example": f"{task}/{i}",
                    "user": f"user {i // 2}",
                    "task": task,
                    "query": f"query {i} </script>",
                    "target": f"gold {i}",
                    "profile": [f"item {i}", "other"],
                    "style": "{}",
                    "leaked": False,
                }
            )
        for method in ("cad", "dps"):
            answers = [
                {"example": f"{task}/{i}", "text": text_of(method, i), "finished": True}
                for i in range(count)
            ]
            write_rows(answers, ANSWER, folder / stage(task, method, 0) / "00000.parquet")
    write_rows(examples, EXAMPLE, folder / EXAMPLES)
    return folder


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def exported(run, path, methods=("cad", "dps"), **options):
    text, key = judging.draw(load_evaluation(run), methods, **options)
    judging.write_pairs(text, key, path)
    return key


@pytest.fixture
def pairs(run, tmp_path):
    path = tmp_path / "pairs.jsonl"
    exported(run, path)
    return path


@pytest.fixture
def key(pairs):
    return judging.load_key(judging.key_path(pairs), pairs)


# Pairs out


def test_pairs_hide_the_methods_and_the_key_names_them(run, pairs, key):
    lines = lines_of(pairs)
    wanted = {"id", "task", "profile", "query", "answer_a", "answer_b"}
    assert all(set(line) == wanted for line in lines)
    by_id = {pair.id: pair for pair in key.pairs}
    for line in lines:
        pair = by_id[line["id"]]
        number = int(pair.example.split("/")[1])
        other = {"cad": "dps", "dps": "cad"}[pair.a]
        assert (line["answer_a"], line["answer_b"]) == (
            text_of(pair.a, number),
            text_of(other, number),
        )
        assert line["query"] == f"query {number} </script>"
        assert line["profile"] == [f"item {number}", "other"]
        assert pair.user == f"user {number // 2}"
        assert str(number) not in line["id"] or len(line["id"]) == 12


def test_equal_answers_stay_out_of_the_file_and_are_ties_in_the_key(pairs, key):
    for task, count in TASKS.items():
        ties = [pair.example for pair in key.ties if pair.task == task]
        assert sorted(ties) == sorted(f"{task}/{i}" for i in range(0, count, SAME))
        assert sum(pair.task == task for pair in key.pairs) == count - len(ties)
    assert "the same" not in pairs.read_text(encoding="utf-8")


def test_either_method_is_a_in_half_of_a_tasks_pairs(run):
    orders = set()
    for seed in range(6):
        _, key = judging.draw(load_evaluation(run), ("cad", "dps"), seed=seed)
        for task in TASKS:
            sides = [pair.a for pair in key.pairs if pair.task == task]
            assert abs(sides.count("cad") - sides.count("dps")) <= len(sides) % 2
        orders.add(tuple(pair.a for pair in sorted(key.pairs, key=lambda p: p.example)))
    assert len(orders) == 6


def test_the_same_seed_gives_the_same_file_whichever_method_is_named_first(run):
    one, key = judging.draw(load_evaluation(run), ("cad", "dps"), seed=3)
    other, swapped = judging.draw(load_evaluation(run), ("dps", "cad"), seed=3)
    assert one == other
    assert swapped == replace(key, methods=("dps", "cad"), answer_seeds=swapped.answer_seeds)
    assert one != judging.draw(load_evaluation(run), ("cad", "dps"), seed=4)[0]


def test_a_limit_draws_examples_with_equal_answers_too(run):
    _, key = judging.draw(load_evaluation(run), ("cad", "dps"), tasks=["LaMP-4"], limit=8, seed=1)
    assert len(key.pairs) + len(key.ties) == 8
    assert {pair.task for pair in key.pairs} == {"LaMP-4"}
    shares = [
        len(judging.draw(load_evaluation(run), ("cad", "dps"), limit=8, seed=seed)[1].ties)
        for seed in range(30)
    ]
    assert np.mean(shares) == pytest.approx(16 * (5 + 3) / 29, abs=1.0)


def test_the_target_is_shown_only_when_asked_for(run):
    hidden, _ = judging.draw(load_evaluation(run), ("cad", "dps"))
    shown, _ = judging.draw(load_evaluation(run), ("cad", "dps"), show_target=True)
    assert "gold" not in hidden
    assert shown.count('"target": "gold') == hidden.count('"id"')


@pytest.mark.parametrize(
    ("methods", "options", "message"),
    [
        (("cad",), {}, "wanted two methods such as cad,dps, got cad"),
        (("cad", "cad"), {}, "wanted two methods"),
        (("cad", "dola"), {}, "no answers of 'dola'; there are those of cad, dps"),
        (("cad", "dps"), {"tasks": ["LaMP-1"]}, "no task 'LaMP-1'; there are LaMP-4, LaMP-7"),
    ],
)
def test_pairs_that_cant_be_drawn_are_refused(run, methods, options, message):
    with pytest.raises(InputError, match=message):
        judging.draw(load_evaluation(run), methods, **options)


def test_methods_that_always_agree_leave_nothing_to_judge(run):
    for task in TASKS:
        path = run / stage(task, "dps", 0) / "00000.parquet"
        path.write_bytes((run / stage(task, "cad", 0) / "00000.parquet").read_bytes())
    with pytest.raises(InputError, match="the same answer to all 29 examples"):
        judging.draw(load_evaluation(run), ("cad", "dps"))


def test_pairs_that_somebody_may_be_judging_are_not_overwritten(run, pairs):
    exported(run, pairs)  # the same again is no harm
    with pytest.raises(InputError, match="holds other pairs; name another file"):
        exported(run, pairs, seed=1)


# Judgements in


def annotate(path, key, choose, annotator="ann", pairs=None):
    """One line a pair: what `choose` says of it, given which method is A."""
    rows = [
        {"id": pair.id, "choice": choose(pair), "annotator": annotator}
        for pair in (key.pairs if pairs is None else pairs)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prefers(method):
    return lambda pair: "A" if pair.a == method else "B"


def by_number(pair):
    """dps wins a third, cad a sixth, the rest are ties, whoever is A."""
    turn = int(pair.example.split("/")[1]) % 6
    side = prefers("dps" if turn in (1, 3) else "cad")(pair)
    return side if turn in (1, 3, 5) else "tie"


def outcome(found):
    return {r.group: (r.win.mean, r.tie.mean, r.loss.mean) for r in found}


def test_rates_are_those_counted_by_hand(tmp_path, key):
    said = read_annotations([annotate(tmp_path / "a.jsonl", key, by_number)], key)
    for name, count in (*TASKS.items(), ("all", None)):
        found = {r.group: r for r in pairwise.rates(key, said, ("dps", "cad"))}[name]
        numbers = range(count) if count else [i for n in TASKS.values() for i in range(n)]
        won = sum(i % SAME != 0 and i % 6 in (1, 3) for i in numbers)
        lost = sum(i % SAME != 0 and i % 6 == 5 for i in numbers)
        total = len(numbers)
        assert found.win.mean == pytest.approx(won / total)
        assert found.loss.mean == pytest.approx(lost / total)
        assert found.tie.mean == pytest.approx(1 - (won + lost) / total)
        assert found.margin.mean == pytest.approx((won - lost) / total)
        assert found.win.low <= found.win.mean <= found.win.high
        assert found.equal == sum(i % SAME == 0 for i in numbers)


def test_swapping_the_methods_swaps_the_table(tmp_path, run, pairs, key):
    said = read_annotations([annotate(tmp_path / "a.jsonl", key, by_number)], key)
    other = tmp_path / "swapped.jsonl"
    swapped = exported(run, other, methods=("dps", "cad"))
    again = read_annotations([tmp_path / "a.jsonl"], swapped)
    one, two = (pairwise.rates(k, s, k.methods) for k, s in ((key, said), (swapped, again)))
    assert key.methods == swapped.methods[::-1]
    for a, b in zip(one, two, strict=True):
        assert (a.win, a.tie, a.loss, a.p) == (b.loss, b.tie, b.win, b.p)
        assert a.margin.mean == -b.margin.mean
        assert (a.margin.low, a.margin.high) == pytest.approx((-b.margin.high, -b.margin.low))
        assert a.win != a.loss  # or the swap would show nothing


def test_users_are_the_unit_of_intervals_and_p(tmp_path, key):
    one_user = replace(key, pairs=tuple(replace(p, user="u") for p in key.pairs), ties=())
    said = read_annotations([annotate(tmp_path / "a.jsonl", key, prefers("dps"))], key)
    found = pairwise.rates(one_user, said, ("dps", "cad"))[0]
    assert np.isnan(found.win.low)
    assert found.p == 1
    many = pairwise.rates(key, said, ("dps", "cad"))[0]
    assert many.win.low > 0
    assert many.p < 0.05


def test_a_task_without_a_pair_is_all_ties_and_no_test(tmp_path, key):
    other = [replace(p, task="LaMP-5", a="", id=f"{p.id}x") for p in key.ties[:5]]
    more = replace(key, ties=(*key.ties, *other))
    said = read_annotations([annotate(tmp_path / "a.jsonl", key, by_number)], key)
    found = {r.group: r for r in pairwise.rates(more, said, ("dps", "cad"))}
    assert found["LaMP-5"].tie.mean == 1
    assert np.isnan(found["LaMP-5"].p)
    without = {r.group: r for r in pairwise.rates(key, said, ("dps", "cad"))}
    assert found["LaMP-4"].p == without["LaMP-4"].p  # Holm counts two tests, not three
    assert found["all"].equal == without["all"].equal + 5


def test_a_task_that_nobody_judged_has_no_rates(tmp_path, key):
    mine = [pair for pair in key.pairs if pair.task == "LaMP-7"]
    path = annotate(tmp_path / "a.jsonl", key, by_number, pairs=mine)
    found = pairwise.rates(key, read_annotations([path], key), ("dps", "cad"))
    assert [r.group for r in found] == ["LaMP-7"]


def test_p_is_after_holm_over_the_tasks(tmp_path, key):
    said = read_annotations([annotate(tmp_path / "a.jsonl", key, prefers("dps"))], key)
    found = {r.group: r for r in pairwise.rates(key, said, ("dps", "cad"))}
    # Signs of users: 10 with a decided pair, all on one side; 2 of 2 ** 10 assignments reach it.
    # Of 10,000 drawn assignments 20 are expected to; the tolerances are 3 of their deviations.
    assert found["LaMP-4"].p == pytest.approx(2 * 2 / 2**10, abs=2 * 0.0013)
    assert found["LaMP-4"].p == 2 * found["all"].p  # the same users, whom nothing else moves


def test_few_judgements_are_not_outweighed_by_ties_known_beforehand(tmp_path, key):
    mine = [pair for pair in key.pairs if pair.task == "LaMP-4"]  # 15 pairs, 5 equal
    path = annotate(tmp_path / "a.jsonl", key, prefers("dps"), pairs=mine[:3])
    (found,) = pairwise.rates(key, read_annotations([path], key), ("dps", "cad"))
    assert (found.judged, found.asked, found.equal) == (3, 15, 5)
    assert found.win.mean == pytest.approx(15 / 20)
    assert found.tie.mean == pytest.approx(5 / 20)


def test_several_annotators_of_a_pair_count_as_their_mean(tmp_path, key):
    paths = [
        annotate(tmp_path / "a.jsonl", key, prefers("dps"), "ann"),
        annotate(tmp_path / "b.jsonl", key, prefers("cad"), "ben"),
        annotate(tmp_path / "c.jsonl", key, lambda pair: "tie", "cai"),
    ]
    found = pairwise.rates(key, read_annotations(paths, key), ("dps", "cad"))[0]
    assert found.win.mean == pytest.approx(15 / 20 / 3)
    assert found.win.mean == pytest.approx(found.loss.mean)


def test_csv_and_json_lines_say_the_same(tmp_path, key):
    lines = annotate(tmp_path / "a.jsonl", key, by_number)
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    table = tmp_path / "a.csv"
    text = "annotator,remark,choice,id\r\n" + "".join(
        f'{r["annotator"]},"why, ""so""",{r["choice"]},{r["id"]}\r\n' for r in rows
    )
    table.write_bytes(b"\xef\xbb\xbf" + text.encode())  # as a spreadsheet saves it
    one, two = (read_annotations([path], key) for path in (lines, table))
    assert [(a.id, a.choice, a.annotator) for a in one] == [
        (a.id, a.choice, a.annotator) for a in two
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "ID", "choice": "C", "annotator": "x"}', "choice must be A, B or tie, got 'C'"),
        ('{"id": "ID", "choice": "a", "annotator": "x"}', "choice must be A, B or tie, got 'a'"),
        ('{"id": "ID", "choice": null, "annotator": "x"}', "choice must be A, B or tie, got None"),
        ('{"id": "ID", "choice": "A"}', "wanted a text as annotator, got None"),
        ('{"choice": "A", "annotator": "x"}', "wanted a text as id, got None"),
        ('{"id": "nobody", "choice": "A", "annotator": "x"}', "id 'nobody' is none of the"),
        ('{"id": "ID", "choice": "B", "annotator": "ann"}', "judged pair ID before, at .*line 1"),
        ('{"id": ', "malformed JSON"),
        ("[1]", "wanted an object"),
    ],
)
def test_a_bad_line_is_refused_by_file_and_line(tmp_path, key, line, message):
    name = key.pairs[0].id
    path = annotate(tmp_path / "a.jsonl", key, by_number, pairs=key.pairs[:1])
    with path.open("a") as file:
        file.write("\n" + line.replace("ID", name) + "\n")
    with pytest.raises(InputError, match=f"a.jsonl: line 3: .*{message.replace('ID', name)}"):
        read_annotations([path], key)


def test_bad_files_are_refused(tmp_path, key):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InputError, match="holds no annotation"):
        read_annotations([tmp_path / "empty.jsonl"], key)
    (tmp_path / "a.csv").write_text("id,choice\n")
    with pytest.raises(InputError, match=r"a\.csv: line 1: no column annotator"):
        read_annotations([tmp_path / "a.csv"], key)
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="no UTF-8"):
        read_annotations([tmp_path / "b.jsonl"], key)
    with pytest.raises(InputError, match="can't be read"):
        read_annotations([tmp_path / "nowhere.jsonl"], key)


def test_a_key_of_other_pairs_or_of_another_run_is_refused(tmp_path, run, pairs, key):
    other = tmp_path / "other.jsonl"
    exported(run, other, seed=9)
    with pytest.raises(InputError, match="is the key of other pairs than"):
        judging.load_key(judging.key_path(other), pairs)
    pairs.write_text(pairs.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    with pytest.raises(InputError, match="or one of them was changed"):
        judging.load_key(judging.key_path(pairs), pairs)
    evaluation = load_evaluation(run)
    judging.check_run(key, evaluation)
    evaluation.manifest["settings"]["model"] = "another"
    with pytest.raises(InputError, match="drawn from another run"):
        judging.check_run(key, evaluation)


# Agreement


def columns(*rows):
    """Units of observers' rows in which a dot is a missing judgement."""
    return [[value for value in unit if value != "."] for unit in zip(*rows, strict=True)]


def test_alpha_is_krippendorffs_published_one():
    # Krippendorff, Computing Krippendorff's Alpha-Reliability (2011). Section A: two observers,
    # ten units. Section C: four observers, twelve units, some judgements missing.
    two = columns("0100000010", "1110010000")
    four = columns("123321412...", "1233224125.3", ".3332342251.", "12332441251.")
    assert pairwise.krippendorff_alpha(two) == pytest.approx(0.095, abs=0.0005)
    assert pairwise.krippendorff_alpha(four) == pytest.approx(0.743, abs=0.0005)


def test_alpha_is_near_cohens_kappa_for_two_annotators_of_many_pairs():
    rng = np.random.default_rng(0)
    one = rng.choice(["A", "B", "tie"], 4000, p=[0.5, 0.3, 0.2])
    two = np.where(rng.random(4000) < 0.7, one, rng.choice(["A", "B", "tie"], 4000))
    kappa = cohen_kappa_score(one, two)
    units = list(zip(one, two, strict=True))
    # Alpha takes both annotators' choices for one distribution; they are nearly the same here.
    assert pairwise.krippendorff_alpha(units) == pytest.approx(kappa, abs=0.01)
    assert pairwise.percent_agreement(units) == pytest.approx(np.mean(one == two))


def test_agreement_without_anything_to_agree_on_is_not_a_number():
    assert np.isnan(pairwise.krippendorff_alpha([["A"], ["B"]]))
    assert np.isnan(pairwise.krippendorff_alpha([["A", "A"], ["A", "A"]]))
    assert np.isnan(pairwise.percent_agreement([["A"]]))
    assert pairwise.krippendorff_alpha([["A", "A"], ["B", "B"]]) == 1


def test_position_bias_is_the_share_of_a_among_decided(tmp_path, key):
    chosen = iter(["A", "A", "A", "B", "tie"] * 20)
    path = annotate(tmp_path / "a.jsonl", key, lambda pair: next(chosen), pairs=key.pairs[:20])
    found = pairwise.reliability(key, read_annotations([path], key))
    assert found.first.mean == pytest.approx(3 / 4)
    assert found.first.low < 3 / 4 < found.first.high
    assert (found.annotators, found.shared, found.inconsistent) == (1, 0, None)
    tied = annotate(tmp_path / "b.jsonl", key, lambda pair: "tie")
    assert pairwise.reliability(key, read_annotations([tied], key)).first is None


# An endpoint


@contextmanager
def server(answer):
    """A chat endpoint on this machine; `answer(data, headers, count)` gives text or a status."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append({"path": self.path, "body": body, "headers": dict(self.headers)})
            said = answer(json.loads(body["messages"][-1]["content"]), self.headers, len(seen))
            status, text = said if isinstance(said, tuple) else (200, said)
            message = {"choices": [{"message": {"role": "assistant", "content": text}}]}
            out = json.dumps(message if status == 200 else {"error": text}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(out)))
            if status == 429:
                self.send_header("Retry-After", "0")
            self.end_headers()
            self.wfile.write(out)

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_port}", seen
        finally:
            http.shutdown()
            thread.join()


def likes(method):
    """A judge that sees through the blind: it reads the method off the answer."""
    return lambda data, *_: "A" if data["answer_a"].startswith(method) else "B"


def ask(pairs, key, url, out, secret=""):
    to = asking.Endpoint(url, "judge-1", secret, pause=0.0)
    asking.judge(pairs, key.sha256, to, out, progress=False)
    return read_annotations([out], key)


def test_a_judge_with_a_taste_finds_its_method_in_either_order(tmp_path, pairs, key):
    with server(likes("dps")) as (url, seen):
        said = ask(pairs, key, url, tmp_path / "out.jsonl", secret="secret")
    assert len(seen) == 2 * len(key.pairs)
    found = outcome(pairwise.rates(key, said, ("dps", "cad")))
    assert found["LaMP-4"] == pytest.approx((15 / 20, 5 / 20, 0))
    trust = pairwise.reliability(key, said)
    assert (trust.inconsistent, trust.unreadable) == (0, 0)
    assert trust.first.mean == 0.5
    assert {one["path"] for one in seen} == {"/v1/chat/completions"}
    assert {one["headers"]["Authorization"] for one in seen} == {"Bearer secret"}
    assert "secret" not in (tmp_path / "out.jsonl").read_text()


def test_both_orders_are_asked_and_the_texts_are_data(tmp_path, pairs, key):
    with server(likes("dps")) as (url, seen):
        ask(pairs, key, url, tmp_path / "out.jsonl")
    for first, second in zip(seen[::2], seen[1::2], strict=True):
        one, two = (json.loads(q["body"]["messages"][1]["content"]) for q in (first, second))
        assert (one["answer_a"], one["answer_b"]) == (two["answer_b"], two["answer_a"])
        assert one["query"] == two["query"]
        assert set(one) == {"profile", "query", "answer_a", "answer_b"}
        assert "data" in first["body"]["messages"][0]["content"]
        assert (first["body"]["temperature"], first["body"]["model"]) == (0, "judge-1")


def test_a_judge_that_always_says_a_finds_ties_only(tmp_path, pairs, key):
    with server(lambda *_: "A") as (url, _):
        said = ask(pairs, key, url, tmp_path / "out.jsonl")
    for win, tie, loss in outcome(pairwise.rates(key, said, ("cad", "dps"))).values():
        assert (win, tie, loss) == (0, 1, 0)
    trust = pairwise.reliability(key, said)
    assert trust.inconsistent == 1
    assert trust.first.mean == 1


def test_swapping_the_methods_swaps_an_endpoints_table(tmp_path, run, pairs, key):
    def longer(data, *_):
        a, b = len(data["answer_a"]), len(data["answer_b"])
        if a == b:
            return "A" if int(data["query"].split()[1]) % 3 else likes("dps")(data)
        return "A" if a > b else "B"

    swapped_pairs = tmp_path / "swapped.jsonl"
    swapped = exported(run, swapped_pairs, methods=("dps", "cad"))
    with server(longer) as (url, _):
        one = ask(pairs, key, url, tmp_path / "one.jsonl")
        two = ask(swapped_pairs, swapped, url, tmp_path / "two.jsonl")
    tables = [pairwise.rates(k, s, k.methods) for k, s in ((key, one), (swapped, two))]
    for a, b in zip(*tables, strict=True):
        assert (a.win, a.tie, a.loss, a.p) == (b.loss, b.tie, b.win, b.p)
        assert a.win.mean != a.loss.mean


def test_a_busy_server_is_asked_again(tmp_path, pairs, key):
    def busy(data, _, count):
        if count <= 2:
            return (429 if count == 1 else 503), "busy"
        return likes("dps")(data)

    with server(busy) as (url, seen):
        said = ask(pairs, key, url, tmp_path / "out.jsonl")
    assert len(seen) == 2 * len(key.pairs) + 2
    assert outcome(pairwise.rates(key, said, ("dps", "cad")))["all"][2] == 0


def test_a_server_that_stays_busy_ends_the_run_and_keeps_what_was_judged(tmp_path, pairs, key):
    def dies(data, _, count):
        return (500, "no more") if count > 6 else likes("dps")(data)

    out = tmp_path / "out.jsonl"
    with server(dies) as (url, seen), pytest.raises(InputError, match=r"500: .*no more.* 6 tries"):
        ask(pairs, key, url, out)
    assert len(lines_of(out)) == 1 + 3
    # A process that is killed while it writes leaves half a line.
    with out.open("a") as file:
        file.write('{"id": "' + key.pairs[3].id)
    with server(likes("dps")) as (url, seen):
        said = ask(pairs, key, url, out)
    assert len(seen) == 2 * (len(key.pairs) - 3)
    assert len(said) == len(key.pairs)
    with server(likes("dps")) as (url, seen):
        ask(pairs, key, url, out)
    assert seen == []


def test_a_reply_that_takes_too_long_is_asked_for_again(tmp_path, pairs, key):
    def slow(data, _, count):
        if count == 1:
            time.sleep(0.6)
        return likes("dps")(data)

    with server(slow) as (url, seen):
        to = asking.Endpoint(url, "judge-1", timeout=0.4, pause=0.0)
        asking.judge(pairs, key.sha256, to, tmp_path / "out.jsonl", progress=False)
    assert len(seen) > 2 * len(key.pairs)
    assert len(read_annotations([tmp_path / "out.jsonl"], key)) == len(key.pairs)


def test_without_httpx_the_extra_is_named(tmp_path, pairs, key, monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(InputError, match=r"pip install 'preference-heads-workbench\[judge\]'"):
        ask(pairs, key, "http://127.0.0.1:9", tmp_path / "out.jsonl")


def test_replies_that_say_something_else_are_asked_twice_and_kept_as_unreadable(
    tmp_path, pairs, key, monkeypatch
):
    monkeypatch.setattr(asking, "UNREADABLE", len(pairs.read_text().splitlines()) + 1)

    def chatty(data, *_):
        return likes("dps")(data) if data["query"].startswith("query 1 ") else "I'd say A"

    out = tmp_path / "out.jsonl"
    with server(chatty) as (url, seen):
        said = ask(pairs, key, url, out)
    readable = sum(pair.example.endswith("/1") for pair in key.pairs)
    assert readable == 2
    assert len(seen) == 2 * readable + 4 * (len(key.pairs) - readable)
    assert pairwise.reliability(key, said).unreadable == len(key.pairs) - readable
    found = {r.group: r for r in pairwise.rates(key, said, ("dps", "cad"))}
    assert found["LaMP-4"].judged == 1
    with server(lambda *_: "perhaps") as (url, _):
        said = ask(pairs, key, url, tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="none of the endpoint's replies could be read"):
        pairwise.rates(key, said, ("dps", "cad"))


def test_a_judge_that_is_never_readable_is_given_up_soon(tmp_path, pairs, key):
    out = tmp_path / "out.jsonl"
    with (
        server(lambda *_: "It depends.") as (url, seen),
        pytest.raises(InputError, match=r"10 pairs in a row, at last 'It depends.'; wanted A, B"),
    ):
        ask(pairs, key, url, out)
    assert len(seen) == 4 * asking.UNREADABLE
    assert len(lines_of(out)) == 1 + asking.UNREADABLE


def test_a_server_that_takes_no_max_tokens_is_asked_by_the_newer_name(tmp_path, pairs, key):
    def newer(data, headers, count):
        if "max_tokens" in seen[count - 1]["body"]:
            return 400, "Unsupported parameter: 'max_tokens'; use 'max_completion_tokens'"
        return likes("dps")(data)

    with server(newer) as (url, seen):
        ask(pairs, key, url, tmp_path / "out.jsonl")
    assert len(seen) == 2 * len(key.pairs) + 1
    assert {one["body"].get("max_completion_tokens") for one in seen[1:]} == {1024}
    assert all("temperature" not in one["body"] for one in seen[1:])


@pytest.mark.parametrize(
    ("reply", "read"),
    [
        ("A", "A"),
        (" b.\n", "B"),
        ("Tie", "tie"),
        ('"A"', "A"),
        ('{"choice": "tie"}', "tie"),
        ('{"choice": "A", "why": "because"}', None),
        ('{"choice": ["A"]}', None),
        ("A or B", None),
        ("Answer A", None),
        ("AB", None),
        ("**A**", "A"),
        ("[[B]].", "B"),
        ("<think>A fits, or B?\nA.</think>\n\nB", "B"),
        ("<think>A", None),
        ("**A** or **B**", None),
        ("", None),
        (None, None),
        ('{"choice": ', None),
    ],
)
def test_a_reply_is_read_strictly(reply, read):
    assert asking.parse(reply) == read


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "judge-2"}, "answers with another model"),
        ({"pairs": "0" * 64}, "answers with another pairs"),
        ({"prompt": "0" * 64}, "answers with another prompt"),
    ],
)
def test_answers_are_never_mixed(tmp_path, pairs, key, changes, message):
    out = tmp_path / "out.jsonl"
    with server(likes("dps")) as (url, seen):
        ask(pairs, key, url, out)
        head, *lines = lines_of(out)
        text = "".join(json.dumps(line) + "\n" for line in [{**head, **changes}, *lines])
        out.write_text(text)
        asked = len(seen)
        with pytest.raises(InputError, match=message):
            ask(pairs, key, url, out)
    assert len(seen) == asked
    assert out.read_text() == text


def test_another_file_is_not_taken_for_answers(tmp_path, pairs, key):
    for text in ("notes\n", "[1]\n{}\n", '["x"]\n'):
        (tmp_path / "notes.txt").write_text(text)
        with pytest.raises(InputError, match="name another"):
            ask(pairs, key, "http://127.0.0.1:9", tmp_path / "notes.txt")
        assert (tmp_path / "notes.txt").read_text() == text


def test_answers_about_other_pairs_are_refused_on_import(tmp_path, run, pairs, key):
    with server(likes("dps")) as (url, _):
        ask(pairs, key, url, tmp_path / "out.jsonl")
    other = exported(run, tmp_path / "other.jsonl", seed=5)
    with pytest.raises(InputError, match=r"out.jsonl: line 1: an endpoint's answers about other"):
        read_annotations([tmp_path / "out.jsonl"], other)


def test_an_endpoint_that_cant_be_used_says_why(tmp_path, pairs, key):
    out = tmp_path / "out.jsonl"
    with server(lambda *_: (401, "bad key")) as (url, seen):
        with pytest.raises(InputError, match=r"401: .*bad key.*--api-key-env"):
            ask(pairs, key, url, out)
        assert len(seen) == 1
    with pytest.raises(InputError, match="no server answers there"):
        ask(pairs, key, url, out)  # the server is gone by now
    no_model = pytest.raises(InputError, match=r"404: .*--judge-model")
    with server(lambda *_: (404, "no such model")) as (url, _), no_model:
        ask(pairs, key, url, out)
    with pytest.raises(InputError, match="wanted an endpoint such as"):
        asking.Endpoint("localhost:8000", "m")


def test_an_address_may_end_in_v1_or_in_the_whole_path():
    for url in ("http://h", "http://h/", "http://h/v1", "http://h/v1/chat/completions"):
        assert asking.Endpoint(url, "m").address == "http://h/v1/chat/completions"
    assert "secret" not in repr(asking.Endpoint("http://h", "m", "secret"))


# The command


def command(*arguments):
    found = CliRunner().invoke(app, ["judge", *map(str, arguments)])
    if isinstance(found.exception, InputError):
        raise found.exception
    assert found.exit_code == 0, found.output
    return found.stdout


def test_pairs_go_out_and_come_back_as_table_4(tmp_path, run):
    pairs = tmp_path / "pairs.jsonl"
    said = command(run, "--methods", "cad,dps", "--export", pairs)
    assert "21 pairs" in said
    assert "8 more have equal answers" in said
    key = judging.load_key(tmp_path / "pairs.key.json", pairs)
    files = [
        annotate(tmp_path / f"{name}.jsonl", key, choose, name)
        for name, choose in (("ann", by_number), ("ben", prefers("dps")))
    ]
    found = command(run, "--pairs", pairs, "--methods", "dps,cad", "--import", *files)
    assert "Table 4. dps against cad" in found
    assert re.search(r"\| annotators +\| +2 \|", found)
    text = (run / "tables/table-4-dps-cad.md").read_text(encoding="utf-8")
    assert text.strip() in found
    latex = (run / "tables/table-4-dps-cad.tex").read_text(encoding="utf-8")
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == 1
    assert "alpha" in (run / "tables/table-4-dps-cad-judges.csv").read_text(encoding="utf-8")
    as_json = json.loads(
        command(run, "--pairs", pairs, "--import", files[0], "--import", files[1], "--json")
    )
    assert [row["task"] for row in as_json["tables"][0]["rows"]] == ["LaMP-4", "LaMP-7", "all"]


def test_an_endpoint_is_the_judge_from_the_command(tmp_path, run, monkeypatch):
    pairs = tmp_path / "pairs.jsonl"
    command(run, "--methods", "dps,cad", "--export", pairs, "--task", "LaMP-7")
    monkeypatch.setenv("JUDGE_KEY", "secret")
    with server(likes("cad")) as (url, seen):
        options = ("--endpoint", url, "--judge-model", "org/judge", "--api-key-env", "JUDGE_KEY")
        found = json.loads(command(run, "--pairs", pairs, *options, "--json"))
    (rates,) = found["tables"][0]["rows"]
    assert rates["win"] == 0
    assert rates["loss"] == pytest.approx(6 / 9)
    assert (tmp_path / "pairs.org-judge.jsonl").is_file()
    assert seen[0]["headers"]["Authorization"] == "Bearer secret"
    with pytest.raises(InputError, match="NOWHERE: the variable isn't set"):
        command(run, "--pairs", pairs, *options[:4], "--api-key-env", "NOWHERE")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "wanted one of --export, --import and --endpoint"),
        (("--export", "x.jsonl", "--import", "y.jsonl"), "wanted one of --export"),
        (("--import", "y.jsonl"), "name the exported pairs with --pairs"),
        (("y.jsonl", "--export", "x.jsonl"), "files after the run are for --import"),
    ],
)
def test_options_that_dont_go_together_are_refused(run, arguments, message):
    with pytest.raises(InputError, match=message):
        command(run, *arguments)


def test_methods_of_other_pairs_are_refused(tmp_path, run, pairs, key):
    said = annotate(tmp_path / "a.jsonl", key, by_number)
    with pytest.raises(InputError, match="the pairs are of cad and dps, not plain,dps"):
        command(run, "--pairs", pairs, "--methods", "plain,dps", "--import", said)
