"""Chain work of one cycle, sent as batches; what became of it is read from the chain again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final, TypeVar

from deepsquare_chain.chain.bindings.calls import Call
from deepsquare_chain.chain.bindings.contracts import MetaSchedulerContract
from deepsquare_chain.chain.bindings.contracts import Report as ChainReport
from deepsquare_chain.chain.bindings.events import TransitionSkipped
from deepsquare_chain.chain.transactions.sender import Sender, TxReceipt
from deepsquare_chain.errors import GridError, InsufficientFundsError, RevertedError
from deepsquare_chain.faults import crash_point
from deepsquare_chain.observability import get_logger
from deepsquare_chain.provider.beside import Beside
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

#: Seconds within which what was mined in the same block is heard of.
_TICK: Final = 0.05
_FIRST_PAUSE: Final = 1.0
_LONGEST_PAUSE: Final = 60.0
_log = get_logger(__name__)

T = TypeVar("T")
Planned = tuple[View, Action]


@dataclass
class _Pause:
    """One kind of move that the contract refused for a job: not tried until `until`."""

    seconds: float = _FIRST_PAUSE
    until: float = field(default=0.0)


@dataclass(frozen=True, slots=True)
class ProviderBatch:
    """One transaction and the jobs in it."""

    kind: str
    job_ids: tuple[int, ...]
    call: Call


class ProviderBatches:
    """Makes transactions of planned actions and sees them mined.

    What misses the block that the others were mined in goes on beside later cycles, which leave
    its jobs alone until then: nothing new waits for it.

    Args:
        sender: The one sender of this account.
        scheduler: The contract.
        size: Most jobs in one transaction.
        timeout: Seconds to wait for a receipt; afterwards the outbox looks after it.
        counted: Told the kind and number of jobs of each transaction that was mined.
    """

    def __init__(
        self,
        sender: Sender,
        scheduler: MetaSchedulerContract,
        *,
        size: int,
        timeout: float,
        counted: Callable[[str, int], None],
    ) -> None:
        self._sender = sender
        self._scheduler = scheduler
        self._size = size
        self._timeout = timeout
        self._counted = counted
        self.mined_at = 0  # the highest block that holds a transaction of ours
        self._pauses: dict[tuple[str, int], _Pause] = {}
        self._beside = Beside()

    @property
    def jobs(self) -> frozenset[int]:
        """Jobs whose transaction is on its way, or ended since `send` looked last."""
        return self._beside.jobs

    async def answer(self) -> bool:
        """Stop this provider's challenge clock; whether that is mined."""
        return bool(await self._send(ProviderBatch("answer", (), self._scheduler.answer())))

    async def send(self, planned: Iterable[Planned]) -> int:
        """Send everything that belongs on chain, and wait until some of it is mined.

        Returns how many jobs moved, by earlier transactions too.
        """
        moved = self._beside.collect()
        batches = self._due(planned)
        for batch in batches:
            self._beside.begin(self._send(batch), batch.job_ids)
        if batches:
            await self._beside.wait(first=True)
            await self._beside.wait(_TICK)
        return moved + self._beside.collect()

    def moves(self, planned: Iterable[Planned]) -> bool:
        """Whether `send` would send something now: any move of a job answers a challenge as well."""
        return bool(self._due(planned))

    async def close(self) -> None:
        """Wait for what is on its way; what that cuts off is found in the outbox again."""
        try:
            await self._beside.wait()
        finally:
            self._beside.cut_off()

    def forget(self, job_ids: Iterable[int]) -> None:
        """These jobs are over; nothing about them is remembered."""
        gone = set(job_ids)
        for key in [key for key in self._pauses if key[1] in gone]:
            del self._pauses[key]

    # -- making

    def _due(self, planned: Iterable[Planned]) -> list[ProviderBatch]:
        """Transactions of what was not refused a moment ago."""
        due = [
            (view, action)
            for view, action in planned
            if (kind := _kind(action)) and not self._paused(kind, view.job.id)
        ]
        return list(self._batches(due))

    def _batches(self, planned: Sequence[Planned]) -> Iterable[ProviderBatch]:
        # Claims first: somebody waits for them, and what is sent late may miss a block.
        for kind, ids, make in self._plain(planned):
            for part in _slices(ids, self._size):
                yield ProviderBatch(kind, tuple(part), make(part))
        reports = [(view, a) for view, a in planned if isinstance(a, RunReport)]
        for some in _slices(reports, self._size):
            reported = tuple(view.job.id for view, _ in some)
            yield ProviderBatch(
                "finish", reported, self._scheduler.finish([_report(*each) for each in some])
            )

    def _plain(
        self, planned: Sequence[Planned]
    ) -> Iterable[tuple[str, list[int], Callable[[Sequence[int]], Call]]]:
        contract = self._scheduler
        yield "claim", _ids(planned, Claim()), contract.claim
        yield "claim_and_start", _ids(planned, ClaimAndStart()), contract.claim_and_start
        yield "start", _ids(planned, Start()), contract.start
        yield "collect", _ids(planned, Collect()), contract.collect
        # One reason a transaction.
        for action in dict.fromkeys(a for _, a in planned if isinstance(a, Requeue | Panic)):
            kind = _kind(action)
            make = contract.requeue if kind == "requeue" else contract.panic
            yield kind, _ids(planned, action), partial(make, reason=action.reason)

    # -- sending

    async def _send(self, batch: ProviderBatch) -> int:
        crash_point(f"provider.{batch.kind}.planned")
        try:
            receipt = await self._sender.send(batch.call, timeout=self._timeout)
        except RevertedError as error:
            # Nothing of it could be applied: the state has moved on, the next cycle sees how.
            _log.info("refused", what=batch.call.label, error=error.message)
            self._hold(batch.kind, batch.job_ids)
            return 0
        except InsufficientFundsError as error:
            _log.error("no gas", what=batch.call.label, error=error.message, hint=error.hint)
            self._hold(batch.kind, batch.job_ids)
            return 0
        except GridError as error:
            _log.warning("not sent", what=batch.call.label, error=error.message)
            return 0
        crash_point(f"provider.{batch.kind}.confirmed")
        return self._mined(batch, receipt)

    def _mined(self, batch: ProviderBatch, receipt: TxReceipt) -> int:
        self.mined_at = max(self.mined_at, receipt.block_number)
        left_out = (each for each in receipt.events if isinstance(each, TransitionSkipped))
        skipped = {each.job_id: each for each in left_out if each.job_id in batch.job_ids}
        for event in skipped.values():
            _log.info("skipped", what=batch.kind, job=event.job_id, reason=event.reason_name)
        self._hold(batch.kind, skipped)
        moved = [job_id for job_id in batch.job_ids if job_id not in skipped]
        self.forget(moved)
        count = 1 if batch.kind == "answer" else len(moved)
        self._counted(batch.kind, count)
        _log.info("mined", what=batch.call.label, block=receipt.block_number, gas=receipt.gas_used)
        return count

    def _paused(self, kind: str, job_id: int) -> bool:
        pause = self._pauses.get((kind, job_id))
        return pause is not None and time.monotonic() < pause.until

    def _hold(self, kind: str, job_ids: Iterable[int]) -> None:
        for job_id in job_ids:
            pause = self._pauses.setdefault((kind, job_id), _Pause())
            pause.until = time.monotonic() + pause.seconds
            pause.seconds = min(_LONGEST_PAUSE, pause.seconds * 2)


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
    """Name of the move that an action is; empty for what is no transaction."""
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


def _slices(items: Sequence[T], size: int) -> Iterable[Sequence[T]]:
    return (items[at : at + size] for at in range(0, len(items), size))
