"""The cluster snapshot at a block, assembled from contract state and events."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.chain.bindings.records import Clock, Parameters
from deepsquare_chain.chain.rpc.batching import merged
from deepsquare_chain.chain.rpc.heads import Head
from deepsquare_chain.job import DAY, Job, JobStatus, Provider
from deepsquare_chain.metascheduler.dependencies import Hold, dependencies, held
from deepsquare_chain.metascheduler.eligibility import ProviderView, Waiting
from deepsquare_chain.metascheduler.liveness import (
    BlockContext,
    Watch,
    Watched,
    is_silent,
    struck,
    suspended_until,
)
from deepsquare_chain.metascheduler.policy import Snapshot
from deepsquare_chain.metascheduler.state import Known, SchedulerState

#: Cycles after which provider records are read again even without registry events.
_PROVIDER_CYCLES: Final = 100
#: PENDING records that are read again per cycle, in turn. Records with new events are read at once.
_REFRESHED_PER_CYCLE: Final = 500
_MAX_AVOIDANCE_SECONDS: Final = DAY
#: Most ended jobs that are kept in a cache. Entries that are needed again are read again.
_MAX_CACHED: Final = 20_000


@dataclass(frozen=True, slots=True)
class ClusterSnapshot:
    """The input of one cycle's decisions. `held` maps waiting jobs that must not be assigned."""

    block_context: BlockContext
    watched: Mapping[int, Watched]
    assigned: Sequence[Job]
    waiting: Sequence[Waiting]
    views: Sequence[ProviderView]
    held: Mapping[int, Hold] = field(default_factory=dict)

    @property
    def snapshot(self) -> Snapshot:
        """The planner's input: without jobs that are held."""
        waiting = [entry for entry in self.waiting if entry.job.id not in self.held]
        return Snapshot(self.block_context.now, self.views, waiting, self.assigned)


def view_of(watched: Watched, block_context: BlockContext, watch: Watch) -> ProviderView:
    """Return the planner's view of a provider."""
    return ProviderView(
        watched.provider,
        silent=is_silent(watched.clock, block_context),
        challenged=watched.clock.challenged_at != 0,
        suspended_until=suspended_until(watched.strikes, block_context.now, watch),
        strikes=len(struck(watched.strikes, block_context.now, watch)),
    )


@dataclass(frozen=True, slots=True)
class _BlockState:
    """Contract state read at a block, which is immutable; `events` is the last block of events."""

    block: bytes
    events: int
    records: Sequence[Job]
    providers: Sequence[Provider]
    clocks: Mapping[int, Clock]


class GridObserver:
    """Reads the cluster snapshot from the chain, and caches records that can't have changed."""

    def __init__(self, contracts: Contracts, state: SchedulerState, watch: Watch) -> None:
        self._contracts = contracts
        self._state = state
        self._watch = watch
        self._times: Parameters | None = None
        self._providers: list[Provider] = []
        self._cycles = 0
        self._pending: dict[int, Job] = {}
        self._lines: dict[int, frozenset[int]] = {}
        self._ends: dict[int, JobStatus] = {}
        self._refresh_index = 0
        self._block_state: _BlockState | None = None
        self._prefetched: tuple[bytes, int, dict[int, Clock]] = (b"", 0, {})

    def evict(self, job_ids: Iterable[int]) -> None:
        """Evict job records that may have changed from the cache."""
        for job_id in list(job_ids):
            self._pending.pop(job_id, None)

    async def prepare(self, head: Head) -> None:
        """Prefetch state that does not depend on a block's events, while those are read.

        Raises:
            EndpointError: No endpoint answers.
        """
        providers = self._providers
        count, clocks = await asyncio.gather(
            self._contracts.scheduler.job_count(block=head.number),
            asyncio.gather(*(self._clock(provider.id, head.number) for provider in providers)),
        )
        ids = [provider.id for provider in providers]
        self._prefetched = (head.hash, count, dict(zip(ids, clocks, strict=True)))

    async def read(self, head: Head, *, events: int) -> ClusterSnapshot:
        """Return the cluster snapshot at a block. Each block is read only once.

        `events` is the last block whose events were applied to the state.

        Raises:
            EndpointError: No endpoint answers.
        """
        if self._times is None:
            with merged(self._contracts.w3):
                self._times = await self._contracts.scheduler.parameters(block=head.number)
        block_context = BlockContext(head.number, head.time, self._times)
        live_jobs = self._state.live()
        block_data = self._block_state
        if self._state.all_touched:  # blocks were replaced
            self._ends.clear()
            self._lines.clear()
        for cache in (self._ends, self._lines):
            if len(cache) > _MAX_CACHED:
                cache.clear()
        if block_data is None or (block_data.block, block_data.events) != (head.hash, events):
            block_data = self._block_state = await self._read_block(head, live_jobs, events)
        watched = await self._watched(block_data.providers, block_data.clocks, block_context)
        assigned = [job for job in block_data.records if job.status.is_assigned]
        known_jobs = [job for job in block_data.records if job.id in live_jobs]
        pending = [job for job in known_jobs if job.status == JobStatus.PENDING]
        waiting = [
            await self._wait(job, live_jobs[job.id], block_data.providers, block_context)
            for job in pending
        ]
        views = [view_of(provider, block_context, self._watch) for provider in watched.values()]
        depended_on = dependencies(live_jobs[job.id].uses for job in pending)
        holds = held(
            [(job, live_jobs[job.id].uses) for job in pending],
            [(job, live_jobs[job.id].uses) for job in known_jobs if job.status.is_assigned],
            await self._ended(depended_on, live_jobs, head),
            block_context.now,
        )
        return ClusterSnapshot(block_context, watched, assigned, waiting, views, holds)

    async def _read_block(self, head: Head, known: Mapping[int, Known], events: int) -> _BlockState:
        if self._prefetched[0] != head.hash:
            await self.prepare(head)
        _, count, clocks = self._prefetched
        with merged(self._contracts.w3):
            records, providers = await asyncio.gather(
                self._records(known, count, head.number), self._registered(head.number)
            )
            missing = [provider.id for provider in providers if provider.id not in clocks]
            missing_clocks = await asyncio.gather(
                *(self._clock(provider_id, head.number) for provider_id in missing)
            )
        clocks |= zip(missing, missing_clocks, strict=True)
        return _BlockState(head.hash, events, records, providers, clocks)

    async def _clock(self, provider_id: int, number: int) -> Clock:
        return await self._contracts.scheduler.clock_of(provider_id, block=number)

    # -- jobs

    async def _records(self, known: Mapping[int, Known], count: int, number: int) -> list[Job]:
        """Return the records of all jobs that may be live; PENDING ones may be a few cycles old.

        `count` is the highest id at that block.
        """
        # Jobs whose events were not read yet may already occupy capacity.
        new_ids = range(self._state.highest() + 1, count + 1)
        ids = [job_id for job_id in known if job_id <= count]
        self.evict(self._pending if self._state.all_touched else self._state.touched)
        # Refresh cached records in turn, each within a bounded number of cycles.
        cached_ids = sorted(self._pending)
        turn = self._refresh_index % max(len(cached_ids), 1)
        self._refresh_index = turn + _REFRESHED_PER_CYCLE
        self.evict(cached_ids[turn : turn + _REFRESHED_PER_CYCLE])
        missing_ids = [job_id for job_id in ids if job_id not in self._pending]
        read_records = await self._contracts.scheduler.get_jobs(
            [*missing_ids, *new_ids], block=number
        )
        cached = (self._pending[job_id] for job_id in ids if job_id in self._pending)
        records = [*read_records, *cached]
        self._pending = {job.id: job for job in records if job.status == JobStatus.PENDING}
        self._state.touched.clear()
        self._state.all_touched = False
        return sorted(records, key=lambda job: job.id)

    async def _wait(
        self, job: Job, known: Known, providers: Sequence[Provider], block_context: BlockContext
    ) -> Waiting:
        ids = {provider.account: provider.id for provider in providers}
        avoided = {
            ids[account]: self._avoided_until(count, last, block_context)
            for account, (count, last) in known.returned.items()
            if account in ids
        }
        return Waiting(
            job=job,
            objective=known.objective,
            uses=known.uses,
            queued_at=min(known.queued_at, job.since),
            excluded=await self.providers_that_lost(job.retry_of),
            avoided=avoided,
        )

    @staticmethod
    def _avoided_until(count: int, last: int, block_context: BlockContext) -> int:
        """Return the chain time until which a provider does not get a job that it returned.

        Exponential backoff: the pause doubles with each return, from the claim timeout up to a day.
        """
        pause = block_context.times.claim_timeout << min(count - 1, 20)
        return last + min(pause, _MAX_AVOIDANCE_SECONDS)

    async def providers_that_lost(self, job_id: int) -> frozenset[int]:
        """Return the providers that lost a job or one of its predecessors; cached, as final."""
        if job_id == 0:
            return frozenset()
        if job_id not in self._lines:
            job = await self._contracts.scheduler.get_job(job_id)
            earlier = await self.providers_that_lost(job.retry_of)
            self._lines[job_id] = earlier | {job.provider_id}
        return self._lines[job_id]

    async def _ended(
        self, job_ids: Iterable[int], known: Mapping[int, Known], head: Head
    ) -> Mapping[int, JobStatus]:
        """Return the final status of the jobs that ended; a retried job has its successor's.

        Only jobs count whose end the applied (confirmed) events include.
        """
        highest = self._state.highest()
        ended = {job_id for job_id in job_ids if job_id not in known and 0 < job_id <= highest}
        unread_ids = sorted(ended - self._ends.keys())
        if unread_ids:
            records = await self._contracts.scheduler.get_jobs(unread_ids, block=head.number)
            retried = self._state.successors(
                job.id for job in records if job.status is JobStatus.PANICKED
            )
            successor_ends = await self._ended(retried.values(), known, head)
            for job in records:
                successor = retried.get(job.id)
                end = job.status if successor is None else successor_ends.get(successor)
                if end is not None and end.is_final:
                    self._ends[job.id] = end
        return {job_id: self._ends[job_id] for job_id in ended if job_id in self._ends}

    # -- providers

    async def _registered(self, number: int) -> list[Provider]:
        self._cycles += 1
        if self._state.registry_changed or self._cycles >= _PROVIDER_CYCLES:
            # Cleared before the read, so that the next cycle sees a change during the read.
            self._state.registry_changed = False
            self._cycles = 0
            try:
                self._providers = await self._contracts.registry.providers(block=number)
            except BaseException:
                self._state.registry_changed = True
                raise
        return self._providers

    async def _watched(
        self,
        providers: Sequence[Provider],
        clocks: Mapping[int, Clock],
        block_context: BlockContext,
    ) -> dict[int, Watched]:
        signs = self._state.last_signs()
        strikes = await self._strikes(block_context.now - self._watch.strike_window)
        return {
            provider.id: Watched(
                provider,
                clocks[provider.id],
                signs.get(provider.account, 0),
                strikes.get(provider.account, ()),
            )
            for provider in providers
        }

    async def _strikes(self, since: int) -> Mapping[str, Sequence[int]]:
        """Return strikes by account, after setting the block's own time of those without it."""
        table = self._state.strikes
        blocks = table.undated(since)
        headers = await asyncio.gather(*(self._contracts.w3.eth.get_block(n) for n in blocks))
        table.date({n: int(header["timestamp"]) for n, header in zip(blocks, headers, strict=True)})
        return table.since(since)
