"""Endpoints that are down, serve another chain, or return invalid responses."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

import pytest

from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.chain.rpc.batching import ask_all
from deepsquare_chain.chain.rpc.endpoint import TransientEndpointError
from deepsquare_chain.chain.rpc.log_reader import read_logs
from deepsquare_chain.chain.rpc.pool import chain_time, close, connect, connected
from deepsquare_chain.chain.transactions.sender import Sender
from deepsquare_chain.devnet.node.base import Node
from deepsquare_chain.errors import EndpointError
from deepsquare_chain.observability.serving import open_listener
from deepsquare_chain.store.database import Store
from tests.support.livegrid import LiveGrid
from tests.support.proxy import Proxy, Spoil, refusal, status


@pytest.fixture
async def proxy(node: Node) -> AsyncIterator[Proxy]:
    async with Proxy(node.url) as result:
        yield result


async def test_an_endpoint_that_is_down() -> None:
    with open_listener(0) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(EndpointError, match="connection refused") as error:
        await connect(f"http://user:secret@127.0.0.1:{port}/key?token=secret", attempts=2)
    assert "secret" not in error.value.message
    assert "key" not in error.value.message
    assert f"127.0.0.1:{port}" in error.value.message
    assert error.value.exit_code == 7


async def test_one_connection_for_many_requests(proxy: Proxy, node: Node) -> None:
    async with connected(proxy.url) as w3:
        for _ in range(5):
            assert await w3.eth.chain_id == node.chain_id
        assert proxy.connections == 1
        await asyncio.gather(*(w3.eth.chain_id for _ in range(5)))
        assert proxy.connections <= 5


async def test_a_kept_connection_that_the_node_closed(proxy: Proxy, node: Node) -> None:
    async with connected(proxy.url) as w3:
        proxy.orders = ["lost"]
        assert await w3.eth.chain_id == node.chain_id
        assert proxy.connections == 2


async def test_a_lagging_node_is_not_polled_forever(proxy: Proxy, node: Node) -> None:
    """One address may belong to several nodes; a kept connection leads to one of them."""
    async with connected(proxy.url) as w3:
        proxy.orders = [lambda question, _: ("200 OK", _answer(question, "0x7fffff"))]
        assert await w3.eth.block_number == 0x7FFFFF
        assert await w3.eth.block_number < 0x7FFFFF
        # The chain ID was verified over a new connection.
        assert proxy.connections == 2
        await w3.eth.chain_id
        assert proxy.connections == 2
        proxy.orders = [refusal(-32000, "header not found")]
        await w3.eth.get_balance("0x" + "51" * 20)
        assert proxy.connections == 3
        # Requests in progress are not interrupted when connections are renewed.
        proxy.orders = [refusal(-32000, "header not found")]
        await asyncio.gather(*(w3.eth.block_number for _ in range(6)))


def _answer(question: Any, result: str) -> bytes:
    return json.dumps({"jsonrpc": "2.0", "id": question["id"], "result": result}).encode()


@pytest.mark.parametrize(
    "url", ["ftp://x", "ws://127.0.0.1:1", "nonsense", "", "http://127.0.0.1:99999", "http://[::1"]
)
async def test_no_address_of_a_node(url: str) -> None:
    with pytest.raises(EndpointError, match="not an http"):
        await connect(url)


async def test_an_unknown_name() -> None:
    with pytest.raises(EndpointError, match="can't be reached"):
        await connect("http://does-not-exist.invalid:1", attempts=1)


async def test_the_wrong_chain(node: Node) -> None:
    with pytest.raises(EndpointError, match=f"serves chain {node.chain_id}, not chain 5"):
        await connect(node.url, chain_id=5)


async def test_no_contract_at_the_address(node: Node) -> None:
    nowhere = "0x" + "51" * 20
    with pytest.raises(EndpointError, match=f"no contract at {nowhere}"):
        await connect(node.url, contracts=[nowhere])


async def test_another_contract_at_the_address(grid: LiveGrid) -> None:
    """The deployment record has addresses in the wrong order, or of another program."""
    mixed = Deployment(
        grid.deployment.chain_id,
        *reversed(grid.deployment.addresses),
        treasury=grid.deployment.treasury,
        forwarder=grid.deployment.forwarder,
        block=0,
    )
    contracts = Contracts(grid.w3, mixed)
    with pytest.raises(Exception) as error:  # noqa: PT011 - refused by it, or not understood
        await contracts.scheduler.job_count()
    assert type(error.value).__module__.startswith("deepsquare_chain")
    empty = Contracts(grid.w3, Deployment(1, *["0x" + "51" * 20] * 5, block=0))
    with pytest.raises(EndpointError, match="no MetaScheduler at"):
        await empty.scheduler.job_count()


@pytest.mark.parametrize(
    "fault",
    [
        "busy",
        status("503 Service Unavailable"),
        "page",
        "half",
        "wrong_id",
        "null",
        "lost",
        refusal(-32005, "rate limit exceeded"),
        refusal(429, "Too Many Requests"),
    ],
)
async def test_reads_are_tried_again(proxy: Proxy, fault: str | Spoil) -> None:
    async with connected(proxy.url) as w3:
        expected = await w3.eth.block_number
        proxy.orders = [fault, fault]
        assert await w3.eth.block_number == expected
        proxy.orders = [fault] * 9
        with pytest.raises(TransientEndpointError, match="The endpoint http://127"):
            await w3.eth.block_number
        assert len(proxy.orders) == 5  # four attempts


async def test_a_refusal_is_not_tried_again(proxy: Proxy) -> None:
    async with connected(proxy.url) as w3:
        proxy.orders = [status("403 Forbidden")] * 3
        with pytest.raises(EndpointError, match="HTTP status 403"):
            await w3.eth.block_number
        assert len(proxy.orders) == 2


async def test_a_node_that_hangs(proxy: Proxy) -> None:
    async with connected(proxy.url, timeout=0.2, attempts=1) as w3:
        proxy.orders = ["hang"]
        with pytest.raises(EndpointError, match="no answer in time"):
            await w3.eth.block_number


async def test_a_batch_is_checked_too(proxy: Proxy) -> None:
    async with connected(proxy.url) as w3:
        batch = [("eth_blockNumber", []), ("eth_chainId", [])]
        _, chain_id = await w3.provider.make_batch_request(batch)
        assert int(chain_id["result"], 16) == 1337
        for body in (b"[]", b"[1, 2]", b'[{"id": 1}, {"id": 1}]', b"{}"):
            proxy.orders = [lambda _request, _answer, body=body: ("200 OK", body)]
            second_response = await w3.provider.make_batch_request(batch)
            assert second_response[1]["result"] == chain_id["result"]
            assert proxy.orders == []


def gateway(change: Callable[[dict[str, Any]], object]) -> Spoil:
    """Responses rewritten as by a gateway, those of a batch in another order."""

    def spoil(_: Any, answer: Any) -> tuple[str, bytes]:
        answers = answer if isinstance(answer, list) else [answer]
        for item in answers:
            change(item)
        result = answers[::-1] if isinstance(answer, list) else answer
        return "200 OK", json.dumps(result).encode()

    return spoil


@pytest.mark.parametrize(
    "change",
    [
        lambda item: item.pop("jsonrpc"),
        lambda item: item.update(jsonrpc="1.0", error=None),
        lambda item: item.update(id=str(item["id"])),
        lambda item: item.update(id=float(item["id"]), took="3 ms"),
    ],
)
async def test_rewritten_responses_of_gateways_are_accepted(
    proxy: Proxy, change: Callable[[dict[str, Any]], object]
) -> None:
    async with connected(proxy.url, attempts=1) as w3:
        head = await w3.eth.block_number
        proxy.orders = [gateway(change)] * 2
        assert await w3.eth.block_number >= head
        chain_id, block = await ask_all(
            w3, [("eth_chainId", []), ("eth_getBlockByNumber", ["0x0", False])]
        )
        assert (chain_id, block["number"]) == ("0x539", "0x0")
        assert proxy.orders == [], "neither was asked twice"


@pytest.mark.parametrize("position", [0, 1])
async def test_a_batch_with_ambiguous_responses_is_split(proxy: Proxy, position: int) -> None:
    """Ids or responses are missing."""

    def without_ids(_: Any, answer: Any) -> tuple[str, bytes]:
        result = [{k: v for k, v in item.items() if k != "id"} for item in answer[position:]]
        return "200 OK", json.dumps(result).encode()

    async with connected(proxy.url, attempts=1) as w3:
        proxy.orders = [without_ids]
        requests = [("eth_chainId", []), ("eth_getBlockByNumber", ["0x0", False])]
        chain_id, block = await ask_all(w3, requests)
        assert (chain_id, block["number"]) == ("0x539", "0x0")


@pytest.mark.parametrize(
    "error", ["Zu viele Blöcke", {"message": "区块范围过大"}, {"code": "31", "message": 7}, [1]]
)
@pytest.mark.parametrize("alone", [True, False])
async def test_an_odd_error_refuses_a_range_as_any_other(
    grid: LiveGrid, proxy: Proxy, error: Any, alone: bool
) -> None:
    expected = await read_logs(grid.w3, grid.deployment.addresses, [], 0)

    def refuse(question: Any) -> tuple[str, Any] | None:
        requests = question if isinstance(question, list) else [question]
        if alone and len(requests) > 1:
            return "200 OK", {"error": error, "id": None, "jsonrpc": "2.0"}
        wide = [
            request
            for request in requests
            if request["method"] == "eth_getLogs" and _blocks(request) > 4
        ]
        if not wide:
            return None
        answers = [{"jsonrpc": "2.0", "id": request["id"], "error": error} for request in requests]
        return "200 OK", answers if isinstance(question, list) else answers[0]

    async with connected(proxy.url, attempts=1) as w3:
        proxy.profile = refuse
        assert await read_logs(w3, grid.deployment.addresses, [], 0) == expected
        assert proxy.counts["refused"] > 0


def _blocks(question: Any) -> int:
    (query,) = question["params"]
    if "blockHash" in query:
        return 1
    return int(query["toBlock"], 16) - int(query["fromBlock"], 16) + 1


@pytest.mark.parametrize(
    "fault",
    [
        "lost",
        "broken",
        "page",
        "wrong_id",
        "null",
        refusal(-32603, "internal error"),
    ],
)
async def test_a_transaction_is_broadcast_once(
    grid: LiveGrid, proxy: Proxy, fault: str | Spoil
) -> None:
    """The node accepted the transaction and its response was damaged: it takes effect once."""
    credit = grid.contracts.credit
    account = grid.customers[0]
    target = "0x" + "52" * 20
    before = await credit.balance_of(target)
    async with connected(proxy.url) as w3:
        with Store.open(None, chain_id=1337, contract="", account=account.address) as store:
            proxy.only, proxy.orders = frozenset({"eth_sendRawTransaction"}), [fault]
            sender = Sender(w3, account, store, chain_id=1337, poll_interval=0.02)
            receipt = await sender.send(credit.transfer(target, 1))
    assert receipt.events
    assert proxy.methods["eth_sendRawTransaction"] == 1
    assert await credit.balance_of(target) == before + 1


async def test_reads_succeed_while_a_third_of_all_responses_are_faulty(
    grid: LiveGrid, proxy: Proxy
) -> None:
    """Failed sends are retried under their idempotency keys: each takes effect once."""
    credit, account = grid.contracts.credit, grid.customers[1]
    target = f"0x{7:040x}"

    async def once(sender: Sender, number: int) -> None:
        async with asyncio.timeout(250):
            while True:
                with suppress(EndpointError):
                    await sender.send(credit.transfer(target, 1), key=str(number))
                    return

    async with connected(proxy.url) as w3:
        with Store.open(None, chain_id=1337, contract="", account=account.address) as store:
            sender = Sender(w3, account, store, chain_id=1337, poll_interval=0.05)
            kinds = ("busy", "broken", "page", "half", "wrong_id", "lost", "limited")
            proxy.rates = dict.fromkeys(kinds, 0.3 / len(kinds))
            await asyncio.gather(*(once(sender, number) for number in range(6)))
            assert sender.pending() == []
    assert await credit.balance_of(target) == 6


async def test_a_closed_connection_leaves_nothing_behind(node: Node) -> None:
    w3 = await connect(node.url)
    assert await chain_time(w3) > 1_600_000_000
    await close(w3)
    await close(w3)
