"""One grid for all contract tests of a process; each test works on a snapshot."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.grid import Grid, Host
from tests.support.hostile import hostile_artifacts


@pytest.fixture(scope="session")
def deployed() -> Grid:
    return Grid()


@pytest.fixture
def grid(deployed: Grid) -> Iterator[Grid]:
    before = deployed.chain.snapshot()
    yield deployed
    deployed.chain.revert(before)


@pytest.fixture
def host(grid: Grid) -> Host:
    return grid.provider("provider")


@pytest.fixture
def other(grid: Grid) -> Host:
    return grid.provider("other provider")


@pytest.fixture(scope="session")
def hostile(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Misbehaving contracts by name."""
    return hostile_artifacts(request.config.cache.mkdir("contracts"))
