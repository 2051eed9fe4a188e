"""The database of the index: an SQLite file, or a PostgreSQL server that several programs share."""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Final, Self

from sqlalchemy import URL, Connection, delete, func, insert, make_url, select
from sqlalchemy.exc import ArgumentError, DatabaseError

from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.errors import UsageError
from deepsquare_chain.indexer.migrations import migrate
from deepsquare_chain.indexer.queries import get_state
from deepsquare_chain.indexer.writer import clear, put_state
from deepsquare_chain.store.base import CursorTables, blocks, identity

DRIVER: Final = "postgresql+psycopg"
_NAMES: Final = {
    "chain_id": "chain",
    "scheduler": "scheduler",
    "genesis": "chain (same ID, other genesis block)",
}


class IndexDatabase(CursorTables):
    """Tables, cursor and identity of one index. Use `IndexDatabase.open` to create it."""

    _writer_lock: IO[bytes] | Connection | None = None

    @classmethod
    def open(
        cls,
        where: str | Path | None,
        deployment: Deployment,
        *,
        genesis: str = "",
        writer: bool = False,
        rebuild: bool = False,
    ) -> Self:
        """Open the database; create or migrate it if necessary.

        Args:
            where: A file, a URL such as `postgresql+psycopg://user@host/name`, or None for memory.
                The PostgreSQL password is read as by libpq (PGPASSWORD, ~/.pgpass).
            deployment: Deployment of the grid that it belongs to.
            genesis: Hash of the chain's first block; not checked if empty.
            writer: Whether to open for writing. Only one process at a time can be the writer.
                Only a writer migrates an existing database.
            rebuild: Delete all data first; for a writer.

        Raises:
            UsageError: It belongs to another grid or to a newer program version, is not a
                database, already has a writer, or the URL is invalid.
            StoreError: The disk is full, or the server does not answer.
        """
        database = cls._unopened(where)
        try:
            database.prepare(deployment, genesis, writer=writer, rebuild=rebuild)
        except BaseException:
            database.close()
            raise
        return database

    def prepare(self, deployment: Deployment, genesis: str, *, writer: bool, rebuild: bool) -> None:
        """Lock, migrate and identify the database; see `open`."""
        if writer:
            self._writer_lock = self._acquire_lock()
        with self.begin() as connection:
            migrate(connection, self.location, writer=writer)
            if rebuild or not get_state(connection):
                clear(connection)
                connection.execute(delete(identity))
                connection.execute(delete(blocks))
            self._identify(connection, deployment, genesis)

    @classmethod
    def _unopened(cls, where: str | Path | None) -> Self:
        if where is None:
            return cls(None)
        if isinstance(where, str) and "://" in where:
            return cls(None, url=_url(where))
        path = Path(where)
        with suppress(OSError):  # opening the file reports the error
            path.parent.mkdir(parents=True, exist_ok=True)
        return cls(path)

    @contextmanager
    def begin(self, *, durable: bool = False) -> Iterator[Connection]:
        """Begin a transaction like `Database.begin`, but not durable by default.

        Lost transactions can be read from the chain again.
        """
        with super().begin(durable=durable) as connection:
            yield connection

    def close(self) -> None:
        """Close the database and release the writer lock. Idempotent."""
        lock, self._writer_lock = self._writer_lock, None
        if lock is not None:
            # If the server is gone, the lock is already released.
            with suppress(DatabaseError):
                lock.close()
        super().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check_writer(self) -> None:
        """Check that this process still holds the writer lock; acquire it again if necessary.

        A PostgreSQL server releases the lock when it restarts.

        Raises:
            UsageError: Another process has become the writer.
            StoreError: The server does not answer.
        """
        if not isinstance(self._writer_lock, Connection):
            return
        try:
            self._writer_lock.execute(select(1))
        except DatabaseError:
            self._writer_lock.invalidate()
            self._writer_lock.close()
            self._writer_lock = self._acquire_lock()

    def _acquire_lock(self) -> IO[bytes] | Connection | None:
        """Acquire a lock that is released when the process ends, even by a crash."""
        if self.url is not None:
            return self._lock_server()
        if self.path is None:
            return None
        lock = self.path.with_name(self.path.name + ".lock").open("ab")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise self._locked_error() from None
        return lock

    def _lock_server(self) -> Connection:
        key = int.from_bytes(hashlib.sha256(b"deepsquare index").digest()[:7], "big")
        try:
            connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
            if connection.execute(select(func.pg_try_advisory_lock(key))).scalar():
                return connection
        except DatabaseError as error:
            raise self.plain(error) from error
        connection.close()
        raise self._locked_error()

    def _locked_error(self) -> UsageError:
        return UsageError(
            f"The index {self.location} is being written by another process",
            hint="Only one `deepsquare explorer serve` or `explorer index` can write it at a time.",
        )

    def _identify(self, connection: Connection, deployment: Deployment, genesis: str) -> None:
        expected = {
            "chain_id": str(deployment.chain_id),
            "scheduler": deployment.scheduler.lower(),
            **({"genesis": genesis.lower()} if genesis else {}),
        }
        stored = {row.key: row.value for row in connection.execute(select(identity))}
        for key, value in expected.items():
            if key not in stored:
                connection.execute(insert(identity).values(key=key, value=value))
                put_state(connection, **{key: value})
            elif stored[key] != value:
                raise UsageError(
                    f"The index {self.location} belongs to another {_NAMES[key]}: {stored[key]}, "
                    f"not {value}",
                    hint="Give another --database, or `deepsquare explorer index --rebuild` if "
                    "its chain is gone.",
                )


def _url(text: str) -> URL:
    try:
        url = make_url(text)
    except ArgumentError:
        raise UsageError("The database's URL can't be read") from None
    if url.drivername != DRIVER:
        raise UsageError(
            f"An index can't be stored in {url.drivername}",
            hint=f"Give a file, or {DRIVER}://user@host/name.",
        )
    if url.password is not None:
        raise UsageError(
            "A database's URL must not contain its password",
            hint="Give it by PGPASSWORD or ~/.pgpass, as for other PostgreSQL clients.",
        )
    return url
