"""Transactions of one cycle, sent in batches; later cycles read their effect from the chain."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Final

from deepsquare_chain.chain.bindings.calls import Call
from deepsquare_chain.chain.bindings.contracts import MetaSchedulerContract
from deepsquare_chain.chain.bindings.records import Report as ChainReport
from deepsquare_chain.chain.rpc.batching import chunks
from deepsquare_chain.chain.transactions.sender import Sender
from deepsquare_chain.daemon.batcher import Backoff, TransactionBatch, TransactionBatcher
from deepsquare_chain.daemon.loop import BackgroundTasks
from deepsquare_chain.provider.model import (
    Action,
    Claim,
    ClaimAndStart,
    Collect,
    Panic,
    Requeue,
    RunReport,
    Start,
    View,
)

#: Seconds to wait for the receipts of transactions in the same block.
_RECEIPT_WAIT: Final = 0.05
#: First and longest backoff after a refusal, in seconds.
_PAUSES: Final = (1, 60)

Planned = tuple[View, Action]


class ProviderBatches:
    """Sends planned actions as transactions and waits for their receipts.

    A transaction that misses the block of the others continues in the background; later cycles
    skip its jobs until it is mined, and nothing else waits for it.

    Args:
        sender: The only transaction sender of this account.
        scheduler: The MetaScheduler contract.
        size: Maximum number of jobs in one transaction.
        timeout: Seconds to wait for a receipt; afterwards the outbox takes care of the transaction.
        count: Called with kind, jobs changed and jobs refused of each transaction.
    """

    def __init__(
        self,
        sender: Sender,
        scheduler: MetaSchedulerContract,
        *,
        size: int,
        timeout: float,
        count: Callable[[str, int, int], None],
    ) -> None:
        self._batcher = TransactionBatcher(
            "provider",
            sender,
            timeout=timeout,
            count=count,
            backoff=Backoff(*_PAUSES),
        )
        self._scheduler = scheduler
        self._size = size
        self._tasks = BackgroundTasks()

    @property
    def mined_at(self) -> int:
        """The highest block that holds a transaction of this provider."""
        return self._batcher.mined_at

    def record_block(self, block: int) -> None:
        """Record the block of a transaction that an earlier process sent."""
        self._batcher.mined_at = max(self._batcher.mined_at, block)

    @property
    def jobs(self) -> frozenset[int]:
        """Jobs whose transaction is pending, or was mined since the last `send`."""
        return self._tasks.jobs

    async def answer(self) -> bool:
        """Answer this provider's challenge; returns whether the answer is mined."""
        previous_block = self.mined_at
        await self._send(TransactionBatch("answer", (), self._scheduler.answer()))
        return self.mined_at > previous_block

    async def send(self, planned: Iterable[Planned]) -> int:
        """Send all planned transactions, and wait until the first of them is mined.

        Returns the number of jobs changed, by earlier transactions too.
        """
        moved = self._tasks.collect()
        batches = self._due(planned)
        for batch in batches:
            self._tasks.begin(self._send(batch), batch.job_ids)
        if batches:
            await self._tasks.wait(first=True)
            await self._tasks.wait(_RECEIPT_WAIT)
        return moved + self._tasks.collect()

    def would_send(self, planned: Iterable[Planned]) -> bool:
        """Return whether `send` would send a transaction now, which also answers a challenge."""
        return bool(self._due(planned))

    async def close(self) -> None:
        """Wait for pending transactions; those that it cancels remain in the outbox."""
        try:
            await self._tasks.wait()
        finally:
            self._tasks.cancel_all()

    def forget(self, job_ids: Iterable[int]) -> None:
        """Forget the refusals of these jobs, which are closed."""
        self._batcher.forget(job_ids)

    # -- building batches

    def _due(self, planned: Iterable[Planned]) -> list[TransactionBatch]:
        """Return the transactions of the planned actions that are not in backoff."""
        due = [
            (view, action)
            for view, action in planned
            if (kind := _kind(action)) and self._batcher.is_due(kind, view.job.id, time.monotonic())
        ]
        return list(self._batches(due))

    def _batches(self, planned: Sequence[Planned]) -> Iterable[TransactionBatch]:
        # Claims first: customers wait for them, and late transactions may miss the block.
        for kind, ids, make in self._plain(planned):
            for part in chunks(ids, self._size):
                yield TransactionBatch(kind, tuple(part), make(part))
        reports = [(view, a) for view, a in planned if isinstance(a, RunReport)]
        for report_slice in chunks(reports, self._size):
            reported = tuple(view.job.id for view, _ in report_slice)
            yield TransactionBatch(
                "finish",
                reported,
                self._scheduler.finish([_report(*report) for report in report_slice]),
            )

    def _plain(
        self, planned: Sequence[Planned]
    ) -> Iterable[tuple[str, list[int], Callable[[Sequence[int]], Call]]]:
        contract = self._scheduler
        yield "claim", _ids(planned, Claim()), contract.claim
        yield "claim_and_start", _ids(planned, ClaimAndStart()), contract.claim_and_start
        yield "start", _ids(planned, Start()), contract.start
        yield "collect", _ids(planned, Collect()), contract.collect
        # One reason per transaction.
        for action in dict.fromkeys(a for _, a in planned if isinstance(a, Requeue | Panic)):
            kind = _kind(action)
            make = contract.requeue if kind == "requeue" else contract.panic
            yield kind, _ids(planned, action), partial(make, reason=action.reason)

    async def _send(self, batch: TransactionBatch) -> int:
        return len(await self._batcher.send(batch, time.monotonic))


_KINDS: Final[dict[type[Action], str]] = {
    Claim: "claim",
    ClaimAndStart: "claim_and_start",
    Start: "start",
    Collect: "collect",
    RunReport: "finish",
    Requeue: "requeue",
    Panic: "panic",
}


def _kind(action: Action) -> str:
    """Return the kind of transaction of an action; empty for an action without one."""
    return _KINDS.get(type(action), "")


def _ids(planned: Iterable[Planned], wanted: Action) -> list[int]:
    return [view.job.id for view, action in planned if action == wanted]


def _report(view: View, action: RunReport) -> ChainReport:
    return ChainReport(
        job_id=view.job.id,
        seconds_used=action.seconds,
        exit_code=max(-(2**31), min(action.exit_code, 2**31 - 1)),
        result=view.run.result or bytes(32),
        reason=action.reason,
    )
