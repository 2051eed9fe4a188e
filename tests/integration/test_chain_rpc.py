"""A connection that believes nothing: endpoints that are down, wrong, or talk nonsense."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import suppress

import pytest

from deepsquare_chain.chain.contracts import Contracts
from deepsquare_chain.chain.deployment import Deployment
from deepsquare_chain.chain.rpc import (
    TransientEndpointError,
    chain_time,
    close,
    connect,
    connected,
)
from deepsquare_chain.chain.sender import Sender
from deepsquare_chain.devnet.node import Node
from deepsquare_chain.devnet.serving import open_listener
from deepsquare_chain.errors import EndpointError
from deepsquare_chain.store.database import Store
from tests.support import badproxy
from tests.support.badproxy import BadProxy
from tests.support.livegrid import LiveGrid


@pytest.fixture
async def proxy(node: Node) -> AsyncIterator[BadProxy]:
    async with BadProxy(node.url) as found:
        yield found


async def test_nobody_there() -> None:
    with open_listener(0) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(EndpointError, match="connection refused") as error:
        await connect(f"http://user:secret@127.0.0.1:{port}/key?token=secret", attempts=2)
    assert "secret" not in error.value.message
    assert "key" not in error.value.message
    assert f"127.0.0.1:{port}" in error.value.message
    assert error.value.exit_code == 7


@pytest.mark.parametrize("url", ["ftp://x", "ws://127.0.0.1:1", "nonsense", ""])
async def test_no_address_of_a_node(url: str) -> None:
    with pytest.raises(EndpointError, match="no http"):
        await connect(url)


async def test_an_unknown_name() -> None:
    with pytest.raises(EndpointError, match="can't be reached"):
        await connect("http://does-not-exist.invalid:1", attempts=1)


async def test_the_wrong_chain(node: Node) -> None:
    with pytest.raises(EndpointError, match=f"serves chain {node.chain_id}, not chain 5"):
        await connect(node.url, chain_id=5)


async def test_no_contract_there(node: Node) -> None:
    nowhere = "0x" + "51" * 20
    with pytest.raises(EndpointError, match=f"no contract at {nowhere}"):
        await connect(node.url, contracts=[nowhere])


async def test_another_contract_there(grid: LiveGrid) -> None:
    """Addresses of the record in the wrong order, or of another program."""
    mixed = Deployment(
        grid.deployment.chain_id,
        *reversed(grid.deployment.addresses),
        treasury=grid.deployment.treasury,
        block=0,
    )
    contracts = Contracts(grid.w3, mixed)
    with pytest.raises(Exception) as error:  # noqa: PT011 - refused by it, or not understood
        await contracts.scheduler.job_count()
    assert type(error.value).__module__.startswith("deepsquare_chain")
    empty = Contracts(grid.w3, Deployment(1, *["0x" + "51" * 20] * 4, block=0))
    with pytest.raises(EndpointError, match="no MetaScheduler at"):
        await empty.scheduler.job_count()


@pytest.mark.parametrize(
    "fault",
    [
        badproxy.status(429),
        badproxy.status(503),
        badproxy.page,
        badproxy.truncated,
        badproxy.wrong_id,
        badproxy.null,
        badproxy.lost,
        badproxy.error(-32005, "rate limit exceeded"),
        badproxy.error(429, "Too Many Requests"),
    ],
)
async def test_reads_are_tried_again(proxy: BadProxy, fault: badproxy.Fault) -> None:
    async with connected(proxy.url) as w3:
        truth = await w3.eth.block_number
        proxy.faults = [fault, fault]
        assert await w3.eth.block_number == truth
        proxy.faults = [fault] * 9
        with pytest.raises(TransientEndpointError, match="The endpoint http://127"):
            await w3.eth.block_number
        assert len(proxy.faults) == 5  # four attempts


async def test_a_refusal_is_not_tried_again(proxy: BadProxy) -> None:
    async with connected(proxy.url) as w3:
        proxy.faults = [badproxy.status(403)] * 3
        with pytest.raises(EndpointError, match="HTTP status 403"):
            await w3.eth.block_number
        assert len(proxy.faults) == 2


async def test_a_node_that_hangs(proxy: BadProxy) -> None:
    async with connected(proxy.url, timeout=0.2, attempts=1) as w3:
        proxy.delay = 0.5
        with pytest.raises(EndpointError, match="no answer in time"):
            await w3.eth.block_number


async def test_a_batch_is_checked_too(proxy: BadProxy) -> None:
    async with connected(proxy.url) as w3:
        batch = [("eth_blockNumber", []), ("eth_chainId", [])]
        _, chain_id = await w3.provider.make_batch_request(batch)
        assert int(chain_id["result"], 16) == 1337
        for body in (b"[]", b"[1, 2]", b'[{"id": 1}, {"id": 1}]', b"{}"):
            proxy.faults = [lambda _request, _answer, body=body: (200, body)]
            again = await w3.provider.make_batch_request(batch)
            assert again[1]["result"] == chain_id["result"]
            assert proxy.faults == []


@pytest.mark.parametrize(
    "fault",
    [
        badproxy.lost,
        badproxy.status(502),
        badproxy.page,
        badproxy.wrong_id,
        badproxy.null,
        badproxy.error(-32603, "internal error"),
    ],
)
async def test_a_transaction_is_broadcast_once(
    grid: LiveGrid, proxy: BadProxy, fault: badproxy.Fault
) -> None:
    """The node took it, the answer was spoilt: the effect comes, and comes once."""
    credit = grid.contracts.credit
    account = grid.customers[0]
    target = "0x" + "52" * 20
    before = await credit.balance_of(target)
    async with connected(proxy.url) as w3:
        with Store.open(None, chain_id=1337, contract="", account=account.address) as store:
            proxy.methods, proxy.faults = {"eth_sendRawTransaction"}, [fault]
            sender = Sender(w3, account, store, chain_id=1337, poll_interval=0.02)
            receipt = await sender.send(credit.transfer(target, 1))
    assert receipt.events
    assert proxy.seen.count("eth_sendRawTransaction") == 1
    assert await credit.balance_of(target) == before + 1


@pytest.mark.parametrize("seed", [7])
async def test_a_third_of_all_answers_spoilt(grid: LiveGrid, proxy: BadProxy, seed: int) -> None:
    """Whatever fails is sent again under its key: each effect comes, and comes once."""
    dice = random.Random(seed)
    kinds = [
        badproxy.status(429),
        badproxy.status(503),
        badproxy.page,
        badproxy.truncated,
        badproxy.wrong_id,
        badproxy.lost,
        badproxy.error(-32005, "rate limit exceeded"),
    ]
    credit, account = grid.contracts.credit, grid.customers[1]
    target = f"0x{seed:040x}"

    async def once(sender: Sender, number: int) -> None:
        async with asyncio.timeout(100):
            while True:
                with suppress(EndpointError):
                    await sender.send(credit.transfer(target, 1), key=str(number))
                    return

    async with connected(proxy.url) as w3:
        with Store.open(None, chain_id=1337, contract="", account=account.address) as store:
            sender = Sender(w3, account, store, chain_id=1337, poll_interval=0.05)
            proxy.chaos = lambda: dice.choice(kinds) if dice.random() < 0.3 else None
            await asyncio.gather(*(once(sender, number) for number in range(12)))
            assert sender.pending() == []
    assert await credit.balance_of(target) == 12


async def test_a_closed_connection_leaves_nothing_behind(node: Node) -> None:
    w3 = await connect(node.url)
    assert await chain_time(w3) > 1_600_000_000
    await close(w3)
    await close(w3)
