"""The bill of a job computed again, beside what was paid. Pure.

seconds x rate is the cost; the fee is floor(cost x basis points / 10000); the provider gets the
rest of the cost, the customer the rest of the escrow.
"""

from __future__ import annotations

from dataclasses import dataclass

from deepsquare_chain.credits import allotment
from deepsquare_chain.credits import fee as fee_of
from deepsquare_chain.explorer.books import JobEntry
from deepsquare_chain.job import JobStatus

#: Endings at which the provider says how long the run was.
_REPORTED = (JobStatus.FINISHED, JobStatus.FAILED, JobStatus.OUT_OF_CREDITS)


@dataclass(frozen=True, slots=True)
class Line:
    """One sum of a bill: what it should be and what it is, in credit-wei."""

    name: str
    expected: int
    actual: int

    @property
    def difference(self) -> int:
        """Zero, or the bill is wrong."""
        return self.actual - self.expected


@dataclass(frozen=True, slots=True)
class Bill:
    """A bill with all that it was computed from; times are the chain's, in seconds.

    `reported` is what the provider's transaction says, None where nobody looked or nobody had to
    report; `most` is the most that can be billed. `settled` is false as long as the job lives: its
    lines then compare nothing. `why` names the rule that gave `seconds`.
    """

    job_id: int
    status: JobStatus
    settled: bool
    started_at: int
    ended_at: int
    reported: int | None
    allotment: int
    most: int
    seconds: int
    billed_seconds: int
    rate: int
    fee_bps: int
    escrow: int
    cost: int
    why: str
    lines: tuple[Line, ...]

    @property
    def elapsed(self) -> int:
        """Seconds from the start to the end; zero if it never ran."""
        return self.ended_at - self.started_at if self.started_at else 0

    @property
    def ok(self) -> bool:
        """Whether seconds and every sum are as they must be."""
        if not self.settled:
            return True
        return self.seconds == self.billed_seconds and not any(x.difference for x in self.lines)


def recompute_bill(job: JobEntry, *, now: int | None = None, reported: int | None = None) -> Bill:
    """Compute a job's bill from start, end, rate and fee.

    Args:
        job: As its events tell it.
        now: Chain time up to which a job that still runs is charged; its last move by default.
        reported: Seconds in the provider's report, if known; without them the billed seconds are
            only held against the most that they can be.
    """
    final = job.status.is_final
    ended_at = job.ended_at if final else max(now or 0, job.since)
    # What was held when it ended: afterwards the record keeps only what was consumed.
    escrow = job.funded + job.carried_in
    given = allotment(job.time_limit, job.terms.until_spent, escrow, job.rate)
    most = min(ended_at - job.started_at, given) if job.started_at else 0
    if job.status not in _REPORTED:
        reported = None
    seconds, why = _seconds(job, most, reported)
    cost = job.rate * seconds
    share = fee_of(cost, job.fee_bps)
    back = 0 if job.carried_out else escrow - cost
    lines = (
        Line("paid", cost - share, job.paid if final else cost - share),
        Line("fee", share, job.fee if final else share),
        Line("refunded", back, job.refunded if final else back),
        Line("carried_out", escrow if job.carried_out else 0, job.carried_out),
    )
    return Bill(
        job_id=job.id,
        status=job.status,
        settled=final,
        started_at=job.started_at,
        ended_at=ended_at,
        reported=reported,
        allotment=given,
        most=most,
        seconds=seconds,
        billed_seconds=job.billed_seconds,
        rate=job.rate,
        fee_bps=job.fee_bps,
        escrow=escrow,
        cost=cost,
        why=why,
        lines=lines,
    )


def _seconds(job: JobEntry, most: int, reported: int | None) -> tuple[int, str]:
    """Seconds that must have been billed, and the rule that says so."""
    if not job.started_at:
        found = 0, "it never ran"
    elif job.status in _REPORTED and reported is not None:
        found = min(reported, most), "the least of reported, elapsed and allotted seconds"
    elif job.status in _REPORTED:
        found = min(job.billed_seconds, most), "what was reported, at most elapsed and allotted"
    elif job.status is JobStatus.PANICKED:
        found = 0, "a panic costs nothing"
    elif job.status is not JobStatus.CANCELLED:
        found = most, "so far: elapsed seconds, at most the allotment"
    elif job.billed_seconds == 0:
        # Whether the run was lost is judged by the replay, which knows the provider's clock.
        found = 0, "cancelled as a lost run, which costs nothing"
    else:
        found = most, "cancelled while it ran: elapsed seconds, at most the allotment"
    return found
