"""Reads the output of runs on this machine, for local users; locks and changes nothing."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from deepsquare_chain.errors import NotFoundError, UsageError
from deepsquare_chain.executors import rundir
from deepsquare_chain.executors.rundir import OutputPart, RunFolder
from deepsquare_chain.provider.model import parse_key, run_key
from deepsquare_chain.workflow.script import STATE_FOLDER

_READ_BYTES: Final = 1024 * 1024
#: Kinds of files that are never read: links lead elsewhere, the others have no end.
_SPECIAL: Final = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
}
_ZEROS: Final = bytes(_READ_BYTES)
#: Bytes of holes above which a file gets no SHA-256: a job can create exabytes of them at once.
_MAX_HOLE_BYTES: Final = 64 * 1024**3


def find_run(root: Path, chain_id: int, contract: str, job_id: int) -> Path | None:
    """Return the folder of a job's latest run, below one or several state folders.

    `root` is a provider's state folder, or the folder that contains those of a whole local grid.
    """
    first_key = run_key(chain_id, contract, job_id)
    candidates: list[tuple[int, float, Path]] = []
    for runs in _run_folders(root):
        for path in (runs / first_key, *runs.glob(f"{first_key}.*")):
            parsed = parse_key(chain_id, contract, path.name)
            if parsed is not None and os.path.isdir(path):
                candidates.append((parsed[1], path.stat().st_mtime, path))
    return max(candidates)[2] if candidates else None


def read_output(run: Path, position: int = 0, limit: int = _READ_BYTES) -> OutputPart:
    """Return a part of a run's output from a position, and the position of the next part.

    Raises:
        NotFoundError: The run left no output that can be read.
    """
    folder = RunFolder(run)
    try:
        return rundir.read_output(folder.output, position, limit)
    except OSError as error:
        raise NotFoundError(f"The output of {folder.key} can't be read: {error.strerror}") from None


@dataclass(frozen=True, slots=True)
class ResultFile:
    """A result file of a run.

    Attributes:
        name: `output`, or `work/...` for a file or folder of the working folder.
        size: Length in bytes, for sparse files too.
        digest: SHA-256 in hexadecimal; empty for a file that was not read to its end.
        problem: Why the file was not read or copied; empty on success.
        special: Whether it is a link, pipe, socket or device, which are never read.
    """

    name: str
    size: int
    digest: str
    problem: str = ""
    special: bool = False


def result_files(run: Path, to: Path | None = None) -> list[ResultFile]:
    """Return the results of a run: its output first, then the files of its working folder by name.

    The files are untrusted: links are not followed, and copies are regular files of this user.
    Links, pipes, sockets and devices are listed but not read. Holes of sparse files are kept. A
    file that can't be read or copied is listed with its problem and does not affect the others.

    Args:
        run: Folder of a run that has ended.
        to: New folder for copies: the output becomes `output`, the other files `work/...`.

    Raises:
        UsageError: The folder exists already, or can't be created.
    """
    folder = RunFolder(run)
    if to is not None:
        create_folder(to)
    files = _output(folder, None if to is None else to / "output")
    for name, path, problem, special in _entries(folder.work):
        copy = None if to is None else to / name
        files.append(
            ResultFile(name, 0, "", problem, special)
            if problem
            else _read_and_copy(name, path, copy)
        )
    return files


def create_folder(folder: Path) -> None:
    """Create the folder for copies of results, with its parents.

    Raises:
        UsageError: It exists already, or can't be created.
    """
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UsageError(
            f"{folder} can't be created: {error.strerror}",
            hint="Give a folder that does not exist yet.",
        ) from None


def _output(folder: RunFolder, copy: Path | None) -> list[ResultFile]:
    """Return the output as one file; empty for a run without a log."""
    if not os.path.lexists(folder.output):
        return []
    digest, size, position = hashlib.sha256(), 0, 0
    try:
        with ExitStack() as stack:
            target = None if copy is None else stack.enter_context(copy.open("xb"))
            while (part := rundir.read_output(folder.output, position, _READ_BYTES)).data:
                digest.update(part.data)
                size += len(part.data)
                position = part.position
                if target is not None:
                    target.write(part.data)
    except OSError as error:
        return [_failed("output", size, error, copy)]
    return [ResultFile("output", size, digest.hexdigest())]


def _entries(work: Path) -> list[tuple[str, Path, str, bool]]:
    """Return name, path, problem and `special` of all entries except readable folders."""
    entries: list[tuple[str, Path, str, bool]] = []
    if work.is_symlink():
        # A job may have created the link, to files that are not its own.
        return [("work", work, f"{_SPECIAL[stat.S_IFLNK]}, not copied", True)]

    def unreadable(error: OSError) -> None:
        folder = Path(os.fsdecode(error.filename))
        entries.append((_name(folder, work), folder, f"can't be read: {_error_text(error)}", False))

    for parent, folders, names in os.walk(work, followlinks=False, onerror=unreadable):
        if parent == str(work) and STATE_FOLDER in folders:
            # A job that was killed leaves keys and logins there, which are no results.
            folders.remove(STATE_FOLDER)
        for name in (*names, *folders):
            path, problem, special = Path(parent) / name, "", False
            try:
                kind = stat.S_IFMT(path.lstat().st_mode)
            except OSError as error:  # a folder with read but no search permission
                problem = f"can't be read: {_error_text(error)}"
            else:
                if kind == stat.S_IFDIR:
                    continue
                if kind != stat.S_IFREG:
                    problem, special = f"{_SPECIAL.get(kind, 'a device')}, not copied", True
            entries.append((_name(path, work), path, problem, special))
    return sorted(entries)


def _name(path: Path, work: Path) -> str:
    return str(Path("work", path.relative_to(work)))


def _read_and_copy(name: str, path: Path, copy: Path | None) -> ResultFile:
    """Read a file, and copy it where a copy is requested."""
    size = 0
    try:
        size = path.lstat().st_size
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb", buffering=0) as source, ExitStack() as stack:
            size = os.fstat(descriptor).st_size
            target = None
            if copy is not None:
                copy.parent.mkdir(parents=True, exist_ok=True)
                target = stack.enter_context(copy.open("xb"))
            digest, problem = _copy(source, size, target)
    except OSError as error:
        return _failed(name, size, error, copy)
    return ResultFile(name, size, digest, problem)


def _copy(source: BinaryIO, size: int, target: BinaryIO | None) -> tuple[str, str]:
    """Copy a file and keep its holes; returns its SHA-256, or why there is none."""
    sha256, holes, position = hashlib.sha256(), 0, 0
    for start, end in _data_parts(source.fileno(), size):
        holes += start - position
        if holes <= _MAX_HOLE_BYTES:
            _add_zeros(sha256, start - position)
        source.seek(start)
        if target is not None:
            target.seek(start)
        position = start
        while position < end and (part := source.read(min(_READ_BYTES, end - position))):
            position += len(part)
            if target is not None:
                target.write(part)
            if holes <= _MAX_HOLE_BYTES:
                sha256.update(part)
    holes += size - position
    if target is not None:
        target.truncate(size)
    if holes > _MAX_HOLE_BYTES:
        return "", f"has no SHA-256: {holes:,} of its bytes are holes"
    _add_zeros(sha256, size - position)
    return sha256.hexdigest(), ""


def _data_parts(descriptor: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield the data parts of a file; the whole where the file system does not report holes."""
    position = 0
    while position < size:
        try:
            start = os.lseek(descriptor, position, os.SEEK_DATA)
            end = min(size, os.lseek(descriptor, start, os.SEEK_HOLE))
        except OSError as error:
            if error.errno == errno.EINVAL:
                yield position, size
            elif error.errno != errno.ENXIO:  # ENXIO: only a hole up to the end
                raise
            return
        yield start, end
        position = end


def _add_zeros(whole: hashlib._Hash, count: int) -> None:
    while count > 0:
        whole.update(_ZEROS[:count])
        count -= len(_ZEROS)


def _failed(name: str, size: int, error: OSError, copy: Path | None) -> ResultFile:
    """Return a file that failed, after removing a partial copy."""
    written = error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
    if copy is not None:
        written = written or error.filename in {str(copy), str(copy.parent)}
        with suppress(OSError):
            copy.unlink()
    verb = "copied" if written else "read"
    return ResultFile(name, size, "", f"can't be {verb}: {_error_text(error)}")


def _error_text(error: OSError) -> str:
    return error.strerror or str(error)


def has_ended(run: Path) -> bool:
    """Return whether the end of the run is on disk, so that its output is complete."""
    return (run / "exit.json").exists()


def _run_folders(root: Path) -> list[Path]:
    candidates = [root / "runs", *root.glob("*/runs"), *root.glob("*/*/runs")]
    # Unlike Path.is_dir, os.path.isdir does not raise for folders of other users.
    return [path for path in candidates if os.path.isdir(path)]


def closed_folder(root: Path) -> Path | None:
    """Return the first folder of a provider or its runs that this user can't read."""
    folders = [root, *(path for path in root.glob("*") if os.path.isdir(path))]
    for folder in (*folders, *_run_folders(root)):
        if os.path.isdir(folder) and not os.access(folder, os.R_OK | os.X_OK):
            return folder
    return None
