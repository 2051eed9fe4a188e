"""The head of the chain for a service: its block time, polls, and notifications of new blocks.

The head is polled over HTTP once per block: when the next block is due (see `block_time`), or on a
notification. The websocket only triggers a poll: a lost or false message affects the latency and
nothing else.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING, Any, Final

import pydantic_core
import structlog
from web3 import AsyncWeb3
from web3.exceptions import Web3Exception, Web3RPCError
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidURI, WebSocketException

from deepsquare_chain.chain.rpc.batching import ask_all
from deepsquare_chain.chain.rpc.transport import Transport, proxy_for, tls_problem
from deepsquare_chain.errors import EndpointError, UsageError
from deepsquare_chain.settings import safe_url

if TYPE_CHECKING:
    from deepsquare_chain.observability.metrics import Metrics

#: Number of headers and arrivals that are kept, and minimum number of intervals between them.
_MAX_BLOCKS: Final = 7
_MIN_GAPS: Final = 4
#: Share of the intervals that must be within a second of the median.
_REGULAR: Final = 0.75
#: Below this block time (seconds) individual blocks are not waited for.
_MIN_BLOCK_TIME: Final = 0.5
#: Maximum block time that is used, in seconds, which bounds the time between polls.
_MAX_BLOCK_TIME: Final = 60.0
#: Pause after a poll that was too early: share of the block time, and maximum in seconds.
_RETRY: Final = (0.1, 0.5)
#: Share of a block time by which a poll is delayed if a websocket should report the block first.
_WEBSOCKET_DELAY: Final = 0.5


def block_time(
    headers: Sequence[tuple[int, int, bool]], arrivals: Sequence[tuple[int, float]]
) -> float:
    """Return the block time in seconds of a chain with a regular schedule; 0 for other chains.

    A schedule is assumed if there is an empty block, or if blocks arrive at the intervals of their
    chain times.

    Args:
        headers: Number, chain time and emptiness of blocks; there may be gaps.
        arrivals: Number and monotonic time of blocks whose arrival was observed, in order.
    """
    blocks = sorted((number, time) for number, time, _ in headers)
    gaps = [
        (next_time - time) / (later - earlier)
        for (earlier, time), (later, next_time) in pairwise(blocks)
    ]
    if len(gaps) < _MIN_GAPS:
        return 0.0
    typical = float(median(gaps))
    regular = sum(abs(gap - typical) <= 1.0 for gap in gaps)
    scheduled = any(empty for _, _, empty in headers)
    observed = typical
    if len(arrivals) > _MIN_GAPS:
        (earlier, first_arrival), (later, last_arrival) = arrivals[0], arrivals[-1]
        observed = (last_arrival - first_arrival) / (later - earlier)
        scheduled = scheduled or abs(observed - typical) <= typical / 2
    if not scheduled or regular < _REGULAR * len(gaps):
        return 0.0
    typical = min(typical, observed)
    return min(typical, _MAX_BLOCK_TIME) if typical >= _MIN_BLOCK_TIME else 0.0


def next_poll(
    expected: float, polled_at: float, seconds: float, *, extra_delay: float = 0.0
) -> float:
    """Return the time of the next poll: the expected time, and then with increasing pauses.

    Args:
        expected: When the next block is expected.
        polled_at: Time of the last poll, which found no new block.
        seconds: Block time; the longest pause.
        extra_delay: Extra seconds to wait for a websocket to report the block.
    """
    due = expected + extra_delay
    if polled_at < due:
        return due
    return polled_at + min(seconds, max(_retry(seconds), polled_at - due))


def _retry(seconds: float) -> float:
    share, maximum = _RETRY
    return min(maximum, share * seconds)


class BlockTimeEstimate:
    """A connection's estimate of the time of the next block."""

    def __init__(self) -> None:
        self.head = -1
        #: Whether a websocket reports new blocks.
        self.listening = False
        self._headers: deque[tuple[int, int, bool]] = deque(maxlen=_MAX_BLOCKS)
        self._arrivals: deque[tuple[int, float]] = deque(maxlen=_MAX_BLOCKS)
        self._polled_at = float("-inf")
        self._expected = 0.0
        self._seconds = 0.0
        self._hinted = False
        self._hint_missed_at: float | None = None  # first poll after a hint that found no new block
        self._changed = asyncio.Event()

    @property
    def seconds(self) -> float:
        """Estimated block time in seconds; 0 if there is none."""
        return self._seconds

    def record_header(self, number: int, chain_time: int, *, empty: bool) -> None:
        """Record a header; `empty` if its block holds no transaction."""
        if all(number != known for known, _, _ in self._headers):
            self._headers.append((number, chain_time, empty))

    def record_head(self, number: int, now: float) -> None:
        """Record that a poll returned this head at the monotonic time `now`."""
        last_poll, self._polled_at = self._polled_at, now
        hinted, self._hinted = self._hinted, False
        if number <= self.head:
            if hinted and self._hint_missed_at is None:
                self._hint_missed_at = now  # another node has the block already
            return
        self._hint_missed_at = None
        first, consecutive = self.head < 0, number == self.head + 1
        self.head = number
        if not first:  # the arrival time of the first one is not known
            self._arrivals.append((number, now))
        seconds = self._seconds = block_time(self._headers, self._arrivals)
        arrived = now
        if consecutive and self._expected:
            # If the poll itself was late, the block arrived earlier.
            arrived = min(now, max(self._expected, last_poll) + _retry(seconds))
        # Poll a little earlier each time, until a poll is too early, to stay close to the block.
        self._expected = arrived + seconds - _retry(seconds) / 4 if seconds else 0.0
        self._notify()

    def hint(self) -> None:
        """Record a notification of a new block, so that the next poll is due now."""
        self._hinted = True
        self._notify()

    def due_at(self, poll: float) -> float:
        """Return the time of the next poll in monotonic seconds; `poll` is the default interval."""
        if self._hinted:
            return float("-inf")
        if not self._seconds or not self._expected:
            return self._polled_at + poll
        if self._hint_missed_at is not None:
            return next_poll(self._hint_missed_at, self._polled_at, self._seconds)
        extra_delay = _WEBSOCKET_DELAY * self._seconds if self.listening else 0.0
        return next_poll(self._expected, self._polled_at, self._seconds, extra_delay=extra_delay)

    async def wait_for_change(self, seconds: float) -> None:
        """Wait for a new head or a hint, for at most this many seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()

    def _notify(self) -> None:
        event, self._changed = self._changed, asyncio.Event()
        event.set()


# -- chains that mine on demand: a block is made only when a transaction is sent
#
# Development nodes, some subnets and rollups make no block without a transaction. A program that
# waits there for another block, or for chain time, waits for a transaction that only it would send.

#: Number of latest blocks that the detection uses.
_BLOCKS: Final = 16
#: Minimum and maximum idle time in seconds after which a chain counts as mining on demand.
_MIN_IDLE: Final = 4.0
_MAX_IDLE: Final = 60.0
#: The idle time as a multiple of the shortest time between two blocks.
_IDLE_FACTOR: Final = 4
#: Share of blocks that may be empty on a chain that mines on demand. Anvil 1.x makes an empty block
#: after a full one if two transactions arrive at once: 57 of 2,001 blocks in a trial.
_MAX_EMPTY_SHARE: Final = 1 / 4
#: Gaps between blocks, and the share of equal ones, from which blocks seem to follow a schedule.
_MIN_STEPS: Final = 8
_STEADY_SHARE: Final = 3 / 4
#: Maximum seconds between such an empty block and the one before it.
_MAX_EMPTY_DELAY: Final = 1
_log = structlog.get_logger(__name__)


class OnDemandDetector:
    """The latest blocks seen by one connection, and whether they were mined on demand."""

    def __init__(self) -> None:
        self.head = -1
        self.block_time = BlockTimeEstimate()
        self.loaded = False  # whether the blocks before the first reported head were read
        self.opened = time.monotonic()  # when the connection was made
        self._since = 0.0  # monotonic seconds
        self._blocks: deque[tuple[int, int, bool]] = deque(maxlen=_BLOCKS)
        self._warned = False

    def record_head(self, number: int, block: Mapping[str, Any] | None = None) -> None:
        """Record a head that the endpoint reported, and its header if the response had it."""
        if block is not None:
            self.record_headers([block])
        if number != self.head:
            self.head, self._since = number, time.monotonic()
        self.block_time.record_head(number, time.monotonic())

    def record_headers(self, blocks: list[Mapping[str, Any]]) -> None:
        """Record headers in JSON-RPC form, in chain order."""
        known = {number for number, _, _ in self._blocks}
        for header in blocks:
            number = int(header["number"], 16)
            # The genesis block is always empty, so it says nothing about the others.
            if number > 0 and number not in known:
                empty = not header.get("transactions")
                self._blocks.append((number, int(header["timestamp"], 16), empty))
                self.block_time.record_header(number, int(header["timestamp"], 16), empty=empty)

    def seconds(self) -> float:
        """Return the seconds since the connection last saw a new head."""
        return time.monotonic() - self._since if self.head >= 0 else 0.0

    def is_on_demand(self, seconds: float) -> bool:
        """Return whether the chain mines on demand, given the seconds without a new block.

        A chain with a block schedule makes empty blocks too, or many blocks. It does not pause for
        several times the shortest time between two blocks. If most blocks came in equal steps, a
        schedule with full blocks is likely, and only a long pause counts.
        """
        blocks = sorted(self._blocks)
        if len(blocks) < 2 or sum(empty for _, _, empty in blocks) > _MAX_EMPTY_SHARE * len(blocks):
            return False
        gaps = []
        for (number, block_time, _), (next_number, next_time, empty) in pairwise(blocks):
            gaps.append((next_time - block_time) / (next_number - number))
            if empty and gaps[-1] > _MAX_EMPTY_DELAY:
                return False
        step = min(gaps)
        in_step = sum(gap == step for gap in gaps) / len(gaps)
        is_steady = in_step >= _STEADY_SHARE and max(gaps) < _IDLE_FACTOR * step
        if is_steady and len(gaps) >= _MIN_STEPS:
            return seconds >= _MAX_IDLE
        return seconds >= min(_MAX_IDLE, max(_MIN_IDLE, _IDLE_FACTOR * step))

    def warn_once(self, seconds: float) -> None:
        """Log once that the chain mines on demand."""
        if not self._warned:
            self._warned = True
            _log.warning(
                "on-demand chain detected",
                block=self.head,
                seconds=round(seconds),
                hint="It makes a block only for a new transaction; the latest block counts as final.",
            )


def block_time_of(w3: AsyncWeb3[Any]) -> BlockTimeEstimate | None:
    """Return the block time estimate of a connection; None if its provider has none."""
    detector = _detector(w3)
    return None if detector is None else detector.block_time


async def seconds_idle(w3: AsyncWeb3[Any]) -> float:
    """Return the seconds without a block on a chain that mines on demand.

    Returns 0 for other chains, and as long as the chain has not been idle long enough to tell.

    Raises:
        EndpointError: The node does not answer.
    """
    detector = _detector(w3)
    if detector is None or detector.seconds() < _MIN_IDLE:
        return 0.0
    await _load(w3, detector)
    seconds = detector.seconds()
    if not detector.is_on_demand(seconds):
        return 0.0
    detector.warn_once(seconds)
    return seconds


async def mines_on_demand(w3: AsyncWeb3[Any]) -> int | None:
    """Return the age of the latest block if the chain mines on demand; None for other chains.

    The age is in seconds by this machine's clock. Use it for commands; services use
    `seconds_idle`.

    Raises:
        EndpointError: The node does not answer.
    """
    detector = _detector(w3)
    if detector is None:
        return None
    latest = await w3.eth.get_block("latest")
    await _load(w3, detector)
    age = round(time.time() - int(latest["timestamp"]))
    return age if detector.is_on_demand(age) else None


async def next_block_needs_transaction(w3: AsyncWeb3[Any]) -> bool:
    """Return whether the next block is made only by a transaction that is sent now.

    Simulations must then use the next block instead of the latest. A command is too short to
    observe an idle chain: while its connection is new, the idle time is taken from this machine's
    clock.

    Raises:
        EndpointError: The node does not answer.
    """
    if await seconds_idle(w3):
        return True
    detector = _detector(w3)
    if detector is None or time.monotonic() - detector.opened >= _MIN_IDLE:
        return False
    return await mines_on_demand(w3) is not None


async def next_block_time(w3: AsyncWeb3[Any]) -> int:
    """Return an estimate of the next block's time in seconds, for deadlines in new transactions.

    On a chain that mines on demand the latest block may be so old that a deadline computed from it
    has passed already; the next block has this machine's time.

    Raises:
        EndpointError: The node does not answer.
    """
    latest = await w3.eth.get_block("latest")
    age = await mines_on_demand(w3)
    return int(latest["timestamp"]) + max(0, age or 0)


def _detector(w3: AsyncWeb3[Any]) -> OnDemandDetector | None:
    """Return the detector of a connection; None if its provider has none."""
    detector: OnDemandDetector | None = getattr(w3.provider, "on_demand", None)
    return detector


async def _load(w3: AsyncWeb3[Any], detector: OnDemandDetector) -> None:
    """Read the blocks before the first reported head, once."""
    if detector.loaded or detector.head < 0:
        return
    numbers = range(max(1, detector.head - _BLOCKS + 1), detector.head + 1)
    requests = [("eth_getBlockByNumber", [hex(number), False]) for number in numbers]
    try:
        headers = await ask_all(w3, requests)
    except Web3Exception as error:
        raise EndpointError(f"The node rejected a request for blocks: {str(error)[:200]}") from None
    detector.record_headers([header for header in headers if header is not None])
    detector.loaded = True


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
        """Record the time of the latest block; its age is ignored if blocks come on demand."""
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
        reconcile: Reconciles the service's transactions and returns the latest header, in one request;
            None for a service that sends no transactions.
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

    async def poll(self, mined_at: Callable[[], int], *, again: bool = False) -> Head | None:
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
            header = await self._latest_header()
            self._polled_head = -1 if block_time is None else block_time.head
        # If the chain mines on demand, time passes without blocks; the next block will have it.
        idle_seconds = await seconds_idle(self._w3)
        number, chain_time = int(header["number"], 16), int(header["timestamp"], 16)
        if number < highest:
            _log.warning("endpoint lagged", head=number, seen=highest)
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

    async def _latest_header(self) -> Mapping[str, Any]:
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
        wake: Called without arguments at each new block and after each new connection.
        on_change: Called with whether the subscription is active.
        pauses: Minimum and maximum backoff before reconnecting, in seconds.

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
                    "websocket lost",
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
            chain_id = await self._request(socket, next(request_ids), "eth_chainId")
            if chain_id != hex(self._chain_id):
                raise _InvalidPeerError(
                    f"it serves chain {str(chain_id)[:40]}, not {self._chain_id}"
                )
            subscription = await self._request(
                socket, next(request_ids), "eth_subscribe", "newHeads"
            )
            self._failures = 0
            self._on_change(True)
            _log.info("websocket subscribed", endpoint=self._place)
            self._wake()  # there may be new blocks since the last connection
            async for message in socket:
                body = _read(message)
                params = body.get("params")
                if isinstance(params, dict) and params.get("subscription") == subscription:
                    self._wake()
            raise _InvalidPeerError("it closed the connection")

    async def _request(
        self, socket: ClientConnection, number: int, method: str, *params: str
    ) -> Any:
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
