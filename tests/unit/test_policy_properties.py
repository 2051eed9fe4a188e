"""What holds for every plan and every run of the queue, whatever the grid looks like."""

from __future__ import annotations

import dataclasses

import hypothesis.strategies as st
from hypothesis import given, settings

from deepsquare_chain.job import Job, JobFlags, JobStatus, Objective, Offer, Prices, ProviderStatus
from deepsquare_chain.metascheduler.eligibility import ProviderView, Waiting, refusal, run_time
from deepsquare_chain.metascheduler.explain import explain_decision, explain_wait
from deepsquare_chain.metascheduler.free_capacity import amounts, free_room, within
from deepsquare_chain.metascheduler.policy import Rules, Snapshot, plan
from deepsquare_chain.metascheduler.simulator import Arrival, simulate, workload
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
    held = []
    for number in range(100, 100 + draw(st.integers(0, 5))):
        record = draw(waits(number)).job
        held.append(
            dataclasses.replace(
                record,
                status=draw(st.sampled_from([JobStatus.META_SCHEDULED, JobStatus.RUNNING])),
                since=NOW - draw(st.integers(0, 2_000)),
                provider_id=draw(st.integers(1, len(grid))),
                rate=draw(st.integers(1, 500)),
            )
        )
    return Snapshot(NOW, grid, queue, held)


@st.composite
def rules(draw: st.DrawFn) -> Rules:
    return Rules(draw(st.integers(-1, 2_000)), draw(st.integers(0, 4)), draw(st.just(86_400)), 5)


@settings(max_examples=150)
@given(snapshots(), rules())
def test_a_plan_is_lawful(snapshot: Snapshot, ruled: Rules) -> None:
    decided = plan(snapshot, ruled)
    by_id = {view.provider.id: view for view in snapshot.providers}
    room = free_room(snapshot.providers, snapshot.assigned)
    ids = [decision.waiting.job.id for decision in decided.decisions]
    assert len(ids) == len(set(ids))
    for decision in decided.decisions:
        job, view = decision.waiting.job, by_id[decision.provider_id]
        # Never to a provider that the contract would refuse, or beyond the budget.
        assert refusal(decision.waiting, view, NOW) is None
        assert decision.rate * job.time_limit <= job.escrow
        # Never over capacity, at any point of the plan.
        assert within(amounts(job.resources), room[decision.provider_id])
        free = room[decision.provider_id]
        taken = amounts(job.resources)
        room[decision.provider_id] = (free[0] - taken[0], free[1] - taken[1], free[2] - taken[2])
        assert str(job.id) in explain_decision(decision)


@settings(max_examples=100)
@given(snapshots(), rules(), st.randoms(use_true_random=False))
def test_equal_snapshots_give_equal_plans(
    snapshot: Snapshot, ruled: Rules, dice: st.randoms
) -> None:
    parts = [list(snapshot.providers), list(snapshot.waiting), list(snapshot.assigned)]
    for part in parts:
        dice.shuffle(part)
    shuffled = Snapshot(NOW, *parts)
    assert plan(shuffled, ruled) == plan(snapshot, ruled)


@settings(max_examples=100)
@given(snapshots(), rules())
def test_nobody_idles_without_a_reason(snapshot: Snapshot, ruled: Rules) -> None:
    decided = plan(snapshot, ruled)
    gone = {decision.waiting.job.id for decision in decided.decisions}
    after = [running(d.waiting.job.id, d.provider_id, rate=d.rate) for d in decided.decisions]
    for job, decision in zip(after, decided.decisions, strict=True):
        object.__setattr__(job, "resources", decision.waiting.job.resources)
    room = free_room(snapshot.providers, [*snapshot.assigned, *after])
    kept = decided.reservation
    for wait in snapshot.waiting:
        if wait.job.id in gone:
            continue
        for view in snapshot.providers:
            if refusal(wait, view, NOW) is not None:
                continue
            fits = within(amounts(wait.job.resources), room[view.provider.id])
            assert not fits or (kept is not None and kept.provider_id == view.provider.id)


@settings(max_examples=100)
@given(snapshots(), rules())
def test_a_reservation_is_never_pushed_back_by_the_same_plan(
    snapshot: Snapshot, ruled: Rules
) -> None:
    decided = plan(snapshot, ruled)
    kept = decided.reservation
    if kept is None:
        return
    wanted = next(w for w in snapshot.waiting if w.job.id == kept.job_id)
    began = [
        dataclasses.replace(
            d.waiting.job,
            status=JobStatus.RUNNING,
            since=NOW + ruled.start_margin,
            provider_id=d.provider_id,
            rate=d.rate,
        )
        for d in decided.decisions
    ]

    def there(job: Job) -> bool:
        until = max(job.since + run_time(job, job.rate), NOW + 1)
        if job.status is not JobStatus.RUNNING:
            until = NOW + ruled.start_margin + run_time(job, job.rate)
        return until > kept.at

    room = free_room(snapshot.providers, [j for j in [*snapshot.assigned, *began] if there(j)])
    assert within(amounts(wanted.job.resources), room[kept.provider_id])


@settings(max_examples=100)
@given(snapshots(), rules())
def test_every_wait_is_explained(snapshot: Snapshot, ruled: Rules) -> None:
    decided = plan(snapshot, ruled)
    gone = {decision.waiting.job.id for decision in decided.decisions}
    for wait in snapshot.waiting:
        if wait.job.id not in gone:
            explained = explain_wait(wait, snapshot, decided, ruled)
            assert f"job {wait.job.id} " in explained.text
            assert len(explained.verdicts) == len(snapshot.providers)


class TestStarvation:
    """A large job against an endless stream of small ones."""

    LIMIT = 50

    def stream(self, seconds: int) -> list[Arrival]:
        small = [
            Arrival(t, waiting(n, cpus=1, time_limit=self.LIMIT, queued_at=t, since=t), self.LIMIT)
            for n, t in enumerate(range(0, seconds, 7), start=2)
        ]
        big = waiting(1, cpus=8, time_limit=20, queued_at=5, since=5)
        return [Arrival(5, big, 20), *small]

    def wait_of_the_big_one(self, ruled: Rules) -> int | None:
        arrivals = self.stream(3_000)
        grid = [provider(1, cpus=8, approved_until=10**10)]
        outcomes = simulate(arrivals, grid, ruled, until=3_000)
        return next(o.wait for o in outcomes if o.arrival.waiting.job.id == 1)

    def test_without_aging_it_would_starve(self) -> None:
        assert self.wait_of_the_big_one(Rules(10**9, 0, 10**9, 0)) is None

    def test_with_it_the_wait_is_bounded(self) -> None:
        wait = self.wait_of_the_big_one(Rules(300, 4, 86_400, 0))
        # Patience of 300 + 4 x 20 s, then at most what runs and the time to the next event.
        assert wait is not None
        assert 380 < wait <= 380 + self.LIMIT + 7

    @settings(max_examples=15)
    @given(st.integers(0, 10**6), st.sampled_from([0.7, 1.0, 1.3]))
    def test_every_job_of_any_workload_starts(self, seed: int, load: float) -> None:
        arrivals = workload(seed, 150, 16, load)
        grid = [provider(n, cpus=8, memory=10**6, approved_until=10**10) for n in (1, 2)]
        possible = [a for a in arrivals if a.waiting.job.resources.cpus <= 8]
        outcomes = simulate(possible, grid, Rules(), until=10**9)
        assert all(outcome.wait is not None for outcome in outcomes)
        # In no order of arrivals does the grid give more than it has.
        moments = sorted({o.arrival.at + (o.wait or 0) for o in outcomes})
        for block_context in moments:
            for view in grid:
                used = sum(
                    o.arrival.waiting.job.resources.cpus
                    for o in outcomes
                    if o.provider_id == view.provider.id
                    and o.arrival.at + (o.wait or 0)
                    <= block_context
                    < o.arrival.at + (o.wait or 0) + o.arrival.seconds
                )
                assert used <= 8


def test_aging_makes_small_jobs_quicker_than_first_come_first_served() -> None:
    arrivals = workload(1, 600, 64, 0.95)
    grid = [provider(n, cpus=32, memory=10**6, approved_until=10**10) for n in (1, 2)]

    def slowdown(ruled: Rules) -> float:
        outcomes = simulate(arrivals, grid, ruled, until=10**9)
        return sum(outcome.slowdown for outcome in outcomes) / len(outcomes)

    assert slowdown(Rules()) < 0.9 * slowdown(Rules(-1, 0, 0))
