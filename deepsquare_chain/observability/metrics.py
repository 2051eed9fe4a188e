"""Figures of one service, in a registry of its own, ready for Prometheus.

Every figure exists from the start, so that an alert on its absence means something.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
# Seconds; a cycle is short, a block is about a second, an endpoint in trouble takes longer.
SECONDS: Final = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """Makes the figures of one service, all named `deepsquare_...` and labelled `service`.

    Labels must be few and fixed, such as a status or the type of an error: never an id or an
    address.
    """

    def __init__(self, service: str) -> None:
        self.service = service
        self.registry = CollectorRegistry(auto_describe=True)

    def counter(self, name: str, text: str, **labels: Sequence[str]) -> Counter:
        """A count that only grows; `labels` give every value that a label can take."""
        counter = Counter(f"deepsquare_{name}", text, self._names(labels), registry=self.registry)
        for values in self._combinations(labels):
            counter.labels(self.service, *values)
        return counter

    def gauge(self, name: str, text: str) -> Gauge:
        """A figure that goes up and down."""
        gauge = Gauge(f"deepsquare_{name}", text, ["service"], registry=self.registry)
        return gauge.labels(self.service)

    def gauges(self, name: str, text: str, **labels: Sequence[str]) -> Gauge:
        """A gauge with further labels; `labels` give every value that a label can take."""
        gauge = Gauge(f"deepsquare_{name}", text, self._names(labels), registry=self.registry)
        for values in self._combinations(labels):
            gauge.labels(self.service, *values)
        return gauge

    def histogram(self, name: str, text: str, buckets: Sequence[float] = SECONDS) -> Histogram:
        """Durations in seconds, or sizes with buckets of their own."""
        histogram = Histogram(
            f"deepsquare_{name}", text, ["service"], registry=self.registry, buckets=buckets
        )
        return histogram.labels(self.service)

    def add(self, counter: Counter, *labels: str, amount: float = 1) -> None:
        """Count something under the labels that follow `service`."""
        counter.labels(self.service, *labels).inc(amount)

    def set(self, gauge: Gauge, value: float, *labels: str) -> None:
        """Set one of `gauges` under the labels that follow `service`."""
        gauge.labels(self.service, *labels).set(value)

    def value(self, name: str, **labels: str) -> float | None:
        """Present value of a sample such as `cycles_total`, None when there is none."""
        wanted = {"service": self.service, **labels}
        return self.registry.get_sample_value(f"deepsquare_{name}", wanted)

    def render(self) -> bytes:
        """All figures in Prometheus' text format."""
        return generate_latest(self.registry)

    @staticmethod
    def _names(labels: dict[str, Sequence[str]]) -> list[str]:
        return ["service", *labels]

    @staticmethod
    def _combinations(labels: dict[str, Sequence[str]]) -> list[tuple[str, ...]]:
        found: list[tuple[str, ...]] = [()]
        for values in labels.values():
            found = [(*left, value) for left in found for value in values]
        return found
