"""Opens a service of the grid: its settings, database, sender, and the daemon that runs it."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar

from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.chain.follower import ReorgTooDeepError
from deepsquare_chain.chain.rpc.endpoint import WrongEndpointError
from deepsquare_chain.chain.rpc.heads import HeadSource, HeadSubscription
from deepsquare_chain.chain.rpc.pool import MAX_LAG_BLOCKS, connected
from deepsquare_chain.chain.rpc.transport import Transport
from deepsquare_chain.chain.signers import Signer
from deepsquare_chain.chain.transactions.fees import GWEI
from deepsquare_chain.chain.transactions.sender import Sender
from deepsquare_chain.daemon.loop import Daemon, cancelled, handle_signals
from deepsquare_chain.errors import EndpointError, UsageError
from deepsquare_chain.observability import get_logger
from deepsquare_chain.observability.metrics import Metrics
from deepsquare_chain.store.database import Store, open_wallet_store

#: Parameters of glibc's mallopt: number of arenas, and block size in bytes from which to use mmap.
_M_ARENA_MAX: Final = -8
_ARENAS: Final = 2
_M_MMAP_THRESHOLD: Final = -3
_MMAP_THRESHOLD: Final = 256 * 1024
#: Errors that a retry can't resolve.
FATAL: Final = (ReorgTooDeepError, UsageError, WrongEndpointError)
_NO_ACCOUNT: Final = "0x" + "00" * 20
#: Longest poll interval for receipts in seconds, as people wait for the first receipt.
_RECEIPT_INTERVAL: Final = 0.25
_MAX_BACKOFF: Final = 10.0
_MIN_PAUSE: Final = 0.05
_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ServiceSettings:
    """Settings of every service."""

    state_dir: Path  # folder of the database and the status file
    confirmations: int = 1  # confirmations before state on chain counts as settled
    poll_interval: float = 0.5  # seconds between two cycles without changes
    batch_size: int = 50  # maximum number of jobs in one transaction
    #: Seconds to wait for a receipt; afterwards the outbox takes care of the transaction.
    send_timeout: float = 60.0
    max_fee_per_gas: int = 500 * GWEI  # fee ceiling in wei; transactions wait while fees are higher
    #: Blocks that an endpoint may lag behind the best one before it is skipped.
    max_lag_blocks: int = MAX_LAG_BLOCKS
    #: ws:// address of a node whose new blocks wake the service; None for none.
    websocket: str | None = None
    #: Certificates and headers for remote endpoints.
    transport: Transport = field(default_factory=Transport)
    #: Folder of the wallets' outboxes, shared by services and commands of the same wallet; None
    #: uses the service's own database.
    wallets_dir: Path | None = None
    #: Port on 127.0.0.1 for health and metrics; 0 for a free one, None for none.
    health_port: int | None = None


async def open_contracts(
    parts: AsyncExitStack,
    url: str,
    deployment: Deployment,
    settings: ServiceSettings,
    metrics: Metrics,
) -> Contracts:
    """Return the grid's contracts through a pool of the endpoints; errors as `connect`."""
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
    name: str, contracts: Contracts, address: str | None, settings: ServiceSettings
) -> Store:
    """Open the service's own database `NAME.db`; without an address it belongs to no account.

    Raises:
        UsageError: The database belongs to another account or grid, or is in use.
        StoreError: The disk is full or the folder not writable.
        EndpointError: The endpoint does not answer.
    """
    genesis = await contracts.w3.eth.get_block(0)
    return Store.open(
        settings.state_dir / f"{name}.db",
        chain_id=contracts.deployment.chain_id,
        contract=contracts.deployment.scheduler,
        account=address or _NO_ACCOUNT,
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
    """Open the sender of the service's account; commands of that wallet may share its nonces.

    Raises:
        UsageError: The wallet's database belongs to another chain.
        StoreError: The disk is full or the folder not writable.
        EndpointError: The endpoint does not answer.
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
    """Open the daemon of a service; its status file is `NAME.json`.

    Args:
        cycle: One cycle; returns True when the next should follow at once.
        chain_id: Chain of the grid, which the websocket must serve.
        heads: Source of the latest block; a cycle also begins when the next block is due.

    Raises:
        UsageError: The health port can't be used.
    """
    configure_malloc()
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
        websocket_up = metrics.gauge("websocket_up", "Whether the websocket reports new blocks.")

        def wake() -> None:
            if heads is not None:
                heads.hint()
            daemon.wake()

        def on_change(up: bool) -> None:
            if heads is not None:
                heads.listen(up)
            websocket_up.set(up)

        watch = HeadSubscription(
            settings.websocket,
            wake,
            chain_id=chain_id,
            on_change=on_change,
            transport=settings.transport,
        )
        watch.start()
        daemon.on_close("websocket", watch.stop)
    if settings.health_port is not None:
        # Imported on demand: a web server takes much memory.
        from deepsquare_chain.observability.serving import health_app, health_server  # noqa: PLC0415

        server = health_server(health_app(daemon.health, metrics), port=settings.health_port)
        await server.start()
        _log.info("health server started", service=name, url=server.url)
        daemon.on_close("health", server.stop)
    return daemon


def configure_malloc() -> None:
    """Configure glibc's malloc so that the memory of this process does not grow over time.

    By default each new thread gets its own arena, up to eight per core, which keeps its peak
    memory; with this setting all threads share two. Also by default, glibc raises the size from
    which blocks are mapped, so that large blocks fragment the heap as tables of the interpreter
    grow; with this setting large blocks are always mapped, and returned when freed. Without glibc
    this does nothing.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_ARENA_MAX, _ARENAS)
        libc.mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD)


def _pause(poll: float, heads: HeadSource | None) -> float:
    """Return the seconds until the next cycle: the next block may be due before the next poll."""
    # A pause of 0 would starve other tasks; a lagging endpoint may need several polls.
    return poll if heads is None else min(poll, max(_MIN_PAUSE, heads.pause()))


# -- opens a service, with retries while its endpoint is down

#: First and longest backoff between two attempts, in seconds.
_PAUSES: Final = (0.5, 10.0)

T = TypeVar("T")


async def serve(
    name: str,
    open_once: Callable[[AsyncExitStack, asyncio.Event], Awaitable[Daemon]],
    stop: asyncio.Event | None = None,
) -> None:
    """Open a service, waiting for its endpoint, and run it until SIGINT, SIGTERM or `stop`.

    Args:
        open_once: Opens all parts on a stack that closes them, and returns the daemon, which
            stops when the given event is set.
        stop: Ends the wait and the daemon when set.

    Raises:
        GridError: As `open_with_retries`, or a fatal error of the daemon.
    """
    stopping = stop or asyncio.Event()

    def on_signal(number: int) -> None:
        _log.info("stop requested", service=name, signal=signal.Signals(number).name)
        stopping.set()

    async with AsyncExitStack() as stack:
        with handle_signals(on_signal):
            daemon = await open_with_retries(
                name, lambda parts: open_once(parts, stopping), stack, stopping
            )
        if daemon is not None:
            # Modules and parts stay until the end: later collections need not visit them.
            gc.collect()
            gc.freeze()
            await daemon.run()


async def open_with_retries(
    name: str,
    open_once: Callable[[AsyncExitStack], Awaitable[T]],
    stack: AsyncExitStack,
    stop: asyncio.Event,
) -> T | None:
    """Open a service's parts, with retries while the endpoint does not answer.

    Each reason to wait is logged once, and so is the end of the wait.

    Args:
        open_once: Opens all parts and registers their closing on the given stack; parts opened
            before a failure are closed.
        stack: Closes the parts in the end.
        stop: Ends the wait when set, and cancels the current attempt.

    Returns:
        The result of `open_once`; None after a stop.

    Raises:
        WrongEndpointError: The endpoint serves another chain, or lacks the contracts.
        GridError: Any other error of `open_once`.
    """
    pause, longest = _PAUSES
    started_at, reported = time.monotonic(), set[str]()
    while not stop.is_set():
        try:
            async with AsyncExitStack() as parts:
                result = await _result_or_stop(open_once(parts), stop)
                if result is None:
                    return None
                await stack.enter_async_context(parts.pop_all())
        except WrongEndpointError:
            raise
        except EndpointError as error:
            if error.message not in reported:
                reported.add(error.message)
                _log.warning(
                    "endpoint unavailable", service=name, message=error.message, hint=error.hint
                )
        else:
            if reported:
                waited = round(time.monotonic() - started_at, 1)
                _log.info("endpoint answered", service=name, waited=waited)
            return result
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), pause)
        pause = min(longest, 2 * pause)
    return None


async def _result_or_stop(work: Awaitable[T], stop: asyncio.Event) -> T | None:
    """Return the result of the work; on an earlier stop, cancel it and return None."""
    task, stopping = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({task, stopping}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        await cancelled(stopping)
        await cancelled(task)
