"""Recomputes the bill of a job and compares it with the payments. Pure.

The cost is seconds x rate. The fee is floor(cost x basis points / 10000). The provider receives the
rest of the cost, and the customer receives the rest of the escrow. The settlement bills only the
time since the last interim payment; the lines of a bill include both.
"""

from __future__ import annotations

from dataclasses import dataclass

from deepsquare_chain.audit.entries import JobEntry
from deepsquare_chain.credits import fee as fee_of
from deepsquare_chain.job import JobStatus

#: Final statuses for which the provider reports the duration of the run.
_REPORTED = (JobStatus.FINISHED, JobStatus.FAILED, JobStatus.OUT_OF_CREDITS)


@dataclass(frozen=True, slots=True)
class BillLine:
    """One amount of a bill: expected and actual, in credit-wei."""

    name: str
    expected: int
    actual: int

    @property
    def difference(self) -> int:
        """Actual minus expected amount; nonzero if the bill is wrong."""
        return self.actual - self.expected


@dataclass(frozen=True, slots=True)
class JobBill:
    """A recomputed bill with its inputs. Times are chain time in seconds.

    `reported` is the duration in the provider's transaction; None if the transaction was not read
    or if the status needs no report. `settled` is false while the job is live; its lines then
    contain no comparison. `allotment`, `most` (the maximum that can be billed), `reported`,
    `seconds`, `escrow` and `cost` belong to the settlement. `collected_seconds` and `collected`
    (paid and fee, in credit-wei) belong to interim payments. `billed_seconds` and the lines include
    both. `why` is the rule that determined `seconds`.
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
        """Seconds from the start to the end of the run; zero if the job never ran."""
        return self.ended_at - self.started_at if self.started_at else 0

    @property
    def ok(self) -> bool:
        """Whether the billed seconds and all amounts are as expected."""
        if not self.settled:
            return True
        total = self.collected_seconds + self.seconds
        return total == self.billed_seconds and not any(line.difference for line in self.lines)


def recompute_bill(
    job: JobEntry, *, now: int | None = None, reported: int | None = None
) -> JobBill:
    """Compute a job's bill from start, end, rate and fee.

    Args:
        job: The job, as derived from its events.
        now: Chain time up to which a running job is charged; its `since` by default.
        reported: Seconds in the provider's report, if known. Without them, the billed seconds are
            only compared with their maximum.
    """
    final = job.status.is_final
    ended_at = job.ended_at if final else max(now or 0, job.since)
    escrow = job.last_escrow
    most = min(ended_at - job.billed_until, job.allotment) if job.started_at else 0
    if job.status not in _REPORTED:
        reported = None
    seconds, rule = _seconds(job, most, reported)
    cost = job.rate * seconds
    share = fee_of(cost, job.fee_bps)
    refund = 0 if job.carried_out else escrow - cost
    lines = (
        _sum("paid", job.collected_paid + cost - share, job.paid, final=final),
        _sum("fee", job.collected_fee + share, job.fee, final=final),
        _sum("refunded", refund, job.refunded, final=final),
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
        why=rule,
        lines=lines,
    )


def _sum(name: str, expected: int, actual: int, *, final: bool) -> BillLine:
    """Return a line. Before the settlement there is no actual amount to compare with."""
    return BillLine(name, expected, actual if final else expected)


def _seconds(job: JobEntry, most: int, reported: int | None) -> tuple[int, str]:
    """Return the seconds that the settlement must have billed, and the rule behind them."""
    settled_seconds = job.billed_seconds - job.collected_seconds
    if not job.started_at:
        result = 0, "it never ran"
    elif job.status in _REPORTED and reported is not None:
        result = min(reported, most), "the least of reported, elapsed and granted seconds"
    elif job.status in _REPORTED:
        result = min(settled_seconds, most), "what was reported, at most elapsed and granted"
    elif job.status is JobStatus.PANICKED:
        result = 0, "a panic costs nothing"
    elif job.status is not JobStatus.CANCELLED:
        result = most, "so far: elapsed seconds, at most the allotment"
    elif settled_seconds == 0:
        # The replay checks whether the run was lost, because it has the provider's challenges.
        result = 0, "cancelled as a lost run, which costs nothing"
    else:
        result = most, "cancelled while it ran: elapsed seconds, at most the allotment"
    return result
