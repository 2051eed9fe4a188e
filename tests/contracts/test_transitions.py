"""The whole transition matrix on the real contract: 10 x 10 pairs, each tried through the function
that leads there, by a party that the table allows to."""

# ruff: noqa: ARG005 - the entries of a table have one signature

from __future__ import annotations

from collections.abc import Callable

import pytest

from deepsquare_chain.job import JobStatus
from tests.support.evm import Receipt, Reverted
from tests.support.grid import TERMS, TIMES, Grid, Host

pytestmark = pytest.mark.contracts

# Written out from the protocol's page, independently of code in either language.
ARROWS = {
    "NONE": "PENDING",
    "PENDING": "META_SCHEDULED CANCELLED",
    "META_SCHEDULED": "SCHEDULED CANCELLED PANICKED PENDING",
    "SCHEDULED": "RUNNING CANCELLED PANICKED PENDING",
    "RUNNING": "CANCELLED FINISHED FAILED OUT_OF_CREDITS PANICKED",
    "CANCELLED": "",
    "FINISHED": "",
    "FAILED": "",
    "OUT_OF_CREDITS": "",
    "PANICKED": "",
}
LIMIT = TERMS["timeLimit"]


def is_allowed(before: JobStatus, after: JobStatus) -> bool:
    return after.name in ARROWS[before.name].split()


def finish(exit_code: int, seconds: int) -> Callable[[Grid, Host, int], Receipt]:
    return lambda grid, host, job_id: grid.finish(host, job_id, seconds, exit_code)


# How each status is reached; the attempts happen after the whole allotment has passed.
WAYS: dict[JobStatus, Callable[[Grid, Host, int], Receipt]] = {
    JobStatus.PENDING: lambda g, h, i: g.scheduler.requeue([i], "", sender=h.account),
    JobStatus.META_SCHEDULED: lambda g, h, i: g.assign(g.provider("free provider"), i),
    JobStatus.SCHEDULED: lambda g, h, i: g.scheduler.claim([i], sender=h.account),
    JobStatus.RUNNING: lambda g, h, i: g.scheduler.start([i], sender=h.account),
    JobStatus.CANCELLED: lambda g, h, i: g.scheduler.cancel([i], sender=g.alice),
    JobStatus.FINISHED: finish(0, 1),
    JobStatus.FAILED: finish(1, 1),
    JobStatus.OUT_OF_CREDITS: finish(0, LIMIT),
    JobStatus.PANICKED: lambda g, h, i: g.scheduler.panic([i], "", sender=h.account),
}


def test_there_are_fifteen_transitions_and_the_creation() -> None:
    assert sum(len(row.split()) for row in ARROWS.values()) == 16


@pytest.mark.parametrize("before", list(JobStatus), ids=lambda s: s.name)
@pytest.mark.parametrize("after", list(JobStatus), ids=lambda s: s.name)
def test_pair(grid: Grid, host: Host, before: JobStatus, after: JobStatus) -> None:
    expected = is_allowed(before, after)
    assert grid.scheduler.canTransition(before, after) is expected
    if after is JobStatus.NONE:
        assert not expected  # no function leads there
        return
    if (before, after) == (JobStatus.NONE, JobStatus.PENDING):
        job_id = grid.scheduler.jobCount() + 1
        assert grid.status(job_id) is JobStatus.NONE
        receipt = grid.scheduler.submitJobs([grid.request()], sender=grid.alice)
        transition = receipt.one("JobTransition")
        assert (transition.jobId, transition.parameters["from"], transition.to) == (job_id, 0, 1)
        return

    job_id = grid.in_status(before, host, retries=0)
    before_call = grid.job(job_id)
    grid.chain.advance(LIMIT)
    if expected:
        transition = WAYS[after](grid, host, job_id).one("JobTransition")
        assert (transition.parameters["from"], transition.to) == (before, after)
        assert grid.status(job_id) is after
        assert grid.job(job_id).since == grid.chain.now
    else:
        with pytest.raises(Reverted) as error_info:
            WAYS[after](grid, host, job_id)
        assert error_info.value.name == "InvalidTransition"
        # the contract itself detects used-up credits, so the status is that of the exit code
        expected_status = JobStatus.FINISHED if after is JobStatus.OUT_OF_CREDITS else after
        assert error_info.value.arguments == (job_id, before, expected_status)
        assert grid.job(job_id) == before_call


@pytest.mark.parametrize("before", list(JobStatus), ids=lambda s: s.name)
def test_other_functions_for_a_transition_obey_the_same_table(
    grid: Grid, host: Host, before: JobStatus
) -> None:
    """selfSchedule, claimAndStart, and requeue and panic by strangers of a provider that is gone."""
    other = grid.provider("free provider")
    job_id = grid.in_status(before, host, retries=0)
    if before.is_assigned:
        grid.silence(host, job_id)
    grid.chain.advance(LIMIT + TIMES["reportGrace"] + 1)
    second_ways = {
        JobStatus.META_SCHEDULED: lambda: grid.scheduler.selfSchedule(
            [job_id], sender=other.account
        ),
        JobStatus.SCHEDULED: lambda: grid.scheduler.claimAndStart([job_id], sender=host.account),
        JobStatus.PENDING: lambda: grid.scheduler.requeue([job_id], "", sender=grid.stranger),
        JobStatus.PANICKED: lambda: grid.scheduler.panic([job_id], "", sender=grid.stranger),
    }
    for after, call in second_ways.items():
        allowed = is_allowed(before, after) and before is not JobStatus.NONE
        # strangers can't end a job that has not started
        if after is JobStatus.PANICKED and before is not JobStatus.RUNNING:
            allowed = False
        saved = grid.chain.snapshot()
        try:
            call()
        except Reverted:
            assert not allowed
            assert grid.status(job_id) is before
        else:
            assert allowed
            # claimAndStart continues with the next transition of the same table
            final_status = JobStatus.RUNNING if after is JobStatus.SCHEDULED else after
            assert grid.status(job_id) is final_status
        grid.chain.revert(saved)
