"""Levels, and what belongs to all tests: no sockets in unit tests, a real node on demand."""

from __future__ import annotations

import logging
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import structlog
from hypothesis import HealthCheck, settings

from deepsquare_chain.devnet.node.base import Anvil
from tests.support.anvil import require_anvil, start_anvil

LEVELS = ("contracts", "invariants", "unit", "integration", "e2e")
_TESTS = Path(__file__).parent

# Several workers share two cores: a slow example is no failure, and runs must be repeatable.
settings.register_profile(
    "grid",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("grid")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test by its folder: exactly one level."""
    for item in items:
        level = item.path.relative_to(_TESTS).parts[0]
        if level not in LEVELS:
            raise pytest.UsageError(f"{item.nodeid} stands in no level folder of tests/")
        item.add_marker(level)


class SocketUsedError(RuntimeError):
    """A unit test wanted the network."""


def _refuse(*_arguments: Any, **_options: Any) -> NoReturn:
    raise SocketUsedError("unit tests open no socket; move this test to tests/integration")


@pytest.fixture(autouse=True)
def _no_sockets_in_unit_tests(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if request.node.get_closest_marker("unit") is None:
        return
    # The event loop's own pair of sockets is made without any of these.
    for name in ("connect", "connect_ex", "bind", "listen", "sendto", "sendmsg"):
        monkeypatch.setattr(socket.socket, name, _refuse)
    monkeypatch.setattr(socket, "getaddrinfo", _refuse)


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """A command that runs in this process sets up logging; later tests must not inherit it."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


@pytest.fixture(scope="session")
def anvil_binary() -> Path:
    """The node's binary; skips without it, fails where DEEPSQUARE_REQUIRE_REAL=1."""
    return require_anvil()


@pytest.fixture
async def anvil() -> AsyncIterator[Anvil]:
    """A node of the test's own that makes a block for each transaction.

    For blocks by the clock: `async with start_anvil(block_time=1) as node`.
    """
    async with start_anvil() as node:
        yield node
