"""The scheduler's state from events, and its rollback after a reorg."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from deepsquare_chain.chain.bindings import events as ev
from deepsquare_chain.chain.bindings.records import Clock
from deepsquare_chain.chain.follower import Batch
from deepsquare_chain.chain.rpc.heads import Head
from deepsquare_chain.job import Job, JobStatus, Objective, Offer, Resources, Terms
from deepsquare_chain.metascheduler import observer as observing
from deepsquare_chain.metascheduler.liveness import Watch
from deepsquare_chain.metascheduler.observer import ClusterSnapshot, GridObserver
from deepsquare_chain.metascheduler.state import SchedulerState
from deepsquare_chain.store.database import Store
from tests.support.workloads import NOW, address, job, provider
from tests.unit.test_metascheduler_liveness import TIMES

S = JobStatus
HOST, OTHER = address(1), address(2)
_BLOCKS = itertools.count(1)


@pytest.fixture
def store() -> Iterator[Store]:
    with Store.open(None, chain_id=1, contract=address(9), account=address(8)) as result:
        yield result


@pytest.fixture
def state(store: Store) -> SchedulerState:
    return SchedulerState(store)


def submitted(job_id: int, uses: str = "a=b") -> ev.JobSubmitted:
    terms = Terms(5, 60, Resources(1, 1, 1, 0), 1, False, Objective.TIME, "name", uses)
    return ev.JobSubmitted(job_id, address(7), bytes(32), terms, block_number=job_id)


def moved(job_id: int, before: S, after: S, host: str = HOST, block: int = 50) -> ev.JobTransition:
    return ev.JobTransition(job_id, address(7), host, before, after, block_number=block)


def apply(store: Store, state: SchedulerState, *events: Any, time: int = NOW, **more: Any) -> None:
    with store.begin() as connection:
        state.apply(Batch(tuple(events), 1, 100, time=time, **more), connection)
    # The state in memory always equals the database.
    assert state.live() == SchedulerState(store).live()


def test_terms_are_kept_until_the_job_ends(store: Store, state: SchedulerState) -> None:
    apply(store, state, submitted(1), submitted(2))
    known = state.live()[1]
    assert (known.objective, known.uses, known.name) == (Objective.TIME, "a=b", "name")
    assert known.queued_at == NOW
    assert state.highest() == 2
    apply(store, state, moved(1, S.PENDING, S.CANCELLED))
    assert list(state.live()) == [2]
    assert state.highest() == 2


def test_a_successor_inherits(store: Store, state: SchedulerState) -> None:
    apply(store, state, submitted(1), time=NOW - 500)
    carried = ev.JobRetried(1, 2, 5, block_number=60)
    apply(store, state, moved(1, S.RUNNING, S.PANICKED), carried)
    known = state.live()[2]
    assert (known.uses, known.retry_of, known.queued_at) == ("a=b", 1, NOW - 500)


def test_returns_are_counted_by_provider(store: Store, state: SchedulerState) -> None:
    apply(store, state, submitted(1), moved(1, S.NONE, S.PENDING, address(0)))
    apply(store, state, moved(1, S.META_SCHEDULED, S.PENDING), time=NOW + 5)
    apply(store, state, moved(1, S.SCHEDULED, S.PENDING), time=NOW + 9)
    apply(store, state, moved(1, S.SCHEDULED, S.PENDING, OTHER), time=NOW + 7)
    assert state.live()[1].returned == {HOST: (2, NOW + 9), OTHER: (1, NOW + 7)}


def test_only_actions_of_the_provider_are_signs_of_life(
    store: Store, state: SchedulerState
) -> None:
    apply(store, state, submitted(1))
    for after in (S.META_SCHEDULED, S.PENDING, S.CANCELLED, S.PANICKED):
        apply(store, state, moved(1, S.RUNNING, after))
    assert state.last_signs() == {}
    for at, after in enumerate((S.SCHEDULED, S.RUNNING, S.FINISHED, S.FAILED, S.OUT_OF_CREDITS)):
        apply(store, state, moved(1, S.RUNNING, after), time=NOW + at)
        assert state.last_signs() == {HOST: NOW + at}
    apply(store, state, ev.ProviderAnswered(OTHER), ev.OfferChanged(address(3), Offer(1, 1, 1)))
    assert set(state.last_signs()) == {HOST, OTHER}


def test_a_reorganisation_is_undone(store: Store, state: SchedulerState) -> None:
    apply(store, state, submitted(1), submitted(40))
    apply(store, state, moved(1, S.META_SCHEDULED, S.PENDING, block=41))
    apply(store, state, moved(1, S.PENDING, S.CANCELLED, block=42))
    apply(store, state, ev.ProviderAnswered(OTHER, block_number=43))
    state.registry_changed = state.all_touched = False
    apply(store, state, rolled_back_to=39)
    assert list(state.live()) == [1]
    assert state.live()[1].returned == {}
    assert state.last_signs() == {}
    assert state.registry_changed
    assert state.all_touched
    # The new branch has the same events.
    apply(store, state, submitted(40))
    assert state.highest() == 40


def test_the_same_batch_twice_changes_nothing(store: Store, state: SchedulerState) -> None:
    for _ in range(2):
        apply(store, state, submitted(1))
    assert list(state.live()) == [1]


def test_registry_events_cause_a_read_of_the_providers(store: Store, state: SchedulerState) -> None:
    for events in (
        ev.OfferChanged(HOST, Offer(1, 1, 1)),
        ev.DrainingChanged(HOST, True),
        ev.BanChanged(HOST, True, ""),
        ev.LabelsChanged(HOST, {}),
    ):
        state.registry_changed = False
        apply(store, state, events)
        assert state.registry_changed
    state.registry_changed = False
    apply(store, state, submitted(1))
    assert not state.registry_changed


@dataclass
class FakeScheduler:
    """Job records of a fake chain; `requested` has the ids of the last request."""

    records: dict[int, Job]
    requested: list[int] = field(default_factory=list)

    async def parameters(self, **_: Any) -> Any:
        return TIMES

    async def job_count(self, **_: Any) -> int:
        return max(self.records)

    async def get_jobs(self, ids: Any, **_: Any) -> list[Job]:
        self.requested = list(ids)
        return [self.records[job_id] for job_id in ids]

    async def get_job(self, job_id: int, **_: Any) -> Job:
        return self.records[job_id]

    async def clock_of(self, provider_id: int, **_: Any) -> Clock:
        return Clock(address(provider_id), 0, 0, 0)


class FakeRegistry:
    def __init__(self) -> None:
        self.reads = 0
        self.fails = False

    async def providers(self, **_: Any) -> Any:
        self.reads += 1
        if self.fails:
            raise OSError("no answer")
        return [provider(1).provider, provider(2).provider]


@dataclass
class FakeContracts:
    scheduler: FakeScheduler
    registry: FakeRegistry
    w3: Any = field(default_factory=lambda: SimpleNamespace(provider=None))


@pytest.fixture
def chain() -> FakeContracts:
    records = {n: job(n, since=NOW - 10 * n) for n in (1, 2, 3)}
    return FakeContracts(FakeScheduler(records), FakeRegistry())


@pytest.fixture
def observer(chain: FakeContracts, state: SchedulerState) -> GridObserver:
    return GridObserver(chain, state, Watch())  # type: ignore[arg-type]


async def next_snapshot(observer: GridObserver) -> ClusterSnapshot:
    """Return the snapshot at a new block with the same time."""
    number = next(_BLOCKS)
    return await observer.read(Head(100, NOW, number.to_bytes(32, "big")), events=number)


class TestObserver:
    async def test_pending_records_are_read_once(
        self,
        store: Store,
        state: SchedulerState,
        chain: FakeContracts,
        observer: GridObserver,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(observing, "_REFRESHED_PER_CYCLE", 1)
        apply(store, state, submitted(1), submitted(2), submitted(3))
        cluster = await next_snapshot(observer)
        assert [waiting.job.id for waiting in cluster.waiting] == [1, 2, 3]
        assert chain.scheduler.requested == [1, 2, 3]
        turns = []
        for _ in range(3):
            await next_snapshot(observer)
            turns += chain.scheduler.requested
        # One per cycle, in turn.
        assert sorted(turns) == [1, 2, 3]

    async def test_records_with_events_are_read_at_once(
        self,
        store: Store,
        state: SchedulerState,
        chain: FakeContracts,
        observer: GridObserver,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(observing, "_REFRESHED_PER_CYCLE", 0)
        apply(store, state, submitted(1), submitted(2), submitted(3))
        await next_snapshot(observer)
        chain.scheduler.records[2] = job(2, status=S.META_SCHEDULED, provider_id=1)
        apply(store, state, moved(2, S.PENDING, S.META_SCHEDULED))
        apply(store, state, ev.JobToppedUp(3, address(7), 1, 1, 1))
        cluster = await next_snapshot(observer)
        assert chain.scheduler.requested == [2, 3]
        assert [item.id for item in cluster.assigned] == [2]
        # Assigned jobs are read in every cycle.
        await next_snapshot(observer)
        assert chain.scheduler.requested == [2]
        observer.evict([1])
        await next_snapshot(observer)
        assert chain.scheduler.requested == [1, 2]
        state.all_touched = True
        await next_snapshot(observer)
        assert chain.scheduler.requested == [1, 2, 3]

    async def test_jobs_without_their_event_use_capacity_but_are_not_queued(
        self, store: Store, state: SchedulerState, chain: FakeContracts, observer: GridObserver
    ) -> None:
        apply(store, state, submitted(1))
        chain.scheduler.records[3] = job(3, status=S.RUNNING, provider_id=2, rate=1)
        cluster = await next_snapshot(observer)
        assert [waiting.job.id for waiting in cluster.waiting] == [1]
        assert [item.id for item in cluster.assigned] == [3]

    async def test_age_counts_from_the_first_predecessor(
        self, store: Store, state: SchedulerState, observer: GridObserver
    ) -> None:
        apply(store, state, submitted(2), time=NOW - 900)
        apply(store, state, submitted(3), time=NOW)
        ages = {w.job.id: w.queued_at for w in (await next_snapshot(observer)).waiting}
        # Times of records are exact; an event has the time of its batch.
        assert ages == {2: NOW - 900, 3: NOW - 30}

    async def test_the_provider_that_lost_a_predecessor_is_excluded(
        self, store: Store, state: SchedulerState, chain: FakeContracts, observer: GridObserver
    ) -> None:
        records = chain.scheduler.records
        records[1] = job(1, status=S.PANICKED, provider_id=1)
        records[2] = job(2, status=S.PANICKED, provider_id=2, retry_of=1)
        records[3] = job(3, retry_of=2)
        apply(store, state, submitted(3))
        [waiting] = (await next_snapshot(observer)).waiting
        assert waiting.excluded == {1, 2}

    async def test_a_provider_that_requeues_is_avoided_longer_each_time(
        self, store: Store, state: SchedulerState, observer: GridObserver
    ) -> None:
        apply(store, state, submitted(1), moved(1, S.SCHEDULED, S.PENDING))
        [waiting] = (await next_snapshot(observer)).waiting
        assert waiting.avoided == {1: NOW + 100}
        apply(store, state, moved(1, S.SCHEDULED, S.PENDING), moved(1, S.SCHEDULED, S.PENDING))
        [waiting] = (await next_snapshot(observer)).waiting
        assert waiting.avoided == {1: NOW + 400}
        for _ in range(40):
            apply(store, state, moved(1, S.SCHEDULED, S.PENDING))
        [waiting] = (await next_snapshot(observer)).waiting
        assert waiting.avoided == {1: NOW + 86_400}

    async def test_providers_are_read_after_registry_events(
        self,
        store: Store,
        state: SchedulerState,
        chain: FakeContracts,
        observer: GridObserver,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        apply(store, state, submitted(1))
        for _ in range(3):
            await next_snapshot(observer)
        assert chain.registry.reads == 1
        state.registry_changed = True
        chain.registry.fails = True
        with pytest.raises(OSError, match="no answer"):
            await next_snapshot(observer)
        chain.registry.fails = False
        await next_snapshot(observer)
        assert chain.registry.reads == 3
        monkeypatch.setattr(observing, "_PROVIDER_CYCLES", 2)
        await next_snapshot(observer)
        await next_snapshot(observer)
        assert chain.registry.reads == 4
