"""The folder of one run: who writes which file, and how each appears whole or not at all.

    spec.json        what to run                          executor, before the run exists
    script           the batch script                     executor, before the run exists
    control.json     walltime now, cancel request         executor
    supervisor.json  the one supervisor that took the run whoever links it first, once
    job.json         the script's process and its start   supervisor
    output           beginning of what the run printed    supervisor
    output.POSITION  what it printed from there on        supervisor
    exit.json        how it ended                         supervisor, or who found it dead
    work/            working folder and HOME of the script
    tmp/             /tmp of a script in a sandbox

The supervisor imports this, so nothing heavy is imported here.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import stat
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

from deepsquare_chain.executors.procfs import Identity

OUTPUT_LIMIT: Final = 1024 * 1024
# Name of the environment variable by which leftovers of a dead supervisor are found.
MARK: Final = "GRID_RUN"
# Time between TERM and KILL, in seconds.
GRACE: Final = 2.0
#: Home and working folder of a job in a sandbox, and the place of its script there.
SANDBOX_HOME: Final = "/home/job"
SANDBOX_SCRIPT: Final = "/run/job/script"
_RECORD_LIMIT: Final = 8 * 1024 * 1024
_EXIT_BYTES: Final = 512
_NESTING: Final = 8
_STRING: Final = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)


class FolderClaim(NamedTuple):
    """Who took a run, by which mark its processes are known, and when (monotonic seconds)."""

    owner: Identity
    token: str
    since: float


class RunFolder:
    """Paths and records of one run. Methods raise OSError as the system gives it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.key = path.name

    @property
    def script(self) -> Path:
        """The batch script."""
        return self.path / "script"

    @property
    def work(self) -> Path:
        """The job's working folder."""
        return self.path / "work"

    @property
    def temporary(self) -> Path:
        """The job's folder of temporary files, where it has a sandbox."""
        return self.path / "tmp"

    @property
    def output(self) -> Path:
        """What the job prints."""
        return self.path / "output"

    @property
    def log(self) -> Path:
        """What the supervisor itself says."""
        return self.path / "supervisor.log"

    def fill(self, spec: Mapping[str, Any], script: bytes, walltime: int) -> None:
        """Write everything a supervisor needs into a new folder."""
        self.path.mkdir(mode=0o700)
        self.work.mkdir(mode=0o700)
        if spec.get("isolation"):
            self.temporary.mkdir(mode=0o700)
        write_new(self.script, script)
        write_new(self.path / "spec.json", dump(spec))
        write_new(self.path / "control.json", dump({"walltime": walltime, "cancel": False}))
        sync_folder(self.path)

    def spec(self) -> dict[str, Any]:
        """What to run."""
        return read_record(self.path / "spec.json")

    def control(self) -> dict[str, Any]:
        """Walltime in seconds and whether a cancel was asked for."""
        return read_record(self.path / "control.json")

    def set_control(self, **changes: object) -> None:
        """Change the control record."""
        replace(self.path / "control.json", dump(self.control() | changes))

    def claim(self, owner: Identity, token: str) -> bool:
        """Take the run for a process, for ever; False when it was taken before."""
        record = {**owner._asdict(), "token": token, "since": time.monotonic()}
        fresh = _sibling(self.path / "supervisor.json")
        try:
            write_new(fresh, dump(record))
            # A hard link appears with its content or not at all, and never twice.
            os.link(fresh, self.path / "supervisor.json")
        except FileExistsError:
            return False
        finally:
            with contextlib.suppress(OSError):
                fresh.unlink()
        sync_folder(self.path)
        return True

    def taken(self) -> FolderClaim | None:
        """The supervisor's claim, None while nobody took the run."""
        record = _optional(self.path / "supervisor.json")
        if record is None:
            return None
        token, since = str(record.get("token", "")), _number(record, "since")
        return FolderClaim(_identity(record), token, since)

    def set_job(self, process: Identity, started_at: float, started: float) -> None:
        """Record the script's process; `started` is on the monotonic clock."""
        record = {**process._asdict(), "started_at": started_at, "started": started}
        replace(self.path / "job.json", dump(record))

    def job(self) -> tuple[Identity, float, float] | None:
        """The script's process, its start on the wall clock and on the monotonic clock."""
        record = _optional(self.path / "job.json")
        if record is None:
            return None
        return _identity(record), _number(record, "started_at"), _number(record, "started")

    def exit(self) -> dict[str, Any] | None:
        """How the run ended, None while it has not."""
        return _optional(self.path / "exit.json")

    def reserve_exit(self) -> Path:
        """Lay aside the blocks of the exit record, so that a full disk can't keep it out."""
        place = _sibling(self.path / "exit.json")
        write_new(place, b" " * _EXIT_BYTES)
        return place

    def set_exit(self, record: Mapping[str, Any], place: Path | None = None) -> None:
        """Write the exit record over the blanks of a reserved file, of its own if none is given."""
        place = place or self.reserve_exit()
        handle = os.open(place, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            write_all(handle, dump(record))
            os.fsync(handle)
        finally:
            os.close(handle)
        place.replace(self.path / "exit.json")
        sync_folder(self.path)


def exit_record(
    code: int, reason: str, seconds: int, started_at: float, ended_at: float
) -> dict[str, Any]:
    """The exit record as it stands on disk; times are seconds."""
    return {
        "code": code,
        "reason": reason,
        "seconds": seconds,
        "started_at": started_at,
        "ended_at": ended_at,
    }


def dump(record: Mapping[str, Any]) -> bytes:
    """A record as bytes."""
    return json.dumps(record, separators=(",", ":")).encode()


def write_all(handle: int, data: bytes) -> None:
    """Write every byte or raise."""
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


def write_new(path: Path, data: bytes) -> None:
    """Create a file that is on the disk when this returns."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    handle = os.open(path, flags, 0o600)
    try:
        write_all(handle, data)
        os.fsync(handle)
    finally:
        os.close(handle)


def replace(path: Path, data: bytes) -> None:
    """Exchange a file's content in one step."""
    fresh = _sibling(path)
    try:
        write_new(fresh, data)
        fresh.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            fresh.unlink()
        raise
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make names that were created or moved in this folder survive a power cut."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def open_regular(path: Path) -> BinaryIO:
    """A regular file for reading; a link or a pipe that a job put there is not followed."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return open(handle, "rb", buffering=0)


def read_bytes(path: Path, offset: int, limit: int) -> bytes:
    """Part of a regular file, which is opened as `open_regular` does."""
    with open_regular(path) as file:
        parts = []
        while limit > 0 and (part := os.pread(file.fileno(), limit, offset)):
            parts.append(part)
            offset += len(part)
            limit -= len(part)
        return b"".join(parts)


def read_record(path: Path) -> dict[str, Any]:
    """A record from disk; one that holds something else is an input/output error."""
    try:
        raw = read_bytes(path, 0, _RECORD_LIMIT)
        # Where a library raised the recursion limit, deep nesting would crash the process.
        bare = _STRING.sub(b"", raw)
        record = json.loads(raw) if bare.count(b"{") + bare.count(b"[") <= _NESTING else None
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise OSError(errno.EIO, "holds no record", str(path))
    return record


def _optional(path: Path) -> dict[str, Any] | None:
    try:
        return read_record(path)
    except FileNotFoundError:
        return None


def _identity(record: Mapping[str, Any]) -> Identity:
    try:
        return Identity(int(record["pid"]), int(record["ticks"]), str(record["boot"]))
    except (KeyError, TypeError, ValueError):
        raise OSError(errno.EIO, "names no process") from None


def _number(record: Mapping[str, Any], name: str) -> float:
    try:
        return float(record[name])
    except (KeyError, TypeError, ValueError):
        raise OSError(errno.EIO, f"holds no number {name}") from None


def unique(size: int = 8) -> str:
    """A word of `size` random bytes that nobody can guess.

    `secrets` would give the same, after loading all of OpenSSL into every supervisor.
    """
    return os.urandom(size).hex()


def _sibling(path: Path) -> Path:
    return path.with_name(f".{path.name}.{unique()}")
