"""The embedded chain behaves like a node: through AsyncWeb3, and over raw HTTP."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest
from eth_account import Account
from eth_utils.address import to_checksum_address
from web3 import AsyncHTTPProvider, AsyncWeb3
from web3.exceptions import ContractCustomError, TransactionNotFound, Web3RPCError

from deepsquare_chain.devnet.node.base import DEV_BALANCE, dev_accounts
from deepsquare_chain.devnet.node.core import Core, PooledTransaction, TransactionPool
from deepsquare_chain.devnet.node.embedded import MAX_BODY, ChainProcess, EmbeddedChain
from deepsquare_chain.devnet.node.wire import CallRequest, revert_error
from deepsquare_chain.errors import UsageError
from deepsquare_chain.observability.serving import open_listener

GWEI = 10**9
TOPIC = "11" * 32
# Runtime code by hand; x is the first word of calldata.
LOGGER = f"5f35805f525f55337f{TOPIC}60205fa200"  # store x in slot 0; log (TOPIC, caller) with x
REVERTER = "63deadbeef60e01b5f525f3560045260245ffd"  # revert with the custom error 0xdeadbeef(x)
CLOCK = "425f5260205ff3"  # return the time
STAMPER = "425f5500"  # store the time in slot 0
TRANSIENT = "602a60015d60015c5f5260205f60205e60206020f3"  # 42 through TSTORE, TLOAD and MCOPY
SPINNER = "5b5f56"  # loop for ever


def word(number: int) -> str:
    return f"{number:064x}"


def deploy_code(runtime: str) -> str:
    """Init code that returns ``runtime``."""
    return f"0x61{len(runtime) // 2:04x}80600a5f395ff3{runtime}"


def sign(nonce: int, *, sender: int = 0, **fields: Any) -> str:
    """Return a raw transaction as 0x-hex; a field that is None is omitted."""
    body = {
        "chainId": 1337,
        "nonce": nonce,
        "to": "0x" + "00" * 19 + "ee",
        "value": 0,
        "data": "0x",
        "gas": 200_000,
        "maxFeePerGas": 10 * GWEI,
        "maxPriorityFeePerGas": GWEI,
        **fields,
    }
    body = {name: value for name, value in body.items() if value is not None}
    if "to" in body:
        body["to"] = to_checksum_address(body["to"])
    signed = dev_accounts()[sender].sign_transaction(body)
    return "0x" + bytes(signed.raw_transaction).hex()


class Client:
    """Raw JSON-RPC and signed transactions against one node."""

    def __init__(self, node: EmbeddedChain, http: httpx2.AsyncClient) -> None:
        self.node = node
        self.http = http

    async def post(self, body: Any) -> Any:
        return (await self.http.post("/", json=body)).json()

    async def ask(self, method: str, *params: Any) -> dict[str, Any]:
        return await self.post({"jsonrpc": "2.0", "id": 1, "method": method, "params": params})

    async def get(self, method: str, *params: Any) -> Any:
        answer = await self.ask(method, *params)
        assert "error" not in answer, answer
        return answer["result"]

    async def refusal(self, method: str, *params: Any) -> dict[str, Any]:
        answer = await self.ask(method, *params)
        assert "result" not in answer, answer
        return answer["error"]

    def sign(self, nonce: int, **fields: Any) -> str:
        return sign(nonce, **{"chainId": self.node.chain_id, **fields})

    async def send(self, nonce: int, **fields: Any) -> str:
        return await self.get("eth_sendRawTransaction", self.sign(nonce, **fields))

    async def deploy(self, nonce: int, runtime: str, gas: int = 300_000) -> str:
        """Address of a contract, mined."""
        tx_hash = await self.send(nonce, to=None, data=deploy_code(runtime), gas=gas)
        await self.node.mine()
        receipt = await self.get("eth_getTransactionReceipt", tx_hash)
        assert receipt["status"] == "0x1"
        return receipt["contractAddress"]

    async def mined(self, tx_hash: str) -> dict[str, Any]:
        """Wait at most some seconds for a receipt."""
        for _ in range(500):
            receipt = await self.get("eth_getTransactionReceipt", tx_hash)
            if receipt is not None:
                return receipt
            await asyncio.sleep(0.01)
        raise AssertionError(f"{tx_hash} was not mined")

    async def head(self) -> dict[str, Any]:
        return await self.get("eth_getBlockByNumber", "latest", False)


@pytest.fixture
async def node() -> AsyncIterator[EmbeddedChain]:
    """A chain without a clock: only tests mine and advance time."""
    async with EmbeddedChain(block_time=None) as chain:
        yield chain


@pytest.fixture
async def client(node: EmbeddedChain) -> AsyncIterator[Client]:
    async with httpx2.AsyncClient(base_url=node.url, timeout=30) as http:
        yield Client(node, http)


@pytest.fixture
async def w3(node: EmbeddedChain) -> AsyncIterator[AsyncWeb3[Any]]:
    web3: AsyncWeb3[Any] = AsyncWeb3(AsyncHTTPProvider(node.url))
    yield web3
    await web3.provider.disconnect()


class TestIdentity:
    async def test_identification_of_the_node(self, client: Client, node: EmbeddedChain) -> None:
        assert await client.get("eth_chainId") == hex(1337) == hex(node.chain_id)
        assert await client.get("net_version") == "1337"
        assert (await client.get("web3_clientVersion")).startswith("DeepSquare-devnet/")
        assert await client.get("eth_syncing") is False
        assert await client.get("eth_accounts") == []
        assert await client.get("eth_blockNumber") == "0x0"

    async def test_chain_id_is_chosen_and_signed_for(self) -> None:
        async with EmbeddedChain(chain_id=4242, block_time=None) as chain:
            assert await chain.rpc("eth_chainId") == hex(4242)
            async with httpx2.AsyncClient(base_url=chain.url) as http:
                client = Client(chain, http)
                await client.send(0)
                refusal = await client.refusal(
                    "eth_sendRawTransaction", client.sign(1, chainId=1337)
                )
                assert refusal["message"] == "invalid chain id for signer: have 1337 want 4242"

    async def test_accounts_are_funded_and_keys_fit(self, w3: AsyncWeb3[Any], node: Any) -> None:
        assert len(node.accounts) == len(node.dev_keys) == 10
        for account, key in zip(node.accounts, node.dev_keys, strict=True):
            assert Account.from_key(key).address == account.address
            assert await w3.eth.get_balance(account.address) == DEV_BALANCE

    async def test_fund_pays_any_account(self) -> None:
        async with EmbeddedChain(block_time=0) as chain:
            accounts = ["0x" + f"{index:02x}" * 20 for index in range(0xA0, 0xA5)]
            await asyncio.gather(*(chain.fund(address, 7) for address in accounts))
            for address in accounts:
                assert await chain.rpc("eth_getBalance", address, "latest") == "0x7"


class TestThroughWeb3:
    async def test_a_contract_from_deployment_to_logs(
        self, w3: AsyncWeb3[Any], node: EmbeddedChain
    ) -> None:
        account = node.accounts[0]
        request = {"from": account.address, "data": deploy_code(LOGGER), "nonce": 0}
        request = {**request, "chainId": node.chain_id, "value": 0}
        request["gas"] = await w3.eth.estimate_gas(request)
        tip = await w3.eth.max_priority_fee
        request |= {"maxFeePerGas": await w3.eth.gas_price * 2, "maxPriorityFeePerGas": tip}
        tx_hash = await w3.eth.send_raw_transaction(
            account.sign_transaction(request).raw_transaction
        )
        with pytest.raises(TransactionNotFound):
            await w3.eth.get_transaction_receipt(tx_hash)
        await node.mine()
        receipt = await w3.eth.wait_for_transaction_receipt(tx_hash, timeout=5)
        assert receipt["status"] == 1
        assert receipt["from"] == account.address
        assert await w3.eth.get_code(receipt["contractAddress"]) == bytes.fromhex(LOGGER)

        call = {**request, "to": receipt["contractAddress"], "data": "0x" + word(5), "nonce": 1}
        tx_hash = await w3.eth.send_raw_transaction(account.sign_transaction(call).raw_transaction)
        await node.mine()
        (log,) = await w3.eth.get_logs(
            {"address": receipt["contractAddress"], "topics": ["0x" + TOPIC], "fromBlock": 0}
        )
        assert int.from_bytes(log["data"], "big") == 5
        assert log["topics"][1].hex().endswith(account.address[2:].lower())
        assert log["transactionHash"] == tx_hash
        assert log["blockNumber"] == 2
        assert await w3.eth.get_storage_at(receipt["contractAddress"], 0) == bytes(31) + b"\x05"
        block = await w3.eth.get_block("latest", full_transactions=True)
        (transaction,) = block["transactions"]
        assert transaction["hash"] == tx_hash
        assert transaction["maxFeePerGas"] == request["maxFeePerGas"]
        assert block["hash"] == log["blockHash"] == (await w3.eth.get_block(2))["hash"]

    async def test_a_revert_is_the_typed_error_of_web3(
        self, client: Client, w3: AsyncWeb3[Any]
    ) -> None:
        address = w3.to_checksum_address(await client.deploy(0, REVERTER))
        expected = "0xdeadbeef" + word(9)
        call = {"to": address, "data": "0x" + word(9)}
        with pytest.raises(ContractCustomError) as error_info:
            await w3.eth.call(call)
        assert error_info.value.data == expected
        with pytest.raises(ContractCustomError) as error_info:
            await w3.eth.estimate_gas(call)
        assert error_info.value.data == expected

    async def test_a_refused_transaction_is_a_rpc_error(
        self, client: Client, w3: AsyncWeb3[Any]
    ) -> None:
        raw = client.sign(0)
        await w3.eth.send_raw_transaction(raw)
        with pytest.raises(Web3RPCError, match="already known"):
            await w3.eth.send_raw_transaction(raw)


class TestReverts:
    async def test_code_3_with_the_bytes(self, client: Client) -> None:
        address = await client.deploy(0, REVERTER)
        expected = {
            "code": 3,
            "message": "execution reverted",
            "data": "0xdeadbeef" + word(77),
        }
        call = {"to": address, "input": "0x" + word(77)}
        for tag in ("latest", "pending", "0x1", {"blockNumber": "0x1"}):
            assert await client.refusal("eth_call", call, tag) == expected
        assert await client.refusal("eth_estimateGas", call) == expected

    async def test_a_mined_revert_is_a_failed_receipt(self, client: Client) -> None:
        address = await client.deploy(0, REVERTER)
        tx_hash = await client.send(1, to=address, data="0x" + word(1))
        await client.node.mine()
        receipt = await client.get("eth_getTransactionReceipt", tx_hash)
        assert (receipt["status"], receipt["logs"]) == ("0x0", [])
        assert 21_000 < int(receipt["gasUsed"], 16) < 30_000

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (
                "08c379a0" + word(32) + word(2) + b"no".hex().ljust(64, "0"),
                "execution reverted: no",
            ),
            (
                "4e487b71" + word(0x11),
                "execution reverted: panic: arithmetic underflow or overflow (0x11)",
            ),
            ("08c379a0" + "ff" * 32, "execution reverted"),
            ("", "execution reverted"),
        ],
    )
    def test_reasons_are_read(self, data: str, message: str) -> None:
        error = revert_error(bytes.fromhex(data))
        assert (error.message, error.data) == (message, "0x" + data)

    async def test_endless_code_runs_out_of_gas(self, client: Client) -> None:
        address = await client.deploy(0, SPINNER)
        call = {"to": address, "gas": "0x186a0"}
        assert (await client.refusal("eth_call", call))["message"].startswith(
            "gas required exceeds"
        )


class TestState:
    async def test_cancun_instructions(self, client: Client) -> None:
        address = await client.deploy(0, TRANSIENT)
        for tag in ("latest", "pending", "latest"):
            assert await client.get("eth_call", {"to": address}, tag) == "0x" + word(42)

    async def test_code_up_to_24576_bytes(self, client: Client) -> None:
        address = await client.deploy(0, "00" * 24_576, gas=6_000_000)
        assert len(await client.get("eth_getCode", address, "latest")) == 2 + 2 * 24_576
        tx_hash = await client.send(1, to=None, data=deploy_code("00" * 24_577), gas=6_000_000)
        await client.node.mine()
        assert (await client.get("eth_getTransactionReceipt", tx_hash))["status"] == "0x0"

    async def test_old_blocks_keep_their_state(self, client: Client) -> None:
        address = await client.deploy(0, LOGGER)
        await client.send(1, to=address, data="0x" + word(5))
        await client.node.mine()
        await client.send(2, to=address, data="0x" + word(6))
        block_hash = (await client.head())["hash"]
        for tag, value in [
            ("0x1", 0),
            ("0x2", 5),
            ({"blockHash": block_hash}, 5),
            ("latest", 5),
            ("pending", 6),
        ]:
            stored = await client.get("eth_getStorageAt", address, "0x0", tag)
            assert int(stored, 16) == value, tag
        await client.node.mine()
        assert int(await client.get("eth_getStorageAt", address, "0x0", "latest"), 16) == 6
        assert int(await client.get("eth_getBalance", "0x" + "77" * 20, "0x1"), 16) == 0
        for unknown in ("0x4", {"blockHash": "0x" + "ab" * 32}):
            refusal = await client.refusal("eth_getBalance", address, unknown)
            assert refusal == {"code": -32000, "message": "header not found"}

    async def test_calls_leave_no_trace(self, client: Client) -> None:
        address = await client.deploy(0, LOGGER)
        call = {"to": address, "data": "0x" + word(9)}
        await client.send(1, to=address, data="0x" + word(5))
        for tag in ("latest", "pending"):
            await client.get("eth_call", call, tag)
            await client.get("eth_estimateGas", call, tag)
        await client.node.mine()
        assert int(await client.get("eth_getStorageAt", address, "0x0", "latest"), 16) == 5
        assert len((await client.head())["transactions"]) == 1

    async def test_an_estimate_is_enough_and_not_much_more(self, client: Client) -> None:
        address = await client.deploy(0, LOGGER)
        call = {"from": dev_accounts()[0].address, "to": address, "data": "0x" + word(9)}
        estimate = int(await client.get("eth_estimateGas", call), 16)
        tx_hash = await client.send(1, to=address, data=call["data"], gas=estimate)
        await client.node.mine()
        receipt = await client.get("eth_getTransactionReceipt", tx_hash)
        assert receipt["status"] == "0x1"
        assert int(receipt["gasUsed"], 16) <= estimate <= int(receipt["gasUsed"], 16) * 1.1
        plain = {"from": call["from"], "to": "0x" + "77" * 20, "value": "0x1"}
        assert await client.get("eth_estimateGas", plain) == hex(21_000)

    async def test_an_estimate_covers_inner_calls_and_forgets_earlier_ones(
        self, client: Client
    ) -> None:
        logger = await client.deploy(0, LOGGER)
        inner = "5f355f52" + "5f5f60205f5f73" + logger[2:] + "5af1" + "602757" + "5f5ffd" + "5b00"
        outer = await client.deploy(1, inner)
        call = {"to": outer, "data": "0x" + word(9)}
        estimates = {
            await client.get("eth_estimateGas", call, tag)
            for tag in ("latest", "latest", "pending", "pending")
        }
        assert len(estimates) == 1  # storage slots are cold again in the next call
        (estimate,) = estimates
        tx_hash = await client.send(2, to=outer, data=call["data"], gas=int(estimate, 16))
        await client.node.mine()
        receipt = await client.get("eth_getTransactionReceipt", tx_hash)
        assert (receipt["status"], len(receipt["logs"])) == ("0x1", 1)

    async def test_calls_need_the_money_they_move(self, client: Client) -> None:
        call = {"from": "0x" + "77" * 20, "to": "0x" + "78" * 20, "value": "0x1"}
        for method in ("eth_call", "eth_estimateGas"):
            assert "insufficient funds" in (await client.refusal(method, call))["message"]
        priced = {"from": "0x" + "77" * 20, "gas": "0x5208", "gasPrice": "0x1"}
        assert "insufficient funds" in (await client.refusal("eth_call", priced))["message"]


class TestPool:
    async def refused(self, client: Client, nonce: int, **fields: Any) -> str:
        refusal = await client.refusal("eth_sendRawTransaction", client.sign(nonce, **fields))
        assert refusal["code"] == -32000
        return refusal["message"]

    async def test_errors_have_the_texts_of_geth(self, client: Client) -> None:
        await client.send(0)
        assert await self.refused(client, 0) == "already known"
        await client.node.mine()
        assert await self.refused(client, 0) == "nonce too low: next nonce 1, tx nonce 0"
        assert (await self.refused(client, 1, value=2 * DEV_BALANCE)).startswith(
            "insufficient funds for gas * price + value: balance "
        )
        assert "exceeds block gas limit" in await self.refused(client, 1, gas=60_000_001)
        assert await self.refused(client, 1, gas=20_999) == (
            "intrinsic gas too low: gas 20999, minimum needed 21000"
        )
        assert "max priority fee per gas higher" in await self.refused(
            client, 1, maxPriorityFeePerGas=11 * GWEI
        )
        assert "oversized data" in await self.refused(client, 1, data="0x" + "00" * 131_072)
        assert "initcode" in await self.refused(client, 1, to=None, data="0x" + "00" * 49_153)

    async def test_bytes_that_are_no_transaction_are_refused(self, client: Client) -> None:
        for raw in ("0x", "0x02", "0x00", "0xc0", "0x02c0", "0x7f00", "0xf8", client.sign(0)[:-2]):
            refusal = await client.refusal("eth_sendRawTransaction", raw)
            assert refusal["code"] == -32000, raw
        assert (
            "not supported" in (await client.refusal("eth_sendRawTransaction", "0x03c0"))["message"]
        )
        assert (await client.refusal("eth_sendRawTransaction", "zz"))["code"] == -32602

    async def test_older_transaction_types(self, client: Client) -> None:
        legacy = {"maxFeePerGas": None, "maxPriorityFeePerGas": None, "gasPrice": 2 * GWEI}
        with_access_list = {
            **legacy,
            "accessList": [{"address": "0x" + "01" * 20, "storageKeys": []}],
        }
        hashes = [await client.send(0, **legacy), await client.send(1, **with_access_list)]
        await client.node.mine()
        for kind, tx_hash in enumerate(hashes):
            assert (await client.get("eth_getTransactionByHash", tx_hash))["type"] == hex(kind)
            receipt = await client.get("eth_getTransactionReceipt", tx_hash)
            assert (receipt["status"], receipt["effectiveGasPrice"]) == ("0x1", hex(2 * GWEI))
        assert "EIP-155" in await self.refused(client, 2, **legacy, chainId=None)

    async def test_a_gap_waits_until_it_is_filled(self, client: Client) -> None:
        sender = dev_accounts()[0].address
        second_nonce = await client.send(2)
        await client.node.mine()
        assert (await client.head())["transactions"] == []
        waiting = await client.get("eth_getTransactionByHash", second_nonce)
        assert (waiting["hash"], waiting["blockHash"]) == (second_nonce, None)
        assert await client.get("eth_getTransactionReceipt", second_nonce) is None
        assert await client.get("eth_getTransactionCount", sender, "pending") == "0x0"
        first, second = await client.send(0), await client.send(1)
        assert await client.get("eth_getTransactionCount", sender, "pending") == "0x3"
        assert await client.get("eth_getTransactionCount", sender, "latest") == "0x0"
        await client.node.mine()
        assert (await client.head())["transactions"] == [first, second, second_nonce]
        assert await client.get("eth_getTransactionCount", sender, "latest") == "0x3"

    async def test_a_pending_transaction_is_replaced_for_a_tenth_more(self, client: Client) -> None:
        old = await client.send(1)
        assert (
            await self.refused(client, 1, maxFeePerGas=10 * GWEI + 1)
            == "replacement transaction underpriced"
        )
        assert (
            await self.refused(client, 1, maxFeePerGas=20 * GWEI)
            == "replacement transaction underpriced"
        )
        new = await client.send(1, maxFeePerGas=11 * GWEI, maxPriorityFeePerGas=GWEI * 11 // 10)
        assert await client.get("eth_getTransactionByHash", old) is None
        await client.send(0)
        await client.node.mine()
        assert (await client.head())["transactions"][1:] == [new]

    async def test_below_the_base_fee_waits(self, client: Client) -> None:
        cheap = await client.send(0, maxFeePerGas=GWEI // 2, maxPriorityFeePerGas=1)
        await client.node.mine()
        assert (await client.head())["transactions"] == []
        await client.node.mine(8)  # each empty block asks an eighth less
        assert (await client.get("eth_getTransactionReceipt", cheap))["status"] == "0x1"

    async def test_a_full_block_leaves_the_rest_for_the_next(self, client: Client) -> None:
        hashes = [await client.send(nonce, gas=25_000_000) for nonce in range(5)]
        # Gas limits must fit into the block; gas that a transaction leaves unused is available to the next.
        await client.node.mine()
        mined = (await client.head())["transactions"]
        assert mined == hashes[: len(mined)]
        await client.send(0, sender=1, gas=59_000_000, data="0xfe", to=None)
        await client.send(0, sender=2, gas=59_000_000, data="0xfe", to=None)
        await client.node.mine()
        assert len((await client.head())["transactions"]) == 1
        await client.node.mine()
        assert len((await client.head())["transactions"]) == 1

    async def test_pending_payments_count_against_the_balance(self, client: Client) -> None:
        half = DEV_BALANCE // 2
        await client.send(1, value=half)
        assert "queued cost" in await self.refused(client, 2, value=half)

    def test_senders_take_turns(self) -> None:
        pool = TransactionPool()
        for sender in (b"a", b"b"):
            for nonce in range(3):
                name = sender + bytes([nonce])
                pool.put(
                    PooledTransaction(
                        tx=None,
                        hash=name,
                        sender=sender,
                        nonce=nonce,
                        gas=1,
                        max_fee=1,
                        tip=1,
                        cost=1,
                    )
                )
        counts = {b"a": 0, b"b": 0}
        order = []
        while (pooled := pool.take(counts.__getitem__, base_fee=1, gas_left=1)) is not None:
            counts[pooled.sender] += 1
            order.append(pooled.sender)
        assert order == [b"a", b"b"] * 3
        assert len(pool) == 0


class TestCore:
    """A running worker would be too quick for these cases."""

    @pytest.fixture
    def core(self) -> Core:
        return Core(1337, {to_bytes(account.address): DEV_BALANCE for account in dev_accounts()})

    def send(self, core: Core, nonce: int, **fields: Any) -> None:
        core.send_raw(to_bytes(sign(nonce, **fields)))

    def test_pending_block_counts_pending_transactions(self, core: Core) -> None:
        sender = to_bytes(dev_accounts()[0].address)
        receiver = "0x" + "77" * 20
        for nonce in range(3):
            self.send(core, nonce, to=receiver, value=5)
        assert core.nonce(sender, "pending") == 3
        assert core.nonce(sender, "latest") == 0
        assert not core.has_executed
        assert core.balance(to_bytes(receiver), "latest") == 0
        assert core.balance(to_bytes(receiver), "pending") == 15
        assert core.has_executed
        core.seal()
        assert core.balance(to_bytes(receiver), "latest") == 15

    def test_a_pending_call_starts_cold_after_a_pending_transaction(self, core: Core) -> None:
        self.send(core, 0, to=None, data=deploy_code(LOGGER))
        core.mine()
        address = core.index.head.receipts[0]["contractAddress"]
        self.send(core, 1, to=address, data="0x" + word(5))
        call = CallRequest(to=to_bytes(address), data=to_bytes("0x" + word(6)))
        while_pending = core.estimate_gas(call, "pending")
        assert core.has_executed
        core.seal()
        assert core.estimate_gas(call, "latest") == while_pending

    def test_ordered_time_continues(self, core: Core) -> None:
        moment = int(time.time()) + 10_000
        core.set_next_timestamp(moment)
        core.seal()
        assert core.index.head.timestamp == moment
        assert moment <= core.clock.now() <= moment + 2

    def test_a_clock_set_back_stops_no_blocks(self, core: Core) -> None:
        core.plan = int(time.time()) - 3_600
        stamps = []
        for _ in range(3):
            core.seal()
            stamps.append(core.index.head.timestamp)
        assert stamps == [stamps[0], stamps[0] + 1, stamps[0] + 2]


def to_bytes(text: str) -> bytes:
    return bytes.fromhex(text[2:])


class TestBlocksAndLogs:
    async def chain_with_logs(self, client: Client) -> list[str]:
        """Two loggers; blocks 3 to 6 hold: a, (a, b), nothing, b."""
        a, b = await client.deploy(0, LOGGER), await client.deploy(1, LOGGER)
        await client.send(2, to=a, data="0x" + word(1))
        await client.node.mine()
        await client.send(3, to=a, data="0x" + word(2))
        await client.send(4, to=b, data="0x" + word(3))
        await client.node.mine(2)
        await client.send(0, sender=1, to=b, data="0x" + word(4))
        await client.node.mine()
        return [a, b]

    async def values(self, client: Client, **conditions: Any) -> list[int]:
        return [int(log["data"], 16) for log in await client.get("eth_getLogs", conditions)]

    async def test_ranges(self, client: Client) -> None:
        await self.chain_with_logs(client)
        whole_range = {"fromBlock": "earliest", "toBlock": "latest"}
        assert await self.values(client, **whole_range) == [1, 2, 3, 4]
        assert await self.values(client, fromBlock="0x4", toBlock="0x5") == [2, 3]
        assert await self.values(client) == [4]
        assert await self.values(client, fromBlock="0x6", toBlock="0xffff") == [4]
        assert await self.values(client, fromBlock="0x7", toBlock="0xffff") == []
        assert await self.values(client, fromBlock="0x7") == []
        refusal = await client.refusal("eth_getLogs", {"fromBlock": "0x3", "toBlock": "0x2"})
        assert refusal["message"] == "invalid block range params"

    async def test_by_block_hash(self, client: Client) -> None:
        await self.chain_with_logs(client)
        block = await client.get("eth_getBlockByNumber", "0x4", False)
        assert await self.values(client, blockHash=block["hash"]) == [2, 3]
        unknown = await client.refusal("eth_getLogs", {"blockHash": "0x" + "ab" * 32})
        assert unknown["message"] == "unknown block"
        conflicting = {"blockHash": block["hash"], "fromBlock": "0x1"}
        assert (await client.refusal("eth_getLogs", conflicting))["code"] == -32602

    async def test_addresses_and_topics(self, client: Client) -> None:
        a, b = await self.chain_with_logs(client)
        first, second = (
            "0x" + "00" * 12 + account.address[2:].lower() for account in dev_accounts()[:2]
        )
        topic = "0x" + TOPIC
        for conditions, values in [
            ({"address": a}, [1, 2]),
            ({"address": a.upper().replace("0X", "0x")}, [1, 2]),
            ({"address": [a, b]}, [1, 2, 3, 4]),
            ({"address": []}, [1, 2, 3, 4]),
            ({"topics": [topic]}, [1, 2, 3, 4]),
            ({"topics": [None, second]}, [4]),
            ({"topics": [topic, [first, second]]}, [1, 2, 3, 4]),
            ({"topics": [[], first], "address": b}, [3]),
            ({"topics": [topic, topic]}, []),
            ({"topics": [topic, None, None]}, []),
        ]:
            assert await self.values(client, fromBlock="0x0", **conditions) == values, conditions

    async def test_log_fields_count_through_the_block(self, client: Client) -> None:
        await self.chain_with_logs(client)
        logs = await client.get("eth_getLogs", {"fromBlock": "0x4", "toBlock": "0x4"})
        assert [log["logIndex"] for log in logs] == ["0x0", "0x1"]
        assert [log["transactionIndex"] for log in logs] == ["0x0", "0x1"]
        assert all(log["removed"] is False for log in logs)
        receipts = await client.get("eth_getBlockReceipts", "0x4")
        assert [receipt["logs"] for receipt in receipts] == [[logs[0]], [logs[1]]]
        cumulative = [int(receipt["cumulativeGasUsed"], 16) for receipt in receipts]
        gas_used = [int(receipt["gasUsed"], 16) for receipt in receipts]
        assert cumulative == [gas_used[0], sum(gas_used)]
        block = await client.get("eth_getBlockByNumber", "0x4", False)
        assert int(block["gasUsed"], 16) == sum(gas_used)

    async def test_blocks_by_number_and_hash(self, client: Client) -> None:
        await self.chain_with_logs(client)
        full = await client.get("eth_getBlockByNumber", "0x4", True)
        short = await client.get("eth_getBlockByHash", full["hash"], False)
        assert [tx["hash"] for tx in full["transactions"]] == short["transactions"]
        parent = await client.get("eth_getBlockByNumber", "0x3", False)
        assert full["parentHash"] == parent["hash"]
        assert await client.get("eth_getBlockByNumber", "0x99", False) is None
        assert await client.get("eth_getBlockByHash", "0x" + "ab" * 32, False) is None
        assert await client.get("eth_getBlockReceipts", "0x99") is None
        assert await client.get("eth_getTransactionByHash", "0x" + "ab" * 32) is None
        for reference in ("0x4", full["hash"]):
            assert await client.get("eth_getBlockTransactionCountByHash", reference) == "0x2"
            method = "eth_getTransactionByBlockHashAndIndex"
            assert await client.get(method, reference, "0x1") == full["transactions"][1]
            assert await client.get(method, reference, "0x2") is None
        assert (await client.get("eth_getBlockByNumber", "earliest", False))["number"] == "0x0"
        for tag in ("safe", "finalized"):
            assert (await client.get("eth_getBlockByNumber", tag, False))["number"] == "0x6"

    async def test_the_pending_block(self, client: Client) -> None:
        tx_hash = await client.send(0)
        block = await client.get("eth_getBlockByNumber", "pending", False)
        assert (block["number"], block["hash"]) == ("0x1", None)
        assert block["transactions"] == [tx_hash]
        pending = await client.get("eth_getBlockByNumber", "pending", True)
        assert pending["transactions"][0]["hash"] == tx_hash

    async def test_fee_history_is_one_longer_than_requested(self, client: Client) -> None:
        first = await client.get("eth_feeHistory", "0x5", "latest", [])
        assert (len(first["baseFeePerGas"]), first["oldestBlock"]) == (2, "0x0")
        await client.send(0)
        await client.node.mine(3)
        history = await client.get("eth_feeHistory", "0x2", "0x1", [25, 75])
        assert history["oldestBlock"] == "0x0"
        assert len(history["baseFeePerGas"]) == 3
        assert history["reward"] == [["0x0", "0x0"], [hex(GWEI), hex(GWEI)]]
        next_block = await client.get("eth_getBlockByNumber", "0x2", False)
        assert history["baseFeePerGas"][2] == next_block["baseFeePerGas"]
        assert (await client.refusal("eth_feeHistory", "0x1", "0x99", []))["code"] == -32000
        assert (await client.refusal("eth_feeHistory", "0x1", "latest", [75, 25]))["code"] == -32602

    async def test_getting_logs_of_many_blocks_is_quick(self, client: Client) -> None:
        address = await client.deploy(0, LOGGER)
        await client.send(1, to=address, data="0x" + word(1))
        await client.node.mine(300)
        started = time.monotonic()
        for _ in range(20):
            assert len(await self.values(client, fromBlock="0x0", address=address)) == 1
        assert time.monotonic() - started < 20, "without the bloom filters it takes minutes"


class TestTime:
    async def test_a_frozen_chain_is_set_by_hand(self, client: Client) -> None:
        address = await client.deploy(0, CLOCK)
        start = int((await client.head())["timestamp"], 16)

        async def now(tag: Any = "latest") -> int:
            return int(await client.get("eth_call", {"to": address}, tag), 16)

        assert await now() == start
        await client.node.set_time(start + 1_000)
        assert await now() == start + 1_000 == int((await client.head())["timestamp"], 16)
        await client.node.increase_time(50)
        assert await now() == start + 1_050
        assert await now("0x1") == start
        refusal = await client.refusal("evm_setNextBlockTimestamp", start)
        assert "not later" in refusal["message"]

    async def test_executed_call_uses_the_new_time(self, client: Client) -> None:
        address = await client.deploy(0, STAMPER)
        await client.send(1, to=address)
        pending = await client.get("eth_getBlockByNumber", "pending", False)
        assert len(pending["transactions"]) == 1  # executed, under the old time
        moment = int((await client.head())["timestamp"], 16) + 5_000
        await client.node.set_time(moment)
        block = await client.head()
        assert (len(block["transactions"]), int(block["timestamp"], 16)) == (1, moment)
        stored = await client.get("eth_getStorageAt", address, "0x0", "latest")
        assert int(stored, 16) == moment

    async def test_blocks_follow_the_wall_clock(self) -> None:
        async with EmbeddedChain() as chain:
            tx_hash = None
            arrivals: dict[int, float] = {}
            async with httpx2.AsyncClient(base_url=chain.url) as http:
                client = Client(chain, http)
                while len(arrivals) < 4:
                    block = await client.head()
                    number, stamp = int(block["number"], 16), int(block["timestamp"], 16)
                    if number not in arrivals:
                        arrivals[number] = time.time() - stamp
                    if number == 1 and tx_hash is None:
                        tx_hash = await client.send(0)
                    await asyncio.sleep(0.02)
                receipt = await client.get("eth_getTransactionReceipt", tx_hash)
                stamps = [
                    int((await client.get("eth_getBlockByNumber", hex(n), False))["timestamp"], 16)
                    for n in sorted(arrivals)
                ]
            assert int(receipt["blockNumber"], 16) <= 2
            # Never in the future; late only where the machine is busy.
            assert all(0 <= drift < 20 for number, drift in arrivals.items() if number > 0), (
                arrivals
            )
            assert stamps == sorted(set(stamps))

    async def test_time_travel_on_a_running_chain(self) -> None:
        async with EmbeddedChain() as chain:
            await chain.increase_time(3_600)
            head = await chain.rpc("eth_getBlockByNumber", "latest", False)
            assert abs(int(head["timestamp"], 16) - time.time() - 3_600) < 20
            await chain.set_time(int(time.time()) + 10_000)
            await asyncio.sleep(1.2)
            head = await chain.rpc("eth_getBlockByNumber", "latest", False)
            assert abs(int(head["timestamp"], 16) - time.time() - 10_000) < 20

    async def test_calls_use_the_current_time_on_a_chain_without_new_blocks(self) -> None:
        async with (
            EmbeddedChain(block_time=0) as chain,
            httpx2.AsyncClient(base_url=chain.url) as http,
        ):
            client = Client(chain, http)
            tx_hash = await client.send(0, to=None, data=deploy_code(CLOCK))
            address = (await client.mined(tx_hash))["contractAddress"]
            head = int((await client.head())["timestamp"], 16)
            await asyncio.sleep(max(0.0, head + 2 - time.time()))
            timestamp = int(await client.get("eth_call", {"to": address}, "latest"), 16)
            assert head + 2 <= timestamp <= time.time()
            assert int(await client.get("eth_call", {"to": address}, "0x1"), 16) == head
            # Blocks in a row run ahead of the clock; time moves on from the head all the same.
            for nonce in range(1, 8):
                await client.mined(await client.send(nonce))
            ahead = int((await client.head())["timestamp"], 16)
            await chain.increase_time(100)
            assert int((await client.head())["timestamp"], 16) >= ahead + 100

    async def test_instant_blocks(self) -> None:
        async with (
            EmbeddedChain(block_time=0) as chain,
            httpx2.AsyncClient(base_url=chain.url) as http,
        ):
            client = Client(chain, http)
            for nonce in range(3):
                await client.mined(await client.send(nonce))
            assert await client.get("eth_blockNumber") == "0x3"


NONSENSE: list[tuple[Any, int]] = [
    (5, -32600),
    ({"id": 1}, -32600),
    ({"id": 1, "method": 5}, -32600),
    ({"id": {}, "method": "eth_chainId"}, -32600),
    ({"id": 1, "method": "eth_nothing"}, -32601),
    ({"id": 1, "method": "eth_call", "params": {"to": "0x"}}, -32602),
    ({"id": 1, "method": "eth_call", "params": []}, -32602),
    ({"id": 1, "method": "eth_call", "params": [5]}, -32602),
    ({"id": 1, "method": "eth_call", "params": [{"to": "0x12"}]}, -32602),
    ({"id": 1, "method": "eth_call", "params": [{}, "someday"]}, -32602),
    ({"id": 1, "method": "eth_call", "params": [{}, "latest", {"0x00": {}}]}, -32602),
    ({"id": 1, "method": "eth_call", "params": [{"data": "0x1"}]}, -32602),
    (
        {"id": 1, "method": "eth_call", "params": [{"data": "0x12", "input": "0x34"}]},
        -32602,
    ),
    ({"id": 1, "method": "eth_chainId", "params": [1]}, -32602),
    ({"id": 1, "method": "eth_getBalance", "params": ["0x" + "zz" * 20]}, -32602),
    ({"id": 1, "method": "eth_getBlockByNumber", "params": [-1]}, -32602),
    ({"id": 1, "method": "eth_getBlockByNumber", "params": [[]]}, -32602),
    ({"id": 1, "method": "eth_getLogs", "params": ["0x0"]}, -32602),
    ({"id": 1, "method": "eth_getLogs", "params": [{"topics": [1]}]}, -32602),
    ({"id": 1, "method": "eth_getLogs", "params": [{"topics": "0x"}]}, -32602),
    ({"id": 1, "method": "eth_getLogs", "params": [{"address": {}}]}, -32602),
    ({"id": 1, "method": "eth_getStorageAt", "params": ["0x" + "00" * 20, None]}, -32602),
]


class TestHttp:
    async def test_batches(self, client: Client) -> None:
        answers = await client.post(
            [
                {"jsonrpc": "2.0", "id": "a", "method": "eth_chainId"},
                {"jsonrpc": "2.0", "id": 7, "method": "eth_nothing", "params": []},
                {"jsonrpc": "2.0", "method": "eth_chainId"},
                "rubbish",
            ]
        )
        assert [answer["id"] for answer in answers] == ["a", 7, None]
        assert answers[0]["result"] == hex(1337)
        assert [answer["error"]["code"] for answer in answers[1:]] == [-32601, -32600]
        assert (await client.post([]))["error"]["code"] == -32600
        requests = [{"jsonrpc": "2.0", "id": 1, "method": "eth_chainId"}] * 1_001
        assert (await client.post(requests))["error"]["code"] == -32600

    async def test_invalid_json_is_refused(self, client: Client) -> None:
        headers = {"content-type": "application/json"}
        for body in (b"{", b"", b"\xff\xfe", b"[" * 100_000, b'{"a":NaN'):
            answer = (await client.http.post("/", content=body, headers=headers)).json()
            assert answer["error"]["code"] == -32700
            assert answer["id"] is None

    async def test_invalid_requests_are_refused(self, client: Client) -> None:
        for body, code in NONSENSE:
            answer = await client.post(body)
            assert answer["error"]["code"] == code, (body, answer)
            assert answer["error"]["message"]

    async def test_notifications_have_no_answer(self, client: Client) -> None:
        body = {"jsonrpc": "2.0", "method": "eth_chainId", "params": []}
        for body_sent in (body, [body, body]):
            answer = await client.http.post("/", json=body_sent)
            assert (answer.status_code, answer.content) == (204, b"")

    async def test_invalid_http_requests_are_refused(self, client: Client) -> None:
        headers = {"content-type": "application/json"}
        large = await client.http.post("/", content=b" " * (MAX_BODY + 1), headers=headers)
        assert large.status_code == 413
        assert (await client.http.get("/")).status_code == 405
        assert (await client.http.post("/", content=b"{}")).status_code == 415
        response = await client.http.post("/", json={}, headers={"host": "evil.example"})
        assert response.status_code == 400


class TestLifecycle:
    async def test_a_port_in_use_is_named(self, node: EmbeddedChain) -> None:
        port = int(node.url.rsplit(":", 1)[1])
        for kind in (EmbeddedChain, ChainProcess):
            with pytest.raises(UsageError) as error_info:
                await kind(port=port).start()
            assert str(port) in error_info.value.message
            assert "in use" in error_info.value.message
            assert "port" in error_info.value.hint
        with pytest.raises(UsageError):
            await EmbeddedChain(port=70_000).start()

    def test_responses_are_not_delayed(self) -> None:
        # asyncio sets TCP_NODELAY only on TCP sockets; without it a response takes 40 ms.
        with open_listener(0) as listener:
            assert listener.proto == socket.IPPROTO_TCP

    async def test_the_port_is_free_again_afterwards(self) -> None:
        async with EmbeddedChain(block_time=None) as chain:
            port = int(chain.url.rsplit(":", 1)[1])
            await chain.rpc("eth_chainId")
        async with EmbeddedChain(port=port, block_time=None) as chain:
            assert chain.url.endswith(f":{port}")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))

    async def test_a_broken_chain_reports_the_error(
        self, client: Client, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        core = client.node._worker.core  # type: ignore[union-attr]

        def broken() -> bool:
            raise RuntimeError("disk on fire")

        monkeypatch.setattr(core, "step", broken)
        async with asyncio.timeout(5):
            raw = client.sign(0)
            while client.node.failure is None:
                await client.ask("eth_sendRawTransaction", raw)
        refusal = await client.refusal("eth_getBalance", "0x" + "00" * 20)
        assert refusal["code"] == -32603
        assert "disk on fire" in refusal["message"]
        assert await client.get("eth_blockNumber") == "0x0"

    async def test_forty_transactions_a_second(self, client: Client) -> None:
        address = await client.deploy(0, LOGGER)
        raws = [client.sign(nonce + 1, to=address, data="0x" + word(nonce)) for nonce in range(100)]
        started = time.process_time()  # the load of other programs does not count
        for raw in raws:
            await client.get("eth_sendRawTransaction", raw)
        await client.node.mine()
        assert len((await client.head())["transactions"]) == 100
        assert 100 / (time.process_time() - started) > 40


class TestProcess:
    async def test_ends_on_sigterm(self) -> None:
        async with ChainProcess(chain_id=99) as chain:
            assert chain.pid != os.getpid()
            assert await chain.rpc("eth_chainId") == "0x63"
            url = chain.url
        async with httpx2.AsyncClient() as http:
            with pytest.raises(httpx2.ConnectError):
                await http.post(url, json={})

    @pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
    async def test_by_hand(self, signum: signal.Signals) -> None:
        command = [
            "-m",
            "deepsquare_chain.devnet.node.embedded",
            "--port",
            "0",
            "--block-time",
            "1",
        ]
        process = await asyncio.create_subprocess_exec(
            sys.executable, *command, stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        ready = json.loads(await process.stdout.readline())
        assert (ready["event"], ready["chain_id"], ready["pid"]) == ("ready", 1337, process.pid)
        process.send_signal(signum)
        output, _ = await asyncio.wait_for(process.communicate(), 10)
        assert (process.returncode, output) == (0, b"")

    @pytest.mark.parametrize(
        "start",
        [
            "async with ChainProcess() as child:",
            "child = await ChildProcess.spawn(['/bin/sleep', '60'])\n    if True:",
        ],
    )
    async def test_ends_with_its_parent(self, start: str) -> None:
        program = (
            "import asyncio\n"
            "from deepsquare_chain.devnet.node.embedded import ChainProcess\n"
            "from deepsquare_chain.devnet.node.base import ChildProcess\n"
            "async def main():\n"
            f"    {start}\n"
            "        print(child.pid, flush=True)\n"
            "        await asyncio.sleep(60)\n"
            "asyncio.run(main())\n"
        )
        parent = await asyncio.create_subprocess_exec(
            sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE
        )
        assert parent.stdout is not None
        pid = int(await parent.stdout.readline())
        for _ in range(500):
            if b"prctl" not in _command(pid):  # the process has replaced the shell by now
                break
            await asyncio.sleep(0.01)
        parent.kill()
        await parent.communicate()
        for _ in range(200):
            if _is_gone(pid):
                return
            await asyncio.sleep(0.05)
        pytest.fail(f"{pid} outlived its parent")


def _command(pid: int) -> bytes:
    with open(f"/proc/{pid}/cmdline", "rb") as command:
        return command.read()


def _is_gone(pid: int) -> bool:
    """Whether a process has ended, reaped or not."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as stat:
            return stat.read().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
