"""Runs jobs as processes of this machine, each in its own folder, process group and session.

Each run is the child of a small supervisor process, not of the daemon: after a restart the daemon
restores the state from `<state_dir>/runs/<key>/`. Where bubblewrap is installed, runs are isolated
from each other and from the daemon in a sandbox; without it they are plain processes of this user,
with the same read permissions.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final, TypeVar

from deepsquare_chain.executors.base import (
    MAX_WALLTIME,
    Executor,
    ExecutorContext,
    ExecutorUnavailableError,
    RunRefusedError,
    RunSpec,
    RunStatus,
    Stored,
    check_key,
    check_spec,
    stored_in,
    unavailable,
)
from deepsquare_chain.executors.isolation import LocalOptions, isolate, local_checks
from deepsquare_chain.executors.launch import StartProbe, device_names, in_thread
from deepsquare_chain.executors.orphaned_processes import UnkillableError
from deepsquare_chain.executors.rundir import GRACE, OUTPUT_LIMIT
from deepsquare_chain.executors.runs import HUNG, Runs
from deepsquare_chain.executors.sandbox import EtcCopy, Isolation, parse_options
from deepsquare_chain.job import Offer
from deepsquare_chain.observability.metrics import Check

_START_PATIENCE: Final = 60.0  # seconds for a supervisor to claim its run on a busy machine
#: Minimum and maximum seconds between two checks whether a supervisor claimed its run.
_MOMENT: Final = 0.01
_LISTEN: Final = 1.0
T = TypeVar("T")


class LocalExecutor(Executor):
    """Executor of one machine.

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
        """Start the run and return its handle; idempotent: an existing key is adopted.

        Raises:
            RunRefusedError: The specification can't be run.
            ExecutorUnavailableError: The run could not be started now. Either nothing of it is
                left, or the next submit of the same key continues it.
        """
        check_spec(spec)
        try:
            return await self._start(spec)
        except ExecutorUnavailableError:
            self._probe.invalidate()
            raise

    async def _start(self, spec: RunSpec) -> str:
        claimed = await self._call(self._runs.begin, spec, device_names(self.offer.gpus))
        deadline = time.monotonic() + _START_PATIENCE
        while not claimed:
            if time.monotonic() > deadline:
                raise ExecutorUnavailableError(
                    f"Run {spec.key} did not start in {_START_PATIENCE:.0f} seconds",
                    hint="The machine is overloaded; the run is submitted again later.",
                )
            await self._wait_for_report(spec.key)
            claimed = await self._call(self._runs.taken, spec.key)
        return spec.key

    async def _wait_for_report(self, key: str) -> None:
        """Wait until a starting supervisor reports something, at most `_LISTEN` seconds."""
        await asyncio.sleep(_MOMENT)
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
                await asyncio.wait_for(readable.wait(), _LISTEN)
        finally:
            loop.remove_reader(report_pipe)

    async def find(self, key: str) -> str | None:
        """Return the handle of the run with this key; None if it certainly never began here."""
        return key if await self._call(self._runs.has_begun, check_key(key)) else None

    async def poll(self, handles: Iterable[str]) -> dict[str, RunStatus]:
        """Return the status of each handle.

        QUEUED is a run that no supervisor claimed: submit it again. UNKNOWN is a run whose folder
        is missing or can't be read.
        """
        statuses = await self._call(self._runs.poll_all, list(handles))
        if any(
            status.exit is not None and status.exit.reason == "unstarted"
            for status in statuses.values()
        ):
            self._probe.invalidate()
        return statuses

    async def cancel(self, handle: str) -> None:
        """Cancel the run and wait for the end of its processes.

        An ended or unknown run is no error.

        Raises:
            ExecutorUnavailableError: The folder can't be used, or processes can't be killed.
        """
        pending = await self._call(self._runs.request_cancel, check_key(handle))
        deadline = time.monotonic() + GRACE + HUNG
        while pending:
            await asyncio.sleep(0.03)
            if time.monotonic() > deadline:
                await self._call(self._runs.force_cancel, handle)
                deadline = time.monotonic() + GRACE + HUNG
            pending = await self._call(self._runs.is_live, handle)

    async def extend(self, handle: str, walltime: int) -> None:
        """Set the total time limit of the run to `walltime` seconds from its start.

        Raises:
            NotFoundError: There is no such run.
            RunRefusedError: The walltime is out of range.
        """
        if not 1 <= walltime <= MAX_WALLTIME:
            raise RunRefusedError(f"Run {handle}: a walltime of {walltime} seconds is out of range")
        await self._call(self._runs.extend, check_key(handle), walltime)

    async def capacity(self) -> Offer:
        """Return the free CPUs, memory (MB) and GPUs: the offer minus all live runs.

        Nothing is free while the disk is nearly full or a run's resources can't be read.
        """
        offer = replace(self.offer, gpus=len(device_names(self.offer.gpus)))
        return await self._call(self._runs.free, offer, self._min_free)

    async def fault(self) -> str:
        """Return why no run can be started now; empty when there is no known fault."""
        return await self._call(self._probe.fault)

    async def output(self, handle: str, offset: int = 0, limit: int = 65536) -> bytes:
        """Return up to `limit` bytes of the run's output (both streams), from byte `offset`.

        The middle of a long output is replaced by a note. The kept output changes while the run
        is alive; afterwards it is final.

        Raises:
            NotFoundError: There is no such run.
        """
        span = max(0, offset), max(0, min(limit, OUTPUT_LIMIT))
        return await self._call(self._runs.output, check_key(handle), *span)

    def folder(self, handle: str) -> Path:
        """Return the path of a run's folder, which may not exist."""
        return self._path / check_key(handle)

    async def keys(self) -> list[str]:
        """Return the keys of all runs that have a folder, live or ended."""
        return await self._call(self._runs.keys)

    async def stored(self, handle: str) -> Stored | None:
        """Return the disk usage of a run's folder; None if there is none."""
        return await self._call(stored_in, self._runs.folder(check_key(handle)).path)

    async def forget(self, handle: str) -> None:
        """Delete an ended run with all its files and its key.

        Raises:
            ExecutorError: The run has not ended.
        """
        await self._call(self._runs.forget, check_key(handle))

    async def _call(self, work: Callable[..., T], *arguments: object) -> T:
        def typed() -> T:
            with _typed(self._path):
                return work(*arguments)

        return await in_thread(typed)


@contextlib.contextmanager
def _typed(path: Path) -> Iterator[None]:
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
