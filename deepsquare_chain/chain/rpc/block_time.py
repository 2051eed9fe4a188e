"""Estimates when to poll for the next block from earlier blocks, to avoid polls without a result.

Arrival times are in monotonic seconds; the wall clock is not used. Chain time only gives the
distance between blocks, and observed faster arrivals take precedence over it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from statistics import median
from typing import Final

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
