"""Launches of runs continue in the background after their cycle."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import pytest

from deepsquare_chain.job import JobStatus
from deepsquare_chain.provider.actions import LaunchQueue
from deepsquare_chain.provider.model import Phase, Run, Submit, View
from tests.support.workloads import job

ACTION = Submit(walltime=58, allotment=60, lead=2)


class Machine:
    """Starts a run when the test releases it."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.gates: dict[int, asyncio.Future[bool]] = {}

    async def start(self, view: View, action: Submit) -> bool:
        assert action == ACTION
        self.begun.append(view.job.id)
        return await self.gates.setdefault(view.job.id, asyncio.Future())

    def release(self, *ids: int, has_started: bool = True) -> None:
        for job_id in ids:
            self.gates.setdefault(job_id, asyncio.Future()).set_result(has_started)


def jobs(ids: Iterable[int]) -> list[tuple[View, Submit]]:
    return [
        (View(job(n, status=JobStatus.RUNNING), Run(n, f"k-{n}", Phase.STARTING), True), ACTION)
        for n in ids
    ]


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.fixture
def starts(machine: Machine) -> LaunchQueue:
    return LaunchQueue(machine.start, at_once=8)


async def test_quick_starts_end_in_the_same_cycle(machine: Machine, starts: LaunchQueue) -> None:
    machine.release(*range(20))
    machine.release(20, has_started=False)
    async with asyncio.timeout(20):
        assert await starts.begin(jobs(range(21)), lambda: False) == 20
    assert machine.begun == list(range(21))
    assert starts.jobs == frozenset()


async def test_a_slow_start_delays_no_other_job_and_its_own_job_is_skipped(
    machine: Machine, starts: LaunchQueue
) -> None:
    machine.release(2)
    async with asyncio.timeout(20):
        # The limit is reached; the next run starts as soon as one has ended.
        assert await starts.begin(jobs([1, 2]), lambda: True) == 0
        assert starts.jobs == {1, 2}
        assert await starts.begin([], lambda: True) == 0  # nothing ran in between
        await asyncio.sleep(0)
        assert starts.jobs == {1, 2}, "the next cycle reports what has ended"
        assert await starts.begin(jobs([3]), lambda: True) == 1
        assert starts.jobs == {1, 3}
        machine.release(1, 3)
        await starts.end()
    assert machine.begun == [1, 2, 3]
    assert starts.jobs == frozenset()


async def test_only_a_few_at_a_time(machine: Machine, starts: LaunchQueue) -> None:
    async with asyncio.timeout(20):
        await starts.begin(jobs(range(12)), lambda: True)
        await asyncio.sleep(0)
        assert machine.begun == list(range(8))
        machine.release(0)
        await asyncio.sleep(0)
        assert await starts.begin(jobs(range(8, 12)), lambda: True) == 1
        await asyncio.sleep(0)
        assert machine.begun == list(range(9))
        machine.release(*range(1, 9))
        await starts.end()


async def test_an_unexpected_error_is_retried_by_the_next_cycle() -> None:
    async def breaks(_: View, __: Submit) -> bool:
        raise RuntimeError("broken")

    starts = LaunchQueue(breaks, at_once=8)
    async with asyncio.timeout(20):
        with pytest.raises(RuntimeError, match="broken"):
            await starts.begin(jobs([1]), lambda: False)
    assert starts.jobs == frozenset()
