"""Output of runs on this machine, for people who stand before it; nothing is locked or changed."""

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
from deepsquare_chain.executors import outputlog
from deepsquare_chain.executors.outputlog import OutputPart
from deepsquare_chain.executors.rundir import RunFolder
from deepsquare_chain.provider.model import parse_key, run_key

_MOST: Final = 1024 * 1024
#: Kinds of file that are never read: their content is not theirs, or has no end.
_SPECIAL: Final = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
}
_ZEROS: Final = bytes(_MOST)
#: Holes of a file beyond which it gets no SHA-256: a job can make one of exabytes in a moment.
_MOST_HOLES: Final = 64 * 1024**3


def find_run(root: Path, chain_id: int, contract: str, job_id: int) -> Path | None:
    """Folder of a job's latest run below a provider's state folder, or a folder of several.

    Args:
        root: A provider's state folder, or the folder that holds those of a whole local grid.
        chain_id: Chain of the job.
        contract: Address of the MetaScheduler.
        job_id: The job.
    """
    first = run_key(chain_id, contract, job_id)
    found: list[tuple[int, float, Path]] = []
    for runs in _run_folders(root):
        for path in (runs / first, *runs.glob(f"{first}.*")):
            parsed = parse_key(chain_id, contract, path.name)
            if parsed is not None and os.path.isdir(path):
                found.append((parsed[1], path.stat().st_mtime, path))
    return max(found)[2] if found else None


def read_output(run: Path, position: int = 0, limit: int = _MOST) -> OutputPart:
    """A piece of what a run printed, from a position, and the position from which to read on.

    Raises:
        NotFoundError: The run left no output that can be read.
    """
    folder = RunFolder(run)
    try:
        return outputlog.read_output(folder.output, position, limit)
    except OSError as error:
        raise NotFoundError(f"The output of {folder.key} can't be read: {error.strerror}") from None


@dataclass(frozen=True, slots=True)
class ResultFile:
    """A file that a run left.

    Attributes:
        name: `output`, or `work/...` for a file or folder of the working folder.
        size: Bytes; the length of a sparse file, not what it occupies.
        digest: SHA-256 in hexadecimal; empty where it was not read to its end.
        problem: Why it was not read or copied, in words; empty where it was.
        special: Whether it is a link, a pipe, a socket or a device, which is never read.
    """

    name: str
    size: int
    digest: str
    problem: str = ""
    special: bool = False


def result_files(run: Path, to: Path | None = None) -> list[ResultFile]:
    """What a run left: its output first, then the files of its working folder by name.

    The files are a stranger's: nothing is followed out of the folder, and copies are plain files
    of this user. Links, pipes, sockets and devices are named and not read. Holes of sparse files
    stay holes. What can't be read or copied is named with the problem and costs no other file.

    Args:
        run: The run's folder, of a run that has ended.
        to: A new folder to copy them into; the output becomes `output`, the others `work/...`.

    Raises:
        UsageError: The folder is there already, or can't be made.
    """
    folder = RunFolder(run)
    if to is not None:
        _make(to)
    found = _output(folder, None if to is None else to / "output")
    for name, path, problem, special in _entries(folder.work):
        copy = None if to is None else to / name
        found.append(
            ResultFile(name, 0, "", problem, special) if problem else _taken(name, path, copy)
        )
    return found


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UsageError(
            f"{folder} can't be made: {error.strerror}", hint="Give a folder that is not there yet."
        ) from None


def _output(folder: RunFolder, copy: Path | None) -> list[ResultFile]:
    """The output as one file; none for a run that left no log."""
    if not os.path.lexists(folder.output):
        return []
    whole, size, position = hashlib.sha256(), 0, 0
    try:
        with ExitStack() as stack:
            target = None if copy is None else stack.enter_context(copy.open("xb"))
            while (part := outputlog.read_output(folder.output, position, _MOST)).data:
                whole.update(part.data)
                size += len(part.data)
                position = part.position
                if target is not None:
                    target.write(part.data)
    except OSError as error:
        return [_failed("output", size, error, copy)]
    return [ResultFile("output", size, whole.hexdigest())]


def _entries(work: Path) -> list[tuple[str, Path, str, bool]]:
    """Name, path, problem and whether it is special: of all but folders that can be listed."""
    found: list[tuple[str, Path, str, bool]] = []
    if work.is_symlink():
        # A job may have put it there; what it leads to is not the job's.
        return [("work", work, f"{_SPECIAL[stat.S_IFLNK]}, not copied", True)]

    def unreadable(error: OSError) -> None:
        place = Path(os.fsdecode(error.filename))
        found.append((_name(place, work), place, f"can't be read: {_words(error)}", False))

    for where, folders, names in os.walk(work, followlinks=False, onerror=unreadable):
        for name in (*names, *folders):
            path, problem, special = Path(where) / name, "", False
            try:
                kind = stat.S_IFMT(path.lstat().st_mode)
            except OSError as error:  # a folder that may be listed and not be searched
                problem = f"can't be read: {_words(error)}"
            else:
                if kind == stat.S_IFDIR:
                    continue
                if kind != stat.S_IFREG:
                    problem, special = f"{_SPECIAL.get(kind, 'a device')}, not copied", True
            found.append((_name(path, work), path, problem, special))
    return sorted(found)


def _name(path: Path, work: Path) -> str:
    return str(Path("work", path.relative_to(work)))


def _taken(name: str, path: Path, copy: Path | None) -> ResultFile:
    """Read a file, and copy it where a copy is wanted."""
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
            digest, problem = _copied(source, size, target)
    except OSError as error:
        return _failed(name, size, error, copy)
    return ResultFile(name, size, digest, problem)


def _copied(source: BinaryIO, size: int, target: BinaryIO | None) -> tuple[str, str]:
    """Copy data, leave holes, and make the SHA-256 of all; that, or why there is none."""
    whole, holes, at = hashlib.sha256(), 0, 0
    for start, end in _data(source.fileno(), size):
        holes += start - at
        if holes <= _MOST_HOLES:
            _add_zeros(whole, start - at)
        source.seek(start)
        if target is not None:
            target.seek(start)
        at = start
        while at < end and (part := source.read(min(_MOST, end - at))):
            at += len(part)
            if target is not None:
                target.write(part)
            if holes <= _MOST_HOLES:
                whole.update(part)
    holes += size - at
    if target is not None:
        target.truncate(size)
    if holes > _MOST_HOLES:
        return "", f"has no SHA-256: {holes:,} of its bytes are holes"
    _add_zeros(whole, size - at)
    return whole.hexdigest(), ""


def _data(descriptor: int, size: int) -> Iterator[tuple[int, int]]:
    """Parts of a file that hold data; all of it where the file system does not tell."""
    at = 0
    while at < size:
        try:
            start = os.lseek(descriptor, at, os.SEEK_DATA)
            end = min(size, os.lseek(descriptor, start, os.SEEK_HOLE))
        except OSError as error:
            if error.errno == errno.EINVAL:
                yield at, size
            elif error.errno != errno.ENXIO:  # nothing but a hole up to the end
                raise
            return
        yield start, end
        at = end


def _add_zeros(whole: hashlib._Hash, count: int) -> None:
    while count > 0:
        whole.update(_ZEROS[:count])
        count -= len(_ZEROS)


def _failed(name: str, size: int, error: OSError, copy: Path | None) -> ResultFile:
    """A file that was not taken; half a copy of it is removed."""
    written = error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
    if copy is not None:
        written = written or error.filename in {str(copy), str(copy.parent)}
        with suppress(OSError):
            copy.unlink()
    verb = "copied" if written else "read"
    return ResultFile(name, size, "", f"can't be {verb}: {_words(error)}")


def _words(error: OSError) -> str:
    return error.strerror or str(error)


def has_ended(run: Path) -> bool:
    """Whether the run's end is on disk, so that its output will not grow."""
    return (run / "exit.json").exists()


def _run_folders(root: Path) -> list[Path]:
    candidates = [root / "runs", *root.glob("*/runs"), *root.glob("*/*/runs")]
    # Folders of other users may be among them, which a method of Path would stop at.
    return [path for path in candidates if os.path.isdir(path)]


def closed_folder(root: Path) -> Path | None:
    """The first folder, of a provider's or of its runs, that this user can't look into."""
    folders = [root, *(each for each in root.glob("*") if os.path.isdir(each))]
    for folder in (*folders, *_run_folders(root)):
        if os.path.isdir(folder) and not os.access(folder, os.R_OK | os.X_OK):
            return folder
    return None
