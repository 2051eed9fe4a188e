"""How much memory a run holds: its processes' share of their pages, and its shared memory.

Pages that several processes share count once, divided among them (Pss). Files of /dev/shm and
memory files (memfd) are memory too, whether a process maps them or not: a run answers for those
that its processes opened, and that changed since its start, until they are gone.

The supervisor imports this, so nothing heavy is imported here.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import stat
from collections.abc import Iterable
from typing import Any, Final, NamedTuple

from deepsquare_chain.executors import procfs

SHARED: Final = "/dev/shm"  # noqa: S108 - what it measures
_MEMORY_FILES: Final = (f"{SHARED}/", "/memfd:")
_BLOCK: Final = 512
_IN_CREATE: Final = 0x100
_IN_OPEN: Final = 0x20
_IN_MOVED_TO: Final = 0x80
_IN_FLAGS: Final = os.O_NONBLOCK | os.O_CLOEXEC


class _Share(NamedTuple):
    """Memory of one process in bytes; `shared` is the part that lies in shared memory files."""

    all: int
    shared: int


class MemoryMeter:
    """Measures the memory of everything below this process.

    Args:
        started_at: Start of the run, in seconds since the epoch.
    """

    def __init__(self, started_at: float) -> None:
        self._since = started_at - 1.0  # file times are coarser than the clock
        self._files: dict[tuple[int, int], str] = {}
        self.events = _watch(SHARED)

    def exceeds(self, limit: int, shared_memory: int = 0) -> bool:
        """Whether the run holds more than so many bytes.

        Args:
            limit: Bytes.
            shared_memory: Bytes in a /dev/shm of its own, which can't be looked at from here.
        """
        pids = procfs.descendants(os.getpid())
        files = max(self._look_at_files(pids), shared_memory)
        # Cheap to tell, and never too little: pages that are shared count once a process.
        if procfs.resident(pids) + files <= limit:
            return False
        shares = [_share(pid) for pid in pids]
        own = sum(share.all - share.shared for share in shares)
        return own + max(files, sum(share.shared for share in shares)) > limit

    def notice(self) -> None:
        """Take in that something was made or opened in /dev/shm, while its maker has it open."""
        if self.events >= 0:
            with contextlib.suppress(OSError):
                while os.read(self.events, 65536):
                    pass
        self._look_at_files(procfs.descendants(os.getpid()))

    def clear(self) -> None:
        """Remove what the run left in /dev/shm: it would hold memory for ever."""
        for key, path in self._files.items():
            with contextlib.suppress(OSError):
                if path and _key(os.lstat(path)) == key:
                    os.unlink(path)
        if self.events >= 0:
            os.close(self.events)
            self.events = -1

    def _look_at_files(self, pids: Iterable[int]) -> int:
        """Bytes of all memory files that the run has opened and that are still there."""
        open_files: dict[tuple[int, int], os.stat_result] = {}
        for pid in pids:
            for path, found in _memory_files(pid):
                if max(found.st_ctime, found.st_mtime) >= self._since:
                    open_files[_key(found)] = found
                    # A name is kept, so that the file counts once it is closed.
                    kept = path.startswith(f"{SHARED}/") and not path.endswith(" (deleted)")
                    self._files[_key(found)] = path if kept else ""
        total = sum(found.st_blocks for found in open_files.values())
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
    """Paths and states of the memory files that a process has open."""
    found = []
    folder = f"{procfs.PROC}/{pid}/fd"
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            with contextlib.suppress(OSError):
                path = os.readlink(f"{folder}/{name}")
                if path.startswith(_MEMORY_FILES):
                    state = os.stat(f"{folder}/{name}")
                    if stat.S_ISREG(state.st_mode):
                        found.append((path, state))
    return found


def _share(pid: int) -> _Share:
    """Proportional share of a process; all its pages where the kernel does not tell."""
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
    """Descriptor that can be read when something is made or opened in a folder; -1 for none."""
    libc: Any = ctypes.CDLL(None, use_errno=True)
    handle = int(libc.inotify_init1(_IN_FLAGS))
    if handle < 0:
        return -1
    mask = _IN_CREATE | _IN_OPEN | _IN_MOVED_TO
    if libc.inotify_add_watch(handle, os.fsencode(folder), mask) < 0:
        os.close(handle)
        return -1
    return handle
