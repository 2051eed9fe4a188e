"""The bill of a job, recomputed and compared with the payments. Pure.

seconds x rate is the cost; the fee is floor(cost x basis points / 10000); the provider gets the
rest of the cost, the customer the rest of the escrow. What interim payments billed is not billed
again: the settlement is computed from the last of them on, and the sums hold both.
"""

from __future__ import annotations

from dataclasses import dataclass

from deepsquare_chain.audit.entries import JobEntry
from deepsquare_chain.credits import fee as fee_of
from deepsquare_chain.job import JobStatus

#: Endings at which the provider says how long the run was.
_REPORTED = (JobStatus.FINISHED, JobStatus.FAILED, JobStatus.OUT_OF_CREDITS)


@dataclass(frozen=True, slots=True)
class BillLine:
    """One sum of a bill: what it should be and what it is, in credit-wei."""

    name: str
    expected: int
    actual: int

    @property
    def difference(self) -> int:
        """Zero, or the bill is wrong."""
        return self.actual - self.expected


@dataclass(frozen=True, slots=True)
class JobBill:
    """A bill with all that it was computed from; times are the chain's, in seconds.

    `reported` is what the provider's transaction says, None where nobody looked or nobody had to
    report. `settled` is false as long as the job lives: its lines then compare nothing.
    `allotment`, `most` (the most that can be billed), `reported`, `seconds`, `escrow` and `cost` are
    those of the settlement alone, `collected_seconds` and `collected` (paid and fee, in credit-wei)
    those of interim payments; `billed_seconds` and the lines are of both together. `why` names the
    rule that gave `seconds`.
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
    collected_seconds: int
    collected: int
    why: str
    lines: tuple[BillLine, ...]

    @property
    def elapsed(self) -> int:
        """Seconds from the start to the end; zero if it never ran."""
        return self.ended_at - self.started_at if self.started_at else 0

    @property
    def ok(self) -> bool:
        """Whether seconds and every sum are as they must be."""
        if not self.settled:
            return True
        total = self.collected_seconds + self.seconds
        return total == self.billed_seconds and not any(line.difference for line in self.lines)


def recompute_bill(
    job: JobEntry, *, now: int | None = None, reported: int | None = None
) -> JobBill:
    """Compute a job's bill from start, end, rate and fee.

    Args:
        job: As its events tell it.
        now: Chain time up to which a job that still runs is charged; its last move by default.
        reported: Seconds in the provider's report, if known; without them the billed seconds are
            only held against the most that they can be.
    """
    final = job.status.is_final
    ended_at = job.ended_at if final else max(now or 0, job.since)
    escrow = job.last_escrow
    most = min(ended_at - job.billed_until, job.allotment) if job.started_at else 0
    if job.status not in _REPORTED:
        reported = None
    seconds, why = _seconds(job, most, reported)
    cost = job.rate * seconds
    share = fee_of(cost, job.fee_bps)
    back = 0 if job.carried_out else escrow - cost
    lines = (
        _sum("paid", job.collected_paid + cost - share, job.paid, final=final),
        _sum("fee", job.collected_fee + share, job.fee, final=final),
        _sum("refunded", back, job.refunded, final=final),
        BillLine("carried_out", escrow if job.carried_out else 0, job.carried_out),
    )
    return JobBill(
        job_id=job.id,
        status=job.status,
        settled=final,
        started_at=job.started_at,
        ended_at=ended_at,
        reported=reported,
        allotment=job.allotment,
        most=most,
        seconds=seconds,
        billed_seconds=job.billed_seconds,
        rate=job.rate,
        fee_bps=job.fee_bps,
        escrow=escrow,
        cost=cost,
        collected_seconds=job.collected_seconds,
        collected=job.collected_paid + job.collected_fee,
        why=why,
        lines=lines,
    )


def _sum(name: str, expected: int, actual: int, *, final: bool) -> BillLine:
    """A line; what is not settled yet has nothing to be compared with."""
    return BillLine(name, expected, actual if final else expected)


def _seconds(job: JobEntry, most: int, reported: int | None) -> tuple[int, str]:
    """Seconds that the settlement must have billed, and the rule that says so."""
    last = job.billed_seconds - job.collected_seconds
    if not job.started_at:
        found = 0, "it never ran"
    elif job.status in _REPORTED and reported is not None:
        found = min(reported, most), "the least of reported, elapsed and granted seconds"
    elif job.status in _REPORTED:
        found = min(last, most), "what was reported, at most elapsed and granted"
    elif job.status is JobStatus.PANICKED:
        found = 0, "a panic costs nothing"
    elif job.status is not JobStatus.CANCELLED:
        found = most, "so far: elapsed seconds, at most the allotment"
    elif last == 0:
        # Whether the run was lost is judged by the replay, which knows the provider's clock.
        found = 0, "cancelled as a lost run, which costs nothing"
    else:
        found = most, "cancelled while it ran: elapsed seconds, at most the allotment"
    return found
