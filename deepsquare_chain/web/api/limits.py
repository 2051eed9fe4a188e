"""How much one client may ask: a bucket of tokens for each, and a bounded number of buckets."""

from __future__ import annotations

import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

#: Clients that are remembered; whoever was away longest is forgotten, and starts with a full bucket.
MAX_CLIENTS: Final = 10_000


class RateLimit:
    """So many requests a second in the long run, and a burst at once; a rate of zero is no limit.

    Args:
        rate: Requests a second.
        burst: Requests at once.
        clock: Seconds that never go back.
    """

    def __init__(
        self, rate: float, burst: int, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._rate = rate
        self._burst = float(burst)
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait(self, client: str) -> float:
        """Count a request; the seconds that this client has to wait for the next, zero if none."""
        if self._rate <= 0:
            return 0.0
        now, key = self._clock(), network_of(client)
        tokens, seen = self._buckets.pop(key, (self._burst, now))
        tokens = min(self._burst, tokens + (now - seen) * self._rate)
        allowed = tokens >= 1.0
        self._buckets[key] = (tokens - 1.0 if allowed else tokens, now)
        if len(self._buckets) > MAX_CLIENTS:
            self._buckets.popitem(last=False)
        return 0.0 if allowed else (1.0 - tokens) / self._rate

    def __len__(self) -> int:
        """Clients that are remembered."""
        return len(self._buckets)


def network_of(client: str) -> str:
    """An address, or the network of an IPv6 address: one client has a whole one of those."""
    try:
        found = ipaddress.ip_address(client)
    except ValueError:
        return client
    if found.version == 6 and found.ipv4_mapped is None:
        return str(ipaddress.ip_network((client, 64), strict=False))
    return client
