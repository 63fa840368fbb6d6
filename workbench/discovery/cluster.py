"""A Ray cluster: joined or started, and how many workers there is room for."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from workbench.errors import InputError

# What a GPU that fell over, or was taken away, says in torch.
GPU_FAILURES = ("CUDA error", "cuDNN error", "NCCL error", "No CUDA GPUs are available")

AUTO, HERE = "auto", "local"
KNOCK = 5  # seconds that an address has to answer in
OBJECTS = 2**29  # bytes of shared memory of a cluster started here; shards are small


@dataclass(frozen=True)
class RayOptions:
    """Where and on how many workers to score.

    Attributes:
        address: `auto` joins the cluster that RAY_ADDRESS names or that runs on this machine,
            and else starts one here; `local` starts one here; HOST:PORT joins that one.
        workers: How many; by default one a GPU, and without GPUs one a node. Without GPUs each
            gets an equal share of the CPUs.
    """

    address: str = AUTO
    workers: int | None = None


@contextmanager
def connect(options: RayOptions) -> Iterator[None]:
    """Join or start a cluster, and leave it at the end; one that is joined already stays.

    Raises:
        InputError: Ray isn't installed, or no cluster can be reached at the address.
    """
    try:
        import ray
    except ImportError:
        raise InputError(
            "Ray isn't installed: pip install 'preference-heads-workbench[ray]'"
        ) from None
    if ray.is_initialized():
        yield
        return
    main = threading.current_thread() is threading.main_thread()
    former = signal.getsignal(signal.SIGTERM) if main else None
    try:
        _join(options.address)
    finally:
        if former is not None:  # Ray sets its own, and leaves it there
            signal.signal(signal.SIGTERM, former)
    try:
        yield
    finally:
        ray.shutdown()


def _join(address: str) -> None:
    import ray

    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    new = {"include_dashboard": False, "object_store_memory": OBJECTS}
    named = os.environ.get("RAY_ADDRESS") if address == AUTO else address
    if named == HERE:
        ray.init(HERE, **quiet, **new)
        return
    if named:
        _knock(named)
    try:
        ray.init(named or AUTO, **quiet)
    except ConnectionError as error:
        if not named:  # there is none, or one that is no more
            ray.init(HERE, **quiet, **new)
            return
        raise InputError(
            f"{named}: no Ray cluster that this machine belongs to: {first_line(error)}. Run `ray "
            f"start --address={named}` here first, or run the workbench on a machine of the cluster"
        ) from error
    except (RuntimeError, ValueError) as error:  # another version of Ray or Python, for one
        raise InputError(f"{named or 'Ray'}: can't be joined: {first_line(error)}") from error


def _knock(address: str) -> None:
    """Ray itself would wait for minutes at an address where nothing is."""
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdecimal():
        raise InputError(
            f"a Ray address is HOST:PORT (the port is 6379 if `ray start --head` named none), "
            f"{AUTO} or {HERE}, got {address!r}"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), KNOCK).close()
    except (OSError, OverflowError) as error:
        raise InputError(
            f"no Ray cluster answers at {address}: {error}. Start one there with `ray start "
            f"--head --port={port}`, or leave the address out to start one on this machine"
        ) from error


def seats(nodes: Sequence[dict[str, float]], workers: int | None) -> tuple[int, dict[str, int]]:
    """How many workers, and what Ray is to give each.

    Args:
        nodes: What every node has, by Ray's names.
        workers: How many are asked for.

    Raises:
        InputError: So many don't fit.
    """
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    cpus = [int(node.get("CPU", 0)) for node in nodes]
    if gpus:
        count, most = workers or gpus, gpus
        shares = {"num_gpus": 1, "num_cpus": 0}
    else:
        count, most = workers or max(1, sum(n > 0 for n in cpus)), sum(cpus)
        fits = (n for n in range(max(cpus, default=0), 0, -1) if sum(c // n for c in cpus) >= count)
        shares = {"num_gpus": 0, "num_cpus": next(fits, 0)}
    if count > most:
        raise InputError(
            f"{count} workers don't fit into a cluster of {most} {'GPUs' if gpus else 'CPUs'}; "
            f"give --workers {most} or less, or add machines"
        )
    return count, shares


def has_gpus() -> bool:
    """Whether workers will be on GPUs in the cluster that was joined."""
    return any(node.get("GPU", 0) >= 1 for node in nodes())


def nodes() -> list[dict[str, float]]:
    """What the nodes have that are alive."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def first_line(error: BaseException) -> str:
    """An error in a line; Ray's own fill the screen."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)
