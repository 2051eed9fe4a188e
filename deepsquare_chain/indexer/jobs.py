"""Questions about jobs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, Row, and_, func, select

from deepsquare_chain.credits import allotment
from deepsquare_chain.errors import NotFoundError, UsageError
from deepsquare_chain.indexer.pagination import (
    DEFAULT_LIMIT,
    SHOWN,
    IndexSnapshot,
    Period,
    Reader,
    address,
    event_row,
    movement_row,
    paged,
    placed,
    read_model,
    within,
)
from deepsquare_chain.indexer.read_models import (
    EventRow,
    JobDetail,
    JobRow,
    LineRow,
    Page,
    SettlementRow,
    TransitionRow,
)
from deepsquare_chain.indexer.registry import open_challenge
from deepsquare_chain.indexer.schema import (
    events,
    jobs,
    movements,
    settlements,
    transactions,
    transitions,
)
from deepsquare_chain.job import JobFlags, JobStatus, Objective, Resources

_JOBS: Final = select(jobs, transactions.c.hash).join(
    transactions,
    and_(transactions.c.block == jobs.c.block, transactions.c.position == jobs.c.position),
)
_SETTLEMENTS: Final = placed(settlements, jobs.c.name).join(jobs, jobs.c.id == settlements.c.job_id)
_MAX_NAME: Final = 64
#: What lists of jobs are sorted by. Amounts are kept as text: the longer one is the greater.
SORTS: Final[Mapping[str, Sequence[ColumnElement[Any]]]] = {
    "job": (jobs.c.id,),
    "name": (jobs.c.name_key,),
    "status": (jobs.c.status,),
    "customer": (jobs.c.customer,),
    "provider": (jobs.c.provider,),
    "size": (jobs.c.tasks * jobs.c.cpus_per_task, jobs.c.mem_per_cpu),
    "billed": (jobs.c.billed_seconds,),
    "escrow": (func.length(jobs.c.escrow), jobs.c.escrow),
    "cost": (func.length(jobs.c.paid), jobs.c.paid),
    "changed": (jobs.c.block, jobs.c.log_index),
}
_MAX_ID: Final = 2**63 - 1
#: A job has at most five retries, so that a longer line is a forged one.
_MAX_LINE: Final = 16


class JobQueries(Reader):
    """Lists of jobs, and one with everything about it."""

    def jobs(
        self,
        cursor: str | int | None = None,
        limit: int = DEFAULT_LIMIT,
        *,
        statuses: Sequence[JobStatus] = (),
        customer: str | None = None,
        provider: str | None = None,
        name: str | None = None,
        definition: str | None = None,
        submitted: Period | None = None,
        sort: str = "",
    ) -> Page[JobRow]:
        """Jobs, latest first.

        Args:
            cursor: `next` of the page before, or the number of a page.
            limit: Rows of a page, 1 to 200.
            statuses: Any of these; all where empty.
            customer: Address of who submitted them.
            provider: Account of who has them, or had them at their end.
            name: Part of the name, whatever its case.
            definition: SHA-256 of the definition in hexadecimal.
            submitted: When they were submitted.
            sort: A key of `SORTS`, after a `-` for the greatest first; only with a page's number.

        Raises:
            UsageError: An invalid filter, cursor or limit.
        """
        query = _JOBS
        if statuses:
            query = query.where(jobs.c.status.in_([int(each) for each in statuses]))
        if customer is not None:
            query = query.where(jobs.c.customer == address(customer))
        if provider is not None:
            query = query.where(jobs.c.provider == address(provider))
        if name:
            if len(name) > _MAX_NAME:
                raise UsageError(f"A name has at most {_MAX_NAME} characters")
            query = query.where(jobs.c.name_key.contains(name.casefold(), autoescape=True))
        if definition is not None:
            query = query.where(jobs.c.definition == definition.lower().removeprefix("0x"))
        if submitted is not None:
            query = query.where(*within(jobs.c.submitted_at, submitted))
        with self._read() as (connection, snapshot):
            return paged(
                connection,
                query,
                [jobs.c.id],
                lambda row: job_row(row, snapshot),
                kind="jobs",
                cursor=cursor,
                limit=limit,
                order=_order(sort),
            )

    def job(self, job_id: int) -> JobDetail:
        """One job with its history.

        Raises:
            NotFoundError: The index knows no such job.
        """
        with self._read() as (connection, snapshot):
            row = None
            if 0 < job_id <= _MAX_ID:
                row = connection.execute(_JOBS.where(jobs.c.id == job_id)).one_or_none()
            if row is None:
                raise NotFoundError(
                    f"Job {job_id} does not exist up to block {snapshot.number('block')}",
                    hint="Is the index still catching up?",
                )
            return self._detail(connection, row, snapshot)

    def transitions(
        self, cursor: str | None = None, limit: int = DEFAULT_LIMIT
    ) -> Page[TransitionRow]:
        """All status changes of the grid, latest first; arguments and errors as `jobs`."""
        with self._read() as (connection, snapshot):
            return paged(
                connection,
                placed(transitions),
                [transitions.c.block, transitions.c.log_index],
                lambda row: transition_row(row, snapshot),
                kind="transitions",
                cursor=cursor,
                limit=limit,
            )

    def events(
        self,
        cursor: str | None = None,
        limit: int = DEFAULT_LIMIT,
        *,
        job_id: int | None = None,
        names: Sequence[str] = (),
    ) -> Page[EventRow]:
        """Events as the contracts emitted them, latest first; of one job, or some kinds."""
        query = placed(events)
        if job_id is not None:
            if not 0 < job_id <= _MAX_ID:
                raise UsageError(f"{job_id} is no job id")
            query = query.where(events.c.job_id == job_id)
        if names:
            query = query.where(events.c.name.in_(list(names)))
        with self._read() as (connection, snapshot):
            return paged(
                connection,
                query,
                [events.c.block, events.c.log_index],
                lambda row: event_row(row, snapshot),
                kind="events",
                cursor=cursor,
                limit=limit,
            )

    def settlements(
        self, cursor: str | None = None, limit: int = DEFAULT_LIMIT, *, provider: str | None = None
    ) -> Page[SettlementRow]:
        """Settlements and interim payments, latest first; arguments and errors as `jobs`."""
        query = _SETTLEMENTS
        if provider is not None:
            query = query.where(settlements.c.provider == address(provider))
        with self._read() as (connection, snapshot):
            return paged(
                connection,
                query,
                [settlements.c.block, settlements.c.log_index],
                lambda row: _settlement_row(row, snapshot),
                kind="settlements",
                cursor=cursor,
                limit=limit,
            )

    def latest_settlements(self, count: int = 10) -> tuple[SettlementRow, ...]:
        """The last few settlements and interim payments, latest first."""
        return self.settlements(limit=count).items

    def _detail(self, connection: Connection, row: Row[Any], snapshot: IndexSnapshot) -> JobDetail:
        event_rows = connection.execute(
            placed(events)
            .where(events.c.job_id == row.id)
            .order_by(events.c.block, events.c.log_index)
            .limit(SHOWN + 1)
        ).all()
        moves = connection.execute(
            placed(transitions)
            .where(transitions.c.job_id == row.id)
            .order_by(transitions.c.block, transitions.c.log_index)
            .limit(SHOWN)
        )
        money = connection.execute(
            placed(movements)
            .where(movements.c.job_id == row.id)
            .order_by(movements.c.block, movements.c.number)
            .limit(SHOWN)
        )
        payments = connection.execute(
            _SETTLEMENTS.where(settlements.c.job_id == row.id)
            .order_by(settlements.c.block, settlements.c.log_index)
            .limit(SHOWN)
        )
        until_spent = JobFlags.UNTIL_SPENT in JobFlags(row.flags)
        return read_model(
            JobDetail,
            row,
            row=job_row(row, snapshot),
            allotment=allotment(row.time_limit, until_spent, _last_escrow(row), row.rate),
            transitions=tuple(transition_row(each, snapshot) for each in moves),
            payments=tuple(_settlement_row(each, snapshot) for each in payments),
            movements=tuple(movement_row(each, snapshot) for each in money),
            events=tuple(event_row(each, snapshot) for each in event_rows[:SHOWN]),
            more_events=len(event_rows) > SHOWN,
            line=_line(connection, row),
            challenge=_challenge(connection, row, snapshot),
        )


def _order(sort: str) -> list[ColumnElement[Any]]:
    """Columns of a sort.

    Raises:
        UsageError: There is no such sort.
    """
    if not sort:
        return []
    columns = SORTS.get(sort.removeprefix("-"))
    if columns is None:
        raise UsageError(
            f"{sort[:40]!r} is nothing to sort jobs by", hint=f"There are {', '.join(SORTS)}."
        )
    return [each.desc() if sort.startswith("-") else each.asc() for each in columns]


def _last_escrow(row: Row[Any]) -> int:
    """What the escrow is after the last interim payment, also once it was divided."""
    return int(row.funded + row.carried_in - row.collected_paid - row.collected_fee)


def _challenge(connection: Connection, row: Row[Any], snapshot: IndexSnapshot) -> Any:
    if row.provider is None or not JobStatus(row.status).is_assigned:
        return None
    return open_challenge(connection, row.provider, snapshot)


def _line(connection: Connection, row: Row[Any]) -> tuple[LineRow, ...]:
    """From the first job of a line of retries to its last."""
    found = [row]
    for column, front in (("retry_of", True), ("successor", False)):
        at = row
        while (other := getattr(at, column)) is not None and len(found) < _MAX_LINE:
            at = connection.execute(select(jobs).where(jobs.c.id == other)).one()
            found.insert(0, at) if front else found.append(at)
    return tuple(
        LineRow(each.id, JobStatus(each.status), each.provider, each.carried_out) for each in found
    )


def job_row(row: Row[Any], snapshot: IndexSnapshot) -> JobRow:
    """A job of a list; the row has its transaction's `hash`."""
    return read_model(
        JobRow,
        row,
        status=JobStatus(row.status),
        resources=Resources(row.tasks, row.cpus_per_task, row.mem_per_cpu, row.gpus),
        flags=JobFlags(row.flags),
        objective=Objective(row.objective),
        changed=snapshot.at(row.block, row.since, row.hash, row.log_index),
    )


def transition_row(row: Row[Any], snapshot: IndexSnapshot) -> TransitionRow:
    """A row of `placed(transitions)`."""
    return read_model(
        TransitionRow,
        row,
        at=snapshot.place(row, row.log_index),
        before=JobStatus(row.before),
        after=JobStatus(row.after),
    )


def _settlement_row(row: Row[Any], snapshot: IndexSnapshot) -> SettlementRow:
    return read_model(
        SettlementRow,
        row,
        at=snapshot.place(row, row.log_index),
        status=JobStatus(row.status),
    )
