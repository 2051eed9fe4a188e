"""The provider's database: effects of events, and records that are read as they were written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepsquare_chain.chain.bindings.events import JobCollected, JobSettled, JobTransition
from deepsquare_chain.chain.follower import Batch
from deepsquare_chain.executors.base import Exit
from deepsquare_chain.job import JobStatus
from deepsquare_chain.provider.model import Phase, Run, Submit
from deepsquare_chain.provider.state import Earning, RunTable
from deepsquare_chain.store.database import Store

ME = "0x15d34AAf54267DB7D7c367839AAf71A00a2C6A65"
OTHER = "0x9965507D1a55bcC2695C58ba16FB37d819B0A4dc"
CUSTOMER = "0x3C44CdDdB6a900fa2b585dd299e03d12FA4293BC"
CONTRACT = "0x5FbDB2315678afecb367f032d93F642f64180aa3"
ENDED = Exit(3, "exited", 7, 1.5, 8.25)


@pytest.fixture
def store() -> Iterator[Store]:
    with Store.open(None, chain_id=31337, contract=CONTRACT, account=ME) as result:
        yield result


@pytest.fixture
def table(store: Store) -> RunTable:
    return RunTable(store, ME, chain_id=31337, contract=CONTRACT)


def moved(job_id: int, after: JobStatus, provider: str = ME, block: int = 5) -> JobTransition:
    return JobTransition(job_id, CUSTOMER, provider, JobStatus.PENDING, after, block_number=block)


def settled(job_id: int, block: int, provider: str = ME, paid: int = 10**30) -> JobSettled:
    position = {"block_number": block, "log_index": job_id}
    return JobSettled(job_id, provider, CUSTOMER, 7, paid, 5, 0, **position)


def collected(job_id: int, block: int, provider: str = ME, seconds: int = 60) -> JobCollected:
    position = {"block_number": block, "log_index": job_id}
    return JobCollected(job_id, provider, CUSTOMER, seconds, 100, 1, 10**18, 500, **position)


def apply(store: Store, table: RunTable, *events, back_to: int | None = None) -> None:
    with store.begin() as connection:
        table.apply(Batch(tuple(events), 1, 9, rolled_back_to=back_to), connection)


def test_learns_only_of_jobs_that_were_its_own(store: Store, table: RunTable):
    apply(store, table, moved(1, JobStatus.META_SCHEDULED), moved(2, JobStatus.RUNNING, OTHER))
    assert table.all() == [Run(1, "31337-5fbdb231-1")]


def test_a_row_is_not_overwritten_by_events(store: Store, table: RunTable):
    run = Run(1, table.key(1), Phase.SUBMITTED, handle="h", allotment=60, lead=2)
    table.put(run)
    apply(store, table, moved(1, JobStatus.RUNNING))
    table.watch(1)
    assert table.get(1) == run


@pytest.mark.parametrize(
    ("stored_run", "phase"),
    [({}, Phase.WATCHED), ({"handle": "h"}, Phase.SUBMITTED), ({"exit": ENDED}, Phase.ENDED)],
)
def test_a_replaced_end_opens_the_row_again(store: Store, table: RunTable, stored_run, phase):
    table.put(replace(Run(1, table.key(1), Phase.CLOSED), **stored_run))
    apply(store, table, moved(1, JobStatus.FINISHED))
    assert table.open() == []
    apply(store, table, moved(1, JobStatus.RUNNING))
    assert [run.phase for run in table.open()] == [phase]


def test_earnings_follow_the_chain_back(store: Store, table: RunTable):
    apply(store, table, settled(1, block=5), settled(2, block=8), settled(3, 8, OTHER))
    assert table.earned() == [Earning(1, 7, 10**30, 5), Earning(2, 7, 10**30, 5)]
    apply(store, table, back_to=6)
    assert [earning.job_id for earning in table.earned()] == [1]
    apply(store, table, settled(2, block=9, paid=1))
    assert table.earned()[1].paid == 1
    apply(store, table, settled(2, block=9, paid=1))
    assert len(table.earned()) == 2


def test_interim_payments_count_as_earned_and_are_known_as_such(store: Store, table: RunTable):
    table.watch(1)
    paid = [collected(1, block=5, seconds=60), collected(1, block=6, seconds=40)]
    apply(store, table, *paid, collected(2, 6, OTHER), collected(3, block=6))
    assert table.collected() == {1: 100}  # job 3 has no row here
    apply(store, table, *paid)
    assert table.collected() == {1: 100}
    apply(store, table, settled(1, block=8))
    assert table.earned()[0] == Earning(1, 107, 10**30 + 200, 7)
    apply(store, table, back_to=5)
    assert (table.collected(), table.earned()) == ({1: 60}, [Earning(1, 60, 100, 1)])
    table.put(replace(Run(1, table.key(1)), phase=Phase.CLOSED))
    assert table.collected() == {}


def test_survives_a_restart(tmp_path: Path):
    position = {"chain_id": 31337, "contract": CONTRACT}
    run = Run(1, "k", Phase.ENDED, 2, "h", 2**90, 3, ENDED, b"\x07" * 32, "a note")
    with Store.open(tmp_path / "p.db", account=ME, **position) as first:
        RunTable(first, ME, **position).put(run)
    with Store.open(tmp_path / "p.db", account=ME, **position) as second:
        assert RunTable(second, ME, **position).get(1) == run


@given(
    phase=st.sampled_from(Phase),
    attempt=st.integers(0, 99),
    handle=st.none() | st.text(max_size=9),
    allotment=st.integers(0, 2**96),
    lead=st.integers(0, 2**40),
    exit_record=st.none()
    | st.builds(
        Exit,
        code=st.integers(-(2**31), 2**31 - 1),
        reason=st.sampled_from(["exited", "walltime", "lost"]),
        seconds=st.integers(0, 2**32),
        started_at=st.floats(0, 2**40),
        ended_at=st.floats(0, 2**40),
    ),
    result=st.binary(max_size=32),
    note=st.text(max_size=40),
)
def test_rows_come_back_as_they_went_in(
    phase, attempt, handle, allotment, lead, exit_record, result, note
):
    with Store.open(None, chain_id=1, contract=CONTRACT, account=ME) as store:
        table = RunTable(store, ME, chain_id=1, contract=CONTRACT)
        run = Run(9, "k", phase, attempt, handle, allotment, lead, exit_record, result, note)
        table.put(run)
        table.put(run)
        assert table.all() == [run]


def test_steps_of_a_row(table: RunTable):
    assert Run(1, "k").starting().phase is Phase.STARTING
    assert Run(1, "k", Phase.SUBMITTED).starting().phase is Phase.SUBMITTED
    run = Run(1, "k").submitting(Submit(walltime=58, allotment=60, lead=2))
    assert (run.phase, run.allotment, run.lead) == (Phase.SUBMITTING, 60, 2)
    run = run.submitted("h").extended(90)
    assert (run.phase, run.handle, run.allotment, run.began) == (Phase.SUBMITTED, "h", 90, True)
    run = run.ended(ENDED, b"\x01")
    assert (run.phase, run.exit, run.result) == (Phase.ENDED, ENDED, b"\x01")
    assert run.released("k.1") == Run(1, "k.1", attempt=1)
    assert Run(1, "k").refused("no").note == "no"
    assert run.closed().reopened().phase is Phase.ENDED
    assert run.reopened() == run
