"""What is left of a run whose supervisor died or hangs: found, ended, and recorded."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from deepsquare_chain.executors import procfs
from deepsquare_chain.executors.cgroups import JobCgroup
from deepsquare_chain.executors.outputlog import last_write
from deepsquare_chain.executors.procfs import Identity
from deepsquare_chain.executors.rundir import MARK, FolderClaim, RunFolder, exit_record

PATIENCE: Final = 10.0  # seconds to wait for killed processes to vanish
SUPERVISOR_MODULE: Final = "deepsquare_chain.executors.supervisor"
_PAUSE: Final = 0.02


class StubbornError(Exception):
    """Processes of a run are still there although they were killed."""


class Census(NamedTuple):
    """All processes at one moment, so that many ended runs cost one look instead of one each."""

    sessions: frozenset[int]
    marks: frozenset[bytes]

    def knows(self, token: str, job: Identity | None) -> bool:
        """Whether something of a run may have been there."""
        return _mark(token) in self.marks or (job is not None and job.pid in self.sessions)


def take_census() -> Census:
    """Look once at everything."""
    sessions = frozenset(each.session for each in procfs.everything() if not each.ended)
    return Census(sessions, frozenset(procfs.environment_entries(f"{MARK}=".encode())))


def conclude(folder: RunFolder, claim: FolderClaim, census: Census | None = None) -> dict[str, Any]:
    """The exit record of a run whose supervisor is dead; written here if it left none.

    A census was taken after that death.

    Raises:
        OSError: The folder can't be read or written.
        StubbornError: Processes are left.
    """
    if not claim.token:
        # Withdrawn before any supervisor took it: there never was a process.
        now = time.time()
        record = exit_record(128 + signal.SIGTERM, "cancelled", 0, now, now)
    else:
        job = _job(folder)
        if census is None or census.knows(claim.token, job[0] if job else None):
            end_marked(folder, claim)
        record = _lost(folder)
        _end_groups(folder)
    known = folder.exit()
    if known is not None:
        return known
    folder.set_exit(record)
    return record


def take_down(folder: RunFolder, claim: FolderClaim, reason: str) -> None:
    """End a run without the help of its supervisor, which does not react, and record it.

    Raises:
        OSError: The folder can't be read or written.
        StubbornError: Processes are left.
    """
    # While the supervisor exists, stopped or not, every orphan of the run stays below it.
    _kill_until_gone(lambda: _below(claim.owner))
    procfs.send(claim.owner, signal.SIGKILL)
    _wait_gone(claim.owner)
    end_marked(folder, claim)
    if folder.exit() is None:
        folder.set_exit(_lost(folder) | {"reason": reason})


def end_marked(folder: RunFolder, claim: FolderClaim) -> None:
    """Kill what carries the run's mark or stands in its session, and everything below.

    Raises:
        OSError: The folder can't be read.
        StubbornError: Processes are left.
    """
    job = _job(folder)
    _kill_until_gone(lambda: _marked(claim.token, job[0] if job else None))
    _end_groups(folder)


def _end_groups(folder: RunFolder) -> None:
    """End what is in the control groups of a run, and remove them."""
    try:
        isolation = folder.spec().get("isolation")
    except OSError:
        return  # the mark found the processes; empty groups hold nothing
    group = JobCgroup.from_record(isolation.get("cgroup", {})) if isolation else None
    if group is not None:
        try:
            group.end()
        except OSError as error:
            raise StubbornError(f"a control group can't be removed: {error}") from error


def supervisor_of(folder: RunFolder) -> Identity | None:
    """The live supervisor that was started for this folder, even if the folder is gone."""
    arguments = [SUPERVISOR_MODULE.encode(), os.fsencode(folder.path)]
    for process in procfs.everything():
        try:
            line = procfs.command_line(process.pid)
            if line.rstrip(b"\0").split(b"\0")[-2:] == arguments:
                return procfs.identify(process.pid)
        except OSError:
            continue
    return None


def _lost(folder: RunFolder) -> dict[str, Any]:
    """Nobody saw the end: the last sign of life on disk stands for it."""
    job = _job(folder)
    started = job[1] if job else time.time()
    signs = [started]
    with contextlib.suppress(OSError):
        signs.append(last_write(folder.output))
    with contextlib.suppress(OSError):
        signs.append(folder.work.stat().st_mtime)
    # A job can set times of its own files; the future is no sign of life.
    ended = min(max(signs), max(time.time(), started))
    seconds = math.ceil(ended - started)
    return exit_record(128 + signal.SIGKILL, "lost", seconds, started, ended)


def _job(folder: RunFolder) -> tuple[Identity, float, float] | None:
    # The mark still finds a job that spoilt this record.
    try:
        return folder.job()
    except OSError:
        return None


def _below(owner: Identity) -> set[int]:
    if procfs.find(owner) is None:
        return set()
    live = [process for process in procfs.everything() if not process.ended]
    return set(procfs.descendants_in(live, {owner.pid}))


def _marked(token: str, job: Identity | None) -> set[int]:
    processes = procfs.everything()
    live = {process.pid: process for process in processes if not process.ended}
    roots = set(procfs.marked(_mark(token))) if token else set()
    if job is not None and job.boot == procfs.boot_id():
        leader = next((process for process in processes if process.pid == job.pid), None)
        # The kernel gives a pid away again only once no session bears it any more.
        if leader is None or leader.ticks == job.ticks:
            members = (p for p in live.values() if p.session == job.pid and p.ticks >= job.ticks)
            roots.update(process.pid for process in members)
    roots.discard(os.getpid())
    found = roots | set(procfs.descendants_in(live.values(), roots))
    return {pid for pid in found if pid in live}


def _mark(token: str) -> bytes:
    return f"{MARK}={token}".encode()


def _kill_until_gone(look: Callable[[], set[int]]) -> None:
    deadline = time.monotonic() + PATIENCE
    while left := look():
        procfs.signal_trees(left, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise StubbornError(f"{len(left)} processes can't be ended")
        time.sleep(_PAUSE)


def _wait_gone(identity: Identity) -> None:
    deadline = time.monotonic() + PATIENCE
    while procfs.find(identity) is not None:
        if time.monotonic() > deadline:
            raise StubbornError(f"process {identity.pid} can't be ended")
        time.sleep(_PAUSE)
