"""Run folders: a manifest that says how numbers came about, and shards written once.

A file appears under its name only when it is whole and on the disk, so a run that is stopped,
killed or cut off from power holds finished shards only and goes on from them. One process at a
time writes to a folder: `hold`. How a loop over shards uses this module:

    with runs.hold(folder), runs.stoppable() as stop:
        runs.start(folder, manifest)
        for index, part in enumerate(parts):
            path = runs.shard_path(folder, index)
            if not path.exists():
                write_shard(work(part), path)
            if stop.asked:
                raise runs.Stopped(len(runs.shards(folder)), folder)
"""

from __future__ import annotations

import errno
import getpass
import json
import os
import shlex
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from types import FrameType
from typing import Any

from filelock import FileLock, Timeout

from workbench.errors import InputError

MANIFEST = "manifest.json"
SHARDS = "scores"
LOCK = ".lock"
HOLDER = ".holder.json"

# Files of `atomic` that a killed process left: `.NAME.PID-THREAD.part`, in the run folder and in
# the folders right below it. No deeper: `--out` may name a folder that holds more than a run.
_PARTS = (".*.[0-9]*.part", "*/.*.[0-9]*.part")
_REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EFBIG: "allow larger files (ulimit -f)",
    errno.EIO: "check the disk",
}
_OTHER = "make sure that files can be written there"


# Shards


def shard_path(folder: Path, index: int, stage: str = SHARDS) -> Path:
    """Where shard `index` of a run, or of a stage before its last, lies."""
    return folder / stage / f"{index:05d}.parquet"


def shards(folder: Path, stage: str = SHARDS) -> list[Path]:
    """The finished shards of a run's stage, in order; none if there is no such folder.

    Files whose name is no number are not shards: the `._00000.parquet` that macOS leaves on
    foreign disks, or a copy.
    """
    found = [path for path in (folder / stage).glob("*.parquet") if path.stem.isdecimal()]
    return sorted(found, key=lambda path: int(path.stem))


# Files


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`, renamed to it if the block ends well.

    The block writes the temporary path and does nothing else: any `OSError` in it is taken for
    one of writing.

    Raises:
        InputError: The disk is full, read-only or broken. The temporary file is removed.
    """
    # The thread's number too: two threads may write the same file.
    part = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        # In this order: renamed first, a power cut could leave the name with nothing behind it.
        _sync(part)
        part.replace(path)
        # Not every file system can do this for a folder. Without it a power cut may take the
        # whole file, never a part of it.
        with suppress(OSError):
            _sync(path.parent)
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, _OTHER)
        raise InputError(
            f"{path}: can't be written: {_reason(error)}; {remedy} and run the same command "
            "again; finished shards are kept"
        ) from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: OSError) -> str:
    # pyarrow's own text holds the number and the words twice.
    return os.strerror(error.errno) if error.errno else str(error).split("\n")[0]


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically.

    Raises:
        InputError: It can't be written.
    """
    with atomic(path) as part:
        part.write_text(text, encoding="utf-8")


def read_json(path: Path | str) -> Any:
    """Read a JSON file, with errors that name the file and the line.

    Raises:
        InputError: The file is missing or malformed.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: can't be read: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        line = getattr(error, "lineno", "?")
        raise InputError(f"{path}: malformed JSON at line {line}: {error}") from None


# One process at a time


@contextmanager
def hold(folder: Path | str) -> Iterator[None]:
    """Keep other processes from writing to a run folder, which is made if it isn't there.

    The lock is the kernel's: however the holder ends, it is free. The same process may enter
    again inside, by whatever path leads to the folder. Whoever only reads needs no lock.

    Raises:
        InputError: Another process holds the folder (the message says which), or no file can be
            made or locked there.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        home = folder.resolve()  # the block may change the working directory
        lock = FileLock(
            home / LOCK,
            timeout=0,
            thread_local=False,
            is_singleton=True,  # one lock a folder and process is what lets it in again
            fallback_to_soft=False,  # a lock that is a mere file outlives a killed holder
        )
        lock.acquire()
    except Timeout:
        raise InputError(
            f"{folder} is in use by {_holder(folder)}; wait for it, or name another folder"
        ) from None
    except OSError as error:
        raise InputError(
            f"{folder}: can't be used as a run folder: {_reason(error)}; name another folder"
        ) from error
    try:
        if lock.lock_counter == 1:
            for pattern in _PARTS:
                for part in home.glob(pattern):
                    with suppress(OSError):
                        part.unlink()
            _sign(home)
        yield
    finally:
        # In a forked child the counter is 0: what ends here leaves the parent's name and lock.
        if lock.lock_counter == 1:
            with suppress(OSError):
                (home / HOLDER).unlink(missing_ok=True)
        lock.release()


def _sign(folder: Path) -> None:
    """Write who holds the folder, for the message to the next who asks."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # containers run users that have a number and no name
        user = str(os.getuid())
    holder = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "user": user,
        "started": datetime.now().astimezone().isoformat(" ", "seconds"),
        "command": command(),
    }
    write_text(folder / HOLDER, json.dumps(holder, indent=1) + "\n")


def _holder(folder: Path) -> str:
    try:
        who = read_json(folder / HOLDER)
        return f"process {who['pid']} on {who['host']} (started {who['started']}: {who['command']})"
    except (InputError, KeyError, TypeError):
        return "another process"  # which has locked and not signed yet


# Stopping


class Stopped(KeyboardInterrupt):
    """A run stopped between two shards, as it was asked to.

    Attributes:
        kept: How many finished shards the folder holds.
        folder: The run folder.
    """

    def __init__(self, kept: int, folder: Path) -> None:
        super().__init__(
            f"stopped; {kept} finished shards are kept in {folder}. Run the same command again "
            "to go on"
        )
        self.kept = kept
        self.folder = folder


@dataclass
class Stop:
    """Whether a stop was asked for; a loop looks at it after each shard."""

    asked: bool = False


_stops: list[Stop] = []  # of the outermost `stoppable` that is open, if one is


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Let the first Ctrl-C or SIGTERM ask for a stop, and the second stop at once.

    A stop that came too late for the loop to see is raised at the end of the block, so that what
    follows doesn't begin. Inside another `stoppable` it is that one again. Outside the main
    thread, where Python has no signals, nothing changes and `asked` stays False. Signals that
    are ignored (`nohup`, `&` in a script) stay ignored.

    Raises:
        KeyboardInterrupt: A second signal, or one that the block didn't honour.
    """
    if threading.current_thread() is not threading.main_thread():
        yield Stop()
        return
    if _stops:
        yield _stops[0]
        return
    stop = Stop()

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True
        # A closed terminal, or one that the signal met in the middle of a line, is no reason to
        # lose the shard. The line begins below a progress bar.
        with suppress(OSError, RuntimeError, ValueError):
            text = "\nstopping after this shard; Ctrl-C again stops at once"
            print(text, file=sys.stderr, flush=True)

    found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # None: set outside Python, and Python could not set it back.
    former = {n: handler for n, handler in found.items() if handler not in (None, signal.SIG_IGN)}
    _stops.append(stop)
    try:
        for number in former:
            signal.signal(number, ask)
        yield stop
    finally:
        _stops.clear()
        for number, handler in former.items():
            signal.signal(number, handler)
    if stop.asked:
        raise KeyboardInterrupt


# The manifest


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write `manifest.json`.

    Raises:
        InputError: It can't be written.
    """
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True) + "\n")


def read_manifest(folder: Path, format: str | None = None) -> dict[str, Any]:
    """Read `manifest.json`.

    Args:
        folder: The run folder.
        format: What the run must be, as `workbench.scores/1`; anything if None.

    Raises:
        InputError: The folder or the manifest is missing, is not of this workbench, or is of
            another kind or version than `format`.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such run folder")
    path = folder / MANIFEST
    value = read_json(path)
    settings = value.get("settings", {}) if isinstance(value, dict) else None
    if not isinstance(settings, dict) or "format" not in value:
        raise InputError(f"{path}: not a manifest of this workbench")
    if format is not None:
        check_format(path, value["format"], format)
    return value


def check_format(path: Path, found: object, wanted: str) -> None:
    """Refuse a file of another kind or version.

    Args:
        path: The file, for the message.
        found: What it says it is, as `workbench.scores/1`.
        wanted: What this program reads.

    Raises:
        InputError: They differ.
    """
    if found == wanted:
        return
    kind, _, version = wanted.rpartition("/")
    found_kind, _, found_version = str(found).rpartition("/")
    if found_kind != kind or not found_version.isdecimal():
        raise InputError(
            f"{path} is of format {found!r:.80}, and this program reads {wanted!r} here; "
            "name another folder"
        )
    newer = int(found_version) > int(version)
    raise InputError(
        f"{path} is of format {found!r}, written by {'a newer' if newer else 'an older'} version "
        f"of the workbench, and this one reads {wanted!r}; "
        + ("update the workbench, or " if newer else "open it with that version, or ")
        + "run the command again into another folder"
    )


def start(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Begin a run in a folder, or go on with the one that is there.

    Only `manifest["settings"]` is compared: what decides the numbers. When and by which command
    it was made may differ. A setting that is None and one that is not there are the same, so that
    a run of a version that didn't know a setting yet goes on where it isn't used.

    Raises:
        InputError: The folder holds a run of another format or with other settings, which the
            message names; or the manifest can't be written.
    """
    if (folder / MANIFEST).exists():
        old = read_manifest(folder, manifest["format"]).get("settings", {})
        new = json.loads(json.dumps(manifest["settings"]))  # a tuple comes back as a list
        changed = [
            f"{key} (was {old.get(key)!r}, now {new.get(key)!r})"
            for key in sorted({*old, *new})
            if _given(old.get(key)) != _given(new.get(key))
        ]
        if changed:
            raise InputError(
                f"{folder} holds a run with other settings: {'; '.join(changed)}. "
                "Name another folder, or delete this one"
            )
    write_manifest(folder, manifest)


def _given(value: Any) -> Any:
    """A setting without the settings inside it that are None."""
    if not isinstance(value, dict):
        return value
    return {key: _given(entry) for key, entry in value.items() if entry is not None}


def command() -> str:
    """The command line that this process was started with, its program without its folder."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, for manifests."""
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
