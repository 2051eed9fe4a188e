"""Finds and ends processes that belong to a folder: runs that outlive their daemon."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import psutil


def processes_of(folder: Path) -> list[psutil.Process]:
    """Processes that stand in the folder, or were started for it, without this one."""
    root = os.path.realpath(folder)
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and _belongs(process, root):
                found.append(process)
    return found


def end_processes_of(folder: Path, grace: float = 3.0) -> list[int]:
    """Kill them, until none is left or `grace` seconds are over; the pids that still live."""
    doomed = processes_of(folder)
    while doomed:
        for process in doomed:
            with contextlib.suppress(psutil.Error):
                process.kill()
        _, alive = psutil.wait_procs(doomed, timeout=grace)
        if alive:
            return [process.pid for process in alive]
        # What they had started in the meantime.
        doomed = processes_of(folder)
    return []


def _belongs(process: psutil.Process, root: str) -> bool:
    if process.status() == psutil.STATUS_ZOMBIE:
        return False
    places = [*process.cmdline(), process.cwd()]
    return any(place == root or place.startswith(root + os.sep) for place in places)


def is_alive(process: psutil.Process) -> bool:
    """Whether that very process still runs; a zombie does not."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False
