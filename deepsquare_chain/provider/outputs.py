"""Output of runs on this machine, for people who stand before it; nothing is locked or changed."""

from __future__ import annotations

import hashlib
import os
import stat
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from deepsquare_chain.errors import NotFoundError, UsageError
from deepsquare_chain.executors.rundir import RunFolder, read_bytes
from deepsquare_chain.provider.model import parse_key, run_key

_MOST: Final = 1024 * 1024


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
            if parsed is not None and path.is_dir():
                found.append((parsed[1], path.stat().st_mtime, path))
    return max(found)[2] if found else None


def read_output(run: Path, offset: int = 0, limit: int = _MOST) -> bytes:
    """Up to `limit` bytes, from byte `offset`, of what a run printed.

    Raises:
        NotFoundError: The run left no output that can be read.
    """
    folder = RunFolder(run)
    try:
        return read_bytes(folder.output, offset, limit)
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise NotFoundError(f"The output of {folder.key} can't be read: {error.strerror}") from None


@dataclass(frozen=True, slots=True)
class ResultFile:
    """A file that a run left; `digest` is its SHA-256 in hexadecimal."""

    name: str
    size: int
    digest: str


def result_files(run: Path, to: Path | None = None) -> list[ResultFile]:
    """What a run left: its output first, then the regular files of its working folder by name.

    The files are a stranger's: links are passed over, nothing is followed out of the folder, and
    copies are plain files of this user.

    Args:
        run: The run's folder, of a run that has ended.
        to: A new folder to copy them into; the output becomes `output`, the others `work/...`.

    Raises:
        UsageError: The folder is there already, or can't be made.
        NotFoundError: A file can't be read.
    """
    folder = RunFolder(run)
    if to is not None:
        _make(to)
    found = []
    for name, path in [("output", folder.output), *_regular(folder.work)]:
        copy = None if to is None else to / name
        try:
            found.append(_taken(name, path, copy))
        except FileNotFoundError:
            continue  # a run that printed nothing has no output
        except OSError as error:
            raise NotFoundError(
                f"{name} of {folder.key} can't be copied: {error.strerror}"
            ) from None
    return found


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UsageError(
            f"{folder} can't be made: {error.strerror}", hint="Give a folder that is not there yet."
        ) from None


def _regular(work: Path) -> list[tuple[str, Path]]:
    found = []
    for where, _, names in os.walk(work, followlinks=False):
        for name in names:
            path = Path(where) / name
            if stat.S_ISREG(path.lstat().st_mode):
                found.append((f"work/{path.relative_to(work)}", path))
    return sorted(found)


def _taken(name: str, path: Path, copy: Path | None) -> ResultFile:
    whole, size = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with open(descriptor, "rb") as source, ExitStack() as stack:
        target = None
        if copy is not None:
            copy.parent.mkdir(parents=True, exist_ok=True)
            target = stack.enter_context(copy.open("xb"))
        while part := source.read(_MOST):
            whole.update(part)
            size += len(part)
            if target is not None:
                target.write(part)
    return ResultFile(name, size, whole.hexdigest())


def has_ended(run: Path) -> bool:
    """Whether the run's end is on disk, so that its output will not grow."""
    return (run / "exit.json").exists()


def _run_folders(root: Path) -> list[Path]:
    candidates = [root / "runs", *root.glob("*/runs"), *root.glob("*/*/runs")]
    return [path for path in candidates if path.is_dir()]
