"""What the table of an evaluation shows, in words, and all of it written to the run folder.

An effect is named only where it is shown.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from workbench import runs
from workbench.data.tasks import get_task
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
COPYING = "copying.json"  # in the run folder: what detected retrieval heads are worth, in words
MACRO_F1 = (
    "macro F1 is over all labels of a task; a resample of users that lacks a label counts 0 for "
    "it, so that the interval lies low where labels are rare."
)
_TUNED = {
    "dps": "DPS among K x gamma",
    "decore": "DeCoRe among K x strengths",
    "cad": "CAD among gamma",
    "dola": "DoLa between two halves of the layers",
    "random": "random heads, a set a seed at DPS's K, among gamma alone",
    "dps+cad": "DPS + CAD, with DPS's heads, among pairs of strengths and no other K",
}


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
    tuned = [words for name, words in _TUNED.items() if name in settings["methods"]]
    if tuned:
        lines.append(f"Chosen on validation: {'; '.join(tuned)}.")
    if any(get_task(task).kind == "classification" for task in settings["tasks"]):
        lines.append(f"{MACRO_F1[0].upper()}{MACRO_F1[1:]}")
    lines += about_users(manifest)
    if manifest["left_out_users"]:
        left_out = _users(manifest["left_out_users"])
        lines.append(f"Left out: {left_out} that heads were found on.")
    lines += [*_strongest(evaluation), *_all_equal(evaluation)]
    lines += about_heads(manifest, evaluation.folder)
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


def about_users(manifest: Mapping[str, Any]) -> list[str]:
    """What is special about the users of the data, a sentence each."""
    told = {
        "users_inferred": "Users were inferred, since the files name none: rows whose profiles "
        "share at least half of the smaller one's items, or in LaMP-3, 4 and 7 one long text, "
        "count as one user's.",
        "users_recur": "Users recur across splits, as this data set's temporal setting means them "
        "to: settings and heads may come from earlier texts of the same users; no example is used "
        "twice.",
    }
    return [sentence for name, sentence in told.items() if manifest.get(name)]


def about_heads(manifest: Mapping[str, Any], folder: Path) -> list[str]:
    """With what prompts preference heads were found, where they differ, and whence DeCoRe's are.

    Args:
        manifest: The run's.
        folder: The run's.
    """
    lines = []
    if different := manifest.get("other_prompt"):
        lines.append(f"Heads were found with other prompts, as --other-prompt allows: {different}.")
    if "decore" not in manifest["settings"]["methods"] or "retrieval_from" not in manifest:
        return lines
    if manifest["retrieval_from"] is not None:
        return [*lines, f"DeCoRe's heads are those of {manifest['retrieval_from']}."]
    path = folder / COPYING
    found = f": {runs.read_json(path)['note']}" if path.is_file() else ""
    return [*lines, f"DeCoRe's heads were detected with random-token needle probes{found}."]


def _cells(evaluation: Evaluation) -> Iterator[tuple[str, str, list[Mapping[str, Any]]]]:
    """Task, method and what was chosen, a record a seed."""
    for task, by_method in evaluation.choices.items():
        for method, choice in by_method.items():
            yield task, method, choice.get("seeds", [choice])


def _strongest(evaluation: Evaluation) -> list[str]:
    """The cells that took the largest K or the largest constant gamma of the grid, in a line."""
    settings = evaluation.manifest["settings"]
    constants = [gamma for gamma in settings["gamma"] if not isinstance(gamma, str)]
    largest: dict[str, Any] = {
        "K": max(settings.get("k", ()), default=None),
        "gamma": max(constants, default=None),
    }
    keys = {"K": ("k",), "gamma": ("gamma", "cad")}
    found, tried = [], dict[str, float]()
    for task, method, records in _cells(evaluation):
        # The others have DPS's K: nothing was chosen there.
        names = ("K", "gamma") if method in ("dps", "decore") else ("gamma",)
        at_the_end = [
            name
            for name in names
            if any(
                largest[name] in [one[key] for key in keys[name] if key in one] for one in records
            )
        ]
        if at_the_end:
            tried |= {name: largest[name] for name in at_the_end}
            found.append(f"{method} on {task} ({', '.join(at_the_end)})")
    if not found:
        return []
    named = " or ".join(f"{name} ({tried[name]:g})" for name in largest if name in tried)
    return [
        f"The largest {named} tried was chosen, a larger one may do better: {', '.join(found)}."
    ]


def _all_equal(evaluation: Evaluation) -> list[str]:
    """The cells where validation users told candidates apart in nothing, in a line."""
    found = [
        f"{method} on {task}"
        for task, method, records in _cells(evaluation)
        if any(one.get("all_equal") for one in records)
    ]
    if not found:
        return []
    told = "All candidates were equal on validation; the gentlest was taken"
    return [f"{told}: {', '.join(found)}."]


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
