"""A websocket that loses its connection: blocks are delayed, never missed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from websockets.asyncio.server import ServerConnection, serve

from deepsquare_chain.chain.rpc.heads import HeadSubscription
from deepsquare_chain.chain.rpc.pool import connected
from deepsquare_chain.errors import UsageError
from tests.support.anvil import start_anvil


class WakeCounter:
    """Counts the notifications of a subscription."""

    def __init__(self) -> None:
        self.wakes = 0
        self.on_change: list[bool] = []
        self._changed = asyncio.Event()

    def wake(self) -> None:
        self.wakes += 1
        self._changed.set()

    def tell(self, listens: bool) -> None:
        self.on_change.append(listens)
        self._changed.set()

    async def until(self, condition: Any) -> None:
        async with asyncio.timeout(90):
            while not condition(self):
                self._changed.clear()
                await self._changed.wait()


@asynccontextmanager
async def listening(
    url: str, counter: WakeCounter, chain_id: int = 7
) -> AsyncIterator[HeadSubscription]:
    watch = HeadSubscription(
        url, counter.wake, chain_id=chain_id, on_change=counter.tell, pauses=(0.01, 0.05)
    )
    watch.start()
    try:
        yield watch
    finally:
        await watch.stop()
        await watch.stop()


async def test_a_real_node_wakes_at_each_block() -> None:
    counter = WakeCounter()
    async with start_anvil() as node, connected(node.url) as w3:
        url = node.url.replace("http", "ws")
        async with listening(url, counter, node.chain_id):
            await counter.until(lambda value: value.on_change == [True])
            for number in range(1, 4):
                await w3.provider.make_request("evm_mine", [])
                await counter.until(lambda found, number=number: found.wakes > number)
        port = int(url.rpartition(":")[2])
    async with listening(f"ws://127.0.0.1:{port}", counter):
        # The node is gone: this is reported, and the connection is retried.
        await counter.until(lambda value: value.on_change.count(False) >= 2)


@asynccontextmanager
async def server(*bodies: Any, chain: Any = "0x7") -> AsyncIterator[str]:
    """A node that sends the given messages after a subscription, and closes the connection."""

    async def talk(socket: ServerConnection) -> None:
        for result in (chain, "0xabc"):
            question = json.loads(await socket.recv())
            await socket.send(json.dumps({"id": question["id"], "result": result}))
        for body in bodies:
            await socket.send(body if isinstance(body, str | bytes) else json.dumps(body))

    async with serve(talk, "127.0.0.1", 0) as outcome:
        yield f"ws://127.0.0.1:{outcome.sockets[0].getsockname()[1]}"


HEAD = {"method": "eth_subscription", "params": {"subscription": "0xabc", "result": {}}}


async def test_a_lost_connection_is_opened_again() -> None:
    counter = WakeCounter()
    async with server(HEAD, HEAD) as url, listening(url, counter):
        # Two heads and the wake-up after a connection, three times over.
        await counter.until(lambda value: value.wakes >= 9)
    assert counter.on_change[:4] == [True, False, True, False]


@pytest.mark.parametrize(
    "body",
    ["no json", b"\x00\xff", "[]", "[" * 60_000, "x" * 70_000],
    ids=["text", "bytes", "list", "brackets", "long"],
)
async def test_an_invalid_message_ends_only_the_connection(body: Any) -> None:
    counter = WakeCounter()
    async with server(body) as url, listening(url, counter):
        await counter.until(lambda value: value.on_change.count(False) >= 2)


async def test_messages_of_other_subscriptions_wake_no_service() -> None:
    counter = WakeCounter()
    other = {"method": "eth_subscription", "params": {"subscription": "0xdef", "result": {}}}
    async with server(other, {"params": []}, {}) as url, listening(url, counter):
        await counter.until(lambda value: value.on_change == [True, False, True])
        assert counter.wakes == counter.on_change.count(True)  # by connections alone


@pytest.mark.parametrize("chain", ["0x8", 7, None, {}])
async def test_another_chain_wakes_no_service(chain: Any) -> None:
    counter = WakeCounter()
    async with server(HEAD, chain=chain) as url, listening(url, counter):
        await counter.until(lambda value: len(value.on_change) >= 2)
    assert (counter.wakes, set(counter.on_change)) == (0, {False})


def test_an_invalid_address() -> None:
    with pytest.raises(UsageError, match="not a ws://"):
        HeadSubscription("http://127.0.0.1:1", lambda: None, chain_id=1)
