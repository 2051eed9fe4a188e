"""One SQLite file: connections, transactions, and errors for people."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.exc import DatabaseError
from sqlalchemy.pool import StaticPool

from deepsquare_chain.errors import GridError, UsageError

BUSY_SECONDS: Final = 15
_MODE: Final = "deepsquare_mode"


class StoreError(GridError):
    """The database can't be read or written now: disk full, locked, taken away."""


class Database:
    """A database file, or memory; what the parts of a store share."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._engine = _engine(path)

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
                self._engine.connect().execution_options(**options) as connection,
                connection.begin(),
            ):
                yield connection
        except DatabaseError as error:
            raise self._plain(error) from error

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """Reads of one moment, which block nobody."""
        try:
            with self._engine.connect().execution_options(**{_MODE: "read"}) as connection:
                yield connection
        except DatabaseError as error:
            raise self._plain(error) from error

    def close(self) -> None:
        """Close all connections; harmless when closed."""
        self._engine.dispose()

    def _plain(self, error: DatabaseError) -> GridError:
        where = self.path or "in memory"
        cause = error.orig
        if isinstance(cause, sqlite3.DatabaseError) and not isinstance(
            cause, sqlite3.OperationalError | sqlite3.IntegrityError
        ):
            return UsageError(
                f"{where} is no usable database: {cause}",
                hint="Restore it from a copy, or begin with an empty state folder.",
            )
        return StoreError(
            f"The database {where} failed: {cause}",
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
