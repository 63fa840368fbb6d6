"""What this machine sustains: matrix products, copies, and the start of a kernel."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from workbench.bench.clock import wait
from workbench.discovery.cost import Machine

# Rows, inner and columns of the products tried: square, and as the blocks of models have them.
SHAPES = {
    "cpu": ((1024, 1024, 1024), (2048, 2048, 2048), (4096, 768, 2048)),
    "cuda": ((4096, 4096, 4096), (8192, 8192, 8192), (16384, 4096, 4096)),
}
COPY_BYTES = {"cpu": 2**28, "cuda": 2**31}
TRIALS = 3
TINY_CALLS = 2000


@dataclass
class Gauge:
    """Measures a machine again and again over a run.

    Attributes:
        device: What is measured.
        dtype: Of the products.
        rates: Operations a second, a measurement each: the largest over `SHAPES`.
        bandwidths: Bytes a second, read and written.
        calls: Seconds to start a kernel.
    """

    device: str
    dtype: torch.dtype
    rates: list[float] = field(default_factory=list)
    bandwidths: list[float] = field(default_factory=list)
    calls: list[float] = field(default_factory=list)

    def measure(self) -> None:
        """Once more."""
        kind = torch.device(self.device).type
        self.rates.append(max(self._product(*sizes) for sizes in SHAPES.get(kind, SHAPES["cpu"])))
        self.bandwidths.append(self._copy(COPY_BYTES.get(kind, COPY_BYTES["cpu"])))
        self.calls.append(self._start())

    def machine(self) -> Machine:
        """The medians of what was measured."""
        return Machine(
            statistics.median(self.rates),
            statistics.median(self.bandwidths),
            statistics.median(self.calls),
        )

    def _product(self, rows: int, inner: int, columns: int) -> float:
        a = torch.ones(rows, inner, device=self.device, dtype=self.dtype)
        b = torch.ones(inner, columns, device=self.device, dtype=self.dtype)
        return 2 * rows * inner * columns / best_seconds(lambda: a @ b, self.device)

    def _copy(self, size: int) -> float:
        source = torch.ones(size // 4, device=self.device)
        target = torch.empty_like(source)
        return 2 * size / best_seconds(lambda: target.copy_(source), self.device)

    def _start(self) -> float:
        x = torch.ones(8, device=self.device)

        def many() -> None:
            for _ in range(TINY_CALLS):
                x.add(x)

        return best_seconds(many, self.device) / TINY_CALLS

    def record(self) -> dict[str, Any]:
        """As the JSON holds it."""
        machine = self.machine()
        return {
            "rate_operations_per_second": machine.rate,
            "rate_measured": self.rates,
            "bandwidth_bytes_per_second": machine.bandwidth,
            "call_seconds": machine.call_seconds,
        }


def best_seconds(call: Callable[[], Any], device: str) -> float:
    """Least seconds of some trials behind a first one: interruptions only ever add."""
    call()
    wait(device)
    taken = []
    for _ in range(TRIALS):
        start = time.perf_counter()
        call()
        wait(device)
        taken.append(time.perf_counter() - start)
    return min(taken)


def facts(device: str, dtype: str) -> dict[str, Any]:
    """What the numbers were measured on and with."""
    return {
        "processor": _processor(),
        "gpu": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
        "device": device,
        "dtype": dtype,
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_mib": round(psutil.virtual_memory().total / 2**20),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def load_average() -> float | None:
    """Processes that wanted to run in the last minute; None where the system doesn't count."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
