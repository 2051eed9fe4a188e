"""The database of one service, bound to one chain, contract and account.

Further tables are defined with `metadata` by the modules that own them (before `Store.open`,
which creates them); amounts are `Amount` columns. Example:

    runs = Table("runs", metadata, Column("job_id", Integer, primary_key=True),
                 Column("paid", Amount, nullable=False))
    with store.begin() as connection:
        connection.execute(insert(runs).values(job_id=1, paid=10**18))
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import stat
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import IO, Final, Self

from sqlalchemy import Connection, insert, inspect, select

from deepsquare_chain.errors import StoreError, UsageError, WaitTimeoutError
from deepsquare_chain.store.base import Database
from deepsquare_chain.store.cursors import CursorTables
from deepsquare_chain.store.outbox import OutboxTables
from deepsquare_chain.store.requests import RequestTables
from deepsquare_chain.store.schema import GROWN, Amount, identity, metadata

__all__ = ["Amount", "Database", "Store", "metadata"]

SCHEMA: Final = "1"
#: Seconds between two tries to get a wallet's lock.
_LOCK_PAUSE: Final = 0.05


class Store(OutboxTables, RequestTables, CursorTables):
    """Outbox, signed requests, cursors and a service's own tables; made by `Store.open`."""

    def __init__(self, path: Path | None) -> None:
        super().__init__(path)
        self._guard: IO[bytes] | None = None
        self._spending = asyncio.Lock()
        self._wallet = ""  # what this machine knows the wallet by; empty without a first block

    @classmethod
    def open(
        cls,
        path: str | Path | None,
        *,
        chain_id: int,
        contract: str,
        account: str,
        genesis: str = "",
        landmark: str = "",
        exclusive: bool = False,
    ) -> Self:
        """Open the database, made if need be; None or ":memory:" keeps it in memory.

        Args:
            path: The file; it is readable by its owner only.
            chain_id: Chain that it belongs to.
            contract: Address of the MetaScheduler that it belongs to.
            account: Address of the wallet that it belongs to.
            genesis: Hash of the chain's first block, which tells a restarted local chain from the
                one before; not checked when empty.
            landmark: Hash of the block by which the chain is known again once it is deep, see
                `deepsquare_chain.chain.rpc.pool`; not checked when empty.
            exclusive: Refuse to share it with another process, for services.

        Raises:
            UsageError: It belongs to another chain, contract or account, is no database, or is
                used by another process.
            StoreError: The disk is full or the folder not writable.
        """
        file = None if path is None or str(path) == ":memory:" else Path(path)
        if file is not None:
            _make(file)
        store = cls(file)
        try:
            if exclusive and file is not None:
                store._guard = _guard(file)
            with store.begin() as connection:
                metadata.create_all(connection)
                _add_columns(connection)
            store._identify(
                {
                    "schema": SCHEMA,
                    "chain_id": str(chain_id),
                    "contract": contract.lower(),
                    "account": account.lower(),
                    **({"genesis": genesis.lower()} if genesis else {}),
                    **({"landmark": landmark.lower()} if landmark else {}),
                }
            )
        except BaseException:
            store.close()
            raise
        if genesis:
            store._wallet = f"{chain_id} {genesis} {contract} {account}".lower()
        return store

    def close(self) -> None:
        """Close the file and let others have it; harmless when closed."""
        super().close()
        if self._guard is not None:
            self._guard.close()
            self._guard = None

    @asynccontextmanager
    async def spending(self, timeout: float) -> AsyncIterator[None]:
        """The wallet's lock around an allowance and what uses it; see `Outbox.spending`."""
        async with AsyncExitStack() as held:
            try:
                async with asyncio.timeout(timeout):
                    await held.enter_async_context(self._spending)
                    if self.path is not None:
                        held.enter_context(
                            await _locked(self.path.with_name(f"{self.path.name}.spending"))
                        )
                    if self._wallet and (folder := _lock_folder()) is not None:
                        held.enter_context(await _locked(folder / _lock_name(self._wallet)))
            except TimeoutError:
                raise WaitTimeoutError(
                    f"Another submission or top-up of this wallet has been under way for "
                    f"{timeout:.3g} s; nothing was paid for this one",
                    hint="Wait until it has ended; `deepsquare tx list` shows what it sent.",
                ) from None
            yield

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _identify(self, wanted: dict[str, str]) -> None:
        with self.begin() as connection:
            found = {row.key: row.value for row in connection.execute(select(identity))}
            for key, value in wanted.items():
                if key not in found:
                    connection.execute(insert(identity).values(key=key, value=value))
                elif found[key] != value:
                    raise UsageError(
                        f"The database {self.path or 'in memory'} belongs to another "
                        f"{_NAMES[key]}: {found[key]}, not {value}",
                        hint="Give another --state-dir, or remove this database if its chain "
                        "is gone.",
                    )


_NAMES: Final = {
    "schema": "version of the program",
    "chain_id": "chain",
    "contract": "contract",
    "account": "account",
    "genesis": "chain (same id, other first block)",
    "landmark": "chain (same id, other block of the deployment)",
}


def _add_columns(connection: Connection) -> None:
    """Give a database of an earlier version the columns that came since."""
    for table in GROWN:
        there = {each["name"] for each in inspect(connection).get_columns(table.name)}
        for column in table.columns:
            if column.name not in there:
                kind = column.type.compile(connection.dialect)
                words = f"ALTER TABLE {table.name} ADD COLUMN {column.name} {kind}"
                connection.exec_driver_sql(words)


def _make(file: Path) -> None:
    """Folder and empty file, readable by the owner only: signed transactions are in it."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(file, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise StoreError(f"The database {file} can't be opened: {error.strerror}") from None


async def _locked(file: Path) -> IO[bytes]:
    """A lock that ends with the process at the latest; waits for whoever has it."""
    try:
        lock = file.open("ab")
    except OSError as error:
        raise StoreError(f"The lock {file} can't be opened: {error.strerror}") from None
    try:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                await asyncio.sleep(_LOCK_PAUSE)
            else:
                return lock
    except BaseException:
        lock.close()
        raise


def _lock_folder() -> Path | None:
    """Where this user's locks are, whatever the state folder; None where there is no such place."""
    try:
        folder = Path(tempfile.gettempdir()) / f"deepsquare-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return None
    own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    return folder if own and os.access(folder, os.W_OK | os.X_OK) else None


def _lock_name(wallet: str) -> str:
    """One of 256 files: two wallets that share one wait for each other, which harms nobody."""
    return f"spending-{hashlib.sha256(wallet.encode()).hexdigest()[:2]}"


def _guard(file: Path) -> IO[bytes]:
    """A lock that ends with the process, however it ends."""
    guard = file.with_name(file.name + ".lock").open("ab")
    try:
        fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        with suppress(OSError):
            guard.close()
        raise UsageError(
            f"The database {file} is used by another process",
            hint="Is this service running already? Stop it, or give another --state-dir.",
        ) from None
    return guard
