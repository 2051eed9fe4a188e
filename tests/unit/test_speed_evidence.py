"""Measured run times against claimed speeds."""

from __future__ import annotations

import pytest

from deepsquare_chain.metascheduler.provider_labels import (
    MeasuredRun,
    SpeedEvidence,
    speed_evidence,
)

pytestmark = pytest.mark.unit


def runs(provider: str, seconds: float, count: int = 5, kind: str = "a") -> list[MeasuredRun]:
    return [MeasuredRun(provider, kind, seconds)] * count


def test_true_claims_agree() -> None:
    """A provider of twice the speed takes half as long."""
    evidence = speed_evidence(runs("slow", 200) + runs("fast", 100), {"slow": 1.0, "fast": 2.0})
    assert evidence == {"slow": SpeedEvidence(1.0, 5, 1), "fast": SpeedEvidence(1.0, 5, 1)}
    assert evidence["fast"].text == "jobs took about as long as its claimed speed suggests"


def test_a_claim_that_is_too_high_shows() -> None:
    evidence = speed_evidence(runs("a", 100) + runs("b", 100), {"a": 2.0, "b": 1.0})
    assert evidence["a"].factor == pytest.approx(2.0)
    assert evidence["a"].text == "jobs took 2.00 times as long as its claimed speed suggests"
    assert evidence["b"].text == "jobs took 2.00 times shorter than its claimed speed suggests"


def test_only_comparable_runs_count() -> None:
    alone = runs("a", 100, kind="only here")
    few = runs("a", 100, 4) + runs("b", 100, 5)
    unknown = runs("gone", 5)
    evidence = speed_evidence(alone + few + unknown, {"a": 1.0, "b": 1.0})
    assert evidence == {"b": SpeedEvidence(1.0, 5, 1)}


def test_kinds_weigh_by_their_runs() -> None:
    same = runs("a", 100, 9) + runs("b", 100, 1)
    slower = runs("a", 1_000, 1, "other") + runs("b", 10, 1, "other")
    evidence = speed_evidence(same + slower, {"a": 1.0, "b": 1.0})
    assert evidence["a"] == SpeedEvidence(pytest.approx(10**0.2), 10, 2)
