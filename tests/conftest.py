"""Test levels and fixtures for all tests: no sockets in unit tests, a real node on demand."""

from __future__ import annotations

import logging
import socket
from collections.abc import AsyncIterator, Iterable, Iterator
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


#: Rough seconds of a file of each level in a run of all tests, and of the files that take longer.
#: They only decide the order: see `_in_order`.
SECONDS = {"contracts": 10, "invariants": 70, "unit": 5, "integration": 20, "e2e": 30}
SECONDS_OF_FILES = {
    "e2e/test_kills.py": 250,
    "e2e/test_demo.py": 170,
    "e2e/test_soak.py": 120,
    "integration/test_provider_slurm.py": 110,
    "e2e/test_machine_faults.py": 110,
    "integration/test_provider.py": 100,
    "contracts/test_forge.py": 90,
    "e2e/test_endpoint_faults.py": 75,
    "integration/test_cli_errors.py": 75,
    "integration/test_cli_submit.py": 70,
    "integration/test_metascheduler.py": 60,
    "e2e/test_web_browser.py": 60,
    "e2e/test_by_hand.py": 60,
    "e2e/test_reorgs.py": 60,
    "integration/test_slurm_executor.py": 60,
    "e2e/test_slurm_by_hand.py": 50,
    "integration/test_cli_tx.py": 65,
    "integration/test_relay_kills.py": 40,
    "contracts/test_artifacts.py": 40,
}
#: Levels whose tests mostly wait for other processes and for blocks; the others use the CPU.
WAITING_LEVELS = {"e2e", "integration"}


def _name(path: Path) -> str:
    return path.relative_to(_TESTS).as_posix()


def _seconds(path: Path) -> int:
    return SECONDS_OF_FILES.get(_name(path), SECONDS[_level(path)])


def _level(path: Path) -> str:
    return path.relative_to(_TESTS).parts[0]


def _in_order(paths: Iterable[Path]) -> list[Path]:
    """Order files for parallel workers: the longest first, waiting ones mixed with computing ones.

    A long file that starts late makes all other workers wait for one. Files that wait leave the
    CPU to those that compute, so both kinds are spread over the whole run, by their seconds.
    """
    kinds: tuple[list[Path], list[Path]] = ([], [])
    for path in sorted(paths, key=lambda path: (-_seconds(path), _name(path))):
        kinds[_level(path) in WAITING_LEVELS].append(path)
    position = {}
    for files in kinds:
        total, passed = sum(map(_seconds, files)), 0
        for path in files:
            position[path] = passed / total
            passed += _seconds(path)
    return sorted(position, key=lambda path: (position[path], -_seconds(path), _name(path)))


@pytest.hookimpl(trylast=True)  # after pytest has grouped the tests by their fixtures
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test by its folder, exactly one level; order the files."""
    for item in items:
        level = _level(item.path)
        if level not in LEVELS:
            raise pytest.UsageError(f"{item.nodeid} stands in no level folder of tests/")
        item.add_marker(level)
    order = {path: number for number, path in enumerate(_in_order({item.path for item in items}))}
    items.sort(key=lambda item: order[item.path])


class SocketUsedError(RuntimeError):
    """A unit test used the network."""


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
def _restored_logging() -> Iterator[None]:
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
    """Path of anvil. Without it, tests are skipped, or fail if DEEPSQUARE_REQUIRE_REAL=1."""
    return require_anvil()


@pytest.fixture
async def anvil() -> AsyncIterator[Anvil]:
    """A node for one test that mines a block per transaction.

    For blocks by the clock: `async with start_anvil(block_time=1) as node`.
    """
    async with start_anvil() as node:
        yield node
