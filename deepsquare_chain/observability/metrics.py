"""Metrics and health of one service, and checks of its environment.

Each service has its own Prometheus registry. Every metric exists from the start, so that an alert on
its absence is meaningful.
"""

from __future__ import annotations

import itertools
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from deepsquare_chain import __version__

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
# Seconds. A cycle is short, a block takes about a second, a failing endpoint takes longer.
SECONDS: Final = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """Creates the metrics of one service, all named `deepsquare_...` and labelled `service`.

    Labels must have few, fixed values, such as a status or the type of an error; never an ID or
    an address.
    """

    def __init__(self, service: str) -> None:
        self.service = service
        self.registry = CollectorRegistry(auto_describe=True)
        build = (__version__, platform.python_version())
        build_info = self.gauges(
            "build_info",
            "Versions of the program and of Python; the value is 1.",
            version=build[:1],
            python=build[1:],
        )
        self.set(build_info, 1, *build)

    def counter(self, name: str, text: str, **labels: Sequence[str]) -> Counter:
        """Return a new counter; `labels` list every value that each label can take."""
        label_names = ["service", *labels]
        counter = Counter(f"deepsquare_{name}", text, label_names, registry=self.registry)
        for values in itertools.product(*labels.values()):
            counter.labels(self.service, *values)
        return counter

    def gauge(self, name: str, text: str) -> Gauge:
        """Return a new gauge."""
        gauge = Gauge(f"deepsquare_{name}", text, ["service"], registry=self.registry)
        return gauge.labels(self.service)

    def gauges(self, name: str, text: str, **labels: Sequence[str]) -> Gauge:
        """Return a new gauge with labels; `labels` list every value of each label."""
        label_names = ["service", *labels]
        gauge = Gauge(f"deepsquare_{name}", text, label_names, registry=self.registry)
        for values in itertools.product(*labels.values()):
            gauge.labels(self.service, *values)
        return gauge

    def histogram(self, name: str, text: str, buckets: Sequence[float] = SECONDS) -> Histogram:
        """Return a new histogram of durations in seconds, or of sizes if `buckets` are given."""
        histogram = Histogram(
            f"deepsquare_{name}", text, ["service"], registry=self.registry, buckets=buckets
        )
        return histogram.labels(self.service)

    def add(self, counter: Counter, *labels: str, amount: float = 1) -> None:
        """Increment a counter under the labels that follow `service`."""
        counter.labels(self.service, *labels).inc(amount)

    def set(self, gauge: Gauge, value: float, *labels: str) -> None:
        """Set a gauge that was created by `gauges`, under the labels that follow `service`."""
        gauge.labels(self.service, *labels).set(value)

    def value(self, name: str, **labels: str) -> float | None:
        """Return the value of a sample such as `cycles_total`; None if it does not exist."""
        sample_labels = {"service": self.service, **labels}
        return self.registry.get_sample_value(f"deepsquare_{name}", sample_labels)

    def render(self) -> bytes:
        """Return all metrics in the Prometheus text format."""
        return generate_latest(self.registry)


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check."""

    name: str  # subject of the check
    ok: bool  # whether the check passed
    text: str  # description of the result
    hint: str = ""  # recommended action; may be set even if the check passed
    setting: str = ""  # names of the settings that affect the check, joined by commas; may be empty


@dataclass(frozen=True, slots=True)
class Health:
    """Current health of a service."""

    live: bool  # whether its cycles still run; if not, restart the service
    ready: bool  # whether it completed its first full cycle and is not failing
    details: Mapping[str, Any] = field(default_factory=dict)  # further information, as JSON values
