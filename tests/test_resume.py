"""Runs killed without warning, again and again, end as if nothing had happened."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from itertools import pairwise

import pytest

from workbench import runs
from workbench.scores import HeadScores

SHARD = 2  # examples

# Has everything imported and forks a child for each attempt, so that twenty attempts don't pay
# for twenty imports. It starts no thread and computes nothing itself: forking is safe.
SERVER = """
import json, os, signal, sys, time, traceback
import torch
import workbench as wb
from workbench import runs
from workbench.discovery import run
from workbench.discovery.screening import Screen

torch.set_num_threads(1)

def attempt(folder, method, sync, **_):
    real, calls = runs._sync, 0

    def killing(path):
        nonlocal calls
        calls += 1
        if calls == sync:
            os.kill(os.getpid(), signal.SIGKILL)
        real(path)

    runs._sync = killing
    run.score_heads(
        wb.load_model("testbed", device="cpu"),
        wb.load_examples("testbed", users=2),
        method=method,
        screen=Screen(4) if method == "screened" else None,
        folder=folder,
        shard_examples=%d,
        progress=False,
    )

names = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
# pyarrow's allocator keeps a thread of its own, and knows about forks.
assert len([name for name in names if name != "jemalloc_bg_thd\\n"]) == 1, names
print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    start = time.monotonic()
    child = os.fork()
    if not child:
        try:
            attempt(**order)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if order["delay"] is not None:
        time.sleep(order["delay"])
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps({"status": status, "seconds": time.monotonic() - start}), flush=True)
"""


@pytest.fixture(scope="module")
def attempt():
    """Run or resume in a process of its own; gives its exit code and how long it took."""
    if not sys.platform.startswith("linux"):
        pytest.skip("counts its threads in Linux's /proc")
    command = [sys.executable, "-c", SERVER % SHARD]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as server:

        def ask(folder, method="exact", delay=None, sync=None):
            order = {"folder": str(folder), "method": method, "delay": delay, "sync": sync}
            server.stdin.write(json.dumps(order) + "\n")
            server.stdin.flush()
            answer = json.loads(server.stdout.readline())
            return answer["status"], answer["seconds"]

        try:
            assert server.stdout.readline() == "ready\n"
            yield ask
        finally:
            server.stdin.close()
            server.wait(60)


def shards(folder):
    """What tells whether a finished shard was touched."""
    found = {}
    for path in folder.glob("*/*.parquet"):
        status = path.stat()
        found[path.relative_to(folder)] = (status.st_ino, status.st_mtime_ns)
    return found


def parts(folder):
    return list(folder.rglob("*.part"))


def at_random_times(seconds):
    """When to kill: two of three at a random time, one at a random call of fsync.

    The latter meets a run in the middle of writing who holds it, the manifest or a shard, or
    right after it gave that its name.
    """
    rng = random.Random(7)
    while True:
        yield {"delay": rng.uniform(0, seconds)}
        yield {"delay": rng.uniform(0, seconds)}
        yield {"sync": rng.randint(1, 14)}


def at_random_writes():
    rng = random.Random(3)
    while True:
        yield {"sync": rng.randint(1, 60)}


def kill_and_compare(attempt, folder, whole, method, moments, kills):
    """Kill a run so many times, let it finish, and hold it against the uninterrupted one.

    Should it be finished before (the machine is faster than it was), the rest of the kills meet
    another run.
    """
    seen, left, done = [{}], [], 0
    while done < kills:
        status, _ = attempt(folder, method, **next(moments))
        if status == 0:
            assert_nothing_was_lost(folder, whole, [*seen, shards(folder)])
            folder, seen = folder.with_name(f"{folder.name}+"), [{}]
            continue
        assert status == -signal.SIGKILL
        done += 1
        seen.append(shards(folder))
        left += parts(folder)
    assert left, "no kill met a write"
    assert attempt(folder, method)[0] == 0
    assert_nothing_was_lost(folder, whole, [*seen, shards(folder)])


def assert_nothing_was_lost(folder, whole, seen):
    for before, after in pairwise(seen):
        assert before.items() <= after.items()  # the same files, untouched
    found, expected = HeadScores.load(folder).data, HeadScores.load(whole).data
    assert found.identical(expected)  # every value; NaN, where none was asked for, equals NaN
    assert parts(folder) == []
    with runs.hold(folder):
        pass


def test_a_run_killed_twenty_times_equals_one_that_was_not(attempt, tmp_path):
    whole = tmp_path / "whole"
    status, seconds = attempt(whole)
    assert status == 0
    status, start = attempt(whole)  # nothing is left to do
    assert status == 0
    # Within this time a kill leaves, on average, less than a twentieth of the work done.
    moments = at_random_times(start + 3 * (seconds - start) / 20)
    kill_and_compare(attempt, tmp_path / "killed", whole, "exact", moments, 20)


def test_a_screened_run_killed_in_its_stages_equals_one_that_was_not(attempt, tmp_path):
    whole = tmp_path / "whole"
    assert attempt(whole, "screened")[0] == 0
    kill_and_compare(attempt, tmp_path / "killed", whole, "screened", at_random_writes(), 6)
