"""anvil behind the interface of the embedded chain, and a comparison of the two."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path
from typing import Any

import pytest

from deepsquare_chain.chain.deploying import check_rules
from deepsquare_chain.chain.rpc.pool import connected
from deepsquare_chain.devnet.node import base as node_base
from deepsquare_chain.devnet.node.base import (
    ANVIL_VARIABLE,
    DEV_BALANCE,
    Anvil,
    Node,
    dev_accounts,
    find_anvil,
)
from deepsquare_chain.devnet.node.embedded import EmbeddedChain
from deepsquare_chain.errors import EndpointError, NotFoundError, UsageError

GWEI = 10**9
# Stores the first word of calldata in slot 0, logs it, leaves 42 in transient storage.
RUNTIME = "5f35805f525f55602a60015d60205fa000"
# The same, then gives it back: refunds and failures count as well.
CLEARER = "60015f555f5f55" + "5f5ffd"


class TestFinding:
    def test_the_variable_wins(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        program = tmp_path / "my-anvil"
        program.write_text("#!/bin/sh\n")
        monkeypatch.setenv(ANVIL_VARIABLE, str(program))
        with pytest.raises(UsageError, match="not an executable program"):
            find_anvil()
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        assert find_anvil() == program

    def test_the_package_here_then_the_path(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv(ANVIL_VARIABLE, raising=False)
        project = tmp_path / "project"
        package = project / "node_modules/@foundry-rs/anvil-linux-amd64/bin/anvil"
        on_path = tmp_path / "bin" / "anvil"
        for program in (package, on_path):
            program.parent.mkdir(parents=True)
            program.write_text("#!/bin/sh\n")
            program.chmod(0o755)
        monkeypatch.chdir(project)
        monkeypatch.setenv("PATH", str(on_path.parent))
        assert find_anvil() == package
        # Outside of a project only PATH is searched.
        monkeypatch.setattr(node_base, "_IN_ANVIL_PACKAGE", Path("nowhere/anvil"))
        assert find_anvil() == on_path

    async def test_missing_anvil_gives_an_installation_hint(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv(ANVIL_VARIABLE, raising=False)
        monkeypatch.setattr(node_base, "_IN_ANVIL_PACKAGE", Path("nowhere/anvil"))
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(NotFoundError, match="not installed") as error_info:
            await Anvil().start()
        assert "npm ci" in error_info.value.hint
        assert node_base.ANVIL_PACKAGE in error_info.value.hint

    async def test_a_program_that_fails_is_quoted(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        program = tmp_path / "anvil"
        program.write_text("#!/bin/sh\necho no such hardfork >&2; exit 2\n")
        program.chmod(0o755)
        monkeypatch.setenv(ANVIL_VARIABLE, str(program))
        with pytest.raises(EndpointError, match="no such hardfork"):
            await Anvil().start()


@pytest.mark.usefixtures("anvil_binary")
class TestNode:
    async def test_starts_funds_accounts_and_stops(self) -> None:
        async with Anvil(block_time=None, chain_id=77) as node:
            assert await node.rpc("eth_chainId") == hex(77)
            assert "anvil" in await node.rpc("web3_clientVersion")
            for account in dev_accounts():
                assert int(await node.rpc("eth_getBalance", account.address, "latest"), 16) == (
                    DEV_BALANCE
                )
            await node.fund("0x" + "ab" * 20, 5)
            assert await node.rpc("eth_getBalance", "0x" + "ab" * 20, "latest") == "0x5"
            before = await _timestamp(node)
            await node.increase_time(1_000)
            assert before + 1_000 <= await _timestamp(node) <= before + 1_010
            await node.set_time(before + 5_000)
            assert await _timestamp(node) == before + 5_000
            await node.mine(3)
            pid = node.pid
            os.kill(pid, 0)
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        with pytest.raises(EndpointError):
            await node.rpc("eth_chainId")

    async def test_blocks_by_the_clock(self) -> None:
        async with Anvil() as node:
            tx_hash = await node.rpc("eth_sendRawTransaction", _sign(node, 0, to="0x" + "12" * 20))
            assert await node.rpc("eth_getTransactionReceipt", tx_hash) is None
            await node.fund("0x" + "ab" * 20, 5)
            assert await node.rpc("eth_getTransactionReceipt", tx_hash) is not None

    async def test_a_port_in_use_is_named(self) -> None:
        with socket.socket() as bound_socket:
            bound_socket.bind(("127.0.0.1", 0))
            bound_socket.listen()
            port = bound_socket.getsockname()[1]
            with pytest.raises(UsageError, match=str(port)):
                await Anvil(port=port).start()

    async def test_the_embedded_chain_does_the_same(self) -> None:
        """Both nodes give equal gas, receipts and reverts."""
        async with Anvil(block_time=None) as real, EmbeddedChain(block_time=0) as embedded:
            assert await _story(real) == await _story(embedded)


async def _story(node: Node) -> list[Any]:
    """Return results of deployments and calls that must not depend on the node."""
    results: list[Any] = []
    addresses = []
    for nonce, runtime in enumerate((RUNTIME, CLEARER, "00" * 5_000)):
        receipt = await _send(node, nonce, data=_init_code(runtime), gas=3_000_000)
        addresses.append(receipt["contractAddress"])
        results.append(_essence(receipt))
    for nonce, (contract, value) in enumerate([(0, 0), (0, 7), (0, 8), (0, 0), (1, 1)], start=3):
        data = f"0x{value:064x}"
        receipt = await _send(node, nonce, to=addresses[contract], data=data, gas=100_000)
        results.append(_essence(receipt))
        block = await node.rpc("eth_getBlockByHash", receipt["blockHash"], False)
        results.append((block["receiptsRoot"], block["transactionsRoot"], block["logsBloom"]))
    results.append(await node.rpc("eth_getStorageAt", addresses[0], "0x0", "latest"))
    results.append(await node.rpc("eth_getTransactionCount", dev_accounts()[0].address, "latest"))
    with pytest.raises(EndpointError, match="execution reverted"):
        await node.rpc("eth_call", {"to": addresses[1]}, "latest")
    with pytest.raises(EndpointError, match="nonce too low"):
        await node.rpc("eth_sendRawTransaction", _sign(node, 1, to=addresses[0]))
    return results


def _essence(receipt: dict[str, Any]) -> dict[str, Any]:
    fields = ("status", "gasUsed", "contractAddress", "logsBloom", "transactionHash", "type", "to")
    logs = [(log["address"], log["topics"], log["data"]) for log in receipt["logs"]]
    return {**{field: receipt[field] for field in fields}, "logs": logs}


async def _send(node: Node, nonce: int, **fields: Any) -> dict[str, Any]:
    tx_hash = await node.rpc("eth_sendRawTransaction", _sign(node, nonce, **fields))
    for _ in range(1_000):
        receipt: dict[str, Any] | None = await node.rpc("eth_getTransactionReceipt", tx_hash)
        if receipt is not None:
            return receipt
    raise AssertionError(f"{tx_hash} was not mined")


def _sign(node: Node, nonce: int, **fields: Any) -> str:
    body = {
        "chainId": node.chain_id,
        "nonce": nonce,
        "value": 0,
        "data": "0x",
        "gas": 100_000,
        "maxFeePerGas": 10 * GWEI,
        "maxPriorityFeePerGas": GWEI,
        **fields,
    }
    if "to" in body:
        body["to"] = bytes.fromhex(body["to"][2:])
    return "0x" + bytes(dev_accounts()[0].sign_transaction(body).raw_transaction).hex()


def _init_code(runtime: str) -> str:
    return f"0x61{len(runtime) // 2:04x}80600a5f395ff3{runtime}"


async def _timestamp(node: Node) -> int:
    return int((await node.rpc("eth_getBlockByNumber", "latest", False))["timestamp"], 16)


@pytest.mark.parametrize(("hardfork", "fits"), [("shanghai", False), ("prague", True)])
async def test_a_chain_without_cancun_is_refused_before_anything_is_paid(
    hardfork: str, fits: bool
) -> None:
    async with Anvil(hardfork=hardfork) as node, connected(node.url) as w3:
        if fits:
            await check_rules(w3)
        else:
            with pytest.raises(UsageError, match="Cancun") as error_info:
                await check_rules(w3)
            assert "--hardfork cancun" in error_info.value.hint
