"""Runs that ended together are checked in one scan, which finds every orphaned process."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from deepsquare_chain.executors import procfs
from deepsquare_chain.executors.base import RunSpec, RunState
from deepsquare_chain.executors.local import LocalExecutor
from deepsquare_chain.executors.rundir import RunFolder
from deepsquare_chain.job import Offer, Resources

SMALL = Resources(tasks=1, cpus_per_task=1, mem_per_cpu=64, gpus=0)
#: One process in the script's session, one that left it.
STAYS = b"#!/bin/bash\nsetsid sleep 300 & echo $! > away\necho $$ > own\nwait\n"


async def test_orphaned_processes_of_killed_supervisors_are_found_in_one_scan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    executor = LocalExecutor(tmp_path, Offer(cpus=16, memory=4096, gpus=0))
    scripts = {"1-a-1": STAYS, "1-a-2": STAYS, "1-a-3": b"#!/bin/bash\ntrue\n"}
    for key, script in scripts.items():
        await executor.submit(RunSpec(key, script, SMALL, 300, {}))
    folders = [RunFolder(tmp_path / "runs" / key) for key in scripts]
    files = [folder.work / name for folder in folders[:2] for name in ("own", "away")]
    await until(lambda: all(file.exists() and file.read_text().strip() for file in files))
    await until(lambda: folders[2].exit() is not None)
    pids = [int(file.read_text()) for file in files]
    for folder in folders[:2]:
        claim = folder.taken()
        assert claim is not None
        os.kill(claim.owner.pid, signal.SIGKILL)
    await until(lambda: not any(procfs.find(folder.taken().owner) for folder in folders))
    scans = []
    entries = procfs.environment_entries
    monkeypatch.setattr(
        procfs, "environment_entries", lambda prefix: scans.append(1) or entries(prefix)
    )
    statuses = await executor.poll(scripts)
    assert [status.state for status in statuses.values()] == [RunState.ENDED] * 3
    assert [status.exit.reason for status in statuses.values()] == ["lost", "lost", "exited"]
    assert all(_ended(pid) for pid in pids)
    assert len(scans) == 1


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 90
    while True:
        if condition():
            return
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


def _ended(pid: int) -> bool:
    process = procfs.read_process(pid)
    return process is None or process.ended
