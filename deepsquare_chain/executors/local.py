"""Runs jobs as processes of this machine, each in its own folder, process group and session.

Each run is the child of a small supervisor process, not of the daemon: after a restart the daemon
restores the state from `<state_dir>/runs/<key>/`. Where bubblewrap is installed, runs are isolated
from each other and from the daemon in a sandbox; without it they are plain processes of this user,
with the same read permissions.

`Runs` manages the run folders and blocks; `LocalExecutor` calls it in threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, TypeVar

from deepsquare_chain.errors import NotFoundError
from deepsquare_chain.executors import launch, orphaned_processes, procfs
from deepsquare_chain.executors.base import (
    Executor,
    ExecutorContext,
    ExecutorError,
    ExecutorUnavailableError,
    Exit,
    RunRefusedError,
    RunSpec,
    RunState,
    RunStatus,
    Stored,
    check_key,
    check_spec,
    check_walltime,
    run_keys,
    stored_in,
    unavailable,
)
from deepsquare_chain.executors.isolation import LocalOptions, isolate, local_checks
from deepsquare_chain.executors.launch import (
    Launched,
    StartProbe,
    device_names,
    free_devices,
    in_thread,
)
from deepsquare_chain.executors.orphaned_processes import Census, UnkillableError
from deepsquare_chain.executors.procfs import Identity
from deepsquare_chain.executors.rundir import (
    GRACE,
    OUTPUT_LIMIT,
    FolderClaim,
    RunFolder,
    finite_number,
    read_bytes,
    read_kept,
)
from deepsquare_chain.executors.sandbox import EtcCopy, Isolation, parse_options
from deepsquare_chain.faults import crash_point
from deepsquare_chain.job import MEGABYTE, Offer
from deepsquare_chain.observability import get_logger
from deepsquare_chain.observability.metrics import Check

HUNG: Final = 8.0  # seconds beyond the grace after which a supervisor counts as hung
_STALE: Final = 3600.0  # seconds after which an incomplete folder counts as abandoned
_START_TIMEOUT: Final = 60.0  # seconds for a supervisor to claim its run on a busy machine
#: Minimum and maximum seconds between two checks whether a supervisor claimed its run.
_MIN_CHECK_INTERVAL: Final = 0.01
_MAX_CHECK_INTERVAL: Final = 1.0
T = TypeVar("T")
_log = get_logger(__name__)


class Runs:
    """The runs below one folder, which is created if needed.

    Without `isolation`, new runs are plain processes.
    """

    def __init__(self, path: Path, isolation: Isolation | None = None) -> None:
        self.path = path
        self._isolation = isolation
        self._starting: dict[str, Launched] = {}
        self._children: dict[str, Launched] = {}
        self._ended: dict[str, Exit] = {}
        self._warned: set[str] = set()
        self._control_lock = threading.Lock()
        self._allocation_lock = threading.Lock()
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
        with self._allocation_lock:
            if not folder.exists():
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
        except (KeyError, TypeError, ValueError, OverflowError):
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
        return folder.exists() and folder.taken() is not None

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
        if not folder.exists():
            return orphaned_processes.supervisor_of(folder) is not None
        return self._status(folder).state is not RunState.ENDED

    def output(self, key: str, offset: int, limit: int) -> bytes:
        """Return a part of the run's output; for a live run, of the output kept so far.

        Raises:
            NotFoundError: There is no such run.
        """
        return read_kept(self._existing(key).output, offset, limit)

    def keys(self) -> list[str]:
        """Return the keys of all run folders."""
        return run_keys(self.path)

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
            except (OSError, KeyError, TypeError, ValueError, OverflowError) as error:
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
        is_recorded = (folder.path / "exit.json").exists()
        ended = Exit.from_record(orphaned_processes.conclude(folder, claim, census))
        if ended.reason == "lost" and not is_recorded:
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
        folder = self._existing(key)
        with self._control_lock:
            folder.set_control(walltime=walltime)

    def request_cancel(self, key: str) -> bool:
        """Request the cancellation of a run; returns True when the caller must wait for its end."""
        folder = self.folder(key)
        if not folder.exists():
            owner = orphaned_processes.supervisor_of(folder)
            if owner is not None:
                procfs.send(owner, signal.SIGTERM)
            return owner is not None
        if folder.taken() is None:
            self._withdraw(folder)
        if self._status(folder).state is RunState.ENDED:
            return False
        with self._control_lock:
            folder.set_control(cancel=True)
        return True

    def force_cancel(self, key: str) -> None:
        """Kill the run without its supervisor."""
        folder = self.folder(key)
        claim = folder.taken() if folder.exists() else None
        if claim is not None:
            self._kill_run(folder, claim, "cancelled")

    def forget(self, key: str) -> None:
        """Remove an ended run.

        Raises:
            ExecutorError: The run has not ended.
        """
        folder = self.folder(key)
        if not folder.exists():
            return
        if self.poll(key).state is not RunState.ENDED:
            raise ExecutorError(f"Run {key} has not ended", hint="Cancel it first.")
        self._remove(folder)

    def _kill_run(self, folder: RunFolder, claim: FolderClaim, reason: str) -> None:
        _log.warning("supervisor timed out", run=folder.key, reason=reason)
        orphaned_processes.take_down(folder, claim, reason)

    def _remove(self, folder: RunFolder) -> None:
        trash = launch.move_to_trash(folder)
        self._ended.pop(folder.key, None)
        launch.remove_tree(trash)

    def _sweep(self) -> None:
        """Remove the folders of incomplete, partly removed and probed runs."""
        for entry in os.scandir(self.path):
            is_stale = time.time() - entry.stat(follow_symlinks=False).st_mtime > _STALE
            is_temporary = entry.name.startswith((launch.TRASH_PREFIX, launch.PROBE_PREFIX))
            if is_temporary or (entry.name.startswith(launch.NEW_PREFIX) and is_stale):
                launch.remove_tree(Path(entry.path))

    # -- helpers

    def _existing(self, key: str) -> RunFolder:
        """Return the folder of a run that exists.

        Raises:
            NotFoundError: There is no such run.
        """
        folder = self.folder(key)
        if not folder.exists():
            raise NotFoundError(f"There is no run {key} on this machine")
        return folder

    def _reap(self) -> None:
        for key, child in list(self._children.items()):
            if child.ended:
                self._children.pop(key, None)

    def _warn(self, name: str, error: Exception) -> None:
        if name not in self._warned:
            self._warned.add(name)
            _log.warning("run status unknown", run=name, error=str(error))


def _is_overdue(folder: RunFolder, claim: FolderClaim) -> bool:
    """Return whether a supervisor did not end its run at the walltime, and therefore hangs."""
    try:
        walltime = finite_number(folder.control(), "walltime")
    except OSError:
        return False  # damaged by the job; the supervisor has its limits in memory
    return time.monotonic() - claim.since > walltime + GRACE + HUNG


class LocalExecutor(Executor):
    """Executor of one machine; `Executor` documents the methods.

    Args:
        state_dir: State folder of the daemon; runs are stored in `runs/` below it, and in `etc/` the
            copy of /etc that jobs see.
        offer: Total CPUs, memory (MB) and GPUs of all runs; may be changed at any time.
        min_free: MB of free disk below which no capacity counts as free.
        isolation: Isolation of runs; None for plain processes.

    Raises:
        ExecutorUnavailableError: The folder can't be created or read.
    """

    queues = False

    def __init__(
        self,
        state_dir: Path,
        offer: Offer,
        *,
        min_free: int = 64,
        isolation: Isolation | None = None,
    ) -> None:
        self.offer = offer
        self._min_free = min_free
        self._path = Path(os.path.abspath(state_dir)) / "runs"
        if isolation is not None and isolation.sandbox is not None:
            isolation = replace(isolation, etc=EtcCopy(self._path.with_name("etc")))
        with _typed(self._path):
            self._runs = Runs(self._path, isolation)
        self._probe = StartProbe(self._path, self._runs.fork_server, isolation)

    async def submit(self, spec: RunSpec) -> str:
        """After an error, nothing of the run is left, or the next submit of its key continues it."""
        check_spec(spec)
        try:
            return await self._start(spec)
        except ExecutorUnavailableError:
            self._probe.invalidate()
            raise

    async def _start(self, spec: RunSpec) -> str:
        claimed = await self._call(self._runs.begin, spec, device_names(self.offer.gpus))
        deadline = time.monotonic() + _START_TIMEOUT
        while not claimed:
            if time.monotonic() > deadline:
                raise ExecutorUnavailableError(
                    f"Run {spec.key} did not start in {_START_TIMEOUT:.0f} seconds",
                    hint="The machine is overloaded; the run is submitted again later.",
                )
            await self._wait_for_report(spec.key)
            claimed = await self._call(self._runs.taken, spec.key)
        return spec.key

    async def _wait_for_report(self, key: str) -> None:
        """Wait until a starting supervisor reports, at most `_MAX_CHECK_INTERVAL` seconds."""
        await asyncio.sleep(_MIN_CHECK_INTERVAL)
        report_pipe = self._runs.report_pipe(key)
        if report_pipe is None:
            return
        loop, readable = asyncio.get_running_loop(), asyncio.Event()
        try:
            loop.add_reader(report_pipe, readable.set)
        except OSError:
            return  # another submission of this key has read it and closed the descriptor
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(readable.wait(), _MAX_CHECK_INTERVAL)
        finally:
            loop.remove_reader(report_pipe)

    async def find(self, key: str) -> str | None:
        return key if await self._call(self._runs.has_begun, check_key(key)) else None

    async def poll(self, handles: Iterable[str]) -> dict[str, RunStatus]:
        """QUEUED is a run that no supervisor claimed: submit it again."""
        statuses = await self._call(self._runs.poll_all, list(handles))
        ends = [status.exit for status in statuses.values()]
        if any(ended is not None and ended.reason == "unstarted" for ended in ends):
            self._probe.invalidate()
        return statuses

    async def cancel(self, handle: str) -> None:
        pending = await self._call(self._runs.request_cancel, check_key(handle))
        deadline = time.monotonic() + GRACE + HUNG
        while pending:
            await asyncio.sleep(0.03)
            if time.monotonic() > deadline:
                await self._call(self._runs.force_cancel, handle)
                deadline = time.monotonic() + GRACE + HUNG
            pending = await self._call(self._runs.is_live, handle)

    async def extend(self, handle: str, walltime: int) -> None:
        check_walltime(handle, walltime)
        await self._call(self._runs.extend, check_key(handle), walltime)

    async def capacity(self) -> Offer:
        """Nothing is free while the disk is nearly full or a run's resources can't be read."""
        offer = replace(self.offer, gpus=len(device_names(self.offer.gpus)))
        return await self._call(self._runs.free, offer, self._min_free)

    async def fault(self) -> str:
        return await self._call(self._probe.fault)

    async def output(self, handle: str, offset: int = 0, limit: int = 65536) -> bytes:
        span = max(0, offset), max(0, min(limit, OUTPUT_LIMIT))
        return await self._call(self._runs.output, check_key(handle), *span)

    def folder(self, handle: str) -> Path:
        return self._path / check_key(handle)

    async def keys(self) -> list[str]:
        return await self._call(self._runs.keys)

    async def stored(self, handle: str) -> Stored | None:
        return await self._call(stored_in, self.folder(handle))

    async def forget(self, handle: str) -> None:
        await self._call(self._runs.forget, check_key(handle))

    async def _call(self, work: Callable[..., T], *arguments: object) -> T:
        def typed() -> T:
            with _typed(self._path):
                return work(*arguments)

        return await in_thread(typed)


@contextlib.contextmanager
def _typed(path: Path) -> Iterator[None]:
    """Convert errors of the runs below a folder to `ExecutorUnavailableError`."""
    try:
        yield
    except (OSError, UnkillableError) as error:
        raise unavailable("local", path, error) from error


async def examine(context: ExecutorContext) -> list[Check]:
    """Check the isolation of jobs on this machine; read-only.

    Raises:
        UsageError: An option is invalid.
    """
    options = parse_options("local", LocalOptions, context.options)
    return await asyncio.to_thread(local_checks, options, context)


def create(context: ExecutorContext) -> LocalExecutor:
    """Create the executor from settings: entry point `local` of `deepsquare.executors`.

    Raises:
        UsageError: An option is invalid, or jobs would run without isolation, which is not
            allowed.
        ExecutorUnavailableError: The folder can't be created.
    """
    options = parse_options("local", LocalOptions, context.options)
    isolation = isolate(options, context)
    return LocalExecutor(
        context.state_dir, context.capacity, min_free=context.min_free, isolation=isolation
    )
