"""Shared by all queries: snapshots, pagination, and conversion of rows to read models."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeVar

import pydantic_core
from eth_utils.address import to_checksum_address
from sqlalchemy import ColumnElement, Connection, Row, Select, Table, func, select, tuple_

from deepsquare_chain.audit.entries import ZERO_ADDRESS, from_attributes
from deepsquare_chain.chain.bindings.calls import checked_address
from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.errors import UsageError
from deepsquare_chain.indexer.read_models import EventRow, MovementRow, NumberedPage, Page, Place
from deepsquare_chain.indexer.schema import headers, state, transactions
from deepsquare_chain.store.base import Database

MAX_LIMIT: Final = 200
DEFAULT_LIMIT: Final = 50
#: Highest page number that can be requested. The database scans all rows of earlier pages.
MAX_PAGE: Final = 10_000
#: Rows of each kind that a detail view includes; more rows require pagination.
MAX_DETAIL_ROWS: Final = 200
_MAX_INT: Final = 2**63 - 1

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

    def at(self, block: int, time: int, tx_hash: str, log_index: int | None) -> Place:
        """Return a position on the chain, marked as finalized or not."""
        return Place(block, time, tx_hash, log_index, block <= self.finalized)

    def place(self, row: Row[Any], log_index: int | None) -> Place:
        """Return the position of a row that has `block`, `time` and transaction `hash`."""
        return self.at(row.block, row.time, row.hash, log_index)


class Reader:
    """Base of query classes: a database, and the deployment whose events it contains."""

    def __init__(self, database: Database, deployment: Deployment) -> None:
        self.database = database
        self.deployment = deployment
        self._aliases: dict[str, str] = {
            str(to_checksum_address(address)): name
            for name, address in (
                ("treasury", deployment.treasury),
                *deployment.contracts.items(),
                ("nobody", ZERO_ADDRESS),
            )
        }

    @contextmanager
    def _read(self) -> Iterator[tuple[Connection, IndexSnapshot]]:
        """Open a read transaction, and yield it with its snapshot."""
        with self.database.read() as connection:
            state_rows = connection.execute(select(state.c.key, state.c.value))
            yield connection, IndexSnapshot({row.key: row.value for row in state_rows})

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
    ) -> Page[T]:
        """Return a page of a query, latest rows first by default.

        A cursor contains the key of the last row, so that rows that are added or removed in the
        meantime do not cause duplicates or gaps. If `cursor` is a page number, the result is a
        `NumberedPage`.

        Args:
            table: The table whose rows are listed.
            query: Selects the rows, with a column of the name of each key.
            make: Converts a row to a read model.
            cursor: `next` of the previous page, or a page number.
            limit: Rows per page.
            kind: Name of the list in its cursors; the name of the table by default.
            keys: Integer columns that order the rows; the primary key of the table by default.
            oldest_first: Whether to reverse the order.
            order: Columns to sort by first. Such a list has page numbers only, and begins with 1.

        Raises:
            UsageError: The cursor belongs to another list, or page or limit is out of bounds.
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
                return NumberedPage(items, None, cursor, pages, total)
            kind = kind or table.name
            if cursor is not None:
                last_key = tuple(decode_cursor(kind, cursor, len(keys)))
                row_key: Any = tuple_(*keys)
                query = query.where(row_key > last_key if oldest_first else row_key < last_key)
            rows = connection.execute(query.order_by(*columns).limit(limit + 1)).all()
            items = tuple(make(row, snapshot) for row in rows[:limit])
        if len(rows) <= limit:
            return Page(items, None)
        last_row = rows[limit - 1]
        return Page(items, encode_cursor(kind, [getattr(last_row, str(key.key)) for key in keys]))


def address(text: str) -> str:
    """Return a checksummed address, as stored in the tables. Raises UsageError if invalid."""
    return str(checked_address(text))


class TimeRange(NamedTuple):
    """A range of chain time in seconds: `start` inclusive, `end` exclusive, None for no bound."""

    start: int | None
    end: int | None


def in_period(time: ColumnElement[int], period: TimeRange) -> list[ColumnElement[bool]]:
    """Return the conditions for rows whose time lies in a period."""
    bounds = []
    if period.start is not None:
        bounds.append(time >= period.start)
    if period.end is not None:
        bounds.append(time < period.end)
    return bounds


def encode_cursor(kind: str, key: Sequence[Any]) -> str:
    """Encode a key of a list as an opaque cursor."""
    body = json.dumps([kind, *key], separators=(",", ":")).encode()
    return base64.urlsafe_b64encode(body).rstrip(b"=").decode()


def decode_cursor(kind: str, cursor: str, size: int) -> list[int]:
    """Decode the key of a cursor.

    Raises:
        UsageError: It is not a cursor of this list.
    """
    try:
        padded = cursor + "=" * (-len(cursor) % 4)
        parts = pydantic_core.from_json(base64.urlsafe_b64decode(padded))
        matches = isinstance(parts, list) and parts[0] == kind and len(parts) == size + 1
        if matches and all(type(number) is int and abs(number) <= _MAX_INT for number in parts[1:]):
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
    query = select(table, transactions.c.hash, *time, *more).join(
        transactions,
        (transactions.c.block == table.c.block) & (transactions.c.position == table.c.position),
    )
    return query if not time else query.join(headers, headers.c.number == table.c.block)


def event_row(row: Row[Any], snapshot: IndexSnapshot) -> EventRow:
    """Convert a row of `placed(events)`."""
    return from_attributes(EventRow, row, at=snapshot.place(row, row.log_index), values=row.body)


def movement_row(row: Row[Any], snapshot: IndexSnapshot) -> MovementRow:
    """Convert a row of `placed(movements)`."""
    return from_attributes(
        MovementRow,
        row,
        at=snapshot.place(row, row.log_index),
        debit=max(0, -row.amount),
        credit=max(0, row.amount),
    )


def first_rows(
    connection: Connection, query: Select[Any], *order: ColumnElement[Any]
) -> tuple[Sequence[Row[Any]], bool]:
    """Return the first rows of a query for a detail view, and whether there are more."""
    rows = connection.execute(query.order_by(*order).limit(MAX_DETAIL_ROWS + 1)).all()
    return rows[:MAX_DETAIL_ROWS], len(rows) > MAX_DETAIL_ROWS
