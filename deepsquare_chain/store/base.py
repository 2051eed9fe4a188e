"""Databases: connections, transactions, and readable errors.

Each service has a SQLite file; PostgreSQL is used by URL where several programs share the data.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from threading import RLock
from typing import Any, Final

from sqlalchemy import (
    URL,
    Boolean,
    Column,
    Connection,
    Dialect,
    Engine,
    Executable,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    bindparam,
    create_engine,
    delete,
    event,
    insert,
    select,
)
from sqlalchemy.exc import DatabaseError
from sqlalchemy.pool import StaticPool

from deepsquare_chain.chain.follower import Block
from deepsquare_chain.errors import GridError, StoreError, UsageError

# -- tables of every service's database, and the column type for amounts of money

#: Other modules define their own tables with this metadata; `Store.open` creates them.
metadata: Final = MetaData()


class Amount(TypeDecorator[int]):
    """An integer of any size, stored as text: SQLite's numbers would lose precision in wei."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: int | None, dialect: Dialect) -> str | None:  # noqa: ARG002
        """Convert to text for the database."""
        return None if value is None else str(int(value))

    def process_result_value(self, value: Any, dialect: Dialect) -> int | None:  # noqa: ARG002
        """Convert back to an integer."""
        return None if value is None else int(value)


identity: Final = Table(
    "identity",
    metadata,
    Column("key", String, primary_key=True),
    Column("value", Text, nullable=False),
)

blocks: Final = Table(
    "blocks",
    metadata,
    Column("name", String, primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("hash", String, nullable=False),
)

outbox: Final = Table(
    "outbox",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("nonce", Integer, nullable=False),
    Column("key", String, nullable=True),
    Column("to", String, nullable=False),
    Column("data", LargeBinary, nullable=False),
    Column("value", Amount, nullable=False),
    Column("label", Text, nullable=False),
    Column("gas", Integer, nullable=False),
    Column("state", String, nullable=False),
    Column("mined_hash", String, nullable=False, default=""),
    Column("note", Text, nullable=False, default=""),
    Column("created", Integer, nullable=True),
    Column("fee", Amount, nullable=True),
)

# The nonce of an abandoned transaction is free again, and so is the key of a failed one.
_has_nonce = outbox.c.state != "abandoned"
_has_key = outbox.c.state.in_(["open", "mined"])
Index("outbox_nonce", outbox.c.nonce, unique=True, sqlite_where=_has_nonce)
Index("outbox_key", outbox.c.key, unique=True, sqlite_where=_has_key)
Index("outbox_state", outbox.c.state)

attempts: Final = Table(
    "outbox_attempts",
    metadata,
    # Not the hash: an abandoned transaction that is signed again has the same bytes.
    Column("entry_id", Integer, primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("tx_hash", String, nullable=False),
    Column("raw", LargeBinary, nullable=False),
    Column("max_fee", Amount, nullable=False),
    Column("priority_fee", Amount, nullable=False),
    Column("sent_block", Integer, nullable=False),
    Column("cancels", Boolean, nullable=True),
)

#: Tables that got more columns, all nullable, after a release.
EXTENDED_TABLES: Final = (outbox, attempts)


BUSY_SECONDS: Final = 15
_MODE: Final = "deepsquare_mode"


class Database:
    """A database in a SQLite file, in memory, or on a PostgreSQL server; base of all stores.

    Args:
        path: The SQLite file; None for a database in memory, or with `url`.
        url: URL of a PostgreSQL database.
    """

    def __init__(self, path: Path | None, *, url: URL | None = None) -> None:
        self.path = path
        self.url = url
        self._engine = _engine(path) if url is None else _server(url)
        # A database in memory is one connection, which threads use in turns.
        in_memory = path is None and url is None
        self._memory_lock: AbstractContextManager[object] = RLock() if in_memory else nullcontext()

    @property
    def location(self) -> str:
        """Location of the database for messages, without password."""
        if self.url is not None:
            return self.url.render_as_string(hide_password=True)
        return "in memory" if self.path is None else str(self.path)

    @contextmanager
    def begin(self, *, durable: bool = True) -> Iterator[Connection]:
        """Run a write transaction: committed at the end of the block, rolled back on an exception.

        The write lock is taken at the start, so that values read in it stay valid until its end.

        Args:
            durable: Whether the transaction must survive a power cut. A killed process never
                loses a commit; without `durable` a power cut may undo the last commits, in
                exchange for speed.

        Raises:
            StoreError: The disk is full, or another process locks the database too long.
        """
        try:
            options = {_MODE: "durable" if durable else "quick"}
            with (
                self._memory_lock,
                self._engine.connect().execution_options(**options) as connection,
                connection.begin(),
            ):
                yield connection
        except DatabaseError as error:
            raise self.plain(error) from error

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """Run reads on one snapshot, without blocking writers."""
        try:
            with (
                self._memory_lock,
                self._engine.connect().execution_options(**{_MODE: "read"}) as connection,
            ):
                yield connection
        except DatabaseError as error:
            raise self.plain(error) from error

    def rows(self, query: Executable, values: Mapping[str, Any] | None = None) -> list[Any]:
        """Return all rows of one query, with values for its parameters."""
        with self.read() as connection:
            return list(connection.execute(query, values))

    def scalar(self, query: Executable) -> Any:
        """Return the first value of the first row of one query; None without a row."""
        with self.read() as connection:
            return connection.execute(query).scalar()

    def write(self, *statements: Executable, durable: bool = True) -> None:
        """Execute statements in one transaction; see `begin`."""
        with self.begin(durable=durable) as connection:
            for statement in statements:
                connection.execute(statement)

    def close(self) -> None:
        """Close all connections; idempotent."""
        self._engine.dispose()

    def plain(self, error: DatabaseError) -> GridError:
        """Translate a database error into an error of this program."""
        cause = error.orig
        if self.url is not None:
            reason = " ".join(str(cause).split())[:300]
            return StoreError(
                f"The database {self.location} failed: {reason}",
                hint="Check that the server is running and the database exists.",
            )
        if isinstance(cause, sqlite3.DatabaseError) and not isinstance(
            cause, sqlite3.OperationalError | sqlite3.IntegrityError
        ):
            return UsageError(
                f"{self.location} is not a usable database: {cause}",
                hint="Restore it from a backup, or start with an empty state folder.",
            )
        return StoreError(
            f"The database {self.location} failed: {cause}",
            hint="Check the free disk space, and that the folder is writable.",
        )


def _engine(path: Path | None) -> Engine:
    if path is None:
        engine = create_engine(
            "sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False}
        )
    else:
        engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": BUSY_SECONDS})
    event.listen(engine, "connect", _prepare)
    event.listen(engine, "begin", _begin)
    return engine


def _server(url: URL) -> Engine:
    # Connections that the server closed are replaced before use.
    engine = create_engine(url, pool_pre_ping=True, connect_args={"connect_timeout": BUSY_SECONDS})
    event.listen(engine, "begin", _begin_on_server)
    return engine


def _prepare(connection: Any, _record: Any) -> None:
    # The driver would begin transactions late; `_begin` does it instead.
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "foreign_keys=ON", f"busy_timeout={BUSY_SECONDS * 1_000}"):
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: Connection) -> None:
    mode = connection.get_execution_options().get(_MODE, "durable")
    if mode == "read":
        connection.exec_driver_sql("BEGIN")
        return
    # Intents that are recorded before an action must survive a power cut.
    connection.exec_driver_sql(f"PRAGMA synchronous={'FULL' if mode == 'durable' else 'NORMAL'}")
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _begin_on_server(connection: Connection) -> None:
    mode = connection.get_execution_options().get(_MODE, "durable")
    if mode == "read":
        # One snapshot for all queries of a page, as with SQLite.
        statement = "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY"
        connection.exec_driver_sql(statement)
    elif mode == "quick":
        connection.exec_driver_sql("SET LOCAL synchronous_commit = off")


# -- tables of the follower's cursors


# Built once: SQLAlchemy takes longer to build these statements than SQLite to execute them.
_RECENT_BLOCKS: Final = (
    select(blocks.c.number, blocks.c.hash)
    .where(blocks.c.name == bindparam("follower"))
    .order_by(blocks.c.number.desc())
)
_REWIND: Final = delete(blocks).where(
    blocks.c.name == bindparam("follower"), blocks.c.number > bindparam("last")
)
_FORGET_BLOCKS: Final = delete(blocks).where(
    blocks.c.name == bindparam("follower"),
    blocks.c.number
    < select(blocks.c.number)
    .where(blocks.c.name == bindparam("follower"))
    .order_by(blocks.c.number.desc())
    .offset(bindparam("newer"))
    .limit(1)
    .scalar_subquery(),
)
_ADD_BLOCK: Final = insert(blocks)


class CursorTables(Database):
    """Implements `deepsquare_chain.chain.follower.CursorStore` for connections."""

    def recent_blocks(self, name: str) -> Sequence[Block]:
        """Return the kept blocks of a follower, latest first; the first one is its cursor."""
        rows = self.rows(_RECENT_BLOCKS, {"follower": name})
        return [Block(number, block_hash) for number, block_hash in rows]

    def advance(self, transaction: Connection, name: str, seen: Sequence[Block], keep: int) -> None:
        """Move the cursor to the last of these blocks and keep the latest `keep`."""
        latest = seen[-keep:]
        self.rewind(transaction, name, latest[0].number - 1)
        rows = [{"name": name, "number": block.number, "hash": block.hash} for block in latest]
        transaction.execute(_ADD_BLOCK, rows)
        transaction.execute(_FORGET_BLOCKS, {"follower": name, "newer": keep - 1})

    def rewind(self, transaction: Connection, name: str, number: int) -> None:
        """Forget every block after this one."""
        transaction.execute(_REWIND, {"follower": name, "last": number})
