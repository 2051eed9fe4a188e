"""Checks that bills and interim payments are those that the contract must have computed. Pure."""

from __future__ import annotations

from deepsquare_chain.audit.entries import JobEntry
from deepsquare_chain.audit.transaction import TransactionContext
from deepsquare_chain.chain.bindings.event_types import JobCollected, JobSettled
from deepsquare_chain.credits import fee as fee_of
from deepsquare_chain.job import JobFlags, JobStatus

#: Minimum grace period in seconds in which a provider may report, in any deployment.
MIN_REPORT_GRACE = 3_600

_REPORTED = (JobStatus.FINISHED, JobStatus.FAILED, JobStatus.OUT_OF_CREDITS)


def check_collection(
    job: JobEntry, event: JobCollected, page: TransactionContext, interval: int
) -> None:
    """Recompute an interim payment and compare it with the event.

    The payment follows from the rate, the fee, and the time since the last payment or the start.

    Args:
        job: The job before the payment.
        event: The payment according to the contract.
        page: Receives the findings; its time is the time of the payment.
        interval: Minimum seconds between two interim payments.
    """
    elapsed, label = page.time - job.billed_until, f"an interim payment of job {job.id}"
    allowed = job.status is JobStatus.RUNNING and JobFlags.INTERIM_PAYMENTS in job.terms.flags
    page.check(allowed, "interim", f"{label}, which is {job.status.name}, is not allowed", job.id)
    page.check(
        event.customer == job.customer and event.provider == job.provider,
        "interim",
        f"{label} was made between other parties than its own",
        job.id,
    )
    page.check(
        elapsed >= interval, "interim", f"{label} came after {elapsed} of {interval} s", job.id
    )
    page.check(
        elapsed < job.allotment,
        "interim",
        f"{label} came when its {job.allotment} s were used up",
        job.id,
    )
    page.check(
        event.billed_seconds == elapsed,
        "interim",
        f"{label} bills {event.billed_seconds} s where {elapsed} s passed",
        job.id,
    )
    cost = job.rate * event.billed_seconds
    share = fee_of(cost, job.fee_bps)
    escrow = job.escrow - cost
    expected = (cost - share, share, escrow, _limit_left(job, event.billed_seconds, escrow))
    actual = (event.paid, event.fee, event.escrow, event.time_limit)
    page.check(
        actual == expected,
        "interim",
        f"{label} made paid, fee, escrow and time limit {actual} instead of {expected}",
        job.id,
    )


def _limit_left(job: JobEntry, billed: int, escrow: int) -> int:
    """Return the time limit in seconds after an interim payment that leaves this escrow.

    A job that runs until its credits are spent keeps its price ceiling, escrow / time limit.
    """
    if job.terms.until_spent:
        return max(1, job.time_limit * escrow // job.escrow) if job.escrow else 1
    return job.time_limit - billed


def check_settlement(
    job: JobEntry, event: JobSettled, page: TransactionContext, *, gone: bool
) -> None:
    """Recompute a bill from rate, fee, start (or last interim payment) and end.

    Args:
        job: The job when it ended, before its escrow was divided.
        event: The settlement according to the contract.
        page: Receives the findings; its time is the end of the job.
        gone: Whether the provider's runs can count as lost at that time.
    """
    _check_seconds(job, event, page, gone=gone)
    page.check(
        job.status is not JobStatus.PANICKED or job.retries_left == 0,
        "retry",
        f"job {job.id} was refunded although {job.retries_left} retries were left",
        job.id,
    )
    cost = job.rate * event.billed_seconds
    share = fee_of(cost, job.fee_bps)
    expected = (cost - share, share, job.escrow - cost)
    page.check(
        (event.paid, event.fee, event.refunded) == expected,
        "settlement",
        f"job {job.id} was settled with {event.paid} paid, {event.fee} fee and {event.refunded} "
        f"refunded instead of {expected[0]}, {expected[1]} and {expected[2]}",
        job.id,
    )
    page.check(
        event.customer == job.customer and event.provider == job.provider,
        "settlement",
        f"job {job.id} was settled between other parties than its own",
        job.id,
    )


def _check_seconds(
    job: JobEntry, event: JobSettled, page: TransactionContext, *, gone: bool
) -> None:
    billed, problem = event.billed_seconds, ""
    elapsed = page.time - job.billed_until
    if job.status in _REPORTED:
        maximum = min(elapsed, job.allotment)
        out_of_credits = job.status is JobStatus.OUT_OF_CREDITS
        if billed > maximum:
            problem = f"{billed} s were billed where only {maximum} s can be"
        elif out_of_credits != (billed == job.allotment):
            problem = f"{billed} of {job.allotment} s do not make it {job.status.name}"
    elif job.status is JobStatus.CANCELLED and job.started_at:
        charged = min(elapsed, job.allotment)
        is_free = billed == 0 and is_lost(job, page.time, gone=gone)
        if billed != charged and not is_free:
            problem = f"{billed} s were billed where {charged} s were used"
    elif billed:
        problem = f"{billed} s were billed although nothing may be"
    page.check(not problem, "billing", f"job {job.id}: {problem}", job.id)


def is_lost(job: JobEntry, now: int, *, gone: bool) -> bool:
    """Return whether a run can count as lost, by the minimum that every deployment requires."""
    return gone or now > job.billed_until + job.allotment + MIN_REPORT_GRACE
