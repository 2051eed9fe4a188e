"""One database: connections, transactions, and errors for people.

A SQLite file for each service; PostgreSQL by URL where several programs share what is in it.
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
    """A database file, memory, or a server; what the parts of a store share.

    Args:
        path: The SQLite file; None for memory, or where `url` is given.
        url: A PostgreSQL server's database.
    """

    def __init__(self, path: Path | None, *, url: URL | None = None) -> None:
        self.path = path
        self.url = url
        self._engine = _engine(path) if url is None else _server(url)
        # Memory is one connection, which threads take in turns.
        in_memory = path is None and url is None
        self._turn: AbstractContextManager[object] = RLock() if in_memory else nullcontext()

    @property
    def place(self) -> str:
        """Where it is, for people: without any password."""
        if self.url is not None:
            return self.url.render_as_string(hide_password=True)
        return "in memory" if self.path is None else str(self.path)

    @contextmanager
    def begin(self, *, durable: bool = True) -> Iterator[Connection]:
        """One transaction: committed at the end of the block, undone if it raises.

        Writers take turns from the start, so that a value read in it stays true until the end.

        Args:
            durable: Whether it must outlive a power cut. A killed process never loses anything;
                without this a power cut may undo the last ones, in exchange for speed.

        Raises:
            StoreError: The disk is full, or another process holds the database too long.
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
        """Reads of one moment, which block nobody."""
        try:
            with (
                self._turn,
                self._engine.connect().execution_options(**{_MODE: "read"}) as connection,
            ):
                yield connection
        except DatabaseError as error:
            raise self.plain(error) from error

    def close(self) -> None:
        """Close all connections; harmless when closed."""
        self._engine.dispose()

    def plain(self, error: DatabaseError) -> GridError:
        """What a failure means, in words for people."""
        cause = error.orig
        if self.url is not None:
            words = " ".join(str(cause).split())[:300]
            return StoreError(
                f"The database {self.place} failed: {words}",
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
    # A connection that the server closed meanwhile is replaced before its use.
    engine = create_engine(url, pool_pre_ping=True, connect_args={"connect_timeout": BUSY_SECONDS})
    event.listen(engine, "begin", _begin_on_server)
    return engine


def _prepare(connection: Any, _record: Any) -> None:
    # The driver would begin transactions late; `_begin` does it at the right moment.
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "foreign_keys=ON", f"busy_timeout={BUSY_SECONDS * 1_000}"):
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: Connection) -> None:
    mode = connection.get_execution_options().get(_MODE, "durable")
    if mode == "read":
        connection.exec_driver_sql("BEGIN")
        return
    # What is recorded before it is done must outlive a power cut.
    connection.exec_driver_sql(f"PRAGMA synchronous={'FULL' if mode == 'durable' else 'NORMAL'}")
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _begin_on_server(connection: Connection) -> None:
    mode = connection.get_execution_options().get(_MODE, "durable")
    if mode == "read":
        # One moment for all questions of a page, as SQLite's reads have it.
        words = "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY"
        connection.exec_driver_sql(words)
    elif mode == "quick":
        connection.exec_driver_sql("SET LOCAL synchronous_commit = off")
