"""Holding a node's logs against its own block headers, and against another node."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Final

from web3 import AsyncWeb3
from web3.exceptions import Web3RPCError

from deepsquare_chain.audit.entries import AuditFinding
from deepsquare_chain.audit.export import log_line
from deepsquare_chain.audit.proofs import ProofError, check_header, check_receipts, may_hold
from deepsquare_chain.audit.reader import LogSink, Progress, read_chronicle
from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.chain.rpc.batching import ask_all
from deepsquare_chain.chain.rpc.node_errors import node_message
from deepsquare_chain.errors import EndpointError

_HEADERS: Final = 100
_ENOUGH: Final = 100

#: SHA-256 over the logs of each block that has some.
Digests = Mapping[int, str]


class LogDigests(LogSink):
    """A sink that keeps a digest of each block's logs, and the block's hash."""

    def __init__(self) -> None:
        self.blocks: dict[int, str] = {}
        self.hashes: dict[int, str] = {}
        self._sums: dict[int, Any] = {}

    def begin(self) -> None:
        """Forget everything."""
        self._sums.clear()
        self.hashes.clear()

    def take(self, logs: Sequence[Mapping[str, Any]]) -> None:
        """Add logs in the order of the chain."""
        for log in logs:
            block = int(log["blockNumber"], 16)
            self._sums.setdefault(block, hashlib.sha256()).update(log_line(log))
            self.hashes[block] = log["blockHash"]

    @property
    def digests(self) -> Digests:
        """By block."""
        return {block: each.hexdigest() for block, each in self._sums.items()}


def digest_of_logs(logs: Sequence[Mapping[str, Any]]) -> str:
    """As `LogDigests` makes it for the logs of one block."""
    return hashlib.sha256(b"".join(log_line(log) for log in logs)).hexdigest()


async def prove(
    w3: AsyncWeb3[Any],
    deployment: Deployment,
    node_logs: LogDigests,
    to_block: int,
    *,
    progress: Progress | None = None,
) -> list[AuditFinding]:
    """Prove by its headers alone that a node returned all logs of a grid and no others.

    Every header from the deployment on is hashed and chained to its parent; where the bloom allows
    for our logs, the block's receipts are fetched and their trie is built again.

    Args:
        w3: The node.
        deployment: Whose logs.
        told: What `eth_getLogs` said.
        to_block: Last block; whoever trusts its hash needs to trust nothing else.
        progress: Called with the progress.

    Raises:
        EndpointError: The node does not answer, or refuses receipts.
    """
    proof = _Proof(w3, deployment, node_logs)
    for first in range(deployment.block, to_block + 1, _HEADERS):
        last = min(to_block, first + _HEADERS - 1)
        await proof.blocks(range(first, last + 1))
        if progress is not None:
            progress(last, to_block)
        if len(proof.findings) >= _ENOUGH:
            break
    return proof.findings


class _Proof:
    def __init__(self, w3: AsyncWeb3[Any], deployment: Deployment, node_logs: LogDigests) -> None:
        self.findings: list[AuditFinding] = []
        self._w3 = w3
        self._addresses = [each.lower() for each in deployment.addresses]
        self._digests, self._hashes = node_logs.digests, node_logs.hashes
        self._parent = ""

    async def blocks(self, numbers: range) -> None:
        """Headers of a range, and the receipts of those that may hold our logs."""
        asked = [("eth_getBlockByNumber", [hex(number), False]) for number in numbers]
        for number, header in zip(numbers, await self._ask(asked), strict=True):
            try:
                await self._block(number, header)
            except ProofError as error:
                message = f"block {number} is not what it seems: {error}"
                self.findings.append(AuditFinding("proof", message, number, ""))
            self._parent = header["hash"] if header else ""

    async def _block(self, number: int, header: Any) -> None:
        if not isinstance(header, Mapping) or header.get("number") != hex(number):
            raise ProofError("the node does not know it")
        check_header(header, self._parent)
        if self._hashes.get(number, header["hash"]) != header["hash"]:
            raise ProofError(f"its logs name the block {self._hashes[number]}")
        if not any(may_hold(header, each) for each in self._addresses):
            if number in self._digests:
                raise ProofError("its bloom filter excludes the logs that the node returned for it")
            return
        logs = check_receipts(header, await self._receipts(header))
        # Hashes and indices stand in no trie: they follow from the place in it, whatever the node
        # states (EthereumJS counts the logs of eth_getBlockReceipts from the transaction's index).
        placed = [
            {**log, "logIndex": hex(index), "blockHash": header["hash"]}
            for index, log in enumerate(logs)
        ]
        ours = [log for log in placed if log["address"].lower() in self._addresses]
        if digest_of_logs(ours) != self._digests.get(number, digest_of_logs([])):
            raise ProofError(
                f"it holds {len(ours)} logs of the grid, and not those that the node returned"
            )

    async def _receipts(self, header: Mapping[str, Any]) -> list[Any]:
        """All receipts of a block, at once or, where the node can't, one by one."""
        hashes = header["transactions"]
        try:
            (found,) = await self._ask([("eth_getBlockReceipts", [header["number"]])])
        except EndpointError:
            asked = [("eth_getTransactionReceipt", [each]) for each in hashes]
            found = await self._ask(asked)
        if not isinstance(found, list) or len(found) != len(hashes) or None in found:
            raise ProofError("the node does not give its receipts")
        for receipt, tx_hash in zip(found, hashes, strict=True):
            if any(log["transactionHash"] != tx_hash for log in receipt["logs"]):
                raise ProofError(f"a log of transaction {tx_hash} names another")
        return found

    async def _ask(self, asked: Sequence[tuple[str, list[Any]]]) -> list[Any]:
        try:
            return await ask_all(self._w3, asked)
        except Web3RPCError as error:
            raise EndpointError(f"The node refuses a proof: {node_message(error)}") from None


async def compare_endpoints(
    other: AsyncWeb3[Any],
    deployment: Deployment,
    node_logs: LogDigests,
    to_block: int,
    block_hash: str,
    *,
    progress: Progress | None = None,
) -> list[AuditFinding]:
    """Findings where another node tells other logs, or another last block.

    Raises:
        EndpointError: It does not answer, or does not know the block.
    """
    theirs = LogDigests()
    found = await read_chronicle(
        other, deployment, to_block=to_block, progress=progress, sink=theirs
    )
    findings = []
    if found.block_hash != block_hash:
        message = f"block {to_block} is {block_hash} here and {found.block_hash} there"
        findings.append(AuditFinding("endpoint", message, to_block, ""))
    ours, others = node_logs.digests, theirs.digests
    for block in sorted({*ours, *others}):
        if ours.get(block) != others.get(block):
            message = f"the endpoints tell other logs of block {block}"
            findings.append(AuditFinding("endpoint", message, block, ""))
    return findings[:_ENOUGH]
