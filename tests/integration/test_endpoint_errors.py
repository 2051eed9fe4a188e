"""Endpoints that answer with error objects, as nodes and hosted services do.

A refused range of logs or batch is split. A failed read is retried, then sent to another endpoint.
Transactions that were sent are tracked in spite of all these errors.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import pytest

from deepsquare_chain.chain.bindings import reverts
from deepsquare_chain.chain.bindings.calls import Call
from deepsquare_chain.chain.rpc.batching import ask_all
from deepsquare_chain.chain.rpc.endpoint import TransientEndpointError, WrongEndpointError
from deepsquare_chain.chain.rpc.log_reader import read_logs
from deepsquare_chain.chain.rpc.pool import connected
from deepsquare_chain.chain.transactions import sender as sender_module
from deepsquare_chain.chain.transactions.outbox import TxState
from deepsquare_chain.chain.transactions.sender import Sender
from deepsquare_chain.devnet.node.base import Node, dev_accounts
from deepsquare_chain.devnet.node.embedded import ChainProcess
from deepsquare_chain.errors import EndpointError
from deepsquare_chain.store.database import Store
from tests.support.livegrid import LiveGrid
from tests.support.proxy import (
    BATCH_REFUSALS,
    HOSTED,
    RANGE_REFUSALS,
    READ_ERRORS,
    Proxy,
    failing,
    few_blocks,
    few_calls,
    hosted,
    refusal,
)

NOBODY = "0x" + "51" * 20
SEND = "eth_sendRawTransaction"


@pytest.fixture(scope="module")
def shared_node(shared_nodes: Any) -> Node:
    """The proxy makes the errors, so one kind of node is enough."""
    node: Node = shared_nodes.node("anvil")
    return node


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender_module, "_BACKOFF", (0.01, 0.1))


@pytest.fixture
async def proxy(grid: LiveGrid) -> AsyncIterator[Proxy]:
    async with Proxy(grid.node.url) as result:
        yield result


async def logs(w3: Any, grid: LiveGrid) -> list[Any]:
    # Of few blocks: other tests of this grid add any number of them, and twice the range is tried after
    # 64 answers; three reads of 40 blocks, two at a time, stay below.
    first = grid.deployment.block
    last = min(first + 39, int(await grid.w3.eth.block_number))
    result = await read_logs(w3, grid.deployment.addresses, [], first, last)
    return [(item["blockHash"], item["logIndex"]) for item in result]


@pytest.mark.parametrize("kind", RANGE_REFUSALS)
async def test_any_refused_range_is_read_in_smaller_ones(
    grid: LiveGrid, proxy: Proxy, kind: str
) -> None:
    expected = await logs(grid.w3, grid)
    assert len(expected) > 5
    async with connected(proxy.url) as w3:
        proxy.profile = few_blocks(2, *RANGE_REFUSALS[kind])
        assert await logs(w3, grid) == expected
        assert await logs(w3, grid) == expected
        refusals = proxy.counts["refused"]
        assert refusals > 0
        assert await logs(w3, grid) == expected
        assert proxy.counts["refused"] == refusals, "what it takes is remembered"


async def test_a_range_that_is_refused_down_to_one_block_is_reported(
    grid: LiveGrid, proxy: Proxy
) -> None:
    async with connected(proxy.url) as w3:
        before = w3.provider.log_range
        proxy.profile = few_blocks(0, "200 OK", -32000, "no logs here")
        with pytest.raises(EndpointError, match="no logs here"):
            await logs(w3, grid)
        assert w3.provider.log_range == before, "the error says nothing about ranges"


@pytest.mark.parametrize("kind", BATCH_REFUSALS)
async def test_any_refused_batch_is_split(grid: LiveGrid, proxy: Proxy, kind: str) -> None:
    requests: list[tuple[str, list[Any]]] = [
        ("eth_getBlockByNumber", [hex(number), False]) for number in range(10)
    ]
    expected = await ask_all(grid.w3, requests)
    async with connected(proxy.url) as w3:
        limit, line, code, message, shape = BATCH_REFUSALS[kind]
        proxy.profile = few_calls(limit, line, code, message, shape=shape)
        assert await ask_all(w3, requests) == expected
        assert await ask_all(w3, requests) == expected, "once may have been chance"
        proxy.counts.clear()
        assert await ask_all(w3, requests) == expected
        assert proxy.counts["refused"] == 0, "what it takes is remembered"
        assert proxy.counts["requests"] <= 10


@pytest.mark.parametrize("name", HOSTED)
async def test_hosted_endpoints_are_read_and_written_within_their_limits(
    grid: LiveGrid, proxy: Proxy, name: str
) -> None:
    expected = await logs(grid.w3, grid)
    requests: list[tuple[str, list[Any]]] = [("eth_getBlockByNumber", ["0x1", False])] * 8
    credit, account = grid.contracts.credit, grid.customers[0]
    target = f"0x{list(HOSTED).index(name) + 0xB057:040x}"
    async with connected(proxy.url) as w3:
        proxy.profile = hosted(HOSTED[name])
        assert await logs(w3, grid) == expected
        assert len(await ask_all(w3, requests)) == 8
        with Store.open(None, chain_id=1337, contract="", account=account.address) as store:
            sender = Sender(w3, account, store, chain_id=1337, poll_interval=0.02)
            await sender.send(credit.transfer(target, 1))
            assert [recent_entry.state for recent_entry in store.recent_entries()] == [
                TxState.MINED
            ]
    assert proxy.counts["refused"] > 2
    assert await credit.balance_of(target) == 1


async def test_an_outage_does_not_change_the_batch_size(grid: LiveGrid, proxy: Proxy) -> None:
    requests: list[tuple[str, list[Any]]] = [("eth_getBlockByNumber", ["0x0", False])] * 10
    async with connected(proxy.url, attempts=1) as w3:
        proxy.profile = failing({"eth_getBlockByNumber"}, *READ_ERRORS["503"], times=100)
        with pytest.raises(TransientEndpointError):
            await ask_all(w3, requests)
        proxy.profile = None
        await ask_all(w3, requests)
        proxy.counts.clear()
        await ask_all(w3, requests)
        assert proxy.counts["requests"] == 1


async def test_a_split_batch_survives_failures_of_its_parts(grid: LiveGrid, proxy: Proxy) -> None:
    """The parts of a split batch are sent in sequence, and each sometimes fails."""
    requests: list[tuple[str, list[Any]]] = [("eth_getBlockByNumber", ["0x0", False])] * 30
    async with connected(proxy.url, attempts=1) as w3:
        limit, line, code, message, shape = BATCH_REFUSALS["none"]
        proxy.profile = few_calls(limit, line, code, message, shape=shape)
        await ask_all(w3, requests)
        await ask_all(w3, requests)
        proxy.rates = {"internal": 0.1, "broken": 0.1, "wrong_id": 0.05}
        assert len(await ask_all(w3, requests)) == 30
        assert proxy.faults > 2


@pytest.mark.parametrize("kind", READ_ERRORS)
async def test_a_failed_read_is_retried_and_then_sent_to_another_endpoint(
    grid: LiveGrid, proxy: Proxy, kind: str
) -> None:
    async with connected(proxy.url) as w3:
        proxy.profile = failing({"eth_getBalance"}, *READ_ERRORS[kind], times=2)
        assert await w3.eth.get_balance(NOBODY) == 0
    async with connected(f"{proxy.url},{grid.node.url}", attempts=1) as w3:
        proxy.profile = failing({"eth_getBalance"}, *READ_ERRORS[kind], times=99)
        assert await w3.eth.get_balance(NOBODY) == 0
        answers = await ask_all(w3, [("eth_getBalance", [NOBODY, "latest"])] * 3)
        assert answers == ["0x0"] * 3
    async with connected(proxy.url, attempts=2) as w3:
        with pytest.raises(TransientEndpointError, match=READ_ERRORS[kind][2][:5]):
            await w3.eth.get_balance(NOBODY)


async def test_a_method_that_one_endpoint_lacks_is_sent_to_the_other(
    grid: LiveGrid, proxy: Proxy
) -> None:
    lacking = ("200 OK", -32601, "the method eth_gasPrice does not exist/is not available")
    async with connected(f"{proxy.url},{grid.node.url}", attempts=1) as w3:
        proxy.profile = failing({"eth_gasPrice"}, *lacking, times=9)
        assert await w3.eth.gas_price > 0
        # Not a failure: an endpoint that lacks one method serves the others.
        assert w3.provider.members[0].failures == 0


async def test_errors_of_the_evm_are_responses(grid: LiveGrid, proxy: Proxy) -> None:
    async with connected(proxy.url) as w3:
        sender = Sender(w3, grid.stranger, Store.open(None, chain_id=1, contract="", account=""),
                        chain_id=grid.node.chain_id)  # fmt: skip
        with pytest.raises(reverts.ERC20InsufficientBalance):
            await sender.simulate(grid.contracts.credit.transfer(NOBODY, 10**30))
        assert proxy.methods["eth_call"] == 1


@pytest.mark.parametrize("kind", READ_ERRORS)
@pytest.mark.parametrize("method", ["eth_getTransactionReceipt", "eth_blockNumber"])
async def test_sent_transactions_are_awaited_through_errors(
    grid: LiveGrid, proxy: Proxy, kind: str, method: str
) -> None:
    credit, account = grid.contracts.credit, grid.customers[0]
    target = f"0x{len(kind):040x}"
    before = await credit.balance_of(target)

    def after_send(question: Any) -> Any:
        return fails(question) if proxy.methods[SEND] else None

    async with connected(proxy.url, attempts=1) as w3:
        with Store.open(None, chain_id=1337, contract="", account=account.address) as store:
            sender = Sender(w3, account, store, chain_id=1337, poll_interval=0.02)
            fails = failing({method}, *READ_ERRORS[kind], times=3)
            proxy.profile = after_send
            receipt = await sender.send(credit.transfer(target, 1))
            assert receipt.events
            assert [recent_entry.state for recent_entry in store.recent_entries()] == [
                TxState.MINED
            ]
    assert proxy.counts["refused"] == 3
    assert await credit.balance_of(target) == before + 1


@pytest.mark.parametrize("accepted", [True, False])
@pytest.mark.parametrize("message", ["Internal error", "upstream request timed out", "try later"])
async def test_an_unknown_error_to_a_send_is_no_refusal(
    grid: LiveGrid, proxy: Proxy, message: str, accepted: bool
) -> None:
    """Whether or not the node accepted it, the transaction is resent until it is mined once."""
    credit, account = grid.contracts.credit, grid.customers[0]
    target = f"0x{len(message):039x}{accepted:x}"
    before = await credit.balance_of(target)
    async with connected(proxy.url) as w3:
        with Store.open(None, chain_id=1337, contract="", account=account.address) as store:
            if accepted:
                proxy.only, proxy.orders = frozenset({SEND}), [refusal(-32603, message)]
            else:
                proxy.profile = failing({SEND}, "200 OK", -32603, message, times=1)
            sender = Sender(w3, account, store, chain_id=1337, poll_interval=0.02)
            await sender.send(credit.transfer(target, 1))
            assert len(store.recent_entries()) == 1
    assert await credit.balance_of(target) == before + 1


async def test_a_grid_works_while_a_third_of_all_responses_are_errors(
    grid: LiveGrid, proxy: Proxy
) -> None:
    credit, account = grid.contracts.credit, grid.customers[1]
    target = "0x" + "a7" * 20

    async def once(sender: Sender, number: int) -> None:
        async with asyncio.timeout(100):
            while True:
                with suppress(EndpointError):
                    await sender.send(credit.transfer(target, 1), key=f"errors {number}")
                    return

    async with connected(proxy.url) as w3:
        with Store.open(None, chain_id=1337, contract="", account=account.address) as store:
            sender = Sender(w3, account, store, chain_id=1337, poll_interval=0.05)
            kinds = ("internal", "indexing", "unavailable", "denied", "disowned")
            proxy.rates = dict.fromkeys(kinds, 0.3 / len(kinds))
            await asyncio.gather(*(once(sender, number) for number in range(6)))
            assert sender.pending() == []
    assert await credit.balance_of(target) == 6


async def test_a_restarted_chain_gets_no_old_transactions() -> None:
    """Chain id, addresses and accounts are the same: an old signed transaction would be valid."""
    account, call = dev_accounts()[7], Call(to=NOBODY, data=b"", label="a coin", value=1)
    async with (
        ChainProcess(block_time=0) as old,
        Proxy(old.url) as proxy,
        connected(proxy.url) as w3,
    ):
        with Store.open(None, chain_id=1337, contract="", account=account.address) as store:
            sender = Sender(w3, account, store, chain_id=1337, poll_interval=0.02)
            for _ in range(2):
                await sender.send(call)
            async with ChainProcess(block_time=0) as new, connected(new.url) as new_w3:
                assert new_w3.provider.genesis != w3.provider.genesis
                proxy.lead_to(new.url)
                for work in (sender.reconcile(), sender.send(call), sender.recover()):
                    with pytest.raises(WrongEndpointError, match="another chain 1337"):
                        await work
                assert await new_w3.eth.get_transaction_count(account.address) == 0
            assert proxy.methods[SEND] == 2
            assert {recent_entry.state for recent_entry in store.recent_entries()} == {
                TxState.MINED
            }
