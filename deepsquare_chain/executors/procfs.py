"""Reads processes from /proc: state, parent, session, memory and environment.

/proc is read directly because the supervisor polls it several times per second and must use little
memory. Paths are plain strings: `pathlib` interns each part of a path, so that ever new pids would
grow the interpreter's table of interned strings.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import signal
import stat
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, NamedTuple

PROC: Final = "/proc"
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")
_GONE: Final = (FileNotFoundError, ProcessLookupError)

SHARED: Final = "/dev/shm"  # noqa: S108 - the measured folder
_MEMORY_FILES: Final = (f"{SHARED}/", "/memfd:")
#: Bytes per block of `st_blocks`.
BLOCK_BYTES: Final = 512
_IN_CREATE: Final = 0x100
_IN_OPEN: Final = 0x20
_IN_MOVED_TO: Final = 0x80
_IN_FLAGS: Final = os.O_NONBLOCK | os.O_CLOEXEC


class Process(NamedTuple):
    """One process; `ticks` is its start in clock ticks since boot."""

    pid: int
    state: str
    parent: int
    session: int
    ticks: int

    @property
    def ended(self) -> bool:
        """Whether the process is a zombie, which has ended but is not reaped by its parent."""
        return self.state in "ZX"


class Identity(NamedTuple):
    """Identity of a process, which differs from that of a later one with the same pid."""

    pid: int
    ticks: int
    boot: str


def boot_id() -> str:
    """Return the boot ID, which changes with every boot of the machine."""
    return _boot_id(PROC)


@functools.cache
def _boot_id(proc: str) -> str:
    return read(f"{proc}/sys/kernel/random/boot_id").decode().strip()


def read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def read_process(pid: int) -> Process | None:
    """Return the process with this pid; None when there is none.

    Raises:
        OSError: /proc can't be read.
    """
    try:
        raw = read(f"{PROC}/{pid}/stat")
    except _GONE:
        return None
    # The name is in parentheses and may contain any character, including a parenthesis.
    fields = raw[raw.rindex(b")") + 2 :].split()
    return Process(pid, fields[0].decode(), int(fields[1]), int(fields[3]), int(fields[19]))


def identify(pid: int) -> Identity:
    """Return the identity of a live process.

    Raises:
        ProcessLookupError: There is no such process.
    """
    process = read_process(pid)
    if process is None:
        raise ProcessLookupError(f"no process {pid}")
    return Identity(pid, process.ticks, boot_id())


def find(identity: Identity) -> Process | None:
    """Return the identified process while it is alive, else None."""
    if identity.pid < 1 or identity.boot != boot_id():
        return None
    process = read_process(identity.pid)
    if process is None or process.ended or process.ticks != identity.ticks:
        return None
    return process


def send(identity: Identity, number: int) -> None:
    """Send a signal to the identified process, if it is alive."""
    try:
        handle = os.pidfd_open(identity.pid)
    except OSError:
        return
    try:
        # The pidfd refers to one process: after this check it can't become another one.
        if find(identity) is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, number)
    finally:
        os.close(handle)


def _pids() -> Iterator[int]:
    for entry in os.scandir(PROC):
        if entry.name.isdigit():
            yield int(entry.name)


def everything() -> list[Process]:
    """Return all processes visible to this user, zombies included."""
    processes = []
    for pid in _pids():
        with contextlib.suppress(OSError, ValueError):
            process = read_process(pid)
            if process is not None:
                processes.append(process)
    return processes


def descendants(root: int) -> list[int]:
    """Return the pids of all descendants of `root`. A concurrent fork may be missed, so repeat."""
    try:
        return _descendants_by_children(root)
    except FileNotFoundError:
        return descendants_in(everything(), {root})


def descendants_in(processes: Iterable[Process], roots: set[int]) -> list[int]:
    """Return the pids of all descendants of `roots`, without `roots` themselves."""
    children: dict[int, list[int]] = {}
    for process in processes:
        children.setdefault(process.parent, []).append(process.pid)
    return _walk(roots, lambda pid: children.get(pid, []))


def _descendants_by_children(root: int) -> list[int]:
    if not os.path.exists(f"{PROC}/self/task/{os.getpid()}/children"):
        raise FileNotFoundError("this kernel does not list child processes")
    return _walk({root}, _children)


def _walk(roots: set[int], children_of: Callable[[int], list[int]]) -> list[int]:
    """Return all descendants of `roots` in a tree of processes."""
    pids: list[int] = []
    parents = list(roots)
    while parents:
        children = children_of(parents.pop())
        pids.extend(children)
        parents.extend(children)
    return pids


def _children(pid: int) -> list[int]:
    pids: list[int] = []
    # Children are listed per thread.
    with contextlib.suppress(OSError):
        for task in os.listdir(f"{PROC}/{pid}/task"):
            with contextlib.suppress(OSError):
                text = read(f"{PROC}/{pid}/task/{task}/children")
                pids.extend(int(child) for child in text.split())
    return pids


def resident(pids: Iterable[int]) -> int:
    """Return the resident memory of processes in bytes; shared pages count for each."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError, IndexError):
            total += int(read(f"{PROC}/{pid}/statm").split()[1]) * _PAGE
    return total


def command_line(pid: int) -> bytes:
    """Return the arguments of a process, each terminated by NUL.

    Raises:
        OSError: /proc can't be read.
    """
    return read(f"{PROC}/{pid}/cmdline")


def deleted_mappings(pid: int, folders: Iterable[str]) -> list[tuple[int, int]]:
    """Return inode and end of the mapped part, in bytes, of deleted files that a process has mapped.

    Only files in `folders`, as the process sees them: an updated system library is deleted too.

    Raises:
        OSError: /proc can't be read.
    """
    prefixes = tuple(os.fsencode(folder) + b"/" for folder in folders)
    mappings = []
    for line in read(f"{PROC}/{pid}/maps").splitlines():
        if line.endswith(b" (deleted)"):
            addresses, _, offset, _, inode, path = line.split(maxsplit=5)
            if path.startswith(prefixes):
                start, end = (int(address, 16) for address in addresses.split(b"-"))
                mappings.append((int(inode), int(offset, 16) + end - start))
    return mappings


def marked(entry: bytes) -> list[int]:
    """Return the pids of processes whose initial environment has `entry` (`NAME=value`)."""
    needle = b"\0" + entry + b"\0"
    pids = []
    for pid in _pids():
        with contextlib.suppress(OSError):
            if needle in b"\0" + read(f"{PROC}/{pid}/environ"):
                pids.append(pid)
    return pids


def environment_entries(prefix: bytes) -> set[bytes]:
    """Return all entries with this prefix in the initial environment of any process."""
    matches: set[bytes] = set()
    for pid in _pids():
        with contextlib.suppress(OSError):
            entries = read(f"{PROC}/{pid}/environ").split(b"\0")
            matches.update(entry for entry in entries if entry.startswith(prefix))
    return matches


def signal_trees(pids: Iterable[int], number: int) -> None:
    """Send a signal to processes and to their process groups.

    The kernel signals a group atomically, so that a concurrent fork can't escape.
    """
    own = os.getpgrp()
    groups = set()
    pids = list(pids)
    for pid in pids:
        with contextlib.suppress(OSError):
            groups.add(os.getpgid(pid))
    for group in groups - {own, 0, 1}:
        with contextlib.suppress(OSError):
            os.killpg(group, number)
    signal_each(pids, number)


def signal_each(pids: Iterable[int], number: int) -> None:
    """Send a signal to processes, but not to their groups; ended ones are no error."""
    for pid in pids:
        with contextlib.suppress(OSError):
            os.kill(pid, number)


class _Share(NamedTuple):
    """Memory of one process in bytes; `shared` is the part in shared memory files."""

    all: int
    shared: int


class MemoryMeter:
    """Measures the memory of all descendants of this process."""

    def __init__(self, started_at: float) -> None:
        # In seconds since the epoch; file times have a lower resolution than the clock.
        self._since = started_at - 1.0
        self._files: dict[tuple[int, int], str] = {}
        self.events = _watch(SHARED)

    def exceeds(self, limit: int, shared_memory: int = 0) -> bool:
        """Return whether the run's memory exceeds a limit in bytes.

        `shared_memory` are the bytes in a sandbox's own /dev/shm, which is not visible here.
        """
        pids = descendants(os.getpid())
        files = max(self._memory_files_size(pids), shared_memory)
        # A cheap upper bound first: shared pages count once per process.
        if resident(pids) + files <= limit:
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
        self._memory_files_size(descendants(os.getpid()))

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
        return total * BLOCK_BYTES


def _memory_files(pid: int) -> list[tuple[str, os.stat_result]]:
    """Return paths and file status of the memory files that a process has open."""
    files = []
    folder = f"{PROC}/{pid}/fd"
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
        with open(f"{PROC}/{pid}/smaps_rollup", "rb") as file:
            for line in file:
                name, _, rest = line.partition(b":")
                if name in {b"Pss", b"Pss_Shmem"}:
                    sizes[name] = int(rest.split()[0]) * 1024
        return _Share(sizes[b"Pss"], sizes.get(b"Pss_Shmem", 0))
    except (OSError, KeyError, ValueError, IndexError):
        return _Share(resident([pid]), 0)


def _lstat(path: str) -> os.stat_result | None:
    try:
        return os.lstat(path) if path else None
    except OSError:
        return None


def _key(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


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
