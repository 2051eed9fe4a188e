"""The database of the index: a file of its own, or a PostgreSQL server that several share."""

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
from deepsquare_chain.indexer.writer import clear, get_state, put_state
from deepsquare_chain.store.cursors import CursorTables
from deepsquare_chain.store.schema import blocks, identity

DRIVER: Final = "postgresql+psycopg"
_NAMES: Final = {
    "chain_id": "chain",
    "scheduler": "scheduler",
    "genesis": "chain (same id, other first block)",
}


class IndexDatabase(CursorTables):
    """Tables, cursor and identity of one index; made by `IndexDatabase.open`."""

    _guard: IO[bytes] | Connection | None = None

    @classmethod
    def open(
        cls,
        where: str | Path | None,
        deployment: Deployment,
        *,
        genesis: str = "",
        writer: bool = False,
        forget: bool = False,
    ) -> Self:
        """Open the database, made and migrated if need be.

        Args:
            where: A file, a URL such as `postgresql+psycopg://user@host/name`, or None for memory.
                PostgreSQL finds its password as its own programs do (PGPASSWORD, ~/.pgpass).
            deployment: The grid that it belongs to.
            genesis: Hash of the chain's first block; not checked when empty.
            writer: Whether to write: one program at a time does. Only a writer migrates a
                database that exists already.
            forget: Begin anew whatever is in it; for a writer.

        Raises:
            UsageError: It is of another grid, of a newer program, no database, has a writer
                already, or the URL is none.
            StoreError: The disk is full, or the server does not answer.
        """
        found = cls._at(where)
        try:
            found.prepare(deployment, genesis, writer=writer, forget=forget)
        except BaseException:
            found.close()
            raise
        return found

    def prepare(
        self, deployment: Deployment, genesis: str, *, writer: bool, forget: bool = False
    ) -> None:
        """See `open`."""
        if writer:
            self._guard = self._only_writer()
        with self.begin() as connection:
            migrate(connection, self.place, writer=writer)
            if forget or not get_state(connection):
                clear(connection)
                connection.execute(delete(identity))
                connection.execute(delete(blocks))
            self._identify(connection, deployment, genesis)

    @classmethod
    def _at(cls, where: str | Path | None) -> Self:
        if where is None:
            return cls(None)
        if isinstance(where, str) and "://" in where:
            return cls(None, url=_url(where))
        path = Path(where)
        with suppress(OSError):  # opening it says what is wrong
            path.parent.mkdir(parents=True, exist_ok=True)
        return cls(path)

    @contextmanager
    def begin(self, *, durable: bool = False) -> Iterator[Connection]:
        """As `Database.begin`; all of it can be read from the chain again, so that speed wins."""
        with super().begin(durable=durable) as connection:
            yield connection

    def close(self) -> None:
        """Close it and let others write; harmless when closed."""
        guard, self._guard = self._guard, None
        if guard is not None:
            # A server that is gone has let go of the lock already.
            with suppress(DatabaseError):
                guard.close()
        super().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check_writer(self) -> None:
        """See that this process may still write: a server that restarted has forgotten.

        Raises:
            UsageError: Another process writes by now.
            StoreError: The server does not answer.
        """
        if not isinstance(self._guard, Connection):
            return
        try:
            self._guard.execute(select(1))
        except DatabaseError:
            self._guard.invalidate()
            self._guard.close()
            self._guard = self._only_writer()

    def _only_writer(self) -> IO[bytes] | Connection | None:
        """A lock that ends with the process, however it ends."""
        if self.url is not None:
            return self._lock_server()
        if self.path is None:
            return None
        guard = self.path.with_name(self.path.name + ".lock").open("ab")
        try:
            fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            guard.close()
            raise self._taken() from None
        return guard

    def _lock_server(self) -> Connection:
        key = int.from_bytes(hashlib.sha256(b"deepsquare index").digest()[:7], "big")
        try:
            connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
            if connection.execute(select(func.pg_try_advisory_lock(key))).scalar():
                return connection
        except DatabaseError as error:
            raise self.plain(error) from error
        connection.close()
        raise self._taken()

    def _taken(self) -> UsageError:
        return UsageError(
            f"The index {self.place} is being written by another process",
            hint="One `deepsquare explorer serve` or `explorer index` at a time writes it.",
        )

    def _identify(self, connection: Connection, deployment: Deployment, genesis: str) -> None:
        wanted = {
            "chain_id": str(deployment.chain_id),
            "scheduler": deployment.scheduler.lower(),
            **({"genesis": genesis.lower()} if genesis else {}),
        }
        found = {row.key: row.value for row in connection.execute(select(identity))}
        for key, value in wanted.items():
            if key not in found:
                connection.execute(insert(identity).values(key=key, value=value))
                put_state(connection, **{key: value})
            elif found[key] != value:
                raise UsageError(
                    f"The index {self.place} belongs to another {_NAMES[key]}: {found[key]}, "
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
            f"An index can't be kept in {url.drivername}",
            hint=f"Give a file, or {DRIVER}://user@host/name.",
        )
    if url.password is not None:
        raise UsageError(
            "A database's URL must not hold its password",
            hint="PostgreSQL's own ways to give it are PGPASSWORD and ~/.pgpass.",
        )
    return url
