"""Questions about the whole grid, now and over time."""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import Connection, Row, Table, func, select

from deepsquare_chain.errors import UsageError
from deepsquare_chain.explorer.index.reading import Moment, Reader
from deepsquare_chain.explorer.index.registry import is_active
from deepsquare_chain.explorer.index.rows import (
    EscrowPoint,
    Overview,
    StatusPoint,
    UsePoint,
    Utilisation,
)
from deepsquare_chain.explorer.index.schema import provider_figures, providers, totals
from deepsquare_chain.job import JobStatus

MAX_BUCKETS: Final = 500
_HOUR: Final = 3_600
_STATUSES: Final = {each: each.name.lower() for each in JobStatus if each}


class SeriesQueries(Reader):
    """Sums of the grid."""

    def overview(self) -> Overview:
        """The grid at the index's block."""
        with self._read() as (connection, moment):
            now = moment.number("time", 0)
            last, before = (_at(connection, totals, time) for time in (now, now - _HOUR))
            known = connection.execute(select(providers)).all()
            good = [row for row in known if is_active(row, now)]
            busy = _busy(connection)
        jobs, earlier = _counts(last), _counts(before)
        ended = sum(jobs[each] - earlier[each] for each in jobs if each.is_final)
        minted, burned = _sum(last, "minted"), _sum(last, "burned")
        return Overview(
            block=moment.number("block"),
            time=now,
            jobs=jobs,
            jobs_total=sum(jobs.values()),
            submitted_last_hour=sum(jobs.values()) - sum(earlier.values()),
            ended_last_hour=ended,
            providers=sum(1 for row in known if row.id is not None),
            providers_active=len(good),
            cpus_offered=sum(row.offer_cpus for row in good),
            cpus_busy=sum(busy.get(row.account, 0) for row in good),
            supply=minted - burned,
            minted=minted,
            burned=burned,
            escrow=_sum(last, "escrow"),
            parked=_sum(last, "parked"),
            paid=_sum(last, "paid"),
            fees=_sum(last, "fees"),
            refunded=_sum(last, "refunded"),
        )

    def jobs_by_status_over_time(
        self, buckets: int = 60, *, since: int | None = None, until: int | None = None
    ) -> tuple[StatusPoint, ...]:
        """Jobs in each status at equal steps of time.

        Args:
            buckets: Number of points, 1 to 500.
            since: First time, that of the first event by default.
            until: Last time, that of the index's last block by default.

        Raises:
            UsageError: A number or times that can't be meant.
        """
        with self._read() as (connection, moment):
            return tuple(
                StatusPoint(time, _counts(_at(connection, totals, time)))
                for time in _times(connection, moment, buckets, since, until)
            )

    def escrow_over_time(
        self, buckets: int = 60, *, since: int | None = None, until: int | None = None
    ) -> tuple[EscrowPoint, ...]:
        """Where credits were; arguments and errors as `jobs_by_status_over_time`."""
        with self._read() as (connection, moment):
            return tuple(
                _escrow(time, _at(connection, totals, time))
                for time in _times(connection, moment, buckets, since, until)
            )

    def utilisation(
        self,
        buckets: int = 60,
        *,
        account: str | None = None,
        since: int | None = None,
        until: int | None = None,
    ) -> tuple[Utilisation, ...]:
        """Cpu-seconds used and offered in each step of time, by provider.

        Arguments and errors as `jobs_by_status_over_time`; `account` for one provider alone.
        """
        query = select(provider_figures.c.account).distinct().order_by(provider_figures.c.account)
        if account is not None:
            query = query.where(provider_figures.c.account == account)
        with self._read() as (connection, moment):
            times = _times(connection, moment, buckets + 1, since, until)
            return tuple(
                _use(connection, each, times) for each in connection.execute(query).scalars()
            )


def _times(
    connection: Connection, moment: Moment, count: int, since: int | None, until: int | None
) -> list[int]:
    if not 1 <= count <= MAX_BUCKETS + 1:
        raise UsageError(f"A series has 1 to {MAX_BUCKETS} points, not {count}")
    if since is None:
        since = connection.execute(select(func.min(totals.c.time))).scalar() or 0
    last = moment.number("time", 0) if until is None else until
    if last < since:
        raise UsageError("A series can't end before it begins")
    if count == 1:
        return [last]
    return [since + (last - since) * at // (count - 1) for at in range(count)]


def _at(connection: Connection, table: Table, time: int, *where: Any) -> Row[Any] | None:
    """The last row of running sums at a time."""
    query = select(table).where(table.c.time <= time, *where)
    query = query.order_by(table.c.time.desc(), table.c.block.desc()).limit(1)
    return connection.execute(query).one_or_none()


def _counts(row: Row[Any] | None) -> dict[JobStatus, int]:
    return {each: _sum(row, column) for each, column in _STATUSES.items()}


def _sum(row: Row[Any] | None, column: str) -> int:
    return 0 if row is None else int(getattr(row, column))


def _escrow(time: int, row: Row[Any] | None) -> EscrowPoint:
    return EscrowPoint(
        time=time,
        escrow=_sum(row, "escrow"),
        parked=_sum(row, "parked"),
        supply=_sum(row, "minted") - _sum(row, "burned"),
        paid=_sum(row, "paid"),
        fees=_sum(row, "fees"),
    )


def _use(connection: Connection, account: str, times: list[int]) -> Utilisation:
    sums = []
    for time in times:
        row = _at(connection, provider_figures, time, provider_figures.c.account == account)
        if row is None:
            sums.append((0, 0))
            continue
        passed = time - row.time
        used = row.cpu_seconds + row.cpus_busy * passed
        sums.append((used, row.offered_seconds + row.cpus_offered * passed))
    points = (
        UsePoint(time, after[0] - before[0], after[1] - before[1])
        for time, before, after in zip(times[1:], sums, sums[1:], strict=False)
    )
    return Utilisation(account, tuple(points))


def _busy(connection: Connection) -> dict[str, int]:
    table = provider_figures
    last = select(table.c.account, func.max(table.c.block).label("block"))
    ends = last.group_by(table.c.account).subquery()
    query = select(table.c.account, table.c.cpus_busy).join(
        ends, (ends.c.account == table.c.account) & (ends.c.block == table.c.block)
    )
    return {row.account: row.cpus_busy for row in connection.execute(query)}
