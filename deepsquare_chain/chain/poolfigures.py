"""Figures of each endpoint of a pool, by host and port alone: the rest of a URL may be secret."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from deepsquare_chain.observe.metrics import Metrics


class PoolFigures:
    """Counts what endpoints do.

    Args:
        metrics: Where the figures go; None counts nothing.
        places: The endpoints, as `safe_url` shows them.
    """

    def __init__(self, metrics: Metrics | None, places: Sequence[str]) -> None:
        self._metrics = metrics
        self._names = _names(places)
        if metrics is None:
            return
        hosts = sorted(self._names.values())
        self._asked = metrics.counter(
            "endpoint_requests", "Requests by endpoint.", endpoint=hosts, end=("ok", "failed")
        )
        self._changes = metrics.counter("endpoint_changes", "Times that another took over.")
        self._up = metrics.gauges(
            "endpoint_up", "Whether it answered and was believed last.", endpoint=hosts
        )
        self._lag = metrics.gauges(
            "endpoint_lag_blocks", "Blocks behind the best endpoint.", endpoint=hosts
        )

    def answered(self, place: str) -> None:
        """It gave a proper answer."""
        self._count(place, "ok")

    def failed(self, place: str) -> None:
        """It gave none."""
        self._count(place, "failed")

    def changed(self) -> None:
        """Another endpoint took over."""
        if self._metrics is not None:
            self._metrics.add(self._changes)

    def compared(self, place: str, *, up: bool, lag: int | None = None) -> None:
        """How it stood beside the others."""
        if self._metrics is None:
            return
        self._metrics.set(self._up, up, self._names[place])
        if lag is not None:
            self._metrics.set(self._lag, lag, self._names[place])

    def _count(self, place: str, end: str) -> None:
        if self._metrics is not None:
            self._metrics.add(self._asked, self._names[place], end)
            self._metrics.set(self._up, end == "ok", self._names[place])


def _names(places: Sequence[str]) -> dict[str, str]:
    """Host and port of each place; numbered where several share them."""
    found: dict[str, str] = {}
    seen: Counter[str] = Counter()
    for place in dict.fromkeys(places):
        host = urlsplit(place).netloc
        seen[host] += 1
        found[place] = host if seen[host] == 1 else f"{host} ({seen[host]})"
    return found
