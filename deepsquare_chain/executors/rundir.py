"""The folder of one run: its files, who writes them, their atomic writes, and the output log.

    file             content                              written by
    spec.json        specification of the run             executor, before the run exists
    script           the batch script                     executor, before the run exists
    control.json     current walltime, cancel request     executor
    supervisor.json  claim of the run's only supervisor   the first one to link it, once
    job.json         the script's process and its start   supervisor
    output           beginning of the output              supervisor
    output.POSITION  output from that position on         supervisor
    exit.json        exit record                          supervisor, or executor if it died
    work/            working folder and HOME of the script
    tmp/             /tmp of a script in a sandbox

Supervisors import this module, so it has no heavy imports.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import stat
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

from deepsquare_chain.executors.procfs import BLOCK_BYTES, Identity

OUTPUT_LIMIT: Final = 1024 * 1024
#: Environment variable that marks the processes of a run, to find orphaned ones.
MARK: Final = "GRID_RUN"
#: Seconds between TERM and KILL.
GRACE: Final = 2.0
#: Home and working folder of a job in a sandbox, and the path of its script there.
SANDBOX_HOME: Final = "/home/job"
SANDBOX_SCRIPT: Final = "/run/job/script"
#: Minimum bytes that a file or folder counts, for its inode.
_INODE: Final = 1024
#: Minimum bytes of a file whose size is kept between two measurements of a run's disk usage.
LARGE_FILE: Final = 256 * 1024
_RECORD_LIMIT: Final = 8 * 1024 * 1024
_EXIT_BYTES: Final = 512
_NESTING: Final = 8
_STRING: Final = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)

#: The beginning gets half of the limit, a segment an eighth.
_HEAD_SHARE: Final = 2
_SEGMENT_SHARE: Final = 8
#: Maximum number of segments, of any size: a full disk causes small ones.
_MAX_SEGMENTS: Final = 32
_NOTE_BYTES: Final = 80
_READ_ATTEMPTS: Final = 5
_OUTPUT_FLAGS: Final = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


class FolderClaim(NamedTuple):
    """The claim of a run: its supervisor, the mark of its processes, and the monotonic time."""

    owner: Identity
    token: str
    since: float


class RunFolder:
    """Paths and records of one run. Methods raise OSError unchanged."""

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
        """The job's folder for temporary files, with a sandbox."""
        return self.path / "tmp"

    @property
    def output(self) -> Path:
        """The beginning of the job's output."""
        return self.path / "output"

    @property
    def log(self) -> Path:
        """The supervisor's own log."""
        return self.path / "supervisor.log"

    def exists(self) -> bool:
        """Return whether the run has a folder; raises if the parent folder can't be read."""
        try:
            self.path.stat()
        except FileNotFoundError:
            self.path.parent.stat()
            return False
        return True

    def fill(self, spec: Mapping[str, Any], script: bytes, walltime: int) -> None:
        """Create the folder with the files that a supervisor needs."""
        self.path.mkdir(mode=0o700)
        self.work.mkdir(mode=0o700)
        if spec.get("isolation"):
            self.temporary.mkdir(mode=0o700)
        write_new(self.script, script)
        write_new(self.path / "spec.json", dump(spec))
        write_new(self.path / "control.json", dump({"walltime": walltime, "cancel": False}))
        sync_folder(self.path)

    def spec(self) -> dict[str, Any]:
        """Return the specification of the run."""
        return read_record(self.path / "spec.json")

    def control(self) -> dict[str, Any]:
        """Return the control record: walltime in seconds, and whether a cancel was requested."""
        return read_record(self.path / "control.json")

    def set_control(self, **changes: object) -> None:
        """Change the control record."""
        replace(self.path / "control.json", dump(self.control() | changes))

    def claim(self, owner: Identity, token: str) -> bool:
        """Claim the run permanently for a process; returns False when it was claimed before."""
        record = {**owner._asdict(), "token": token, "since": time.monotonic()}
        temporary = _sibling(self.path / "supervisor.json")
        try:
            write_new(temporary, dump(record))
            # A hard link is created atomically with its content, and only once.
            os.link(temporary, self.path / "supervisor.json")
        except FileExistsError:
            return False
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()
        sync_folder(self.path)
        return True

    def taken(self) -> FolderClaim | None:
        """Return the supervisor's claim; None while the run is unclaimed."""
        record = read_optional(self.path / "supervisor.json")
        if record is None:
            return None
        token, since = str(record.get("token", "")), finite_number(record, "since")
        return FolderClaim(_identity(record), token, since)

    def set_job(self, process: Identity, started_at: float, started: float) -> None:
        """Record the script's process; `started` is on the monotonic clock."""
        record = {**process._asdict(), "started_at": started_at, "started": started}
        replace(self.path / "job.json", dump(record))

    def job(self) -> tuple[Identity, float, float] | None:
        """Return the script's process, and its start on the wall clock and the monotonic clock."""
        record = read_optional(self.path / "job.json")
        if record is None:
            return None
        times = finite_number(record, "started_at"), finite_number(record, "started")
        return _identity(record), *times

    def exit(self) -> dict[str, Any] | None:
        """Return the exit record; None while there is none."""
        return read_optional(self.path / "exit.json")

    def reserve_exit(self) -> Path:
        """Reserve the disk blocks of the exit record, so that it can be written on a full disk."""
        path = _sibling(self.path / "exit.json")
        write_new(path, b" " * _EXIT_BYTES)
        return path

    def set_exit(self, record: Mapping[str, Any], file: Path | None = None) -> None:
        """Write the exit record into a reserved file, by default a new one, and rename it."""
        file = file or self.reserve_exit()
        handle = os.open(file, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            write_all(handle, dump(record))
            os.fsync(handle)
        finally:
            os.close(handle)
        file.replace(self.path / "exit.json")
        sync_folder(self.path)


def exit_record(
    code: int, reason: str, seconds: int, started_at: float, ended_at: float
) -> dict[str, Any]:
    """Return the exit record as stored on disk; times are in seconds."""
    return {
        "code": code,
        "reason": reason,
        "seconds": seconds,
        "started_at": started_at,
        "ended_at": ended_at,
    }


def dump(record: Mapping[str, Any]) -> bytes:
    """Serialise a record."""
    return json.dumps(record, separators=(",", ":")).encode()


def write_all(handle: int, data: bytes) -> None:
    """Write every byte or raise."""
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


def write_new(path: Path, data: bytes) -> None:
    """Create a file and fsync it."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    handle = os.open(path, flags, 0o600)
    try:
        write_all(handle, data)
        os.fsync(handle)
    finally:
        os.close(handle)


def replace(path: Path, data: bytes) -> None:
    """Replace a file's content by an atomic rename."""
    temporary = _sibling(path)
    try:
        write_new(temporary, data)
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Fsync a folder, so that created and renamed files survive a power cut."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading; raises for a link or pipe that a job created."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return open(handle, "rb", buffering=0)


def read_bytes(path: Path, offset: int, limit: int) -> bytes:
    """Read a part of a regular file; errors as `open_regular`."""
    with open_regular(path) as file:
        parts = []
        while limit > 0 and (part := os.pread(file.fileno(), limit, offset)):
            parts.append(part)
            offset += len(part)
            limit -= len(part)
        return b"".join(parts)


def read_record(path: Path) -> dict[str, Any]:
    """Read a record from disk; raises OSError (EIO) for a file with other content."""
    try:
        raw = read_bytes(path, 0, _RECORD_LIMIT)
        # If a library raised the recursion limit, deep nesting would crash the process.
        structure = _STRING.sub(b"", raw)
        is_flat = structure.count(b"{") + structure.count(b"[") <= _NESTING
        record = json.loads(raw) if is_flat else None
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise OSError(errno.EIO, "holds no record", str(path))
    return record


def read_optional(path: Path) -> dict[str, Any] | None:
    """Read a record as `read_record`; None if there is no such file."""
    try:
        return read_record(path)
    except FileNotFoundError:
        return None


def _identity(record: Mapping[str, Any]) -> Identity:
    try:
        return Identity(int(record["pid"]), int(record["ticks"]), str(record["boot"]))
    except (KeyError, TypeError, ValueError, OverflowError):
        raise OSError(errno.EIO, "names no process") from None


def finite_number(record: Mapping[str, Any], name: str) -> float:
    """Return a number of a record; raises OSError (EIO) if there is none, or it is not finite."""
    try:
        number = float(record[name])
    except (KeyError, TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise OSError(errno.EIO, f"holds no number {name}")
    return number


def unique(size: int = 8) -> str:
    """Return `size` cryptographically random bytes as hexadecimal text.

    `secrets` would do the same, but load OpenSSL into every supervisor.
    """
    return os.urandom(size).hex()


def _sibling(path: Path) -> Path:
    return path.with_name(f".{path.name}.{unique()}")


class OutputWriter:
    """Writes the log of one run, of at most `limit` bytes: its beginning to `path`, then segments.

    On a full disk output is lost, but the run continues.
    """

    def __init__(self, path: Path, limit: int) -> None:
        self._path = path
        self._head_limit = limit // _HEAD_SHARE
        self._tail_limit = max(0, limit - self._head_limit - _NOTE_BYTES)
        self._segment_limit = max(1, min(limit // _SEGMENT_SHARE, self._tail_limit))
        self._position = 0
        self._segments: list[tuple[Path, int]] = []
        self._handle = -1
        with contextlib.suppress(OSError):
            self._handle = os.open(path, _OUTPUT_FLAGS | os.O_APPEND, 0o600)

    def take(self, data: bytes) -> None:
        """Write a part of the output."""
        view = memoryview(data)
        while view:
            if self._head_limit <= 0 or self._handle < 0:
                self._rotate()
            part = view[: self._head_limit]
            written = self._write(part)
            self._position += len(part)
            self._head_limit -= len(part)
            if written < len(part):
                # Bytes are missing, so the next ones need a new segment with their position.
                self.close()
            view = view[len(part) :]

    def close(self) -> None:
        """Close the current file."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def _rotate(self) -> None:
        """Begin a segment, and remove the oldest ones above the limits."""
        self.close()
        self._head_limit = self._segment_limit
        segment = self._path.with_name(f"{self._path.name}.{self._position}")
        with contextlib.suppress(OSError):
            self._handle = os.open(segment, _OUTPUT_FLAGS | os.O_EXCL, 0o600)
            self._segments.append((segment, self._segment_limit))
        while self._segments and (
            len(self._segments) > _MAX_SEGMENTS
            or sum(size for _, size in self._segments) > self._tail_limit
        ):
            with contextlib.suppress(OSError):
                self._segments[0][0].unlink()
            del self._segments[0]

    def _write(self, data: memoryview) -> int:
        """Write as many bytes as possible; returns their number."""
        written = 0
        if self._handle >= 0:
            with contextlib.suppress(OSError):
                while written < len(data):
                    written += os.write(self._handle, data[written:])
        return written


class OutputPart(NamedTuple):
    """A part of a log, and the position of the next part; empty at the end."""

    data: bytes
    position: int


def read_output(path: Path, position: int = 0, limit: int = 65536) -> OutputPart:
    """Return a part of a log from a position; a note replaces removed output.

    Raises:
        OSError: The log can't be read, or is not a regular file. A missing log is empty.
    """
    for _ in range(_READ_ATTEMPTS):
        for start, file in _files(path):
            size = _size(file)
            if position >= start + size:
                continue
            if position < start:
                note = f"\n[... {start - position} bytes left out ...]\n"
                return OutputPart(note.encode(), start)
            data = read_bytes(file, position - start, limit) if size else b""
            if not data:
                break  # removed meanwhile: retry
            return OutputPart(data, position + len(data))
        else:
            break
    return OutputPart(b"", position)


def read_kept(path: Path, offset: int, limit: int) -> bytes:
    """Return up to `limit` bytes of the log as one text, notes included, from byte `offset`.

    The result is stable only for a run that has ended.

    Raises:
        OSError: As `read_output`.
    """
    text, position, bytes_read = bytearray(), 0, 0
    while len(text) < limit:
        part = read_output(path, position, limit)
        if not part.data:
            break
        skip = max(0, offset - bytes_read)
        text += part.data[skip:]
        bytes_read += len(part.data)
        position = part.position
    return bytes(text[:limit])


def last_write(path: Path) -> float:
    """Return the time of the last write to the log, in seconds since the epoch.

    Raises:
        OSError: There is no log.
    """
    return max(file.stat().st_mtime for _, file in _files(path))


def _files(path: Path) -> list[tuple[int, Path]]:
    """Return the files of a log in order, each with the position of its first byte."""
    files = [(0, path)]
    with contextlib.suppress(FileNotFoundError):
        for entry in os.scandir(path.parent):
            start = entry.name.removeprefix(f"{path.name}.")
            if start != entry.name and start.isascii() and start.isdigit() and len(start) <= 18:
                files.append((int(start), Path(entry.path)))
    return sorted(files)


def _size(file: Path) -> int:
    try:
        return file.lstat().st_size
    except FileNotFoundError:
        return 0


# -- disk usage


def disk_usage(folder: str, limit: int | None = None, large: dict[int, int] | None = None) -> int:
    """Return the disk usage of a folder in bytes; stops counting above `limit`.

    The sizes of its files of `LARGE_FILE` bytes or more are added to `large` by inode.

    Holes of sparse files do not count; each hard link counts. Links are not followed. A path that is
    too long for the kernel counts as above the limit, because files below it could not be counted.
    """
    used = 0
    folders = [folder]
    while folders:
        try:
            for entry in _entries(folders.pop()):
                try:
                    state = entry.stat(follow_symlinks=False)
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                except FileNotFoundError:
                    continue  # removed meanwhile
                size = state.st_blocks * BLOCK_BYTES
                if large is not None and size >= LARGE_FILE:
                    large[state.st_ino] = size
                used += size + _INODE
                if limit is not None and used > limit:
                    return used
        except OSError as error:
            if limit is not None and error.errno == errno.ENAMETOOLONG:
                return limit + 1
    return used


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """List a folder; restores the owner's permissions if the job removed them."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except PermissionError:
        flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        handle = os.open(folder, flags)
        try:
            os.chmod(f"/proc/self/fd/{handle}", 0o700)
        finally:
            os.close(handle)
        with os.scandir(folder) as entries:
            return list(entries)
