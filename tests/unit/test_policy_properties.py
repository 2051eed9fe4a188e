"""Properties of every plan and every run of the queue, for any grid."""

from __future__ import annotations

import dataclasses

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from deepsquare_chain.job import Job, JobFlags, JobStatus, Objective, Offer, Prices, ProviderStatus
from deepsquare_chain.metascheduler import policy
from deepsquare_chain.metascheduler.eligibility import (
    ProviderView,
    Waiting,
    amounts,
    available_capacity,
    refusal,
    run_time,
    within,
)
from deepsquare_chain.metascheduler.explain import explain_decision, explain_wait
from deepsquare_chain.metascheduler.history import RunHistory
from deepsquare_chain.metascheduler.policy import Rules, Snapshot, plan
from deepsquare_chain.metascheduler.simulation import engine
from deepsquare_chain.metascheduler.simulation.engine import (
    Cluster,
    SimulatedRun,
    first_come_first_served,
    run_clusters,
    run_policy,
    to_the_only_one,
)
from deepsquare_chain.metascheduler.simulation.workload import (
    TraceJob,
    fold,
    scaled,
    synthetic,
    with_objectives,
)
from tests.support.workloads import NOW, provider, running, waiting

LABELS = st.dictionaries(
    st.sampled_from(["compute.gflops", "cpu.speed", "energy.watts_per_cpu", "region"]),
    st.sampled_from(["1", "2.5", "eu", "", "1e5", "inf"]),
)
USES = st.sampled_from(["", "", "", "region=eu", "compute.gflops>=2", "cpu.speed<2", "!!!"])


@st.composite
def views(draw: st.DrawFn, number: int) -> ProviderView:
    cpus, memory, gpus = draw(st.integers(1, 16)), draw(st.integers(1, 4_000)), draw(st.just(2))
    return provider(
        number,
        cpus=cpus,
        memory=memory,
        offer=Offer(draw(st.integers(0, cpus)), draw(st.integers(0, memory)), gpus),
        prices=Prices(draw(st.integers(0, 50)), draw(st.integers(0, 50)), draw(st.integers(0, 2))),
        labels=draw(LABELS),
        status=draw(st.sampled_from([*[ProviderStatus.ACTIVE] * 5, *ProviderStatus])),
        silent=draw(st.integers(0, 9)) == 0,
        challenged=draw(st.integers(0, 9)) == 0,
    )


@st.composite
def waits(draw: st.DrawFn, number: int) -> Waiting:
    return waiting(
        number,
        cpus=draw(st.integers(1, 4)),
        tasks=draw(st.integers(1, 4)),
        mem_per_cpu=draw(st.integers(1, 300)),
        gpus=draw(st.integers(0, 2)),
        time_limit=draw(st.integers(1, 1_000)),
        escrow=draw(st.integers(1, 400_000)),
        flags=draw(st.sampled_from([JobFlags.NONE, JobFlags.UNTIL_SPENT])),
        objective=draw(st.sampled_from(Objective)),
        uses=draw(USES),
        queued_at=NOW - draw(st.integers(0, 5_000)),
        excluded=draw(st.frozensets(st.integers(1, 4), max_size=1)),
        avoided=draw(st.dictionaries(st.integers(1, 4), st.integers(NOW - 5, NOW + 5), max_size=1)),
    )


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    grid = [draw(views(number)) for number in range(1, draw(st.integers(1, 4)) + 1)]
    queue = [draw(waits(number)) for number in range(1, draw(st.integers(0, 12)) + 1)]
    assigned_jobs = []
    for number in range(100, 100 + draw(st.integers(0, 5))):
        record = draw(waits(number)).job
        assigned_jobs.append(
            dataclasses.replace(
                record,
                status=draw(st.sampled_from([JobStatus.META_SCHEDULED, JobStatus.RUNNING])),
                since=NOW - draw(st.integers(0, 2_000)),
                provider_id=draw(st.integers(1, len(grid))),
                rate=draw(st.integers(1, 500)),
            )
        )
    return Snapshot(NOW, grid, queue, assigned_jobs)


@st.composite
def rules(draw: st.DrawFn) -> Rules:
    return Rules(
        overdue_after=draw(st.integers(-1, 4_000)),
        overdue_factor=draw(st.integers(0, 4)),
        reservations=draw(st.integers(0, 4)),
        start_margin=5,
    )


@settings(max_examples=150)
@given(snapshots(), rules())
def test_a_plan_satisfies_all_constraints(snapshot: Snapshot, policy_rules: Rules) -> None:
    job_plan = plan(snapshot, policy_rules)
    by_id = {view.provider.id: view for view in snapshot.providers}
    available = available_capacity(snapshot.providers, snapshot.assigned)
    ids = [decision.waiting.job.id for decision in job_plan.decisions]
    assert len(ids) == len(set(ids))
    for decision in job_plan.decisions:
        job, view = decision.waiting.job, by_id[decision.provider_id]
        # Never to a provider that the contract would refuse, or beyond the budget.
        assert refusal(decision.waiting, view, NOW) is None
        assert decision.rate * job.time_limit <= job.escrow
        # Never over capacity, at any point of the plan.
        assert within(amounts(job.resources), available[decision.provider_id])
        free = available[decision.provider_id]
        required = amounts(job.resources)
        available[decision.provider_id] = (
            free[0] - required[0],
            free[1] - required[1],
            free[2] - required[2],
        )
        assert str(job.id) in explain_decision(decision)


@settings(max_examples=100)
@given(snapshots(), rules(), st.randoms(use_true_random=False))
def test_equal_snapshots_give_equal_plans(
    snapshot: Snapshot, policy_rules: Rules, rng: st.randoms
) -> None:
    parts = [list(snapshot.providers), list(snapshot.waiting), list(snapshot.assigned)]
    for part in parts:
        rng.shuffle(part)
    shuffled = Snapshot(NOW, *parts)
    assert plan(shuffled, policy_rules) == plan(snapshot, policy_rules)


@settings(max_examples=100)
@given(snapshots(), rules())
def test_no_provider_idles_without_a_reason(snapshot: Snapshot, policy_rules: Rules) -> None:
    job_plan = plan(snapshot, policy_rules)
    assigned_ids = {decision.waiting.job.id for decision in job_plan.decisions}
    after = [running(d.waiting.job.id, d.provider_id, rate=d.rate) for d in job_plan.decisions]
    for job, decision in zip(after, job_plan.decisions, strict=True):
        object.__setattr__(job, "resources", decision.waiting.job.resources)
    available = available_capacity(snapshot.providers, [*snapshot.assigned, *after])
    for wait in snapshot.waiting:
        if wait.job.id in assigned_ids:
            continue
        if (hold_end := job_plan.holds.get(wait.job.id)) is not None:
            assert wait.objective is Objective.ENERGY
            assert NOW < hold_end <= wait.queued_at + policy_rules.longest_hold
            continue
        for view in snapshot.providers:
            if refusal(wait, view, NOW) is not None:
                continue
            fits = within(amounts(wait.job.resources), available[view.provider.id])
            assert not fits or view.provider.id in job_plan.reservations


@settings(max_examples=100)
@given(snapshots(), rules())
def test_a_reservation_is_never_pushed_back_by_the_same_plan(
    snapshot: Snapshot, policy_rules: Rules
) -> None:
    job_plan = plan(snapshot, policy_rules)
    reserved_from = [
        dataclasses.replace(
            d.waiting.job,
            status=JobStatus.RUNNING,
            since=NOW + policy_rules.start_margin,
            provider_id=d.provider_id,
            rate=d.rate,
        )
        for d in job_plan.decisions
    ]

    def there(job: Job, at: int) -> bool:
        ends_at = max(job.since + run_time(job, job.rate), NOW + 1)
        if job.status is not JobStatus.RUNNING:
            ends_at = NOW + policy_rules.start_margin + run_time(job, job.rate)
        return ends_at > at

    jobs = [*snapshot.assigned, *reserved_from]
    for provider_id, reservation in job_plan.reservations.items():
        reserved_job = next(w for w in snapshot.waiting if w.job.id == reservation.job_id)
        available = available_capacity(
            snapshot.providers, [job for job in jobs if there(job, reservation.at)]
        )
        assert within(amounts(reserved_job.job.resources), available[provider_id])


@settings(max_examples=100)
@given(snapshots(), rules())
def test_every_wait_is_explained(snapshot: Snapshot, policy_rules: Rules) -> None:
    job_plan = plan(snapshot, policy_rules)
    assigned_ids = {decision.waiting.job.id for decision in job_plan.decisions}
    for wait in snapshot.waiting:
        if wait.job.id not in assigned_ids:
            explanation = explain_wait(wait, snapshot, job_plan, policy_rules)
            assert f"job {wait.job.id} " in explanation.text
            assert len(explanation.verdicts) == len(snapshot.providers)


class TestStarvation:
    """A large job against an endless stream of small ones."""

    LIMIT = 50

    def wait_of_the_big_one(self, policy_rules: Rules) -> float:
        small = [
            TraceJob(n, t, 1, self.LIMIT, self.LIMIT, "many")
            for n, t in enumerate(range(0, 6_000, 7), start=2)
        ]
        jobs = sorted([TraceJob(1, 5, 8, 20, 20, "one"), *small], key=lambda job: job.at)
        grid = [provider(1, cpus=8, approved_until=10**10)]
        outcomes = run_policy(jobs, grid, [1.0], policy_rules)
        return next(outcome.wait for outcome in outcomes if outcome.job.id == 1)

    def test_without_reservations_it_would_starve(self) -> None:
        assert self.wait_of_the_big_one(Rules(10**9, 0, reservations=0)) > 5_900

    def test_an_overdue_job_waits_no_longer_than_the_running_jobs(self) -> None:
        wait = self.wait_of_the_big_one(Rules(3_600, 10, reservations=0))
        # It is overdue after 3,600 + 10 x 20 s, then waits for what runs and for the next event.
        assert 3_800 < wait <= 3_800 + self.LIMIT + 7

    @settings(max_examples=10)
    @given(st.integers(0, 10**6), st.sampled_from([0.7, 1.0, 1.3]), st.sampled_from([0, 1, 6]))
    def test_every_job_of_any_workload_starts(self, seed: int, load: float, block: int) -> None:
        trace = scaled(synthetic("mixed", 150, seed), 8)
        jobs = fold(trace, capacity=16, load=load, seed=seed)
        grid = [provider(n, cpus=8, memory=10**6, approved_until=10**10) for n in (1, 2)]
        outcomes = run_policy(jobs, grid, [1.0, 1.0], Rules(), block=block)
        assert len(outcomes) == len(jobs)
        assert all(outcome.wait >= 3 * block for outcome in outcomes)
        # The grid never exceeds its capacity, whatever the order of arrivals.
        for index in (0, 1):
            provider_outcomes = [outcome for outcome in outcomes if outcome.provider == index]
            for moment in {outcome.start for outcome in provider_outcomes}:
                used_cpus = sum(o.job.cpus for o in provider_outcomes if o.start <= moment < o.end)
                assert used_cpus <= 8


def test_updated_tables_give_the_same_plan_as_new_ones() -> None:
    """A planner with the state of earlier cycles decides like a new one.

    Both of its computations, for few and for many providers, give the same plan.
    """
    jobs = fold(scaled(synthetic("mixed", 120, 1), 8), capacity=24, load=1.2, seed=1)
    jobs = with_objectives(jobs, "MIXED", 1)
    grid = [
        provider(
            number,
            cpus=8,
            memory=10**6,
            approved_until=10**10,
            prices=Prices(number, 1, 1),
            labels={"cpu.speed": speed, "energy.watts_per_cpu": watts},
        )
        for number, speed, watts in ((1, "1", "10"), (2, "1.3", "9"), (3, "0.7", "11"))
    ]
    compared = []

    class CheckedPlanner(policy.Planner):
        def plan(
            self, snapshot: Snapshot, policy_rules: Rules, history: RunHistory, **_: bool
        ) -> policy.Plan:
            job_plan = super().plan(snapshot, policy_rules, history)
            assert job_plan == plan(snapshot, policy_rules, history)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(policy, "_MAX_PLAIN_PROVIDERS", 0)
                assert plan(snapshot, policy_rules, history) == job_plan
            # Data for explanations does not change any decision.
            short = super().plan(snapshot, policy_rules, history, complete=False)
            assert short.decisions == job_plan.decisions
            compared.append(len(job_plan.decisions))
            return job_plan

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "Planner", CheckedPlanner)
        run_policy(jobs, grid, [1.0, 1.3, 0.7], Rules())
    assert sum(compared) == len(jobs)


def test_small_jobs_are_quicker_than_first_come_first_served() -> None:
    jobs = fold(scaled(synthetic("mixed", 800, 1), 32), capacity=64, load=0.95, seed=1)
    grid = [provider(n, cpus=32, memory=10**6, approved_until=10**10) for n in (1, 2)]

    def slowdown(outcomes: list[SimulatedRun]) -> float:
        return sum((o.end - o.job.at) / max(o.end - o.start, 10) for o in outcomes) / len(outcomes)

    merged = run_clusters(jobs, [Cluster(64, 1.0, first_come_first_served)], to_the_only_one)
    assert slowdown(run_policy(jobs, grid, [1.0, 1.0], Rules())) < 0.7 * slowdown(merged)
