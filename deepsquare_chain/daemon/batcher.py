"""Transaction batches of a service: several jobs per transaction, and backoff for refused ones."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, TypeVar

from prometheus_client import Counter

from deepsquare_chain.chain.bindings.calls import Call
from deepsquare_chain.chain.bindings.events import TransitionSkipped
from deepsquare_chain.chain.bindings.reverts import ContractError
from deepsquare_chain.chain.transactions.sender import Sender, TxReceipt
from deepsquare_chain.errors import GridError, InsufficientFundsError, RevertedError
from deepsquare_chain.faults import crash_point
from deepsquare_chain.observability import get_logger
from deepsquare_chain.observability.metrics import Metrics

_log = get_logger(__name__)
#: Seconds between two log entries about the same failure: batches are retried in every cycle.
_LOG_INTERVAL: Final = 300.0

T = TypeVar("T")
#: Maps the refusals of a batch (job ID to error name) to the jobs that are not at fault.
RetryableJobs = Callable[[Mapping[int, str]], Collection[int]]


def _no_jobs(_refusals: Mapping[int, str]) -> Collection[int]:
    return ()


class Backoff:
    """Exponential backoff after refusals, by key; `first` and `maximum` pause in seconds.

    The caller passes the time, so that chain time and a monotonic clock both serve.
    """

    def __init__(self, first: int, maximum: int) -> None:
        self._first = first
        self._maximum = maximum
        self._pauses: dict[Hashable, tuple[float, int]] = {}  # end and length

    def until(self, key: Hashable) -> float:
        """Return the time at which the pause of this key ends; 0 without a refusal."""
        return self._pauses.get(key, (0, 0))[0]

    def refuse(self, key: Hashable, now: float) -> None:
        """Begin the next pause of this key."""
        _, previous = self._pauses.get(key, (0, 0))
        pause = min(2 * previous, self._maximum) if previous else self._first
        self._pauses[key] = now + pause, pause

    def clear(self, matches: Callable[[Hashable], bool]) -> None:
        """Reset the keys that match: their next pause is the first one again."""
        for key in [key for key in self._pauses if matches(key)]:
            del self._pauses[key]


@dataclass(frozen=True, slots=True)
class TransactionBatch:
    """One transaction and its jobs.

    `providers` holds the provider ID of each assignment, `reason` the reason of the transition for
    the log.
    """

    kind: str
    job_ids: tuple[int, ...]
    call: Call
    providers: Mapping[int, int] = field(default_factory=dict)
    reason: str = ""


class BatchMetrics:
    """Counts the jobs that the transactions of a service changed, and the refused ones, by kind."""

    def __init__(self, metrics: Metrics, *, changed: Counter, refused: Counter) -> None:
        self._metrics = metrics
        self._changed = changed
        self._refused = refused

    def count(self, kind: str, changed: int, refused: int) -> None:
        """Count the jobs that a transaction changed, and those that the contract refused."""
        self._metrics.add(self._changed, kind, amount=changed)
        self._metrics.add(self._refused, kind, amount=refused)


class TransactionBatcher:
    """Sends batches and waits until they are mined; refused jobs are not sent again at once.

    Args:
        service: Name of the service in crash points: provider or scheduler.
        timeout: Seconds to wait for a receipt; afterwards the outbox takes care of the transaction.
        count: Called with kind, jobs changed and jobs refused of each transaction.
        backoff: Backoff of refused jobs.
    """

    def __init__(
        self,
        service: str,
        sender: Sender,
        *,
        timeout: float,
        count: Callable[[str, int, int], None],
        backoff: Backoff,
    ) -> None:
        self._service = service
        self._sender = sender
        self._timeout = timeout
        self._count = count
        self._backoff = backoff
        self.mined_at = 0  # the highest block that holds a transaction of this service
        self._failures: dict[tuple[str, str], float] = {}  # when each failure was last logged

    def is_due(self, kind: str, job_id: int, now: float) -> bool:
        """Return whether this transition of a job is not in backoff after a refusal."""
        return self._backoff.until((kind, job_id)) <= now

    def forget(self, job_ids: Iterable[int]) -> None:
        """Forget the refusals of these jobs."""
        forgotten = set(job_ids)
        self._backoff.clear(lambda key: isinstance(key, tuple) and key[1] in forgotten)

    async def send(
        self,
        batch: TransactionBatch,
        clock: Callable[[], float],
        retryable: RetryableJobs = _no_jobs,
    ) -> tuple[int, ...]:
        """Send one batch and wait for its receipt; returns the jobs that were changed.

        After a failure the next cycle reads the state of the jobs from the chain again.

        Args:
            clock: Returns the time at which pauses begin, in seconds.
            retryable: Called with the refusals (job ID to the error's name); returns the jobs that may
                be retried at once, because they did not cause the error.
        """
        crash_point(f"{self._service}.{batch.kind}.planned")
        try:
            receipt = await self._sender.send(batch.call, timeout=self._timeout)
        except RevertedError as error:
            # No job could be changed; the error is that of the first job.
            _log.info("batch refused", label=batch.call.label, error=error.message)
            first_job = error.fields.get("job_id", 0) if isinstance(error, ContractError) else 0
            if not retryable({first_job: type(error).__name__}):
                self._refuse(batch.kind, batch.job_ids, clock())
            self._count(batch.kind, 0, len(batch.job_ids))
            return ()
        except InsufficientFundsError as error:
            _log.error(
                "gas exhausted", label=batch.call.label, error=error.message, hint=error.hint
            )
            self._refuse(batch.kind, batch.job_ids, clock())
            return ()
        except GridError as error:
            self._log_failure(batch, error, clock())
            return ()
        crash_point(f"{self._service}.{batch.kind}.confirmed")
        return self._record_mined(batch, receipt, clock, retryable)

    def _record_mined(
        self,
        batch: TransactionBatch,
        receipt: TxReceipt,
        clock: Callable[[], float],
        retryable: RetryableJobs,
    ) -> tuple[int, ...]:
        self.mined_at = max(self.mined_at, receipt.block_number)
        self._failures.clear()
        skipped: dict[int, str] = {}
        for event in receipt.events:
            if isinstance(event, TransitionSkipped) and event.job_id in batch.job_ids:
                _log.info(
                    "job skipped", kind=batch.kind, job=event.job_id, reason=event.reason_name
                )
                skipped[event.job_id] = event.reason_name
        excused = retryable(skipped)
        refused = [job_id for job_id in skipped if job_id not in excused]
        self._refuse(batch.kind, refused, clock())
        changed = tuple(job_id for job_id in batch.job_ids if job_id not in skipped)
        self.forget(changed)
        self._count(batch.kind, len(changed) if batch.job_ids else 1, len(skipped))
        _log.info(
            "batch mined",
            label=batch.call.label,
            block=receipt.block_number,
            gas=receipt.gas_used,
            **({"reason": batch.reason} if batch.reason else {}),
        )
        return changed

    def _log_failure(self, batch: TransactionBatch, error: GridError, now: float) -> None:
        """Log that a batch was not sent; the same failure again only after `_LOG_INTERVAL`."""
        key = batch.kind, error.message
        if now - self._failures.get(key, -_LOG_INTERVAL) < _LOG_INTERVAL:
            return
        self._failures = {
            known: time for known, time in self._failures.items() if now - time < _LOG_INTERVAL
        } | {key: now}
        _log.warning("batch not sent", label=batch.call.label, error=error.message, hint=error.hint)

    def _refuse(self, kind: str, job_ids: Iterable[int], now: float) -> None:
        for job_id in job_ids:
            self._backoff.refuse((kind, job_id), now)
