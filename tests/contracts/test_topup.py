"""topUp: the payer, the extension, and the deadline."""

from __future__ import annotations

import pytest

from deepsquare_chain.job import JobStatus
from tests.support.evm import reverts
from tests.support.grid import RATE, TERMS, TIMES, UNTIL_SPENT, WEALTH, Grid, Host

pytestmark = pytest.mark.contracts
LIMIT = TERMS["timeLimit"]
ESCROW = TERMS["amount"]
NOTICE = TIMES["topUpNotice"]


def top_up(grid: Grid, job_id: int, amount: int, sender: str | None = None) -> object:
    return grid.scheduler.topUp(job_id, grid.alice, amount, sender=sender or grid.alice)


def test_a_pending_job_gets_escrow_and_keeps_its_limit(grid: Grid) -> None:
    job_id = grid.submit()
    receipt = grid.scheduler.topUp(job_id, grid.alice, 1, sender=grid.alice)
    assert receipt.one("JobToppedUp").parameters == {
        "jobId": job_id,
        "payer": grid.alice,
        "amount": 1,
        "escrow": ESCROW + 1,
        "timeLimit": LIMIT,
    }
    job = grid.job(job_id)
    assert (job.escrow, job.timeLimit) == (ESCROW + 1, LIMIT)
    assert grid.balance(grid.scheduler.address) == ESCROW + 1


@pytest.mark.parametrize("status", [s for s in JobStatus if s.is_assigned])
@pytest.mark.parametrize(("extra", "seconds"), [(0, 60), (RATE - 1, 60), (RATE, 61)])
def test_an_assigned_job_gets_escrow_and_whole_seconds(
    grid: Grid, host: Host, status: JobStatus, extra: int, seconds: int
) -> None:
    job_id = grid.in_status(status, host)
    before = grid.job(job_id)
    top_up(grid, job_id, 60 * RATE + extra)
    assert grid.job(job_id) == before._replace(
        escrow=ESCROW + 60 * RATE + extra, timeLimit=LIMIT + seconds
    )
    assert grid.scheduler.allotment(job_id) == LIMIT + seconds


def test_until_spent_gets_time_by_its_escrow(grid: Grid, host: Host) -> None:
    job_id = grid.running(host, flags=UNTIL_SPENT)
    top_up(grid, job_id, 60 * RATE)
    job = grid.job(job_id)
    assert (job.timeLimit, job.escrow) == (LIMIT, ESCROW + 60 * RATE)
    assert grid.scheduler.allotment(job_id) == (ESCROW + 60 * RATE) // RATE


def test_a_top_up_by_another_account_does_not_extend_the_limit_and_is_refunded_to_the_customer(
    grid: Grid, host: Host
) -> None:
    job_id = grid.running(host)
    receipt = grid.scheduler.topUp(job_id, grid.alice, 60 * RATE, sender=grid.bob)
    assert (receipt.one("JobToppedUp").payer, receipt.one("JobToppedUp").timeLimit) == (
        grid.bob,
        LIMIT,
    )
    assert grid.balance(grid.bob) == WEALTH - 60 * RATE
    grid.chain.advance(LIMIT + 60)
    settled = grid.finish(host, job_id, LIMIT + 60).one("JobSettled")
    assert settled.billedSeconds == LIMIT
    assert grid.balance(grid.alice) == WEALTH - (LIMIT - 60) * RATE


def test_the_named_customer_must_be_the_jobs(grid: Grid, host: Host) -> None:
    for job_id in (grid.submit(), grid.running(host)):
        with reverts("NotCustomer", job_id):
            grid.scheduler.topUp(job_id, grid.bob, 60 * RATE, sender=grid.bob)


def test_only_live_jobs(grid: Grid, host: Host) -> None:
    for status in (s for s in JobStatus if not s.is_live):
        job_id = grid.in_status(status, host)
        customer = grid.job(job_id).customer
        with reverts("WrongStatus", job_id, status):
            grid.scheduler.topUp(job_id, customer, 60 * RATE, sender=grid.alice)


def test_the_least_is_a_minute_of_the_rate(grid: Grid, host: Host) -> None:
    pending = grid.submit()
    with reverts("TopUpTooSmall", pending, 0, 1):
        top_up(grid, pending, 0)
    for status in (s for s in JobStatus if s.is_assigned):
        job_id = grid.in_status(status, host)
        with reverts("TopUpTooSmall", job_id, 60 * RATE - 1, 60 * RATE):
            top_up(grid, job_id, 60 * RATE - 1)


def test_too_late_in_the_last_seconds_of_a_running_allotment(grid: Grid, host: Host) -> None:
    job_id = grid.running(host)
    end = grid.chain.now + LIMIT
    grid.chain.advance(LIMIT - NOTICE - 1)
    before = grid.chain.snapshot()
    top_up(grid, job_id, 60 * RATE)
    assert grid.scheduler.deadline(job_id) == end + 60
    grid.chain.revert(before)
    for wait in (1, 1, NOTICE, 10**6):
        grid.chain.advance(wait)
        with reverts("TopUpTooLate", job_id, end):
            top_up(grid, job_id, 60 * RATE)


def test_the_notice_counts_from_the_extended_end(grid: Grid, host: Host) -> None:
    job_id = grid.running(host)
    top_up(grid, job_id, 60 * RATE)
    grid.chain.advance(LIMIT)
    top_up(grid, job_id, 60 * RATE)
    assert grid.job(job_id).timeLimit == LIMIT + 120


def test_topup_of_an_until_spent_job_is_refused_after_its_end(grid: Grid, host: Host) -> None:
    job_id = grid.running(host, flags=UNTIL_SPENT)
    end = grid.chain.now + ESCROW // RATE
    grid.chain.advance(ESCROW // RATE - NOTICE)
    with reverts("TopUpTooLate", job_id, end):
        top_up(grid, job_id, 60 * RATE)


def test_no_notice_before_the_start(grid: Grid, host: Host) -> None:
    job_id = grid.claimed(host, timeLimit=1)
    grid.chain.advance(10**6)
    top_up(grid, job_id, 60 * RATE)
    assert grid.job(job_id).timeLimit == 61


def test_an_escrow_that_a_record_cannot_hold_is_refused(grid: Grid, host: Host) -> None:
    grid.credit.mint(grid.alice, 2**97, sender=grid.admin)
    full = grid.submit(amount=2**96 - 1)
    with reverts("TopUpTooLarge", full):
        top_up(grid, full, 1)
    job_id = grid.submit(amount=2**96 - 2)
    top_up(grid, job_id, 1)
    assert grid.job(job_id).escrow == 2**96 - 1
    assert grid.job(job_id).timeLimit == LIMIT


def test_a_limit_that_a_record_cannot_hold_is_refused(grid: Grid, host: Host) -> None:
    job_id = grid.running(host)
    seconds_left = 2**24 - 1 - LIMIT
    with reverts("TopUpTooLarge", job_id):
        top_up(grid, job_id, (seconds_left + 1) * RATE)
    top_up(grid, job_id, (seconds_left + 1) * RATE - 1)
    job = grid.job(job_id)
    assert (job.timeLimit, job.tasks, job.rate) == (2**24 - 1, 2, RATE)


def test_without_credits_or_allowance_nothing_happens(grid: Grid) -> None:
    job_id = grid.submit()
    with reverts("ERC20InsufficientAllowance"):
        top_up(grid, job_id, 5, sender=grid.stranger)
    grid.credit.approve(grid.scheduler.address, 5, sender=grid.stranger)
    with reverts("ERC20InsufficientBalance"):
        top_up(grid, job_id, 5, sender=grid.stranger)
    assert grid.job(job_id).escrow == ESCROW


def test_a_lost_run_can_still_be_ended_after_a_top_up(grid: Grid, host: Host) -> None:
    """A top-up by another account can't keep the run of an unresponsive provider alive."""
    job_id = grid.running(host)
    top_up(grid, job_id, 10**6 * RATE, sender=grid.bob)
    grid.abandon(host, job_id)
    grid.scheduler.cancel([job_id], sender=grid.alice)
    assert grid.balance(grid.alice) == WEALTH + 10**6 * RATE


def test_closed_submissions_do_not_stop_top_ups(grid: Grid) -> None:
    job_id = grid.submit()
    grid.scheduler.setSubmissionsOpen(False, sender=grid.admin)
    top_up(grid, job_id, 5)
    assert grid.job(job_id).escrow == ESCROW + 5
