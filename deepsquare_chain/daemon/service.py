"""How a service of the grid is opened: its options, database, sender, and the daemon that runs it."""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.chain.follower import ReorgTooDeepError
from deepsquare_chain.chain.rpc.connection import WrongEndpointError, connected
from deepsquare_chain.chain.rpc.heads import HeadSource, HeadWatch
from deepsquare_chain.chain.rpc.pool import MAX_LAG_BLOCKS
from deepsquare_chain.chain.rpc.transport import Transport
from deepsquare_chain.chain.signers import Signer
from deepsquare_chain.chain.transactions.fees import GWEI
from deepsquare_chain.chain.transactions.sender import Sender
from deepsquare_chain.daemon.loop import Daemon
from deepsquare_chain.errors import UsageError
from deepsquare_chain.observability import get_logger
from deepsquare_chain.observability.metrics import Metrics
from deepsquare_chain.store.database import Store
from deepsquare_chain.store.wallets import open_wallet_store

#: Parameters of glibc's mallopt; the number of arenas, and bytes from which a block is mapped alone.
_M_ARENA_MAX: Final = -8
_ARENAS: Final = 2
_M_MMAP_THRESHOLD: Final = -3
_MAPPED: Final = 256 * 1024
#: Errors that no later cycle can mend.
FATAL: Final = (ReorgTooDeepError, UsageError, WrongEndpointError)
_NOBODY: Final = "0x" + "00" * 20
#: Seconds; people wait for the first receipt of a service that looks rarely.
_RECEIPT_INTERVAL: Final = 0.25
_MAX_BACKOFF: Final = 10.0
_LEAST_PAUSE: Final = 0.05
_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ServiceSettings:
    """Settings of every service.

    Attributes:
        state_dir: Folder of the database and the status file.
        confirmations: Blocks on top of a fact before it is believed.
        poll_interval: Seconds between two cycles in which nothing happened.
        batch_size: Most jobs in one transaction.
        send_timeout: Seconds to wait for a transaction; afterwards the outbox looks after it.
        max_fee_per_gas: Ceiling in wei; above it transactions wait.
        max_lag_blocks: Blocks that an endpoint may be behind the best before it is left alone.
        websocket: ws:// address of a node whose new blocks wake the service; None for none.
        transport: Certificates and headers for remote endpoints.
        wallets_dir: Folder of what wallets sent, which a service and commands of the same wallet
            share; None keeps it in the service's own database.
        health_port: Port on 127.0.0.1 of health and figures, 0 for a free one, None for none.
    """

    state_dir: Path
    confirmations: int = 1
    poll_interval: float = 0.5
    batch_size: int = 50
    send_timeout: float = 60.0
    max_fee_per_gas: int = 500 * GWEI
    max_lag_blocks: int = MAX_LAG_BLOCKS
    websocket: str | None = None
    transport: Transport = field(default_factory=Transport)
    wallets_dir: Path | None = None
    health_port: int | None = None


async def open_contracts(
    parts: AsyncExitStack,
    url: str,
    deployment: Deployment,
    settings: ServiceSettings,
    metrics: Metrics,
) -> Contracts:
    """The grid's contracts through whichever of the endpoints is good; errors as `connect`."""
    w3 = await parts.enter_async_context(
        connected(
            url,
            chain_id=deployment.chain_id,
            contracts=[deployment.registry, deployment.scheduler],
            landmark=deployment.block,
            max_lag_blocks=settings.max_lag_blocks,
            metrics=metrics,
            transport=settings.transport,
        )
    )
    return Contracts(w3, deployment)


async def open_store(
    name: str, contracts: Contracts, account: Signer | None, settings: ServiceSettings
) -> Store:
    """The service's own database `NAME.db`; nobody's without an account.

    Raises:
        UsageError: It belongs to somebody else, or is in use.
        StoreError: The disk is full or the folder not writable.
        EndpointError: The chain does not answer.
    """
    genesis = await contracts.w3.eth.get_block(0)
    return Store.open(
        settings.state_dir / f"{name}.db",
        chain_id=contracts.deployment.chain_id,
        contract=contracts.deployment.scheduler,
        account=account.address if account is not None else _NOBODY,
        genesis="0x" + bytes(genesis["hash"]).hex(),
        landmark=getattr(contracts.w3.provider, "landmark", None) or "",
        exclusive=True,
    )


async def open_sender(
    parts: AsyncExitStack,
    contracts: Contracts,
    account: Signer,
    *,
    store: Store,
    settings: ServiceSettings,
    metrics: Metrics,
) -> Sender:
    """The sender of the service's account, whose nonces commands of that wallet take from too.

    Raises:
        UsageError: The wallet's database belongs to another chain.
        StoreError: The disk is full or the folder not writable.
        EndpointError: The chain does not answer.
    """
    outbox = store
    if settings.wallets_dir is not None:
        outbox = parts.enter_context(
            await open_wallet_store(
                contracts.w3, contracts.deployment, account.address, settings.wallets_dir
            )
        )
    return Sender(
        contracts.w3,
        account,
        outbox,
        chain_id=contracts.deployment.chain_id,
        max_fee_per_gas=settings.max_fee_per_gas,
        poll_interval=min(settings.poll_interval, _RECEIPT_INTERVAL),
        metrics=metrics,
    )


async def open_daemon(
    name: str,
    cycle: Callable[[], Awaitable[bool]],
    settings: ServiceSettings,
    *,
    chain_id: int,
    metrics: Metrics,
    stop: asyncio.Event | None = None,
    heads: HeadSource | None = None,
) -> Daemon:
    """The daemon of a service; its status file is `NAME.json`.

    Args:
        name: Of the service.
        cycle: One look at the world; True when something moved, so that the next should follow.
        settings: How it runs.
        chain_id: Chain of the grid, which a websocket must serve.
        metrics: The service's metrics, served with its health.
        stop: Ends it when set.
        heads: Where the service takes the latest block from; cycles begin when the next is due too.

    Raises:
        UsageError: The health port can't be used.
    """
    bound_memory()
    daemon = Daemon(
        name,
        cycle,
        interval=lambda: _pause(settings.poll_interval, heads),
        stop=stop,
        max_backoff=_MAX_BACKOFF,
        fatal=FATAL,
        status_file=settings.state_dir / f"{name}.json",
        metrics=metrics,
    )
    if settings.websocket is not None:
        listens = metrics.gauge("websocket_up", "Whether new blocks wake the service.")

        def wake() -> None:
            if heads is not None:
                heads.hint()
            daemon.wake()

        def on_change(up: bool) -> None:
            if heads is not None:
                heads.listen(up)
            listens.set(up)

        watch = HeadWatch(
            settings.websocket,
            wake,
            chain_id=chain_id,
            on_change=on_change,
            transport=settings.transport,
        )
        watch.start()
        daemon.on_close("websocket", watch.stop)
    if settings.health_port is not None:
        # A web server is not small: only who asks for it pays.
        from deepsquare_chain.observability.health import health_app, health_server  # noqa: PLC0415

        server = health_server(health_app(daemon.health, metrics), port=settings.health_port)
        await server.start()
        _log.info("health is served", service=name, url=server.url)
        daemon.on_close("health", server.stop)
    return daemon


def bound_memory() -> None:
    """Keep the memory that glibc holds for this process from growing with time.

    It gives each new thread an arena of its own, up to eight per core, which keeps the memory that
    it once used: here all threads share two. And it learns to take large blocks from the heap, where
    each leaves a hole when a table of the interpreter grows into a new one: here a large block is
    always mapped alone, and given back when it is freed. Without glibc nothing is done.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_ARENA_MAX, _ARENAS)
        libc.mallopt(_M_MMAP_THRESHOLD, _MAPPED)


def _pause(poll: float, heads: HeadSource | None) -> float:
    """Seconds until the next cycle: the chain's next block may be due before the next poll."""
    # A pause of nothing would not let others work; a lagging endpoint may need several looks.
    return poll if heads is None else min(poll, max(_LEAST_PAUSE, heads.pause()))
