"""The index service: follows the events of a grid and writes them to the tables of the index.

Start, restart and catch-up use the same cycle. `open_index` opens the service, whose `index`
answers queries. A daemon runs `IndexService.cycle` (see `deepsquare_chain.daemon.service`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection, func, insert, select
from web3 import AsyncWeb3
from web3.exceptions import Web3RPCError

from deepsquare_chain.audit.reader import Progress
from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.chain.bindings.deployment import TIMES, Deployment
from deepsquare_chain.chain.follower import KEPT_BLOCKS, Batch, Follower
from deepsquare_chain.chain.rpc.batching import ask_all
from deepsquare_chain.chain.rpc.pool import MAX_LAG_BLOCKS, connected
from deepsquare_chain.chain.rpc.transport import Transport
from deepsquare_chain.indexer import schema
from deepsquare_chain.indexer.block_data import BlockData, read_block_data
from deepsquare_chain.indexer.database import IndexDatabase
from deepsquare_chain.indexer.queries import CURSOR, Index, get_state
from deepsquare_chain.indexer.writer import IndexWriter, put_state, record_change
from deepsquare_chain.observability import get_logger
from deepsquare_chain.observability.metrics import Metrics
from deepsquare_chain.settings import Settings

#: Maximum blocks per batch. Limits memory use, and the work that is repeated after a crash.
MAX_RANGE: Final = 2_000
DATABASE: Final = "explorer.db"
_CONSTANTS: Final = (*TIMES, *("credit", "registry", "treasury", "forwarder"))
_log = get_logger(__name__)


def index_location(settings: Settings) -> str | Path:
    """Return the location of the index: the setting, or a file in the state directory."""
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
    """Open the index service of a grid with a connection of its own.

    Endpoint, transport and lag are those of `connected`; other arguments and errors are those of
    `index_service`.
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
    """Open the index service of a grid, and close its database at the end of the context.

    Args:
        contracts: Contracts of the grid.
        where: Location of the database; see `IndexDatabase.open`.
        confirmations: Confirmations that a block needs before it is read. With zero, new blocks
            are shown at once, marked as not final.
        rebuild: Delete the existing index, even of another chain, and start from the first block.
        metrics: Metrics of the service.
        progress: Called during a catch-up.

    Raises:
        UsageError: The database belongs to another grid, or already has a writer.
        StoreError: The disk is full, or the database server does not answer.
        EndpointError: The endpoint does not answer.
    """
    genesis = await contracts.w3.eth.get_block(0)
    database = await asyncio.to_thread(
        IndexDatabase.open,
        where,
        contracts.deployment,
        genesis="0x" + bytes(genesis["hash"]).hex(),
        writer=True,
        rebuild=rebuild,
    )
    try:
        yield IndexService(
            contracts, database, confirmations=confirmations, metrics=metrics, progress=progress
        )
    finally:
        database.close()


class IndexService:
    """Keeps the tables up to date with the confirmed head of the chain."""

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
        self._block_data = BlockData()
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
        self._block = metrics.gauge("index_block", "Last indexed block.")
        self._lag = metrics.gauge("index_lag_blocks", "Blocks between head and index.")
        self._age = metrics.gauge("head_age_seconds", "Age of the newest observed block.")
        self._events = metrics.counter("index_events", "Indexed events.")
        self._reorgs = metrics.counter(
            "index_reorganisations", "Reorganisations that removed blocks."
        )

    async def cycle(self) -> bool:
        """Index all blocks that are confirmed now. Return whether there were any.

        Raises:
            EndpointError: The node does not answer, or its response is invalid.
            StoreError: The database does not answer, or is full.
            ReorgTooDeepError: The reorg is so deep that this may be another chain.
        """
        await asyncio.to_thread(self.database.check_writer)
        if not await asyncio.to_thread(self._has_constants):
            await asyncio.to_thread(self._keep_constants, await _constants(self._contracts))
        count = await self._follower.poll(self._apply, prepare=self._prepare)
        await self._update_heads()
        return count > 0

    async def _prepare(self, batch: Batch) -> bool:
        block_data = await read_block_data(self._contracts.w3, batch.events)
        self._block_data = block_data or BlockData()
        return block_data is not None

    def _apply(self, batch: Batch, transaction: Connection) -> None:
        self._writer.apply(batch, transaction, self._block_data)
        self._metrics.add(self._events, amount=len(batch.events))
        if batch.rolled_back_to is not None:
            self._metrics.add(self._reorgs)
        elif self._progress is not None:
            last = max(batch.to_block, self._follower.head - self._confirmations)
            self._progress(batch.to_block, last)

    # -- state of the index

    async def _update_heads(self) -> None:
        """Update head and finality, which also advance without events."""
        position = await asyncio.to_thread(lambda: self._follower.position)
        head, final = await _heads(self._contracts.w3)
        if head is None:
            return
        number, head_time = int(head["number"], 16), int(head["timestamp"], 16)
        if final is None:
            # The node has no finalized block: use the deepest block that a reorg can still undo.
            final = number - KEPT_BLOCKS
        await asyncio.to_thread(self._keep_heads, number, head_time, min(final, position))
        self._block.set(position)
        self._lag.set(max(0, number - position))
        self._age.set(max(0.0, time.time() - head_time))

    def _keep_heads(self, head: int, head_time: int, finalized: int) -> None:
        with self.database.begin() as connection:
            state = get_state(connection)
            last_indexed = connection.scalar(select(func.max(schema.headers.c.number))) or 0
            previous = int(state.get("finalized", -1))
            put_state(connection, head=head, head_time=head_time, finalized=finalized)
            if min(finalized, last_indexed) != min(previous, last_indexed):
                record_change(connection, "finality", previous + 1, finalized, ())

    def _has_constants(self) -> bool:
        with self.database.read() as connection:
            return connection.execute(select(schema.constants.c.name).limit(1)).first() is not None

    def _keep_constants(self, values: Mapping[str, str]) -> None:
        rows = [{"name": name, "value": value} for name, value in values.items()]
        with self.database.begin() as connection:
            connection.execute(insert(schema.constants), rows)


async def _heads(w3: AsyncWeb3[Any]) -> tuple[Mapping[str, Any] | None, int | None]:
    """Return the latest block, and the number of the last finalized one if the node reports it."""
    (head,) = await ask_all(w3, [("eth_getBlockByNumber", ["latest", False])])
    try:
        (final,) = await ask_all(w3, [("eth_getBlockByNumber", ["finalized", False])])
    except Web3RPCError:
        final = None
    return head, None if final is None else int(final["number"], 16)


async def _constants(contracts: Contracts) -> dict[str, str]:
    """Read the fixed parameters of the deployment, in seconds except for `response_blocks`."""
    parameters = await contracts.scheduler.parameters()
    values = {name: str(getattr(parameters, name)) for name in _CONSTANTS}
    values["scheduler"] = contracts.scheduler.address
    values["approval_period"] = str(await contracts.registry.approval_period())
    return values
