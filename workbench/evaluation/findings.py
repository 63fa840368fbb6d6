"""What the table of an evaluation shows, in words, and all of it written to the run folder.

An effect is named only where it is shown.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from workbench import runs
from workbench.evaluation.methods import PLAIN
from workbench.evaluation.results import Evaluation
from workbench.evaluation.summary import (
    LEVEL,
    LIKELIHOOD,
    TABLE,
    evaluation_table,
    qualities,
)

QUALITIES, FINDINGS = "tables/qualities.json", "tables/findings.json"


def findings(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the table shows, a line a task and one more on DPS against random heads.

    A method is called better or worse than plain where p after Holm is below 0.05 and the
    interval leaves 0 out.
    """
    lines = []
    primary = [row for row in rows if row["primary"]]
    for task in dict.fromkeys(row["task"] for row in primary):
        group = [row for row in primary if row["task"] == task]
        others = [row for row in group if row["method"] != PLAIN]
        lines += [_against_plain(task, others)] if others else []
        lines += [_over_random(row) for row in group if row["over_random"] is not None]
    return lines


def _against_plain(task: str, rows: Sequence[Mapping[str, Any]]) -> str:
    verdicts: dict[str, list[str]] = {"better": [], "worse": [], "no effect shown": []}
    for row in rows:
        if row["difference"] is not None:
            named = f"{row['method']} ({row['difference']:+.3f})"
            verdicts[_verdict(row, "difference", row["p_holm"])].append(named)
    said = [f"{name}: {', '.join(found)}" for name, found in verdicts.items() if found]
    label, better = rows[0]["metric"], rows[0]["better"]
    head = f"{task}{_mark(rows[0])}, {label} ({better} is better), against plain after Holm: "
    return head + ("; ".join(said) or "nothing was compared") + "."


def _mark(row: Mapping[str, Any]) -> str:
    return " (LEAKED: heads were found on these examples or users)" if row["leaked"] else ""


def _verdict(row: Mapping[str, Any], what: str, p: float | None) -> str:
    low, high = row[f"{what}_low"], row[f"{what}_high"]
    if p is None or p >= LEVEL or low is None or low <= 0 <= high:
        return "no effect shown"
    return "better" if (row[what] > 0) == (row["better"] == "higher") else "worse"


def _over_random(row: Mapping[str, Any]) -> str:
    """DPS against the random sets that were drawn.

    p is over users, for these very sets: it says nothing of how others would do. The rank among
    them does: heads no better than random ones beat all of n sets once in n + 1.
    """
    verdict = _verdict(row, "over_random", row["over_random_p"])
    words = {"better": "is better", "worse": "is worse"}.get(verdict)
    count, beaten = row["seeds"], row["beaten"]
    sets = f"these {count} random sets on average" if count > 1 else "this random set"
    says = f"DPS {words} than {sets}" if words else f"DPS against {sets}: no effect shown"
    gain = _verdict(row, "difference", row["p_holm"])
    # Random heads may do harm, which is not the same as DPS doing good.
    damage = "" if verdict != "better" or gain == "better" else "; against plain it shows no gain"
    return (
        f"{row['task']}{_mark(row)}: {says} ({row['over_random']:+.3f}{_span(row)}); it beats "
        f"{beaten} of {count}, as random heads do with probability "
        f"{(count + 1 - beaten) / (count + 1):.2f}{damage}."
    )


def _span(row: Mapping[str, Any]) -> str:
    if row["over_random_low"] is None:
        return ", no interval: a single user"
    ends = f"{row['over_random_low']:+.3f} to {row['over_random_high']:+.3f}"
    return f", 95 % interval {ends}, p {p_in_words(row['over_random_p'])}"


def p_in_words(p: float | None) -> str:
    """A p as tables print it; no p of random swaps is 0."""
    if p is None:
        return "–"
    return f"{p:.3f}" if p >= 0.001 else "< .001"


def protocol_lines(evaluation: Evaluation) -> list[str]:
    """How the table came about, for below it."""
    manifest = evaluation.manifest
    settings, users = manifest["settings"], manifest["users"]
    lines = [
        f"Settings were chosen on {_users(users['validation'])} of the "
        f"{settings['splits']['validation']} split; the table is about {_users(users['test'])} of "
        f"the {settings['splits']['test']} split, all methods on the same prompts.",
        "Intervals: 95 %, over users. p: paired over users, after Holm over all methods and "
        "tasks, of each task's first metric; other metrics have no p. DPS against random heads "
        "is adjusted over the tasks.",
    ]
    if manifest["left_out_users"]:
        left_out = _users(manifest["left_out_users"])
        lines.append(f"Left out: {left_out} that heads were found on.")
    if strongest := _strongest(evaluation):
        lines.append(
            "The strongest gamma tried was chosen, so that a larger one may do better: "
            f"{', '.join(strongest)}."
        )
    if settings["leaked"]:
        lines.append(
            f"LEAKED: heads were found on {len(settings['leaked'])} of the test examples or on "
            "their users, as --same-examples allows."
        )
    if settings["decide"] == LIKELIHOOD:
        lines.append("Labels were decided on by likelihood, not written.")
    return lines


def _users(count: int) -> str:
    return "1 user" if count == 1 else f"{count} users"


def _strongest(evaluation: Evaluation) -> list[str]:
    """Task and method of every cell that took the largest gamma of the grid."""
    largest = max(evaluation.manifest["settings"]["gamma"])
    found = []
    for task, by_method in evaluation.choices.items():
        for method, choice in by_method.items():
            records = choice.get("seeds", [choice])
            if any(largest in (one.get("gamma"), one.get("cad")) for one in records):
                found.append(f"{method} on {task}")
    return found


def summarise(evaluation: Evaluation) -> dict[str, Any]:
    """The table, the qualities and the findings, written to the run folder's `tables` too.

    Raises:
        InputError: They can't be written.
    """
    rows = evaluation_table(evaluation)
    found = {
        "rows": rows,
        "qualities": qualities(evaluation),
        "findings": findings(rows),
        "protocol": protocol_lines(evaluation),
    }
    words = {"findings": found["findings"], "protocol": found["protocol"]}
    for name, value in ((TABLE, rows), (QUALITIES, found["qualities"]), (FINDINGS, words)):
        text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
        runs.write_text(evaluation.folder / name, text + "\n")
    return found
