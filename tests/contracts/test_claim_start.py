"""claim and start: only the assigned provider, one step at a time."""

from __future__ import annotations

import pytest

from deepsquare_chain.job import JobStatus
from tests.support.evm import reverts
from tests.support.grid import TERMS, Grid, Host

pytestmark = pytest.mark.contracts
STEPS = [
    ("claim", JobStatus.META_SCHEDULED, JobStatus.SCHEDULED),
    ("start", JobStatus.SCHEDULED, JobStatus.RUNNING),
]
steps = pytest.mark.parametrize(("name", "before", "after"), STEPS)


@steps
def test_the_assigned_provider_moves_the_job_on(
    grid: Grid, host: Host, name: str, before: JobStatus, after: JobStatus
) -> None:
    job_id = grid.in_status(before, host)
    previous = grid.job(job_id)
    grid.chain.advance(9)
    receipt = getattr(grid.scheduler, name)([job_id], sender=host.account)

    assert grid.job(job_id) == previous._replace(status=after, since=grid.chain.now)
    (event,) = receipt.events
    assert event.parameters == {
        "jobId": job_id,
        "customer": grid.alice,
        "provider": host.account,
        "from": before,
        "to": after,
    }


@steps
def test_no_other_account_may(
    grid: Grid, host: Host, other: Host, name: str, before: JobStatus, after: JobStatus
) -> None:
    job_id = grid.in_status(before, host)
    for caller in (other.account, grid.alice, grid.meta, grid.admin, grid.stranger):
        with reverts("NotAssignedProvider", job_id):
            getattr(grid.scheduler, name)([job_id], sender=caller)
    assert grid.status(job_id) is before


@steps
def test_only_from_the_status_before(
    grid: Grid, host: Host, name: str, before: JobStatus, after: JobStatus
) -> None:
    for status in JobStatus:
        if status is before:
            continue
        job_id = grid.in_status(status, host)
        with reverts("InvalidTransition", job_id, status, after):
            getattr(grid.scheduler, name)([job_id], sender=host.account)


@steps
def test_batches_skip_refused_jobs(
    grid: Grid, host: Host, other: Host, name: str, before: JobStatus, after: JobStatus
) -> None:
    own_job, others_job, pending = (
        grid.in_status(before, host),
        grid.in_status(before, other),
        grid.submit(),
    )
    receipt = getattr(grid.scheduler, name)(
        [others_job, own_job, pending, own_job, 0], sender=host.account
    )
    assert [
        (e.jobId, JobStatus(e.status), grid.chain.error_name(e.reason))
        for e in receipt.named("TransitionSkipped")
    ] == [
        (others_job, before, "NotAssignedProvider"),
        (pending, JobStatus.PENDING, "InvalidTransition"),
        (own_job, after, "InvalidTransition"),
        (0, JobStatus.NONE, "InvalidTransition"),
    ]
    assert grid.status(own_job) is after
    assert grid.status(others_job) is before
    with reverts("NotAssignedProvider", others_job):
        getattr(grid.scheduler, name)([others_job, own_job], sender=host.account)
    with reverts("EmptyBatch"):
        getattr(grid.scheduler, name)([], sender=host.account)


def test_billing_starts_at_the_block_of_start(grid: Grid, host: Host) -> None:
    job_id = grid.claimed(host)
    grid.chain.advance(1_000)
    assert grid.scheduler.deadline(job_id) == 0
    grid.scheduler.start([job_id], sender=host.account)
    assert grid.scheduler.deadline(job_id) == grid.chain.now + TERMS["timeLimit"]
