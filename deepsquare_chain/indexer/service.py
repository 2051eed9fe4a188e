"""The indexer: follows every event of a grid into the index's tables.

Start, restart and catch-up are the same cycle. `open_index` gives the service with its `index`
to ask; `IndexService.cycle` goes into a daemon (see `deepsquare_chain.daemon.service`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection, func, insert, select
from web3 import AsyncWeb3
from web3.exceptions import Web3RPCError

from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.chain.bindings.deployment import TIMES, Deployment
from deepsquare_chain.chain.follower import KEPT_BLOCKS, Batch, Follower
from deepsquare_chain.chain.rpc.batching import ask_all
from deepsquare_chain.chain.rpc.connection import connected
from deepsquare_chain.chain.rpc.pool import MAX_LAG_BLOCKS
from deepsquare_chain.chain.rpc.transport import Transport
from deepsquare_chain.indexer import schema
from deepsquare_chain.indexer.block_data import BlockData, read_facts
from deepsquare_chain.indexer.database import IndexDatabase
from deepsquare_chain.indexer.queries import CURSOR, Index
from deepsquare_chain.indexer.writer import IndexWriter, get_state, note, put_state
from deepsquare_chain.observability import get_logger
from deepsquare_chain.observability.metrics import Metrics
from deepsquare_chain.settings import Settings

#: Blocks of one batch: what a crash repeats, and what is held in memory.
MAX_RANGE: Final = 2_000
DATABASE: Final = "explorer.db"
_CONSTANTS: Final = (
    *TIMES,
    *("credit", "registry", "treasury", "forwarder"),
)
_log = get_logger(__name__)

#: Called with the last block that was read and the last one there is to read.
Progress = Callable[[int, int], None]


def index_place(settings: Settings) -> str | Path:
    """Where the index is kept: the setting, or a file among the other databases."""
    return settings.explorer_database or settings.state_dir / DATABASE


@asynccontextmanager
async def open_index(
    endpoint: str,
    deployment: Deployment,
    where: str | Path | None,
    *,
    transport: Transport | None = None,
    max_lag_blocks: int = MAX_LAG_BLOCKS,
    **options: Any,
) -> AsyncIterator[IndexService]:
    """The indexer of a grid with a connection of its own.

    Args:
        endpoint: JSON-RPC endpoint, or several, parted by commas.
        deployment: The grid.
        where: As `IndexDatabase.open`.
        transport: Certificates and headers for remote endpoints.
        max_lag_blocks: Blocks that an endpoint may be behind the best before it is left alone.
        options: As `index_service`.

    Raises:
        EndpointError: The endpoint is down, or serves another chain.
        UsageError, StoreError: As `index_service`.
    """
    async with (
        connected(
            endpoint,
            chain_id=deployment.chain_id,
            contracts=deployment.addresses,
            landmark=deployment.block,
            max_lag_blocks=max_lag_blocks,
            transport=transport,
        ) as w3,
        index_service(Contracts(w3, deployment), where, **options) as service,
    ):
        yield service


@asynccontextmanager
async def index_service(
    contracts: Contracts,
    where: str | Path | None,
    *,
    confirmations: int = 1,
    rebuild: bool = False,
    metrics: Metrics | None = None,
    progress: Progress | None = None,
) -> AsyncIterator[IndexService]:
    """The indexer of a grid with its database, closed at the end of the block.

    Args:
        contracts: The grid.
        where: As `IndexDatabase.open`.
        confirmations: Blocks on top of a block before it is read; zero shows the newest at once,
            marked as not final.
        rebuild: Begin again from the first block, whatever is there, of whatever chain.
        metrics: Where the figures go.
        progress: Called with the progress of a catch-up.

    Raises:
        UsageError: The database is of another grid, or has a writer already.
        StoreError: The disk is full, or the server does not answer.
        EndpointError: The endpoint does not answer.
    """
    genesis = await contracts.w3.eth.get_block(0)
    database = await asyncio.to_thread(
        IndexDatabase.open,
        where,
        contracts.deployment,
        genesis="0x" + bytes(genesis["hash"]).hex(),
        writer=True,
        forget=rebuild,
    )
    try:
        yield IndexService(
            contracts,
            database,
            confirmations=confirmations,
            metrics=metrics,
            progress=progress,
        )
    finally:
        database.close()


class IndexService:
    """Keeps the tables at the chain's confirmed head."""

    def __init__(
        self,
        contracts: Contracts,
        database: IndexDatabase,
        *,
        confirmations: int = 1,
        metrics: Metrics | None = None,
        progress: Progress | None = None,
    ) -> None:
        deployment = contracts.deployment
        self.database = database
        self.index = Index(database, deployment)
        self._contracts = contracts
        self._writer = IndexWriter(deployment)
        self._progress = progress
        self._facts = BlockData()
        self._confirmations = confirmations
        self._follower: Follower[Connection] = Follower(
            contracts.w3,
            deployment.addresses,
            database,
            start_block=deployment.block,
            confirmations=confirmations,
            name=CURSOR,
            max_range=MAX_RANGE,
            threaded=True,
        )
        metrics = metrics or Metrics("explorer")
        self._metrics = metrics
        self._block = metrics.gauge("index_block", "Last block that is indexed.")
        self._lag = metrics.gauge("index_lag_blocks", "Blocks between head and index.")
        self._age = metrics.gauge("head_age_seconds", "Age of the newest block that was seen.")
        self._events = metrics.counter("index_events", "Events that were indexed.")
        self._reorgs = metrics.counter("index_reorganisations", "Times that blocks were undone.")

    async def cycle(self) -> bool:
        """Read everything that is confirmed now; whether there was anything.

        Raises:
            EndpointError: The node does not answer, or not lawfully.
            StoreError: The database does not answer, or is full.
            ReorgTooDeepError: The chain replaced so much that it can't be distinguished from another chain.
        """
        await asyncio.to_thread(self.database.check_writer)
        if not await asyncio.to_thread(self._has_constants):
            constants = await _constants(self._contracts)
            await asyncio.to_thread(self._keep_constants, constants)
        count = await self._follower.poll(self._apply, prepare=self._prepare)
        await self._look_around()
        return count > 0

    async def _prepare(self, batch: Batch) -> bool:
        found = await read_facts(self._contracts.w3, batch.events)
        self._facts = found or BlockData()
        return found is not None

    def _apply(self, batch: Batch, transaction: Connection) -> None:
        self._writer.apply(batch, transaction, self._facts)
        self._metrics.add(self._events, amount=len(batch.events))
        if batch.rolled_back_to is not None:
            self._metrics.add(self._reorgs)
        elif self._progress is not None:
            last = max(batch.to_block, self._follower.head - self._confirmations)
            self._progress(batch.to_block, last)

    # -- what the index says of itself

    async def _look_around(self) -> None:
        """Head and finality, which move without any event."""
        position = await asyncio.to_thread(lambda: self._follower.position)
        head, final = await _heads(self._contracts.w3)
        if head is None:
            return
        number, seen = int(head["number"], 16), int(head["timestamp"], 16)
        if final is None:
            # No such notion there: as deep as a reorganisation can still be undone.
            final = number - KEPT_BLOCKS
        await asyncio.to_thread(self._keep_heads, number, seen, min(final, position))
        self._block.set(position)
        self._lag.set(max(0, number - position))
        self._age.set(max(0.0, time.time() - seen))

    def _keep_heads(self, head: int, head_time: int, finalized: int) -> None:
        with self.database.begin() as connection:
            state = get_state(connection)
            latest_known = (
                connection.execute(select(func.max(schema.headers.c.number))).scalar() or 0
            )
            before = int(state.get("finalized", -1))
            put_state(connection, head=head, head_time=head_time, finalized=finalized)
            if min(finalized, latest_known) != min(before, latest_known):
                note(connection, "finality", before + 1, finalized, ())

    def _has_constants(self) -> bool:
        with self.database.read() as connection:
            return connection.execute(select(schema.constants.c.name).limit(1)).first() is not None

    def _keep_constants(self, values: Mapping[str, str]) -> None:
        rows = [{"name": name, "value": value} for name, value in values.items()]
        with self.database.begin() as connection:
            connection.execute(insert(schema.constants), rows)


async def _heads(w3: AsyncWeb3[Any]) -> tuple[Mapping[str, Any] | None, int | None]:
    """The newest block, and the number of the last final one where the node knows that."""
    (head,) = await ask_all(w3, [("eth_getBlockByNumber", ["latest", False])])
    try:
        (final,) = await ask_all(w3, [("eth_getBlockByNumber", ["finalized", False])])
    except Web3RPCError:
        final = None
    return head, None if final is None else int(final["number"], 16)


async def _constants(contracts: Contracts) -> dict[str, str]:
    """What the deployment fixed; seconds, but for `response_blocks`."""
    found = await contracts.scheduler.parameters()
    values = {name: str(getattr(found, name)) for name in _CONSTANTS}
    values["scheduler"] = contracts.scheduler.address
    values["approval_period"] = str(await contracts.registry.approval_period())
    return values
