"""Learns the largest request size that an endpoint accepts, from rejections and rare probes.

An occasional failure is not a rejection: a size counts as rejected only after it failed twice in a
row, each time with a smaller size accepted.
"""

from __future__ import annotations

from typing import Final

#: Consecutive successes at the ceiling after which twice the size is probed once; doubled with each
#: rejected probe.
_PROBE_AFTER: Final = 64
_MAX_PROBE_AFTER: Final = 4_096
#: Consecutive failures, of a kind that may not depend on the size, that count as a rejection.
_FAILURES_TO_REJECT: Final = 3


class Ceiling:
    """Maximum size of a request to one endpoint, such as calls per batch or blocks per log range.

    Args:
        first: Initial size; it grows until the first rejection.
        maximum: Upper bound of the size.
    """

    def __init__(self, first: int, maximum: int) -> None:
        self.size = first
        self._maximum = maximum
        self._limited = False  # a size was rejected and a smaller one was accepted
        self._descending = False
        self._ceiling_before = first  # ceiling at the start of a descent
        self._suspected_size = 0  # size that was rejected once while a smaller one was accepted
        self._refused_at = 0  # rejected size at which the descent began
        self._streak = 0
        self._probe_after = _PROBE_AFTER
        self._probing = False
        self._failures = 0

    def refused(self, size: int) -> None:
        """Record a rejection of this size; a rejection of size 1 says nothing about sizes."""
        self._failures = 0
        if not self._descending:
            self._ceiling_before, self._refused_at, self._descending = self.size, size, True
        if size <= 1:
            self.size, self._descending = self._ceiling_before, False
            return
        self.size = max(1, min(self.size, size // 2))

    def failed(self, size: int) -> None:
        """Record a failure that may not depend on the size: a timeout, a gateway's error page."""
        if size <= 1:
            return
        self._failures += 1
        if self._failures >= _FAILURES_TO_REJECT:
            self.refused(size)

    def worked(self, size: int) -> None:
        """Record a success at this size."""
        self._failures = 0
        if self._descending:
            self._descending, self._streak = False, 0
            if not self._limited and not self._suspected_size:
                # Errors occur at any size: only a second rejection lowers the ceiling.
                self._suspected_size, self.size = self._refused_at, self._ceiling_before
                return
            self._limited = True
            if self._probing:
                self._probe_after = min(_MAX_PROBE_AFTER, 2 * self._probe_after)
        elif self._probing and size >= self.size:
            self._probe_after = _PROBE_AFTER  # the endpoint accepts more than before
        elif size >= self._suspected_size:
            self._suspected_size = 0
        self._probing = self._probing and size < self.size
        if size < self.size:
            return
        self._streak += 1
        if not self._limited or self._streak >= self._probe_after:
            self._probing = self._limited
            self.size, self._streak = min(self._maximum, 2 * self.size), 0
