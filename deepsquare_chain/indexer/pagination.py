"""What all queries share: moments, pages by cursor, and rows made of columns."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Final, NamedTuple, TypeVar, cast

import pydantic_core
from eth_utils.address import to_checksum_address
from sqlalchemy import ColumnElement, Connection, Row, Select, Table, func, select, tuple_

from deepsquare_chain.audit.entries import ZERO_ADDRESS
from deepsquare_chain.chain.bindings.calls import checked_address
from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.errors import UsageError
from deepsquare_chain.indexer.read_models import EventRow, MovementRow, NumberedPage, Page, Place
from deepsquare_chain.indexer.schema import headers, state, transactions
from deepsquare_chain.store.base import Database

MAX_LIMIT: Final = 200
DEFAULT_LIMIT: Final = 50
#: The last page that can be asked for by its number; a database counts up to it row by row.
MAX_PAGE: Final = 10_000
#: Rows of a kind that a detail shows before one has to page.
SHOWN: Final = 200
_MAX_INT: Final = 2**63 - 1

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class IndexSnapshot:
    """What the index knew of itself when a query began."""

    values: Mapping[str, str]

    def number(self, key: str, default: int = -1) -> int:
        """A number of the state, such as `block` or `finalized`."""
        return int(self.values.get(key, default))

    @property
    def finalized(self) -> int:
        """Last final block."""
        return self.number("finalized")

    def at(self, block: int, time: int, tx_hash: str, log_index: int | None) -> Place:
        """A place, final or not."""
        return Place(block, time, tx_hash, log_index, block <= self.finalized)

    def place(self, row: Row[Any], log_index: int | None) -> Place:
        """The place of a row with `block`, `time` and the `hash` of its transaction."""
        return self.at(row.block, row.time, row.hash, log_index)


class Reader:
    """A database, and the deployment whose events are in it."""

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
        """Reads of one moment."""
        with self.database.read() as connection:
            found = connection.execute(select(state.c.key, state.c.value))
            yield connection, IndexSnapshot({row.key: row.value for row in found})


def address(text: str) -> str:
    """An address as the tables spell it; UsageError where it is none."""
    return str(checked_address(text))


class Period(NamedTuple):
    """Seconds of chain time: from `start` up to, and without, `end`; None for no bound."""

    start: int | None
    end: int | None


def within(time: ColumnElement[int], period: Period) -> list[ColumnElement[bool]]:
    """Conditions on rows whose time lies in a period."""
    bounds = []
    if period.start is not None:
        bounds.append(time >= period.start)
    if period.end is not None:
        bounds.append(time < period.end)
    return bounds


def encode_cursor(kind: str, key: Sequence[Any]) -> str:
    """An opaque cursor."""
    body = json.dumps([kind, *key], separators=(",", ":")).encode()
    return base64.urlsafe_b64encode(body).rstrip(b"=").decode()


def decode_cursor(kind: str, cursor: str, size: int) -> list[int]:
    """The key in a cursor.

    Raises:
        UsageError: It is none of this list.
    """
    try:
        padded = cursor + "=" * (-len(cursor) % 4)
        found = pydantic_core.from_json(base64.urlsafe_b64decode(padded))
        own = isinstance(found, list) and found[0] == kind and len(found) == size + 1
        if own and all(type(each) is int and abs(each) <= _MAX_INT for each in found[1:]):
            return list(found[1:])
    except (ValueError, binascii.Error, IndexError):
        pass
    raise UsageError(
        f"{cursor[:80]!r} is no cursor of this list", hint="Begin without a cursor again."
    )


def paged(
    connection: Connection,
    query: Select[Any],
    keys: Sequence[ColumnElement[Any]],
    make: Callable[[Row[Any]], T],
    *,
    kind: str,
    cursor: str | int | None,
    limit: int,
    oldest_first: bool = False,
    order: Sequence[ColumnElement[Any]] = (),
) -> Page[T]:
    """A page of a query in the order of its integer keys, latest first.

    A cursor holds the last key that was shown, so that rows that come or vanish in between
    neither repeat nor hide others. The keys must be among the query's columns, by name. With the
    number of a page instead of a cursor, the page is a `NumberedPage`, and its rows are in `order`
    before that of the keys.

    Raises:
        UsageError: A cursor of another list, a page or a limit out of bounds.
    """
    if not 1 <= limit <= MAX_LIMIT:
        raise UsageError(f"A page has 1 to {MAX_LIMIT} rows, not {limit}")
    if isinstance(cursor, int):
        columns = [*order, *(each.desc() for each in keys)]
        return _numbered(connection, query, columns, make, number=cursor, limit=limit)
    if cursor is not None:
        last = tuple(decode_cursor(kind, cursor, len(keys)))
        here: Any = tuple_(*keys)
        query = query.where(here > last if oldest_first else here < last)
    order = keys if oldest_first else [each.desc() for each in keys]
    rows = connection.execute(query.order_by(*order).limit(limit + 1)).all()
    more = len(rows) > limit
    names = [str(each.key) for each in keys]
    following = None
    if more:
        following = encode_cursor(kind, [getattr(rows[limit - 1], name) for name in names])
    return Page(tuple(make(row) for row in rows[:limit]), following)


def _numbered(
    connection: Connection,
    query: Select[Any],
    order: Sequence[ColumnElement[Any]],
    make: Callable[[Row[Any]], T],
    *,
    number: int,
    limit: int,
) -> NumberedPage[T]:
    if not 1 <= number <= MAX_PAGE:
        raise UsageError(f"Pages have the numbers 1 to {MAX_PAGE}, not {number}")
    total = connection.execute(select(func.count()).select_from(query.subquery())).scalar_one()
    rows = connection.execute(query.order_by(*order).limit(limit).offset((number - 1) * limit))
    pages = min(MAX_PAGE, max(1, -(-total // limit)))
    return NumberedPage(tuple(make(row) for row in rows), None, number, pages, total)


# -- read models of rows


def read_model(kind: type[T], row: Row[Any], /, **converted: Any) -> T:
    """A read model of a row: its fields are the columns of the same names, but for what is given."""
    names = (each.name for each in fields(cast("Any", kind)) if each.name not in converted)
    return kind(**{name: getattr(row, name) for name in names}, **converted)


def placed(table: Table, *more: Any) -> Select[Any]:
    """Rows of a table with `hash` of their transaction and `time` of their block."""
    time = () if "time" in table.c else (headers.c.time,)
    query = select(table, transactions.c.hash, *time, *more).join(
        transactions,
        (transactions.c.block == table.c.block) & (transactions.c.position == table.c.position),
    )
    return query if not time else query.join(headers, headers.c.number == table.c.block)


def event_row(row: Row[Any], snapshot: IndexSnapshot) -> EventRow:
    """An event of `placed(events)`."""
    values = pydantic_core.from_json(row.body)
    at = snapshot.place(row, row.log_index)
    return EventRow(at, row.contract, row.name, row.job_id, values)


def movement_row(row: Row[Any], snapshot: IndexSnapshot) -> MovementRow:
    """A line of `placed(movements)`."""
    return read_model(
        MovementRow,
        row,
        at=snapshot.place(row, row.log_index),
        debit=max(0, -row.amount),
        credit=max(0, row.amount),
    )
