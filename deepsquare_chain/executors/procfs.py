"""Processes as the kernel shows them in /proc: who is alive, whose child, how much memory.

Read directly because the supervisor looks several times a second and must stay light. Paths are
text: `pathlib` interns each part of a path, and a daemon that looks at new pids all the time would
grow the interpreter's table of interned strings.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
from collections.abc import Iterable
from typing import Final, NamedTuple

PROC: Final = "/proc"
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")
_GONE: Final = (FileNotFoundError, ProcessLookupError)


class Process(NamedTuple):
    """One process; `ticks` is its start in clock ticks since boot."""

    pid: int
    state: str
    parent: int
    session: int
    ticks: int

    @property
    def ended(self) -> bool:
        """A zombie runs no more; it only waits for its parent."""
        return self.state in "ZX"


class Identity(NamedTuple):
    """A process that no later one with the same pid can be mistaken for."""

    pid: int
    ticks: int
    boot: str


def boot_id() -> str:
    """Changes with every start of the machine."""
    return _boot_id(PROC)


@functools.cache
def _boot_id(proc: str) -> str:
    return _read(f"{proc}/sys/kernel/random/boot_id").decode().strip()


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def look(pid: int) -> Process | None:
    """The process with this pid, None when there is none.

    Raises:
        OSError: The kernel does not tell.
    """
    try:
        raw = _read(f"{PROC}/{pid}/stat")
    except _GONE:
        return None
    # The name stands in parentheses and may hold anything, a closing one included.
    fields = raw[raw.rindex(b")") + 2 :].split()
    return Process(pid, fields[0].decode(), int(fields[1]), int(fields[3]), int(fields[19]))


def identify(pid: int) -> Identity:
    """Identity of a live process.

    Raises:
        ProcessLookupError: There is no such process.
    """
    process = look(pid)
    if process is None:
        raise ProcessLookupError(f"no process {pid}")
    return Identity(pid, process.ticks, boot_id())


def find(identity: Identity) -> Process | None:
    """That very process while it lives, else None."""
    if identity.pid < 1 or identity.boot != boot_id():
        return None
    process = look(identity.pid)
    if process is None or process.ended or process.ticks != identity.ticks:
        return None
    return process


def send(identity: Identity, number: int) -> None:
    """Send a signal to that very process; nothing when it is gone."""
    try:
        handle = os.pidfd_open(identity.pid)
    except OSError:
        return
    try:
        # The descriptor holds on to one process: checked once, it can't become another.
        if find(identity) is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, number)
    finally:
        os.close(handle)


def everything() -> list[Process]:
    """All processes that this user may see, zombies included."""
    found = []
    for entry in os.scandir(PROC):
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError):
                process = look(int(entry.name))
                if process is not None:
                    found.append(process)
    return found


def descendants(root: int) -> list[int]:
    """Pids below `root`, without itself. A racing fork may be missed: sweep until none is left."""
    try:
        return _descendants_by_children(root)
    except FileNotFoundError:
        return descendants_in(everything(), {root})


def descendants_in(processes: Iterable[Process], roots: set[int]) -> list[int]:
    """Pids below any of `roots`, without themselves."""
    children: dict[int, list[int]] = {}
    for process in processes:
        children.setdefault(process.parent, []).append(process.pid)
    found: list[int] = []
    waiting = list(roots)
    while waiting:
        below = children.get(waiting.pop(), ())
        found.extend(below)
        waiting.extend(below)
    return found


def _descendants_by_children(root: int) -> list[int]:
    if not os.path.exists(f"{PROC}/self/task/{os.getpid()}/children"):
        raise FileNotFoundError("this kernel lists no children")
    found: list[int] = []
    waiting = [root]
    while waiting:
        below = _children(waiting.pop())
        found.extend(below)
        waiting.extend(below)
    return found


def _children(pid: int) -> list[int]:
    found: list[int] = []
    # Every thread has children of its own.
    with contextlib.suppress(OSError):
        for task in os.listdir(f"{PROC}/{pid}/task"):
            with contextlib.suppress(OSError):
                text = _read(f"{PROC}/{pid}/task/{task}/children")
                found.extend(int(child) for child in text.split())
    return found


def resident(pids: Iterable[int]) -> int:
    """Bytes of memory that these processes hold, pages they share counted for each."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError, IndexError):
            total += int(_read(f"{PROC}/{pid}/statm").split()[1]) * _PAGE
    return total


def command_line(pid: int) -> bytes:
    """Arguments with which a process was started, a NUL behind each.

    Raises:
        OSError: The kernel does not tell.
    """
    return _read(f"{PROC}/{pid}/cmdline")


def marked(entry: bytes) -> list[int]:
    """Pids of processes that were started with `entry` (`NAME=value`) in their environment."""
    wanted = b"\0" + entry + b"\0"
    found = []
    for candidate in os.scandir(PROC):
        if candidate.name.isdigit():
            with contextlib.suppress(OSError):
                if wanted in b"\0" + _read(f"{PROC}/{candidate.name}/environ"):
                    found.append(int(candidate.name))
    return found


def environment_entries(prefix: bytes) -> set[bytes]:
    """Entries with this beginning that any process was started with."""
    found: set[bytes] = set()
    for candidate in os.scandir(PROC):
        if candidate.name.isdigit():
            with contextlib.suppress(OSError):
                entries = _read(f"{PROC}/{candidate.name}/environ").split(b"\0")
                found.update(entry for entry in entries if entry.startswith(prefix))
    return found


def signal_trees(pids: Iterable[int], number: int) -> None:
    """Send a signal to these processes and to the groups they lead or belong to.

    A group is signalled in one step by the kernel, so a fork can't slip out of it.
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
    """Send a signal to these processes alone; those that are gone are no error."""
    for pid in pids:
        with contextlib.suppress(OSError):
            os.kill(pid, number)
