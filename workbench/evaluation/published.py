"""The numbers of the paper's tables 1, 2 and 3, as data, and whose they are.

What stands beside them is to be read with care, and the notes here say why: the paper prints no
interval and no row of the plain model, and its cells do not all come from the same examples.

Source: tables 1 to 3 of the paper (arXiv 2604.22345).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

METHODS = {"cad": "CAD", "decore": "DeCoRe", "dola": "DoLa", "dps": "DPS"}
TASKS = {
    "LaMP-1": ("accuracy", "macro F1"),
    "LaMP-2": ("accuracy", "macro F1"),
    "LaMP-3": ("MAE", "RMSE"),
    "LaMP-4": ("R-1", "R-L", "METEOR"),
    "LaMP-5": ("R-1", "R-L", "METEOR"),
    "LaMP-7": ("R-1", "R-L", "METEOR"),
}
LLAMA, QWEN, MISTRAL = "LLaMA-3-8B", "Qwen2-7B", "Mistral-7B"
# The models as the paper ran them; its tables leave the second half of the names out.
MODELS = {
    LLAMA: "LLaMA-3-8B-Instruct",
    QWEN: "Qwen2-7B-Instruct",
    MISTRAL: "Mistral-7B-Instruct-v0.3",
}
_GENERATION, _DECISION = ("LaMP-4", "LaMP-5", "LaMP-7"), ("LaMP-1", "LaMP-2", "LaMP-3")

# A row a model and method; a number for each task and metric, in the order of TASKS.
_TABLE_1 = {
    (LLAMA, "cad"): ".1681 .1498 .1568  .3530 .3068 .3925  .3368 .2893 .2813",
    (LLAMA, "decore"): ".1768 .1572 .1626  .4010 .3527 .4004  .3231 .2764 .2729",
    (LLAMA, "dola"): ".1694 .1508 .1592  .3636 .3117 .4079  .3365 .2877 .2795",
    (LLAMA, "dps"): ".1787 .1596 .1650  .3243 .2787 .3826  .3389 .2898 .2884",
    (QWEN, "cad"): ".1580 .1392 .1255  .4197 .3780 .4381  .3590 .3106 .3384",
    (QWEN, "decore"): ".1581 .1305 .1232  .4311 .3729 .4565  .3470 .3065 .3173",
    (QWEN, "dola"): ".1642 .1473 .1272  .4277 .3746 .4596  .3524 .3046 .3246",
    (QWEN, "dps"): ".1627 .1450 .1318  .4071 .3421 .4230  .3533 .2981 .3269",
    (MISTRAL, "cad"): ".1361 .1132 .0980  .4375 .3712 .4561  .3342 .2916 .3097",
    (MISTRAL, "decore"): ".1299 .1085 .0908  .4135 .3648 .4419  .3407 .2927 .2978",
    (MISTRAL, "dola"): ".1362 .1136 .0962  .4364 .3733 .4605  .3291 .2852 .3026",
    (MISTRAL, "dps"): ".1536 .1366 .1399  .3983 .3350 .4162  .3441 .2998 .2990",
}
_TABLE_2 = {
    (LLAMA, "cad"): ".6240 .6070  .4552 .3839  .4426 .9300",
    (LLAMA, "decore"): ".6232 .6200  .4639 .4034  .4442 .9458",
    (LLAMA, "dola"): ".6156 .5961  .2800 .1643  .4200 .8718",
    (LLAMA, "dps"): ".6356 .6288  .4610 .3910  .4236 .9278",
    (QWEN, "cad"): ".6230 .6250  .1850 .1181  .3180 .6240",
    (QWEN, "decore"): ".5400 .5891  .2320 .1217  .3250 .6325",
    (QWEN, "dola"): ".6790 .6795  .2412 .0958  .3200 .6300",
    (QWEN, "dps"): ".6932 .7078  .3902 .3202  .3276 .6719",
}


@dataclass(frozen=True)
class Published:
    """A number of table 1 or 2.

    Attributes:
        model: As the paper's tables name it.
        method: As the workbench names it: `cad`, `decore`, `dola` or `dps`.
        task: As LaMP names it.
        metric: `accuracy`, `macro F1`, `MAE`, `RMSE`, `R-1`, `R-L` or `METEOR`.
        value: A fraction; for MAE and RMSE points of the rating.
    """

    model: str
    method: str
    task: str
    metric: str
    value: float


def _numbers() -> dict[tuple[str, str, str, str], Published]:
    found = {}
    for rows, tasks in ((_TABLE_1, _GENERATION), (_TABLE_2, _DECISION)):
        cells = [(task, metric) for task in tasks for metric in TASKS[task]]
        for (model, method), text in rows.items():
            for (task, metric), value in zip(cells, text.split(), strict=True):
                key = (model, method, task, metric)
                found[key] = Published(*key, float(value))
    return found


NUMBERS = _numbers()

# Table 3: prompt tokens -> estimated TFLOP of LLaMA-3-8B for 32 new tokens.
OPERATIONS = {
    512: {"plain": 6.57, "dps": 6.96},
    1024: {"plain": 13.04, "dps": 13.43},
    2048: {"plain": 26.80, "dps": 27.21},
}
NEW_TOKENS = 32

NOTE = (
    "The paper's numbers are from arXiv 2604.22345, tables 1 and 2. It prints no interval and has "
    "no row of the plain model. Many of its baseline cells come from 50 examples and DPS's from "
    "up to 2,500, and its CAD rows of LLaMA-3 equal the plain model's, since the profile was never "
    "removed. Predictions are scored there as they come, which is the strict reading: "
    "its numbers stand beside that alone."
)
_FAMILIES = {
    LLAMA: re.compile(r"(meta-)?llama-3-8b(-instruct)?(-hf)?", re.IGNORECASE),
    QWEN: re.compile(r"qwen2-7b(-instruct)?", re.IGNORECASE),
    MISTRAL: re.compile(r"mistral-7b(-instruct)?(-v0\.\d)?", re.IGNORECASE),
}


def family(model: str) -> str | None:
    """The model of the paper's tables that a model is a version of, by its name.

    Args:
        model: A hub id, or the name of a folder. Another generation or size is no version:
            `Llama-3.1-8B` and `Qwen2.5-7B` have no number in the paper.
    """
    name = model.rstrip("/").rpartition("/")[2]
    return next((known for known, names in _FAMILIES.items() if names.fullmatch(name)), None)


def family_note(model: str) -> str:
    """Which rows of the paper stand beside a model's, and what differs; empty if none do."""
    known = family(model)
    if known is None:
        return ""
    name = model.rstrip("/").rpartition("/")[2].lower().removeprefix("meta-")
    same = name == MODELS[known].lower()
    differs = "" if same else f"; the paper ran {MODELS[known]}, so the model differs"
    return f"Beside {model} stand the paper's numbers of {known}{differs}."


def published(model: str, method: str, task: str, metric: str) -> float | None:
    """The paper's number for a cell of ours, or None where it has none.

    Args:
        model: A hub id, or the name of a folder.
        method: As the workbench names it.
        task: As LaMP names it.
        metric: As in `TASKS`.
    """
    found = NUMBERS.get((family(model) or "", method, task, metric))
    return None if found is None else found.value
