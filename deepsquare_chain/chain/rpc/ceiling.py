"""The largest request that an endpoint takes: found by refusals, remembered, and probed rarely.

An endpoint that fails now and then refuses nothing: a size counts as refused once less was taken
twice in a row.
"""

from __future__ import annotations

from typing import Final

#: Answers in a row at a remembered ceiling after which twice as much is asked for once; doubled
#: with each probe that is refused.
_PROBE_AFTER: Final = 64
_LONGEST_WAIT: Final = 4_096
#: Failures in a row, of a kind that may have nothing to do with size, that count as a refusal.
_FAILURES: Final = 3


class Ceiling:
    """How much one request to one endpoint may ask for, such as calls of a batch or blocks of logs.

    Args:
        first: Size to begin with; it grows until the first refusal.
        most: Largest size in any case.
    """

    def __init__(self, first: int, most: int) -> None:
        self.size = first
        self._most = most
        self._limited = False  # something was refused and less of it was not
        self._descending = False
        self._before = first  # size at the start of a descent
        self._suspected = 0  # size that was refused once where less was not: maybe by chance
        self._refused_at = 0  # size at which the descent began
        self._streak = 0
        self._wait = _PROBE_AFTER
        self._probing = False
        self._failures = 0

    def refused(self, size: int) -> None:
        """The endpoint refused so much; one that refuses even 1 tells nothing about sizes."""
        self._failures = 0
        if not self._descending:
            self._before, self._refused_at, self._descending = self.size, size, True
        if size <= 1:
            self.size, self._descending = self._before, False
            return
        self.size = max(1, min(self.size, size // 2))

    def failed(self, size: int) -> None:
        """A request of this size failed as any may: no answer in time, a page of a gateway."""
        if size <= 1:
            return
        self._failures += 1
        if self._failures >= _FAILURES:
            self.refused(size)

    def worked(self, size: int) -> None:
        """The endpoint answered so much."""
        self._failures = 0
        if self._descending:
            self._descending, self._streak = False, 0
            if not self._limited and not self._suspected:
                # Errors come at any size: only a second refusal is remembered.
                self._suspected, self.size = self._refused_at, self._before
                return
            self._limited = True
            if self._probing:
                self._wait = min(_LONGEST_WAIT, 2 * self._wait)
        elif self._probing and size >= self.size:
            self._wait = _PROBE_AFTER  # the endpoint takes more than it did
        elif size >= self._suspected:
            self._suspected = 0
        self._probing = self._probing and size < self.size
        if size < self.size:
            return
        self._streak += 1
        if not self._limited or self._streak >= self._wait:
            self._probing = self._limited
            self.size, self._streak = min(self._most, 2 * self.size), 0
