"""Replays the events of jobs, and checks every status, price and bill. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from deepsquare_chain.audit.entries import ZERO_ADDRESS, JobEntry, MovementKind
from deepsquare_chain.audit.registry_ledger import RegistryLedger
from deepsquare_chain.audit.settlement import check_collection, check_settlement, is_lost
from deepsquare_chain.audit.transaction import TransactionContext
from deepsquare_chain.chain.bindings import event_types as ev
from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.job import JobStatus, can_transition


class JobLedger:
    """The ledger of all jobs. The deployment must have checksummed addresses, as events have."""

    def __init__(self, registry: RegistryLedger, deployment: Deployment) -> None:
        self.jobs: dict[int, JobEntry] = {}
        self._registry = registry
        self._scheduler = deployment.scheduler
        self._treasury = deployment.treasury
        self._forwarder = deployment.forwarder
        self._interval = deployment.timeouts.get("collect_interval", MIN_COLLECT_INTERVAL)

    def read(self, event: ev.Event, page: TransactionContext) -> None:
        """Apply a scheduler event that concerns a job."""
        handler = _HANDLERS.get(type(event))
        if handler is None:
            return
        job_id: int = event.job_id  # type: ignore[attr-defined]
        if isinstance(event, ev.JobSubmitted):
            self._submitted(event, page)
            return
        job = self.jobs.get(job_id)
        if job is None:
            if isinstance(event, ev.TransitionSkipped) and event.status is JobStatus.NONE:
                return  # a batch may name jobs that do not exist
            page.find(
                "unknown", f"{type(event).__name__} of job {job_id}, which is unknown", job_id
            )
            return
        handler(self, job, event, page)

    def close(self, page: TransactionContext) -> None:
        """Record a finding for everything that the transaction left incomplete."""
        for job_id in page.ended:
            page.find("unsettled", f"job {job_id} ended without a settlement or successor", job_id)
        for job_id, name in sorted(page.awaited):
            page.find("missing", f"job {job_id} moved without its {name}", job_id)

    def _open(self, job: JobEntry, page: TransactionContext) -> None:
        page.check(job.id == len(self.jobs) + 1, "ids", f"job id {job.id} is out of order", job.id)
        self.jobs[job.id] = job
        page.awaited.add((job.id, ev.JobTransition.__name__))

    def _follow(self, job: JobEntry, event: ev.Event, page: TransactionContext) -> None:
        """Check that the event was expected: it may only follow a transition of its job."""
        name = type(event).__name__
        awaited = (job.id, name) in page.awaited
        page.check(awaited, "stray", f"{name} of job {job.id} without its cause", job.id)
        page.awaited.discard((job.id, name))

    def _submitted(self, event: ev.JobSubmitted, page: TransactionContext) -> None:
        terms, job_id = event.terms, event.job_id
        if job_id in self.jobs:
            page.find("ids", f"job {job_id} was submitted twice", job_id)
            return
        self._check_signer(event.customer, job_id, page)
        job = JobEntry(job_id, event.customer, event.definition, terms)
        job.funded = job.escrow = terms.amount
        job.time_limit = terms.time_limit
        job.retries_left = terms.retries
        self._open(job, page)
        page.owed_in[event.customer] += terms.amount
        page.enter(event.customer, MovementKind.ESCROW, -terms.amount, self._scheduler, job_id)

    def _check_signer(self, account: str, job_id: int, page: TransactionContext) -> None:
        """Check that the signer, not the forwarder, paid for a forwarded call."""
        page.check(
            account != self._forwarder or account == ZERO_ADDRESS,
            "forwarder",
            f"job {job_id} was paid by the forwarder instead of who signed",
            job_id,
        )

    def _moved(self, job: JobEntry, event: ev.JobTransition, page: TransactionContext) -> None:
        arrow = f"{event.before.name} to {event.after.name}"
        page.check(
            event.before is job.status and can_transition(event.before, event.after),
            "transition",
            f"job {job.id} went from {arrow} while it was {job.status.name}",
            job.id,
        )
        page.check(
            event.customer == job.customer, "party", f"job {job.id} changed its customer", job.id
        )
        if event.after is JobStatus.META_SCHEDULED:
            self._check_line(job, event.provider, page)
            job.provider = event.provider
        else:
            page.check(
                event.provider == job.provider,
                "party",
                f"job {job.id} went from {arrow} by another provider than its own",
                job.id,
            )
        if (follower := _FOLLOWED_BY.get(event.after)) and event.before is not JobStatus.NONE:
            page.awaited.add((job.id, follower.__name__))
        page.awaited.discard((job.id, ev.JobTransition.__name__))
        job.status, job.since = event.after, page.time
        job.transitions.append((page.time, event.after, page.tx_hash))
        if event.provider != ZERO_ADDRESS:
            size = job.terms.resources
            self._registry.move(event.provider, event.before, event.after, size)
            if event.after in _BY_PROVIDER:
                self._registry.acted(event.provider, job.id, page)
        self._after_move(job, page)

    def _after_move(self, job: JobEntry, page: TransactionContext) -> None:
        if job.status is JobStatus.RUNNING:
            job.started_at = page.time
        elif job.status is JobStatus.PENDING:
            job.submitted_at = job.submitted_at or page.time
            page.left[job.id] = job.provider
            job.provider, job.rate, job.fee_bps = ZERO_ADDRESS, 0, 0
        elif job.status.is_final:
            job.ended_at = page.time
            page.ended[job.id] = page.time

    def _check_line(self, job: JobEntry, provider: str, page: TransactionContext) -> None:
        """Check that a retry is not assigned to a provider of one of its predecessors."""
        successor, predecessor = job, self.jobs.get(job.retry_of)
        # Predecessors have lower IDs. This check prevents an endless loop on forged events.
        while predecessor is not None and predecessor.id < successor.id:
            page.check(
                predecessor.provider != provider,
                "excluded",
                f"job {job.id} went to {provider}, which lost job {predecessor.id} of its line",
                job.id,
            )
            successor, predecessor = predecessor, self.jobs.get(predecessor.retry_of)

    def _priced(self, job: JobEntry, event: ev.JobPriced, page: TransactionContext) -> None:
        self._follow(job, event, page)
        page.check(
            event.provider == job.provider,
            "party",
            f"job {job.id} was priced for another provider than its own",
            job.id,
        )
        job.rate, job.fee_bps = event.rate, event.fee_bps
        self._registry.check_assignment(job, page)

    def _topped_up(self, job: JobEntry, event: ev.JobToppedUp, page: TransactionContext) -> None:
        page.check(
            job.status.is_live, "top-up", f"job {job.id} was topped up after its end", job.id
        )
        self._check_signer(event.payer, job.id, page)
        limit = job.time_limit
        if job.rate and event.payer == job.customer and not job.terms.until_spent:
            limit += event.amount // job.rate
        page.check(
            (event.escrow, event.time_limit) == (job.escrow + event.amount, limit),
            "top-up",
            f"a top-up of job {job.id} by {event.amount} made {event.escrow} for "
            f"{event.time_limit} s instead of {job.escrow + event.amount} for {limit} s",
            job.id,
        )
        job.funded += event.amount
        job.escrow, job.time_limit = event.escrow, event.time_limit
        page.owed_in[event.payer] += event.amount
        page.enter(event.payer, MovementKind.TOP_UP, -event.amount, self._scheduler, job.id)

    def _settled(self, job: JobEntry, event: ev.JobSettled, page: TransactionContext) -> None:
        if page.ended.pop(job.id, None) is None:
            page.find("settlement", f"job {job.id} was settled without having ended", job.id)
        provider_gone = self._registry.is_gone(job.provider, page.time)
        check_settlement(job, event, page, gone=provider_gone)
        job.settled = True
        job.billed_seconds += event.billed_seconds
        job.paid += event.paid
        job.fee += event.fee
        job.refunded += event.refunded
        job.escrow -= event.paid + event.fee + event.refunded
        self._pay(event.provider, MovementKind.PAYMENT, event.paid, job, page)
        self._pay(self._treasury, MovementKind.FEE, event.fee, job, page)
        self._pay(event.customer, MovementKind.REFUND, event.refunded, job, page)

    def _pay(
        self, account: str, kind: MovementKind, amount: int, job: JobEntry, page: TransactionContext
    ) -> None:
        page.owed_out[account] += amount
        page.enter(account, kind, amount, self._scheduler, job.id)

    def _collected(self, job: JobEntry, event: ev.JobCollected, page: TransactionContext) -> None:
        check_collection(job, event, page, self._interval)
        job.since = page.time
        job.billed_seconds += event.billed_seconds
        job.paid += event.paid
        job.fee += event.fee
        job.collected_seconds += event.billed_seconds
        job.collected_paid += event.paid
        job.collected_fee += event.fee
        job.escrow, job.time_limit = event.escrow, event.time_limit
        self._registry.acted(event.provider, job.id, page)
        self._pay(event.provider, MovementKind.INTERIM, event.paid, job, page)
        self._pay(self._treasury, MovementKind.FEE, event.fee, job, page)

    def _retried(self, job: JobEntry, event: ev.JobRetried, page: TransactionContext) -> None:
        ended = page.ended.pop(job.id, None) is not None
        allowed = ended and job.status is JobStatus.PANICKED and job.retries_left > 0
        page.check(allowed, "retry", f"job {job.id} can't have a successor", job.id)
        page.check(
            event.escrow == job.escrow,
            "retry",
            f"job {job.id} carried {event.escrow} to its successor instead of {job.escrow}",
            job.id,
        )
        if event.successor in self.jobs:
            page.find("ids", f"job {event.successor} can't succeed job {job.id}", job.id)
            return
        successor = JobEntry(event.successor, job.customer, job.definition, job.terms)
        successor.escrow = successor.carried_in = job.carried_out = event.escrow
        successor.time_limit, successor.retries_left = job.time_limit, job.retries_left - 1
        successor.retry_of, job.successor, job.escrow = job.id, event.successor, 0
        self._open(successor, page)

    def _resulted(self, job: JobEntry, event: ev.JobResult, page: TransactionContext) -> None:
        self._follow(job, event, page)
        consistent = {
            JobStatus.FINISHED: event.exit_code == 0,
            JobStatus.FAILED: event.exit_code != 0,
        }
        page.check(
            consistent.get(job.status, True),
            "result",
            f"exit code {event.exit_code} does not belong to job {job.id}, {job.status.name}",
            job.id,
        )
        job.exit_code, job.result, job.reason = event.exit_code, event.result, event.reason

    def _requeued(self, job: JobEntry, event: ev.JobRequeued, page: TransactionContext) -> None:
        self._follow(job, event, page)
        if event.by == page.left.get(job.id):
            self._registry.acted(event.by, job.id, page)

    def _panicked(self, job: JobEntry, event: ev.JobPanicked, page: TransactionContext) -> None:
        self._follow(job, event, page)
        if event.by == job.provider:
            self._registry.acted(event.by, job.id, page)
        else:
            provider_gone = self._registry.is_gone(job.provider, page.time)
            lost = bool(job.started_at) and is_lost(job, page.time, gone=provider_gone)
            page.check(lost, "party", f"{event.by} gave up job {job.id}, not lost", job.id)

    def _skipped(
        self, job: JobEntry, event: ev.TransitionSkipped, page: TransactionContext
    ) -> None:
        page.check(
            event.status is job.status,
            "transition",
            f"job {job.id} was left out as {event.status.name} while it was {job.status.name}",
            job.id,
        )


_FOLLOWED_BY: Final[Mapping[JobStatus, type[ev.Event]]] = {
    JobStatus.META_SCHEDULED: ev.JobPriced,
    JobStatus.PENDING: ev.JobRequeued,
    JobStatus.FINISHED: ev.JobResult,
    JobStatus.FAILED: ev.JobResult,
    JobStatus.OUT_OF_CREDITS: ev.JobResult,
    JobStatus.PANICKED: ev.JobPanicked,
}


#: Statuses that only the assigned provider can set.
_BY_PROVIDER: Final = frozenset(
    {
        *(JobStatus.SCHEDULED, JobStatus.RUNNING),
        *(JobStatus.FINISHED, JobStatus.FAILED, JobStatus.OUT_OF_CREDITS),
    }
)
#: Minimum seconds between two interim payments in any deployment.
MIN_COLLECT_INTERVAL: Final = 5


def _never(*_: Any) -> None:
    raise AssertionError("submissions are handled before any job is known")


_HANDLERS: Final[
    Mapping[type[ev.Event], Callable[[JobLedger, JobEntry, Any, TransactionContext], None]]
] = {
    ev.JobSubmitted: _never,
    ev.JobTransition: JobLedger._moved,  # noqa: SLF001
    ev.JobPriced: JobLedger._priced,  # noqa: SLF001
    ev.JobToppedUp: JobLedger._topped_up,  # noqa: SLF001
    ev.JobSettled: JobLedger._settled,  # noqa: SLF001
    ev.JobCollected: JobLedger._collected,  # noqa: SLF001
    ev.JobRetried: JobLedger._retried,  # noqa: SLF001
    ev.JobResult: JobLedger._resulted,  # noqa: SLF001
    ev.JobRequeued: JobLedger._requeued,  # noqa: SLF001
    ev.JobPanicked: JobLedger._panicked,  # noqa: SLF001
    ev.TransitionSkipped: JobLedger._skipped,  # noqa: SLF001
}
