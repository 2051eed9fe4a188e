"""panic: a job given up or lost is refunded in full or continued by a successor."""

from __future__ import annotations

import pytest

from deepsquare_chain.job import JobStatus
from tests.support.evm import ZERO, reverts
from tests.support.grid import (
    RATE,
    SUCCESSOR,
    TERMS,
    TIMES,
    UNTIL_SPENT,
    WEALTH,
    Grid,
    Host,
    digest,
)

pytestmark = pytest.mark.contracts
LIMIT = TERMS["timeLimit"]
ESCROW = TERMS["amount"]


def panic(grid: Grid, job_id: int, sender: str, reason: str = "") -> object:
    return grid.scheduler.panic([job_id], reason, sender=sender)


@pytest.mark.parametrize("status", [JobStatus.META_SCHEDULED, JobStatus.SCHEDULED])
def test_before_the_start_it_is_refunded_without_retries(
    grid: Grid, host: Host, status: JobStatus
) -> None:
    job_id = grid.in_status(status, host, retries=0)
    receipt = grid.scheduler.panic([job_id], "disk broke", sender=host.account)
    assert receipt.one("JobPanicked").parameters == {
        "jobId": job_id,
        "by": host.account,
        "reason": "disk broke",
    }
    settled = receipt.one("JobSettled")
    assert (settled.paid, settled.fee, settled.refunded) == (0, 0, ESCROW)
    assert not receipt.named("JobRetried")
    assert grid.balance(grid.alice) == WEALTH
    job = grid.job(job_id)
    assert (job.status, job.escrow, job.retriesLeft) == (JobStatus.PANICKED, 0, 0)


@pytest.mark.parametrize("status", [JobStatus.META_SCHEDULED, JobStatus.SCHEDULED])
def test_before_the_start_only_the_provider_may(
    grid: Grid, host: Host, other: Host, status: JobStatus
) -> None:
    job_id = grid.in_status(status, host)
    grid.silence(host, job_id)
    grid.chain.advance(10**6)
    for caller in (grid.alice, grid.meta, grid.stranger, other.account):
        with reverts("NotAssignedProvider", job_id):
            panic(grid, job_id, caller)


def test_a_run_without_retries_is_refunded(grid: Grid, host: Host) -> None:
    job_id = grid.running(host, retries=0)
    grid.chain.advance(LIMIT)
    receipt = grid.scheduler.panic([job_id], "", sender=host.account)
    assert receipt.one("JobSettled").refunded == ESCROW
    assert receipt.one("Transfer").value == ESCROW
    assert grid.balance(host.account) == 0
    assert grid.balance(grid.alice) == WEALTH
    assert grid.scheduler.jobCount() == job_id


@pytest.mark.parametrize("status", [s for s in JobStatus if s.is_assigned])
def test_a_job_with_retries_is_carried_on(grid: Grid, host: Host, status: JobStatus) -> None:
    """A provider can't kill a job that its customer protected by retries."""
    job_id = grid.in_status(status, host, retries=2, flags=UNTIL_SPENT)
    before = grid.job(job_id)
    grid.chain.advance(7)
    receipt = grid.scheduler.panic([job_id], "", sender=host.account)

    successor = job_id + 1
    assert receipt.one("JobRetried").parameters == {
        "jobId": job_id,
        "successor": successor,
        "escrow": ESCROW,
    }
    assert [e.parameters for e in receipt.named("JobTransition")] == [
        {
            "jobId": job_id,
            "customer": grid.alice,
            "provider": host.account,
            "from": status,
            "to": JobStatus.PANICKED,
        },
        {
            "jobId": successor,
            "customer": grid.alice,
            "provider": ZERO,
            "from": JobStatus.NONE,
            "to": JobStatus.PENDING,
        },
    ]
    assert not receipt.named("JobSettled", "Transfer")
    assert grid.job(job_id) == before._replace(
        status=JobStatus.PANICKED, since=grid.chain.now, escrow=0
    )
    assert grid.job(successor) == before._replace(
        status=JobStatus.PENDING,
        since=grid.chain.now,
        providerId=0,
        rate=0,
        feeBps=0,
        retriesLeft=1,
        flags=UNTIL_SPENT | SUCCESSOR,
        retryOf=job_id,
    )
    assert grid.job(successor).definition == digest(0)
    assert grid.scheduler.jobCount() == successor
    assert grid.balance(grid.scheduler.address) == ESCROW


def test_a_chain_of_successors_ends_with_its_retries(grid: Grid) -> None:
    job_id = grid.submit(retries=5)
    for turn in range(6):
        host = grid.provider(f"provider {turn}")
        grid.assign(host, job_id)
        grid.scheduler.claim([job_id], sender=host.account)
        grid.scheduler.start([job_id], sender=host.account)
        receipt = grid.scheduler.panic([job_id], "", sender=host.account)
        if turn < 5:
            job_id = receipt.one("JobRetried").successor
            assert grid.job(job_id).retriesLeft == 4 - turn
    assert receipt.one("JobSettled").refunded == ESCROW
    assert grid.scheduler.jobCount() == 6
    assert grid.balance(grid.alice) == WEALTH


def test_topped_up_terms_are_carried_over(grid: Grid, host: Host) -> None:
    job_id = grid.running(host)
    grid.scheduler.topUp(job_id, grid.alice, 100 * RATE, sender=grid.alice)
    grid.scheduler.panic([job_id], "", sender=host.account)
    job = grid.job(job_id + 1)
    assert (job.escrow, job.timeLimit) == (ESCROW + 100 * RATE, LIMIT + 100)
    grid.scheduler.cancel([job_id + 1], sender=grid.alice)
    assert grid.balance(grid.alice) == WEALTH


def test_a_successor_is_opened_while_submissions_are_closed(grid: Grid, host: Host) -> None:
    job_id = grid.running(host)
    grid.scheduler.setSubmissionsOpen(False, sender=grid.admin)
    panic(grid, job_id, host.account)
    assert grid.status(job_id + 1) is JobStatus.PENDING


def test_a_successor_is_a_job_like_any_other(grid: Grid, host: Host, other: Host) -> None:
    job_id = grid.running(host)
    panic(grid, job_id, host.account)
    successor = job_id + 1
    grid.assign(other, successor)
    grid.scheduler.claim([successor], sender=other.account)
    grid.scheduler.start([successor], sender=other.account)
    grid.chain.advance(10)
    settled = grid.finish(other, successor, 10).one("JobSettled")
    assert settled.paid + settled.fee == 10 * RATE
    assert grid.balance(grid.alice) == WEALTH - 10 * RATE


# ----------------------------------------------------------------- lost runs


def test_strangers_end_a_run_only_once_it_is_overdue(grid: Grid, host: Host) -> None:
    job_id, second_id = grid.running(host), grid.running(host, timeLimit=LIMIT + 1)
    grid.chain.advance(LIMIT + TIMES["reportGrace"])
    for caller in (grid.stranger, grid.alice, grid.meta, grid.admin):
        with reverts("NotLost", job_id):
            panic(grid, job_id, caller)
    grid.chain.advance(1)
    assert grid.scheduler.isLost(job_id)
    assert not grid.scheduler.isLost(second_id)
    with reverts("NotLost", second_id):
        panic(grid, second_id, grid.stranger)
    panic(grid, job_id, grid.stranger)
    assert grid.status(job_id) is JobStatus.PANICKED
    assert grid.status(second_id) is JobStatus.RUNNING


def test_strangers_end_runs_of_a_provider_that_is_gone(grid: Grid, host: Host, other: Host) -> None:
    own_job, others_job = grid.running(host), grid.running(other)
    grid.scheduler.challenge(own_job, sender=grid.stranger)
    grid.chain.advance(TIMES["lostTimeout"], TIMES["responseBlocks"] + 1)
    with reverts("NotLost", own_job):
        panic(grid, own_job, grid.stranger)
    grid.chain.advance(1, 0)
    with reverts("NotLost", others_job):
        panic(grid, others_job, grid.stranger)
    panic(grid, own_job, grid.stranger)
    assert grid.status(own_job + 2) is JobStatus.PENDING


def test_an_answer_saves_the_run(grid: Grid, host: Host) -> None:
    job_id = grid.running(host)
    grid.abandon(host, job_id)
    grid.scheduler.answer(sender=host.account)
    with reverts("NotLost", job_id):
        panic(grid, job_id, grid.stranger)


@pytest.mark.parametrize(
    ("caller_role", "clock_unchanged"),
    [("provider", True), ("alice", True), ("meta", False), ("stranger", False)],
)
def test_other_accounts_may_act_but_give_no_reason(
    grid: Grid, host: Host, caller_role: str, clock_unchanged: bool
) -> None:
    job_id = grid.running(host)
    grid.abandon(host, job_id)
    caller = host.account if caller_role == "provider" else getattr(grid, caller_role)
    receipt = grid.scheduler.panic([job_id], "my reason", sender=caller)
    assert receipt.one("JobPanicked").reason == ("my reason" if clock_unchanged else "")


def test_reasons_are_bounded(grid: Grid, host: Host) -> None:
    job_id = grid.running(host)
    with reverts("ReasonTooLong", job_id):
        panic(grid, job_id, host.account, "r" * 257)
    panic(grid, job_id, host.account, "r" * 256)


def test_other_statuses_stay(grid: Grid, host: Host) -> None:
    for status in JobStatus:
        if status.is_assigned:
            continue
        job_id = grid.in_status(status, host)
        grid.chain.advance(10**5)
        for caller in (host.account, grid.stranger, grid.alice):
            with reverts("InvalidTransition", job_id, status, JobStatus.PANICKED):
                panic(grid, job_id, caller)


def test_each_job_of_a_mixed_batch_follows_its_terms(grid: Grid, host: Host, other: Host) -> None:
    carried = grid.running(host)
    refunded = grid.running(host, retries=0)
    unstarted = grid.claimed(host, customer=grid.bob, retries=0)
    others_job = grid.running(other)
    receipt = grid.scheduler.panic(
        [carried, others_job, refunded, unstarted, carried, 0], "", sender=host.account
    )
    assert [grid.chain.error_name(e.reason) for e in receipt.named("TransitionSkipped")] == [
        "NotLost",
        "InvalidTransition",
        "InvalidTransition",
    ]
    assert receipt.one("JobRetried").jobId == carried
    assert {e.parameters["to"]: e.value for e in receipt.named("Transfer")} == {
        grid.alice: ESCROW,
        grid.bob: ESCROW,
    }
    assert grid.status(others_job) is JobStatus.RUNNING
    with reverts("NotLost", others_job):
        grid.scheduler.panic([others_job], "", sender=host.account)
    with reverts("EmptyBatch"):
        grid.scheduler.panic([], "", sender=host.account)
