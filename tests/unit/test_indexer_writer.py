"""The index has the same tables for every batch size, and agrees with the audit's ledgers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
from eth_utils import to_checksum_address
from sqlalchemy import inspect

from deepsquare_chain.audit.anomalies import SUBJECTS, Code, name_self_scheduled
from deepsquare_chain.audit.entries import MovementKind
from deepsquare_chain.audit.ledger import Ledger
from deepsquare_chain.chain.bindings import events as ev
from deepsquare_chain.chain.follower import Block
from deepsquare_chain.errors import UsageError
from deepsquare_chain.indexer.database import IndexDatabase
from deepsquare_chain.indexer.queries import CURSOR, Index, TimeRange
from deepsquare_chain.indexer.read_models import AnomalyRow, JobRow, MovementRow, NumberedPage
from deepsquare_chain.indexer.schema import metadata
from deepsquare_chain.job import JobStatus
from tests.support.index import Indexed, dump
from tests.support.recorded import RecordedGrid, recorded_grid_with_all


@pytest.fixture(scope="module")
def grid() -> RecordedGrid:
    return recorded_grid_with_all()


@pytest.fixture(scope="module")
def ledger(grid: RecordedGrid) -> Ledger:
    return grid.ledger()


@pytest.fixture(scope="module")
def whole(grid: RecordedGrid) -> Iterator[Indexed]:
    indexed = Indexed.of_grid(grid)
    indexed.read_all()
    yield indexed
    indexed.close()


def test_every_table_is_filled(whole: Indexed) -> None:
    empty = {name for name, rows in dump(whole.database).items() if not rows}
    # Constants are read from the chain's state, and nothing was parked.
    assert empty == {"constants", "parkings"}


@pytest.mark.parametrize("size", [1, 2, 7, 30])
def test_any_batches_make_the_same_tables(grid: RecordedGrid, whole: Indexed, size: int) -> None:
    indexed = Indexed.of_grid(grid)
    indexed.read_all(size)
    assert dump(indexed.database) == dump(whole.database)
    indexed.close()


def test_any_reorganisation_leaves_no_trace(grid: RecordedGrid, whole: Indexed) -> None:
    result, steady = Indexed.of_grid(grid), Indexed.of_grid(grid)
    result.read_all()
    expected = dump(whole.database)
    blocks = sorted({event.block_number for event in grid.events})
    paid = {event.block_number for event in grid.events if isinstance(event, ev.JobCollected)}
    for at, number in reversed(list(enumerate(blocks))):
        result.roll_back(number)
        # The remaining rows are those of an index of that part alone.
        if at % 4 == 0 or number in paid:
            part = Indexed.of_grid(grid)
            part.read(0, number)
            assert dump(result.database) == dump(part.database), f"back to block {number}"
            part.close()
    result.roll_back(0)
    assert not any(dump(result.database).values())
    for at, number in enumerate(blocks):
        steady.read(number, number)
        if at % 5 == 4:
            steady.roll_back(blocks[at - 3])
            steady.read(blocks[at - 3] + 1, number)
    assert dump(steady.database) == expected
    result.close()
    steady.close()


def test_jobs_are_those_of_the_ledger(grid: RecordedGrid, whole: Indexed, ledger: Ledger) -> None:
    times = grid.chain.block_times
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
        assert row.flags == entry.terms.flags
        assert row.changed.time == entry.since == times[row.changed.block]
        for name in (
            *("carried_in", "carried_out", "retries_left", "exit_code", "reason", "fee_bps"),
            *("collected_paid", "collected_fee", "collected_seconds", "allotment", "billed_until"),
        ):
            assert getattr(detail, name) == getattr(entry, name), name
        index_jobs = [
            (transition.at.time, transition.after, transition.at.tx_hash)
            for transition in detail.transitions
        ]
        assert index_jobs == entry.transitions
        assert (row.retry_of or 0, row.successor or 0) == (entry.retry_of, entry.successor)
        interim = [payment for payment in detail.payments if payment.interim]
        assert sum(item.paid for item in interim) == entry.collected_paid
        assert sum(payment.billed_seconds for payment in detail.payments) == entry.billed_seconds
        assert len(detail.payments) - len(interim) == entry.settled
        if not (detail.carried_in or detail.carried_out):
            # Credits that were paid in and not refunded are in escrow, or were consumed.
            funded = sum(e.amount for e in detail.movements if e.kind in {"escrow", "top-up"})
            assert -funded == row.funded == row.escrow + row.paid + row.fee + row.refunded


def test_numbered_pages_have_every_job_once_in_the_wanted_order(whole: Indexed) -> None:
    rows = whole.index.jobs(limit=200).items
    order: dict[str, Callable[[JobRow], Any]] = {
        "": lambda row: -row.id,
        "name": lambda row: (row.name.casefold(), -row.id),
        "-escrow": lambda row: (-row.escrow, -row.id),
        "cost": lambda row: (row.paid, -row.id),
        "-billed": lambda row: (-row.billed_seconds, -row.id),
    }
    for sort, key in order.items():
        first = whole.index.jobs(1, 3, sort=sort)
        assert isinstance(first, NumberedPage)
        assert (first.total, first.pages) == (len(rows), -(-len(rows) // 3))
        pages = [whole.index.jobs(number + 1, 3, sort=sort) for number in range(first.pages)]
        assert [row for page in pages for row in page.items] == sorted(rows, key=key), sort
        # Without a page number a sorted list begins with page 1.
        if sort:
            assert whole.index.jobs(None, 3, sort=sort) == pages[0]
    assert whole.index.jobs(first.pages + 1, 3).items == ()
    with pytest.raises(UsageError, match="page numbers, not cursors"):
        whole.index.jobs(whole.index.jobs(limit=3).next, 3, sort="name")
    for number in (0, 10_001):
        with pytest.raises(UsageError, match="numbers 1 to 10000"):
            whole.index.jobs(number)
    with pytest.raises(UsageError, match="not a sort key of jobs"):
        whole.index.jobs(1, sort="colour")


def test_lists_can_be_cut_to_a_period(whole: Indexed) -> None:
    rows = whole.index.jobs(limit=200).items
    times = sorted({row.submitted_at for row in rows})
    start, end = times[len(times) // 3], times[2 * len(times) // 3]
    assert start < end
    jobs = whole.index.jobs(1, 200, submitted=TimeRange(start, end))
    assert jobs.items == tuple(row for row in rows if start <= row.submitted_at < end)
    account = rows[0].customer
    lines = whole.index.statement(account, limit=200).items
    moment = lines[len(lines) // 2].at.time
    later_statement = whole.index.statement(
        account, 1, 200, period=TimeRange(moment, None), kind="escrow"
    ).items
    assert later_statement == tuple(
        line for line in lines if line.at.time >= moment and line.kind == "escrow"
    )
    assert 0 < len(later_statement) < len(lines)


def test_statements_are_those_of_the_ledger(whole: Indexed, ledger: Ledger) -> None:
    for account in ledger.accounts:
        rows: list[MovementRow] = []
        cursor: str | None = None
        while True:
            page = whole.index.statement(account, cursor, 7, oldest_first=True)
            rows += page.items
            if (cursor := page.next) is None:
                break
        second = whole.index.statement(account, 2, 7, oldest_first=True)
        assert list(second.items) == rows[7:14]
        index_lines = [
            (row.at.block, row.at.time, row.kind, row.amount, row.job_id or 0, row.balance)
            for row in rows
        ]
        assert index_lines == [
            (row.block, row.time, row.kind.value, row.amount, row.job_id, row.balance)
            for row in ledger.statement(account)
        ]
        assert [row.at.log_index for row in rows] == [
            row.log_index for row in ledger.statement(account)
        ]
        assert whole.index.account(account).balance == ledger.balances[account]


def test_sums_are_those_of_the_ledger(whole: Indexed, ledger: Ledger) -> None:
    overview, totals = whole.index.overview(), ledger.totals
    for index_value, ledger_value in {
        "jobs_total": "jobs",
        **{name: name for name in ("supply", "minted", "burned", "escrow", "parked", "paid")},
        **{name: name for name in ("fees", "refunded")},
    }.items():
        assert getattr(overview, index_value) == getattr(totals, ledger_value), index_value
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
        assert row.load == entry.load
        provider_jobs = [job for job in ledger.jobs.values() if job.provider == account]
        figures = row.figures
        assert figures.earned == sum(job.paid for job in provider_jobs)
        assert figures.busy_seconds == sum(job.billed_seconds for job in provider_jobs)
        assert figures.finished == sum(job.status is JobStatus.FINISHED for job in provider_jobs)
        assert figures.live == sum(job.status.is_live for job in provider_jobs)
        running = [job for job in provider_jobs if job.status is JobStatus.RUNNING]
        assert figures.cpus_busy == sum(job.terms.resources.cpus for job in running)


def listed_anomalies(index: Index) -> list[tuple[Any, ...]]:
    """Return all anomalies of an index, oldest first, then the open conditions."""
    results: list[AnomalyRow] = []
    cursor: str | None = None
    while True:
        page = index.anomalies(cursor, 5)
        results += page.items
        if (cursor := page.next) is None:
            break
    rows = [*reversed(results), *index.open_anomalies().items]
    return [
        (row.code, row.severity, row.message, row.job_id, row.account, row.at.block, row.at.time)
        for row in rows
    ]


def ledger_anomalies(
    ledger: Ledger, transactions: Mapping[str, tuple[str, str, bytes]] | None = None
) -> list[tuple[Any, ...]]:
    senders = {
        key: to_checksum_address(account) for key, (account, *_) in (transactions or {}).items()
    }
    return [
        (
            *(row.code, row.severity, row.message),
            *(row.job_id or None, row.account or None, row.block, row.time),
        )
        for row in name_self_scheduled(ledger.anomalies, senders)
    ]


def test_exceptions_equal_those_of_the_audit(
    grid: RecordedGrid, whole: Indexed, ledger: Ledger
) -> None:
    assert listed_anomalies(whole.index) == ledger_anomalies(ledger, grid.chain.sent)
    assert {row.code for row in whole.index.anomalies(limit=200).items} >= {"panic", "requeue"}
    for row in whole.index.anomalies(limit=200).items:
        assert row.subject == SUBJECTS[Code(row.code)]
        same = whole.index.anomalies(limit=200, kind=row.code).items
        assert row in same
        assert {item.code for item in same} == {row.code}
        assert row in whole.index.anomalies(limit=200, kind=row.subject).items
    with pytest.raises(UsageError, match="not a kind of anomaly"):
        whole.index.anomalies(kind="odd")
    assert set(SUBJECTS) == set(Code)


@pytest.mark.parametrize(
    ("end", "codes"),
    [
        ("claimed", {"idle-claim", "unanswered-challenge"}),
        ("running", {"overrun", "unanswered-challenge"}),
    ],
)
def test_open_conditions_equal_those_of_the_audit_at_any_time(
    grid: RecordedGrid, end: str, codes: set[str]
) -> None:
    """Open conditions from the tables: a run past its allotment, an idle claim, an open challenge."""
    events = [event for event in grid.events if not isinstance(event, ev.ProviderAnswered)]
    if end == "claimed":
        moves = [event for event in events if isinstance(event, ev.JobTransition)]
        successor = next(event.successor for event in events if isinstance(event, ev.JobRetried))
        start = next(
            move for move in moves if (move.job_id, move.after) == (successor, JobStatus.RUNNING)
        )
        events = [event for event in events if event.position < start.position]
    all_codes: set[str] = set()
    for seconds in (0, 400, 10**9):
        indexed = Indexed(grid.deployment, events, grid.chain.block_times)
        indexed.read_all(3)
        now = indexed.index.status().time + seconds
        indexed.pass_time(now)
        block, times = indexed.index.status().block, grid.chain.block_times
        ledger = Ledger.replay(events, grid.deployment, times, to_block=block, now=now)
        anomalies, expected = listed_anomalies(indexed.index), ledger_anomalies(ledger)
        assert sorted(anomalies, key=itemgetter(2)) == sorted(expected, key=itemgetter(2))
        all_codes = {row.code for row in indexed.index.open_anomalies().items}
        assert all_codes <= codes
        indexed.close()
    assert all_codes == codes


def test_a_provider_that_scheduled_a_job_itself_is_named(
    grid: RecordedGrid, whole: Indexed
) -> None:
    late_anomaly = whole.index.anomalies(kind="late-assignment").items[0]
    indexed = Indexed(
        grid.deployment, grid.events, grid.chain.block_times, sender=late_anomaly.account or ""
    )
    indexed.read_all()
    self_scheduled = indexed.index.anomalies(kind="self-scheduled").items
    assert late_anomaly.job_id in {item.job_id for item in self_scheduled}
    assert all(item.account == late_anomaly.account for item in self_scheduled)
    assert all(item.message.endswith("its provider took it itself") for item in self_scheduled)
    remaining = indexed.index.anomalies(kind="late-assignment").items
    assert late_anomaly.account not in {item.account for item in remaining}
    indexed.close()


def test_migrations_make_the_tables_that_are_declared(whole: Indexed) -> None:
    with whole.database.read() as connection:
        result = inspect(connection)
        for table in metadata.sorted_tables:
            columns = {
                column["name"]: column["nullable"] for column in result.get_columns(table.name)
            }
            assert columns == {column.name: column.nullable for column in table.columns}
            indexes = {
                index["name"]: index["column_names"] for index in result.get_indexes(table.name)
            }
            assert indexes == {
                index.name: [column.name for column in index.columns] for index in table.indexes
            }


def test_signed_requests_are_found_by_their_signer(grid: RecordedGrid, whole: Indexed) -> None:
    relayed = [row for row in whole.index.transactions(limit=200).items if row.method == "execute"]
    assert {row.contract for row in relayed} == {"ERC2771Forwarder"}
    assert {row.sender for row in relayed} == {to_checksum_address(grid.stranger)}
    result = {
        wallet_name: [
            call.method
            for row in whole.index.transactions(signer=account).items
            for call in whole.index.transaction(row.at.tx_hash).forwarded
        ]
        for wallet_name, account in (
            ("alice", grid.alice),
            ("bob", grid.bob),
            ("admin", grid.admin),
        )
    }
    assert result == {"alice": ["cancel"], "bob": ["topUp", "submitJobs"], "admin": []}
    assert len(relayed) == 3
    for row in relayed:
        for call in whole.index.transaction(row.at.tx_hash).forwarded:
            assert (call.contract, call.to, call.ok) == (
                "MetaScheduler",
                to_checksum_address(grid.scheduler.address),
                True,
            )


def test_kinds_equal_those_of_the_ledger(whole: Indexed) -> None:
    kinds = {row.kind for row in whole.index.movements(limit=200).items}
    assert kinds <= {kind.value for kind in MovementKind}
    assert {"escrow", "refund", "payment", "fee", "top-up", "transfer", "mint", "burn"} <= kinds
    assert "interim-payment" in kinds


def test_changes_only_grow(grid: RecordedGrid) -> None:
    indexed = Indexed.of_grid(grid)
    numbers: list[int] = []
    for size in (indexed.last // 2, indexed.last):
        indexed.read(0 if not numbers else indexed.last // 2 + 1, size)
        changes = indexed.index.changes(numbers[-1] if numbers else 0)
        assert not changes.missed
        numbers += [change.number for change in changes.items]
    indexed.roll_back(3)
    (last,) = indexed.index.changes(numbers[-1]).items
    assert (last.kind, last.first_block) == ("reorg", 4)
    assert [*numbers, last.number] == list(range(1, len(numbers) + 2))
    assert indexed.index.changes(last.number).items == ()
    assert indexed.index.changes(10**6).missed
    indexed.close()


def test_an_older_index_is_migrated_and_rebuilt(
    grid: RecordedGrid, whole: Indexed, tmp_path: Path
) -> None:
    database = tmp_path / "index.db"
    arguments = (grid.deployment, grid.events, grid.chain.block_times, database)
    old = Indexed(*arguments, sent=grid.chain.sent)
    old.read_all()
    built = old.index.status().built_since
    with old.database.begin() as connection:
        old.database.advance(connection, CURSOR, [Block(old.last, "0x12")], 1)
        connection.exec_driver_sql("DROP TABLE exceptions")
        connection.exec_driver_sql("DROP TABLE forwarded")
        connection.exec_driver_sql("DROP INDEX settlements_job")
        connection.exec_driver_sql("ALTER TABLE jobs RENAME COLUMN flags TO until_spent")
        for column in ("collected_seconds", "collected_paid", "collected_fee"):
            connection.exec_driver_sql(f"ALTER TABLE jobs DROP COLUMN {column}")
        for column in ("cpus_assigned", "memory_assigned", "gpus_assigned"):
            connection.exec_driver_sql(f"ALTER TABLE provider_figures DROP COLUMN {column}")
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '0001'")
    old.close()
    with pytest.raises(UsageError, match="has version 0001"):
        IndexDatabase.open(database, grid.deployment)
    IndexDatabase.open(database, grid.deployment, writer=True).close()
    indexed = Indexed(*arguments, sent=grid.chain.sent)
    assert not any(dump(indexed.database).values())
    assert indexed.database.recent_blocks(CURSOR) == []
    assert indexed.index.status().built_since > built
    indexed.read_all()
    assert dump(indexed.database) == dump(whole.database)
    indexed.close()
