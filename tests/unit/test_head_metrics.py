"""Metrics of a service's view of the latest block."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from deepsquare_chain.chain.rpc import heads
from deepsquare_chain.chain.rpc.heads import HeadMetrics
from deepsquare_chain.observability.metrics import Metrics


def test_the_age_grows_until_a_block_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=1_000.0)
    monkeypatch.setattr(heads, "time", SimpleNamespace(time=lambda: clock.now))
    metrics = Metrics("test")
    figures = HeadMetrics(metrics)
    age = metrics.value("head_age_seconds")
    assert age is not None
    assert math.isnan(age)
    figures.record_head(998)
    assert metrics.value("head_age_seconds") == metrics.value("clock_skew_seconds") == 2
    clock.now += 600  # no endpoint answers, or a cycle hangs
    assert metrics.value("head_age_seconds") == 602
    assert metrics.value("clock_skew_seconds") == 2
    assert b'deepsquare_head_age_seconds{service="test"} 602.0' in metrics.render()
    figures.record_head(1_599)
    assert metrics.value("head_age_seconds") == 1


def test_a_node_that_lags_or_stopped_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=1_000.0)
    monkeypatch.setattr(heads, "time", SimpleNamespace(time=lambda: clock.now))
    figures = HeadMetrics(Metrics("test"))
    assert figures.problem() == ""  # no block yet: the first cycle is not over
    figures.record_head(1_000)
    assert figures.problem() == ""
    figures.record_lag(3)
    assert figures.problem() == "the endpoint is 3 blocks behind what was seen before"
    figures.record_head(1_000)
    clock.now += heads.STALE_HEAD
    assert figures.problem() == ""
    clock.now += 1
    assert "the latest block is 121 s old" in figures.problem()
    # A chain that mines on demand may make no block for days.
    figures.record_head(1_000, on_demand=True)
    assert figures.problem() == ""
