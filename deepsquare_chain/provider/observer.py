"""Reads the state of chain and executor, and combines it into one view per job.

The definition cache holds the definitions of these jobs, verified against the chain.
"""

from __future__ import annotations

import asyncio
import shutil
from collections import OrderedDict
from collections.abc import Awaitable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Final, TypeVar

from deepsquare_chain.chain.bindings.contracts import MetaSchedulerContract
from deepsquare_chain.chain.rpc.heads import Head
from deepsquare_chain.errors import GridError, JobFileError, NotFoundError
from deepsquare_chain.executors.base import (
    Executor,
    ExecutorUnavailableError,
    RunState,
    RunStatus,
)
from deepsquare_chain.job import MEGABYTE, Job, JobStatus, Offer, Resources
from deepsquare_chain.observability import get_logger
from deepsquare_chain.provider.model import (
    CachedDefinition,
    DefinitionState,
    Lookup,
    Phase,
    Run,
    View,
)
from deepsquare_chain.provider.state import RunTable
from deepsquare_chain.store.definitions import DefinitionMismatch, DefinitionStore
from deepsquare_chain.workflow import Definition, digest

T = TypeVar("T")
D = TypeVar("D")
_MAX_DEFINITIONS: Final = 256
_READY: Final = CachedDefinition(DefinitionState.READY)


class DefinitionCache:
    """A cache of definitions by digest; the responses of the store are verified.

    A store that takes longer than `timeout` seconds counts as unreachable.
    """

    def __init__(self, store: DefinitionStore, *, timeout: float = 5.0) -> None:
        self._store = store
        self._timeout = timeout
        self._definitions: OrderedDict[bytes, Definition | CachedDefinition] = OrderedDict()

    async def fetch(self, job: Job) -> CachedDefinition:
        """Fetch a job's definition if needed; returns whether it matches the job on chain."""
        cached = self._definitions.get(job.definition)
        if cached is None:
            cached = await self._fetch(job)
        if isinstance(cached, CachedDefinition):
            return cached
        if cached.resources != job.resources:
            required, paid = _describe(cached.resources), _describe(job.resources)
            reason = f"the definition requires {required} instead of {paid}"
            return CachedDefinition(DefinitionState.INVALID, reason)
        return _READY

    def definition(self, job: Job) -> Definition | None:
        """Return the definition of a job that was READY; None when it was evicted."""
        cached = self._definitions.get(job.definition)
        return cached if isinstance(cached, Definition) else None

    async def _fetch(self, job: Job) -> Definition | CachedDefinition:
        key = job.definition
        name = f"definition {key.hex()[:16]}"
        try:
            async with asyncio.timeout(self._timeout):
                data = await self._store.get(key, job.id)
        except NotFoundError:
            return CachedDefinition(DefinitionState.MISSING, f"{name} is not in the store")
        except DefinitionMismatch:
            return CachedDefinition(DefinitionState.MISSING, f"{name} does not match its digest")
        except (GridError, TimeoutError, OSError) as error:
            reason = f"{name} can't be fetched: {error}"
            return CachedDefinition(DefinitionState.UNREACHABLE, reason)
        if digest(data) != key:
            return CachedDefinition(DefinitionState.MISSING, f"{name} does not match its digest")
        definition: Definition | CachedDefinition
        try:
            definition = Definition.from_bytes(data)
        except JobFileError as error:
            definition = CachedDefinition(DefinitionState.INVALID, error.message)
        self._definitions[key] = definition
        while len(self._definitions) > _MAX_DEFINITIONS:
            self._definitions.popitem(last=False)
        return definition


def _describe(size: Resources) -> str:
    cpus = f"{size.tasks} x {size.cpus_per_task} CPUs"
    return f"{cpus}, {size.mem_per_cpu} MB per CPU, {size.gpus} GPUs"


_log = get_logger(__name__)


class RunObserver:
    """Reads chain, executor and definitions once per cycle; without an answer a field stays None.

    A state on chain needs `confirmations` before irreversible actions follow. `first_block` is the
    block of the deployment.
    """

    def __init__(
        self,
        scheduler: MetaSchedulerContract,
        executor: Executor,
        table: RunTable,
        definition_cache: DefinitionCache,
        *,
        provider_id: int,
        confirmations: int,
        first_block: int,
    ) -> None:
        self._scheduler = scheduler
        self._executor = executor
        self._table = table
        self._definition_cache = definition_cache
        self._provider_id = provider_id
        self._confirmations = confirmations
        self._first_block = first_block
        self._misses: dict[int, int] = {}
        self._unknown_runs: set[int] = set()
        self._swept_keys: set[str] = set()
        self._records_at = (b"", False)  # the head of the records
        self._known_records: dict[int, tuple[Job, Job]] = {}

    async def sweep(self) -> None:
        """Add run records for runs that the executor has and the database lacks."""
        for key in await self._executor.keys():
            parsed = None if key in self._swept_keys else self._table.parse_key(key)
            if parsed is None:
                continue
            job_id, attempt = parsed
            run = self._table.get(job_id)
            if run is not None and run.handle is not None:
                self._swept_keys.add(key)  # records are permanent: thousands are not read again
            if run is None or (run.handle is None and run.attempt < attempt):
                _log.info("unrecorded run detected", run=key)
                self._table.watch(job_id, attempt)
                self._unknown_runs.add(job_id)

    async def prepare(self, head: Head) -> None:
        """Fetch the records of known jobs ahead, while new events are read."""
        await self._records([row.job_id for row in self._table.open()], head)

    async def views(self, head: Head, *, followed: bool = True) -> list[View]:
        """Return one view, as of a block, for each job that is not closed.

        `followed`: all events up to that block are applied to the table.
        """
        runs = self._table.open()
        if not runs:
            return []
        handles = [run.handle for run in runs if _may_change(run)]
        polling = asyncio.ensure_future(self._poll(handles))
        try:
            records = await self._records([run.job_id for run in runs], head)
        finally:
            statuses = await polling
        placed_keys = await self._placed_keys(runs)
        collected = self._table.collected()
        views = [
            self._view(
                run,
                *records[run.job_id],
                statuses,
                placed=run.key in placed_keys,
                collected=collected.get(run.job_id, 0) if followed else None,
            )
            for run in runs
        ]
        return list(await asyncio.gather(*views))

    async def free(self) -> Offer | None:
        """Return the free capacity now; None when the executor does not answer."""
        return await _answer(self._executor.capacity(), None)

    async def fault(self) -> str:
        """Return why the executor can't start runs; empty when no fault is known."""
        try:
            return await self._executor.fault()
        except ExecutorUnavailableError as error:
            _log.warning("executor unavailable", error=error.message)
            return error.message

    # -- the chain

    async def _records(self, ids: Sequence[int], head: Head) -> Mapping[int, tuple[Job, Job]]:
        """Return each job at the head and at the confirmed block; fetched once per head."""
        at = (head.hash, head.final)
        known = self._known_records if self._records_at == at else {}
        records = {job_id: known[job_id] for job_id in ids if job_id in known}
        missing = [job_id for job_id in ids if job_id not in records]
        if missing:
            records |= await self._fetch_records(missing, head)
        self._records_at, self._known_records = at, records
        return records

    async def _fetch_records(self, ids: Sequence[int], head: Head) -> dict[int, tuple[Job, Job]]:
        depth = max(self._first_block, head.number - self._confirmations)
        if depth >= head.number or head.final:
            jobs = await self._scheduler.get_jobs(ids, block=head.number)
            return {job.id: (job, job) for job in jobs}
        jobs, confirmed = await asyncio.gather(
            self._scheduler.get_jobs(ids, block=head.number),
            self._scheduler.get_jobs(ids, block=depth),
        )
        return {job.id: (job, earlier) for job, earlier in zip(jobs, confirmed, strict=True)}

    # -- the executor

    async def _poll(self, handles: Sequence[str | None]) -> Mapping[str, RunStatus]:
        known_handles = [handle for handle in handles if handle is not None]
        if not known_handles:
            return {}
        return await _answer(self._executor.poll(known_handles), {})

    async def _placed_keys(self, runs: Sequence[Run]) -> Collection[str]:
        """Return the keys that count as used capacity; read before the free capacity."""
        if self._executor.queues or all(run.phase is not Phase.SUBMITTING for run in runs):
            return ()
        return frozenset(await _answer(self._executor.keys(), []))

    async def _view(
        self,
        run: Run,
        job: Job,
        confirmed: Job,
        statuses: Mapping[str, RunStatus],
        *,
        placed: bool,
        collected: int | None,
    ) -> View:
        mine = job.status.is_assigned and job.provider_id == self._provider_id
        status = statuses.get(run.handle) if run.handle else None
        lookup = await self._lookup(run, job, mine, status)
        return View(
            job=job,
            run=run,
            mine=mine,
            settled=_has_same_status(job, confirmed),
            status=status,
            lookup=lookup,
            cached_definition=await self._cached_definition(run, job, mine),
            misses=self._count_misses(run, lookup),
            placed=placed,
            collected=collected if job.allows_interim_payments else 0,
        )

    async def _lookup(
        self, run: Run, job: Job, mine: bool, status: RunStatus | None
    ) -> Lookup | None:
        """Look up the run by key, if the result decides the next action."""
        if run.handle is not None:
            if status is None or status.state is not RunState.UNKNOWN:
                return None
        elif run.phase in {Phase.WATCHED, Phase.STARTING} and run.job_id not in self._unknown_runs:
            starting = job.status is JobStatus.RUNNING
            queued = job.status is JobStatus.SCHEDULED and self._executor.queues
            if not mine or not (starting or queued):
                return None
        try:
            return Lookup(await self._executor.find(run.key))
        except ExecutorUnavailableError as error:
            _log.warning("executor unavailable", job=job.id, error=error.message)
            return None

    def _count_misses(self, run: Run, lookup: Lookup | None) -> int:
        """Return the number of consecutive lookups that did not find a submitted run."""
        if run.handle is None or lookup is None or lookup.handle is not None:
            self._misses.pop(run.job_id, None)
            return 0
        self._misses[run.job_id] = self._misses.get(run.job_id, 0) + 1
        return self._misses[run.job_id]

    async def _cached_definition(self, run: Run, job: Job, mine: bool) -> CachedDefinition:
        if not mine or run.handle is not None or run.phase is Phase.ENDED:
            return CachedDefinition(DefinitionState.PENDING)
        return await self._definition_cache.fetch(job)


async def _answer(request: Awaitable[T], default: D) -> T | D:
    """Return the executor's answer; the default, with a log entry, when it does not answer."""
    try:
        return await request
    except ExecutorUnavailableError as error:
        _log.warning("executor unavailable", error=error.message)
        return default


def _may_change(run: Run) -> bool:
    return run.handle is not None and run.phase is Phase.SUBMITTED


def _has_same_status(job: Job, confirmed: Job) -> bool:
    """Return whether the confirmed block has the same status of the same assignment."""
    latest = (job.status, job.provider_id, job.since)
    return latest == (confirmed.status, confirmed.provider_id, confirmed.since)


def free_megabytes(folder: Path) -> int:
    """Return the free disk at a folder, in MB; 0 if it can't be determined."""
    try:
        return shutil.disk_usage(folder).free // MEGABYTE
    except OSError:
        return 0
