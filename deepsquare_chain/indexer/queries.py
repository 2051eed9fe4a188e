"""All queries of the index, for the web pages and the JSON API.

Every method is synchronous and reads one snapshot of the database; services call it in a thread.
Lists are paginated: `limit` is the number of rows per page (1 to 200), `cursor` is `next` of the
previous page, or a page number where the type allows it. Cursors are opaque, and stay valid when
rows are added or removed by a reorg.
Unknown objects raise `NotFoundError`, invalid arguments `UsageError`.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any, Final, NamedTuple, TypeVar, cast

import pydantic_core
from eth_utils.address import is_address
from sqlalchemy import (
    CTE,
    ColumnElement,
    Connection,
    Row,
    ScalarSelect,
    Select,
    String,
    Table,
    and_,
    column,
    func,
    or_,
    select,
    true,
    tuple_,
    values,
)

from deepsquare_chain.audit.anomalies import (
    SUBJECTS,
    Anomaly,
    AnomalyRules,
    Code,
    Subject,
)
from deepsquare_chain.audit.entries import (
    ZERO_ADDRESS,
    JobEntry,
    TransactionContext,
    from_attributes,
)
from deepsquare_chain.chain.bindings.calls import checked_address
from deepsquare_chain.chain.bindings.deployment import ROLE_NAMES, Deployment
from deepsquare_chain.chain.bindings.events import ProviderChallenged
from deepsquare_chain.chain.rpc.batching import chunks
from deepsquare_chain.errors import NotFoundError, UsageError
from deepsquare_chain.indexer import read_models as rm
from deepsquare_chain.indexer.records import event_of, job_entry, offering
from deepsquare_chain.indexer.schema import (
    MAX_INT,
    MAX_KEYS,
    STATUS_COLUMNS,
    Int,
    anomalies,
    changes,
    constants,
    events,
    forwarded,
    headers,
    jobs,
    movements,
    parameters,
    parkings,
    provider_figures,
    providers,
    roles,
    settlements,
    state,
    totals,
    transactions,
    transitions,
)
from deepsquare_chain.job import HOUR, NO_LOAD, JobStatus, Load, ProviderStatus, Resources
from deepsquare_chain.metascheduler.provider_labels import MeasuredRun
from deepsquare_chain.store.base import Amount, Database, blocks

MAX_LIMIT: Final = 200
DEFAULT_LIMIT: Final = 50
#: Highest page number that can be requested. The database scans all rows of earlier pages.
MAX_PAGE: Final = 10_000
#: Rows of each kind that a detail view includes; more rows require pagination.
MAX_DETAIL_ROWS: Final = 200

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class IndexSnapshot:
    """The state of the index at the start of a query."""

    values: Mapping[str, str]

    def number(self, key: str, default: int = -1) -> int:
        """Return a number of the state, such as `block` or `finalized`."""
        return int(self.values.get(key, default))

    @property
    def finalized(self) -> int:
        """Last finalized block."""
        return self.number("finalized")

    def at(self, block: int, time: int, tx_hash: str, log_index: int | None) -> rm.Place:
        """Return a position on the chain, marked as finalized or not."""
        return rm.Place(block, time, tx_hash, log_index, block <= self.finalized)

    def place(self, row: Row[Any]) -> rm.Place:
        """Return the position of a row of `with_position`; its log index is None without a log."""
        return self.at(row.block, row.time, row.hash, getattr(row, "log_index", None))


class Reader:
    """Base of query classes: a database, and the deployment whose events it contains."""

    def __init__(self, database: Database, deployment: Deployment) -> None:
        self.database = database
        self.deployment = deployment
        aliases = {deployment.treasury: "treasury", **deployment.contract_names}
        self._aliases = {**aliases, ZERO_ADDRESS: "nobody"}

    @contextmanager
    def _read(self) -> Iterator[tuple[Connection, IndexSnapshot]]:
        """Open a read transaction, and yield it with its snapshot."""
        with self.database.read() as connection:
            yield connection, IndexSnapshot(get_state(connection))

    def _page(
        self,
        table: Table,
        query: Select[Any],
        make: Callable[[Row[Any], IndexSnapshot], T],
        cursor: str | int | None,
        limit: int,
        *,
        kind: str = "",
        keys: Sequence[ColumnElement[Any]] = (),
        oldest_first: bool = False,
        order: Sequence[ColumnElement[Any]] = (),
    ) -> rm.Page[T]:
        """Return a page of a query, latest rows first by default.

        A cursor contains the key of the last row, so that rows that are added or removed in the
        meantime do not cause duplicates or gaps. If `cursor` is a page number, the result is a
        `NumberedPage`.

        Args:
            table: The table whose rows are listed.
            query: Selects the rows, with a column of the name of each key.
            make: Converts a row to a read model.
            kind: Name of the list in its cursors; the name of the table by default.
            keys: Integer columns that order the rows; the primary key of the table by default.
            oldest_first: Whether to reverse the order.
            order: Columns to sort by first. Such a list has page numbers only, and begins with 1.
        """
        if not 1 <= limit <= MAX_LIMIT:
            raise UsageError(f"A page has 1 to {MAX_LIMIT} rows, not {limit}")
        keys = keys or list(table.primary_key)
        columns = list(keys) if oldest_first else [key.desc() for key in keys]
        if order and isinstance(cursor, str):
            raise UsageError("A sorted list has page numbers, not cursors", hint="Give page 1.")
        if order and cursor is None:
            cursor = 1
        with self._read() as (connection, snapshot):
            if isinstance(cursor, int):
                rows, total = _numbered(connection, query.order_by(*order, *columns), cursor, limit)
                items = tuple(make(row, snapshot) for row in rows)
                pages = min(MAX_PAGE, max(1, -(-total // limit)))
                return rm.NumberedPage(items, None, cursor, pages, total)
            kind = kind or table.name
            if cursor is not None:
                last_key = tuple(decode_cursor(kind, cursor, len(keys)))
                row_key: Any = tuple_(*keys)
                query = query.where(row_key > last_key if oldest_first else row_key < last_key)
            rows = connection.execute(query.order_by(*columns).limit(limit + 1)).all()
            items = tuple(make(row, snapshot) for row in rows[:limit])
        if len(rows) <= limit:
            return rm.Page(items, None)
        last_key = tuple(getattr(rows[limit - 1], str(key.key)) for key in keys)
        return rm.Page(items, encode_cursor(kind, last_key))


def get_state(connection: Connection) -> dict[str, str]:
    """Return the state of the index, such as its last block."""
    return {row.key: row.value for row in connection.execute(select(state))}


def last_row(
    connection: Connection, query: Select[Any], *order: ColumnElement[Any]
) -> Row[Any] | None:
    """Return the last row of a query in this order, or None if there are no rows."""
    latest_first = query.order_by(*(column.desc() for column in order)).limit(1)
    return connection.execute(latest_first).one_or_none()


# -- arguments: addresses, filters and cursors


def address(text: str) -> str:
    """Return a checksummed address, as stored in the tables. Raises UsageError if invalid."""
    return str(checked_address(text))


class TimeRange(NamedTuple):
    """A range of chain time in seconds: `start` inclusive, `end` exclusive, None for no bound."""

    start: int | None
    end: int | None


def in_period(time: ColumnElement[int], period: TimeRange | None) -> list[ColumnElement[bool]]:
    """Return the conditions for rows whose time lies in a period; None for no conditions."""
    start, end = period or (None, None)
    after = [] if start is None else [time >= start]
    return after if end is None else [*after, time < end]


def has_account(column: ColumnElement[Any], account: str | None) -> list[ColumnElement[bool]]:
    """Return the condition that a column contains an account; none if the account is None."""
    return [] if account is None else [column == address(account)]


def encode_cursor(kind: str, key: Sequence[Any]) -> str:
    """Encode a key of a list as an opaque cursor."""
    body = json.dumps([kind, *key], separators=(",", ":")).encode()
    return base64.urlsafe_b64encode(body).rstrip(b"=").decode()


def decode_cursor(kind: str, cursor: str, size: int) -> list[int]:
    """Decode the key of a cursor of this list."""
    try:
        padded = cursor + "=" * (-len(cursor) % 4)
        parts = pydantic_core.from_json(base64.urlsafe_b64decode(padded))
        matches = isinstance(parts, list) and parts[0] == kind and len(parts) == size + 1
        if matches and all(type(number) is int and abs(number) <= MAX_INT for number in parts[1:]):
            return list(parts[1:])
    except (ValueError, binascii.Error, IndexError):
        pass
    raise UsageError(
        f"{cursor[:80]!r} is not a cursor of this list", hint="Start again without a cursor."
    )


def _numbered(
    connection: Connection, query: Select[Any], number: int, limit: int
) -> tuple[Sequence[Row[Any]], int]:
    """Return the rows of a numbered page, and the number of all rows."""
    if not 1 <= number <= MAX_PAGE:
        raise UsageError(f"Pages have the numbers 1 to {MAX_PAGE}, not {number}")
    count = select(func.count()).select_from(query.order_by(None).subquery())
    total = connection.execute(count).scalar_one()
    rows = connection.execute(query.limit(limit).offset((number - 1) * limit))
    return rows.all(), total


# -- conversion of rows to read models


def with_position(table: Table, *more: Any) -> Select[Any]:
    """Select a table with the `hash` of the transaction and the `time` of the block of each row."""
    time = () if "time" in table.c else (headers.c.time,)
    query = select(table, transactions.c.hash, *time, *more)
    query = query.join(transactions, _same_transaction(table))
    return query if not time else query.join(headers, headers.c.number == table.c.block)


def _same_transaction(table: Table) -> ColumnElement[bool]:
    same_block = table.c.block == transactions.c.block
    return same_block & (table.c.position == transactions.c.position)


def placed_row(kind: type[T]) -> Callable[[Row[Any], IndexSnapshot], T]:
    """Return a conversion of rows of `with_position` to a read model with the place `at`."""
    return lambda row, snapshot: from_attributes(kind, row, at=snapshot.place(row))


_transition_row: Final = placed_row(rm.TransitionRow)
_settlement_row: Final = placed_row(rm.SettlementRow)
_anomaly_row: Final = placed_row(rm.AnomalyRow)
_transaction: Final = placed_row(rm.TransactionRow)


def event_row(row: Row[Any], snapshot: IndexSnapshot) -> rm.EventRow:
    """Convert a row of `with_position(events)`."""
    return from_attributes(rm.EventRow, row, at=snapshot.place(row), values=row.body)


def movement_row(row: Row[Any], snapshot: IndexSnapshot) -> rm.MovementRow:
    """Convert a row of `with_position(movements)`."""
    return from_attributes(
        rm.MovementRow,
        row,
        at=snapshot.place(row),
        debit=max(0, -row.amount),
        credit=max(0, row.amount),
    )


def first_rows(
    connection: Connection, query: Select[Any], *order: ColumnElement[Any]
) -> tuple[Sequence[Row[Any]], bool]:
    """Return the first rows of a query for a detail view, and whether there are more."""
    rows = connection.execute(query.order_by(*order).limit(MAX_DETAIL_ROWS + 1)).all()
    return rows[:MAX_DETAIL_ROWS], len(rows) > MAX_DETAIL_ROWS


# -- accounts

LIVE: Final = tuple(status for status in JobStatus if status.is_live)


class AccountQueries(Reader):
    """Queries for balances and statements."""

    def account(self, account: str) -> rm.AccountRow:
        """Return an account. An unknown address has zero balances and counts."""
        key = address(account)
        with self._read() as (connection, snapshot):
            submitted = jobs.c.customer == key
            lines, balance = last_line(connection, key)
            provider_id = select(providers.c.id).where(providers.c.account == key)
            return rm.AccountRow(
                address=key,
                alias=self._aliases.get(key, ""),
                balance=balance,
                parked=parked_of(connection, key),
                jobs=_count(connection, submitted),
                jobs_live=_count(connection, submitted & jobs.c.status.in_(LIVE)),
                movements=lines,
                provider_id=connection.execute(provider_id).scalar(),
                roles=roles_in_force(role_rows(connection, snapshot, key)),
            )

    def statement(
        self,
        account: str,
        cursor: str | int | None = None,
        limit: int = DEFAULT_LIMIT,
        *,
        oldest_first: bool = False,
        period: TimeRange | None = None,
        kind: str | None = None,
    ) -> rm.Page[rm.MovementRow]:
        """Return the movements of an account with the balance after each, latest first.

        The latest balance equals the account's `balanceOf` at the last indexed block.
        """
        query = with_position(movements).where(
            movements.c.account == address(account), *in_period(movements.c.time, period)
        )
        if kind is not None:
            query = query.where(movements.c.kind == kind)
        return self._page(
            movements,
            query,
            movement_row,
            cursor,
            limit,
            kind="statement" + "+" * oldest_first,
            keys=[movements.c.line],
            oldest_first=oldest_first,
        )

    def movements(
        self, cursor: str | int | None = None, limit: int = DEFAULT_LIMIT
    ) -> rm.Page[rm.MovementRow]:
        """Return the lines of all statements, latest first."""
        return self._page(movements, with_position(movements), movement_row, cursor, limit)


def parked_of(connection: Connection, account: str) -> int:
    """Return the parked credit-wei that the account can withdraw."""
    query = select(parkings.c.held).where(parkings.c.recipient == account)
    row = last_row(connection, query, *parkings.primary_key)
    return 0 if row is None else row.held


def last_line(connection: Connection, account: str) -> tuple[int, int]:
    """Return the number of the last line of an account's statement, and the balance after it."""
    query = select(movements.c.line, movements.c.balance).where(movements.c.account == account)
    row = last_row(connection, query, movements.c.line)
    return (0, 0) if row is None else (row.line, row.balance)


def _count(connection: Connection, condition: ColumnElement[bool]) -> int:
    return connection.execute(select(func.count()).select_from(jobs).where(condition)).scalar_one()


# -- providers, roles and parameters

#: Kinds of provider changes, by event name.
CHANGE_KINDS: Final[Mapping[str, str]] = {
    "ProviderRegistered": "registered",
    "HardwareProposed": "hardware",
    "ProviderApproved": "approved",
    "OfferChanged": "offer",
    "PricesChanged": "prices",
    "LabelsChanged": "labels",
    "DrainingChanged": "draining",
    "BanChanged": "ban",
    "ProviderChallenged": "challenged",
    "ProviderAnswered": "answered",
}
_NO_FIGURES: Final = rm.ProviderFigures(*[0] * 15)


class RegistryQueries(Reader):
    """Queries for providers and their histories, roles, and parameters."""

    def providers(self) -> tuple[rm.ProviderRow, ...]:
        """Return all providers ordered by ID; those that were never approved come last."""
        with self._read() as (connection, snapshot):
            figures = latest_figures(connection)
            rows = connection.execute(select(providers)).all()
        provider_rows = [_provider_row(row, figures.get(row.account), snapshot) for row in rows]
        return tuple(
            sorted(provider_rows, key=lambda row: (row.id is None, row.id or 0, row.account))
        )

    def provider(self, account: str | int) -> rm.ProviderDetail:
        """Return a provider by its account or ID."""
        by_id = isinstance(account, int)
        key = providers.c.id == account if by_id else providers.c.account == address(str(account))
        with self._read() as (connection, snapshot):
            row = connection.execute(select(providers).where(key)).one_or_none()
            if row is None:
                raise NotFoundError(f"There is no provider {account}")
            latest_first = [column.desc() for column in events.primary_key]
            changes, more = first_rows(connection, _changes(row.account), *latest_first)
            figures = latest_figures(connection, row.account)
            return rm.ProviderDetail(
                row=_provider_row(row, figures.get(row.account), snapshot),
                history=tuple(_change(change, snapshot) for change in changes),
                more_history=more,
                challenge=open_challenge(connection, row.account, snapshot),
            )

    def provider_history(
        self,
        account: str,
        cursor: str | None = None,
        limit: int = DEFAULT_LIMIT,
        *,
        kind: str | None = None,
    ) -> rm.Page[rm.ProviderChange]:
        """Return changes of a provider, latest first; `kind` as in `ProviderChange`."""
        query = _changes(address(account))
        if kind is not None:
            query = query.where(
                events.c.name.in_([name for name in CHANGE_KINDS if CHANGE_KINDS[name] == kind])
            )
        return self._page(events, query, _change, cursor, limit, kind="provider")

    def roles(self) -> rm.Roles:
        """Return the roles in force, and all grants and revocations, latest first."""
        with self._read() as (connection, snapshot):
            history = role_rows(connection, snapshot)
        return rm.Roles(held=roles_in_force(history), history=tuple(reversed(history)))

    def parameters(self) -> rm.ParameterHistory:
        """Return fee, timeouts and addresses, with the history of those that can change."""
        with self._read() as (connection, snapshot):
            fixed = connection.execute(select(constants).order_by(constants.c.name)).all()
            query = with_position(parameters)
            query = query.order_by(*(column.desc() for column in parameters.primary_key))
            history = tuple(
                rm.ParameterRow(row.name, row.value, snapshot.place(row))
                for row in connection.execute(query)
            )
        latest = {row.name: row for row in reversed(history)}
        now = [*latest.values(), *(rm.ParameterRow(row.name, row.value, None) for row in fixed)]
        return rm.ParameterHistory(tuple(sorted(now, key=lambda row: row.name)), history)


def role_rows(
    connection: Connection, snapshot: IndexSnapshot, account: str | None = None
) -> tuple[rm.RoleRow, ...]:
    """Return grants and revocations of roles, oldest first."""
    query = with_position(roles).where(*has_account(roles.c.account, account))
    return tuple(
        from_attributes(
            rm.RoleRow, row, at=snapshot.place(row), name=ROLE_NAMES.get(row.role, row.role)
        )
        for row in connection.execute(query.order_by(*roles.primary_key))
    )


def roles_in_force(history: tuple[rm.RoleRow, ...]) -> tuple[rm.RoleRow, ...]:
    """Return the grants in force; `history` must be oldest first."""
    grants: dict[tuple[str, str, str], rm.RoleRow] = {}
    for row in history:
        key = (row.contract, row.role, row.account)
        if row.granted:
            grants.setdefault(key, row)
        else:
            grants.pop(key, None)
    return tuple(grants.values())


def open_challenge(
    connection: Connection, account: str, snapshot: IndexSnapshot
) -> rm.ChallengeRow | None:
    """Return the open challenge of a provider, or None."""
    names = ["ProviderChallenged", "ProviderAnswered"]
    query = with_position(events).where(events.c.account == account, events.c.name.in_(names))
    row = last_row(connection, query, *events.primary_key)
    if row is None or row.name == "ProviderAnswered":
        return None
    return rm.ChallengeRow(at=snapshot.place(row), **row.body)


def is_active(row: Row[Any], now: int) -> bool:
    """Return whether a provider could be assigned a job at chain time `now`."""
    silent = row.answer_by != 0 and now > row.answer_by
    approved = row.status == ProviderStatus.ACTIVE and row.approved_until >= now
    return bool(approved and not silent)


def _changes(account: str) -> Select[Any]:
    return with_position(events).where(
        events.c.account == account, events.c.name.in_(list(CHANGE_KINDS))
    )


def _change(row: Row[Any], snapshot: IndexSnapshot) -> rm.ProviderChange:
    values = {name: value for name, value in row.body.items() if name != "provider"}
    return rm.ProviderChange(snapshot.place(row), CHANGE_KINDS[row.name], values)


def latest_figures(connection: Connection, account: str | None = None) -> dict[str, Row[Any]]:
    """Return the latest row of `provider_figures` of each provider, or of one."""
    table = provider_figures
    last_block = select(func.max(table.c.block)).where(table.c.account == providers.c.account)
    block = last_block.correlate(providers).scalar_subquery().label("block")
    query = select(providers.c.account, block).where(*has_account(providers.c.account, account))
    row_keys = [tuple(row) for row in connection.execute(query) if row.block is not None]
    latest: dict[str, Row[Any]] = {}
    # Rows are selected separately from their keys: in a single query, both databases compute the
    # key for each row of the table. Keys are joined as a table, because SQLite scans the whole
    # table for an IN list of keys.
    for some_keys in chunks(row_keys, MAX_KEYS):
        keys = values(column("account", String), column("block", Int), name="keys")
        key_table = keys.data(some_keys).cte()
        same_key = (table.c.account == key_table.c.account) & (table.c.block == key_table.c.block)
        rows = connection.execute(select(table).join_from(key_table, table, same_key))
        latest |= {row.account: row for row in rows}
    return latest


def _provider_row(
    row: Row[Any], figures: Row[Any] | None, snapshot: IndexSnapshot
) -> rm.ProviderRow:
    now, load, totals = snapshot.number("time", 0), NO_LOAD, _NO_FIGURES
    if figures is not None:
        load = Load(figures.cpus_assigned, figures.memory_assigned, figures.gpus_assigned)
        cpu_seconds = figures.cpu_seconds + figures.cpus_busy * max(0, now - figures.time)
        totals = from_attributes(rm.ProviderFigures, figures, cpu_seconds=cpu_seconds)
    active = is_active(row, now)
    return from_attributes(
        rm.ProviderRow, row, active=active, **offering(row), load=load, figures=totals
    )


# -- jobs

_JOBS: Final = select(jobs, transactions.c.hash).join(transactions, _same_transaction(jobs))
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
#: Maximum length of a chain of retries. A job has at most five retries; a longer chain is forged.
_MAX_CHAIN: Final = 16


class JobQueries(Reader):
    """Queries for lists of jobs, and for all details of a job."""

    def measured_runs(self) -> list[MeasuredRun]:
        """Return the runs of the latest `MAX_RUNS` jobs that finished."""
        names = ("customer", "tasks", "cpus_per_task", "mem_per_cpu", "gpus", "first_limit")
        query = (
            select(jobs.c.provider, jobs.c.billed_seconds, *(jobs.c[name] for name in names))
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
    ) -> rm.Page[rm.JobRow]:
        """Return jobs, latest first by default.

        Args:
            statuses: Only jobs with one of these statuses; all if empty.
            customer: Address of the customer.
            provider: Account of the current provider, or of the last one of a final job.
            name: Part of the name, case-insensitive.
            definition: SHA-256 of the definition in hexadecimal.
            submitted: Period of the submission.
            sort: A key of `SORTS`, with a prefix `-` for descending order; the list then
                has page numbers.
        """
        query = _JOBS.where(
            *has_account(jobs.c.customer, customer),
            *has_account(jobs.c.provider, provider),
            *in_period(jobs.c.submitted_at, submitted),
        )
        if statuses:
            query = query.where(jobs.c.status.in_(statuses))
        if name:
            if len(name) > _MAX_NAME:
                raise UsageError(f"A name has at most {_MAX_NAME} characters")
            query = query.where(jobs.c.name_key.contains(name.casefold(), autoescape=True))
        if definition is not None:
            query = query.where(jobs.c.definition == definition.lower().removeprefix("0x"))
        return self._page(jobs, query, job_row, cursor, limit, order=_order(sort))

    def job_names(self, job_ids: Collection[int]) -> dict[int, str]:
        """Return the names of jobs by ID."""
        query = select(jobs.c.id, jobs.c.name).where(jobs.c.id.in_(list(job_ids)))
        with self._read() as (connection, _):
            return {row.id: row.name for row in connection.execute(query)}

    def job(self, job_id: int) -> rm.JobDetail:
        """Return a job with its history."""
        return self.job_with_entry(job_id)[0]

    def job_with_entry(self, job_id: int) -> tuple[rm.JobDetail, JobEntry]:
        """Return a job, and its entry in the job ledger of an audit."""
        with self._read() as (connection, snapshot):
            row = _stored_job(connection, job_id, snapshot)
            detail = _job_detail(connection, row, snapshot)
        entry = job_entry(row)
        entry.transitions += [
            (step.at.time, step.after, step.at.tx_hash) for step in detail.transitions
        ]
        return detail, entry

    def transitions(
        self, cursor: str | None = None, limit: int = DEFAULT_LIMIT
    ) -> rm.Page[rm.TransitionRow]:
        """Return all transitions of the grid, latest first."""
        return self._page(transitions, with_position(transitions), _transition_row, cursor, limit)

    def events(
        self,
        cursor: str | None = None,
        limit: int = DEFAULT_LIMIT,
        *,
        job_id: int | None = None,
        names: Sequence[str] = (),
    ) -> rm.Page[rm.EventRow]:
        """Return contract events, latest first, filtered by job or by event names."""
        query = with_position(events)
        if job_id is not None:
            if not 0 < job_id <= MAX_INT:
                raise UsageError(f"{job_id} is not a job ID")
            query = query.where(events.c.job_id == job_id)
        if names:
            query = query.where(events.c.name.in_(list(names)))
        return self._page(events, query, event_row, cursor, limit)

    def settlements(
        self, cursor: str | None = None, limit: int = DEFAULT_LIMIT, *, provider: str | None = None
    ) -> rm.Page[rm.SettlementRow]:
        """Return settlements and interim payments, latest first."""
        query = _SETTLEMENTS.where(*has_account(settlements.c.provider, provider))
        return self._page(settlements, query, _settlement_row, cursor, limit)


def _stored_job(connection: Connection, job_id: int, snapshot: IndexSnapshot) -> Row[Any]:
    """Return the row of a job. Raises NotFoundError if the index does not contain it."""
    if 0 < job_id <= MAX_INT:
        row = connection.execute(_JOBS.where(jobs.c.id == job_id)).one_or_none()
        if row is not None:
            return row
    raise NotFoundError(
        f"Job {job_id} does not exist up to block {snapshot.number('block')}",
        hint="The index may still be catching up.",
    )


def _job_detail(connection: Connection, row: Row[Any], snapshot: IndexSnapshot) -> rm.JobDetail:
    def rows_of(
        table: Table, query: Select[Any], make: Callable[[Row[Any], IndexSnapshot], T]
    ) -> tuple[tuple[T, ...], bool]:
        own_rows = query.where(table.c.job_id == row.id)
        rows, more = first_rows(connection, own_rows, *table.primary_key)
        return tuple(make(own_row, snapshot) for own_row in rows), more

    job_events, more_events = rows_of(events, with_position(events), event_row)
    challenged = row.provider is not None and row.status.is_assigned
    return from_attributes(
        rm.JobDetail,
        row,
        row=job_row(row, snapshot),
        allotment=job_entry(row).allotment,
        transitions=rows_of(transitions, with_position(transitions), _transition_row)[0],
        payments=rows_of(settlements, _SETTLEMENTS, _settlement_row)[0],
        movements=rows_of(movements, with_position(movements), movement_row)[0],
        events=job_events,
        more_events=more_events,
        line=_retry_chain(connection, row),
        challenge=open_challenge(connection, row.provider, snapshot) if challenged else None,
    )


def _order(sort: str) -> list[ColumnElement[Any]]:
    """Return the columns of a sort."""
    if not sort:
        return []
    columns = SORTS.get(sort.removeprefix("-"))
    if columns is None:
        raise UsageError(
            f"{sort[:40]!r} is not a sort key of jobs", hint=f"There are {', '.join(SORTS)}."
        )
    return [column.desc() if sort.startswith("-") else column.asc() for column in columns]


def _retry_chain(connection: Connection, row: Row[Any]) -> tuple[rm.LineRow, ...]:
    """Return a chain of retries, from the first job to the last."""
    chain = [row]
    for link, front in (("retry_of", True), ("successor", False)):
        current = row
        while (neighbour := getattr(current, link)) is not None and len(chain) < _MAX_CHAIN:
            current = connection.execute(select(jobs).where(jobs.c.id == neighbour)).one()
            chain.insert(0, current) if front else chain.append(current)
    return tuple(
        rm.LineRow(entry.id, entry.status, entry.provider, entry.carried_out) for entry in chain
    )


def job_row(row: Row[Any], snapshot: IndexSnapshot) -> rm.JobRow:
    """Convert a row of `jobs` that is joined with its transaction's `hash`."""
    return from_attributes(
        rm.JobRow,
        row,
        resources=from_attributes(Resources, row),
        changed=snapshot.at(row.block, row.since, row.hash, row.log_index),
    )


# -- totals of the grid, at present and over time

MAX_BUCKETS: Final = 500
#: Columns of `provider_figures` that a series needs.
_USE: Final = ("block", "time", "cpus_busy", "cpu_seconds", "cpus_offered", "offered_seconds")


class SeriesQueries(Reader):
    """Queries for totals of the grid and time series."""

    def overview(self) -> rm.Overview:
        """Return a summary of the grid at the last indexed block."""
        with self._read() as (connection, snapshot):
            now = snapshot.number("time", 0)
            current_totals, earlier_totals = _totals_at(connection, [now, now - HOUR])
            provider_rows = connection.execute(select(providers)).all()
            active = [row for row in provider_rows if is_active(row, now)]
            cpus_busy = {
                account: row.cpus_busy for account, row in latest_figures(connection).items()
            }
        jobs, earlier = _counts(current_totals), _counts(earlier_totals)
        ended = sum(jobs[status] - earlier[status] for status in jobs if status.is_final)
        return rm.Overview(
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
    ) -> tuple[rm.StatusPoint, ...]:
        """Return the number of jobs in each status, at equal intervals of time.

        Args:
            buckets: Number of points, 1 to 500.
            since: First time; the time of the first event by default.
            until: Last time; the time of the last indexed block by default.
        """
        rows = self._totals_over_time(buckets, since, until)
        return tuple(rm.StatusPoint(time, _counts(row)) for time, row in rows)

    def escrow_over_time(
        self, buckets: int = 60, *, since: int | None = None, until: int | None = None
    ) -> tuple[rm.EscrowPoint, ...]:
        """Return totals of credits over time. See `jobs_by_status_over_time` for the arguments."""
        names = ("escrow", "parked", "supply", "paid", "fees")
        rows = self._totals_over_time(buckets, since, until)
        sums = [(time, _amounts(row)) for time, row in rows]
        return tuple(rm.EscrowPoint(time, *(row[name] for name in names)) for time, row in sums)

    def _totals_over_time(
        self, buckets: int, since: int | None, until: int | None
    ) -> list[tuple[int, Row[Any] | None]]:
        """Return times at equal intervals, each with the totals of the grid."""
        with self._read() as (connection, snapshot):
            times = _times(connection, snapshot, buckets, since, until)
            return list(zip(times, _totals_at(connection, times), strict=True))

    def utilisation(
        self,
        buckets: int = 60,
        *,
        account: str | None = None,
        since: int | None = None,
        until: int | None = None,
    ) -> tuple[rm.Utilisation, ...]:
        """Return the CPU-seconds used and offered in each interval, by provider.

        See `jobs_by_status_over_time` for the arguments. `account` selects one provider.
        """
        with self._read() as (connection, snapshot):
            times = _times(connection, snapshot, buckets, since, until, points=buckets + 1)
            rows = _figures_at(connection, times, account)
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


def _figures_at(
    connection: Connection, times: Sequence[int], account: str | None
) -> dict[str, dict[int, Row[Any]]]:
    """Return running totals of providers, by account and time."""
    times_table = _time_table(times)
    last_block = _last_block(
        provider_figures, times_table, provider_figures.c.account == providers.c.account
    )
    query = select(providers.c.account, times_table.c.at, last_block.label("block"))
    query = query.select_from(times_table.join(providers, true()))
    query = query.where(*has_account(providers.c.account, account))
    block_rows = connection.execute(query.order_by(providers.c.account)).all()
    figures: dict[str, dict[int, Row[Any]]] = {}
    for provider, own_rows in groupby(block_rows, key=lambda row: row.account):
        blocks = {row.at: row.block for row in own_rows if row.block is not None}
        # One query per account: SQLite scans the whole table for keys of several accounts.
        table = provider_figures
        use = select(*(table.c[name] for name in _USE))
        query = use.where(table.c.account == provider, table.c.block.in_(blocks.values()))
        result: Iterable[Row[Any]] = connection.execute(query)
        rows = {row.block: row for row in result}
        figures[provider] = {time: rows[block] for time, block in blocks.items()}
    return figures


def _counts(row: Row[Any] | None) -> dict[JobStatus, int]:
    return {status: int(getattr(row, name, 0)) for status, name in STATUS_COLUMNS.items()}


def _amounts(row: Row[Any] | None) -> dict[str, int]:
    """Return the amounts of a row of `totals` and the supply, in credit-wei."""
    names = [column.name for column in totals.c if isinstance(column.type, Amount)]
    sums = {name: int(getattr(row, name, 0)) for name in names}
    return {**sums, "supply": sums["minted"] - sums["burned"]}


def _utilisation(
    account: str, times: Sequence[int], rows: Mapping[int, Row[Any]]
) -> rm.Utilisation:
    sums = [(time, *_use(rows.get(time), time)) for time in times]
    points = (
        rm.UsePoint(time, used - used_before, offered - offered_before)
        for (_, used_before, offered_before), (time, used, offered) in pairwise(sums)
    )
    return rm.Utilisation(account, tuple(points))


def _use(row: Row[Any] | None, time: int) -> tuple[int, int]:
    """Return the CPU-seconds used and offered up to a time, given the last running totals."""
    if row is None:
        return 0, 0
    elapsed = time - row.time
    used = row.cpu_seconds + row.cpus_busy * elapsed
    return used, row.offered_seconds + row.cpus_offered * elapsed


# -- anomalies, by the rules of the audit

ANOMALY_KINDS: Final = (*(subject.value for subject in Subject), *(code.value for code in Code))


class AnomalyQueries(Reader):
    """Queries for anomalies: those caused by transactions, and open conditions."""

    def anomalies(
        self,
        cursor: str | int | None = None,
        limit: int = DEFAULT_LIMIT,
        *,
        kind: str | None = None,
        setup: bool | None = None,
    ) -> rm.Page[rm.AnomalyRow]:
        """Return the anomalies that transactions caused, latest first.

        `kind` is a code or a subject; all by default. `setup` is true for only the anomalies of the
        deployment's set-up (administration before the first job), false for only the others.
        """
        query = with_position(anomalies)
        if kind is not None:
            if kind not in ANOMALY_KINDS:
                raise UsageError(
                    f"{kind[:40]!r} is not a kind of anomaly",
                    hint=f"There are {', '.join(ANOMALY_KINDS)}.",
                )
            column = anomalies.c.subject if kind in list(Subject) else anomalies.c.code
            query = query.where(column == kind)
        if setup is not None:
            first_job_block = select(
                func.coalesce(func.min(transitions.c.block), MAX_INT)
            ).scalar_subquery()
            is_setup = and_(
                anomalies.c.subject == Subject.ADMINISTRATION, anomalies.c.block < first_job_block
            )
            query = query.where(is_setup if setup else ~is_setup)
        return self._page(anomalies, query, _anomaly_row, cursor, limit)

    def open_anomalies(self) -> rm.OpenAnomalies:
        """Return the conditions that are open at the last indexed block, latest job first."""
        with self._read() as (connection, snapshot):
            entries = {
                row.id: job_entry(row) for row in connection.execute(_candidates(snapshot)).all()
            }
            challenged = select(providers.c.account).where(providers.c.answer_by != 0)
            accounts = list(connection.execute(challenged).scalars())
            challenges = [last_challenge(connection, account) for account in accounts]
        rules = AnomalyRules(self.deployment)
        rules.resume(entries.values(), challenges)
        context = TransactionContext(snapshot.number("block"), snapshot.number("time", 0))
        anomalies = rules.all_anomalies(entries, context)
        anomalies.sort(key=lambda row: -row.job_id)
        at = snapshot.at(context.block, context.time, "", None)
        return rm.OpenAnomalies(
            tuple(
                rm.AnomalyRow(at=at, **_columns(anomaly)) for anomaly in anomalies[:MAX_DETAIL_ROWS]
            ),
            len(anomalies) > MAX_DETAIL_ROWS,
        )


def anomaly_values(row: Anomaly, *, block: int, number: int, position: int) -> dict[str, Any]:
    """Return the values of a row of `anomalies`."""
    return {"block": block, "number": number, "position": position, **_columns(row)}


def _columns(row: Anomaly) -> dict[str, Any]:
    """Return the columns of an anomaly, without its position."""
    return {
        "code": row.code.value,
        "subject": SUBJECTS[row.code].value,
        "severity": row.severity.value,
        "job_id": row.job_id or None,
        "account": row.account or None,
        "message": row.message,
    }


def last_challenge(connection: Connection, account: str) -> ProviderChallenged:
    """Return the latest challenge of a provider, which must have one."""
    query = select(events).where(
        events.c.account == account, events.c.name == ProviderChallenged.__name__
    )
    row: Any = last_row(connection, query, *events.primary_key)
    event = event_of(row.name, row.body, block_number=row.block, log_index=row.log_index)
    return cast("ProviderChallenged", event)


def _candidates(snapshot: IndexSnapshot) -> Select[Any]:
    """Select the jobs that may have an open condition: claimed ones, and runs past their limit.

    An allotment is never shorter than the time limit, because the contract assigns a job only if
    its escrow covers the limit.
    """
    # While a job runs, `since` is the time up to which it is billed.
    past_limit = jobs.c.since + jobs.c.time_limit < snapshot.number("time", 0)
    overdue = and_(jobs.c.status == JobStatus.RUNNING, past_limit)
    return select(jobs).where(or_(jobs.c.status == JobStatus.SCHEDULED, overdue))


# -- blocks and transactions, and the search

#: Patterns of hashes and numbers in a search; the group contains only the digits.
HASH: Final = re.compile(r"(?:0x)?([0-9a-f]{64})")
NUMBER: Final = re.compile(r"#?([0-9]{1,18})")
#: Maximum number of jobs in a search result.
MAX_HITS: Final = 20
_TRANSACTIONS: Final = select(transactions, headers.c.time).join(
    headers, headers.c.number == transactions.c.block
)


class BlockQueries(Reader):
    """Queries for blocks and transactions with events of the grid. Others are not indexed."""

    def blocks(
        self, cursor: str | int | None = None, limit: int = DEFAULT_LIMIT
    ) -> rm.Page[rm.BlockRow]:
        """Return blocks, latest first."""
        return self._page(headers, select(headers), _block, cursor, limit)

    def block(self, number_or_hash: int | str) -> rm.BlockDetail:
        """Return a block with events of the grid by its number or hash."""
        if isinstance(number_or_hash, int):
            key = headers.c.number == min(number_or_hash, MAX_INT)
        else:
            key = headers.c.hash == number_or_hash.lower()
        with self._read() as (connection, snapshot):
            row = connection.execute(select(headers).where(key)).one_or_none()
            if row is None:
                raise NotFoundError(
                    f"Block {str(number_or_hash)[:80]} has no event of this grid, or is not indexed yet"
                )
            query = _TRANSACTIONS.where(transactions.c.block == row.number)
            rows, more = first_rows(connection, query, transactions.c.position)
            items = tuple(_transaction(row, snapshot) for row in rows)
            return rm.BlockDetail(_block(row, snapshot), items, more)

    def transactions(
        self,
        cursor: str | int | None = None,
        limit: int = DEFAULT_LIMIT,
        *,
        sender: str | None = None,
        signer: str | None = None,
        block: int | None = None,
    ) -> rm.Page[rm.TransactionRow]:
        """Return transactions, latest first.

        `sender` is the address that sent them and paid their gas, `signer` an address that signed
        requests which relayers submitted in them.
        """
        query = _TRANSACTIONS.where(*has_account(transactions.c.sender, sender))
        if signer is not None:
            own_request = forwarded.c.signer == address(signer)
            requests = select(forwarded.c.number).where(own_request, _same_transaction(forwarded))
            query = query.where(requests.exists())
        if block is not None:
            query = query.where(transactions.c.block == min(block, MAX_INT))
        return self._page(transactions, query, _transaction, cursor, limit)

    def transaction(self, tx_hash: str) -> rm.TransactionDetail:
        """Return a transaction with its events of the grid and its movements of credits."""
        with self._read() as (connection, snapshot):
            query = _TRANSACTIONS.where(transactions.c.hash == tx_hash.lower())
            row = connection.execute(query).one_or_none()
            if row is None:
                raise NotFoundError(
                    f"Transaction {tx_hash[:80]} has no event of this grid, or is not indexed yet"
                )
            return _transaction_detail(connection, row, snapshot)

    def search(self, text: str) -> tuple[rm.Hit, ...]:
        """Search for a job ID or name, an address, a hash, a block number or a provider ID."""
        query = text.strip()[:200]
        if not query:
            return ()
        with self._read() as (connection, _):
            if is_address(query):
                return _address_hits(connection, address(query.lower()))
            if match := HASH.fullmatch(query.lower()):
                return _hash_hits(connection, match[1])
            same_name = jobs.c.name_key.contains(query.casefold(), autoescape=True)
            return (*_number_hits(connection, query), *_job_hits(connection, same_name))


def _address_hits(connection: Connection, account: str) -> tuple[rm.Hit, ...]:
    ids = connection.execute(select(providers.c.id).where(providers.c.account == account))
    hits = [
        rm.Hit("provider", account, f"provider {number or account}") for number in ids.scalars()
    ]
    return (*hits, rm.Hit("account", account, account))


def _hash_hits(connection: Connection, digits: str) -> tuple[rm.Hit, ...]:
    key = "0x" + digits
    hits = []
    if connection.execute(select(headers.c.number).where(headers.c.hash == key)).first():
        hits.append(rm.Hit("block", key, key))
    if connection.execute(select(transactions.c.block).where(transactions.c.hash == key)).first():
        hits.append(rm.Hit("transaction", key, key))
    return (*hits, *_job_hits(connection, jobs.c.definition == digits))


def _number_hits(connection: Connection, query: str) -> list[rm.Hit]:
    match = NUMBER.fullmatch(query)
    if match is None:
        return []
    number = int(match[1])
    hits = _job_hits(connection, jobs.c.id == number)
    if connection.execute(select(headers.c.number).where(headers.c.number == number)).first():
        hits.append(rm.Hit("block", str(number), f"block {number}"))
    accounts = connection.execute(select(providers.c.account).where(providers.c.id == number))
    hits += [rm.Hit("provider", account, f"provider {number}") for account in accounts.scalars()]
    return hits


def _job_hits(connection: Connection, condition: ColumnElement[bool]) -> list[rm.Hit]:
    query = select(jobs.c.id, jobs.c.name).where(condition)
    rows = connection.execute(query.order_by(jobs.c.id.desc()).limit(MAX_HITS))
    return [rm.Hit("job", str(row.id), row.name) for row in rows]


def _block(row: Row[Any], snapshot: IndexSnapshot) -> rm.BlockRow:
    return from_attributes(rm.BlockRow, row, finalized=row.number <= snapshot.finalized)


def _transaction_detail(
    connection: Connection, row: Row[Any], snapshot: IndexSnapshot
) -> rm.TransactionDetail:
    def of_transaction(table: Table, query: Select[Any]) -> Select[Any]:
        return query.where(table.c.block == row.block, table.c.position == row.position)

    event_query = of_transaction(events, with_position(events))
    event_rows, more_events = first_rows(connection, event_query, events.c.log_index)
    movement_query = of_transaction(movements, with_position(movements))
    movement_query = movement_query.order_by(movements.c.number).limit(2 * MAX_DETAIL_ROWS)
    movement_rows = connection.execute(movement_query)
    request_query = of_transaction(forwarded, select(forwarded)).order_by(forwarded.c.number)
    request_rows = connection.execute(request_query)
    return from_attributes(
        rm.TransactionDetail,
        row,
        row=_transaction(row, snapshot),
        input="0x" + row.input.hex(),
        forwarded=tuple(from_attributes(rm.ForwardedRow, request) for request in request_rows),
        events=tuple(event_row(event, snapshot) for event in event_rows),
        more_events=more_events,
        movements=tuple(movement_row(movement, snapshot) for movement in movement_rows),
    )


MAX_CHANGES: Final = 200
#: Name of the follower that writes the tables.
CURSOR: Final = "index"


class Index(
    JobQueries, AccountQueries, RegistryQueries, BlockQueries, SeriesQueries, AnomalyQueries
):
    """All queries of the index. The database must be opened by `IndexDatabase.open`."""

    def status(self) -> rm.Status:
        """Return the progress and the grid of the index."""
        with self._read() as (connection, snapshot):
            query = select(blocks.c.hash).where(blocks.c.name == CURSOR)
            cursor = last_row(connection, query, blocks.c.number)
            return from_attributes(
                rm.Status,
                self.deployment,
                genesis=snapshot.values.get("genesis", ""),
                start_block=self.deployment.block,
                block=snapshot.number("block"),
                block_hash=cursor.hash if cursor is not None else "",
                time=snapshot.number("time", 0),
                finalized=snapshot.finalized,
                head=snapshot.number("head"),
                head_time=snapshot.number("head_time", 0),
                change=snapshot.number("change", 0),
                built_since=float(snapshot.values.get("built_since", 0)),
            )

    def changes(self, since: int, limit: int = MAX_CHANGES) -> rm.Changes:
        """Return the changes after the given change number, for live pages."""
        with self._read() as (connection, snapshot):
            latest = snapshot.number("change", 0)
            query = select(changes).where(changes.c.number > since).order_by(changes.c.number)
            rows = connection.execute(query.limit(limit)).all()
            oldest = connection.execute(select(func.min(changes.c.number))).scalar()
        items = tuple(from_attributes(rm.Change, row, jobs=tuple(row.jobs)) for row in rows)
        missed = since > latest or (since < latest and (oldest is None or oldest > since + 1))
        return rm.Changes(items[-1].number if items else latest, items, missed)
