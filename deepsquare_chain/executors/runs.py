"""All run folders of one machine: creation, start, status, cancellation and removal.

Blocking; `local` calls it from threads. Methods raise OSError unchanged, and `UnkillableError` for
processes that can't be killed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from deepsquare_chain.errors import NotFoundError
from deepsquare_chain.executors import launch, orphaned_processes, procfs
from deepsquare_chain.executors.base import (
    ExecutorError,
    ExecutorUnavailableError,
    Exit,
    RunRefusedError,
    RunSpec,
    RunState,
    RunStatus,
    check_key,
)
from deepsquare_chain.executors.launch import Launched, free_devices
from deepsquare_chain.executors.orphaned_processes import Census, UnkillableError
from deepsquare_chain.executors.procfs import Identity
from deepsquare_chain.executors.rundir import (
    GRACE,
    FolderClaim,
    RunFolder,
    read_bytes,
    read_kept,
    unique,
)
from deepsquare_chain.executors.sandbox import Isolation
from deepsquare_chain.faults import crash_point
from deepsquare_chain.job import MEGABYTE, Offer
from deepsquare_chain.observability import get_logger

HUNG: Final = 8.0  # seconds beyond the grace after which a supervisor counts as hung
_STALE: Final = 3600.0  # seconds after which an incomplete folder counts as abandoned
_log = get_logger(__name__)


class Runs:
    """The runs below one folder, which is created if needed.

    Args:
        path: The folder.
        isolation: Isolation of new runs; None for plain processes.
    """

    def __init__(self, path: Path, isolation: Isolation | None = None) -> None:
        self.path = path
        self._isolation = isolation
        self._starting: dict[str, Launched] = {}
        self._children: dict[str, Launched] = {}
        self._ended: dict[str, Exit] = {}
        self._warned: set[str] = set()
        self._control = threading.Lock()
        self._handing_out = threading.Lock()
        self.fork_server = launch.ForkServer(path)
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._sweep()

    def folder(self, key: str) -> RunFolder:
        """Return the folder of a key, which may not exist.

        Raises:
            RunRefusedError: The key is not a plain name.
        """
        return RunFolder(self.path / check_key(key))

    # -- starting

    def begin(self, spec: RunSpec, gpus: Sequence[str] = ()) -> bool:
        """Create the run unless it exists, and start its supervisor; True once it is claimed.

        `gpus` are the names of all GPUs that may be allocated.

        Raises:
            ExecutorUnavailableError: Not enough GPUs are free now.
        """
        folder = self.folder(spec.key)
        if self._has_claimed(spec.key):
            return True
        with self._handing_out:
            if not self._exists(folder):
                devices = self._devices(spec, gpus)
                launch.make_run(self.path, spec, devices, self._isolation)
        if folder.taken() is not None:
            return True
        self._starting[spec.key] = self.fork_server.start(folder)
        crash_point("executor.launched")
        return False

    def _devices(self, spec: RunSpec, gpus: Sequence[str]) -> list[str]:
        """Allocate GPUs for a new run that no live run uses, according to the run folders."""
        requested = spec.resources.gpus
        if not requested:
            return []
        in_use = [self._devices_of(key) for key in self._live_keys()]
        devices = free_devices(gpus, in_use, requested)
        if devices is None:
            raise ExecutorUnavailableError(
                f"Run {spec.key} requests {requested} GPUs, which are not free",
                hint="Check the offer against CUDA_VISIBLE_DEVICES of the daemon.",
            )
        return devices

    def _devices_of(self, key: str) -> Sequence[str] | int:
        spec = self.folder(key).spec()
        try:
            devices = spec.get("devices")
            return [str(device) for device in devices] if devices else int(spec["gpus"])
        except (KeyError, TypeError, ValueError):
            raise OSError(f"run {key} does not record which GPUs it has") from None

    def _live_keys(self) -> list[str]:
        """Return the runs that are not known to have ended."""
        open_keys = [key for key in self.keys() if key not in self._ended]
        statuses = self.poll_all(open_keys)
        return [key for key in open_keys if statuses[key].state is not RunState.ENDED]

    def taken(self, key: str) -> bool:
        """Return whether a supervisor claimed the run.

        Raises:
            ExecutorUnavailableError: The supervisor failed; nothing of the run is left.
        """
        folder = self.folder(key)
        child = self._starting.get(key)
        has_ended = child is not None and child.ended
        if folder.taken() is not None or (child is not None and child.has_claimed()):
            if child is not None:
                child.release()
                self._children[key] = child
                self._starting.pop(key, None)
            return True
        if not has_ended:
            return False
        self._starting.pop(key, None)
        raise ExecutorUnavailableError(
            f"Run {key} could not be started: {self._remove_unclaimed(folder)}"
        )

    def report_pipe(self, key: str) -> int | None:
        """Return the descriptor on which a supervisor started here will report, if any."""
        child = self._starting.get(key)
        return None if child is None else child.report_pipe

    def _has_claimed(self, key: str) -> bool:
        """Return whether a supervisor started here claimed the run, even if its folder is gone."""
        child = self._starting.get(key) or self._children.get(key)
        return child is not None and not child.ended and child.has_claimed()

    def _remove_unclaimed(self, folder: RunFolder) -> str:
        """Remove a run that no supervisor claimed; returns why its supervisor failed."""
        try:
            log = read_bytes(folder.log, 0, 65536).decode(errors="replace").strip()
            if self._withdraw(folder):
                self._remove(folder)
        except FileNotFoundError:
            return "its folder was removed"
        return log.splitlines()[-1][:200] if log else "its supervisor ended"

    def _withdraw(self, folder: RunFolder) -> bool:
        """Claim an unclaimed run without a process, so that no supervisor can claim it."""
        return folder.claim(Identity(0, 0, procfs.boot_id()), "")

    # -- status

    def has_begun(self, key: str) -> bool:
        """Return whether this run ever began here."""
        folder = self.folder(key)
        return self._exists(folder) and folder.taken() is not None

    def poll_all(self, keys: Iterable[str]) -> dict[str, RunStatus]:
        """Return the status of each run."""
        self._reap()
        all_keys = list(keys)
        dead_keys = {key for key in all_keys if self._is_gone(key)}
        # Taken after these supervisors died, so that no process of their runs can start later.
        census = orphaned_processes.take_census() if len(dead_keys) > 1 else None
        return {key: self.poll(key, census if key in dead_keys else None) for key in all_keys}

    def _is_gone(self, key: str) -> bool:
        """Return whether the supervisor of a run without a known end is certainly dead."""
        if key in self._ended:
            return False
        try:
            claim = self.folder(key).taken()
            return claim is not None and procfs.find(claim.owner) is None
        except (OSError, RunRefusedError):
            return False

    def poll(self, key: str, census: Census | None = None) -> RunStatus:
        """Return the status of a run; UNKNOWN, with one log entry, if it can't be determined."""
        ended = self._ended.get(key)
        if ended is not None:
            return RunStatus(RunState.ENDED, ended)
        try:
            return self._status(self.folder(key), census)
        except (OSError, RunRefusedError, UnkillableError) as error:
            self._warn(key, error)
            return RunStatus(RunState.UNKNOWN)

    def is_live(self, key: str) -> bool:
        """Return whether the run has, or may get, live processes; even without its folder."""
        folder = self.folder(key)
        if not self._exists(folder):
            return orphaned_processes.supervisor_of(folder) is not None
        return self._status(folder).state is not RunState.ENDED

    def output(self, key: str, offset: int, limit: int) -> bytes:
        """Return a part of the run's output; for a live run, of the output kept so far.

        Raises:
            NotFoundError: There is no such run.
        """
        folder = self.folder(key)
        self._require(folder)
        return read_kept(folder.output, offset, limit)

    def keys(self) -> list[str]:
        """Return the keys of all run folders."""
        keys = []
        for entry in os.scandir(self.path):
            with contextlib.suppress(RunRefusedError):
                if entry.is_dir(follow_symlinks=False):
                    keys.append(check_key(entry.name))
        return sorted(keys)

    def free(self, offer: Offer, min_free: int) -> Offer:
        """Return the offer minus live runs; nothing below `min_free` MB of disk, or in doubt."""
        nothing = Offer(cpus=0, memory=0, gpus=0)
        if shutil.disk_usage(self.path).free < min_free * MEGABYTE:
            self._warn("disk", OSError(f"less than {min_free} MB are free in {self.path}"))
            return nothing
        self._warned.discard("disk")
        cpus, memory, gpus = offer.cpus, offer.memory, offer.gpus
        for key in self._live_keys():
            try:
                spec = self.folder(key).spec()
                used = int(spec["cpus"]), int(spec["memory"]), int(spec["gpus"])
            except (OSError, KeyError, TypeError, ValueError) as error:
                self._warn(key, error)
                return nothing
            cpus, memory, gpus = cpus - used[0], memory - used[1], gpus - used[2]
        return Offer(cpus=max(0, cpus), memory=max(0, memory), gpus=max(0, gpus))

    def _status(self, folder: RunFolder, census: Census | None = None) -> RunStatus:
        folder.path.stat()
        claim = folder.taken()
        if claim is None:
            return RunStatus(RunState.QUEUED)
        # An exit record is trusted only once the supervisor is gone: the job could have forged it.
        if self._is_running(folder, claim):
            return RunStatus(RunState.RUNNING)
        ended = _as_exit(orphaned_processes.conclude(folder, claim, census))
        if ended.reason == "lost":
            _log.warning("supervisor lost", run=folder.key)
        self._ended[folder.key] = ended
        launch.remove_tree(folder.temporary)
        self._warned.discard(folder.key)
        return RunStatus(RunState.ENDED, ended)

    def _is_running(self, folder: RunFolder, claim: FolderClaim) -> bool:
        process = procfs.find(claim.owner)
        if process is None:
            return False
        if process.state in "Tt":
            # A job may SIGSTOP its supervisor to exceed its walltime.
            procfs.send(claim.owner, signal.SIGCONT)
        if _is_overdue(folder, claim):
            self._kill_run(folder, claim, "walltime")
            return False
        return True

    # -- ending

    def extend(self, key: str, walltime: int) -> None:
        """Set the walltime, in seconds from the start.

        Raises:
            NotFoundError: There is no such run.
        """
        folder = self.folder(key)
        self._require(folder)
        with self._control:
            folder.set_control(walltime=walltime)

    def request_cancel(self, key: str) -> bool:
        """Request the cancellation of a run; returns True when the caller must wait for its end."""
        folder = self.folder(key)
        if not self._exists(folder):
            owner = orphaned_processes.supervisor_of(folder)
            if owner is not None:
                procfs.send(owner, signal.SIGTERM)
            return owner is not None
        if folder.taken() is None:
            self._withdraw(folder)
        if self._status(folder).state is RunState.ENDED:
            return False
        with self._control:
            folder.set_control(cancel=True)
        return True

    def force_cancel(self, key: str) -> None:
        """Kill the run without its supervisor."""
        folder = self.folder(key)
        claim = folder.taken() if self._exists(folder) else None
        if claim is not None:
            self._kill_run(folder, claim, "cancelled")

    def forget(self, key: str) -> None:
        """Remove an ended run.

        Raises:
            ExecutorError: The run has not ended.
        """
        folder = self.folder(key)
        if not self._exists(folder):
            return
        if self.poll(key).state is not RunState.ENDED:
            raise ExecutorError(f"Run {key} has not ended", hint="Cancel it first.")
        self._remove(folder)

    def _kill_run(self, folder: RunFolder, claim: FolderClaim, reason: str) -> None:
        _log.warning("supervisor timed out", run=folder.key, reason=reason)
        orphaned_processes.take_down(folder, claim, reason)

    def _remove(self, folder: RunFolder) -> None:
        trash = self.path / f".gone-{unique()}"
        folder.path.rename(trash)
        self._ended.pop(folder.key, None)
        launch.remove_tree(trash)

    def _sweep(self) -> None:
        """Remove folders that were never completed or only partly removed."""
        for entry in os.scandir(self.path):
            is_stale = time.time() - entry.stat(follow_symlinks=False).st_mtime > _STALE
            is_temporary = entry.name.startswith((".gone-", launch.PROBE_PREFIX))
            if is_temporary or (entry.name.startswith(".new-") and is_stale):
                launch.remove_tree(Path(entry.path))

    # -- helpers

    def _exists(self, folder: RunFolder) -> bool:
        """Return whether the run has a folder; raises if the parent folder can't be read."""
        try:
            folder.path.stat()
        except FileNotFoundError:
            self.path.stat()
            return False
        return True

    def _require(self, folder: RunFolder) -> None:
        if not self._exists(folder):
            raise NotFoundError(f"There is no run {folder.key} on this machine")

    def _reap(self) -> None:
        for key, child in list(self._children.items()):
            if child.ended:
                self._children.pop(key, None)

    def _warn(self, name: str, error: Exception) -> None:
        if name not in self._warned:
            self._warned.add(name)
            _log.warning("run status unknown", run=name, error=str(error))


def _is_overdue(folder: RunFolder, claim: FolderClaim) -> bool:
    try:
        walltime = float(folder.control()["walltime"])
    except (OSError, KeyError, TypeError, ValueError):
        return False  # damaged by the job; the supervisor has its limits in memory
    return time.monotonic() - claim.since > walltime + GRACE + HUNG


def _as_exit(record: Mapping[str, Any]) -> Exit:
    try:
        return Exit(
            code=int(record["code"]),
            reason=str(record["reason"]),
            seconds=int(record["seconds"]),
            started_at=float(record["started_at"]),
            ended_at=float(record["ended_at"]),
        )
    except (KeyError, TypeError, ValueError, OverflowError):
        raise OSError("the exit record is damaged") from None
