"""Databases: connections, transactions, and readable errors.

Each service has a SQLite file; PostgreSQL is used by URL where several programs share the data.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from threading import RLock
from typing import Any, Final

from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.exc import DatabaseError
from sqlalchemy.pool import StaticPool

from deepsquare_chain.errors import GridError, StoreError, UsageError

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
        self._turn: AbstractContextManager[object] = RLock() if in_memory else nullcontext()

    @property
    def place(self) -> str:
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
                self._turn,
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
                self._turn,
                self._engine.connect().execution_options(**{_MODE: "read"}) as connection,
            ):
                yield connection
        except DatabaseError as error:
            raise self.plain(error) from error

    def close(self) -> None:
        """Close all connections; idempotent."""
        self._engine.dispose()

    def plain(self, error: DatabaseError) -> GridError:
        """Translate a database error into an error of this program."""
        cause = error.orig
        if self.url is not None:
            reason = " ".join(str(cause).split())[:300]
            return StoreError(
                f"The database {self.place} failed: {reason}",
                hint="Is the server running, and does the database exist?",
            )
        if isinstance(cause, sqlite3.DatabaseError) and not isinstance(
            cause, sqlite3.OperationalError | sqlite3.IntegrityError
        ):
            return UsageError(
                f"{self.place} is no usable database: {cause}",
                hint="Restore it from a copy, or begin with an empty state folder.",
            )
        return StoreError(
            f"The database {self.place} failed: {cause}",
            hint="Is the disk full, or the folder not writable?",
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
