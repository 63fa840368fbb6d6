"""All cases of a bench, one after the other, into one result."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from workbench.bench import discovery, scaling, steering
from workbench.bench.discovery import Case
from workbench.bench.fit import calls
from workbench.bench.inputs import (
    LlamaSize,
    corpus_prompts,
    quiet_load,
    write_llama,
)
from workbench.bench.machine import Gauge, facts, load_average
from workbench.bench.scaling import Place, Task
from workbench.bench.steering import RIVAL_CLAIMS, Grid, step_claims
from workbench.bench.tables import FORMAT
from workbench.errors import InputError
from workbench.models import DTYPES, TESTBED, choose_device, heads_per_layer

SHARED, GROWTH, MEMORY = "shared-profile", "growth", "memory"
STEERING, TESTBED_STEERING = "steering", "testbed-steering"
APART = (SHARED, GROWTH, MEMORY, STEERING, TESTBED_STEERING)  # cases of no discovery method
LARGE = 64  # heads; a model with more is screened for 16 heads, with fewer for 8
# The plain loop is timed on one head of every block where it would take longer than this.
LOOP_PARAMETERS = 20_000_000


@dataclass(frozen=True)
class Sizes:
    """How large the cases are.

    Attributes:
        repeats: How often each call is timed.
        corpus: Examples and tokens of the testbed's case, and of a small model's.
        few: Examples of a large model's case.
        llama: The random Llama, with its prompts.
        shared: One user's queries behind a profile.
        growth: From where time grows.
        memory: The long prompt.
        steering: What the random Llama decodes.
        testbed_steering: What the testbed decodes.
    """

    repeats: int
    corpus: tuple[int, int]
    few: int
    llama: Task
    shared: Task
    growth: Task
    memory: Task
    steering: Grid
    testbed_steering: Grid


# GPT-2 small's blocks, in Llama's form.
GPT2_SMALL = LlamaSize(layers=12, heads=12, width=768, hidden=2048, vocabulary=32000)
FULL = Sizes(
    repeats=3,
    corpus=(64, 64),
    few=4,
    llama=Task(GPT2_SMALL, examples=4, tokens=256, target=8),
    shared=Task(
        LlamaSize(layers=6, heads=8, width=512, hidden=1365, vocabulary=8000),
        examples=16,
        tokens=160,
        target=8,
        shared=128,
    ),
    growth=Task(
        LlamaSize(layers=3, heads=4, width=256, hidden=682, vocabulary=1000),
        examples=2,
        tokens=128,
        target=8,
    ),
    memory=Task(GPT2_SMALL, examples=1, tokens=2048, target=8),
    steering=Grid(tuple((rows, tokens) for tokens in (128, 512) for rows in (1, 8, 32))),
    testbed_steering=Grid(
        tuple((rows, tokens) for tokens in (64, 128) for rows in (1, 8, 32)), often=4096
    ),
)
QUICK = replace(
    FULL,
    repeats=1,
    corpus=(16, 64),
    few=1,
    llama=replace(FULL.llama, examples=1),
    shared=replace(FULL.shared, examples=8),
    steering=replace(FULL.steering, shapes=((1, 128), (8, 128)), new_tokens=8, mixed=4),
    testbed_steering=replace(FULL.testbed_steering, shapes=((1, 64), (32, 64))),
)


def case_names(model: str | None, sizes: Sizes = FULL) -> list[str]:
    """What can be chosen, in the order in which it is run."""
    named = [] if model in (None, TESTBED) else [Path(str(model)).name]
    return [TESTBED, sizes.llama.size.name, *named, *APART]


def bench(
    model: str | None = None,
    *,
    chosen: Sequence[str] = (),
    sizes: Sizes = FULL,
    device: str | None = None,
    dtype: str = "float32",
    tell: Callable[[str], object] = lambda line: None,
) -> dict[str, Any]:
    """Measure discovery and steering on this machine.

    Args:
        model: A hub id or folder, for a case of its own.
        chosen: Names of cases; all by default.
        sizes: How large they are.
        device: To measure on; the GPU where there is one.
        dtype: Of the weights.
        tell: Given a line about what is done.

    Returns:
        What `--json` writes; `tables.py` says what is in it.

    Raises:
        InputError: There is no such case, or the model can't be loaded.
    """
    names = case_names(model, sizes)
    if unknown := [name for name in chosen if name not in names]:
        raise InputError(f"no case {unknown[0]!r}; there are {', '.join(names)}")
    if dtype not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r}; known are {', '.join(DTYPES)}")
    wanted = [name for name in names if name in chosen or not chosen]
    device = choose_device(device)
    start, load = time.perf_counter(), load_average()
    gauge = Gauge(device, DTYPES[dtype])
    tell("measuring the machine")
    gauge.measure()
    with tempfile.TemporaryDirectory(prefix="workbench-bench-") as folder:
        place = Place(Path(folder), device, dtype, sizes.repeats, tell)
        parts = _discovery(wanted, model, sizes, place, gauge)
        scaled = (
            (SHARED, "shared", lambda: scaling.shared_profile(sizes.shared, place)),
            (GROWTH, "growth", lambda: scaling.growth(sizes.growth, place)),
            (MEMORY, "memory", lambda: scaling.memory(sizes.memory, place)),
        )
        for name, key, run in scaled:
            if name in wanted:
                parts[key] = run()
                gauge.measure()
        parts |= _steering(wanted, sizes, place, gauge)
    machine = facts(device, dtype) | gauge.record()
    machine |= {"load_before": load, "load_after": load_average()}
    return {
        "format": FORMAT,
        "repeats": sizes.repeats,
        "seconds": time.perf_counter() - start,
        "machine": machine,
        **parts,
    }


def _discovery(
    wanted: Sequence[str], model: str | None, sizes: Sizes, place: Place, gauge: Gauge
) -> dict[str, Any]:
    measured = []
    call, hooked = calls(place.folder, place.device, place.dtype, discovery.plain_loop)
    for name in wanted:
        if name in APART:
            continue
        place.tell(f"{name}: loading")
        case = _case(name, model, sizes, place)
        timed = discovery.measure(case, gauge, place.repeats, place.tell)
        gauge.measure()
        base = replace(gauge.machine(), call_seconds=call, hooked_call_seconds=hooked)
        measured.append((case, timed, discovery.fit(case, base)))
    machine = gauge.machine()  # after all of them, so that all are held against the same
    return {
        "cases": [discovery.description(case, timed) for case, timed, _ in measured],
        "discovery": [
            row for case, timed, _ in measured for row in discovery.rows(case, timed, machine)
        ],
        "screening": [discovery.screening(case, timed) for case, timed, _ in measured],
        "plan": [
            row
            for case, timed, fitted in measured
            for row in discovery.planned(case, timed, fitted)
        ],
    }


def _steering(
    wanted: Sequence[str], sizes: Sizes, place: Place, gauge: Gauge
) -> dict[str, list[Any]]:
    llama = sizes.llama.size
    planned = (
        (STEERING, llama.name, sizes.steering, (*step_claims(8, 1.35), *RIVAL_CLAIMS)),
        (TESTBED_STEERING, TESTBED, sizes.testbed_steering, step_claims(32, 1.5)),
    )
    found: dict[str, list[Any]] = {}
    for name, source, grid, claims in planned:
        if name not in wanted:
            continue
        place.tell(f"{name}: loading")
        path = TESTBED if source == TESTBED else write_llama(llama, place.folder)
        model = quiet_load(path, place.device, place.dtype)
        case = steering.Case(name, source, model, grid, claims)
        rows = steering.measure(case, place.repeats, place.tell)
        found.setdefault("steering", []).extend(rows)
        found.setdefault("steering_cases", []).append(steering.description(case, rows))
        gauge.measure()
    return found


def _case(name: str, model: str | None, sizes: Sizes, place: Place) -> Case:
    if name == sizes.llama.size.name:
        loaded = quiet_load(write_llama(sizes.llama.size, place.folder), place.device, place.dtype)
        prompts, sampled = sizes.llama.prompts(), True
    else:
        source = TESTBED if name == TESTBED else str(model)
        loaded = quiet_load(source, place.device, place.dtype)
        sampled = sum(p.numel() for p in loaded.parameters()) > LOOP_PARAMETERS
        count, tokens = sizes.corpus
        prompts = corpus_prompts(loaded, sizes.few if sampled else count, tokens)
    heads = sum(heads_per_layer(loaded))
    k = min(16 if heads > LARGE else 8, heads)
    return Case(name, loaded, prompts, k, sampled)
