"""Run folders: nothing half-written, nothing mixed."""

import errno
import fcntl
import json
import os
import shlex
import signal
import socket
import stat
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest

from workbench import runs
from workbench.errors import InputError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def child(code, *arguments):
    """A Python process with pipes, killed at the end and after a minute."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:
        timer = threading.Timer(60, process.kill)
        timer.start()
        try:
            yield process
        finally:
            timer.cancel()
            process.kill()


def test_a_write_that_fails_leaves_nothing(tmp_path):
    def write():
        with runs.atomic(tmp_path / "a" / "x.txt") as part:
            part.write_text("half")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write()
    assert names(tmp_path / "a") == []


def test_a_write_that_fails_keeps_the_file_that_was_there(tmp_path):
    path = tmp_path / "x.txt"
    runs.write_text(path, "old")
    with pytest.raises(RuntimeError), runs.atomic(path) as part:
        part.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert names(tmp_path) == ["x.txt"]


def test_a_file_has_its_name_only_once_it_is_whole(tmp_path):
    path = tmp_path / "00000.parquet"
    with runs.atomic(path) as part:
        part.write_text("whole")
        assert not path.exists()
        assert list(tmp_path.glob("*.parquet")) == []  # what a reader of shards looks for
    assert path.read_text() == "whole"
    assert names(tmp_path) == ["00000.parquet"]


def test_a_file_reaches_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    path, calls = tmp_path / "x.txt", []

    def note(descriptor):
        calls.append((stat.S_ISDIR(os.fstat(descriptor).st_mode), path.exists()))

    monkeypatch.setattr(os, "fsync", note)
    runs.write_text(path, "whole")
    assert calls == [(False, False), (True, True)]  # the file, then the folder that names it


def test_a_folder_that_cannot_be_synced_is_no_error(tmp_path, monkeypatch):
    def refuse_folders(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "as some network disks do")

    monkeypatch.setattr(os, "fsync", refuse_folders)
    runs.write_text(tmp_path / "x.txt", "whole")
    assert names(tmp_path) == ["x.txt"]


def test_two_threads_that_write_one_file_do_not_share_the_temporary_one(tmp_path):
    path = tmp_path / "x.txt"
    with runs.atomic(path) as part:
        part.write_text("first")
        other = threading.Thread(target=runs.write_text, args=(path, "other"))
        other.start()
        other.join()
        assert path.read_text() == "other"
    assert path.read_text() == "first"


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.ENOSPC, "No space left on device; free some space and run"),
        (errno.EDQUOT, "exceeded; free some space and run"),
        (errno.EFBIG, "File too large; allow larger files"),
        (errno.EIO, "error; check the disk and run"),
        (errno.EROFS, "Read-only file system; make sure that files can be written there and run"),
        (errno.EACCES, "Permission denied; make sure that files can be written there and run"),
    ],
)
@pytest.mark.parametrize("where", ["writing", "syncing"])
def test_what_stops_a_write_is_told_with_its_remedy(tmp_path, monkeypatch, number, reason, where):
    path = tmp_path / "00001.parquet"
    runs.write_text(path, "old")

    def fail(*_):
        raise OSError(number, f"[errno {number}] in the words of some library")

    if where == "syncing":
        monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(InputError, match=reason) as caught, runs.atomic(path) as part:
        part.write_text("half")
        if where == "writing":
            fail()
    assert str(caught.value).startswith(f"{path}: can't be written: ")
    assert str(caught.value).endswith(" the same command again; finished shards are kept")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["00001.parquet"]


def test_a_file_in_the_place_of_a_folder_is_told(tmp_path):
    (tmp_path / "scores").write_text("")
    with pytest.raises(InputError, match=r"00000\.parquet: can't be written: "):
        runs.write_text(runs.shard_path(tmp_path, 0), "x")


# Real limits of a disk. The mounts are in a namespace of the child's own and end with it.

WRITE = """
import json, sys
from pathlib import Path
import numpy as np, pyarrow as pa
from workbench import runs
from workbench.errors import InputError
from workbench.scores import write_shard
folder = Path(sys.argv[1], "run")
def told(work):
    try:
        work()
    except InputError as error:
        return str(error)
def hold():
    with runs.hold(folder):
        pass
def write(index, rows):
    table = pa.table({"x": np.random.default_rng(0).normal(size=rows)})
    write_shard(table, runs.shard_path(folder, index))
result = {}
"""


def results(code, *arguments, before=()):
    command = [*before, sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def disk(tmp_path):
    """Run Python code in a folder that is a small disk of its own, mounted with these options."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def run(options, code):
        mount = shlex.join(["mount", "-t", "tmpfs", "-o", options, "none", str(folder)])
        inside = ["unshare", "--map-root-user", "--mount", "sh", "-c", f'{mount} && exec "$@"', "_"]
        try:
            subprocess.run([*inside, "true"], check=True, capture_output=True, timeout=30)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no disk can be mounted here, with unshare and mount: {error}")
        return results(code, folder, before=inside)

    return run


def test_a_full_disk_costs_the_shard_in_work_and_no_other(disk):
    found = disk(
        "size=64k",
        WRITE
        + """
with runs.hold(folder):
    write(0, 10)
    result["full"] = told(lambda: write(1, 20000))
    result["left"] = sorted(p.name for p in (folder / "scores").iterdir())
    result["smaller"] = told(lambda: write(1, 10))
ballast = folder.parent / "ballast"
with ballast.open("wb", buffering=0) as file:
    try:
        while file.write(bytes(4096)):
            pass
    except OSError:
        pass
result["hold"] = told(hold)
ballast.unlink()
result["again"] = told(hold)
print(json.dumps(result))
""",
    )
    assert "00001.parquet: can't be written: No space left on device; free some" in found["full"]
    assert found["left"] == ["00000.parquet"]
    assert found["smaller"] is None
    assert "can't be written: No space left on device" in found["hold"]
    assert found["again"] is None  # the lock was given back


def test_a_read_only_disk_is_refused(disk):
    found = disk("ro", WRITE + "print(json.dumps([told(hold), told(lambda: write(0, 10))]))")
    assert "can't be used as a run folder: Read-only file system; name another" in found[0]
    assert "can't be written: Read-only file system; make sure that" in found[1]


def test_a_folder_of_someone_else_is_refused(tmp_path):
    tmp_path.chmod(0o555)
    found = results(
        WRITE
        + """
import os
if os.geteuid() == 0:
    os.seteuid(65534)  # root may write everywhere
print(json.dumps([told(hold), told(lambda: write(0, 10))]))
""",
        tmp_path,
    )
    tmp_path.chmod(0o755)
    assert "can't be used as a run folder: Permission denied; name another" in found[0]
    assert "can't be written: Permission denied; make sure that" in found[1]


def test_a_limit_on_file_sizes_is_told(tmp_path):
    found = results(
        WRITE
        + """
import resource
write(0, 10)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
result["told"] = told(lambda: write(1, 20000))
result["left"] = sorted(p.name for p in (folder / "scores").iterdir())
print(json.dumps(result))
""",
        tmp_path,
    )
    assert "00001.parquet: can't be written: File too large; allow larger files" in found["told"]
    assert found["left"] == ["00000.parquet"]


# One process at a time

HOLD = """
import sys
from pathlib import Path
from workbench import runs
folder = Path(sys.argv[1])
with runs.hold(folder), runs.atomic(runs.shard_path(folder, 0)) as part:
    part.write_text("half")
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_a_second_process_is_told_who_holds_the_folder(tmp_path):
    with child(HOLD, tmp_path, "--users", "3") as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InputError) as caught, runs.hold(tmp_path):
            pass
        message = str(caught.value)
        start = f"{tmp_path} is in use by process {holder.pid} on {socket.gethostname()} (started "
        assert message.startswith(start)
        command = f": -c {tmp_path} --users 3)"
        assert message.endswith(f"{command}; wait for it, or name another folder")
        holder.communicate("\n", timeout=60)
    with runs.hold(tmp_path):
        assert runs.read_json(tmp_path / ".holder.json")["pid"] == os.getpid()
    assert names(tmp_path) == [".lock", "scores"]


def test_a_killed_process_frees_the_folder_and_its_leftovers_go(tmp_path):
    with child(HOLD, tmp_path) as holder:
        assert holder.stdout.readline() == "held\n"
        holder.kill()
        holder.wait()
    assert [name.endswith(".part") for name in names(tmp_path / "scores")] == [True]
    with runs.hold(tmp_path):
        assert names(tmp_path / "scores") == []
        assert runs.read_json(tmp_path / ".holder.json")["pid"] == os.getpid()


def test_a_holder_that_has_not_signed_yet_holds_all_the_same(tmp_path):
    with child(HOLD, tmp_path) as holder:
        assert holder.stdout.readline() == "held\n"
        for text in ("", "[]", '{"pid": 1}'):
            (tmp_path / ".holder.json").write_text(text)
            with pytest.raises(InputError, match="in use by another process; wait for it"):
                runs.hold(tmp_path).__enter__()


def test_the_same_process_enters_again_and_holds_until_the_outermost_ends(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    with runs.hold(folder):
        with runs.hold("run"), runs.hold(tmp_path / "link"):
            pass
        with child(HOLD, folder) as other:
            _, told = other.communicate(timeout=60)
        assert f"in use by process {os.getpid()} on" in told
    assert names(folder) == [".lock"]
    with child(HOLD, folder) as other:
        assert other.stdout.readline() == "held\n"


def test_a_block_may_change_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with runs.hold("run"):
        monkeypatch.chdir("elsewhere")
    assert names(tmp_path / "run") == [".lock"]
    assert names(tmp_path / "elsewhere") == []


def test_an_error_inside_frees_the_folder(tmp_path):
    with pytest.raises(RuntimeError), runs.hold(tmp_path), runs.hold(tmp_path):
        raise RuntimeError
    with child(HOLD, tmp_path) as other:
        assert other.stdout.readline() == "held\n"


def test_a_forked_child_neither_holds_nor_frees(tmp_path):
    code = """
import os, sys
from pathlib import Path
from workbench import runs
from workbench.errors import InputError
folder = Path(sys.argv[1])
with runs.hold(folder):
    pid = os.fork()
    if pid == 0:
        try:
            with runs.hold(folder):
                print("entered")
        except InputError as error:
            print("refused", flush=True)
            sys.exit()  # through the parent's block
    os.waitpid(pid, 0)
    print((folder / ".holder.json").exists(), flush=True)
    sys.stdin.readline()
"""
    with child(code, tmp_path) as parent:
        assert [parent.stdout.readline() for _ in range(2)] == ["refused\n", "True\n"]
        with pytest.raises(InputError, match=f"in use by process {parent.pid} on"):
            runs.hold(tmp_path).__enter__()


def test_only_leftovers_of_writes_are_cleaned_away(tmp_path):
    stale = [".x.txt.99.part", "scores/.00000.parquet.99-1.part", "answers/.a.parquet.7-1.part"]
    other = ["movie.part", ".notes.part", "scores/00000.parquet", "a/b/.x.txt.99-1.part"]
    for name in stale + other:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    with runs.hold(tmp_path):
        assert [(tmp_path / name).exists() for name in stale] == [False] * 3
        assert all((tmp_path / name).exists() for name in other)


def test_a_write_in_progress_outlives_a_nested_hold(tmp_path):
    with runs.hold(tmp_path), runs.atomic(tmp_path / "x.txt") as part:
        part.write_text("whole")
        with runs.hold(tmp_path):
            pass
    assert (tmp_path / "x.txt").read_text() == "whole"


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_disk_without_locks_is_refused(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    told = f"can't be used as a run folder: {os.strerror(number)}; name another folder"
    with pytest.raises(InputError, match=told):
        runs.hold(tmp_path).__enter__()


def test_a_file_is_no_run_folder(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(InputError, match="x: can't be used as a run folder: File exists"):
        runs.hold(tmp_path / "x").__enter__()


# Stopping

LOOP = """
import signal, sys
from pathlib import Path
from workbench import runs
folder, code = Path(sys.argv[1]), 0
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    with runs.hold(folder), runs.stoppable() as stop:
        for index in range(3):
            print("begun", flush=True)
            sys.stdin.readline()
            runs.write_text(runs.shard_path(folder, index), "whole")
            if stop.asked:
                raise runs.Stopped(len(runs.shards(folder)), folder)
except KeyboardInterrupt as stopped:
    code = 4
    if isinstance(stopped, runs.Stopped):
        print(stopped.kept, stopped.folder, stopped, sep="|", flush=True)
        code = 3
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
sys.exit(code)
"""
STOPPING = ["\n", "stopping after this shard; Ctrl-C again stops at once\n"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_stops_after_the_shard(tmp_path, number):
    with child(LOOP, tmp_path) as loop:
        assert loop.stdout.readline() == "begun\n"
        loop.stdin.write("\n")
        loop.stdin.flush()
        assert loop.stdout.readline() == "begun\n"
        loop.send_signal(number)
        assert [loop.stderr.readline() for _ in range(2)] == STOPPING
        out, err = loop.communicate("\n", timeout=60)
    again = "Run the same command again to go on"
    told = f"stopped; 2 finished shards are kept in {tmp_path}. {again}"
    assert (loop.returncode, err) == (3, "")
    assert out == f"2|{tmp_path}|{told}\n"
    assert names(tmp_path / "scores") == ["00000.parquet", "00001.parquet"]


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_two_signals_stop_at_once(tmp_path, second):
    with child(LOOP, tmp_path) as loop:
        assert loop.stdout.readline() == "begun\n"
        loop.send_signal(signal.SIGINT)
        assert [loop.stderr.readline() for _ in range(2)] == STOPPING
        loop.send_signal(second)  # the shard is never let go on
        loop.wait(timeout=60)
        assert loop.stderr.read() == ""
    assert loop.returncode == 4
    assert runs.shards(tmp_path) == []
    with runs.hold(tmp_path):
        pass


def handlers():
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


@pytest.fixture
def usual_signals():
    """Python's own handling of Ctrl-C, which a background job of a shell starts without."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("usual_signals")
def test_handlers_are_those_of_before_once_the_block_ends():
    before = handlers()
    with runs.stoppable() as stop:
        assert handlers() != before
        assert not stop.asked
    assert handlers() == before
    with pytest.raises(RuntimeError), runs.stoppable():
        raise RuntimeError
    assert handlers() == before


@pytest.mark.usefixtures("usual_signals")
def test_a_stop_that_the_loop_did_not_see_is_not_lost(capsys):
    before = handlers()
    with pytest.raises(KeyboardInterrupt), runs.stoppable() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.asked
    assert handlers() == before
    assert capsys.readouterr().err == "".join(STOPPING)


@pytest.mark.usefixtures("usual_signals")
def test_a_stop_inside_another_is_the_same_stop(capsys):
    with pytest.raises(KeyboardInterrupt), runs.stoppable() as outer:
        signal.raise_signal(signal.SIGTERM)
        with runs.stoppable() as inner:
            assert inner is outer
        assert outer.asked  # and the inner block's end raised nothing
    with runs.stoppable() as fresh:
        assert not fresh.asked


@pytest.mark.usefixtures("usual_signals")
def test_a_terminal_that_is_gone_loses_no_shard(monkeypatch):
    class Gone:
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Gone())
    with pytest.raises(KeyboardInterrupt), runs.stoppable() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.asked


def test_other_threads_leave_signals_alone():
    before, seen = handlers(), []

    def work():
        with runs.stoppable() as stop:
            seen.append((handlers(), stop.asked))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, False)]


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with runs.stoppable() as stop:
            signal.raise_signal(signal.SIGINT)
            assert not stop.asked
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)


# The manifest

SETTINGS = {"model": "m", "ablation": "zero", "examples": 4}


def test_changed_settings_are_refused_by_name(tmp_path):
    runs.start(tmp_path, {"format": "f", "settings": SETTINGS})
    other = {"model": "m", "ablation": "mean", "seed": 1}
    with pytest.raises(InputError) as caught:
        runs.start(tmp_path, {"format": "f", "settings": other})
    message = str(caught.value)
    assert "ablation (was 'zero', now 'mean')" in message
    assert "examples (was 4, now None)" in message
    assert "seed (was None, now 1)" in message
    assert "model" not in message
    assert "Name another folder" in message
    assert runs.read_manifest(tmp_path)["settings"] == SETTINGS


def test_the_same_settings_go_on_whoever_asks(tmp_path):
    runs.start(tmp_path, {"format": "f", "settings": SETTINGS, "command": "first"})
    runs.start(tmp_path, {"format": "f", "settings": SETTINGS, "command": "second"})
    assert runs.read_manifest(tmp_path)["command"] == "second"


def test_a_tuple_in_the_settings_is_no_change(tmp_path):
    # JSON gives it back as a list.
    for _ in range(2):
        runs.start(tmp_path, {"format": "f", "settings": {"heads": (8, 8)}})
    assert runs.read_manifest(tmp_path)["settings"] == {"heads": [8, 8]}


def test_a_manifest_of_something_else_is_refused(tmp_path):
    for text in ('{"version": 3}', "[]", '{"format": "f", "settings": []}'):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(InputError, match=r"manifest\.json: not a manifest of this workbench"):
            runs.start(tmp_path, {"format": "f", "settings": SETTINGS})


@pytest.mark.parametrize(
    ("found", "told"),
    [
        ("workbench.scores/10", "'workbench.scores/10', written by a newer version of the"),
        ("workbench.scores/2", "'workbench.scores/2', written by an older version of the"),
        ("workbench.probe/3", "'workbench.probe/3', and this program reads 'workbench.scores/3'"),
        ("workbench.scores/x", "'workbench.scores/x', and this program reads"),
        (3, "3, and this program reads 'workbench.scores/3' here; name another folder"),
        (None, "None, and this program reads"),
    ],
)
def test_a_manifest_of_another_version_or_kind_is_refused(tmp_path, found, told):
    wanted = "workbench.scores/3"
    runs.write_manifest(tmp_path, {"format": found, "settings": SETTINGS})
    with pytest.raises(InputError) as caught:
        runs.read_manifest(tmp_path, wanted)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'manifest.json'} is of format {told}")
    assert wanted in message
    assert message.endswith(" another folder")
    assert ("update the workbench" in message) == ("newer" in told)
    with pytest.raises(InputError, match="is of format"):
        runs.start(tmp_path, {"format": wanted, "settings": SETTINGS})
    assert runs.read_manifest(tmp_path)["format"] == found  # and it is left as it was


def test_a_manifest_of_the_wanted_format_is_read(tmp_path):
    runs.write_manifest(tmp_path, {"format": "workbench.scores/3"})
    assert runs.read_manifest(tmp_path, "workbench.scores/3") == {"format": "workbench.scores/3"}


def test_shards_are_listed_in_order_and_nothing_else_is(tmp_path):
    assert runs.shards(tmp_path) == []
    wanted = [runs.shard_path(tmp_path, index) for index in (0, 2, 10, 99999, 100000)]
    other = ["._00001.parquet", "00001 (1).parquet", ".00001.parquet.9-9.part", "00003.txt"]
    for path in [*reversed(wanted), *(tmp_path / "scores" / name for name in other)]:
        runs.write_text(path, "")
    assert runs.shards(tmp_path) == wanted


def test_a_folder_that_is_not_there_is_no_run(tmp_path):
    with pytest.raises(InputError, match="no such run folder"):
        runs.read_manifest(tmp_path / "missing")
    with pytest.raises(InputError, match=r"manifest\.json: no such file"):
        runs.read_manifest(tmp_path)


def test_malformed_json_is_refused_with_its_line(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{\n "a": 1,\n "b" 2\n}')
    with pytest.raises(InputError, match=r"x\.json: malformed JSON at line 3"):
        runs.read_json(path)
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(InputError, match=r"x\.json: malformed JSON"):
        runs.read_json(path)


def test_a_manifest_reads_back_as_it_was_written(tmp_path):
    manifest = {"format": "f", "settings": {"model": "é", "rows": [1, 2.5, None]}}
    runs.write_manifest(tmp_path, manifest)
    assert runs.read_manifest(tmp_path) == manifest
    first = (tmp_path / "manifest.json").read_bytes()
    runs.write_manifest(tmp_path, json.loads(first))
    assert (tmp_path / "manifest.json").read_bytes() == first


def test_a_digest_depends_on_the_value_and_not_on_the_order_of_keys():
    assert runs.digest({"a": 1, "b": [2]}) == runs.digest({"b": [2], "a": 1})
    assert runs.digest({"a": 1, "b": [2]}) != runs.digest({"a": 1, "b": [3]})
