"""Times and memory of calls that take turns, so that a machine's moods meet all of them alike."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

MIB = 2**20
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # what `man 5 proc` wants to see for that


@dataclass
class Timed:
    """Repeats of one call.

    Attributes:
        seconds: Of each repeat, times `scale`.
        scale: What a repeat is multiplied by: 3 where a third of the work was done.
        peak_mib: Most memory that the process held during any; None where it can't be told.
        result: What the last repeat returned.
    """

    scale: float = 1.0
    seconds: list[float] = field(default_factory=list)
    peak_mib: float | None = None
    result: Any = None

    @property
    def median(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)

    def record(self) -> dict[str, float]:
        """Median, least and most seconds, as the JSON holds them."""
        return {
            "seconds": self.median,
            "seconds_min": min(self.seconds),
            "seconds_max": max(self.seconds),
        }


def interleaved(
    calls: Mapping[str, Callable[[], Any]],
    repeats: int,
    device: str,
    scales: Mapping[str, float] | None = None,
    tell: Callable[[str], object] = lambda line: None,
) -> dict[str, Timed]:
    """Time calls in turn: all of them once, then all of them again.

    Args:
        calls: What to time. Each is to be warm: called once before.
        repeats: How often.
        device: What they run on.
        scales: What the seconds of a call are multiplied by; 1 by default.
        tell: Given a line about every call when it is done.
    """
    timed = {name: Timed((scales or {}).get(name, 1.0)) for name in calls}
    gc.collect()
    gc.freeze()  # what is there now needs no looking through before every call
    try:
        for repeat in range(repeats):
            for name, call in calls.items():
                taken = _time(call, timed[name], device)
                tell(f"{name}: {taken:.2f} s, {repeat + 1} of {repeats}")
    finally:
        gc.unfreeze()
    return timed


def _time(call: Callable[[], Any], entry: Timed, device: str) -> float:
    entry.result = None  # a result that is still held would count as this call's memory
    start_over(device)
    start = time.perf_counter()
    entry.result = call()
    wait(device)
    taken = time.perf_counter() - start
    entry.seconds.append(taken * entry.scale)
    peak = peak_mib(device)
    if peak is not None:
        entry.peak_mib = max(peak, entry.peak_mib or 0.0)
    return taken


def wait(device: str) -> None:
    """Until a GPU has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def start_over(device: str) -> None:
    """Give free memory back and begin a new count of the most that is held."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if STATUS.exists() else None
    if trim is not None:
        trim(0)  # glibc keeps what was freed, and the next call's peak would begin there
    if CLEAR.exists():
        CLEAR.write_text(RESET_PEAK)


def peak_mib(device: str) -> float | None:
    """Most memory held since `start_over`: of a GPU by torch, else by this process on Linux."""
    if device.startswith("cuda"):
        return float(torch.cuda.max_memory_allocated(device)) / MIB
    if not STATUS.exists():
        return None
    for line in STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return None
