"""The policy's eligibility equals that of the contract, on the real bytecode."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from deepsquare_chain.chain.bindings.contracts import _provider
from deepsquare_chain.chain.bindings.records import read_job
from deepsquare_chain.job import NO_LOAD, JobStatus, Load, Objective
from deepsquare_chain.metascheduler.eligibility import (
    ProviderView,
    Refusal,
    Waiting,
    eligible_rate,
    refusal,
)
from deepsquare_chain.metascheduler.policy import Snapshot, plan
from tests.support.grid import APPROVAL_PERIOD, TERMS, Grid, Host

NAMES = {
    None: "",
    Refusal.WAITING_APPROVAL: "ProviderNotActive",
    Refusal.DRAINING: "ProviderNotActive",
    Refusal.BANNED: "ProviderNotActive",
    Refusal.EXPIRED: "ProviderNotActive",
    Refusal.SILENT: "ProviderSilent",
    Refusal.EXCLUDED: "ProviderExcluded",
    Refusal.TOO_LARGE: "DoesNotFit",
    Refusal.RATE: "RateOutOfRange",
    Refusal.BUDGET: "OverBudget",
}


@pytest.fixture(scope="module")
def grid() -> Grid:
    return Grid()


@pytest.fixture(scope="module")
def host(grid: Grid) -> Host:
    return grid.provider()


def theirs(grid: Grid, host: Host, job_id: int) -> str:
    eligible, reason = grid.scheduler.isEligible(job_id, host.id)
    return "" if eligible else grid.chain.error_name(reason)


def ours(grid: Grid, host: Host, job_id: int, excluded: frozenset[int] = frozenset()) -> str:
    job = read_job(job_id, tuple(grid.scheduler.getJob(job_id)))
    provider = _provider(tuple(grid.registry.getProvider(host.account)))
    view = ProviderView(provider, silent=grid.scheduler.isSilent(host.id))
    waiting = Waiting(job, Objective.COST, "", job.since, excluded)
    # The scheduler reads a block and acts in the next one.
    return NAMES[refusal(waiting, view, grid.chain.now - 1)]


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 6),
    st.integers(1, 9),
    st.one_of(st.integers(1, 3_000), st.just(2**24 - 1)),
    st.integers(0, 9),
    st.sampled_from([1, 600, 2**24 - 1]),
    st.sampled_from([1, 10**9, 10**10, 2**96 - 1]),
    st.tuples(*[st.sampled_from([0, 1, 1_000_003, 10**19])] * 3),
    st.tuples(st.integers(0, 32), st.integers(0, 32_000), st.integers(0, 8)),
    st.sampled_from(["", "", "", "draining", "banned", "expired"]),
)
def test_scheduler_and_contract_agree_on_eligibility(
    grid: Grid,
    host: Host,
    tasks: int,
    cpus: int,
    memory: int,
    gpus: int,
    limit: int,
    amount: int,
    prices: tuple[int, ...],
    offer: tuple[int, ...],
    standing: str,
) -> None:
    before = grid.chain.snapshot()
    try:
        size = {"tasks": tasks, "cpusPerTask": cpus, "memPerCpu": memory, "gpus": gpus}
        grid.credit.mint(grid.alice, amount, sender=grid.admin)
        job_id = grid.submit(amount=amount, timeLimit=limit, **size)
        grid.registry.setPrices(prices, sender=host.account)
        grid.registry.setOffer(offer, sender=host.account)
        if standing == "draining":
            grid.registry.setDraining(True, sender=host.account)
        elif standing == "banned":
            grid.registry.ban(host.account, "", sender=grid.admin)
        elif standing == "expired":
            grid.chain.advance(APPROVAL_PERIOD + 1)
        assert ours(grid, host, job_id) == theirs(grid, host, job_id)
        if not standing:
            provider = _provider(tuple(grid.registry.getProvider(host.account)))
            job = read_job(job_id, tuple(grid.scheduler.getJob(job_id)))
            rate = eligible_rate(provider, job, "")
            if theirs(grid, host, job_id) == "":
                grid.assign(host, job_id)
                assert grid.job(job_id).rate == rate
    finally:
        grid.chain.revert(before)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 3_000), st.integers(0, 3)), max_size=9),
    st.tuples(st.integers(1, 32), st.integers(1, 32_000), st.integers(0, 8)),
)
def test_the_load_equals_that_of_the_contract(
    grid: Grid, host: Host, sizes: list[tuple[int, int, int]], offer: tuple[int, int, int]
) -> None:
    """The contract accepts all planned assignments and refuses all others."""
    before = grid.chain.snapshot()
    try:
        grid.registry.setOffer(offer, sender=host.account)
        ids = [
            grid.submit(amount=10**12, tasks=1, cpusPerTask=cpus, memPerCpu=memory, gpus=gpus)
            for cpus, memory, gpus in sizes
        ]
        for number in ids[:3]:
            if grid.scheduler.isEligible(number, host.id)[0]:
                grid.assign(host, number)
        view = ProviderView(_provider(tuple(grid.registry.getProvider(host.account))))
        jobs = [read_job(number, tuple(grid.scheduler.getJob(number))) for number in ids]
        assigned = [job for job in jobs if job.status.is_assigned]
        queue = [
            Waiting(job, Objective.COST, "", job.since)
            for job in jobs
            if job.status is JobStatus.PENDING
        ]
        assignments = plan(Snapshot(grid.chain.now, [view], queue, assigned)).by_provider()
        chosen = assignments.get(host.id, [])
        if chosen:
            grid.assign(host, *chosen)
        assert all(grid.job(number).status == JobStatus.META_SCHEDULED for number in chosen)
        expected_ids = {*chosen, *(job.id for job in assigned)}
        load = sum((Load.of(job.resources) for job in jobs if job.id in expected_ids), NO_LOAD)
        assert Load(*grid.scheduler.loadOf(host.id)) == load
        for waiting in queue:
            if waiting.job.id not in chosen:
                assert theirs(grid, host, waiting.job.id) == "DoesNotFit"
    finally:
        grid.chain.revert(before)


@pytest.mark.parametrize("seconds_left", [-1, 0, 1])
def test_the_last_second_of_an_approval(grid: Grid, host: Host, seconds_left: int) -> None:
    before = grid.chain.snapshot()
    job_id = grid.submit()
    approved_until = grid.registry.getProvider(host.account).approvedUntil
    grid.chain.advance(approved_until - grid.chain.now - seconds_left)
    assert ours(grid, host, job_id) == theirs(grid, host, job_id)
    assert (ours(grid, host, job_id) == "") is (seconds_left >= 0)
    grid.chain.revert(before)


def test_silence_and_exclusion(grid: Grid, host: Host) -> None:
    before = grid.chain.snapshot()
    lost_job = grid.running(host, retries=1)
    fresh = grid.submit()
    grid.abandon(host, lost_job)
    assert ours(grid, host, fresh) == theirs(grid, host, fresh) == "ProviderSilent"
    grid.scheduler.panic([lost_job], "", sender=grid.stranger)
    successor = grid.scheduler.jobCount()
    grid.scheduler.answer(sender=host.account)
    excluded = frozenset({host.id})
    assert ours(grid, host, successor, excluded) == "ProviderExcluded"
    assert theirs(grid, host, successor) == "ProviderExcluded"
    assert ours(grid, host, fresh) == theirs(grid, host, fresh) == ""
    assert TERMS["retries"] == 1
    grid.chain.revert(before)
