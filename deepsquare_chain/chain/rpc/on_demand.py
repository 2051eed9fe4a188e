"""Detects chains that make a block only when somebody sends a transaction.

Development nodes, some subnets and rollups stand still until there is a transaction. Whoever waits
there for another block, or for chain time, waits for a transaction that only itself would send.
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

#: Blocks by which a chain is judged.
_BLOCKS: Final = 16
#: Seconds without a block after which a chain may stand still: at least, and at most.
_LEAST: Final = 4.0
_MOST: Final = 60.0
#: The same in times of the shortest time between two of its blocks.
_TIMES: Final = 4
#: Part of the blocks that may be empty where only senders make them. Anvil 1.x makes an empty one
#: behind a full one where two transactions arrive at once: 57 of 2,001 blocks in a trial.
_EMPTY: Final = 1 / 4
#: Longest time in seconds between such a block and the one before it.
_AT_ONCE: Final = 1
_log = structlog.get_logger(__name__)


class OnDemandDetector:
    """What one connection has seen of the chain's newest blocks."""

    def __init__(self) -> None:
        self.head = -1
        self.block_time = BlockTimeEstimate()
        self.loaded = False  # whether the blocks before the first that was seen were asked for
        self.opened = time.monotonic()  # when the connection was made
        self._since = 0.0  # monotonic seconds
        self._blocks: deque[tuple[int, int, bool]] = deque(maxlen=_BLOCKS)
        self._told = False

    def saw(self, number: int, block: Mapping[str, Any] | None = None) -> None:
        """A head that the endpoint reported, and its header where that came with it."""
        if block is not None:
            self.note([block])
        if number != self.head:
            self.head, self._since = number, time.monotonic()
        self.block_time.saw(number, time.monotonic())

    def note(self, blocks: list[Mapping[str, Any]]) -> None:
        """Headers as JSON-RPC gives them, in the order of the chain."""
        known = {number for number, _, _ in self._blocks}
        for each in blocks:
            number = int(each["number"], 16)
            # The first block is always empty, and says nothing of how the others are made.
            if number > 0 and number not in known:
                empty = not each.get("transactions")
                self._blocks.append((number, int(each["timestamp"], 16), empty))
                self.block_time.note(number, int(each["timestamp"], 16), empty=empty)

    def seconds(self) -> float:
        """Seconds since the head moved, as far as it was looked at."""
        return time.monotonic() - self._since if self.head >= 0 else 0.0

    def lasts(self, seconds: float) -> bool:
        """Whether a chain that made no block for so long makes them only on demand.

        One that makes them by itself makes empty ones as well, or many; that it stands still for
        several times the shortest time between two blocks is no habit of it.
        """
        blocks = sorted(self._blocks)
        if len(blocks) < 2 or sum(empty for _, _, empty in blocks) > _EMPTY * len(blocks):
            return False
        gaps = []
        for (one, at, _), (after, then, empty) in pairwise(blocks):
            gaps.append((then - at) / (after - one))
            if empty and gaps[-1] > _AT_ONCE:
                return False
        return seconds >= min(_MOST, max(_LEAST, _TIMES * min(gaps)))

    def tell(self, seconds: float) -> None:
        """Log once that the chain is of this kind."""
        if not self._told:
            self._told = True
            _log.warning(
                "chain mines on demand",
                block=self.head,
                seconds=round(seconds),
                hint="It makes a block only when somebody sends; facts of its latest block count.",
            )


def block_time_of(w3: AsyncWeb3[Any]) -> BlockTimeEstimate | None:
    """When this connection should ask for the next block; None where it does not say."""
    found = _detector(w3)
    return None if found is None else found.block_time


async def stands_still(w3: AsyncWeb3[Any]) -> float:
    """Seconds without a block of a chain that mines only on demand; 0 for any other, or before.

    Raises:
        EndpointError: The node does not answer.
    """
    found = _detector(w3)
    if found is None or found.seconds() < _LEAST:
        return 0.0
    await _load(w3, found)
    seconds = found.seconds()
    if not found.lasts(seconds):
        return 0.0
    found.tell(seconds)
    return seconds


async def mines_on_demand(w3: AsyncWeb3[Any]) -> int | None:
    """Age of the latest block, in seconds by this machine's clock, of a chain that mines only on
    demand; None for any other. For people: services go by `stands_still`.

    Raises:
        EndpointError: The node does not answer.
    """
    found = _detector(w3)
    if found is None:
        return None
    latest = await w3.eth.get_block("latest")
    await _load(w3, found)
    age = round(time.time() - int(latest["timestamp"]))
    return age if found.lasts(age) else None


async def next_block_counts(w3: AsyncWeb3[Any]) -> bool:
    """Whether only what is sent now makes the next block, so that it counts and not the latest.

    A command has no time to see a chain stand still: while its connection is young, this machine's
    clock tells how long it has.

    Raises:
        EndpointError: The node does not answer.
    """
    if await stands_still(w3):
        return True
    found = _detector(w3)
    if found is None or time.monotonic() - found.opened >= _LEAST:
        return False
    return await mines_on_demand(w3) is not None


async def next_block_time(w3: AsyncWeb3[Any]) -> int:
    """Time in seconds that the next block may have, for deadlines of what is signed or sent now.

    Where a chain mines only on demand its latest block may be older than any deadline from there,
    and the next one has this machine's time.

    Raises:
        EndpointError: The node does not answer.
    """
    latest = await w3.eth.get_block("latest")
    age = await mines_on_demand(w3)
    return int(latest["timestamp"]) + max(0, age or 0)


def _detector(w3: AsyncWeb3[Any]) -> OnDemandDetector | None:
    """What this connection has seen; None for a connection that does not look."""
    found: OnDemandDetector | None = getattr(w3.provider, "on_demand", None)
    return found


async def _load(w3: AsyncWeb3[Any], found: OnDemandDetector) -> None:
    """Read the blocks before the first that was seen, once."""
    if found.loaded or found.head < 0:
        return
    numbers = range(max(1, found.head - _BLOCKS + 1), found.head + 1)
    asked = [("eth_getBlockByNumber", [hex(number), False]) for number in numbers]
    try:
        headers = await ask_all(w3, asked)
    except Web3Exception as error:
        raise EndpointError(f"The node refuses to show blocks: {str(error)[:200]}") from None
    found.note([each for each in headers if each is not None])
    found.loaded = True
