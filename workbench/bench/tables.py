"""A bench's result as tables of text, the same for a terminal and for the README."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench import runs

FORMAT = "workbench.bench/1"


@dataclass(frozen=True)
class Table:
    """What is printed of a part of a result.

    Attributes:
        title: What was measured.
        header: A name a column; the first is of words, the others of numbers.
        rows: Cells as text.
        note: What a reader has to know beside it; may be empty.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def markdown(self) -> str:
        """For a README."""
        lines = [self.header, ["---"] + ["---:"] * (len(self.header) - 1), *self.rows]
        parts = [f"**{self.title}**", "\n".join("| " + " | ".join(line) + " |" for line in lines)]
        return "\n\n".join([*parts, self.note] if self.note else parts)


def read(path: Path) -> dict[str, Any]:
    """A result that `workbench bench --json` wrote.

    Raises:
        InputError: There is no such file, or it holds something else.
    """
    result: Any = runs.read_json(path)
    runs.check_format(path, result.get("format") if isinstance(result, dict) else None, FORMAT)
    return dict(result)


def tables(result: Mapping[str, Any]) -> Iterator[Table]:
    """All tables of a result, those of cases that were not run left out."""
    yield _machine(result)
    for case in result["cases"]:
        yield _case(case, [row for row in result["discovery"] if row["case"] == case["case"]])
    if result["screening"]:
        yield _screening(result["screening"])
    if result["plan"]:
        yield _plan(result["plan"])
    if "shared" in result:
        yield _shared(result["shared"])
    if "growth" in result:
        yield _growth(result["growth"])
    if "memory" in result:
        yield _memory(result["memory"])
    for case in result.get("steering_cases", ()):
        yield _steering(case, [row for row in result["steering"] if row["case"] == case["case"]])
        if case["numbers"]:
            yield _wanted(case)


def _machine(result: Mapping[str, Any]) -> Table:
    machine = result["machine"]
    rates = [rate / 1e9 for rate in machine["rate_measured"]]
    rows = [
        ["matrix products, GFLOP/s", number(machine["rate_operations_per_second"] / 1e9)],
        ["the same, least and most", f"{number(min(rates))} to {number(max(rates))}"],
        ["copying, GB/s read and written", number(machine["bandwidth_bytes_per_second"] / 1e9)],
        ["starting a kernel, µs", number(machine["call_seconds"] * 1e6)],
    ]
    load = [machine["load_before"], machine["load_after"]]
    if None not in load:
        rows.append(["load average before and after", f"{load[0]:.2f}, {load[1]:.2f}"])
    return Table(
        f"{machine['gpu'] or machine['processor']}: {machine['cores']} cores, "
        f"{machine['threads']} threads, {machine['dtype']}, torch {machine['torch']}",
        ("the machine", "measured"),
        rows,
        f"Medians of {len(rates)} measurements between the others; a rate is the largest over a "
        f"few shapes. Every call below was timed {result['repeats']} times, in turns with the "
        "others of its table; seconds are medians, spread is the "
        "longest less the shortest, as a share of it. × loop: times as fast as the plain loop.",
    )


def _case(case: Mapping[str, Any], found: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        [
            row["method"],
            number(row["seconds"]),
            _spread(row),
            number(row["ratio_to_loop"]),
            "–" if row["max_abs_diff"] is None else f"{row['max_abs_diff']:.0e}",
            "–" if row["peak_mib"] is None else f"{row['peak_mib']:,.0f}",
            "–" if row["share_of_limit"] is None else f"{row['share_of_limit']:.0%}",
        ]
        for row in found
    ]
    note = (
        f"Exact PCS needs at least {number(case['minimum_operations'] / 1e9)} GFLOP here; the "
        "limit is the time that these take at the machine's rate. Differences are from the loop, "
        "in nats per target token; MiB is the most that the process held."
    )
    timed = case["heads_timed_in_the_loop"]
    if timed < case["heads"]:
        note += (
            f" loop and batched were timed on {timed} of the {case['heads']} heads, one of every "
            "block, and multiplied: every pass of theirs is the same work."
        )
    header = ("method", "seconds", "spread", "× loop", "max diff", "MiB", "of limit")
    return Table(
        f"{case['case']}: {case['layers']} layers, {case['heads']} heads, width "
        f"{case['d_model']}, vocabulary {case['vocabulary']:,}; {case['examples']} examples of "
        f"{case['tokens']} tokens",
        header,
        rows,
        note,
    )


def _screening(found: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        [
            row["case"],
            str(row["k"]),
            str(row["heads_scored"]),
            f"{row['recall']:.3f}",
            f"{row['recall_bound']:.2f}",
            f"{row['attribution_recall']:.3f}",
            f"{row['attribution_spearman']:.3f}",
            f"{row['attribution_error']:.1g}",
        ]
        for row in found
    ]
    header = ("case", "K", "scored", "recall", "bound", "alone", "Spearman", "error")
    return Table(
        "Screening: the share of the exact top K of a task that it finds",
        header,
        rows,
        "scored: heads scored exactly; bound: what the run itself states, 95 %, from its audit; "
        "alone: by the gradient estimate without exact scores; Spearman: of the estimate against "
        "the exact means; error: the estimate's largest on one example, nats per target token.",
    )


def _plan(found: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        [
            row["case"],
            row["method"],
            number(row["estimated"]),
            number(row["measured"]),
            number(row["ratio"]),
            number(row["machine"]["rate"] / 1e9),
            number(row["machine"]["attention_rate"] / 1e9),
            number(row["machine"]["bandwidth"] / 1e9),
        ]
        for row in found
    ]
    calls = found[0]["machine"]
    header = ("case", "method", "plan, s", "real, s", "ratio", "products", "attention", "moved")
    return Table(
        "What `workbench plan` says, and what was measured",
        header,
        rows,
        "With rates measured alone at the sizes of each method's passes: products with weights "
        "and of activations in GFLOP/s, element-wise work in GB/s. From one kernel to the next it "
        f"is {number(calls['call_seconds'] * 1e6)} µs, through TransformerLens' hooks "
        f"{number(calls['hooked_call_seconds'] * 1e6)} µs.",
    )


def _shared(found: Mapping[str, Any]) -> Table:
    rows = [
        [
            name,
            number(part["seconds"]),
            _spread(part),
            number(found["apart"]["seconds"] / part["seconds"]),
        ]
        for name, part in (("apart", found["apart"]), ("shared", found["shared"]))
    ]
    return Table(
        f"shared-profile: {found['queries']} queries of {found['query_tokens']} tokens behind "
        f"one profile of {found['profile_tokens']}, {found['model']}",
        ("replay", "seconds", "spread", "times faster"),
        rows,
        f"The largest difference between the two is {found['max_abs_diff']:.0e}.",
    )


def _growth(found: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        [
            row["method"],
            f"{row['what']}, {row['from']}",
            *(number(seconds) for seconds in row["seconds"]),
            f"{row['exponent']:.2f}",
            f"{row['counted']:.2f}",
        ]
        for row in found
    ]
    factors = [f"× {factor}, s" for factor in found[0]["factors"]]
    return Table(
        "How time grows",
        ("method", "of", *factors, "exponent", "counted"),
        rows,
        "exponent: the slope of log seconds over log size; counted: that of the operations. What "
        "a pass costs beside its operations makes the first the smaller one.",
    )


def _memory(found: Mapping[str, Any]) -> Table:
    rows = [
        [name, "–" if found[key] is None else f"{found[key]:,.0f}"]
        for name, key in (
            ("model loaded", "loaded_mib"),
            ("exact replay, most", "peak_mib"),
            ("counted by `workbench plan`: weights and activations", "counted_mib"),
        )
    ]
    return Table(
        f"memory: one example of {found['tokens']:,} tokens, {found['model']}, passes of "
        f"{found['batch_tokens']:,} tokens",
        ("in a process of its own", "MiB"),
        rows,
        "Measured while the first block's heads are replayed, when the tensors of all blocks are "
        "still held. Python with its libraries is in the first two.",
    )


def _steering(case: Mapping[str, Any], found: Sequence[Mapping[str, Any]]) -> Table:
    rows: list[list[str]] = []
    for shape in dict.fromkeys((row["batch"], row["prompt"]) for row in found):
        rows.append([f"{_count(shape[0], 'row')}, prompts of {shape[1]}", *[""] * 5])
        rows += [
            [
                row["method"],
                number(row["tokens_per_second"]),
                number(row["prefill_seconds"]),
                number(row["step_seconds"] * 1000),
                f"{row['ratio_to_plain']:.2f}",
                "–" if row["peak_mib"] is None else f"{row['peak_mib']:,.0f}",
            ]
            for row in found
            if (row["batch"], row["prompt"]) == shape
        ]
    lowest = case["lowest_block"].values()
    note = (
        f"{case['new_tokens']} new tokens a row, greedily. prefill: seconds to the first of them; "
        "step: milliseconds of each later one, all rows together, the median; × plain: a step's "
        "time over that of plain decoding; MiB: the most that a call held beyond what was there "
        f"before it. DPS goes without {_count(case['heads_without'], 'head')}, at random from all "
        f"blocks (the lowest is block {min(lowest)}) or the upper half (block {max(lowest)}); "
        "blocks below run once for both views."
    )
    if any(row["rows_timed"] < row["batch"] for row in found):
        timed = max(row["rows_timed"] for row in found if row["rows_timed"] < row["batch"])
        note += (
            f" two passes run a row at a time: {timed} rows were timed at most, and multiplied; "
            "MiB is one row's."
        )
    return Table(
        f"{case['case']}: {case['model']}, {case['layers']} layers, {case['heads']} heads, "
        f"vocabulary {case['vocabulary']:,}",
        ("method", "tokens/s", "prefill", "step", "× plain", "MiB"),
        rows,
        note,
    )


def _wanted(case: Mapping[str, Any]) -> Table:
    rows = [
        [
            f"{row['over']} / {row['under']}",
            str(row["batch"]),
            str(row["prompt"]),
            f"{row['step']:.2f}",
            f"{row['whole']:.2f}",
            f"≥ {row['at_least']:g}" if row["at_most"] is None else f"≤ {row['at_most']:g}",
        ]
        for row in case["numbers"]
    ]
    same = case["identical"]
    return Table(
        f"{case['case']}: what is to be reached",
        ("seconds of", "batch", "prompt", "a step", "in all", "wanted"),
        rows,
        f"The same tokens in a batch of {same['rows']} prompts of {same['shortest']} to "
        f"{same['longest']} as for each row alone: DPS with gamma 0 and Hugging Face's greedy "
        f"decoding in {same['plain']} of {same['rows']} rows, DPS shared and two passes in "
        f"{same['shared']}.",
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("s" if number != 1 else "")


def _spread(row: Mapping[str, Any]) -> str:
    return f"{(row['seconds_max'] - row['seconds_min']) / row['seconds']:.0%}"


def number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
