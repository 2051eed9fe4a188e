"""Detects chains that mine on demand: a block is made only when a transaction is sent.

Development nodes, some subnets and rollups make no block without a transaction. A program that
waits there for another block, or for chain time, waits for a transaction that only it would send.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Final

import structlog
from web3 import AsyncWeb3
from web3.exceptions import Web3Exception

from deepsquare_chain.chain.rpc.batching import ask_all
from deepsquare_chain.chain.rpc.block_time import BlockTimeEstimate
from deepsquare_chain.errors import EndpointError

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
