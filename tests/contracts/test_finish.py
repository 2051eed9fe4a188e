"""finish: the bill, the final status, and the payments."""

from __future__ import annotations

import pytest

from deepsquare_chain.job import JobStatus
from tests.support.evm import reverts
from tests.support.grid import FEE_BPS, RATE, TERMS, UNTIL_SPENT, WEALTH, Grid, Host, digest, fee_of

pytestmark = pytest.mark.contracts
LIMIT = TERMS["timeLimit"]
ESCROW = TERMS["amount"]


@pytest.mark.parametrize(
    ("elapsed", "reported", "billed"),
    [
        (10, 10, 10),
        (10, 7, 7),
        (10, 11, 10),
        (10, 2**32 - 1, 10),
        (10, 0, 0),
        (0, 5, 0),
        (LIMIT - 1, LIMIT, LIMIT - 1),
        (LIMIT, LIMIT, LIMIT),
        (LIMIT, LIMIT - 1, LIMIT - 1),
        (LIMIT + 1_000, LIMIT + 1, LIMIT),
        (LIMIT + 1_000, 2**32 - 1, LIMIT),
    ],
)
@pytest.mark.parametrize("exit_code", [0, 1, -1, 2**31 - 1, -(2**31)])
def test_the_bill_and_the_final_status(
    grid: Grid, host: Host, elapsed: int, reported: int, billed: int, exit_code: int
) -> None:
    job_id = grid.running(host)
    grid.chain.advance(elapsed)
    receipt = grid.finish(host, job_id, reported, exit_code)

    expected_status = JobStatus.FINISHED if exit_code == 0 else JobStatus.FAILED
    status = JobStatus.OUT_OF_CREDITS if billed == LIMIT else expected_status
    cost = billed * RATE
    job = grid.job(job_id)
    assert (job.status, job.escrow, job.since) == (status, cost, grid.chain.now)
    assert (job.rate, job.feeBps, job.providerId) == (RATE, FEE_BPS, host.id)
    assert receipt.one("JobSettled").parameters == {
        "jobId": job_id,
        "provider": host.account,
        "customer": grid.alice,
        "billedSeconds": billed,
        "paid": cost - fee_of(cost),
        "fee": fee_of(cost),
        "refunded": ESCROW - cost,
    }
    assert receipt.one("JobTransition").to == status
    assert grid.balance(host.account) == cost - fee_of(cost)
    assert grid.balance(grid.treasury) == fee_of(cost)
    assert grid.balance(grid.alice) == WEALTH - cost
    assert grid.balance(grid.scheduler.address) == 0


def test_until_spent_runs_on_past_the_limit(grid: Grid, host: Host) -> None:
    job_id = grid.running(host, flags=UNTIL_SPENT)
    allotted = ESCROW // RATE
    assert allotted > LIMIT
    assert grid.scheduler.allotment(job_id) == allotted
    grid.chain.advance(LIMIT + 50)
    grid.finish(host, job_id, LIMIT + 50)
    assert grid.status(job_id) is JobStatus.FINISHED
    assert grid.job(job_id).escrow == (LIMIT + 50) * RATE


def test_until_spent_ends_with_the_last_whole_second(grid: Grid, host: Host) -> None:
    job_id = grid.running(host, flags=UNTIL_SPENT)
    allotted = ESCROW // RATE
    grid.chain.advance(allotted + 9)
    settled = grid.finish(host, job_id, allotted + 9).one("JobSettled")
    assert settled.billedSeconds == allotted
    assert 0 < settled.refunded == ESCROW - allotted * RATE < RATE
    assert grid.status(job_id) is JobStatus.OUT_OF_CREDITS


def test_result_and_reason_are_reported_as_given(grid: Grid, host: Host) -> None:
    job_id = grid.running(host)
    report = grid.report(job_id, 0, -9, digest(7), "tué par un signal".encode())
    event = grid.scheduler.finish([report], sender=host.account).one("JobResult")
    assert event.parameters == {
        "jobId": job_id,
        "exitCode": -9,
        "result": digest(7),
        "reason": "tué par un signal".encode().ljust(32, b"\0"),
    }


def test_only_the_provider_reports(grid: Grid, host: Host, other: Host) -> None:
    job_id = grid.running(host)
    for caller in (other.account, grid.alice, grid.meta, grid.admin, grid.stranger):
        with reverts("NotAssignedProvider", job_id):
            grid.scheduler.finish([grid.report(job_id, 1)], sender=caller)


@pytest.mark.parametrize("exit_code", [0, 1])
def test_only_running_jobs_can_be_finished(grid: Grid, host: Host, exit_code: int) -> None:
    to = JobStatus.FAILED if exit_code else JobStatus.FINISHED
    for status in JobStatus:
        if status is JobStatus.RUNNING:
            continue
        job_id = grid.in_status(status, host)
        with reverts("InvalidTransition", job_id, status, to):
            grid.finish(host, job_id, 1, exit_code)


def test_a_batch_pays_each_recipient_once(grid: Grid, host: Host) -> None:
    ids = [grid.running(host, customer=customer) for customer in (grid.alice, grid.bob, grid.alice)]
    grid.chain.advance(10)
    receipt = grid.scheduler.finish(
        [grid.report(job_id, seconds) for job_id, seconds in zip(ids, (3, 5, 10), strict=True)],
        sender=host.account,
    )
    fees = sum(fee_of(s * RATE) for s in (3, 5, 10))
    paid = {(e.parameters["to"], e.value) for e in receipt.named("Transfer")}
    assert paid == {
        (host.account, 18 * RATE - fees),
        (grid.treasury, fees),
        (grid.alice, 2 * ESCROW - 13 * RATE),
        (grid.bob, ESCROW - 5 * RATE),
    }
    assert len(receipt.named("Transfer")) == 4


def test_batches_skip_refused_jobs(grid: Grid, host: Host, other: Host) -> None:
    own_job, others_job, claimed = grid.running(host), grid.running(other), grid.claimed(host)
    grid.chain.advance(10)
    reports = [grid.report(job_id, 10) for job_id in (others_job, own_job, claimed, own_job, 0)]
    receipt = grid.scheduler.finish(reports, sender=host.account)
    assert [
        (e.jobId, JobStatus(e.status), grid.chain.error_name(e.reason))
        for e in receipt.named("TransitionSkipped")
    ] == [
        (others_job, JobStatus.RUNNING, "NotAssignedProvider"),
        (claimed, JobStatus.SCHEDULED, "InvalidTransition"),
        (own_job, JobStatus.FINISHED, "InvalidTransition"),
        (0, JobStatus.NONE, "InvalidTransition"),
    ]
    assert grid.balance(host.account) == 10 * RATE - fee_of(10 * RATE)
    assert grid.balance(grid.scheduler.address) == 2 * ESCROW
    with reverts("NotAssignedProvider", others_job):
        grid.scheduler.finish(reports[:1], sender=host.account)
    with reverts("EmptyBatch"):
        grid.scheduler.finish([], sender=host.account)


def test_a_late_report_counts_until_someone_panics(grid: Grid, host: Host) -> None:
    job_id = grid.running(host)
    grid.chain.advance(LIMIT + 10**6)
    assert grid.scheduler.isLost(job_id)
    settled = grid.finish(host, job_id, 5).one("JobSettled")
    assert settled.billedSeconds == 5


def test_a_silent_provider_may_still_report(grid: Grid, host: Host) -> None:
    job_id = grid.running(host)
    grid.silence(host, job_id)
    assert grid.finish(host, job_id, 5).one("JobSettled").billedSeconds == 5


def test_fee_is_floored_in_favour_of_the_provider(grid: Grid) -> None:
    odd = grid.provider("odd", prices={"cpu": 1, "gpu": 0, "mem": 0})
    job_id = grid.running(odd, tasks=1, cpusPerTask=1, memPerCpu=1, gpus=0)
    grid.chain.advance(39)
    settled = grid.finish(odd, job_id, 39).one("JobSettled")
    assert (settled.paid, settled.fee) == (38, 1)


def test_without_a_fee_the_treasury_gets_no_transfer(grid: Grid, host: Host) -> None:
    grid.scheduler.setFee(0, sender=grid.admin)
    job_id = grid.running(host)
    grid.chain.advance(10)
    receipt = grid.finish(host, job_id, 10)
    assert {e.parameters["to"] for e in receipt.named("Transfer")} == {host.account, grid.alice}
    assert receipt.one("JobSettled").fee == 0
