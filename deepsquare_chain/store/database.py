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
from typing import IO, Any, Final, Self

from sqlalchemy import Connection, insert, inspect, select
from web3 import AsyncWeb3

from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.errors import StoreError, UsageError, WaitTimeoutError
from deepsquare_chain.store.base import (
    EXTENDED_TABLES,
    Amount,
    CursorTables,
    Database,
    identity,
    metadata,
)
from deepsquare_chain.store.outbox import OutboxTables, RequestTables

__all__ = ["Amount", "Database", "Store", "metadata"]

SCHEMA: Final = "1"
#: Seconds between two attempts to acquire a wallet's lock.
_LOCK_PAUSE: Final = 0.05


class Store(OutboxTables, RequestTables, CursorTables):
    """Outbox, signed requests, cursors and a service's own tables; opened by `Store.open`."""

    def __init__(self, path: Path | None) -> None:
        super().__init__(path)
        self._exclusive_lock: IO[bytes] | None = None
        self._spending = asyncio.Lock()
        self._wallet = ""  # identifies the wallet on this machine; empty without genesis

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
        shared: bool = False,
    ) -> Self:
        """Open the database, creating it if needed; None or ":memory:" keeps it in memory.

        Args:
            path: The file, readable by its owner only.
            genesis: Hash of the chain's first block, which differs after a restart of a local
                chain; not checked when empty.
            landmark: Hash of the block that identifies the chain once it is deep, see
                `deepsquare_chain.chain.rpc.pool`; not checked when empty.
            exclusive: Refuse to share the file with another process, for services.
            shared: The database belongs to the account, whatever the contract.

        Raises:
            UsageError: The file belongs to another chain, contract or account, is not a database,
                or is used by another process.
            StoreError: The disk is full or the folder not writable.
        """
        file = None if path is None or str(path) == ":memory:" else Path(path)
        if file is not None:
            _create_file(file)
        store = cls(file)
        try:
            if exclusive and file is not None:
                store._exclusive_lock = _exclusive_lock(file)
            with store.begin() as connection:
                metadata.create_all(connection)
                _add_missing_columns(connection)
            # Each deployment has a landmark of its own.
            mark = f" {contract.lower()}" if shared else ""
            store._identify(
                {
                    "schema": SCHEMA,
                    "chain_id": str(chain_id),
                    **({} if shared else {"contract": contract.lower()}),
                    "account": account.lower(),
                    **({"genesis": genesis.lower()} if genesis else {}),
                    **({f"landmark{mark}": landmark.lower()} if landmark else {}),
                }
            )
        except BaseException:
            store.close()
            raise
        if genesis:
            store._wallet = f"{chain_id} {genesis} {contract} {account}".lower()
        return store

    def close(self) -> None:
        """Close the file and release its lock; idempotent."""
        super().close()
        if self._exclusive_lock is not None:
            self._exclusive_lock.close()
            self._exclusive_lock = None

    @asynccontextmanager
    async def spending(self, timeout: float) -> AsyncIterator[None]:
        """Hold the wallet's lock around an allowance and its use; see `Outbox.spending`."""
        async with AsyncExitStack() as locks:
            try:
                async with asyncio.timeout(timeout):
                    await locks.enter_async_context(self._spending)
                    if self.path is not None:
                        locks.enter_context(
                            await _locked(self.path.with_name(f"{self.path.name}.spending"))
                        )
                    if self._wallet and (folder := _lock_folder()) is not None:
                        locks.enter_context(await _locked(folder / _lock_name(self._wallet)))
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
            stored = {row.key: row.value for row in connection.execute(select(identity))}
            for key, value in wanted.items():
                if key not in stored:
                    connection.execute(insert(identity).values(key=key, value=value))
                elif stored[key] != value:
                    raise UsageError(
                        f"The database {self.path or 'in memory'} belongs to another "
                        f"{_IDENTITY_NAMES[key.partition(' ')[0]]}: {stored[key]}, not {value}",
                        hint="Give another --state-dir, or remove this database if its chain "
                        "is gone.",
                    )


_IDENTITY_NAMES: Final = {
    "schema": "version of the program",
    "chain_id": "chain",
    "contract": "contract",
    "account": "account",
    "genesis": "chain (same ID, other genesis block)",
    "landmark": "chain (same ID, other block of the deployment)",
}


def _add_missing_columns(connection: Connection) -> None:
    """Add the columns that a database of an earlier version lacks."""
    for table in EXTENDED_TABLES:
        existing = {
            column_info["name"] for column_info in inspect(connection).get_columns(table.name)
        }
        for column in table.columns:
            if column.name not in existing:
                kind = column.type.compile(connection.dialect)
                statement = f"ALTER TABLE {table.name} ADD COLUMN {column.name} {kind}"
                connection.exec_driver_sql(statement)


def _create_file(file: Path) -> None:
    """Create folder and empty file, readable by the owner only: it holds signed transactions."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(file, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise StoreError(
            f"The database {file} can't be opened: {error.strerror}",
            hint="Set state_dir to a folder in which the user of this program may write.",
        ) from None


async def _locked(file: Path) -> IO[bytes]:
    """Wait for a file lock and acquire it; it ends with the process at the latest."""
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
    """Return the folder of this user's locks, for all state folders; None where there is none."""
    try:
        folder = Path(tempfile.gettempdir()) / f"deepsquare-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError:
        return None
    is_own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
    return folder if is_own and os.access(folder, os.W_OK | os.X_OK) else None


def _lock_name(wallet: str) -> str:
    """Return one of 256 lock files; two wallets with the same one wait for each other."""
    return f"spending-{hashlib.sha256(wallet.encode()).hexdigest()[:2]}"


def _exclusive_lock(file: Path) -> IO[bytes]:
    """Lock the file exclusively for this process; the lock ends with the process."""
    guard = file.with_name(file.name + ".lock").open("ab")
    try:
        fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        with suppress(OSError):
            guard.close()
        raise UsageError(
            f"The database {file} is used by another process",
            hint="This service is already running. Stop one: with another --state-dir both would use one wallet.",
        ) from None
    return guard


# -- databases of sent transactions, one per wallet and chain on this machine
#
# A service and commands of the same wallet share it, so that each nonce is allocated once; any of
# them resumes the transactions that another left open.

FOLDER: Final = "wallets"


def wallet_path(folder: Path, chain_id: int, address: str) -> Path:
    """Return the path of a wallet's database for a chain."""
    return folder / f"{chain_id}-{address}.db"


async def open_wallet_store(
    w3: AsyncWeb3[Any], deployment: Deployment, address: str, folder: Path
) -> Store:
    """Open the database of a wallet, shared with other processes.

    Raises:
        UsageError: The file belongs to another chain or deployment, or is not a database.
        StoreError: The disk is full or the folder not writable.
        EndpointError: The endpoint does not answer.
    """
    genesis = await w3.eth.get_block(0)
    return Store.open(
        wallet_path(folder, deployment.chain_id, address),
        chain_id=deployment.chain_id,
        contract=deployment.scheduler,
        account=address,
        genesis=bytes(genesis["hash"]).hex(),
        landmark=getattr(w3.provider, "landmark", None) or "",
        shared=True,
    )
