"""The index's tables: the same from any way of reading, and the same as the audit's books."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from deepsquare_chain.explorer.books import Kind
from deepsquare_chain.explorer.index.rows import MovementRow
from deepsquare_chain.explorer.ledger import Ledger
from deepsquare_chain.job import JobStatus
from tests.support.index import Indexed, dump
from tests.support.recorded import RecordedGrid, recorded_grid, tell_a_story


@pytest.fixture(scope="module")
def grid() -> RecordedGrid:
    found = recorded_grid()
    tell_a_story(found)
    return found


@pytest.fixture(scope="module")
def ledger(grid: RecordedGrid) -> Ledger:
    return grid.ledger()


def open_index(grid: RecordedGrid) -> Indexed:
    return Indexed(grid.deployment, grid.events, grid.chain.block_times)


@pytest.fixture(scope="module")
def whole(grid: RecordedGrid) -> Iterator[Indexed]:
    found = open_index(grid)
    found.read_all()
    yield found
    found.close()


def test_every_table_is_filled(whole: Indexed) -> None:
    empty = {name for name, rows in dump(whole.database).items() if not rows}
    # Constants are read from the chain's state, and nothing was parked.
    assert empty == {"constants", "parkings"}


@pytest.mark.parametrize("size", [1, 2, 7, 30])
def test_any_batches_make_the_same_tables(grid: RecordedGrid, whole: Indexed, size: int) -> None:
    found = open_index(grid)
    found.read_all(size)
    assert dump(found.database) == dump(whole.database)
    found.close()


def test_any_reorganisation_leaves_no_trace(grid: RecordedGrid, whole: Indexed) -> None:
    found, steady = open_index(grid), open_index(grid)
    found.read_all()
    wanted = dump(whole.database)
    blocks = sorted({event.block_number for event in grid.events})
    for at, number in reversed(list(enumerate(blocks))):
        found.roll_back(number)
        # What is left is what a reader of that part alone would have.
        if at % 4 == 0:
            part = open_index(grid)
            part.read(0, number)
            assert dump(found.database) == dump(part.database), f"back to block {number}"
            part.close()
    found.roll_back(0)
    assert not any(dump(found.database).values())
    for at, number in enumerate(blocks):
        steady.read(number, number)
        if at % 5 == 4:
            steady.roll_back(blocks[at - 3])
            steady.read(blocks[at - 3] + 1, number)
    assert dump(steady.database) == wanted
    found.close()
    steady.close()


def test_jobs_are_those_of_the_ledger(whole: Indexed, ledger: Ledger) -> None:
    page = whole.index.jobs(limit=200)
    assert [row.id for row in page.items] == sorted(ledger.jobs, reverse=True)
    for row in page.items:
        entry, detail = ledger.jobs[row.id], whole.index.job(row.id)
        assert detail.row == row
        for name in (
            *("customer", "status", "escrow", "funded", "paid", "fee", "refunded", "rate", "name"),
            *("time_limit", "billed_seconds", "submitted_at", "started_at", "ended_at"),
        ):
            assert getattr(row, name) == getattr(entry, name), name
        for name in ("carried_in", "carried_out", "retries_left", "exit_code", "reason", "fee_bps"):
            assert getattr(detail, name) == getattr(entry, name), name
        told = [(each.at.time, each.after, each.at.tx_hash) for each in detail.transitions]
        assert told == entry.transitions
        assert (row.retry_of or 0, row.successor or 0) == (entry.retry_of, entry.successor)
        if not (detail.carried_in or detail.carried_out):
            # What its customer and others put in and nobody got back is held, or was consumed.
            moved = sum(e.amount for e in detail.movements if e.kind in {"escrow", "top-up"})
            assert -moved == row.funded == row.escrow + row.paid + row.fee + row.refunded


def test_statements_are_those_of_the_ledger(whole: Indexed, ledger: Ledger) -> None:
    for account in ledger.accounts:
        rows: list[MovementRow] = []
        cursor: str | None = None
        while True:
            page = whole.index.statement(account, cursor, 7, oldest_first=True)
            rows += page.items
            if (cursor := page.next) is None:
                break
        told = [
            (row.at.block, row.at.time, row.kind, row.amount, row.job_id or 0, row.balance)
            for row in rows
        ]
        assert told == [
            (row.block, row.time, row.kind.value, row.amount, row.job_id, row.balance)
            for row in ledger.statement(account)
        ]
        assert [row.at.log_index for row in rows] == [
            row.log_index for row in ledger.statement(account)
        ]
        assert whole.index.account(account).balance == ledger.balances[account]


def test_sums_are_those_of_the_ledger(whole: Indexed, ledger: Ledger) -> None:
    overview, totals = whole.index.overview(), ledger.totals
    for ours, theirs in {
        "jobs_total": "jobs",
        **{name: name for name in ("supply", "minted", "burned", "escrow", "parked", "paid")},
        **{name: name for name in ("fees", "refunded")},
    }.items():
        assert getattr(overview, ours) == getattr(totals, theirs), ours
    for status, count in overview.jobs.items():
        assert count == sum(1 for job in ledger.jobs.values() if job.status is status)


def test_providers_are_those_of_the_ledger(whole: Indexed, ledger: Ledger) -> None:
    rows = {row.account: row for row in whole.index.providers()}
    assert set(rows) == set(ledger.providers)
    for account, entry in ledger.providers.items():
        row = rows[account]
        for name in (
            *("status", "hardware", "offer", "prices", "labels", "version", "pending_version"),
            *("approved_until", "answer_by"),
        ):
            assert getattr(row, name) == getattr(entry, name), name
        own = [job for job in ledger.jobs.values() if job.provider == account]
        figures = row.figures
        assert figures.earned == sum(job.paid for job in own)
        assert figures.busy_seconds == sum(job.billed_seconds for job in own)
        assert figures.finished == sum(job.status is JobStatus.FINISHED for job in own)
        assert figures.live == sum(job.status.is_live for job in own)
        running = [job for job in own if job.status is JobStatus.RUNNING]
        assert figures.cpus_busy == sum(job.terms.resources.cpus for job in running)


def test_kinds_are_the_ledgers(whole: Indexed) -> None:
    kinds = {row.kind for row in whole.index.movements(limit=200).items}
    assert kinds <= {kind.value for kind in Kind}
    assert {"escrow", "refund", "payment", "fee", "top-up", "transfer", "mint", "burn"} <= kinds


def test_changes_only_grow(grid: RecordedGrid) -> None:
    found = open_index(grid)
    numbers: list[int] = []
    for size in (found.last // 2, found.last):
        found.read(0 if not numbers else found.last // 2 + 1, size)
        told = found.index.changes(numbers[-1] if numbers else 0)
        assert not told.missed
        numbers += [change.number for change in told.items]
    found.roll_back(3)
    (last,) = found.index.changes(numbers[-1]).items
    assert (last.kind, last.first_block) == ("reorg", 4)
    assert [*numbers, last.number] == list(range(1, len(numbers) + 2))
    assert found.index.changes(last.number).items == ()
    assert found.index.changes(10**6).missed
    found.close()
