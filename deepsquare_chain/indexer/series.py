"""Queries for totals of the grid, at present and over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, Final

from sqlalchemy import (
    CTE,
    Connection,
    Row,
    ScalarSelect,
    Table,
    column,
    func,
    select,
    true,
    values,
)

from deepsquare_chain.errors import UsageError
from deepsquare_chain.indexer.accounts import is_active, latest_figures
from deepsquare_chain.indexer.pagination import IndexSnapshot, Reader, address
from deepsquare_chain.indexer.read_models import (
    EscrowPoint,
    Overview,
    StatusPoint,
    UsePoint,
    Utilisation,
)
from deepsquare_chain.indexer.schema import Int, provider_figures, providers, totals
from deepsquare_chain.job import JobStatus
from deepsquare_chain.store.base import Amount

MAX_BUCKETS: Final = 500
_HOUR: Final = 3_600
_USE_COLUMNS: Final = tuple(
    provider_figures.c[name]
    for name in (
        *("account", "block", "time", "cpus_busy", "cpu_seconds"),
        *("cpus_offered", "offered_seconds"),
    )
)
_STATUSES: Final = {status: status.name.lower() for status in JobStatus if status}


class SeriesQueries(Reader):
    """Queries for totals of the grid and time series."""

    def overview(self) -> Overview:
        """Return a summary of the grid at the last indexed block."""
        with self._read() as (connection, snapshot):
            now = snapshot.number("time", 0)
            current_totals, earlier_totals = _totals_at(connection, [now, now - _HOUR])
            provider_rows = connection.execute(select(providers)).all()
            active = [row for row in provider_rows if is_active(row, now)]
            cpus_busy = {
                account: row.cpus_busy for account, row in latest_figures(connection).items()
            }
        jobs, earlier = _counts(current_totals), _counts(earlier_totals)
        ended = sum(jobs[status] - earlier[status] for status in jobs if status.is_final)
        return Overview(
            block=snapshot.number("block"),
            time=now,
            jobs=jobs,
            jobs_total=sum(jobs.values()),
            submitted_last_hour=sum(jobs.values()) - sum(earlier.values()),
            ended_last_hour=ended,
            providers=sum(1 for row in provider_rows if row.id is not None),
            providers_active=len(active),
            cpus_offered=sum(row.offer_cpus for row in active),
            cpus_busy=sum(cpus_busy.get(row.account, 0) for row in active),
            **_amounts(current_totals),
        )

    def jobs_by_status_over_time(
        self, buckets: int = 60, *, since: int | None = None, until: int | None = None
    ) -> tuple[StatusPoint, ...]:
        """Return the number of jobs in each status, at equal intervals of time.

        Args:
            buckets: Number of points, 1 to 500.
            since: First time; the time of the first event by default.
            until: Last time; the time of the last indexed block by default.

        Raises:
            UsageError: The number of points or the times are invalid.
        """
        with self._read() as (connection, snapshot):
            times = _times(connection, snapshot, buckets, since, until)
            rows = _totals_at(connection, times)
        pairs = zip(times, rows, strict=True)
        return tuple(StatusPoint(time, _counts(row)) for time, row in pairs)

    def escrow_over_time(
        self, buckets: int = 60, *, since: int | None = None, until: int | None = None
    ) -> tuple[EscrowPoint, ...]:
        """Return totals of credits over time. See `jobs_by_status_over_time` for the arguments."""
        with self._read() as (connection, snapshot):
            times = _times(connection, snapshot, buckets, since, until)
            rows = _totals_at(connection, times)
        names = ("escrow", "parked", "supply", "paid", "fees")
        sums = [_amounts(row) for row in rows]
        return tuple(
            EscrowPoint(time, *(row[name] for name in names))
            for time, row in zip(times, sums, strict=True)
        )

    def utilisation(
        self,
        buckets: int = 60,
        *,
        account: str | None = None,
        since: int | None = None,
        until: int | None = None,
    ) -> tuple[Utilisation, ...]:
        """Return the CPU-seconds used and offered in each interval, by provider.

        Arguments and errors as for `jobs_by_status_over_time`. `account` selects one provider.
        """
        key = None if account is None else address(account)
        with self._read() as (connection, snapshot):
            times = _times(connection, snapshot, buckets, since, until, points=buckets + 1)
            rows = _figures(connection, times, key)
        return tuple(_utilisation(provider, times, rows[provider]) for provider in rows)


def _times(
    connection: Connection,
    snapshot: IndexSnapshot,
    buckets: int,
    since: int | None,
    until: int | None,
    *,
    points: int | None = None,
) -> list[int]:
    """Return equally spaced times: as many as `points`, by default `buckets`."""
    if not 1 <= buckets <= MAX_BUCKETS:
        raise UsageError(f"A series has 1 to {MAX_BUCKETS} points, not {buckets}")
    count = buckets if points is None else points
    if since is None:
        since = connection.execute(select(func.min(totals.c.time))).scalar() or 0
    end = snapshot.number("time", 0) if until is None else until
    if end < since:
        raise UsageError("A series can't end before it begins")
    if count == 1:
        return [end]
    return [since + (end - since) * index // (count - 1) for index in range(count)]


def _time_table(times: Sequence[int]) -> CTE:
    """Return the times as a table, so that one query returns a whole series."""
    return values(column("at", Int), name="moments").data([(time,) for time in times]).cte()


def _last_block(table: Table, times_table: CTE, *where: Any) -> ScalarSelect[Any]:
    """Select the block of the last row of running totals at each time."""
    query = select(table.c.block).where(table.c.time <= times_table.c.at, *where)
    query = query.order_by(table.c.time.desc(), table.c.block.desc()).limit(1)
    return query.correlate(times_table, providers).scalar_subquery()


def _totals_at(connection: Connection, times: Sequence[int]) -> list[Row[Any] | None]:
    """Return the totals of the grid at each time; None before the first event."""
    times_table = _time_table(times)
    last_blocks = connection.execute(select(times_table.c.at, _last_block(totals, times_table)))
    blocks = {row[0]: row[1] for row in last_blocks}
    query = select(totals).where(totals.c.block.in_({block for block in blocks.values() if block}))
    rows = {row.block: row for row in connection.execute(query)}
    return [rows.get(blocks[time]) for time in times]


def _figures(
    connection: Connection, times: Sequence[int], account: str | None
) -> dict[str, dict[int, Row[Any]]]:
    """Return running totals of providers, by account and time."""
    times_table = _time_table(times)
    last_block = _last_block(
        provider_figures, times_table, provider_figures.c.account == providers.c.account
    )
    query = select(providers.c.account, times_table.c.at, last_block.label("block"))
    query = query.select_from(times_table.join(providers, true()))
    if account is not None:
        query = query.where(providers.c.account == account)
    block_rows = connection.execute(query.order_by(providers.c.account)).all()
    totals_by_account: dict[str, dict[int, Row[Any]]] = {row.account: {} for row in block_rows}
    for provider, own_rows in groupby(block_rows, key=lambda row: row.account):
        blocks = {row.at: row.block for row in own_rows if row.block is not None}
        # One query per account: SQLite scans the whole table for keys of several accounts.
        conditions = (
            provider_figures.c.account == provider,
            provider_figures.c.block.in_(blocks.values()),
        )
        rows = {
            row.block: row for row in connection.execute(select(*_USE_COLUMNS).where(*conditions))
        }
        totals_by_account[provider] = {time: rows[block] for time, block in blocks.items()}
    return totals_by_account


def _counts(row: Row[Any] | None) -> dict[JobStatus, int]:
    return {status: _number(row, column) for status, column in _STATUSES.items()}


def _number(row: Row[Any] | None, column: str) -> int:
    return 0 if row is None else int(getattr(row, column))


def _amounts(row: Row[Any] | None) -> dict[str, int]:
    """Return the amounts of a row of `totals` and the supply, in credit-wei."""
    names = [column.name for column in totals.c if isinstance(column.type, Amount)]
    sums = {name: _number(row, name) for name in names}
    return {**sums, "supply": sums["minted"] - sums["burned"]}


def _utilisation(account: str, times: Sequence[int], rows: Mapping[int, Row[Any]]) -> Utilisation:
    cumulative = []
    for time in times:
        row = rows.get(time)
        if row is None:
            cumulative.append((0, 0))
            continue
        elapsed = time - row.time
        used = row.cpu_seconds + row.cpus_busy * elapsed
        cumulative.append((used, row.offered_seconds + row.cpus_offered * elapsed))
    points = (
        UsePoint(time, after[0] - before[0], after[1] - before[1])
        for time, before, after in zip(times[1:], cumulative, cumulative[1:], strict=False)
    )
    return Utilisation(account, tuple(points))
