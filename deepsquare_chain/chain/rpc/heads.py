"""The head of the chain for a service, and notifications of new blocks over a websocket.

The head is polled over HTTP once per block: when the next block is due (see `block_time`), or on a
notification. The websocket only triggers a poll: a lost or false message affects the latency and
nothing else.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import pydantic_core
import structlog
from web3 import AsyncWeb3
from web3.exceptions import Web3RPCError
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidURI, WebSocketException

from deepsquare_chain.chain.rpc.batching import ask_all
from deepsquare_chain.chain.rpc.block_time import block_time_of, seconds_idle
from deepsquare_chain.chain.rpc.transport import Transport, proxy_for, tls_problem
from deepsquare_chain.errors import EndpointError, UsageError
from deepsquare_chain.settings import safe_url

if TYPE_CHECKING:
    from deepsquare_chain.observability.metrics import Metrics

#: Age of the latest block in seconds above which a service is not ready: its node lags or stopped.
STALE_HEAD: Final = 120


class HeadMetrics:
    """Metrics of the head: age of the latest block, and clock skew of this machine.

    The age is computed on each read, so that it grows while no endpoint answers or a cycle hangs.
    It is NaN before the first block.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._time: int | None = None
        self._blocks_behind = 0
        self._on_demand = False
        self._skew = metrics.gauge("clock_skew_seconds", "Wall clock minus time of the head.")
        age = metrics.gauge("head_age_seconds", "Seconds since the time of the head, now.")
        age.set_function(self._age)

    def record_head(self, head_time: int, *, on_demand: bool = False) -> None:
        """Record the latest block.

        Args:
            head_time: Its chain time, in seconds.
            on_demand: Whether the chain mines on demand only, so that the age has no meaning.
        """
        self._time, self._on_demand, self._blocks_behind = head_time, on_demand, 0
        self._skew.set(time.time() - head_time)

    def record_lag(self, blocks: int) -> None:
        """Record that the endpoint lags this many blocks behind an earlier head."""
        self._blocks_behind = blocks

    def problem(self) -> str:
        """Describe why the service's view of the chain is not current; empty if it is."""
        if self._blocks_behind:
            return f"the endpoint is {self._blocks_behind} blocks behind what was seen before"
        age = self._age()
        if self._on_demand or not age > STALE_HEAD:  # the age is NaN before the first block
            return ""
        return (
            f"the latest block is {age:.0f} s old by this machine's clock: the node lags or has "
            "stopped, or the clock is wrong"
        )

    def _age(self) -> float:
        return float("nan") if self._time is None else time.time() - self._time


#: Backoff in seconds before reconnecting: first and maximum; doubled with each failure in a row.
_PAUSES: Final = (1.0, 30.0)
#: Timeout in seconds for connecting, and for a response.
_TIMEOUT: Final = 10.0
#: Maximum size of a message in bytes; a header has about a thousand.
_MAX_MESSAGE: Final = 65_536
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Head:
    """The block that a cycle works on; `time` is chain time, `base_fee` is in wei per gas.

    `final` means that the chain mines on demand, so that only a new transaction adds a block.
    """

    number: int
    time: int
    hash: bytes
    final: bool = False
    base_fee: int = 0


class HeadSource:
    """Provides the latest block to a service, and polls for it only when the next one is due.

    Args:
        w3: The connection.
        reconcile: Reconciles the service's transactions and returns the latest header, in one request;
            None for a service that sends no transactions.
        head_metrics: Receives the age of the head.
        poll: Poll interval in seconds while the block time is not known.
    """

    def __init__(
        self,
        w3: AsyncWeb3[Any],
        reconcile: Callable[[], Awaitable[Mapping[str, Any]]] | None,
        head_metrics: HeadMetrics,
        *,
        poll: float,
    ) -> None:
        self._w3 = w3
        self._reconcile = reconcile
        self._metrics = head_metrics
        self._poll = poll
        self._header: Mapping[str, Any] | None = None
        self._number = 0
        self._polled_head = -1  # highest head of the connection at the last poll

    def pause(self) -> float:
        """Return the seconds until the next poll is due."""
        block_time = block_time_of(self._w3)
        if block_time is None:
            return self._poll
        if block_time.head > max(self._number, self._polled_head):
            return 0.0  # another task of this connection has seen a new block
        return max(0.0, block_time.due_at(self._poll) - time.monotonic())

    def hint(self) -> None:
        """Record a notification of a new block."""
        if (block_time := block_time_of(self._w3)) is not None:
            block_time.hint()

    def listen(self, up: bool) -> None:
        """Set whether notifications of new blocks are received, so that polls can be delayed."""
        if (block_time := block_time_of(self._w3)) is not None:
            block_time.listening = up

    async def look(self, mined_at: Callable[[], int], *, again: bool = False) -> Head | None:
        """Return the latest block; None if the endpoint lags behind an earlier head.

        Args:
            mined_at: Returns the highest block that holds a transaction of the service.
            again: Poll even if it is not due.

        Raises:
            EndpointError: The node does not answer.
        """
        highest = max(self._number, mined_at())
        header = self._header
        block_time = block_time_of(self._w3)
        if (
            header is None
            or again
            or block_time is None
            or highest > self._number
            or self.pause() <= 0
        ):
            header = await self._ask()
            self._polled_head = -1 if block_time is None else block_time.head
        # If the chain mines on demand, time passes without blocks; the next block will have it.
        idle_seconds = await seconds_idle(self._w3)
        number, chain_time = int(header["number"], 16), int(header["timestamp"], 16)
        if number < highest:
            _log.warning("endpoint lags", head=number, seen=highest)
            self._metrics.record_lag(highest - number)
            return None
        self._header, self._number = header, number
        self._metrics.record_head(chain_time, on_demand=idle_seconds > 0)
        return Head(
            number,
            chain_time + int(idle_seconds),
            bytes.fromhex(header["hash"][2:]),
            final=idle_seconds > 0,
            base_fee=int(header.get("baseFeePerGas") or "0x0", 16),
        )

    async def _ask(self) -> Mapping[str, Any]:
        if self._reconcile is not None:
            return await self._reconcile()
        try:
            (latest,) = await ask_all(self._w3, [("eth_getBlockByNumber", ["latest", False])])
        except Web3RPCError as error:
            raise EndpointError(f"The node returned no block: {str(error)[:200]}") from None
        header: Mapping[str, Any] = latest
        return header


class _InvalidPeerError(Exception):
    """The websocket's peer does not behave like a node."""


class HeadSubscription:
    """Calls `wake` at each new block over a websocket; reconnects with backoff.

    Args:
        url: ws:// or wss:// URL of a node.
        wake: Called without arguments at each new block and after each new connection.
        chain_id: Chain ID that the node must serve.
        on_change: Called with whether the subscription is active.
        pauses: Minimum and maximum backoff before reconnecting, in seconds.
        transport: Certificates and headers for a remote address.

    Raises:
        UsageError: The URL is not a websocket URL.
    """

    def __init__(
        self,
        url: str,
        wake: Callable[[], None],
        *,
        chain_id: int,
        on_change: Callable[[bool], None] = lambda _listens: None,
        pauses: tuple[float, float] = _PAUSES,
        transport: Transport | None = None,
    ) -> None:
        if not url.startswith(("ws://", "wss://")):
            raise UsageError(f"{safe_url(url)} is not a ws:// or wss:// URL")
        self._url = url
        self._place = safe_url(url)
        self._wake = wake
        self._on_change = on_change
        self._chain_id = chain_id
        self._pauses = pauses
        self._transport = transport or Transport()
        self._failures = 0
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start listening in a background task."""
        self._task = asyncio.create_task(self._run(), name="websocket")

    async def stop(self) -> None:
        """Stop listening (idempotent)."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    async def _run(self) -> None:
        while True:
            try:
                await self._listen()
            except (OSError, WebSocketException, TimeoutError, _InvalidPeerError) as error:
                self._on_change(False)
                self._failures += 1
                first, maximum = self._pauses
                pause = min(maximum, first * 2.0 ** min(self._failures - 1, 10))
                problem = tls_problem(error) or str(error)[:200]
                if isinstance(error, InvalidURI):
                    problem = "no such address"
                _log.warning(
                    "websocket_lost",
                    endpoint=self._place,
                    error=problem or type(error).__name__,
                    retry_in=pause,
                )
                await asyncio.sleep(pause)

    async def _listen(self) -> None:
        """Run one connection until it fails or is closed."""
        secure = self._url.startswith("wss://")
        async with connect(
            self._url,
            max_size=_MAX_MESSAGE,
            open_timeout=_TIMEOUT,
            close_timeout=1,
            proxy=proxy_for(self._url),
            ssl=self._transport.context() if secure else None,
            additional_headers=self._transport.headers_for(self._url),
        ) as socket:
            request_ids = itertools.count(1)
            chain_id = await self._ask(socket, next(request_ids), "eth_chainId")
            if chain_id != hex(self._chain_id):
                raise _InvalidPeerError(
                    f"it serves chain {str(chain_id)[:40]}, not {self._chain_id}"
                )
            subscription = await self._ask(socket, next(request_ids), "eth_subscribe", "newHeads")
            self._failures = 0
            self._on_change(True)
            _log.info("websocket_listens", endpoint=self._place)
            self._wake()  # there may be new blocks since the last connection
            async for message in socket:
                body = _read(message)
                params = body.get("params")
                if isinstance(params, dict) and params.get("subscription") == subscription:
                    self._wake()
            raise _InvalidPeerError("it closed the connection")

    async def _ask(self, socket: ClientConnection, number: int, method: str, *params: str) -> Any:
        body = {"jsonrpc": "2.0", "id": number, "method": method, "params": params}
        async with asyncio.timeout(_TIMEOUT):
            await socket.send(json.dumps(body))
            response = _read(await socket.recv())
        if response.get("id") != number or not isinstance(response.get("result"), str):
            raise _InvalidPeerError(f"an invalid response to {method}")
        return response["result"]


def _read(message: str | bytes) -> dict[str, Any]:
    try:
        body = pydantic_core.from_json(message, allow_inf_nan=False)
    except ValueError:
        raise _InvalidPeerError("no JSON") from None
    if not isinstance(body, dict):
        raise _InvalidPeerError("no JSON-RPC")
    return body
