"""Customers, providers, strangers, scheduler, administrator and time, in any order.

`DEEPSQUARE_PROFILE=long` runs many more sequences with new random numbers;
`DEEPSQUARE_EXAMPLES` is their number.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.invariants.games import Games
from tests.invariants.records import ARROWS
from tests.invariants.storage import Storage
from tests.support.grid import Grid
from tests.support.hostile import hostile_artifacts

LONG = os.environ.get("DEEPSQUARE_PROFILE") == "long"


def profile() -> settings:
    """The default run is reproducible; a long run is random."""
    shared = {
        "deadline": None,
        "report_multiple_bugs": False,
        "suppress_health_check": list(HealthCheck),
        "phases": [Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
    }
    if LONG:
        examples = int(os.environ.get("DEEPSQUARE_EXAMPLES", "4000"))
        return settings(max_examples=examples, stateful_step_count=150, derandomize=False, **shared)
    return settings(max_examples=60, stateful_step_count=90, derandomize=True, **shared)


@pytest.mark.timeout(0 if LONG else 600)
def test_the_numbered_invariants_hold(request: pytest.FixtureRequest) -> None:
    try:
        token = hostile_artifacts(request.config.cache.mkdir("contracts"))["BlockingCredit"]
    except pytest.skip.Exception:
        token = None  # without a compiler, the plain token, which blocks nobody
    grid = Grid(token=token)
    storage = Storage(grid)
    checks: Counter[int] = Counter()
    call_counts: Counter[Any] = Counter()
    run_state_machine_as_test(lambda: Games(grid, storage, checks, call_counts), settings=profile())

    print(sorted(checks.items()), call_counts.most_common(), sep="\n")
    assert set(checks) == set(range(1, 18)), "an invariant was never checked"
    arrows = {(before, after) for before, row in ARROWS.items() for after in row}
    assert arrows <= set(call_counts), f"never moved: {arrows - set(call_counts)}"
    assert call_counts["collected"], "no interim payment was ever made"
