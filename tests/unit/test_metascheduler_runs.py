"""History of finished runs: from events, through reorgs, and bounded."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest

from deepsquare_chain.chain.bindings import events as ev
from deepsquare_chain.chain.follower import Batch, Block
from deepsquare_chain.credits import CREDIT
from deepsquare_chain.job import JobFlags, JobStatus, Objective, Resources, Terms
from deepsquare_chain.metascheduler import history as learning
from deepsquare_chain.metascheduler import runs as running
from deepsquare_chain.metascheduler.history import (
    Estimate,
    EstimateSource,
    FinishedRun,
    RunHistory,
    keys_of,
    magnitude,
)
from deepsquare_chain.metascheduler.state import CURSOR, SchedulerState
from deepsquare_chain.store.database import Store
from tests.support.workloads import NOW, address

S = JobStatus
HOST, CUSTOMER = address(1), address(7)


def open_store() -> Store:
    return Store.open(None, chain_id=1, contract=address(9), account=address(8))


@pytest.fixture
def store() -> Iterator[Store]:
    with open_store() as store:
        yield store


@pytest.fixture
def state(store: Store) -> SchedulerState:
    return SchedulerState(store)


def submitted(job_id: int, block: int, limit: int = 1_000) -> ev.JobSubmitted:
    size = Resources(2, 4, 100, 1)
    terms = Terms(5, limit, size, 0, JobFlags.NONE, Objective.COST, "", "")
    return ev.JobSubmitted(job_id, CUSTOMER, bytes(32), terms, block_number=block)


def ended(job_id: int, block: int, seconds: int, after: S = S.FINISHED) -> list[ev.Event]:
    return [
        ev.JobTransition(job_id, CUSTOMER, HOST, S.RUNNING, after, block_number=block),
        ev.JobSettled(job_id, HOST, CUSTOMER, seconds, 1, 0, 0, block_number=block),
    ]


def apply(store: Store, state: SchedulerState, block: int, *events: Any, **more: Any) -> None:
    with store.begin() as connection:
        state.apply(Batch(tuple(events), block, block, time=NOW, **more), connection)
    # The state in memory always equals the database.
    assert state.history() == SchedulerState(store).history()


def known(*seconds: float, limit: int = 1_000, paid: int = 1) -> RunHistory:
    history = RunHistory()
    for second in seconds:
        history.record(FinishedRun(CUSTOMER, 8, 1, limit, second, paid / CREDIT))
        history.record_end(HOST, given_up=False)
    return history


def test_a_run_lasts_its_billed_time(store: Store, state: SchedulerState) -> None:
    apply(store, state, 1, submitted(1, 1))
    apply(store, state, 2, ev.JobCollected(1, HOST, CUSTOMER, 100, 1, 0, 1, 1, block_number=2))
    apply(store, state, 3, *ended(1, 3, 150))
    assert state.history() == known(250, paid=2)


@pytest.mark.parametrize("after", [S.FINISHED, S.FAILED, S.OUT_OF_CREDITS])
def test_ends_that_show_how_long_a_job_runs(
    store: Store, state: SchedulerState, after: JobStatus
) -> None:
    apply(store, state, 1, submitted(1, 1), *ended(1, 1, 5, after))
    assert state.history() == known(5)


@pytest.mark.parametrize("after", [S.CANCELLED, S.PANICKED])
def test_ends_that_do_not(store: Store, state: SchedulerState, after: JobStatus) -> None:
    apply(store, state, 1, submitted(1, 1), *ended(1, 1, 5, after))
    assert len(state.history()) == 0


def test_payments_for_a_stopped_run_count_as_usage(store: Store, state: SchedulerState) -> None:
    apply(store, state, 1, submitted(1, 1), *ended(1, 1, 5, S.CANCELLED))
    assert state.history().shares() == {CUSTOMER: 1.0}


@pytest.mark.parametrize(
    ("before", "after", "given_up"),
    [
        (S.RUNNING, S.PANICKED, True),
        (S.SCHEDULED, S.PANICKED, True),
        (S.META_SCHEDULED, S.PENDING, True),
        (S.SCHEDULED, S.PENDING, True),
        (S.NONE, S.PENDING, False),
        (S.META_SCHEDULED, S.CANCELLED, False),
        (S.RUNNING, S.CANCELLED, False),
    ],
)
def test_jobs_that_a_provider_gives_up(
    store: Store, state: SchedulerState, before: JobStatus, after: JobStatus, given_up: bool
) -> None:
    event = ev.JobTransition(1, CUSTOMER, HOST, before, after, block_number=1)
    apply(store, state, 1, submitted(1, 1), event)
    assert state.history().fault_rate(HOST) == (1 / 6 if given_up else 0.0)
    assert state.history().fault_rate(address(2)) == 0.0


def test_a_successor_is_of_the_same_kind(store: Store, state: SchedulerState) -> None:
    apply(store, state, 1, submitted(1, 1))
    apply(store, state, 2, ev.JobRetried(1, 2, 5, block_number=2))
    apply(store, state, 3, *ended(2, 3, 70))
    assert state.history() == known(70)


def test_runs_count_at_the_median_speed(store: Store, state: SchedulerState) -> None:
    events = [
        ev.LabelsChanged(address(n), {"cpu.speed": speed}, block_number=1)
        for n, speed in ((1, "4"), (2, "2"), (3, "1"))
    ]
    apply(store, state, 1, *events, submitted(1, 1), submitted(2, 1))
    apply(store, state, 2, *ended(1, 2, 100))
    slower = ev.LabelsChanged(HOST, {"cpu.speed": "1"}, block_number=3)
    # The labels of the moment count: of 1, 2 and 1 the median is 1.
    apply(store, state, 3, slower, *ended(2, 3, 100))
    assert state.history() == known(200, 100)


def test_a_reorganisation_is_undone(store: Store, state: SchedulerState) -> None:
    apply(store, state, 1, submitted(1, 1), submitted(2, 1))
    apply(store, state, 2, *ended(1, 2, 30))
    apply(store, state, 3, *ended(2, 3, 40))
    apply(store, state, 3, rolled_back_to=2)
    assert state.history() == known(30)
    apply(store, state, 4, *ended(2, 4, 60))
    assert state.history() == known(30, 60)


def test_old_runs_are_folded_and_forgotten_one_by_one(
    store: Store, state: SchedulerState, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database stays small, and every scheduler has the same sums to the last bit."""
    monkeypatch.setattr(running, "_FOLDED", 5)
    lengths = [10.0 + 7 * n for n in range(40)]
    for n, seconds in enumerate(lengths, 1):
        apply(store, state, 100 * n, submitted(n, 100 * n), *ended(n, 100 * n, int(seconds)))
    assert state.history() == known(*lengths)
    with store.read() as connection:
        for table, limit in ((running.finished, 8), (running.shapes, 8), (running.histories, 1)):
            rows = connection.execute(table.select()).all()
            assert 0 < len(rows) <= limit
    # Another scheduler that reads the same chain at once has the same.
    with open_store() as other:
        new_state = SchedulerState(other)
        events = [
            event
            for n, seconds in enumerate(lengths, 1)
            for event in (submitted(n, 100 * n), *ended(n, 100 * n, int(seconds)))
        ]
        with other.begin() as connection:
            new_state.apply(Batch(tuple(events), 1, 4_000, time=NOW), connection)
        assert new_state.history() == state.history()


def test_a_database_without_runs_is_read_from_the_first_block_on(store: Store) -> None:
    state = SchedulerState(store)
    apply(store, state, 1, submitted(1, 1))
    with store.begin() as connection:
        store.advance(connection, CURSOR, [Block(1, "0x1")], 9)
        connection.execute(running.histories.delete())
    new_state = SchedulerState(store)
    assert store.recent_blocks(CURSOR) == []
    assert new_state.live() == {}
    # The history is read once only.
    with store.begin() as connection:
        store.advance(connection, CURSOR, [Block(1, "0x1")], 9)
    SchedulerState(store)
    assert len(store.recent_blocks(CURSOR)) == 1


class TestSums:
    def test_the_estimate_begins_with_the_limit(self) -> None:
        expected = Estimate(1.0, 1 / 1_000, EstimateSource.LIMIT, 0.0)
        assert RunHistory().estimate(CUSTOMER, 8, 1, 1_000) == expected

    def test_each_level_corrects_the_coarser_one(self) -> None:
        estimate = known(200.0).estimate(CUSTOMER, 8, 1, 1_000)
        everybody = (0.2 + 2 * 1.0) / 3
        own_estimate = (0.2 + everybody) / 2
        assert estimate.used == (0.2 + own_estimate) / 2
        assert (estimate.source, estimate.runs) == (EstimateSource.KIND, 1.0)
        inverse = (1 / 200 + 2 / 1_000) / 3
        inverse = (1 / 200 + (1 / 200 + inverse) / 2) / 2
        assert math.isclose(estimate.inverse, inverse)

    def test_old_runs_fade(self) -> None:
        changed = known(*[900.0] * 30, *[100.0] * 30).estimate(CUSTOMER, 8, 1, 1_000)
        assert changed.used < 0.2

    def test_runs_of_others_count_if_the_customer_has_none(self) -> None:
        estimate = known(*[100.0] * 9).estimate(address(3), 8, 1, 1_000)
        assert estimate.source is EstimateSource.EVERYBODY
        assert 0.1 < estimate.used < 0.5

    def test_short_runs_count_as_ten_seconds(self) -> None:
        assert known(1.0).sums((magnitude(1_000),))[2] == 0.1

    @pytest.mark.parametrize("limit", [1, 2, 3, 7, 60, 3_600, 2**24 - 1])
    def test_the_magnitude_of_a_limit(self, limit: int) -> None:
        assert magnitude(limit) == math.floor(2 * math.log2(limit))

    def test_the_size_is_bounded_and_the_least_recent_goes(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(learning, "MAX_SUMS", 3)
        history = RunHistory()
        for limit in (1_000, 1_001, 1_002, 1_000, 1_003):
            history.record(FinishedRun(CUSTOMER, 8, 1, limit, 50.0))
        weights = {n: history.sums((CUSTOMER, 8, 1, n))[0] for n in range(1_000, 1_004)}
        assert weights == {1_000: 1.9, 1_001: 0.0, 1_002: 1.0, 1_003: 1.0}

    def test_use_fades_with_the_payments_of_others(self) -> None:
        history = RunHistory()
        history.record(FinishedRun(CUSTOMER, 1, 0, 60, 60.0, 100.0))
        before = history.shares()
        for _ in range(700):
            history.record(FinishedRun(address(3), 1, 0, 60, 60.0, 1.0))
        assert before == {CUSTOMER: 1.0}
        assert 0.15 < history.shares()[CUSTOMER] < 0.2
        assert math.isclose(sum(history.shares().values()), 2.0)

    def test_faults_expire_with_later_runs_of_a_provider(self) -> None:
        history = RunHistory()
        for _ in range(3):
            history.record_end(HOST, given_up=True)
        worst = history.fault_rate(HOST)
        for _ in range(60):
            history.record_end(HOST, given_up=False)
        assert worst > 0.3
        assert history.fault_rate(HOST) < 0.02

    def test_the_error_of_estimates_is_that_before_each_run(self) -> None:
        assert RunHistory().typical_error is None
        # The first run is expected to use its whole limit of 1,000 s.
        assert known(500.0).typical_error == pytest.approx(2.0)
        assert known(*[500.0] * 400).typical_error == pytest.approx(1.0, abs=0.02)
        # Twice and half the estimate are errors of the same size.
        assert known(2_000.0).typical_error == pytest.approx(2.0)

    def test_a_limit_of_zero_counts_as_a_second(self) -> None:
        assert keys_of(CUSTOMER, 1, 0, 0) == keys_of(CUSTOMER, 1, 0, 1)

    def test_it_survives_storage_to_the_last_bit(self) -> None:
        history = known(*[1 / 3 + n for n in range(20)])
        assert RunHistory.of_rows(history.rows()) == history

    def test_copies_receive_changes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(learning, "_MAX_CHANGES", 8)
        history = known(5.0)
        version = history.version
        history.record(FinishedRun(CUSTOMER, 8, 1, 1_000, 6.0))
        assert list(history.changed_since(version) or ()) == [
            (CUSTOMER, 8, 1, 1_000),
            (CUSTOMER, magnitude(1_000)),
            (magnitude(1_000),),
        ]
        for _ in range(5):
            history.record(FinishedRun(CUSTOMER, 8, 1, 1_000, 6.0))
        assert history.changed_since(version) is None


def test_the_fair_share_error_is_the_usage_to_move_between_customers() -> None:
    history = RunHistory()
    assert history.share_error() == 0.0
    for customer, paid in (("a", 3.0), ("b", 1.0)):
        history.record(FinishedRun(customer, 1, 0, 60, None, paid))
    # Payments of three and one: one of four would have to move, and recent ones count more.
    assert history.share_error() == pytest.approx(0.25, abs=0.001)
    history.record(FinishedRun("b", 1, 0, 60, None, 2.0))
    assert history.share_error() == pytest.approx(0.0, abs=0.002)
