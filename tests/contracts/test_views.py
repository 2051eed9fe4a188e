"""Views for explorers and daemons, in every status."""

from __future__ import annotations

import pytest

from deepsquare_chain.job import JobStatus, can_transition
from tests.support.evm import ZERO, Contract
from tests.support.grid import FEE_BPS, RATE, TERMS, TIMES, UNTIL_SPENT, Grid, Host

pytestmark = pytest.mark.contracts
LIMIT = TERMS["timeLimit"]


def test_an_unknown_job_is_all_zero(grid: Grid) -> None:
    for job_id in (0, 1, 2**256 - 1):
        job = grid.job(job_id)
        assert tuple(job) == (ZERO, *[0] * 13, b"\0" * 32, 0)
        assert grid.scheduler.allotment(job_id) == 0
        assert grid.scheduler.deadline(job_id) == 0
        assert grid.scheduler.isLost(job_id) is False
        assert grid.scheduler.isBarred(job_id, 1) is False


def test_several_records_at_once(grid: Grid, host: Host) -> None:
    ids = [grid.in_status(status, host) for status in JobStatus]
    jobs = grid.scheduler.getJobs(ids)
    assert [job.status for job in jobs] == list(JobStatus)
    assert jobs == [grid.job(job_id) for job_id in ids]
    assert grid.scheduler.getJobs([]) == []


@pytest.mark.parametrize("status", list(JobStatus))
def test_only_running_jobs_have_a_deadline_and_can_be_lost(
    grid: Grid, host: Host, status: JobStatus
) -> None:
    job_id = grid.in_status(status, host)
    since = grid.job(job_id).since
    running = status is JobStatus.RUNNING
    assert grid.scheduler.deadline(job_id) == (since + LIMIT if running else 0)
    if status.is_assigned:
        grid.silence(host, job_id)
    grid.chain.advance(LIMIT + TIMES["reportGrace"] + 1)
    assert grid.scheduler.isLost(job_id) is running


def test_an_allotment_needs_a_rate(grid: Grid, host: Host) -> None:
    job_id = grid.submit(flags=UNTIL_SPENT)
    assert grid.scheduler.allotment(job_id) == 0
    grid.assign(host, job_id)
    assert grid.scheduler.allotment(job_id) == TERMS["amount"] // RATE
    grid.scheduler.requeue([job_id], "", sender=host.account)
    assert grid.scheduler.allotment(job_id) == 0


def test_the_transition_table_equals_that_of_the_package(grid: Grid) -> None:
    for before in JobStatus:
        for after in JobStatus:
            assert grid.scheduler.canTransition(before, after) == can_transition(before, after)


def test_constants_are_readable(grid: Grid) -> None:
    assert grid.scheduler.feeBps() == FEE_BPS
    assert grid.registry.MAX_PRICE() == 10 * 10**18
    assert (grid.registry.MAX_LABELS(), grid.registry.MAX_LABEL_LENGTH()) == (32, 128)


def test_interfaces_are_announced(grid: Grid) -> None:
    contracts: list[Contract] = [grid.credit, grid.registry, grid.scheduler]
    for contract in contracts:
        for interface in ("01ffc9a7", "7965db0b", "31498786"):  # ERC-165, roles, admin rules
            assert contract.supportsInterface(bytes.fromhex(interface))
        assert not contract.supportsInterface(b"\xff" * 4)
