"""Finds, kills and records the orphaned processes of runs whose supervisor died or hangs."""

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
from deepsquare_chain.executors.procfs import Identity
from deepsquare_chain.executors.rundir import MARK, FolderClaim, RunFolder, exit_record, last_write

EXIT_TIMEOUT: Final = 10.0  # seconds to wait for killed processes to exit
SUPERVISOR_MODULE: Final = "deepsquare_chain.executors.supervisor"
_PAUSE: Final = 0.02


class UnkillableError(Exception):
    """Processes of a run that remain after KILL."""


class Census(NamedTuple):
    """A snapshot of all processes, so that many ended runs need one scan instead of one each."""

    sessions: frozenset[int]
    marks: frozenset[bytes]

    def may_contain(self, token: str, job: Identity | None) -> bool:
        """Return whether the snapshot may contain processes of a run."""
        return _mark(token) in self.marks or (job is not None and job.pid in self.sessions)


def take_census() -> Census:
    """Take a snapshot of all processes."""
    sessions = frozenset(process.session for process in procfs.everything() if not process.ended)
    return Census(sessions, frozenset(procfs.environment_entries(f"{MARK}=".encode())))


def conclude(folder: RunFolder, claim: FolderClaim, census: Census | None = None) -> dict[str, Any]:
    """Return the exit record of a run whose supervisor is dead; writes one if it left none.

    The census must be taken after the supervisor died.

    Raises:
        OSError: The folder can't be read or written.
        UnkillableError: Processes can't be killed.
    """
    if not claim.token:
        # Withdrawn before a supervisor claimed it: there never was a process.
        now = time.time()
        record = exit_record(128 + signal.SIGTERM, "cancelled", 0, now, now)
    else:
        job = _job(folder)
        if census is None or census.may_contain(claim.token, job[0] if job else None):
            end_marked(folder, claim)
        record = _lost(folder)
        _end_groups(folder)
    recorded = folder.exit()
    if recorded is not None:
        return recorded
    folder.set_exit(record)
    return record


def take_down(folder: RunFolder, claim: FolderClaim, reason: str) -> None:
    """Kill a run and its hung supervisor, and write the exit record.

    Raises:
        OSError: The folder can't be read or written.
        UnkillableError: Processes can't be killed.
    """
    # While the subreaper exists, even stopped, every orphan of the run is its descendant.
    _kill_until_gone(lambda: _below(claim.owner))
    procfs.send(claim.owner, signal.SIGKILL)
    _wait_gone(claim.owner)
    end_marked(folder, claim)
    if folder.exit() is None:
        folder.set_exit(_lost(folder) | {"reason": reason})


def end_marked(folder: RunFolder, claim: FolderClaim) -> None:
    """Kill the processes with the run's mark or in its session, and their descendants.

    Raises:
        OSError: The folder can't be read.
        UnkillableError: Processes can't be killed.
    """
    job = _job(folder)
    _kill_until_gone(lambda: _marked(claim.token, job[0] if job else None))
    _end_groups(folder)


def _end_groups(folder: RunFolder) -> None:
    """Kill the processes in a run's control groups, and remove the groups."""
    try:
        isolation = folder.spec().get("isolation")
    except OSError:
        return  # the processes were found by their mark; empty groups are harmless
    group = JobCgroup.from_record(isolation.get("cgroup", {})) if isolation else None
    if group is not None:
        try:
            group.end()
        except OSError as error:
            raise UnkillableError(f"a control group can't be removed: {error}") from error


def supervisor_of(folder: RunFolder) -> Identity | None:
    """Return the live supervisor of this folder, even if the folder is gone."""
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
    """Return the exit record of a lost run, whose end is its last write to disk."""
    job = _job(folder)
    started = job[1] if job else time.time()
    write_times = [started]
    with contextlib.suppress(OSError):
        write_times.append(last_write(folder.output))
    with contextlib.suppress(OSError):
        write_times.append(folder.work.stat().st_mtime)
    # A job can set its files' times, so times in the future are ignored.
    ended = min(max(write_times), max(time.time(), started))
    seconds = math.ceil(ended - started)
    return exit_record(128 + signal.SIGKILL, "lost", seconds, started, ended)


def _job(folder: RunFolder) -> tuple[Identity, float, float] | None:
    # A job that damaged this record is still found by its mark.
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
        # The kernel reuses a pid only once no session has it.
        if leader is None or leader.ticks == job.ticks:
            members = (p for p in live.values() if p.session == job.pid and p.ticks >= job.ticks)
            roots.update(process.pid for process in members)
    roots.discard(os.getpid())
    pids = roots | set(procfs.descendants_in(live.values(), roots))
    return {pid for pid in pids if pid in live}


def _mark(token: str) -> bytes:
    return f"{MARK}={token}".encode()


def _kill_until_gone(find: Callable[[], set[int]]) -> None:
    deadline = time.monotonic() + EXIT_TIMEOUT
    while pids := find():
        procfs.signal_trees(pids, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise UnkillableError(f"{len(pids)} processes can't be ended")
        time.sleep(_PAUSE)


def _wait_gone(identity: Identity) -> None:
    deadline = time.monotonic() + EXIT_TIMEOUT
    while procfs.find(identity) is not None:
        if time.monotonic() > deadline:
            raise UnkillableError(f"process {identity.pid} can't be ended")
        time.sleep(_PAUSE)
