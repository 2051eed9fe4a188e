"""Nodes and deployed grids that several tests share: one of each kind a session."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import Any, TypeVar

import pytest

from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.devnet.node.base import Node
from deepsquare_chain.devnet.node.embedded import ChainProcess
from tests.support.anvil import start_anvil
from tests.support.livegrid import BorrowedNode, LiveGrid, deploy, live_grid
from tests.support.place import cli, place  # noqa: F401 - fixtures
from tests.support.postgres import Server, postgres

T = TypeVar("T")


class Background:
    """A loop that lives as long as the session: the nodes' processes belong to its thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Do something there and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(120)

    def close(self) -> None:
        """End the loop."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


@pytest.fixture(scope="session")
def background() -> Iterator[Background]:
    """The session's own loop."""
    found = Background()
    yield found
    found.close()


@pytest.fixture(scope="session", params=["embedded", "anvil"])
def shared_node(request: pytest.FixtureRequest, background: Background) -> Iterator[Node]:
    """A running node of either kind, which makes a block as soon as there are transactions.

    Its methods belong to another loop: tests use `node`.
    """
    found: Node = start_anvil() if request.param == "anvil" else ChainProcess(block_time=0)
    background.run(found.__aenter__())
    yield found
    background.run(found.close())


@pytest.fixture(scope="session")
def deployment(shared_node: Node, background: Background) -> Deployment:
    """A grid on it: see `LiveGrid`. Shared: a test leaves providers and roles as they were."""
    return background.run(deploy(BorrowedNode(shared_node.url, shared_node.chain_id)))


@pytest.fixture
async def node(shared_node: Node) -> AsyncIterator[Node]:
    """The shared node for one test. A test that moves time or blocks starts its own."""
    async with BorrowedNode(shared_node.url, shared_node.chain_id) as found:
        yield found


@pytest.fixture
async def grid(node: Node, deployment: Deployment) -> AsyncIterator[LiveGrid]:
    """The deployed grid: `w3`, `contracts`, `deployment`, accounts and their senders."""
    async with live_grid(node, deployment) as found:
        yield found


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Server]:
    """A PostgreSQL server of this session; `database()` gives the URL of a new database."""
    with postgres() as found:
        yield found
