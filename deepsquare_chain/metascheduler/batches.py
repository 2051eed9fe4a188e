"""The transactions of one cycle, in batches; without a key they are only logged.

A job that the contract refuses for a reason of its own is left alone for a while, longer each time.
Where the provider is the reason (its prices or its load have changed, or its standing), the job is
planned again at once, and the provider gets a cooldown: so the job may go elsewhere, and a provider
that spoils every assignment costs the scheduler little.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from deepsquare_chain.chain.bindings.calls import Call
from deepsquare_chain.chain.bindings.contracts import MetaSchedulerContract
from deepsquare_chain.chain.bindings.events import TransitionSkipped
from deepsquare_chain.chain.bindings.reverts import ContractError
from deepsquare_chain.chain.transactions.sender import Sender, TxReceipt
from deepsquare_chain.errors import GridError, InsufficientFundsError, RevertedError
from deepsquare_chain.faults import crash_point
from deepsquare_chain.job import Prices
from deepsquare_chain.observability import get_logger

_FIRST_PAUSE: Final = 2
_LONGEST_PAUSE: Final = 600
#: Errors of an assignment that say something of the provider and nothing of the job.
_OF_THE_PROVIDER: Final = frozenset(
    {"DoesNotFit", "PriceRaised", "ProviderNotActive", "ProviderSilent", "RateOutOfRange"}
)
_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class SchedulerBatch:
    """One transaction and the jobs in it; `providers` has the provider id of each assignment."""

    kind: str
    job_ids: tuple[int, ...]
    call: Call
    providers: Mapping[int, int] = field(default_factory=dict)


class Cooldowns:
    """Providers that refused an assignment: nothing is assigned to them for some seconds.

    The first cooldown takes 2 s, each one after it twice as long, up to 600 s; an assignment that
    succeeds ends the series.
    """

    def __init__(self) -> None:
        self._by_provider: dict[int, tuple[int, int]] = {}

    def until(self, provider_id: int) -> int:
        """Chain time at which the cooldown ends, zero where there was none."""
        return self._by_provider.get(provider_id, (0, 0))[0]

    def refused(self, provider_id: int, now: int) -> None:
        """Begin a cooldown at chain time `now`."""
        self._by_provider[provider_id] = _longer(self._by_provider.get(provider_id), now)

    def accepted(self, provider_id: int) -> None:
        """An assignment to it has succeeded."""
        self._by_provider.pop(provider_id, None)


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
        self._sender = sender
        self._scheduler = scheduler
        self._size = size
        self._timeout = timeout
        self._counted = counted
        self.mined_at = 0  # the highest block that holds a transaction of ours
        self._pauses: dict[tuple[str, int], tuple[int, int]] = {}
        self._told: set[tuple[str, tuple[int, ...]]] = set()
        self.cooldowns = Cooldowns()
        self.refusals = 0  # assignments that a provider was the reason against

    def due(self, kind: str, job_ids: Iterable[int], now: int) -> list[int]:
        """The jobs that were not refused a moment ago; `now` is chain time."""
        return [each for each in job_ids if self._pauses.get((kind, each), (0, 0))[0] <= now]

    async def assign(self, groups: Mapping[tuple[int, Prices], Sequence[int]], now: int) -> int:
        """PENDING to META_SCHEDULED: job ids by provider id and the prices seen; how many moved."""
        moved = 0
        for part in _parts(groups, self._size):
            ids = tuple(job_id for some in part.values() for job_id in some)
            call = self._scheduler.meta_schedule(part)
            providers = {job_id: number for (number, _), some in part.items() for job_id in some}
            moved += await self._send(SchedulerBatch("assign", ids, call, providers), now)
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
        return await self._send(SchedulerBatch("challenge", (job_id,), call), now)

    async def _each_part(
        self, kind: str, job_ids: Sequence[int], make: Callable[[Sequence[int]], Call], now: int
    ) -> int:
        due, moved = self.due(kind, job_ids, now), 0
        for at in range(0, len(due), self._size):
            part = due[at : at + self._size]
            moved += await self._send(SchedulerBatch(kind, tuple(part), make(part)), now)
        return moved

    async def _send(self, batch: SchedulerBatch, now: int) -> int:
        if self._sender is None:
            self._tell(batch)
            return 0
        crash_point(f"scheduler.{batch.kind}.planned")
        try:
            receipt = await self._sender.send(batch.call, timeout=self._timeout)
        except RevertedError as error:
            # Nothing of it could be applied: the state has moved on, the next cycle sees how.
            _log.info("refused", what=batch.call.label, error=error.message)
            self._reverted(batch, error, now)
            self._counted(batch.kind, 0, len(batch.job_ids))
            return 0
        except InsufficientFundsError as error:
            _log.error("no gas", what=batch.call.label, error=error.message, hint=error.hint)
            self._refuse(batch.kind, batch.job_ids, now)
            return 0
        except GridError as error:
            _log.warning("not sent", what=batch.call.label, error=error.message)
            return 0
        crash_point(f"scheduler.{batch.kind}.confirmed")
        return self._mined(batch, receipt, now)

    def _mined(self, batch: SchedulerBatch, receipt: TxReceipt, now: int) -> int:
        self.mined_at = max(self.mined_at, receipt.block_number)
        skipped = [event for event in receipt.events if isinstance(event, TransitionSkipped)]
        for event in skipped:
            _log.info("skipped", what=batch.kind, job=event.job_id, reason=event.reason_name)
        left_out = {event.job_id: event.reason_name for event in skipped}
        moved = [job_id for job_id in batch.job_ids if job_id not in left_out]
        for job_id in moved:
            self._pauses.pop((batch.kind, job_id), None)
        for provider_id in {batch.providers[each] for each in moved if each in batch.providers}:
            self.cooldowns.accepted(provider_id)
        because = {each for each, reason in left_out.items() if reason in _OF_THE_PROVIDER}
        self._cool_down(batch, because, now)
        self._refuse(batch.kind, left_out.keys() - (because & batch.providers.keys()), now)
        self._counted(batch.kind, len(moved), len(left_out))
        _log.info("mined", what=batch.call.label, block=receipt.block_number, gas=receipt.gas_used)
        return len(moved)

    def _reverted(self, batch: SchedulerBatch, error: RevertedError, now: int) -> None:
        """Nothing could be applied; the error is that of the first job."""
        first = error.fields.get("job_id", 0) if isinstance(error, ContractError) else 0
        if type(error).__name__ in _OF_THE_PROVIDER and first in batch.providers:
            self._cool_down(batch, [first], now)
        else:
            self._refuse(batch.kind, batch.job_ids, now)

    def _cool_down(self, batch: SchedulerBatch, job_ids: Collection[int], now: int) -> None:
        """Give the providers of refused assignments a cooldown, each once."""
        refused = [each for each in job_ids if each in batch.providers]
        self.refusals += len(refused)
        for provider_id in {batch.providers[each] for each in refused}:
            self.cooldowns.refused(provider_id, now)

    def _refuse(self, kind: str, job_ids: Iterable[int], now: int) -> None:
        for job_id in job_ids:
            self._pauses[kind, job_id] = _longer(self._pauses.get((kind, job_id)), now)

    def _tell(self, batch: SchedulerBatch) -> None:
        """A dry run says once what it would do."""
        key = batch.kind, batch.job_ids
        if key not in self._told:
            self._told.add(key)
            _log.info("would send", what=batch.call.label, jobs=list(batch.job_ids))


def _longer(last: tuple[int, int] | None, now: int) -> tuple[int, int]:
    """End and length of the next pause: twice as long as the last one, within bounds."""
    pause = min(max(2 * last[1], _FIRST_PAUSE), _LONGEST_PAUSE) if last else _FIRST_PAUSE
    return now + pause, pause


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
