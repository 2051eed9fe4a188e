"""Runs jobs as processes of this machine, each in a folder, group and session of its own.

A run belongs to a small supervisor process, not to the daemon: the daemon may be killed and come
back, and finds everything in `<state_dir>/runs/<key>/`. Where bubblewrap is installed, runs are in a
sandbox and see neither each other nor the daemon; without it they are plain processes of this user
and can read what it can read.
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
from deepsquare_chain.executors.gpus import device_names
from deepsquare_chain.executors.isolation import LocalOptions, isolate, local_checks
from deepsquare_chain.executors.orphaned_processes import StubbornError
from deepsquare_chain.executors.rundir import GRACE, OUTPUT_LIMIT
from deepsquare_chain.executors.runs import HUNG, Runs
from deepsquare_chain.executors.sandbox import Isolation, parse_options
from deepsquare_chain.executors.startprobe import StartProbe
from deepsquare_chain.executors.threads import in_thread
from deepsquare_chain.job import Offer
from deepsquare_chain.observability.probe import Check

_START_PATIENCE: Final = 60.0  # seconds for a supervisor to take its run on a busy machine
#: Seconds between two looks whether a supervisor took its run: at least, and at most.
_MOMENT: Final = 0.01
_LISTEN: Final = 1.0
T = TypeVar("T")


class LocalExecutor(Executor):
    """Executor of one machine.

    Args:
        state_dir: Folder of the daemon; runs stand in `runs/` below it.
        offer: Cpus, memory (MB) and gpus that runs may take together; may be changed any time.
        min_free: MB that must be free on the disk before anything is called free.
        isolation: How runs are kept apart from the machine; None for plain processes.

    Raises:
        ExecutorUnavailableError: The folder can't be made or read.
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
        with _typed(self._path):
            self._runs = Runs(self._path, isolation)
        self._probe = StartProbe(self._path, self._runs.fork_server, isolation)

    async def submit(self, spec: RunSpec) -> str:
        """Start the run and return its handle; a known key is adopted, never run twice.

        Raises:
            RunRefusedError: The specification can't be run.
            ExecutorUnavailableError: It could not be started now. Either nothing of it is left,
                or the next submit of the same key takes it up.
        """
        check_spec(spec)
        try:
            return await self._start(spec)
        except ExecutorUnavailableError:
            self._probe.doubt()
            raise

    async def _start(self, spec: RunSpec) -> str:
        taken = await self._call(self._runs.begin, spec, device_names(self.offer.gpus))
        deadline = time.monotonic() + _START_PATIENCE
        while not taken:
            if time.monotonic() > deadline:
                raise ExecutorUnavailableError(
                    f"Run {spec.key} did not start in {_START_PATIENCE:.0f} seconds",
                    hint="The machine is overloaded; submit it again later.",
                )
            await self._heard(spec.key)
            taken = await self._call(self._runs.taken, spec.key)
        return spec.key

    async def _heard(self, key: str) -> None:
        """Wait until a supervisor that is starting says something; not for long."""
        await asyncio.sleep(_MOMENT)
        voice = self._runs.voice(key)
        if voice is None:
            return
        loop, heard = asyncio.get_running_loop(), asyncio.Event()
        try:
            loop.add_reader(voice, heard.set)
        except OSError:
            return  # another submission of this key has heard it and closed the descriptor
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(heard.wait(), _LISTEN)
        finally:
            loop.remove_reader(voice)

    async def find(self, key: str) -> str | None:
        """Handle of the run with this key, None when it surely never began here."""
        return key if await self._call(self._runs.begun, check_key(key)) else None

    async def poll(self, handles: Iterable[str]) -> dict[str, RunStatus]:
        """Status of each handle.

        QUEUED is a run that no supervisor took: submit it again. UNKNOWN is one whose folder is
        missing or can't be read.
        """
        found = await self._call(self._runs.poll_all, list(handles))
        if any(
            each.exit is not None and each.exit.reason == "unstarted" for each in found.values()
        ):
            self._probe.doubt()
        return found

    async def cancel(self, handle: str) -> None:
        """End the run; returns when its processes are gone. An ended or unknown run is no error.

        Raises:
            ExecutorUnavailableError: The folder can't be used, or processes do not go away.
        """
        pending = await self._call(self._runs.ask_cancel, check_key(handle))
        deadline = time.monotonic() + GRACE + HUNG
        while pending:
            await asyncio.sleep(0.03)
            if time.monotonic() > deadline:
                await self._call(self._runs.force_cancel, handle)
                deadline = time.monotonic() + GRACE + HUNG
            pending = await self._call(self._runs.is_live, handle)

    async def extend(self, handle: str, walltime: int) -> None:
        """Give the run `walltime` seconds in all, counted from its start.

        Raises:
            NotFoundError: No such run.
            RunRefusedError: The walltime is out of range.
        """
        if not 1 <= walltime <= MAX_WALLTIME:
            raise RunRefusedError(f"Run {handle}: a walltime of {walltime} seconds is out of range")
        await self._call(self._runs.extend, check_key(handle), walltime)

    async def capacity(self) -> Offer:
        """Cpus, memory (MB) and gpus that are free: the offer minus every live run.

        Nothing is free while the disk is nearly full or a run's needs can't be read.
        """
        offer = replace(self.offer, gpus=len(device_names(self.offer.gpus)))
        return await self._call(self._runs.free, offer, self._min_free)

    async def fault(self) -> str:
        """Why no run can be started here now, in words; empty when nothing speaks against it."""
        return await self._call(self._probe.fault)

    async def output(self, handle: str, offset: int = 0, limit: int = 65536) -> bytes:
        """Up to `limit` bytes, from byte `offset`, of what the run printed, both streams.

        Of a long output the middle is left out, in the place of a note. While the run goes on,
        what is kept of it changes; afterwards it stays as it is.

        Raises:
            NotFoundError: No such run.
        """
        span = max(0, offset), max(0, min(limit, OUTPUT_LIMIT))
        return await self._call(self._runs.output, check_key(handle), *span)

    def folder(self, handle: str) -> Path:
        """The folder of a run, whether it is there or not."""
        return self._path / check_key(handle)

    async def keys(self) -> list[str]:
        """Every run that has a folder, live or ended."""
        return await self._call(self._runs.keys)

    async def stored(self, handle: str) -> Stored | None:
        """The disk that a run's folder takes; None where it has none."""
        return await self._call(stored_in, self._runs.folder(check_key(handle)).path)

    async def forget(self, handle: str) -> None:
        """Remove an ended run with all that it left; nothing remembers its key any more.

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
    except (OSError, StubbornError) as error:
        raise unavailable("local", path, error) from error


async def examine(context: ExecutorContext) -> list[Check]:
    """How jobs of this machine would be isolated; nothing is changed.

    Raises:
        UsageError: An option is wrong.
    """
    options = parse_options("local", LocalOptions, context.options)
    return await asyncio.to_thread(local_checks, options, context)


def create(context: ExecutorContext) -> LocalExecutor:
    """The executor as settings describe it: entry point `local` of `deepsquare.executors`.

    Raises:
        UsageError: An option is wrong, or jobs would not be isolated and that is not allowed.
        ExecutorUnavailableError: Its folder can't be made.
    """
    options = parse_options("local", LocalOptions, context.options)
    isolation = isolate(options, context)
    return LocalExecutor(
        context.state_dir, context.capacity, min_free=context.min_free, isolation=isolation
    )
