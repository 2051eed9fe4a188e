"""Executor work of one cycle: submit, adopt, extend, cancel, write down how runs ended.

Each step is written before or right after it is done, in the order that lets a kill between any
two of them neither repeat nor lose a run.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections import deque
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping
from typing import Any, Final

from deepsquare_chain.chain.rpc.batching import gather_all
from deepsquare_chain.daemon.background import BackgroundTasks
from deepsquare_chain.errors import GridError, NotFoundError
from deepsquare_chain.executors.base import (
    Executor,
    ExecutorUnavailableError,
    RunRefusedError,
    RunSpec,
    RunState,
)
from deepsquare_chain.faults import crash_point
from deepsquare_chain.job import Job
from deepsquare_chain.observability import get_logger
from deepsquare_chain.provider import run_transitions
from deepsquare_chain.provider.definition_cache import DefinitionCache
from deepsquare_chain.provider.model import (
    Action,
    Adopt,
    Cancel,
    Close,
    Extend,
    Phase,
    RecordEnd,
    Release,
    Run,
    Submit,
    View,
)
from deepsquare_chain.provider.state import RunTable
from deepsquare_chain.workflow import Definition, ExecutionSite, render_script
from deepsquare_chain.workflow.abilities import needed_abilities

#: Seconds between two looks whether a cycle has something better to do.
_TICK: Final = 0.05


class LaunchQueue:
    """Starts a few runs at a time, so that other work does not wait for many processes.

    A slow start continues in the background; later cycles skip its job until it ends.

    Args:
        start: Begins one run; True when the executor has it.
        at_once: Most starts on their way.
    """

    def __init__(
        self, start: Callable[[View, Submit], Coroutine[Any, Any, bool]], *, at_once: int
    ) -> None:
        self._start = start
        self._at_once = at_once
        self._tasks = BackgroundTasks()

    @property
    def jobs(self) -> frozenset[int]:
        """Jobs whose start is on its way, or ended since `begin` looked last."""
        return self._tasks.jobs

    async def begin(self, wanted: Iterable[tuple[View, Submit]], enough: Callable[[], bool]) -> int:
        """Start what finds a place until it is enough; returns how many runs the executor got.

        What found no place is for the next cycle to plan again.
        """
        queue, done = deque(wanted), self._tasks.collect()
        while True:
            while queue and len(self._tasks) < self._at_once:
                view, action = queue.popleft()
                self._tasks.begin(self._start(view, action), [view.job.id])
            if not self._tasks or enough():
                return done
            await self._tasks.wait(_TICK, first=True)
            done += self._tasks.collect()

    async def end(self) -> None:
        """Wait for what is on its way."""
        await self._tasks.wait()
        self._tasks.collect()


_AT_ONCE: Final = 8
#: Seconds of a cycle that starts may take even when nothing else is waited for.
_STARTING: Final = 0.3
_PAGE: Final = 65536
_log = get_logger(__name__)


class ExecutorActions:
    """Carries out what concerns the executor and the database.

    Args:
        executor: Where jobs run.
        table: Rows of this provider.
        materials: Definitions that were checked.
        env: Variables that every job gets, such as the chain's id.
        abilities: Tells what jobs can do here, as it was tested last; None before it was.
    """

    def __init__(
        self,
        executor: Executor,
        table: RunTable,
        materials: DefinitionCache,
        env: Mapping[str, str],
        *,
        abilities: Callable[[], frozenset[str] | None] = frozenset,
    ) -> None:
        self._abilities = abilities
        self._executor = executor
        self._table = table
        self._materials = materials
        self._env = dict(env)
        self._gate = asyncio.Semaphore(_AT_ONCE)
        # More processes at once than cpus would only take their time from claims and reports.
        cpus = len(os.sched_getaffinity(0))
        at_once = _AT_ONCE if executor.queues else min(_AT_ONCE, cpus)
        self._starts = LaunchQueue(self._try, at_once=at_once)

    @property
    def starting(self) -> frozenset[int]:
        """Jobs that are left alone, because their start is on its way."""
        return self._starts.jobs

    async def carry_out(
        self,
        planned: Collection[tuple[View, Action]],
        waited_for: Callable[[], bool] = lambda: True,
    ) -> int:
        """Do everything that is no transaction; returns how much was done.

        Starting processes takes its time: claims and reports do not wait for it. After a while
        the next cycle may come, which plans again what was not begun. `waited_for` says whether
        this cycle has nothing else to wait for.
        """
        began = time.monotonic()
        submits = [(view, action) for view, action in planned if isinstance(action, Submit)]
        others = [each for each in planned if not isinstance(each[1], Submit)]

        def enough() -> bool:
            return time.monotonic() >= began + _STARTING and waited_for()

        done = await gather_all(
            self._starts.begin(submits, enough), *(self._one(*each) for each in others)
        )
        return sum(done)

    async def close(self) -> None:
        """Wait for the starts that are on their way."""
        await self._starts.end()

    async def _one(self, view: View, action: Action) -> bool:
        async with self._gate:
            return await self._try(view, action)

    async def _try(self, view: View, action: Action) -> bool:
        try:
            return await self._do(view, action)
        except GridError as error:
            # One job's trouble is not the others': the next cycle sees what became of it.
            what = type(action).__name__
            _log.warning("not done", what=what, job=view.job.id, error=error.message)
            return False

    async def _do(self, view: View, action: Action) -> bool:
        match action:
            case Submit():
                await self._submit(view, action)
            case Adopt():
                _log.info("adopted", job=view.job.id, run=action.handle)
                self._table.put(run_transitions.submitted(view.run, action.handle), durable=False)
            case Extend():
                return await self._extend(view, action)
            case Cancel():
                await self._cancel(view, action)
            case RecordEnd():
                await self._record_end(view, action)
            case Release():
                await self._make_sure(view)
                attempt = view.run.attempt + 1
                self._table.put(
                    run_transitions.released(view.run, self._table.key(view.job.id, attempt))
                )
            case Close():
                await self._make_sure(view)
                # The chain says again that it is over.
                self._table.put(run_transitions.closed(view.run), durable=False)
            case _:
                return False
        return True

    async def _submit(self, view: View, action: Submit) -> None:
        definition = self._materials.definition(view.job)
        if definition is None:
            return  # pushed out of memory meanwhile; fetched again in the next cycle
        site = self._site(definition)
        run = run_transitions.submitting(view.run, action)
        crash_point("provider.submit.planned")
        if definition.recipients:  # known before anything is printed that must be encrypted
            self._table.set_recipients(run.key, definition.recipients)
        self._table.put(run)
        crash_point("provider.submit.intended")
        try:
            spec = RunSpec(
                key=run.key,
                script=render_script(definition, self._job_env(view.job), site),
                resources=view.job.resources,
                walltime=action.walltime,
                env={},
                comment=self._table.comment(view.job.id),
            )
            handle = await self._executor.submit(spec)
        except (RunRefusedError, ValueError) as error:
            _log.warning("run refused", job=view.job.id, error=str(error))
            self._table.put(run_transitions.refused(run, str(error)))
            return
        crash_point("provider.submit.taken")
        # A run may remove its own folder, so that only this row tells that it began.
        self._table.put(run_transitions.submitted(run, handle))
        crash_point("provider.submit.recorded")
        _log.info("submitted", job=view.job.id, run=handle, walltime=action.walltime)

    async def _extend(self, view: View, action: Extend) -> bool:
        crash_point("provider.extend.planned")
        try:
            await self._executor.extend(_handle(view.run), action.walltime)
        except (NotFoundError, RunRefusedError) as error:
            _log.warning("not extended", job=view.job.id, error=str(error))
            return False
        crash_point("provider.extend.done")
        self._table.put(run_transitions.extended(view.run, action.allotment))
        _log.info("extended", job=view.job.id, walltime=action.walltime)
        return True

    async def _cancel(self, view: View, action: Cancel) -> None:
        _log.info("cancelling", job=view.job.id, why=action.why)
        crash_point("provider.cancel.planned")
        await self._executor.cancel(_handle(view.run))
        crash_point("provider.cancel.done")

    async def _make_sure(self, view: View) -> None:
        """Before a run is forgotten that the executor does not know: nothing of it may live."""
        unknown = view.status is None or view.status.state is RunState.UNKNOWN
        if view.run.phase in {Phase.SUBMITTING, Phase.SUBMITTED} and unknown:
            # A submit that was cut off may have left something that still holds capacity.
            await self._executor.cancel(view.run.handle or view.run.key)

    async def _record_end(self, view: View, action: RecordEnd) -> None:
        crash_point("provider.end.seen")
        result = await self._digest(_handle(view.run))
        self._table.put(run_transitions.ended(view.run, action.exit, result))
        crash_point("provider.end.recorded")
        ended = action.exit
        _log.info(
            "run ended", job=view.job.id, code=ended.code, why=ended.reason, seconds=ended.seconds
        )

    async def _digest(self, handle: str) -> bytes:
        """SHA-256 of the output that was kept; zeros where there is none left to read."""
        found = hashlib.sha256()
        offset = 0
        try:
            while page := await self._executor.output(handle, offset, _PAGE):
                found.update(page)
                offset += len(page)
        except NotFoundError:
            return bytes(32)
        return found.digest()

    def _site(self, definition: Definition) -> ExecutionSite:
        abilities = self._abilities()
        if abilities is None and needed_abilities(definition):
            raise ExecutorUnavailableError("What jobs can do here is not tested yet")
        return ExecutionSite(abilities or frozenset())

    def _job_env(self, job: Job) -> dict[str, str]:
        return {"USER": job.customer, **self._env, "DEEPSQUARE_JOB_ID": str(job.id)}


def _handle(run: Run) -> str:
    if run.handle is None:
        raise ExecutorUnavailableError(f"Job {run.job_id} has no run yet")
    return run.handle
