"""A ledger rebuilt from events only, and its comparison with storage, databases and executions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from deepsquare_chain.chain.bindings.events import (
    Event,
    JobCollected,
    JobPriced,
    JobRetried,
    JobSettled,
    JobSubmitted,
    JobToppedUp,
    JobTransition,
)
from deepsquare_chain.credits import allotment
from deepsquare_chain.job import Job, JobStatus
from deepsquare_chain.provider.model import Phase, Run
from deepsquare_chain.provider.state import Earning


@dataclass
class LedgerLine:
    """The ledger entry of one job, in credit-wei.

    `collected` is the part of `paid` and `fee` from interim payments.
    """

    status: JobStatus = JobStatus.NONE
    customer: str = ""
    provider: str = ""
    funded: int = 0
    carried_in: int = 0
    carried_out: int = 0
    billed_seconds: int = 0
    paid: int = 0
    fee: int = 0
    refunded: int = 0
    collected_seconds: int = 0
    collected: int = 0
    ends: int = 0
    starts: int = 0
    claims: int = 0


def replay(events: Iterable[Event]) -> dict[int, LedgerLine]:
    """Build one ledger entry per job."""
    ledger: dict[int, LedgerLine] = {}

    def line(job_id: int) -> LedgerLine:
        return ledger.setdefault(job_id, LedgerLine())

    for event in events:
        if isinstance(event, JobSubmitted):
            line(event.job_id).funded += event.terms.amount
        elif isinstance(event, JobToppedUp):
            line(event.job_id).funded += event.amount
        elif isinstance(event, JobTransition):
            entry = line(event.job_id)
            assert entry.status is event.before, f"job {event.job_id} jumps"
            entry.status, entry.customer = event.after, event.customer
            entry.starts += event.after is JobStatus.RUNNING
            entry.claims += event.after is JobStatus.SCHEDULED
        elif isinstance(event, JobPriced):
            line(event.job_id).provider = event.provider
        elif isinstance(event, JobSettled):
            entry = line(event.job_id)
            entry.ends += 1
            entry.billed_seconds += event.billed_seconds
            entry.paid += event.paid
            entry.fee += event.fee
            entry.refunded += event.refunded
        elif isinstance(event, JobCollected):
            entry = line(event.job_id)
            entry.collected_seconds += event.billed_seconds
            entry.collected += event.paid + event.fee
            entry.billed_seconds += event.billed_seconds
            entry.paid += event.paid
            entry.fee += event.fee
        elif isinstance(event, JobRetried):
            line(event.job_id).ends += 1
            line(event.job_id).carried_out += event.escrow
            line(event.successor).carried_in += event.escrow
    return ledger


def check_ledger(ledger: Mapping[int, LedgerLine], jobs: Iterable[Job]) -> None:
    """Check that events and storage agree to the wei, and that every final job ended once."""
    payments = set()
    for job in jobs:
        payments.add(job.id)
        line = ledger[job.id]
        assert line.status is job.status
        assert line.starts <= 1
        if not job.status.is_final:
            assert line.funded + line.carried_in == job.escrow + line.collected
            continue
        assert line.ends == 1, f"job {job.id} ended {line.ends} times"
        spent = line.paid + line.fee + line.refunded + line.carried_out
        assert line.funded + line.carried_in == spent
        assert job.escrow == line.paid + line.fee - line.collected
    assert payments == set(ledger)


def check_provider(
    account: str,
    ledger: Mapping[int, LedgerLine],
    jobs: Mapping[int, Job],
    rows: Iterable[Run],
    earned: Iterable[Earning],
    elapsed: Mapping[int, int] | None = None,
) -> None:
    """Check that the provider's database agrees with the events on earnings and billed seconds.

    `elapsed` holds the chain seconds of each run. It is given if a reorg has changed timestamps: the
    contract bills at most these seconds.
    """
    paid_jobs = {
        earning for earning, line in ledger.items() if line.provider == account and line.paid
    }
    earnings = {earning.job_id: earning for earning in earned}
    recorded = {job_id for job_id, earning in earnings.items() if earning.paid}
    assert recorded == paid_jobs, f"recorded {recorded}, paid {paid_jobs}"
    for job_id, earning in earnings.items():
        line = ledger[job_id]
        assert (earning.billed_seconds, earning.paid, earning.fee) == (
            line.billed_seconds,
            line.paid,
            line.fee,
        )
    for row in rows:
        job = jobs[row.job_id]
        if job.status.is_final:
            assert row.phase is Phase.CLOSED, row
        if job.status in {JobStatus.FINISHED, JobStatus.FAILED} and row.job_id in paid_jobs:
            assert row.exit is not None
            due = row.exit.seconds
            if elapsed is not None:
                due = min(due, elapsed[job.id])
            # An interim payment bills chain time, which includes the overhead around the run.
            due = max(due, ledger[job.id].collected_seconds)
            assert ledger[job.id].billed_seconds == due, f"job {job.id}"
        if job.status is JobStatus.OUT_OF_CREDITS and row.job_id in paid_jobs:
            allotted = allotment(job.time_limit, job.until_spent, job.escrow, job.rate)
            assert ledger[job.id].billed_seconds == allotted + ledger[job.id].collected_seconds


def check_executions(ledger: Mapping[int, LedgerLine], executions: Mapping[int, int]) -> None:
    """Check the number of executions: once if the job ended by itself, at most once per claim."""
    for job_id, line in ledger.items():
        count = executions.get(job_id, 0)
        if line.status in {JobStatus.FINISHED, JobStatus.FAILED, JobStatus.OUT_OF_CREDITS}:
            assert count == 1, f"job {job_id} ran {count} times"
        # An executor with a queue may start a job that is cancelled before its start is on chain.
        assert count <= line.claims, f"job {job_id} ran {count} times, claimed {line.claims}"
    assert set(executions) <= set(ledger)
