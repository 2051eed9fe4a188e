"""Batches of a cycle's transactions. Without a wallet they are only logged.

If the contract refuses a job because of the job, the job is retried with exponential backoff. If
the provider is the reason (its prices, load or status changed), the job is planned again at once
and the provider gets a cooldown. The job can then go elsewhere, and a provider that causes every
assignment to fail costs the scheduler little.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Final

from deepsquare_chain.chain.bindings.calls import Call
from deepsquare_chain.chain.bindings.contracts import MetaSchedulerContract
from deepsquare_chain.chain.rpc.batching import chunks
from deepsquare_chain.chain.transactions.sender import Sender
from deepsquare_chain.daemon.batcher import Backoff, TransactionBatch, TransactionBatcher
from deepsquare_chain.job import Prices
from deepsquare_chain.observability import get_logger

#: Shortest and longest backoff after a refusal, in seconds of chain time.
_PAUSES: Final = (2, 600)
#: Most transactions of a dry run that are remembered as logged.
_MAX_LOGGED: Final = 10_000
#: Contract errors of an assignment that are caused by the provider, not by the job.
_PROVIDER_ERRORS: Final = frozenset(
    {"DoesNotFit", "PriceRaised", "ProviderNotActive", "ProviderSilent", "RateOutOfRange"}
)
_log = get_logger(__name__)


class SchedulerBatches:
    """Sends the scheduler's transactions and waits for their receipts.

    `sender` is None for a dry run. `size` is the maximum number of jobs in one transaction;
    `TransactionBatcher` documents the other arguments.
    """

    def __init__(
        self,
        sender: Sender | None,
        scheduler: MetaSchedulerContract,
        *,
        size: int,
        timeout: float,
        count: Callable[[str, int, int], None],
    ) -> None:
        self._batcher: TransactionBatcher | None = None
        if sender is not None:
            self._batcher = TransactionBatcher(
                "scheduler", sender, timeout=timeout, count=count, backoff=Backoff(*_PAUSES)
            )
        self._scheduler = scheduler
        self._size = size
        self._logged: set[tuple[str, tuple[int, ...]]] = set()
        self._cooldowns = Backoff(*_PAUSES)
        self.refusals = 0  # assignments that were refused because of the provider

    @property
    def mined_at(self) -> int:
        """The highest block that contains a transaction of this scheduler."""
        return 0 if self._batcher is None else self._batcher.mined_at

    def due(self, kind: str, job_ids: Iterable[int], now: int) -> list[int]:
        """Return the jobs that are not in backoff at chain time `now`."""
        return [
            job_id
            for job_id in job_ids
            if self._batcher is None or self._batcher.is_due(kind, job_id, now)
        ]

    def cooldown_until(self, provider_id: int) -> int:
        """Return the chain time until which a provider is in cooldown; zero without a refusal.

        The first cooldown lasts 2 s, each later one twice as long, up to 600 s. A successful
        assignment resets it.
        """
        return int(self._cooldowns.until(provider_id))

    async def assign(self, groups: Mapping[tuple[int, Prices], Sequence[int]], now: int) -> int:
        """Move jobs from PENDING to META_SCHEDULED; return how many moved.

        `groups` maps a provider id and the prices used in the plan to job ids.
        """
        moved = 0
        for part in _parts(groups, self._size):
            ids = tuple(job_id for job_ids in part.values() for job_id in job_ids)
            call = self._scheduler.meta_schedule(part)
            providers = {
                job_id: provider_id for (provider_id, _), jobs in part.items() for job_id in jobs
            }
            moved += await self._send(TransactionBatch("assign", ids, call, providers), now)
        return moved

    async def requeue(self, job_ids: Sequence[int], now: int) -> int:
        """Move jobs back to PENDING; return how many moved."""
        return await self._send_parts("requeue", job_ids, self._scheduler.requeue, now)

    async def panic(self, job_ids: Sequence[int], now: int) -> int:
        """Move lost runs to PANICKED; return how many moved."""
        return await self._send_parts("panic", job_ids, self._scheduler.panic, now)

    async def cancel(self, job_ids: Sequence[int], now: int) -> int:
        """Move expired PENDING jobs to CANCELLED, in at most one transaction; return how many."""
        due = self.due("cancel", job_ids, now)[: self._size]
        return await self._send_parts("cancel", due, self._scheduler.cancel, now)

    async def challenge(self, job_id: int, now: int) -> int:
        """Challenge the provider of a job to answer within the contract's response timeout."""
        if not self.due("challenge", [job_id], now):
            return 0
        call = self._scheduler.challenge(job_id)
        return await self._send(TransactionBatch("challenge", (job_id,), call), now)

    async def _send_parts(
        self, kind: str, job_ids: Sequence[int], make: Callable[[Sequence[int]], Call], now: int
    ) -> int:
        moved = 0
        for part in chunks(self.due(kind, job_ids, now), self._size):
            moved += await self._send(TransactionBatch(kind, tuple(part), make(part)), now)
        return moved

    async def _send(self, batch: TransactionBatch, now: int) -> int:
        if self._batcher is None:
            self._log_once(batch)
            return 0
        moved = await self._batcher.send(
            batch, lambda: now, partial(self._start_cooldowns, batch, now)
        )
        assigned = {batch.providers[job_id] for job_id in moved if job_id in batch.providers}
        self._cooldowns.clear(assigned.__contains__)
        return len(moved)

    def _start_cooldowns(
        self, batch: TransactionBatch, now: int, refusals: Mapping[int, str]
    ) -> Collection[int]:
        """Start a cooldown of each provider that caused a refusal; return its jobs, to replan."""
        excused = [
            job_id
            for job_id, reason in refusals.items()
            if reason in _PROVIDER_ERRORS and job_id in batch.providers
        ]
        self.refusals += len(excused)
        for provider_id in {batch.providers[job_id] for job_id in excused}:
            self._cooldowns.refuse(provider_id, now)
        return excused

    def _log_once(self, batch: TransactionBatch) -> None:
        """Log a transaction of a dry run, once."""
        key = batch.kind, batch.job_ids
        if key not in self._logged:
            if len(self._logged) >= _MAX_LOGGED:
                self._logged.clear()
            self._logged.add(key)
            _log.info("batch simulated", label=batch.call.label, jobs=list(batch.job_ids))


def _parts(
    groups: Mapping[tuple[int, Prices], Sequence[int]], size: int
) -> Iterable[dict[tuple[int, Prices], list[int]]]:
    """Split groups into transactions of at most `size` jobs."""
    part: dict[tuple[int, Prices], list[int]] = {}
    count = 0
    for key, job_ids in groups.items():
        for job_id in job_ids:
            part.setdefault(key, []).append(job_id)
            count += 1
            if count == size:
                yield part
                part, count = {}, 0
    if part:
        yield part
