"""Queries for jobs, their transitions, events and payments."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, Row, Select, Table, and_, func, select

from deepsquare_chain.audit.entries import from_attributes
from deepsquare_chain.credits import allotment
from deepsquare_chain.errors import NotFoundError, UsageError
from deepsquare_chain.indexer.accounts import open_challenge
from deepsquare_chain.indexer.pagination import (
    DEFAULT_LIMIT,
    IndexSnapshot,
    Reader,
    TimeRange,
    address,
    event_row,
    first_rows,
    in_period,
    movement_row,
    with_position,
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
from deepsquare_chain.indexer.schema import (
    events,
    jobs,
    movements,
    settlements,
    transactions,
    transitions,
)
from deepsquare_chain.job import JobFlags, JobStatus, Resources
from deepsquare_chain.metascheduler.evidence import MeasuredRun

_JOBS: Final = select(jobs, transactions.c.hash).join(
    transactions,
    and_(transactions.c.block == jobs.c.block, transactions.c.position == jobs.c.position),
)
_SETTLEMENTS: Final = with_position(settlements, jobs.c.name).join(
    jobs, jobs.c.id == settlements.c.job_id
)
_MAX_NAME: Final = 64
#: Most finished jobs whose run times are compared.
MAX_RUNS: Final = 5_000
#: Sort columns of job lists. Amounts are stored as text, so they are sorted by length first.
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
#: Maximum length of a chain of retries. A job has at most five retries; a longer chain is forged.
_MAX_CHAIN: Final = 16


class JobQueries(Reader):
    """Queries for lists of jobs, and for all details of a job."""

    def measured_runs(self) -> list[MeasuredRun]:
        """Return the runs of the latest `MAX_RUNS` jobs that finished."""
        kind = (
            *(jobs.c.customer, jobs.c.tasks, jobs.c.cpus_per_task, jobs.c.mem_per_cpu),
            *(jobs.c.gpus, jobs.c.first_limit),
        )
        query = (
            select(jobs.c.provider, jobs.c.billed_seconds, *kind)
            .where(jobs.c.status == JobStatus.FINISHED, jobs.c.provider.is_not(None))
            .order_by(jobs.c.id.desc())
            .limit(MAX_RUNS)
        )
        with self._read() as (connection, _):
            rows = connection.execute(query).all()
        return [MeasuredRun(row[0], tuple(row[2:]), row[1]) for row in rows]

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
        submitted: TimeRange | None = None,
        sort: str = "",
    ) -> Page[JobRow]:
        """Return jobs, latest first by default.

        Args:
            cursor: `next` of the previous page, or a page number.
            limit: Rows per page, 1 to 200.
            statuses: Only jobs with one of these statuses; all if empty.
            customer: Address of the customer.
            provider: Account of the current provider, or of the last one of a final job.
            name: Part of the name, case-insensitive.
            definition: SHA-256 of the definition in hexadecimal.
            submitted: TimeRange of the submission.
            sort: A key of `SORTS`, with a prefix `-` for descending order; the list then
                has page numbers.

        Raises:
            UsageError: A filter, the cursor, the sort or the limit is invalid.
        """
        query = _JOBS
        if statuses:
            query = query.where(jobs.c.status.in_(statuses))
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
            query = query.where(*in_period(jobs.c.submitted_at, submitted))
        return self._page(jobs, query, job_row, cursor, limit, order=_order(sort))

    def job_names(self, job_ids: Collection[int]) -> dict[int, str]:
        """Return the names of jobs by ID."""
        query = select(jobs.c.id, jobs.c.name).where(jobs.c.id.in_(list(job_ids)))
        with self._read() as (connection, _):
            return {row.id: row.name for row in connection.execute(query)}

    def job(self, job_id: int) -> JobDetail:
        """Return a job with its history.

        Raises:
            NotFoundError: The index does not contain the job.
        """
        with self._read() as (connection, snapshot):
            row = None
            if 0 < job_id <= _MAX_ID:
                row = connection.execute(_JOBS.where(jobs.c.id == job_id)).one_or_none()
            if row is None:
                raise NotFoundError(
                    f"Job {job_id} does not exist up to block {snapshot.number('block')}",
                    hint="The index may still be catching up.",
                )
            return self._detail(connection, row, snapshot)

    def transitions(
        self, cursor: str | None = None, limit: int = DEFAULT_LIMIT
    ) -> Page[TransitionRow]:
        """Return all transitions of the grid, latest first. Arguments and errors as for `jobs`."""
        return self._page(transitions, with_position(transitions), transition_row, cursor, limit)

    def events(
        self,
        cursor: str | None = None,
        limit: int = DEFAULT_LIMIT,
        *,
        job_id: int | None = None,
        names: Sequence[str] = (),
    ) -> Page[EventRow]:
        """Return contract events, latest first, filtered by job or by event names."""
        query = with_position(events)
        if job_id is not None:
            if not 0 < job_id <= _MAX_ID:
                raise UsageError(f"{job_id} is not a job ID")
            query = query.where(events.c.job_id == job_id)
        if names:
            query = query.where(events.c.name.in_(list(names)))
        return self._page(events, query, event_row, cursor, limit)

    def settlements(
        self, cursor: str | None = None, limit: int = DEFAULT_LIMIT, *, provider: str | None = None
    ) -> Page[SettlementRow]:
        """Return settlements and interim payments, latest first. See `jobs` for the arguments."""
        query = _SETTLEMENTS
        if provider is not None:
            query = query.where(settlements.c.provider == address(provider))
        return self._page(settlements, query, _settlement_row, cursor, limit)

    def _detail(self, connection: Connection, row: Row[Any], snapshot: IndexSnapshot) -> JobDetail:
        def rows_of(table: Table, query: Select[Any]) -> tuple[Sequence[Row[Any]], bool]:
            own_rows = query.where(table.c.job_id == row.id)
            return first_rows(connection, own_rows, *table.primary_key)

        event_rows, more_events = rows_of(events, with_position(events))
        transition_rows, _ = rows_of(transitions, with_position(transitions))
        movement_rows, _ = rows_of(movements, with_position(movements))
        payment_rows, _ = rows_of(settlements, _SETTLEMENTS)
        until_spent = JobFlags.UNTIL_SPENT in row.flags
        return from_attributes(
            JobDetail,
            row,
            row=job_row(row, snapshot),
            allotment=allotment(row.time_limit, until_spent, _last_escrow(row), row.rate),
            transitions=tuple(
                transition_row(transition, snapshot) for transition in transition_rows
            ),
            payments=tuple(_settlement_row(payment, snapshot) for payment in payment_rows),
            movements=tuple(movement_row(movement, snapshot) for movement in movement_rows),
            events=tuple(event_row(event, snapshot) for event in event_rows),
            more_events=more_events,
            line=_retry_chain(connection, row),
            challenge=_challenge(connection, row, snapshot),
        )


def _order(sort: str) -> list[ColumnElement[Any]]:
    """Return the columns of a sort.

    Raises:
        UsageError: The sort is unknown.
    """
    if not sort:
        return []
    columns = SORTS.get(sort.removeprefix("-"))
    if columns is None:
        raise UsageError(
            f"{sort[:40]!r} is not a sort key of jobs", hint=f"There are {', '.join(SORTS)}."
        )
    return [column.desc() if sort.startswith("-") else column.asc() for column in columns]


def _last_escrow(row: Row[Any]) -> int:
    """Return the escrow in credit-wei after interim payments, but before the settlement."""
    return int(row.funded + row.carried_in - row.collected_paid - row.collected_fee)


def _challenge(connection: Connection, row: Row[Any], snapshot: IndexSnapshot) -> Any:
    if row.provider is None or not row.status.is_assigned:
        return None
    return open_challenge(connection, row.provider, snapshot)


def _retry_chain(connection: Connection, row: Row[Any]) -> tuple[LineRow, ...]:
    """Return a chain of retries, from the first job to the last."""
    chain = [row]
    for column, front in (("retry_of", True), ("successor", False)):
        current = row
        while (neighbour := getattr(current, column)) is not None and len(chain) < _MAX_CHAIN:
            current = connection.execute(select(jobs).where(jobs.c.id == neighbour)).one()
            chain.insert(0, current) if front else chain.append(current)
    return tuple(
        LineRow(entry.id, entry.status, entry.provider, entry.carried_out) for entry in chain
    )


def job_row(row: Row[Any], snapshot: IndexSnapshot) -> JobRow:
    """Convert a row of `jobs` that is joined with its transaction's `hash`."""
    return from_attributes(
        JobRow,
        row,
        resources=from_attributes(Resources, row),
        changed=snapshot.at(row.block, row.since, row.hash, row.log_index),
    )


def transition_row(row: Row[Any], snapshot: IndexSnapshot) -> TransitionRow:
    """Convert a row of `placed(transitions)`."""
    return from_attributes(TransitionRow, row, at=snapshot.place(row, row.log_index))


def _settlement_row(row: Row[Any], snapshot: IndexSnapshot) -> SettlementRow:
    return from_attributes(SettlementRow, row, at=snapshot.place(row, row.log_index))
