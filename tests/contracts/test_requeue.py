"""requeue: by the provider, or by other accounts after a timeout."""

from __future__ import annotations

import pytest

from deepsquare_chain.job import JobStatus
from tests.support.evm import reverts
from tests.support.grid import TERMS, TIMES, Grid, Host

pytestmark = pytest.mark.contracts
TIMEOUT = TIMES["claimTimeout"]
ASSIGNED = [JobStatus.META_SCHEDULED, JobStatus.SCHEDULED]
in_each_assigned_status = pytest.mark.parametrize("status", ASSIGNED)


def requeue(grid: Grid, job_id: int, sender: str, reason: str = "") -> object:
    return grid.scheduler.requeue([job_id], reason, sender=sender)


@in_each_assigned_status
def test_the_provider_may_at_any_time(grid: Grid, host: Host, status: JobStatus) -> None:
    job_id = grid.in_status(status, host)
    before = grid.job(job_id)
    grid.chain.advance(1)
    receipt = grid.scheduler.requeue([job_id], "no room", sender=host.account)

    assert grid.job(job_id) == before._replace(
        status=JobStatus.PENDING, since=grid.chain.now, providerId=0, rate=0, feeBps=0
    )
    assert receipt.one("JobTransition").parameters == {
        "jobId": job_id,
        "customer": grid.alice,
        "provider": host.account,
        "from": status,
        "to": JobStatus.PENDING,
    }
    assert receipt.one("JobRequeued").parameters == {
        "jobId": job_id,
        "by": host.account,
        "reason": "no room",
    }
    assert grid.scheduler.isBarred(job_id, host.id)
    assert grid.balance(grid.scheduler.address) == TERMS["amount"]


def test_anyone_may_once_the_claim_is_late(grid: Grid, host: Host) -> None:
    accounts = (grid.stranger, grid.alice, grid.bob, grid.meta, grid.treasury)
    ids = {caller: grid.assigned(host) for caller in accounts}
    grid.chain.advance(TIMEOUT)
    for caller, job_id in ids.items():
        with reverts("TooEarly", job_id):
            requeue(grid, job_id, caller)
    grid.chain.advance(1)
    for caller, job_id in ids.items():
        requeue(grid, job_id, caller)
        assert grid.status(job_id) is JobStatus.PENDING
        assert grid.scheduler.isBarred(job_id, host.id)


def test_a_late_start_is_for_customer_and_scheduler(grid: Grid, host: Host) -> None:
    first, second = grid.claimed(host), grid.claimed(host)
    grid.chain.advance(TIMEOUT)
    for caller in (grid.alice, grid.meta, grid.stranger):
        with reverts("TooEarly", first):
            requeue(grid, first, caller)
    grid.chain.advance(1)
    for caller in (grid.stranger, grid.bob, grid.admin):
        with reverts("TooEarly", first):
            requeue(grid, first, caller)
    requeue(grid, first, grid.alice)
    requeue(grid, second, grid.meta)
    assert [grid.status(i) for i in (first, second)] == [JobStatus.PENDING] * 2


def test_the_claim_starts_the_clock_again(grid: Grid, host: Host) -> None:
    job_id = grid.assigned(host)
    grid.chain.advance(TIMEOUT)
    grid.scheduler.claim([job_id], sender=host.account)
    grid.chain.advance(TIMEOUT)
    with reverts("TooEarly", job_id):
        requeue(grid, job_id, grid.alice)


def test_anyone_may_take_claimed_work_from_a_silent_provider(grid: Grid, host: Host) -> None:
    job_id, unclaimed = grid.claimed(host), grid.assigned(host)
    grid.silence(host, job_id)
    # the claim is not late yet, even if the provider is silent
    with reverts("TooEarly", unclaimed):
        requeue(grid, unclaimed, grid.stranger)
    requeue(grid, job_id, grid.stranger)
    assert grid.status(job_id) is JobStatus.PENDING


def test_anyone_may_take_claimed_work_from_a_banned_provider(grid: Grid, host: Host) -> None:
    first, second = grid.claimed(host), grid.claimed(host)
    grid.registry.setDraining(True, sender=host.account)
    with reverts("TooEarly", first):
        requeue(grid, first, grid.stranger)
    grid.registry.ban(host.account, "cheated", sender=grid.admin)
    requeue(grid, first, grid.stranger)
    grid.registry.unban(host.account, sender=grid.admin)
    with reverts("TooEarly", second):
        requeue(grid, second, grid.stranger)


def test_other_statuses_stay(grid: Grid, host: Host) -> None:
    for status in JobStatus:
        if status in ASSIGNED:
            continue
        job_id = grid.in_status(status, host)
        grid.chain.advance(10**5)
        for caller in (host.account, grid.meta):
            with reverts("InvalidTransition", job_id, status, JobStatus.PENDING):
                requeue(grid, job_id, caller)


@pytest.mark.parametrize(
    ("caller_role", "clock_unchanged"),
    [("provider", True), ("alice", True), ("meta", False), ("stranger", False)],
)
def test_other_accounts_may_act_but_give_no_reason(
    grid: Grid, host: Host, caller_role: str, clock_unchanged: bool
) -> None:
    job_id = grid.assigned(host)
    grid.chain.advance(TIMEOUT + 1)
    caller = host.account if caller_role == "provider" else getattr(grid, caller_role)
    receipt = grid.scheduler.requeue([job_id], "my reason", sender=caller)
    assert receipt.one("JobRequeued").reason == ("my reason" if clock_unchanged else "")


def test_reasons_are_bounded(grid: Grid, host: Host) -> None:
    job_id = grid.assigned(host)
    with reverts("ReasonTooLong", job_id):
        requeue(grid, job_id, host.account, "r" * 257)
    requeue(grid, job_id, host.account, "r" * 256)


def test_the_job_can_be_assigned_again_at_another_price(
    grid: Grid, host: Host, other: Host
) -> None:
    job_id = grid.claimed(host)
    requeue(grid, job_id, host.account)
    grid.registry.setPrices({"cpu": 1, "gpu": 1, "mem": 1}, sender=other.account)
    grid.scheduler.setFee(7, sender=grid.admin)
    grid.assign(other, job_id)
    job = grid.job(job_id)
    assert (job.rate, job.feeBps, job.providerId) == (6 + 1 + 600, 7, other.id)


def test_batches_skip_refused_jobs(grid: Grid, host: Host, other: Host) -> None:
    own_job, others_job, pending = grid.assigned(host), grid.assigned(other), grid.submit()
    receipt = grid.scheduler.requeue(
        [others_job, own_job, pending, own_job, 0], "", sender=host.account
    )
    assert [
        (e.jobId, JobStatus(e.status), grid.chain.error_name(e.reason))
        for e in receipt.named("TransitionSkipped")
    ] == [
        (others_job, JobStatus.META_SCHEDULED, "TooEarly"),
        (pending, JobStatus.PENDING, "InvalidTransition"),
        (own_job, JobStatus.PENDING, "InvalidTransition"),
        (0, JobStatus.NONE, "InvalidTransition"),
    ]
    with reverts("TooEarly", others_job):
        grid.scheduler.requeue([others_job, pending], "", sender=host.account)
    with reverts("EmptyBatch"):
        grid.scheduler.requeue([], "", sender=host.account)
