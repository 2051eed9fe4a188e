"""The meta-scheduler with real contracts; each test advances time and acts as the providers."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
from structlog.testing import capture_logs

from deepsquare_chain.chain.bindings import reverts
from deepsquare_chain.chain.bindings.deployment import METASCHEDULER_ROLE
from deepsquare_chain.chain.bindings.events import (
    JobPanicked,
    JobRetried,
    JobSettled,
    JobSubmitted,
    JobTransition,
    TransitionSkipped,
)
from deepsquare_chain.chain.bindings.records import Clock, Report
from deepsquare_chain.chain.rpc.heads import Head
from deepsquare_chain.cli.why import explain, unmet_jobs
from deepsquare_chain.credits import CREDIT, job_rate
from deepsquare_chain.devnet.node.base import Node
from deepsquare_chain.devnet.node.embedded import ChainProcess
from deepsquare_chain.errors import NotAuthorisedError, UsageError
from deepsquare_chain.job import Job, JobStatus, Load, Objective, Offer, Prices, Resources
from deepsquare_chain.metascheduler.observer import ClusterSnapshot
from deepsquare_chain.metascheduler.past_starts import PROMPT_BLOCKS
from deepsquare_chain.metascheduler.service import (
    SchedulerService,
    SchedulerSettings,
    run_scheduler,
)
from deepsquare_chain.workflow import parse_job_file
from tests.support.anvil import start_anvil
from tests.support.livegrid import CHEAP, DEAR, BorrowedNode, LiveGrid, live_grid
from tests.support.provider import all_events
from tests.support.rpccount import counted_requests
from tests.support.rundaemon import until

S = JobStatus
WHOLE = Resources(tasks=4, cpus_per_task=16, mem_per_cpu=100, gpus=0)


@pytest.fixture(scope="module")
def chain(background: Any) -> Iterator[Node]:
    """A chain that mines per transaction; tests advance its time."""
    chain_process = ChainProcess(block_time=0)
    background.run(chain_process.__aenter__())
    yield chain_process
    background.run(chain_process.close())


@pytest.fixture
async def grid(chain: Node) -> AsyncIterator[LiveGrid]:
    """A new grid per test with two providers; the second is three times as expensive."""
    async with BorrowedNode(chain.url, chain.chain_id) as node, live_grid(node) as result:
        yield result


@dataclass
class SchedulerBench:
    """A scheduler's service with helpers for tests."""

    grid: LiveGrid
    service: SchedulerService

    async def cycle(self, times: int = 1) -> bool:
        has_changed = False
        for _ in range(times):
            self.service.heads.hint()  # other accounts may have mined new blocks
            has_changed = await self.service.cycle()
        return has_changed

    async def jobs(self, *ids: int) -> list[Job]:
        return await self.grid.contracts.scheduler.get_jobs(ids)

    async def statuses(self, *ids: int) -> list[JobStatus]:
        return [job.status for job in await self.jobs(*ids)]

    async def provider_ids(self, *ids: int) -> list[int]:
        return [job.provider_id for job in await self.jobs(*ids)]

    async def clock_of_provider(self, provider_id: int = 1) -> Clock:
        return await self.grid.contracts.scheduler.clock_of(provider_id)

    def waits(self, job_id: int) -> str:
        return self.service._logged_waits[job_id]

    def sent(self, kind: str) -> float | None:
        return self.service.metrics.metrics.value("scheduler_jobs_total", kind=kind)


@asynccontextmanager
async def bench(
    grid: LiveGrid, *, dry: bool = False, path: Path | None = None, **options: Any
) -> AsyncIterator[SchedulerBench]:
    settings = SchedulerSettings(state_dir=Path(), **{"confirmations": 0, **options})
    store = grid.store(grid.scheduler, path)
    sender = None if dry else grid.sender(grid.scheduler, store=store)
    yield SchedulerBench(grid, SchedulerService(grid.contracts, sender, store, settings=settings))


@pytest.fixture
async def scheduler_bench(grid: LiveGrid) -> AsyncIterator[SchedulerBench]:
    async with bench(grid) as result:
        yield result


async def test_assigns_jobs_that_fit_and_becomes_idle(scheduler_bench: SchedulerBench) -> None:
    ids = await scheduler_bench.grid.submit(3)
    assert await scheduler_bench.cycle() is True
    assert await scheduler_bench.statuses(*ids) == [S.META_SCHEDULED] * 3
    # The cheapest provider has capacity for all.
    assert await scheduler_bench.provider_ids(*ids) == [1, 1, 1]
    assert await scheduler_bench.cycle() is False
    assert scheduler_bench.sent("assign") == 3
    metrics = scheduler_bench.service.metrics.metrics
    assert metrics.value("queue_jobs") == 0
    assert metrics.value("assigned_jobs") == 3


async def test_objective_labels_and_affinities(scheduler_bench: SchedulerBench) -> None:
    registry = scheduler_bench.grid.contracts.registry
    fast, slow = scheduler_bench.grid.providers[1], scheduler_bench.grid.providers[0]
    await scheduler_bench.grid.send(
        fast, registry.set_labels({"compute.gflops": "900", "gpu.model": "h100"})
    )
    await scheduler_bench.grid.send(slow, registry.set_labels({"energy.watts_per_cpu": "3"}))
    [quick] = await scheduler_bench.grid.submit(objective=Objective.TIME)
    [frugal] = await scheduler_bench.grid.submit(objective=Objective.ENERGY)
    [h100_job] = await scheduler_bench.grid.submit(uses="gpu.model=h100,compute.gflops>=900")
    [a100_job] = await scheduler_bench.grid.submit(uses="gpu.model=a100")
    [garbled] = await scheduler_bench.grid.submit(uses="gpu model")
    await scheduler_bench.cycle(2)
    assert await scheduler_bench.provider_ids(quick, frugal, h100_job) == [2, 1, 2]
    assert await scheduler_bench.statuses(a100_job, garbled) == [S.PENDING] * 2
    assert "has the labels 'gpu.model=a100'" in scheduler_bench.waits(a100_job)
    assert "can't be read" in scheduler_bench.waits(garbled)


async def test_too_expensive_until_topped_up(scheduler_bench: SchedulerBench) -> None:
    [job_id] = await scheduler_bench.grid.submit(amount=10**12)
    await scheduler_bench.cycle()
    assert await scheduler_bench.statuses(job_id) == [S.PENDING]
    assert "too expensive at every provider" in scheduler_bench.waits(job_id)
    [job] = await scheduler_bench.jobs(job_id)
    call = scheduler_bench.grid.contracts.scheduler.top_up(job_id, job.customer, CREDIT)
    await scheduler_bench.grid.send(scheduler_bench.grid.customers[1], call)
    await scheduler_bench.cycle()
    assert await scheduler_bench.statuses(job_id) == [S.META_SCHEDULED]


async def test_late_binding(scheduler_bench: SchedulerBench) -> None:
    """Jobs without free capacity stay queued, and go to the first provider with capacity."""
    ids = await scheduler_bench.grid.submit(3, resources=WHOLE)
    await scheduler_bench.cycle(2)
    assert await scheduler_bench.provider_ids(*ids) == [1, 2, 0]
    assert "waits for free capacity at provider 1 or 2" in scheduler_bench.waits(ids[2])
    # The second provider, although more expensive, is free first.
    scheduler = scheduler_bench.grid.contracts.scheduler
    await scheduler_bench.grid.send(scheduler_bench.grid.customers[0], scheduler.cancel([ids[1]]))
    assert await scheduler_bench.cycle() is True
    assert await scheduler_bench.provider_ids(ids[2]) == [2]


async def test_offers_that_shrink_and_maintenance(scheduler_bench: SchedulerBench) -> None:
    registry = scheduler_bench.grid.contracts.registry
    await scheduler_bench.grid.send(
        scheduler_bench.grid.providers[0], registry.set_offer(Offer(1, 1_000, 0))
    )
    await scheduler_bench.grid.send(scheduler_bench.grid.providers[1], registry.set_draining(True))
    ids = await scheduler_bench.grid.submit(2)
    await scheduler_bench.cycle(2)
    assert sorted(await scheduler_bench.provider_ids(*ids)) == [0, 1]
    await scheduler_bench.grid.send(scheduler_bench.grid.providers[1], registry.set_draining(False))
    await scheduler_bench.cycle(2)
    assert sorted(await scheduler_bench.provider_ids(*ids)) == [1, 2]


async def test_chunks(grid: LiveGrid) -> None:
    async with bench(grid, batch_size=3) as small:
        ids = await grid.submit(8)
        await small.cycle()
        assert set(await small.statuses(*ids)) == {S.META_SCHEDULED}
        assert small.sent("assign") == 8


async def test_unclaimed_jobs_are_requeued(scheduler_bench: SchedulerBench) -> None:
    """The provider of an unclaimed job is challenged at half the timeout; then the job is requeued."""
    [job_id] = await scheduler_bench.grid.submit()
    await scheduler_bench.cycle()
    await scheduler_bench.grid.node.increase_time(4)
    await scheduler_bench.cycle()
    assert (await scheduler_bench.clock_of_provider()).challenged_at == 0
    await scheduler_bench.grid.node.increase_time(2)
    assert await scheduler_bench.cycle() is True
    challenged = (await scheduler_bench.clock_of_provider()).challenged_at
    assert challenged > 0
    # Until it answers, new jobs go to the more expensive provider.
    [other] = await scheduler_bench.grid.submit()
    await scheduler_bench.cycle()
    assert await scheduler_bench.provider_ids(other) == [2]
    await scheduler_bench.grid.node.increase_time(5)
    await scheduler_bench.cycle(2)
    assert await scheduler_bench.provider_ids(job_id) == [2]
    assert scheduler_bench.sent("requeue") == 1
    assert scheduler_bench.sent("challenge") >= 1


async def test_a_provider_that_requeues_a_job_is_avoided_for_a_while(
    scheduler_bench: SchedulerBench,
) -> None:
    scheduler = scheduler_bench.grid.contracts.scheduler
    await scheduler_bench.grid.send(
        scheduler_bench.grid.providers[1],
        scheduler_bench.grid.contracts.registry.set_draining(True),
    )
    [job_id] = await scheduler_bench.grid.submit()
    await scheduler_bench.cycle()
    await scheduler_bench.grid.send(
        scheduler_bench.grid.providers[0], scheduler.requeue([job_id], "no room")
    )
    await scheduler_bench.cycle(2)
    assert await scheduler_bench.statuses(job_id) == [S.PENDING]
    assert "recently returned this job" in scheduler_bench.waits(job_id)
    await scheduler_bench.grid.node.increase_time(11)
    await scheduler_bench.cycle()
    assert await scheduler_bench.provider_ids(job_id) == [1]


async def test_jobs_of_an_unresponsive_provider_panic_and_continue_elsewhere(
    scheduler_bench: SchedulerBench,
) -> None:
    """Challenge, no answer, panic: the successor is assigned, never to the same provider."""
    grid, scheduler = scheduler_bench.grid, scheduler_bench.grid.contracts.scheduler
    set_draining = grid.contracts.registry.set_draining
    await grid.send(grid.providers[1], set_draining(True))
    [running] = await grid.submit(time_limit=600, retries=1)
    [queued] = await grid.submit(time_limit=600)
    await scheduler_bench.cycle()
    await grid.send(grid.providers[0], scheduler.claim([running, queued]))
    await grid.send(grid.providers[0], scheduler.start([running]))
    await scheduler_bench.cycle()
    assert (await scheduler_bench.clock_of_provider()).challenged_at == 0
    await grid.node.increase_time(21)  # twice the claim timeout without a sign
    await scheduler_bench.cycle()
    assert (await scheduler_bench.clock_of_provider()).challenged_at > 0
    await grid.node.increase_time(7)
    await scheduler_bench.cycle()
    # Three blocks have not passed.
    assert await scheduler_bench.statuses(running, queued) == [S.RUNNING, S.SCHEDULED]
    await grid.node.mine(3)
    assert await scheduler_bench.cycle() is True
    # No answer: queued jobs are requeued; the run is billed until the lost timeout.
    assert await scheduler_bench.statuses(running, queued) == [S.RUNNING, S.PENDING]
    assert "after 20 s the run is lost" in (await explain(grid.contracts, running)).words
    await grid.node.increase_time(14)
    assert await scheduler_bench.cycle() is True
    assert await scheduler_bench.statuses(running, queued) == [S.PANICKED, S.PENDING]
    await grid.send(grid.providers[1], set_draining(False))
    successor = await scheduler.job_count()
    await scheduler_bench.cycle()
    assert await scheduler_bench.provider_ids(queued, successor) == [2, 2]
    # The provider answers again: it gets other jobs, but not the successor.
    await grid.send(grid.providers[0], scheduler.answer())
    await grid.send(grid.providers[1], scheduler.requeue([successor], "maintenance"))
    await grid.send(grid.providers[1], set_draining(True))
    [fresh] = await grid.submit()
    await scheduler_bench.cycle(2)
    assert await scheduler_bench.provider_ids(fresh, successor) == [1, 0]
    assert "is in maintenance" in scheduler_bench.waits(successor)
    assert scheduler_bench.sent("panic") == 1


async def test_a_run_is_billed_although_a_challenge_was_answered_late(
    scheduler_bench: SchedulerBench,
) -> None:
    """A provider that answers late after a challenge still bills its run."""
    grid, scheduler, host = (
        scheduler_bench.grid,
        scheduler_bench.grid.contracts.scheduler,
        scheduler_bench.grid.providers[0],
    )
    [job_id] = await grid.submit(time_limit=600)
    await scheduler_bench.cycle()
    await grid.send(host, scheduler.claim_and_start([job_id]))
    await grid.send(grid.stranger, scheduler.challenge(job_id))
    await grid.node.increase_time(12)  # the response timeout is 6 s
    await grid.node.mine(3)
    assert await scheduler.is_silent(1)
    await scheduler_bench.cycle(2)
    assert scheduler_bench.sent("panic") == 0
    [fresh] = await grid.submit()
    await scheduler_bench.cycle()
    assert await scheduler_bench.provider_ids(fresh) == [2]
    receipt = await grid.send(host, scheduler.finish([Report(job_id, 10, 0)]))
    [settled] = [event for event in receipt.events if isinstance(event, JobSettled)]
    assert settled.billed_seconds == 10
    assert (
        await scheduler_bench.clock_of_provider()
    ).challenged_at == 0  # the report has answered the challenge


async def test_the_expired_job_of_a_lost_key_is_cancelled(scheduler_bench: SchedulerBench) -> None:
    """A job that no provider is eligible for is cancelled by anyone after expiry, with a refund."""
    grid = scheduler_bench.grid
    before = await grid.contracts.credit.balance_of(grid.customers[0].address)
    ids = await grid.submit(3, uses="place=nowhere")
    [fitting] = await grid.submit()
    await scheduler_bench.cycle()
    assert "is cancelled with a full refund" in (await explain(grid.contracts, ids[0])).words
    await grid.send(grid.providers[0], grid.contracts.scheduler.claim([fitting]))
    await grid.node.increase_time(30 * 86_400 - 60)
    await scheduler_bench.cycle()
    assert await scheduler_bench.statuses(*ids) == [S.PENDING] * 3
    await grid.node.increase_time(60)
    await scheduler_bench.cycle()
    assert await scheduler_bench.statuses(*ids) == [S.CANCELLED] * 3
    assert scheduler_bench.sent("cancel") == 3
    escrow = (await scheduler_bench.jobs(fitting))[0].escrow
    assert await grid.contracts.credit.balance_of(grid.customers[0].address) == before - escrow


async def read_snapshot(service: SchedulerService) -> ClusterSnapshot:
    """Return the cluster snapshot of a cycle."""
    head = await service._head(again=True)
    assert head is not None
    await service._follow(head)
    return await service.observer.read(head, events=service._follower.position)


@asynccontextmanager
async def before_assignment(
    scheduler_bench: SchedulerBench, act: Callable[[], Awaitable[Any]]
) -> AsyncIterator[None]:
    """Run something after the scheduler's snapshot and before its assignments."""
    read = scheduler_bench.service.observer.read

    async def read_and_act(head: Head, *, events: int) -> Any:
        cluster = await read(head, events=events)
        await act()
        return cluster

    scheduler_bench.service.observer.read = read_and_act  # type: ignore[method-assign]
    try:
        yield
    finally:
        scheduler_bench.service.observer.read = read  # type: ignore[method-assign]


async def test_a_price_raised_just_before_an_assignment(scheduler_bench: SchedulerBench) -> None:
    """The contract refuses the assignment; the next cycle assigns the job to another provider."""
    grid = scheduler_bench.grid
    raised_prices = Prices(*(20 * getattr(CHEAP, name) for name in ("cpu", "gpu", "mem")))
    call = grid.contracts.registry.set_prices(raised_prices)
    [job_id] = await grid.submit()
    async with before_assignment(scheduler_bench, lambda: grid.send(grid.providers[0], call)):
        await scheduler_bench.cycle()
    assert await scheduler_bench.statuses(job_id) == [S.PENDING]
    await scheduler_bench.cycle()
    assert await scheduler_bench.provider_ids(job_id) == [2]
    [job] = await scheduler_bench.jobs(job_id)
    assert job.rate == job_rate(DEAR, job.resources)


async def test_a_refused_assignment_is_retried_with_backoff(
    scheduler_bench: SchedulerBench,
) -> None:
    """If no other provider is eligible, the job is retried with backoff and is not lost."""
    grid, registry = scheduler_bench.grid, scheduler_bench.grid.contracts.registry
    await grid.send(grid.providers[1], registry.set_draining(True))
    [job_id] = await grid.submit()
    prices = itertools.count(2)

    async def raise_price() -> None:
        at = next(prices)
        raised_prices = Prices(CHEAP.cpu * at, CHEAP.gpu * at, CHEAP.mem * at)
        await grid.send(grid.providers[0], registry.set_prices(raised_prices))

    metrics = scheduler_bench.service.metrics.metrics
    async with before_assignment(scheduler_bench, raise_price):
        await scheduler_bench.cycle()
        assert metrics.value("scheduler_refused_total", kind="assign") == 1
        await grid.node.increase_time(2)
        await scheduler_bench.cycle()
        assert metrics.value("scheduler_refused_total", kind="assign") == 2
        await scheduler_bench.cycle()
        assert metrics.value("scheduler_refused_total", kind="assign") == 2
        assert "recently rejected an assignment" in scheduler_bench.waits(job_id)
    await grid.node.increase_time(4)
    await scheduler_bench.cycle()
    assert await scheduler_bench.provider_ids(job_id) == [1]


async def test_capacity_taken_just_before_an_assignment(grid: LiveGrid) -> None:
    """Two schedulers assign to one provider: the second one's job does not fit any more."""
    async with bench(grid) as scheduler_bench:
        [first, second] = await grid.submit(2, resources=WHOLE)
        others = grid.assign({1: [second]})
        async with before_assignment(scheduler_bench, lambda: others):
            await scheduler_bench.cycle()
        assert await scheduler_bench.provider_ids(first, second) == [0, 1]
        assert await grid.contracts.scheduler.load_of(1) == Load.of(WHOLE)
        await scheduler_bench.cycle()
        assert await scheduler_bench.provider_ids(first, second) == [2, 1]


async def test_a_provider_of_one_cpu_holds_one_job(scheduler_bench: SchedulerBench) -> None:
    """Its capacity holds for any number of waiting jobs, and for assignments by anyone."""
    grid, scheduler = scheduler_bench.grid, scheduler_bench.grid.contracts.scheduler
    await grid.send(grid.providers[1], grid.contracts.registry.set_draining(True))
    await grid.send(grid.providers[0], grid.contracts.registry.set_offer(Offer(1, 1_000, 0)))
    ids = await grid.submit(50)
    await scheduler_bench.cycle(3)
    [assigned] = [job for job in await scheduler_bench.jobs(*ids) if job.status is not S.PENDING]
    assert assigned.status is S.META_SCHEDULED
    assert await scheduler.load_of(1) == Load(1, 100, 0)
    with pytest.raises(reverts.DoesNotFit):
        await grid.assign({1: [job_id for job_id in ids if job_id != assigned.id]})
    await grid.node.increase_time(31)  # PENDING for the pending timeout
    with pytest.raises(reverts.DoesNotFit):
        await grid.send(grid.providers[0], scheduler.self_schedule([ids[-1]]))


async def test_a_job_with_requirements_is_never_self_scheduled(grid: LiveGrid) -> None:
    """Clients forbid self-scheduling for jobs with labels, which the contract can't check."""
    scheduler, host = grid.contracts.scheduler, grid.providers[0]
    small = "resources: {tasks: 1, cpusPerTask: 1, memPerCpu: 64, gpus: 0}\ntimeLimit: 60s\n"
    common = "credits: '1'\nsteps:\n  - name: only\n    run: {command: echo}\n"
    h100_job = parse_job_file(f"{small}uses: [gpu.model=h100]\n{common}".encode(), "picky.yaml")
    plain = parse_job_file(f"{small}{common}".encode(), "plain.yaml")
    requests = [(value.terms(), [value.definition.digest]) for value in (h100_job, plain)]
    receipt = await grid.send(grid.customers[0], scheduler.submit_jobs(requests))
    first, second = [event.job_id for event in receipt.events if isinstance(event, JobSubmitted)]
    with pytest.raises(reverts.TooEarly):
        await grid.send(host, scheduler.self_schedule([second]))
    await grid.node.increase_time(31)  # PENDING for the pending timeout
    with pytest.raises(reverts.SelfSchedulingForbidden):
        await grid.send(host, scheduler.self_schedule([first]))
    await grid.send(host, scheduler.self_schedule([first, second]))
    assert await scheduler.load_of(1) == Load(1, 64, 0)
    async with bench(grid) as scheduler_bench:  # a scheduler that comes late counts it as well
        await scheduler_bench.cycle()
        assert await scheduler_bench.provider_ids(first, second) == [0, 1]
        assert scheduler_bench.service.cluster is not None
        assert [job.id for job in scheduler_bench.service.cluster.assigned] == [second]


async def test_a_responsive_provider_is_challenged_once(scheduler_bench: SchedulerBench) -> None:
    grid, scheduler = scheduler_bench.grid, scheduler_bench.grid.contracts.scheduler
    [job_id] = await grid.submit(time_limit=600)
    await scheduler_bench.cycle()
    await grid.send(grid.providers[0], scheduler.claim([job_id]))
    await grid.send(grid.providers[0], scheduler.start([job_id]))
    await scheduler_bench.cycle()
    await grid.node.increase_time(21)
    await scheduler_bench.cycle()
    await grid.send(grid.providers[0], scheduler.answer())
    await scheduler_bench.cycle()
    await grid.node.increase_time(15)
    await scheduler_bench.cycle(2)
    assert scheduler_bench.sent("challenge") == 1
    await grid.node.increase_time(10)
    await scheduler_bench.cycle()
    assert scheduler_bench.sent("challenge") == 2


async def submit_unclaimed(scheduler_bench: SchedulerBench, provider: int, expected: int) -> None:
    """A job that provider 1 does not claim, although it answers challenges."""
    grid, scheduler = scheduler_bench.grid, scheduler_bench.grid.contracts.scheduler
    [job_id] = await grid.submit()
    await scheduler_bench.cycle()
    assert await scheduler_bench.provider_ids(job_id) == [provider]
    await grid.node.increase_time(70)
    await scheduler_bench.cycle()
    if (await scheduler_bench.clock_of_provider(provider)).challenged_at:
        await grid.send(grid.providers[provider - 1], scheduler.answer())
    assert await scheduler_bench.statuses(job_id) == [S.PENDING]
    assert scheduler_bench.service.metrics.metrics.value("strikes_in_a_day") == expected - 1
    await grid.send(grid.customers[0], scheduler.cancel([job_id]))


async def test_three_strikes_in_a_day_suspend_a_provider(grid: LiveGrid) -> None:
    async with bench(grid) as scheduler_bench:
        with capture_logs() as logs:
            for count in (1, 2, 3):
                await submit_unclaimed(scheduler_bench, 1, expected=count)
            [job_id] = await grid.submit()
            await scheduler_bench.cycle()
        # The more expensive one gets it, and the reason is shown.
        assert await scheduler_bench.provider_ids(job_id) == [2]
        [event] = [log for log in logs if log["event"] == "provider cooldown started"]
        assert (event["provider"], "it is suspended until" in event["reason"]) == (1, True)
        metrics = scheduler_bench.service.metrics.metrics
        assert (metrics.value("strikes_in_a_day"), metrics.value("suspended_providers")) == (3, 1)
        [large] = await grid.submit(1, resources=WHOLE)
        await scheduler_bench.cycle()
        assert "waits for free capacity at provider 2" in scheduler_bench.waits(large)
    # Another scheduler, or the same with an empty database, reads the same from the chain.
    async with bench(grid, dry=True) as fresh:
        await fresh.cycle()
        view = fresh.service.cluster.views[0]
        assert view.strikes == 3
        assert view.suspended_until == scheduler_bench.service.cluster.views[0].suspended_until
        reasons = (await explain(grid.contracts, large)).words
        assert "provider 1 is suspended until" in reasons
        assert "3 times within a day" in reasons
        await grid.node.increase_time(86_400)
        with capture_logs() as logs:
            await fresh.cycle()
        assert [log["provider"] for log in logs if log["event"] == "provider cooldown ended"] == [1]
    async with bench(grid) as restarted:
        await restarted.cycle()
        assert await restarted.provider_ids(large) == [1]


async def test_a_job_stuck_in_a_queue_goes_to_a_provider_with_free_capacity(
    scheduler_bench: SchedulerBench,
) -> None:
    """A cluster may queue a job as long as no other provider could start it."""
    grid, scheduler = scheduler_bench.grid, scheduler_bench.grid.contracts.scheduler
    ids = await grid.submit(2, resources=WHOLE, time_limit=600)
    await scheduler_bench.cycle()
    assert await scheduler_bench.provider_ids(*ids) == [1, 2]
    for at, job_id in enumerate(ids):
        await grid.send(grid.providers[at], scheduler.claim([job_id]))
    await grid.node.increase_time(12)
    await scheduler_bench.cycle(2)
    assert await scheduler_bench.statuses(*ids) == [S.SCHEDULED] * 2
    await grid.send(grid.customers[0], scheduler.cancel([ids[1]]))
    await scheduler_bench.cycle()
    assert await scheduler_bench.statuses(ids[0]) == [S.PENDING]
    await scheduler_bench.cycle()
    assert await scheduler_bench.provider_ids(ids[0]) == [2]


async def test_claimed_jobs_of_a_banned_provider_are_requeued(
    scheduler_bench: SchedulerBench,
) -> None:
    grid = scheduler_bench.grid
    [job_id] = await grid.submit()
    await scheduler_bench.cycle()
    await grid.send(grid.providers[0], grid.contracts.scheduler.claim([job_id]))
    ban = grid.contracts.registry.ban(grid.providers[0].address, "enough")
    await grid.send(grid.admin, ban)
    await scheduler_bench.cycle(2)
    assert await scheduler_bench.provider_ids(job_id) == [2]


async def test_two_schedulers_at_once(grid: LiveGrid) -> None:
    """Both see the same block; jobs that one has assigned are skipped for the other."""
    role = await _second_scheduler(grid)
    async with bench(grid) as first:
        store = grid.store(role)
        settings = SchedulerSettings(state_dir=Path(), confirmations=0)
        second_service = SchedulerService(
            grid.contracts, grid.sender(role, store=store), store, settings=settings
        )
        ids = await grid.submit(2, resources=WHOLE)
        # Both have read the state before either acts.
        worlds = [await read_snapshot(value) for value in (first.service, second_service)]
        assert await first.service._assign(worlds[0]) == 2
        assert await second_service._assign(worlds[1]) == 0
        assert await first.statuses(*ids) == [S.META_SCHEDULED] * 2
        # The other scheduler has a backoff for them, then reads their state.
        assert await second_service.cycle() is False


async def test_two_daemons_assign_the_same_jobs_in_one_block(tmp_path: Path) -> None:
    """Each job is assigned and paid for once; the second scheduler's jobs are skipped."""
    stop = asyncio.Event()
    async with start_anvil() as node, live_grid(node) as grid:
        accounts = [grid.scheduler, await _second_scheduler(grid)]
        folders = [tmp_path / account.address for account in accounts]
        with capture_logs() as logs:
            daemons = [
                asyncio.create_task(
                    run_scheduler(
                        node.url,
                        grid.deployment,
                        account,
                        SchedulerSettings(state_dir=folder, confirmations=0, poll_interval=0.05),
                        stop=stop,
                    )
                )
                for account, folder in zip(accounts, folders, strict=True)
            ]
            await until(lambda: all((folder / "metascheduler.json").exists() for folder in folders))
            ids = [*await _contested(grid, 27), *await _contested(grid, 3)]
            await until(lambda: len([log for log in logs if log["event"] == "batch refused"]) == 2)
            stop.set()
            await asyncio.gather(*daemons)
        jobs = await grid.contracts.scheduler.get_jobs(ids)
        assert {job.status for job in jobs} == {S.META_SCHEDULED}
        moves = [event for event in await all_events(grid) if isinstance(event, JobTransition)]
        assigned = [move.job_id for move in moves if move.after is S.META_SCHEDULED]
        assert sorted(assigned) == ids
        escrow = await grid.contracts.credit.balance_of(grid.deployment.scheduler)
        assert escrow == sum(job.escrow for job in jobs) == 30 * CREDIT
    assert [log for log in logs if log["log_level"] == "error"] == []
    refused = [log for log in logs if log["event"] == "batch refused"]
    assert [item["label"] for item in refused] == ["assign 27 jobs", "assign 3 jobs"]


async def _contested(grid: LiveGrid, count: int) -> list[int]:
    """Return jobs that two schedulers have assigned in the same block."""

    async def mine_when_pending(count: int) -> None:
        async def there() -> bool:
            pool = await grid.node.rpc("txpool_status")
            return int(pool["pending"], 16) == count

        await until(there)
        await grid.node.rpc("evm_mine")

    await grid.node.rpc("evm_setAutomine", False)
    submitting = asyncio.create_task(grid.submit(count))
    await mine_when_pending(1)
    ids = await submitting
    await mine_when_pending(2)
    await grid.node.rpc("evm_setAutomine", True)
    return ids


async def _second_scheduler(grid: LiveGrid) -> Any:
    call = grid.contracts.scheduler.grant_role(METASCHEDULER_ROLE, grid.stranger.address)
    await grid.send(grid.admin, call)
    return grid.stranger


async def test_skipped_items_are_in_backoff(scheduler_bench: SchedulerBench) -> None:
    """A job that the contract skips does not affect the others of its batch, and gets a backoff."""
    ids = await scheduler_bench.grid.submit(2)
    cluster = await read_snapshot(scheduler_bench.service)
    cancel = scheduler_bench.grid.contracts.scheduler.cancel([ids[0]])
    await scheduler_bench.grid.send(scheduler_bench.grid.customers[0], cancel)
    assert await scheduler_bench.service._assign(cluster) == 1
    assert await scheduler_bench.statuses(*ids) == [S.CANCELLED, S.META_SCHEDULED]
    refusals = scheduler_bench.service.metrics.metrics.value(
        "scheduler_refused_total", kind="assign"
    )
    assert refusals == 1
    assert await scheduler_bench.cycle() is False


async def test_dry_run_sends_nothing(grid: LiveGrid) -> None:
    async with bench(grid, dry=True) as dry:
        ids = await grid.submit(2)
        assert await dry.cycle() is False
        assert dry.service.plan.by_provider() == {1: ids}
        assert await dry.statuses(*ids) == [S.PENDING] * 2


async def test_restart_continues(grid: LiveGrid, tmp_path: Path) -> None:
    """A restarted process and one with an empty database have the same snapshot."""
    path = tmp_path / "metascheduler.db"
    first_ids = await grid.submit(2, resources=WHOLE)
    async with bench(grid, path=path) as before:
        await before.cycle()
    more = await grid.submit(1, resources=WHOLE, uses="place=p1")
    for state_path in (path, None):
        async with bench(grid, path=state_path) as after:
            await after.cycle()
            assert await after.statuses(*first_ids) == [S.META_SCHEDULED] * 2
            assert "waits for free capacity at provider 2" in after.waits(more[0])


async def test_a_successor_inherits_terms_and_age(scheduler_bench: SchedulerBench) -> None:
    grid, scheduler = scheduler_bench.grid, scheduler_bench.grid.contracts.scheduler
    [job_id] = await grid.submit(uses="place=p0", retries=1, objective=Objective.TIME)
    await scheduler_bench.cycle()
    await grid.send(grid.providers[0], scheduler.claim([job_id]))
    await grid.send(grid.providers[0], scheduler.start([job_id]))
    receipt = await grid.send(grid.providers[0], scheduler.panic([job_id], "node is gone"))
    assert [e for e in receipt.events if isinstance(e, JobPanicked)]
    [retried] = [e for e in receipt.events if isinstance(e, JobRetried)]
    assert not [e for e in receipt.events if isinstance(e, TransitionSkipped)]
    await scheduler_bench.cycle()
    known = scheduler_bench.service.state.live()[retried.successor]
    assert (known.uses, known.objective) == ("place=p0", Objective.TIME)
    assert known.retry_of == job_id
    # Only the excluded provider has the label.
    assert await scheduler_bench.statuses(retried.successor) == [S.PENDING]
    verdicts = scheduler_bench.waits(retried.successor)
    assert "lost this job before" in verdicts or "has the labels" in verdicts


async def test_the_daemon_runs_until_it_is_stopped(grid: LiveGrid, tmp_path: Path) -> None:
    settings = SchedulerSettings(state_dir=tmp_path, confirmations=0, poll_interval=0.1)
    stop = asyncio.Event()
    daemon = asyncio.create_task(
        run_scheduler(grid.node.url, grid.deployment, grid.scheduler, settings, stop=stop)
    )
    [job_id] = await grid.submit()

    async def taken() -> bool:
        return (await grid.contracts.scheduler.get_job(job_id)).status is S.META_SCHEDULED

    await until(taken)
    with pytest.raises(UsageError, match="used by another process"):
        await run_scheduler(grid.node.url, grid.deployment, grid.scheduler, settings, stop=stop)
    stop.set()
    await daemon
    status = json.loads((tmp_path / "metascheduler.json").read_text())
    assert (status["name"], status["state"]) == ("metascheduler", "stopped")


async def test_a_wallet_without_the_role_is_reported(grid: LiveGrid, tmp_path: Path) -> None:
    settings = SchedulerSettings(state_dir=tmp_path)
    with pytest.raises(NotAuthorisedError, match="METASCHEDULER_ROLE"):
        await run_scheduler(grid.node.url, grid.deployment, grid.stranger, settings)


async def test_a_dry_run_needs_no_wallet(grid: LiveGrid, tmp_path: Path) -> None:
    settings = SchedulerSettings(state_dir=tmp_path, confirmations=0, poll_interval=0.1)
    [job_id] = await grid.submit()
    stop = asyncio.Event()
    with capture_logs() as logs:
        daemon = asyncio.create_task(
            run_scheduler(grid.node.url, grid.deployment, None, settings, stop=stop)
        )
        await until(lambda: [log for log in logs if log["event"] == "batch simulated"])
        stop.set()
        await daemon
    assert (await grid.contracts.scheduler.get_job(job_id)).status is S.PENDING


async def test_the_daemon_serves_its_metrics_at_the_given_port(
    grid: LiveGrid, tmp_path: Path
) -> None:
    settings = SchedulerSettings(state_dir=tmp_path, poll_interval=0.1, health_port=0)
    stop = asyncio.Event()
    with capture_logs() as logs:
        daemon = asyncio.create_task(
            run_scheduler(grid.node.url, grid.deployment, None, settings, stop=stop)
        )
        await until(lambda: [log for log in logs if log["event"] == "health server started"])
        url = next(log["url"] for log in logs if log["event"] == "health server started")
        async with httpx2.AsyncClient(base_url=url) as client:

            async def ready() -> bool:
                return (await client.get("/ready")).status_code == 200

            await until(ready)
            metrics = (await client.get("/metrics")).text
            stop.set()
            await daemon
            with pytest.raises(httpx2.TransportError):
                await client.get("/live")
    assert 'deepsquare_queue_jobs{service="metascheduler"}' in metrics
    assert 'deepsquare_follower_lag_blocks{service="metascheduler"} 0.0' in metrics
    age, skew = (
        float(value)
        for name in ("head_age", "clock_skew")
        for value in re.findall(
            rf"^deepsquare_{name}_seconds\{{.*?\}} (\S+)$", metrics, re.MULTILINE
        )
    )
    # Other tests set this chain's clock: its head may be of another day, for both alike.
    assert age >= skew
    assert age == pytest.approx(skew, abs=600)


async def test_an_idle_scheduler_sends_two_requests_per_block(
    scheduler_bench: SchedulerBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One request for head and nonce, one for everything else, one more while jobs are assigned."""
    ids = await scheduler_bench.grid.submit(1)
    await scheduler_bench.cycle(2)
    assert await scheduler_bench.statuses(*ids) == [S.META_SCHEDULED]
    requests = counted_requests(monkeypatch)
    for _ in range(3):
        scheduler_bench.service._balance_checked_at = (
            None  # include the reads that are not made in every cycle
        )
        await scheduler_bench.grid.node.mine()
        scheduler_bench.service.heads.hint()
        requests.clear()
        assert await scheduler_bench.service.cycle() is False
        assert 0 < len(requests) <= 3, requests
        assert "eth_getLogs" in requests[1]
        requests.clear()
        scheduler_bench.service.heads.hint()  # without a new block
        await scheduler_bench.service.cycle()
        assert len(requests) <= 1, requests


async def test_job_why_shows_the_error_of_past_forecasts(grid: LiveGrid) -> None:
    """The first job ends long before its limit, so that the second one starts early."""
    scheduler, provider = grid.contracts.scheduler, grid.providers[0]
    await grid.send(grid.providers[1], grid.contracts.registry.set_draining(True))
    first, second, third = await grid.submit(3, resources=WHOLE, time_limit=600)
    await grid.run([first])
    assert "had to wait" not in str((await explain(grid.contracts, third)).details)
    await grid.node.mine(PROMPT_BLOCKS)
    await grid.send(provider, scheduler.finish([Report(first, 1, 0, bytes(32), "")]))
    await grid.run([second])
    details = str((await explain(grid.contracts, third)).details)
    assert re.search(r"for the last job that had to wait, .* off by [1-9][0-9]* s \(", details)


async def test_dependent_jobs_wait_for_the_last_successor(scheduler_bench: SchedulerBench) -> None:
    """A retried job counts by its successor; a dependency that can't be met is logged, never assigned."""
    grid, scheduler = scheduler_bench.grid, scheduler_bench.grid.contracts.scheduler
    [first] = await grid.submit(retries=1)
    await grid.run([first])
    [dependent] = await grid.submit(uses=f"deepsquare.afterok={first}")
    [instead] = await grid.submit(uses=f"deepsquare.afternotok={first}")
    await grid.send(grid.providers[0], scheduler.panic([first], "lost"))
    successor = await scheduler.job_count()
    await scheduler_bench.cycle()
    assert await scheduler_bench.statuses(dependent, instead) == [S.PENDING, S.PENDING]
    assert await scheduler_bench.provider_ids(successor) == [2], "not the provider that lost it"
    assert f"waits for the end of job {first}" in (await explain(grid.contracts, dependent)).text
    await grid.send(grid.providers[1], scheduler.claim_and_start([successor]))
    await grid.send(grid.providers[1], scheduler.finish([Report(successor, 1, 0, bytes(32), "")]))
    await scheduler_bench.cycle(2)
    assert await scheduler_bench.statuses(dependent, instead) == [S.META_SCHEDULED, S.PENDING]
    event = await explain(grid.contracts, instead)
    assert event.unmet
    assert f"job {first} ended FINISHED" in event.text
    assert await unmet_jobs(grid.contracts, grid.customers[0].address) == [instead]


async def test_an_array_has_no_more_assigned_jobs_than_its_limit(
    scheduler_bench: SchedulerBench,
) -> None:
    ids = await scheduler_bench.grid.submit(3, uses="deepsquare.array=sub-00000001%2")
    await scheduler_bench.cycle(2)
    assert await scheduler_bench.statuses(*ids) == [S.META_SCHEDULED, S.META_SCHEDULED, S.PENDING]
    assert (
        "no more than 2 may be at once"
        in (await explain(scheduler_bench.grid.contracts, ids[2])).text
    )
    await scheduler_bench.grid.send(
        scheduler_bench.grid.customers[0], scheduler_bench.grid.contracts.scheduler.cancel(ids[:1])
    )
    await scheduler_bench.cycle(2)
    assert await scheduler_bench.statuses(*ids) == [S.CANCELLED, S.META_SCHEDULED, S.META_SCHEDULED]
