"""Whether a bill is the one that the contract must have written. Pure."""

from __future__ import annotations

from deepsquare_chain.chain.eventtypes import JobSettled
from deepsquare_chain.credits import fee as fee_of
from deepsquare_chain.explorer.books import JobEntry
from deepsquare_chain.explorer.page import Page
from deepsquare_chain.job import JobStatus

#: The least grace that any deployment gives a provider to report, in seconds.
MIN_REPORT_GRACE = 3_600

_REPORTED = (JobStatus.FINISHED, JobStatus.FAILED, JobStatus.OUT_OF_CREDITS)


def check_settlement(job: JobEntry, event: JobSettled, page: Page, *, silent: bool) -> None:
    """Recompute a bill from rate, fee, start and end.

    Args:
        job: The job as it was when it ended; it still holds its escrow.
        event: What the contract says.
        page: Where findings go; its time is the end.
        silent: Whether the provider can count as silent at that time.
    """
    _check_seconds(job, event, page, silent=silent)
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


def _check_seconds(job: JobEntry, event: JobSettled, page: Page, *, silent: bool) -> None:
    billed, why = event.billed_seconds, ""
    if job.status in _REPORTED:
        elapsed = page.time - job.started_at
        most = min(elapsed, job.allotment)
        spent = job.status is JobStatus.OUT_OF_CREDITS
        if billed > most:
            why = f"{billed} s were billed where only {most} s can be"
        elif spent != (billed == job.allotment):
            why = f"{billed} of {job.allotment} s do not make it {job.status.name}"
    elif job.status is JobStatus.CANCELLED and job.started_at:
        elapsed = page.time - job.started_at
        used = min(elapsed, job.allotment)
        free = billed == 0 and is_lost(job, page.time, silent=silent)
        if billed != used and not free:
            why = f"{billed} s were billed where {used} s were used"
    elif billed:
        why = f"{billed} s were billed although nothing may be"
    page.check(not why, "billing", f"job {job.id}: {why}", job.id)


def is_lost(job: JobEntry, now: int, *, silent: bool) -> bool:
    """Whether a run can count as lost: what every deployment demands at least."""
    return silent or now > job.started_at + job.allotment + MIN_REPORT_GRACE
