"""The block time of a chain: when to poll for the next block, and whether blocks come by themselves.

Arrival times are in monotonic seconds; the wall clock is not used. Chain time only gives the
distance between blocks, and observed faster arrivals take precedence over it.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from statistics import median
from typing import Any, Final

import structlog
from web3 import AsyncWeb3
from web3.exceptions import Web3Exception

from deepsquare_chain.chain.rpc.batching import ask_all
from deepsquare_chain.errors import EndpointError

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
        """Return the time of the next poll in monotonic seconds.

        Args:
            poll: Poll interval in seconds while no block time is known.
        """
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
        several times the shortest time between two blocks.
        """
        blocks = sorted(self._blocks)
        if len(blocks) < 2 or sum(empty for _, _, empty in blocks) > _MAX_EMPTY_SHARE * len(blocks):
            return False
        gaps = []
        for (number, block_time, _), (next_number, next_time, empty) in pairwise(blocks):
            gaps.append((next_time - block_time) / (next_number - number))
            if empty and gaps[-1] > _MAX_EMPTY_DELAY:
                return False
        return seconds >= min(_MAX_IDLE, max(_MIN_IDLE, _IDLE_FACTOR * min(gaps)))

    def warn_once(self, seconds: float) -> None:
        """Log once that the chain mines on demand."""
        if not self._warned:
            self._warned = True
            _log.warning(
                "chain mines on demand",
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


async def next_block_counts(w3: AsyncWeb3[Any]) -> bool:
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
