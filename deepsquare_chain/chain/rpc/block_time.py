"""When to ask for the next block: learned from the blocks before, so that few requests find nothing.

Times of arrival are seconds of a monotonic clock; the wall clock has no say. Chain time only tells
how far apart blocks are, and what was seen to arrive faster overrules it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from statistics import median
from typing import Final

#: Headers and arrivals by which a chain is judged, and the least number of times between them.
_KEPT: Final = 7
_LEAST_GAPS: Final = 4
#: Share of the times between blocks that must be within a second of the median.
_REGULAR: Final = 0.75
#: Blocks that come faster than this (seconds) are not waited for one by one.
_FASTEST: Final = 0.5
#: Longest time without a look, in seconds, whatever was learned.
_SLOWEST: Final = 60.0
#: Pause after a look that came too early: part of the block time, and at most so many seconds.
_RETRY: Final = (0.1, 0.5)
#: Part of a block time that a look waits longer where a websocket should be first.
_PATIENCE: Final = 0.5


def block_time(
    headers: Sequence[tuple[int, int, bool]], arrivals: Sequence[tuple[int, float]]
) -> float:
    """Seconds between two blocks of a chain that makes them by the clock; 0 for any other.

    A chain shows that by an empty block, or by blocks that arrive as far apart as they say.

    Args:
        headers: Number, chain time and emptiness of blocks; some may be missing in between.
        arrivals: Number and monotonic time of blocks that were seen to arrive, in order.
    """
    places = sorted((number, at) for number, at, _ in headers)
    gaps = [(then - at) / (after - one) for (one, at), (after, then) in pairwise(places)]
    if len(gaps) < _LEAST_GAPS:
        return 0.0
    typical = float(median(gaps))
    regular = sum(abs(each - typical) <= 1.0 for each in gaps)
    by_itself = any(empty for _, _, empty in headers)
    seen = typical
    if len(arrivals) > _LEAST_GAPS:
        (one, first), (after, last) = arrivals[0], arrivals[-1]
        seen = (last - first) / (after - one)
        by_itself = by_itself or abs(seen - typical) <= typical / 2
    if not by_itself or regular < _REGULAR * len(gaps):
        return 0.0
    typical = min(typical, seen)
    return min(typical, _SLOWEST) if typical >= _FASTEST else 0.0


def next_look(expected: float, looked: float, seconds: float, *, patience: float = 0.0) -> float:
    """When to ask again: at the expected time, and after it with longer and longer pauses.

    Args:
        expected: When the next block should be there.
        looked: When the node was asked last, in vain.
        seconds: Block time; the longest pause.
        patience: Seconds to wait longer for somebody else's word of the block.
    """
    due = expected + patience
    if looked < due:
        return due
    return looked + min(seconds, max(_retry(seconds), looked - due))


def _retry(seconds: float) -> float:
    part, most = _RETRY
    return min(most, part * seconds)


class BlockTimeEstimate:
    """What one connection knows of the time of the next block."""

    def __init__(self) -> None:
        self.head = -1
        #: Whether a websocket tells of new blocks.
        self.listening = False
        self._headers: deque[tuple[int, int, bool]] = deque(maxlen=_KEPT)
        self._arrivals: deque[tuple[int, float]] = deque(maxlen=_KEPT)
        self._looked = float("-inf")
        self._expected = 0.0
        self._seconds = 0.0
        self._hinted = False
        self._told_at: float | None = None  # first look after a hint that found nothing
        self._news = asyncio.Event()

    @property
    def seconds(self) -> float:
        """The block time that was learned; 0 where there is none."""
        return self._seconds

    def note(self, number: int, chain_time: int, *, empty: bool) -> None:
        """Take in a header; `empty` where its block holds no transaction."""
        if all(number != known for known, _, _ in self._headers):
            self._headers.append((number, chain_time, empty))

    def saw(self, number: int, now: float) -> None:
        """Record that the node was asked and reported this head."""
        missed, self._looked = self._looked, now
        hinted, self._hinted = self._hinted, False
        if number <= self.head:
            if hinted and self._told_at is None:
                self._told_at = now  # another node has the block already
            return
        self._told_at = None
        first, single = self.head < 0, number == self.head + 1
        self.head = number
        if not first:  # nobody knows when the first one arrived
            self._arrivals.append((number, now))
        seconds = self._seconds = block_time(self._headers, self._arrivals)
        arrived = now
        if single and self._expected:
            # A look that was late for other reasons says nothing of the block.
            arrived = min(now, max(self._expected, missed) + _retry(seconds))
        # A little earlier each time, until a look comes too early: so it stays close.
        self._expected = arrived + seconds - _retry(seconds) / 4 if seconds else 0.0
        self._tell()

    def hint(self) -> None:
        """Somebody says that there is a new block: worth a look now."""
        self._hinted = True
        self._tell()

    def due_at(self, poll: float) -> float:
        """When to ask next, in monotonic seconds.

        Args:
            poll: Seconds between two looks where no block time is known.
        """
        if self._hinted:
            return float("-inf")
        if not self._seconds or not self._expected:
            return self._looked + poll
        if self._told_at is not None:
            return next_look(self._told_at, self._looked, self._seconds)
        patience = _PATIENCE * self._seconds if self.listening else 0.0
        return next_look(self._expected, self._looked, self._seconds, patience=patience)

    async def news(self, seconds: float) -> None:
        """Wait for a new head or a hint, but no longer than that."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._news.wait()

    def _tell(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()
