"""Strikes of a provider: which events count, how many suspend it, and for how long."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepsquare_chain.chain.bindings import events as ev
from deepsquare_chain.chain.follower import Batch
from deepsquare_chain.job import JobStatus
from deepsquare_chain.metascheduler.eligibility import Refusal, refusal, standing
from deepsquare_chain.metascheduler.explain import explain_wait
from deepsquare_chain.metascheduler.liveness import Watch, struck, suspended_until
from deepsquare_chain.metascheduler.policy import Rules, Snapshot, plan
from deepsquare_chain.metascheduler.state import Strikes
from deepsquare_chain.store.database import Store
from tests.support.workloads import NOW, address, provider, waiting

S = JobStatus
DAY = 86_400
HOST, OTHER, ANYBODY = address(1), address(2), address(3)
WATCH = Watch()


@pytest.fixture
def store() -> Iterator[Store]:
    with Store.open(None, chain_id=1, contract=address(9), account=address(8)) as result:
        yield result


@pytest.fixture
def table(store: Store) -> Strikes:
    return Strikes(store)


def requeued(by: str, before: S = S.META_SCHEDULED, job_id: int = 1, block: int = 50) -> list[Any]:
    return [
        ev.JobTransition(job_id, address(7), HOST, before, S.PENDING, block_number=block),
        ev.JobRequeued(job_id, by, "", block_number=block),
    ]


def panicked(by: str, before: S = S.RUNNING, job_id: int = 1, block: int = 50) -> list[Any]:
    return [
        ev.JobTransition(job_id, address(7), HOST, before, S.PANICKED, block_number=block),
        ev.JobPanicked(job_id, by, "", block_number=block),
    ]


def apply(
    store: Store, table: Strikes, events: Sequence[Any] = (), *, time: int = NOW, **more: Any
) -> None:
    blocks = {"from_block": 50, "to_block": 50} | more
    with store.begin() as connection:
        table.apply(Batch(tuple(events), time=time, **blocks), connection)


class TestWhatCounts:
    @pytest.mark.parametrize(
        ("events", "counts"),
        [
            (requeued(ANYBODY), True),
            (panicked(ANYBODY), True),
            (requeued(HOST), False),
            (panicked(HOST), False),
            # A cluster may queue a claimed job.
            (requeued(ANYBODY, S.SCHEDULED), False),
            # Only the provider itself can give up a job that does not run.
            (panicked(HOST, S.META_SCHEDULED), False),
        ],
    )
    def test_only_neglect_that_others_cleaned_up(
        self, store: Store, table: Strikes, events: list[Any], counts: bool
    ) -> None:
        apply(store, table, events)
        assert table.since(0) == ({HOST: [NOW]} if counts else {})

    def test_the_earlier_transition_names_the_provider_and_status(
        self, store: Store, table: Strikes
    ) -> None:
        event = ev.JobTransition(1, address(7), OTHER, S.PENDING, S.META_SCHEDULED)
        apply(store, table, [*requeued(ANYBODY, job_id=2), event, *requeued(HOST, job_id=1)])
        assert table.since(0) == {HOST: [NOW]}
        # JobRequeued without its transition has no effect.
        apply(store, table, [ev.JobRequeued(5, ANYBODY, "")])
        assert table.since(0) == {HOST: [NOW]}

    def test_several_jobs_and_providers(self, store: Store, table: Strikes) -> None:
        apply(store, table, [*requeued(ANYBODY), *panicked(ANYBODY, job_id=2)])
        other = ev.JobTransition(3, address(7), OTHER, S.RUNNING, S.PANICKED)
        apply(store, table, [other, ev.JobPanicked(3, ANYBODY, "")], time=NOW + 5)
        assert table.since(0) == {HOST: [NOW, NOW], OTHER: [NOW + 5]}
        assert table.since(NOW) == {OTHER: [NOW + 5]}

    def test_a_reorganisation_removes_strikes(self, store: Store, table: Strikes) -> None:
        apply(store, table, [*requeued(ANYBODY, block=41), *requeued(ANYBODY, block=42)])
        apply(store, table, rolled_back_to=41)
        assert table.since(0) == {HOST: [NOW]}
        apply(store, table, rolled_back_to=40)
        assert table.since(0) == {}


class TestTimesOfStrikes:
    """Blocks that were read together share one time; strikes need the exact time."""

    def test_a_block_by_itself_is_dated(self, store: Store, table: Strikes) -> None:
        apply(store, table, requeued(ANYBODY))
        assert table.undated(0) == []

    def test_strikes_of_other_blocks_have_their_exact_time(
        self, store: Store, table: Strikes
    ) -> None:
        events = [*requeued(ANYBODY, block=10), *requeued(ANYBODY, job_id=2, block=20)]
        apply(store, table, events, from_block=1, to_block=900)
        assert table.since(0) == {HOST: [NOW, NOW]}
        assert table.undated(0) == [10, 20]
        # A strike that is too old at the time of its batch is even older.
        assert table.undated(NOW) == []
        table.date({10: NOW - 800, 20: NOW - 600})
        assert table.since(0) == {HOST: [NOW - 800, NOW - 600]}
        assert table.undated(0) == []
        table.date({})

    def test_an_empty_table(self, table: Strikes) -> None:
        assert table.undated(0) == []
        assert table.since(0) == {}


class TestSuspension:
    @pytest.mark.parametrize(
        ("times", "expected"),
        [
            ([], []),
            ([0, 1, 2, 60], [0]),
            ([0, 60, 61], [0, 61]),
            # The gap is counted from the first of several strikes at the same time.
            ([0, 40, 80, 120], [0, 80]),
            ([500, 0, 61], [0, 61, 500]),
        ],
    )
    def test_strikes_within_a_short_time_count_once(
        self, times: list[int], expected: list[int]
    ) -> None:
        result = struck([NOW - 600 + at for at in times], NOW, WATCH)
        assert result == [NOW - 600 + at for at in expected]

    def test_the_third_within_a_day(self) -> None:
        two = [NOW - 2_000, NOW - 1_000]
        assert suspended_until(two, NOW, WATCH) == 0
        assert suspended_until([*two, NOW], NOW, WATCH) == NOW - 2_000 + DAY
        assert suspended_until([*two, NOW - 500, NOW], NOW, WATCH) == NOW - 1_000 + DAY

    def test_until_the_day_has_passed_to_the_second(self) -> None:
        times = [NOW, NOW + 1_000, NOW + 2_000]
        end = suspended_until(times, NOW + 2_000, WATCH)
        assert end == NOW + DAY
        assert suspended_until(times, end - 1, WATCH) == end
        assert suspended_until(times, end, WATCH) == 0

    @given(
        st.lists(st.integers(NOW - 3 * DAY, NOW), max_size=12),
        st.integers(1, 4),
        st.integers(0, 7_200),
    )
    def test_rest_ends_when_too_few_are_left(self, times: list[int], limit: int, gap: int) -> None:
        watch = Watch(strikes=limit, strike_gap=gap)
        end = suspended_until(times, NOW, watch)
        assert (end > NOW) == (len(struck(times, NOW, watch)) >= limit)
        if end:
            assert end <= NOW + DAY
            # The suspension ends when the strike that caused it leaves the window.
            recent = [at for at in struck(times, NOW, watch) if at > end - DAY]
            assert len(recent) == limit - 1


class TestPolicy:
    def test_a_suspended_provider_gets_no_job_and_no_reservation(self) -> None:
        cheap = provider(1, price=1)
        suspended = type(cheap)(cheap.provider, suspended_until=NOW + 1, strikes=3)
        expensive = provider(2, price=50, cpus=2)
        assert standing(suspended, NOW) is Refusal.SUSPENDED
        assert standing(suspended, NOW + 1) is None
        small = waiting(1)
        assert plan(Snapshot(NOW, [suspended, expensive], [small], [])).by_provider() == {2: [1]}
        assert plan(Snapshot(NOW + 1, [suspended, expensive], [small], [])).by_provider() == {
            1: [1]
        }
        # An overdue job does not wait for a suspended provider.
        large = waiting(2, cpus=8, queued_at=NOW - 10**6)
        result = plan(Snapshot(NOW, [suspended, expensive], [large], []), Rules())
        assert (result.decisions, result.reservations) == ((), {})

    def test_why_and_how_long(self) -> None:
        view = provider(1)
        suspended = type(view)(view.provider, suspended_until=1_700_000_000 + DAY, strikes=4)
        wait = waiting()
        assert refusal(wait, suspended, 1_700_000_000) is Refusal.SUSPENDED
        snapshot = Snapshot(1_700_000_000, [suspended], [wait], [])
        result = explain_wait(wait, snapshot, plan(snapshot))
        assert result.verdicts[0].text == (
            "provider 1 is suspended until 2023-11-15 22:13:20 UTC: 4 times within a day it left jobs "
            "unclaimed, or lost or did not report a run"
        )
        assert result.text == f"job 1 can't start at any provider now: {result.verdicts[0].text}"
