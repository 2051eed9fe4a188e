"""Reads the state of chain and executor, and combines it into one view per job.

The definition cache holds the definitions of these jobs, verified against the chain.
"""

from __future__ import annotations

import asyncio
import shutil
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Final

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
    parse_key,
)
from deepsquare_chain.provider.state import RunTable
from deepsquare_chain.store.definitions import DefinitionMismatch, DefinitionStore
from deepsquare_chain.workflow import Definition, digest

_MAX_DEFINITIONS: Final = 256
_READY: Final = CachedDefinition(DefinitionState.READY)


class DefinitionCache:
    """A cache of definitions by digest.

    Args:
        store: Store of definitions, whose responses are verified.
        timeout: Seconds for one request; a slower store counts as unreachable.
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
            difference = f"{_describe_resources(cached.resources)} instead of {_describe_resources(job.resources)}"
            return CachedDefinition(
                DefinitionState.INVALID, f"the definition requires {difference}"
            )
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
            return CachedDefinition(
                DefinitionState.UNREACHABLE, f"{name} can't be fetched: {error}"
            )
        if digest(data) != key:
            return CachedDefinition(DefinitionState.MISSING, f"{name} does not match its digest")
        definition = self._parse_definition(data)
        self._definitions[key] = definition
        while len(self._definitions) > _MAX_DEFINITIONS:
            self._definitions.popitem(last=False)
        return definition

    @staticmethod
    def _parse_definition(data: bytes) -> Definition | CachedDefinition:
        try:
            return Definition.from_bytes(data)
        except JobFileError as error:
            return CachedDefinition(DefinitionState.INVALID, error.message)


def _describe_resources(wanted: Resources) -> str:
    size = f"{wanted.tasks} x {wanted.cpus_per_task} CPUs, {wanted.mem_per_cpu} MB per CPU"
    return f"{size}, {wanted.gpus} GPUs"


_log = get_logger(__name__)


class RunObserver:
    """Reads chain, executor and definitions once per cycle; without an answer a field stays None.

    Args:
        provider_id: ID of this provider.
        confirmations: Confirmations of a state on chain before irreversible actions follow.
        first_block: Block of the deployment.
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
        self._recent_records: tuple[tuple[bytes, bool], dict[int, tuple[Job, Job]]] = (
            (b"", False),
            {},
        )

    async def sweep(self, chain_id: int, contract: str) -> None:
        """Add run records for runs that the executor has and the database lacks."""
        for key in await self._executor.keys():
            parsed = None if key in self._swept_keys else parse_key(chain_id, contract, key)
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
        """Return one view for each job that is not closed.

        Args:
            head: The block to read at.
            followed: All events up to that block are applied to the table.
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
        return list(
            await asyncio.gather(
                *(
                    self._view(
                        run,
                        *records[run.job_id],
                        statuses,
                        placed=run.key in placed_keys,
                        collected=collected.get(run.job_id, 0) if followed else None,
                    )
                    for run in runs
                )
            )
        )

    async def free(self) -> Offer | None:
        """Return the free capacity now; None when the executor does not answer."""
        try:
            return await self._executor.capacity()
        except ExecutorUnavailableError as error:
            _log.warning("executor unavailable", error=error.message)
            return None

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
        block, cached = self._recent_records
        snapshot = (head.hash, head.final)
        cached = {
            job_id: cached[job_id] for job_id in ids if block == snapshot and job_id in cached
        }
        missing = [job_id for job_id in ids if job_id not in cached]
        if missing:
            cached |= await self._fetch_records(missing, head)
        self._recent_records = (snapshot, cached)
        return cached

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
        try:
            return await self._executor.poll(known_handles)
        except ExecutorUnavailableError as error:
            _log.warning("executor unavailable", error=error.message)
            return {}

    async def _placed_keys(self, rows: Sequence[Run]) -> Collection[str]:
        """Return the keys that count as used capacity; read before the free capacity."""
        if self._executor.queues or all(row.phase is not Phase.SUBMITTING for row in rows):
            return ()
        try:
            return frozenset(await self._executor.keys())
        except ExecutorUnavailableError as error:
            _log.warning("executor unavailable", error=error.message)
            return ()

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
