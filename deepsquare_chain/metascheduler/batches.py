"""The transactions of one cycle, in batches; without a key they are only logged.

A job that the contract refuses for a reason of its own is left alone for a while, longer each time.
Where the provider is the reason (its prices or its load have changed, or its standing), the job is
planned again at once, and the provider gets a cooldown: so the job may go elsewhere, and a provider
that spoils every assignment costs the scheduler little.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Final

from deepsquare_chain.chain.bindings.calls import Call
from deepsquare_chain.chain.bindings.contracts import MetaSchedulerContract
from deepsquare_chain.chain.transactions.sender import Sender
from deepsquare_chain.daemon.batcher import Backoff, TransactionBatch, TransactionBatcher, slices
from deepsquare_chain.job import Prices
from deepsquare_chain.observability import get_logger

#: Shortest and longest pause after a refusal, in seconds of chain time.
_PAUSES: Final = (2, 600)
#: Errors of an assignment that say something of the provider and nothing of the job.
_OF_THE_PROVIDER: Final = frozenset(
    {"DoesNotFit", "PriceRaised", "ProviderNotActive", "ProviderSilent", "RateOutOfRange"}
)
_log = get_logger(__name__)


class SchedulerBatches:
    """Makes transactions and sees them mined.

    Args:
        sender: The one sender of this account; None for a dry run.
        scheduler: The contract.
        size: Most jobs in one transaction.
        timeout: Seconds to wait for a receipt; afterwards the outbox looks after it.
        counted: Told kind, jobs moved and jobs left out of each transaction that was mined.
    """

    def __init__(
        self,
        sender: Sender | None,
        scheduler: MetaSchedulerContract,
        *,
        size: int,
        timeout: float,
        counted: Callable[[str, int, int], None],
    ) -> None:
        self._batcher = (
            None
            if sender is None
            else TransactionBatcher(
                "scheduler",
                sender,
                timeout=timeout,
                count=counted,
                backoff=Backoff(*_PAUSES),
            )
        )
        self._scheduler = scheduler
        self._size = size
        self._logged: set[tuple[str, tuple[int, ...]]] = set()
        self._cooldowns = Backoff(*_PAUSES)
        self.refusals = 0  # assignments that were refused because of the provider

    @property
    def mined_at(self) -> int:
        """The highest block that holds a transaction of this scheduler."""
        return 0 if self._batcher is None else self._batcher.mined_at

    def due(self, kind: str, job_ids: Iterable[int], now: int) -> list[int]:
        """The jobs that were not refused a moment ago; `now` is chain time."""
        return [
            each
            for each in job_ids
            if self._batcher is None or self._batcher.is_due(kind, each, now)
        ]

    def cooldown_until(self, provider_id: int) -> int:
        """Chain time before which nothing is assigned to a provider; zero without a refusal.

        The first cooldown lasts 2 s, each later one twice as long, up to 600 s; an assignment that
        succeeds ends the series.
        """
        return int(self._cooldowns.until(provider_id))

    async def assign(self, groups: Mapping[tuple[int, Prices], Sequence[int]], now: int) -> int:
        """PENDING to META_SCHEDULED: job ids by provider id and the prices seen; how many moved."""
        moved = 0
        for part in _parts(groups, self._size):
            ids = tuple(job_id for some in part.values() for job_id in some)
            call = self._scheduler.meta_schedule(part)
            providers = {job_id: number for (number, _), some in part.items() for job_id in some}
            moved += await self._send(TransactionBatch("assign", ids, call, providers), now)
        return moved

    async def requeue(self, job_ids: Sequence[int], now: int) -> int:
        """Back to PENDING; how many moved."""
        return await self._each_part("requeue", job_ids, self._scheduler.requeue, now)

    async def panic(self, job_ids: Sequence[int], now: int) -> int:
        """Lost runs to PANICKED; how many moved."""
        return await self._each_part("panic", job_ids, self._scheduler.panic, now)

    async def cancel(self, job_ids: Sequence[int], now: int) -> int:
        """Expired PENDING jobs to CANCELLED, one transaction at most; how many moved."""
        due = self.due("cancel", job_ids, now)[: self._size]
        return await self._each_part("cancel", due, self._scheduler.cancel, now)

    async def challenge(self, job_id: int, now: int) -> int:
        """Start the clock of the provider of this job."""
        if not self.due("challenge", [job_id], now):
            return 0
        call = self._scheduler.challenge(job_id)
        return await self._send(TransactionBatch("challenge", (job_id,), call), now)

    async def _each_part(
        self, kind: str, job_ids: Sequence[int], make: Callable[[Sequence[int]], Call], now: int
    ) -> int:
        moved = 0
        for part in slices(self.due(kind, job_ids, now), self._size):
            moved += await self._send(TransactionBatch(kind, tuple(part), make(part)), now)
        return moved

    async def _send(self, batch: TransactionBatch, now: int) -> int:
        if self._batcher is None:
            self._log_once(batch)
            return 0
        moved = await self._batcher.send(batch, lambda: now, partial(self._cool_down, batch, now))
        assigned = {batch.providers[each] for each in moved if each in batch.providers}
        self._cooldowns.clear(assigned.__contains__)
        return len(moved)

    def _cool_down(
        self, batch: TransactionBatch, now: int, refusals: Mapping[int, str]
    ) -> Collection[int]:
        """Begin a cooldown of each provider that was the reason; the jobs may go elsewhere."""
        excused = [
            job_id
            for job_id, reason in refusals.items()
            if reason in _OF_THE_PROVIDER and job_id in batch.providers
        ]
        self.refusals += len(excused)
        for provider_id in {batch.providers[job_id] for job_id in excused}:
            self._cooldowns.refuse(provider_id, now)
        return excused

    def _log_once(self, batch: TransactionBatch) -> None:
        """A dry run logs once what it would do."""
        key = batch.kind, batch.job_ids
        if key not in self._logged:
            self._logged.add(key)
            _log.info("would send", what=batch.call.label, jobs=list(batch.job_ids))


def _parts(
    groups: Mapping[tuple[int, Prices], Sequence[int]], size: int
) -> Iterable[dict[tuple[int, Prices], list[int]]]:
    """Groups cut into transactions of at most `size` jobs."""
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
