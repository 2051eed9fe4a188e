"""Nodes and deployed grids that tests share: one of each kind per session."""

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
from tests.support.local_devnet import cli, local_devnet, pending  # noqa: F401 - fixtures
from tests.support.postgres import Server, postgres

T = TypeVar("T")


class Background:
    """An event loop that lives as long as the session: the nodes' processes belong to its thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop and wait for its result."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(120)

    def close(self) -> None:
        """End the loop."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


@pytest.fixture(scope="session")
def background() -> Iterator[Background]:
    """The event loop of the session."""
    result = Background()
    yield result
    result.close()


class SharedNodes:
    """One node of each kind with a deployed grid, started at first use, for the whole session."""

    def __init__(self, background: Background) -> None:
        self._background = background
        self._nodes: dict[str, Node] = {}
        self._deployments: dict[str, Deployment] = {}

    def node(self, kind: str) -> Node:
        """Return the node of a kind, `anvil` or `embedded`; it mines a block per transaction."""
        if kind not in self._nodes:
            node: Node = start_anvil() if kind == "anvil" else ChainProcess(block_time=0)
            self._background.run(node.__aenter__())
            self._nodes[kind] = node
        return self._nodes[kind]

    def deployment(self, node: Node) -> Deployment:
        """Return the grid on one of these nodes."""
        if node.url not in self._deployments:
            node_lease = BorrowedNode(node.url, node.chain_id)
            self._deployments[node.url] = self._background.run(deploy(node_lease))
        return self._deployments[node.url]

    def close(self) -> None:
        """Stop the nodes."""
        for node in self._nodes.values():
            self._background.run(node.close())


@pytest.fixture(scope="session")
def shared_nodes(background: Background) -> Iterator[SharedNodes]:
    """Nodes that all test files of a worker share, to save starts and deployments."""
    nodes = SharedNodes(background)
    yield nodes
    nodes.close()


@pytest.fixture(scope="module", params=["embedded", "anvil"])
def shared_node(request: pytest.FixtureRequest, shared_nodes: SharedNodes) -> Node:
    """A running node of either kind, which mines a block per transaction.

    Its methods belong to another loop: tests use `node`.
    """
    return shared_nodes.node(request.param)


@pytest.fixture(scope="module")
def deployment(shared_node: Node, shared_nodes: SharedNodes) -> Deployment:
    """The shared grid on this node. Tests must restore its providers and roles."""
    return shared_nodes.deployment(shared_node)


@pytest.fixture
async def node(shared_node: Node) -> AsyncIterator[Node]:
    """The shared node. A test that changes time or blocks must start its own."""
    async with BorrowedNode(shared_node.url, shared_node.chain_id) as result:
        yield result


@pytest.fixture
async def grid(node: Node, deployment: Deployment) -> AsyncIterator[LiveGrid]:
    """The shared grid: `w3`, `contracts`, `deployment`, accounts and their senders."""
    async with live_grid(node, deployment) as result:
        yield result


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Server]:
    """A PostgreSQL server of this session; `database()` gives the URL of a new database."""
    with postgres() as result:
        yield result
