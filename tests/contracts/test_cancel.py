"""cancel: free before the start, time used while running, free when the run is lost."""

from __future__ import annotations

import pytest

from deepsquare_chain.job import JobStatus
from tests.support.evm import ZERO, reverts
from tests.support.grid import RATE, TERMS, TIMES, UNTIL_SPENT, WEALTH, Grid, Host, fee_of

pytestmark = pytest.mark.contracts
LIMIT = TERMS["timeLimit"]
ESCROW = TERMS["amount"]


@pytest.mark.parametrize(
    "status", [JobStatus.PENDING, JobStatus.META_SCHEDULED, JobStatus.SCHEDULED]
)
def test_before_the_start_everything_comes_back(grid: Grid, host: Host, status: JobStatus) -> None:
    job_id = grid.in_status(status, host)
    grid.chain.advance(40)
    receipt = grid.scheduler.cancel([job_id], sender=grid.alice)

    provider = ZERO if status is JobStatus.PENDING else host.account
    assert receipt.one("JobTransition").parameters == {
        "jobId": job_id,
        "customer": grid.alice,
        "provider": provider,
        "from": status,
        "to": JobStatus.CANCELLED,
    }
    settled = receipt.one("JobSettled")
    assert (settled.provider, settled.billedSeconds) == (provider, 0)
    assert (settled.paid, settled.fee, settled.refunded) == (0, 0, ESCROW)
    assert len(receipt.named("Transfer")) == 1
    assert grid.balance(grid.alice) == WEALTH
    job = grid.job(job_id)
    assert (job.status, job.escrow, job.since) == (JobStatus.CANCELLED, 0, grid.chain.now)


@pytest.mark.parametrize(
    ("elapsed", "billed"), [(0, 0), (1, 1), (LIMIT - 1, LIMIT - 1), (LIMIT, LIMIT), (900, LIMIT)]
)
def test_while_running_the_time_used_is_paid(
    grid: Grid, host: Host, elapsed: int, billed: int
) -> None:
    job_id = grid.running(host)
    grid.chain.advance(elapsed)
    settled = grid.scheduler.cancel([job_id], sender=grid.alice).one("JobSettled")
    cost = billed * RATE
    assert (settled.billedSeconds, settled.paid) == (billed, cost - fee_of(cost))
    assert grid.status(job_id) is JobStatus.CANCELLED
    assert grid.balance(host.account) == cost - fee_of(cost)
    assert grid.balance(grid.treasury) == fee_of(cost)
    assert grid.balance(grid.alice) == WEALTH - cost


def test_until_spent_pays_no_more_than_the_allotment(grid: Grid, host: Host) -> None:
    job_id = grid.running(host, flags=UNTIL_SPENT)
    grid.chain.advance(ESCROW // RATE + 77)
    settled = grid.scheduler.cancel([job_id], sender=grid.alice).one("JobSettled")
    assert settled.billedSeconds == ESCROW // RATE
    assert settled.refunded == ESCROW % RATE


def test_an_overdue_run_is_free_from_its_first_second(grid: Grid, host: Host) -> None:
    job_id, second_id = grid.running(host), grid.running(host)
    grid.chain.advance(LIMIT + TIMES["reportGrace"])
    grid.scheduler.cancel([second_id], sender=grid.alice)
    assert grid.job(second_id).escrow == LIMIT * RATE
    grid.chain.advance(1)
    assert grid.scheduler.isLost(job_id)
    settled = grid.scheduler.cancel([job_id], sender=grid.alice).one("JobSettled")
    assert (settled.paid, settled.fee, settled.refunded) == (0, 0, ESCROW)


def test_a_run_at_a_provider_that_is_gone_is_free(grid: Grid, host: Host) -> None:
    job_id = grid.running(host)
    grid.abandon(host, job_id)
    grid.scheduler.cancel([job_id], sender=grid.alice)
    assert grid.balance(grid.alice) == WEALTH
    assert grid.job(job_id).escrow == 0


def test_a_cancelled_lost_run_opens_no_successor(grid: Grid, host: Host) -> None:
    job_id = grid.running(host, retries=5)
    grid.abandon(host, job_id)
    grid.scheduler.cancel([job_id], sender=grid.alice)
    assert grid.scheduler.jobCount() == job_id


def test_no_other_account_may_cancel(grid: Grid, host: Host) -> None:
    for status in (s for s in JobStatus if s.is_live):
        job_id = grid.in_status(status, host)
        for caller in (host.account, grid.bob, grid.meta, grid.admin, grid.treasury):
            with reverts("NotCustomer", job_id):
                grid.scheduler.cancel([job_id], sender=caller)


def test_final_and_unknown_jobs_stay(grid: Grid, host: Host) -> None:
    for status in (s for s in JobStatus if not s.is_live):
        job_id = grid.in_status(status, host, retries=0)
        before = grid.job(job_id)
        with reverts("InvalidTransition", job_id, status, JobStatus.CANCELLED):
            grid.scheduler.cancel([job_id], sender=grid.alice)
        assert grid.job(job_id) == before


def test_a_batch_refunds_and_pays_each_recipient_once(grid: Grid, host: Host, other: Host) -> None:
    ids = [grid.running(provider) for provider in (host, other, host)] + [grid.submit()]
    grid.chain.advance(10)
    receipt = grid.scheduler.cancel(ids, sender=grid.alice)
    cost, fee = 10 * RATE, fee_of(10 * RATE)
    transfers = sorted((e.parameters["to"], e.value) for e in receipt.named("Transfer"))
    assert transfers == sorted(
        [
            (grid.alice, 4 * ESCROW - 3 * cost),
            (grid.treasury, 3 * fee),
            (host.account, 2 * (cost - fee)),
            (other.account, cost - fee),
        ]
    )


def test_batches_skip_refused_jobs(grid: Grid, host: Host) -> None:
    own_job, others_job = grid.submit(), grid.submit(grid.bob)
    finished = grid.in_status(JobStatus.FINISHED, host)
    receipt = grid.scheduler.cancel([others_job, own_job, own_job, finished, 0], sender=grid.alice)
    assert [grid.chain.error_name(e.reason) for e in receipt.named("TransitionSkipped")] == [
        "NotCustomer",
        "InvalidTransition",
        "InvalidTransition",
        "InvalidTransition",
    ]
    assert receipt.one("Transfer").value == ESCROW
    assert grid.status(others_job) is JobStatus.PENDING
    with reverts("NotCustomer", others_job):
        grid.scheduler.cancel([others_job, own_job], sender=grid.alice)
    with reverts("EmptyBatch"):
        grid.scheduler.cancel([], sender=grid.alice)
