"""The paper's tables: its numbers as data, ours beside them, and what one generation costs."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import asdict

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache
from typer.testing import CliRunner

from workbench.cli.commands import app
from workbench.discovery.shapes import shape_of
from workbench.errors import InputError
from workbench.evaluation import finished, layout, operations, published, sheet
from workbench.evaluation.results import FORMAT

LLAMA = "meta-llama/Meta-Llama-3-8B-Instruct"


# The paper's numbers


def paper_tables(text):
    """(table, model, method, column) -> value, read from the page of facts."""
    found = {}
    for number, part in re.findall(r"### Table (\d), .*?\n\n(.*?)\n\n", text, re.DOTALL):
        if number == "3":
            continue
        head, _, *rows = [
            [cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines()
        ]
        model = ""
        for name, method, *cells in rows:
            model = name or model
            for column, cell in zip(head[2:], cells, strict=True):
                for i, value in enumerate(cell.split("/")):
                    found[model, method.lower(), column, i] = float(value)
    return found


COLUMNS = {
    "News headline": "LaMP-4",
    "Scholarly title": "LaMP-5",
    "Tweet paraphrase": "LaMP-7",
    "Citation acc / F1": "LaMP-1",
    "Movie acc / F1": "LaMP-2",
    "Rating MAE / RMSE": "LaMP-3",
}


def test_every_published_number_is_the_papers(shared):
    page = paper_tables((shared / "paper.md").read_text(encoding="utf-8"))
    ours = {
        (model, method, task, published.TASKS[task].index(metric)): number.value
        for (model, method, task, metric), number in published.NUMBERS.items()
    }
    theirs = {(m, method, COLUMNS[c], i): value for (m, method, c, i), value in page.items()}
    assert ours == theirs
    assert len(ours) == 3 * 4 * 9 + 2 * 4 * 6


def test_published_operations_are_the_papers(shared):
    text = (shared / "paper.md").read_text(encoding="utf-8").replace(",", "")
    for prompt, found in published.OPERATIONS.items():
        line = re.search(rf"{prompt}: ([\d.]+)(?: plain)? ([\d.]+)", text)
        assert line, prompt
        assert [float(value) for value in line.groups()] == [found["plain"], found["dps"]]


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("meta-llama/Meta-Llama-3-8B-Instruct", "LLaMA-3-8B"),
        ("/models/Llama-3-8B-Instruct/", "LLaMA-3-8B"),
        ("Qwen/Qwen2-7B", "Qwen2-7B"),
        ("mistralai/Mistral-7B-Instruct-v0.2", "Mistral-7B"),
        ("meta-llama/Llama-3.1-8B-Instruct", None),
        ("Qwen/Qwen2.5-7B-Instruct", None),
        ("meta-llama/Meta-Llama-3-70B-Instruct", None),
        ("testbed", None),
    ],
)
def test_a_model_is_matched_by_generation_and_size(name, known):
    assert published.family(name) == known


def test_what_differs_from_the_papers_model_is_said():
    assert "differs" not in published.family_note(LLAMA)
    assert "the paper ran Mistral-7B-Instruct-v0.3" in published.family_note("x/Mistral-7B-v0.1")
    assert published.family_note("testbed") == ""


# Our rows beside them


def row(task, method, metric, value, **changes):
    return {
        "task": task,
        "method": method,
        "metric": metric,
        "better": "lower" if "error" in metric else "higher",
        "primary": metric in ("ROUGE-1", "mean absolute error"),
        "reading": None,
        "value": value,
        "low": value - 0.02,
        "high": value + 0.02,
        **dict.fromkeys(("difference", "difference_low", "difference_high", "p", "p_holm")),
        "examples": 300,
        "users": 200,
        "seeds": 1,
        "settings": "",
        "leaked": False,
        "note": "",
        **changes,
    }


def differs(difference, p_holm):
    ends = difference - 0.01, difference + 0.01
    return {
        "difference": difference,
        "difference_low": ends[0],
        "difference_high": ends[1],
        "p": p_holm,
        "p_holm": p_holm,
    }


def evaluation(folder, model, rows, shape=None, heads=(4, 4)):
    tasks = list(dict.fromkeys(r["task"] for r in rows))
    manifest = {
        "format": FORMAT,
        "settings": {
            "model": model,
            "tasks": tasks,
            "methods": ["plain", "random", "cad", "dps"],
            "seeds": 3,
            "heads_per_layer": list(heads),
            "splits": {"validation": "dev", "test": "dev"},
        },
        "users": {"validation": 40, "test": 200},
    }
    if shape is not None:
        manifest["shape"] = json.loads(json.dumps(asdict(shape)))
    random = {"seeds": [{"k": 2, "words": "K 2, γ 0.5"}, {"k": 2, "words": "K 2, γ 1"}]}
    dps = {"heads": ["L1H3", "L1H0"], "k": 2, "gamma": 0.5, "words": "K 2, γ 0.5"}
    chosen = {"dps": dps, "random": random, "plain": {}}
    (folder / "tables").mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "choices.json").write_text(json.dumps(dict.fromkeys(tasks, chosen)))
    (folder / "tables/evaluation.json").write_text(json.dumps(rows))
    return folder


HEADLINES = [
    row("LaMP-4", "plain", "ROUGE-1", 0.15),
    row("LaMP-4", "dps", "ROUGE-1", 0.1712, **differs(0.0212, 0.003)),
    row("LaMP-4", "cad", "ROUGE-1", 0.12, **differs(-0.03, 0.04)),
    row("LaMP-4", "random", "ROUGE-1", 0.16, **differs(0.02, 0.2)),
    row("LaMP-4", "plain", "METEOR (exact, stem)", 0.2),
    row("LaMP-4", "dps", "METEOR (exact, stem)", 0.21, **differs(0.01, None)),
]


def cells(found):
    """(task, method, reading if any) -> column -> text; a `paper` column is named by its left."""
    by_line = {}
    for line in found.rows:
        names = [
            f"paper {found.header[i - 1]}" if name == "paper" else name
            for i, name in enumerate(found.header)
        ]
        one = dict(zip(names, line, strict=True))
        by_line[one["task"], one["method"].removesuffix("†"), one.get("reading", "")] = one
    return by_line


def csv_rows(path):
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))


def sheets_of(*folders):
    return layout.score_sheets([finished.load_run(folder) for folder in folders])


def test_the_papers_number_stands_beside_ours(tmp_path):
    (found,) = sheets_of(evaluation(tmp_path / "run", LLAMA, HEADLINES))
    table = cells(found)
    dps = table["LaMP-4", "DPS", ""]
    assert dps["R-1"] == "0.171 [0.151, 0.191] ▲"
    assert (dps["paper R-1"], dps["paper METEOR"]) == ("0.1787", "0.1650")
    assert table["LaMP-4", "CAD", ""]["paper R-1"] == "0.1681"
    for method in ("plain", "random heads"):
        assert table["LaMP-4", method, ""]["paper R-1"] == "–"
    assert (dps["n"], dps["users"]) == ("300", "200")
    assert found.name == "table-1"


def test_a_model_that_the_paper_has_not_gets_no_column_of_it(tmp_path):
    (found,) = sheets_of(evaluation(tmp_path / "run", "Qwen/Qwen2.5-7B-Instruct", HEADLINES))
    assert "paper" not in found.header
    assert "paper" not in found.note.replace("paired", "")


def test_marks_say_better_and_worse_not_up_and_down(tmp_path):
    rows = [
        row("LaMP-3", "plain", "mean absolute error", 0.5, reading="strict"),
        row("LaMP-3", "dps", "mean absolute error", 0.4, reading="strict", **differs(-0.1, 0.01)),
        row("LaMP-3", "cad", "mean absolute error", 0.6, reading="strict", **differs(0.1, 0.01)),
        row("LaMP-3", "dola", "mean absolute error", 0.6, reading="strict", **differs(0.1, 0.05)),
        row("LaMP-3", "decore", "mean absolute error", 0.5, reading="strict", **differs(0, 0.01)),
    ]
    (found,) = sheets_of(evaluation(tmp_path / "run", LLAMA, rows))
    table = {method: one["MAE"] for (_, method, _), one in cells(found).items()}
    assert table["DPS"].endswith("▲")
    assert table["CAD"].endswith("▼")
    for method in ("DoLa", "DeCoRe", "plain"):  # p not below .05; interval holds 0; no test
        assert table[method].endswith("]")
    assert {r["method"]: r["holm"] for r in found.records}["cad"] == "worse"


def test_readings_are_lines_of_their_own_and_kinds_tables_of_their_own(tmp_path):
    rows = [
        row("LaMP-1", "dps", "accuracy", value, reading=reading)
        for reading, value in (("strict", 0.5), ("lenient", 0.6))
    ]
    rows += [row("LaMP-3", "dps", "root mean square error", 0.9, reading="strict"), *HEADLINES]
    found = sheets_of(evaluation(tmp_path / "run", LLAMA, rows))
    assert [one.title for one in found] == [
        "Table 1. Generation",
        "Table 2. Classification",
        "Table 2. Rating",
    ]
    assert [one.name for one in found] == ["table-1", "table-2", "table-2"]
    table = cells(found[1])
    assert table["LaMP-1", "DPS", "strict"]["accuracy"].startswith("0.500")
    assert table["LaMP-1", "DPS", "lenient"]["accuracy"].startswith("0.600")
    assert cells(found[2])["LaMP-3", "DPS", "strict"]["paper RMSE"] == "0.9278"


def test_the_papers_number_stands_beside_the_strict_reading_alone(tmp_path):
    rows = [
        row("LaMP-2", "dps", "accuracy", 0.5, reading=reading) for reading in ("strict", "lenient")
    ]
    (found,) = sheets_of(evaluation(tmp_path / "run", LLAMA, rows))
    table = cells(found)
    assert table["LaMP-2", "DPS", "strict"]["paper accuracy"] == "0.4610"
    assert table["LaMP-2", "DPS", "lenient"]["paper accuracy"] == "–"
    assert {r["reading"]: r["paper"] for r in found.records} == {"strict": 0.461, "lenient": None}
    assert "the strict reading: its numbers stand beside that alone" in found.note
    decided = [row("LaMP-2", "dps", "accuracy", 0.5, reading="likelihood")]
    (found,) = sheets_of(evaluation(tmp_path / "decided", LLAMA, decided))
    assert "paper" not in found.header


def test_holm_is_over_all_runs_of_a_model(tmp_path):
    p = {("a", "dps"): 0.01, ("a", "cad"): 0.03, ("b", "dps"): 0.02, ("b", "cad"): 0.04}
    tasks = {"a": "LaMP-4", "b": "LaMP-7"}
    folders = []
    for name, task in tasks.items():
        rows = [row(task, "plain", "ROUGE-1", 0.1), row(task, "plain", "ROUGE-L", 0.1)]
        for method in ("dps", "cad"):
            found = differs(0.05, p[name, method])
            rows.append(row(task, method, "ROUGE-1", 0.15, **found | {"p_holm": 0.01}))
            rows.append(row(task, method, "ROUGE-L", 0.15, **found | {"p": None, "p_holm": None}))
        folders.append(evaluation(tmp_path / name, LLAMA, rows))
    other = [row("LaMP-4", "dps", "ROUGE-1", 0.1, **differs(0.05, 0.03) | {"p_holm": 0.031})]
    folders.append(evaluation(tmp_path / "c", "Qwen/Qwen2-7B-Instruct", other))
    (found,) = sheets_of(*folders)
    after = {
        (one["model"], one["task"], one["method"]): one["p_holm"]
        for one in found.records
        if one["metric"] == "ROUGE-1" and one["method"] != "plain"
    }
    assert after == {
        (LLAMA, "LaMP-4", "dps"): pytest.approx(0.04),  # by hand: 4 x .01, 3 x .02, 2 x .03
        (LLAMA, "LaMP-7", "dps"): pytest.approx(0.06),
        (LLAMA, "LaMP-4", "cad"): pytest.approx(0.06),
        (LLAMA, "LaMP-7", "cad"): pytest.approx(0.06),  # never below one before it
        ("Qwen/Qwen2-7B-Instruct", "LaMP-4", "dps"): 0.031,  # a single run's stay
    }
    marked = {(line[0], line[1], line[2]) for line in found.rows if "▲" in line[3]}
    assert marked == {
        (LLAMA, "LaMP-4", "DPS"),
        ("Qwen/Qwen2-7B-Instruct", "LaMP-4", "DPS"),
    }
    assert f"Holm is over all tests of a model, here of 2 runs of {LLAMA} together" in found.note
    (alone,) = sheets_of(folders[0])
    assert "Holm is over" not in alone.note
    assert {one["p_holm"] for one in alone.records} == {0.01, None}


def test_the_note_says_what_users_heads_and_macro_f1_are_worth(tmp_path):
    rows = [row("LaMP-2", "decore", "macro F1", 0.5, reading="strict"), *HEADLINES]
    folder = evaluation(tmp_path / "run", LLAMA, rows)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest |= {"users_inferred": True, "other_prompt": "items 5 there, 4 here"}
    manifest["retrieval_from"] = "wu.json"
    manifest["settings"]["methods"].append("decore")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    generation, classification = sheets_of(folder)
    for words in (
        "Users were inferred, since the files name none",
        "as --other-prompt allows: items 5 there, 4 here.",
        "DeCoRe's heads are those of wu.json.",
    ):
        assert words in generation.note
        assert words in classification.note
    assert "a resample of users that lacks a label counts 0" in classification.note
    assert "lacks a label" not in generation.note


def test_the_note_names_splits_users_settings_leaks_and_missing_cells(tmp_path):
    rows = [
        *(dict(r, leaked=True) for r in HEADLINES),
        row("LaMP-4", "dola", "ROUGE-1", 0, note="DoLa has no layers here"),
    ]
    rows[-1] |= {"value": None, "low": None, "high": None, "examples": 0}
    (found,) = sheets_of(evaluation(tmp_path / "run", LLAMA, rows))
    for words in (
        "settings chosen on 40 users of dev, answers to 200 users of dev",
        "Tested: LaMP-4 R-1.",
        "random heads: 3 draws",
        "LaMP-4: DPS K 2, γ 0.5, random heads K 2, γ 0.5 / K 2, γ 1",
        "† Heads were found on some of these examples",
        "LaMP-4, dola: DoLa has no layers here",
        "METEOR (exact, stem): without WordNet",
        "Many of its baseline cells come from 50 examples",
    ):
        assert words in found.note
    assert "DPS†" in {line[2] for line in found.rows}
    assert cells(found)["LaMP-4", "DoLa", ""]["R-1"] == "–"


def test_runs_are_merged_model_by_model(tmp_path):
    qwen = [
        row("LaMP-4", "dps", "ROUGE-1", 0.3),
        row("LongLaMP-topic_writing_user", "dps", "ROUGE-1", 0.2),
    ]
    found = sheets_of(
        evaluation(tmp_path / "a", LLAMA, HEADLINES),
        evaluation(tmp_path / "b", "Qwen/Qwen2-7B-Instruct", qwen),
    )
    (table,) = found
    assert [line[0] for line in table.rows] == [LLAMA] * 4 + ["Qwen/Qwen2-7B-Instruct"] * 2
    assert table.rows[-2][:5] == [
        "Qwen/Qwen2-7B-Instruct",
        "LaMP-4",
        "DPS",
        "0.300 [0.280, 0.320]",
        "0.1627",
    ]
    assert table.rows[-1][4] == "–"  # no published number of LongLaMP


def test_the_same_cell_in_two_runs_is_refused(tmp_path):
    first = evaluation(tmp_path / "a", LLAMA, HEADLINES)
    second = evaluation(tmp_path / "b", LLAMA, HEADLINES)
    with pytest.raises(InputError, match="both hold ROUGE-1 of plain on LaMP-4"):
        sheets_of(first, second)


def test_an_evaluation_without_its_table_is_refused_with_the_remedy(tmp_path):
    folder = evaluation(tmp_path / "run", LLAMA, HEADLINES)
    (folder / "tables/evaluation.json").unlink()
    with pytest.raises(InputError, match="run the same command again to finish"):
        finished.load_run(folder)


# On paper


AWKWARD = sheet.Sheet(
    "table-9",
    "100 % of A_B & co",
    ["a|name", "value"],
    [["under_score & {brace} 50% #1 $2", "0.5 ▲"], ["back\\slash ~ ^ <x>", "–"]],
    "Note with γ_1.",
    [{"name": 'quote " and, comma', "value": 1 / 3}, {"name": "none", "value": None}],
)


def test_latex_escapes_what_it_would_take_for_commands_and_closes_what_it_opens():
    text = AWKWARD.latex()
    body = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    opened = re.findall(r"\\begin\{(\w+)\}", body)
    closed = re.findall(r"\\end\{(\w+)\}", body)
    assert opened == closed[::-1] == ["table", "tabular"]
    bare = re.sub(r"\\[\\{}&%$#_]", "", body)  # escaped ones and line ends
    assert bare.count("{") == bare.count("}")
    assert not re.search(r"(?<!\\)[%#_~^]", body)
    for line in body.splitlines():
        if line.endswith(r" \\"):
            assert len(re.findall(r"(?<!\\)&", line)) == len(AWKWARD.header) - 1
    assert r"under\_score \& \{brace\} 50\% \#1 \$2 & 0.5 $\blacktriangle$ \\" in body
    assert r"back\textbackslash{}slash \textasciitilde{} \textasciicircum{}" in body


def test_markdown_keeps_a_bar_in_a_cell_in_its_cell():
    lines = AWKWARD.markdown().splitlines()
    assert lines[0] == "**100 % of A_B & co**"
    assert lines[2].startswith("| a\\|name ")
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines[2:6]} == {3}
    assert len({len(line) for line in lines[2:6]}) == 1  # aligned for a terminal


def test_csv_keeps_every_digit_and_leaves_nothing_empty(tmp_path):
    written = sheet.write([AWKWARD], tmp_path)
    assert [path.name for path in written] == ["table-9.md", "table-9.tex", "table-9.csv"]
    rows = csv_rows(tmp_path / "table-9.csv")
    assert rows[0]["name"] == 'quote " and, comma'
    assert float(rows[0]["value"]) == 1 / 3
    assert rows[1]["value"] == ""


# Table 3


P, N = 12, 5


def tiny(kind="llama", **changes):
    torch.manual_seed(0)
    settings = {
        "vocab_size": 61,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        **changes,
    }
    config = CONFIG_MAPPING[kind](**settings)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


@torch.no_grad()
def counted(run):
    """Operations of the matrix products in a call, tables of rotations left out."""
    with FlopCounterMode(display=False) as counter:
        run()
    found = counter.get_flop_counts()
    return sum(found["Global"].values()) - sum(
        sum(counts.values()) for name, counts in found.items() if name.endswith("rotary_emb")
    )


def decode(model, prompt, steps, cache=None):
    """Feed a prompt, then one token a pass; the cache after it."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    for tokens in [torch.zeros(1, prompt, dtype=torch.long)] * bool(prompt) + [
        torch.zeros(1, 1, dtype=torch.long)
    ] * steps:
        model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def ways(model, **options):
    found = operations.costs(shape_of(model.config), [P], N, **options)
    return {cost.way: cost.operations for cost in found}


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_a_plain_generation_counts_as_pytorch_counts_it(kind):
    model = tiny(kind, **({"sliding_window": 6} if kind == "mistral" else {}))
    assert ways(model)["plain"] == counted(lambda: decode(model, P, N - 1))


def test_shared_prefill_counts_as_a_second_view_from_the_prompts_cache():
    model = tiny()
    plain = counted(lambda: decode(model, P, N - 1))
    cache = decode(model, P - 1, 0)  # what both views share, and its cost is the plain view's
    second = counted(lambda: decode(model, 0, N, cache))
    assert ways(model)["dps, shared"] == plain + second


def test_masked_prefill_and_cad_count_as_two_generations():
    model = tiny()
    plain = counted(lambda: decode(model, P, N - 1))
    found = ways(model, query=4)
    assert found["dps, masked"] == 2 * plain
    assert found["cad"] == plain + counted(lambda: decode(model, 4, N - 1))
    assert ways(model, query=1000)["cad"] == 2 * plain  # no query is longer than its prompt


def test_blocks_below_the_lowest_head_are_counted_once():
    model, lowest = tiny(), 2
    plain = counted(lambda: decode(model, P, N - 1))
    below = counted(lambda: decode(_first_blocks(model, lowest), P, N - 1))
    head = counted(lambda: decode(_first_blocks(model, 0), P, N - 1))  # the logits alone
    found = ways(model, lowest=lowest)
    assert found["dps, masked, low once"] == 2 * plain - (below - head)
    assert set(ways(model, lowest=0)) == {"plain", "dps, shared", "dps, masked", "cad"}
    assert found["dps, shared, low once"] < found["dps, shared"]


def _first_blocks(model, count):
    """The same model with fewer blocks."""
    short = tiny(num_hidden_layers=max(count, 1))
    if count == 0:
        short.model.layers = torch.nn.ModuleList()
    return short


def llama_3_8b():
    return CONFIG_MAPPING["llama"](
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=14336,
        vocab_size=128256,
        max_position_embeddings=8192,
    )


def test_ratios_of_shared_prefill_are_the_papers():
    costs = operations.costs(shape_of(llama_3_8b()), (512, 1024, 2048), 32)
    shared = {cost.prompt: cost.ratio for cost in costs if cost.way == operations.SHARED}
    for prompt, paper in published.OPERATIONS.items():
        # The paper prints TFLOP to two digits; its ratio is known to about .002.
        assert shared[prompt] == pytest.approx(paper["dps"] / paper["plain"], abs=0.005)


def test_table_3_shows_the_papers_numbers_beside_ours():
    found = layout.cost_sheet({LLAMA: (shape_of(llama_3_8b()), 11)})
    lines = {(line[1], line[2]): line[3:] for line in found.rows}
    assert lines["512", "plain"][1:] == ["1.00", "6.57", "1.00"]
    assert lines["1024", "DPS, shared prefill"][1:] == ["1.03", "13.43", "1.03"]
    assert lines["2048", "CAD"][2:] == ["–", "–"]
    assert "is in block 11 of 32" in found.note
    assert len(found.rows) == 3 * 6


def test_prompts_beyond_the_context_are_left_out_or_refused():
    shape = shape_of(tiny(max_position_embeddings=64).config)
    found = layout.cost_sheet({"tiny": (shape, None)}, (16, 2048))
    assert {line[1] for line in found.rows} == {"16"}
    assert "Longer prompts don't fit into the 64 tokens of tiny" in found.note
    assert "paper, TFLOP" not in found.header
    with pytest.raises(InputError, match="leaves room for 32 more in a context of 64"):
        layout.cost_sheet({"tiny": (shape, None)}, (512, 1024))
    usual = layout.cost_sheet({"tiny": (shape, None)})
    assert sorted({int(line[1]) for line in usual.rows}) == [8, 16, 32]
    assert usual.header[3] == "MFLOP"
    small = shape_of(tiny(max_position_embeddings=32).config)
    with pytest.raises(InputError, match="leaves room"):
        layout.cost_sheet({"tiny": (small, None)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lowest": 3}, "must be in block 0 to 2, got 3"),
        ({"query": 0}, "must be >= 1"),
        ({"prompts": [0]}, "must be >= 1"),
    ],
)
def test_what_cant_be_counted_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        operations.costs(shape_of(tiny().config), **{"prompts": [8], "new_tokens": 4, **changes})


# The command


def command(*arguments):
    found = CliRunner().invoke(app, ["tables", *map(str, arguments)])
    if isinstance(found.exception, InputError):
        raise found.exception
    assert found.exit_code == 0, found.output
    return found


def test_tables_writes_and_prints_the_same(tmp_path):
    shape = shape_of(tiny().config)
    run = evaluation(tmp_path / "run", LLAMA, HEADLINES, shape, heads=(4, 4, 4))
    done = command(run, "--prompts", "16")
    for name in ("table-1", "table-3"):
        text = (run / f"tables/{name}.md").read_text(encoding="utf-8")
        assert text.strip() in done.stdout
        assert (run / f"tables/{name}.tex").read_text(encoding="utf-8").count("toprule") == 1
    assert "is in block 1 of 3" in done.stdout  # L1H3, the lowest head that DPS was given
    rows = csv_rows(run / "tables/table-1.csv")
    assert float(rows[1]["value"]) == 0.1712
    assert float(rows[1]["paper"]) == 0.1787


def test_cads_second_prompt_is_as_long_as_the_runs_queries_are(tmp_path):
    shape = shape_of(tiny().config)
    run = evaluation(tmp_path / "run", "tiny", HEADLINES, shape, heads=(4, 4, 4))

    def cad(*options):
        command(run, "--prompts", "20", *options)
        rows = csv_rows(run / "tables/table-3.csv")
        return int(next(row["operations"] for row in rows if row["way"] == "cad"))

    assert cad() == cad("--query-tokens", "64")
    manifest = json.loads((run / "manifest.json").read_text())
    manifest |= {"query_tokens": 6.6, "examples": {"test": 10}}
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert cad() == cad("--query-tokens", "7") < cad("--query-tokens", "8")
    assert cad() == cad("--query-tokens", "7")
    assert "is taken to have 7 tokens" in (run / "tables/table-3.md").read_text(encoding="utf-8")


def test_a_run_without_a_shape_goes_without_table_3_and_says_how_to_get_it(tmp_path):
    run = evaluation(tmp_path / "run", LLAMA, HEADLINES)
    done = command(run)
    assert "table 3 needs the shape of" in done.stderr
    assert "--model" in done.stderr
    assert not (run / "tables/table-3.md").exists()


def test_the_shape_may_come_from_a_config_of_the_same_heads_only(tmp_path):
    model = tiny()
    model.config.save_pretrained(tmp_path / "model")
    good = evaluation(tmp_path / "good", "tiny", HEADLINES, heads=(4, 4, 4))
    command(good, "--model", tmp_path / "model", "--prompts", "16,24")
    prompts = {row["prompt"] for row in csv_rows(good / "tables/table-3.csv")}
    assert prompts == {"16", "24"}
    bad = evaluation(tmp_path / "bad", "other", HEADLINES, heads=(4, 4))
    with pytest.raises(InputError, match="8 heads in 2 layers, and the shape has 12 in 3"):
        command(bad, "--model", tmp_path / "model")


def test_several_runs_need_a_folder_for_their_table(tmp_path):
    runs = [evaluation(tmp_path / "a", LLAMA, HEADLINES)]
    runs.append(evaluation(tmp_path / "b", "Qwen/Qwen2-7B-Instruct", HEADLINES))
    with pytest.raises(InputError, match="2 runs in one table: name a folder for it with --out"):
        command(*runs)
    command(*runs, "--out", tmp_path / "both")
    assert "Qwen2" in (tmp_path / "both/table-1.tex").read_text(encoding="utf-8")


def test_published_prints_every_number_of_the_paper_and_writes_nothing(tmp_path):
    done = command("--published")
    for number in published.NUMBERS.values():
        assert f"{number.value:.4f}" in done.stdout
    assert "27.21" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_tables_without_a_run_is_refused():
    with pytest.raises(InputError, match="name the folder of a finished"):
        command()
