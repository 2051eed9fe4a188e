"""Measures the memory of a run: the proportional share of its processes, and its shared memory.

Pages that several processes share count once, divided among them (PSS). Files in /dev/shm and
memory files (memfd) count too, mapped or not: a run is charged for those that its processes opened
and that changed since its start, until they are deleted.

Supervisors import this module, so it has no heavy imports.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import stat
from collections.abc import Iterable
from typing import Any, Final, NamedTuple

from deepsquare_chain.executors import procfs

SHARED: Final = "/dev/shm"  # noqa: S108 - the measured folder
_MEMORY_FILES: Final = (f"{SHARED}/", "/memfd:")
_BLOCK: Final = 512
_IN_CREATE: Final = 0x100
_IN_OPEN: Final = 0x20
_IN_MOVED_TO: Final = 0x80
_IN_FLAGS: Final = os.O_NONBLOCK | os.O_CLOEXEC


class _Share(NamedTuple):
    """Memory of one process in bytes; `shared` is the part in shared memory files."""

    all: int
    shared: int


class MemoryMeter:
    """Measures the memory of all descendants of this process.

    Args:
        started_at: Start of the run, in seconds since the epoch.
    """

    def __init__(self, started_at: float) -> None:
        self._since = started_at - 1.0  # file times have a lower resolution than the clock
        self._files: dict[tuple[int, int], str] = {}
        self.events = _watch(SHARED)

    def exceeds(self, limit: int, shared_memory: int = 0) -> bool:
        """Return whether the run's memory exceeds a limit.

        Args:
            limit: Limit in bytes.
            shared_memory: Bytes in a sandbox's own /dev/shm, which is not visible here.
        """
        pids = procfs.descendants(os.getpid())
        files = max(self._memory_files_size(pids), shared_memory)
        # A cheap upper bound first: shared pages count once per process.
        if procfs.resident(pids) + files <= limit:
            return False
        shares = [_share(pid) for pid in pids]
        own = sum(share.all - share.shared for share in shares)
        return own + max(files, sum(share.shared for share in shares)) > limit

    def notice(self) -> None:
        """Record files that were created or opened in /dev/shm, while they are open."""
        if self.events >= 0:
            with contextlib.suppress(OSError):
                while os.read(self.events, 65536):
                    pass
        self._memory_files_size(procfs.descendants(os.getpid()))

    def clear(self) -> None:
        """Remove the run's files in /dev/shm, which would use memory permanently."""
        for key, path in self._files.items():
            with contextlib.suppress(OSError):
                if path and _key(os.lstat(path)) == key:
                    os.unlink(path)
        if self.events >= 0:
            os.close(self.events)
            self.events = -1

    def _memory_files_size(self, pids: Iterable[int]) -> int:
        """Return the bytes of all memory files that the run opened and that still exist."""
        open_files: dict[tuple[int, int], os.stat_result] = {}
        for pid in pids:
            for path, status in _memory_files(pid):
                if max(status.st_ctime, status.st_mtime) >= self._since:
                    open_files[_key(status)] = status
                    # The name is kept, so that the file still counts after it is closed.
                    has_name = path.startswith(f"{SHARED}/") and not path.endswith(" (deleted)")
                    self._files[_key(status)] = path if has_name else ""
        total = sum(status.st_blocks for status in open_files.values())
        for key, path in list(self._files.items()):
            if key in open_files:
                continue
            closed = _lstat(path)
            if closed is None or _key(closed) != key:
                del self._files[key]
            else:
                total += closed.st_blocks
        return total * _BLOCK


def _memory_files(pid: int) -> list[tuple[str, os.stat_result]]:
    """Return paths and file status of the memory files that a process has open."""
    files = []
    folder = f"{procfs.PROC}/{pid}/fd"
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            with contextlib.suppress(OSError):
                path = os.readlink(f"{folder}/{name}")
                if path.startswith(_MEMORY_FILES):
                    state = os.stat(f"{folder}/{name}")
                    if stat.S_ISREG(state.st_mode):
                        files.append((path, state))
    return files


def _share(pid: int) -> _Share:
    """Return the proportional share of a process; all its pages if the kernel lacks PSS."""
    sizes = {}
    try:
        with open(f"{procfs.PROC}/{pid}/smaps_rollup", "rb") as file:
            for line in file:
                name, _, rest = line.partition(b":")
                if name in {b"Pss", b"Pss_Shmem"}:
                    sizes[name] = int(rest.split()[0]) * 1024
        return _Share(sizes[b"Pss"], sizes.get(b"Pss_Shmem", 0))
    except (OSError, KeyError, ValueError, IndexError):
        return _Share(procfs.resident([pid]), 0)


def _lstat(path: str) -> os.stat_result | None:
    try:
        return os.lstat(path) if path else None
    except OSError:
        return None


def _key(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _watch(folder: str) -> int:
    """Return an inotify descriptor for files created or opened in a folder; -1 on failure."""
    libc: Any = ctypes.CDLL(None, use_errno=True)
    handle = int(libc.inotify_init1(_IN_FLAGS))
    if handle < 0:
        return -1
    mask = _IN_CREATE | _IN_OPEN | _IN_MOVED_TO
    if libc.inotify_add_watch(handle, os.fsencode(folder), mask) < 0:
        os.close(handle)
        return -1
    return handle
