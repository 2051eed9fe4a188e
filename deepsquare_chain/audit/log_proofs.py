"""Proves a node's logs against its block headers, and compares them with another node's logs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Final

from web3 import AsyncWeb3
from web3.exceptions import Web3RPCError

from deepsquare_chain.audit.entries import AuditFinding
from deepsquare_chain.audit.export import log_line
from deepsquare_chain.audit.proofs import ProofError, check_header, check_receipts, may_contain
from deepsquare_chain.audit.reader import LogSink, Progress, read_history
from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.chain.rpc.batching import ask_all
from deepsquare_chain.chain.rpc.responses import node_message
from deepsquare_chain.errors import EndpointError

_HEADERS_PER_REQUEST: Final = 100
_MAX_FINDINGS: Final = 100

#: SHA-256 over the logs of each block that has logs.
Digests = Mapping[int, str]


class LogDigests(LogSink):
    """A log sink that keeps the hash of each block with logs, and a digest of these logs."""

    def __init__(self) -> None:
        self.blocks: dict[int, str] = {}
        self.hashes: dict[int, str] = {}
        self._sums: dict[int, Any] = {}

    def begin(self) -> None:
        """Clear all digests and hashes."""
        self._sums.clear()
        self.hashes.clear()

    def take(self, logs: Sequence[Mapping[str, Any]]) -> None:
        """Add logs in chain order."""
        for log in logs:
            block = int(log["blockNumber"], 16)
            self._sums.setdefault(block, hashlib.sha256()).update(log_line(log))
            self.hashes[block] = log["blockHash"]

    @property
    def digests(self) -> Digests:
        """Digests by block."""
        return {block: digest.hexdigest() for block, digest in self._sums.items()}


def digest_of_logs(logs: Sequence[Mapping[str, Any]]) -> str:
    """Return the digest of the logs of one block, as computed by `LogDigests`."""
    return hashlib.sha256(b"".join(log_line(log) for log in logs)).hexdigest()


async def prove(
    w3: AsyncWeb3[Any],
    deployment: Deployment,
    node_logs: LogDigests,
    to_block: int,
    *,
    progress: Progress | None = None,
) -> list[AuditFinding]:
    """Prove from block headers that a node returned all logs of a grid and no others.

    Every header since the deployment is hashed and linked to its parent. If the bloom filter of a
    block may match the contracts, its receipts are fetched and their trie is rebuilt.

    Args:
        w3: The node.
        deployment: Deployment whose logs are proven.
        node_logs: Digests of the logs that `eth_getLogs` returned.
        to_block: Last block. Its hash is the only value that must be trusted.
        progress: Called with the last block that was proven.

    Raises:
        EndpointError: The node does not answer, or refuses receipts.
    """
    proof = _Proof(w3, deployment, node_logs)
    for first in range(deployment.block, to_block + 1, _HEADERS_PER_REQUEST):
        last = min(to_block, first + _HEADERS_PER_REQUEST - 1)
        await proof.blocks(range(first, last + 1))
        if progress is not None:
            progress(last, to_block)
        if len(proof.findings) >= _MAX_FINDINGS:
            break
    return proof.findings


class _Proof:
    def __init__(self, w3: AsyncWeb3[Any], deployment: Deployment, node_logs: LogDigests) -> None:
        self.findings: list[AuditFinding] = []
        self._w3 = w3
        self._addresses = [address.lower() for address in deployment.addresses]
        self._digests, self._hashes = node_logs.digests, node_logs.hashes
        self._parent = ""

    async def blocks(self, numbers: range) -> None:
        """Prove a range of blocks by headers, and by receipts if a block may have our logs."""
        requests = [("eth_getBlockByNumber", [hex(number), False]) for number in numbers]
        for number, header in zip(numbers, await self._request(requests), strict=True):
            try:
                await self._block(number, header)
            except ProofError as error:
                message = f"block {number} is invalid: {error}"
                self.findings.append(AuditFinding("proof", message, number, ""))
            self._parent = header.get("hash", "") if isinstance(header, Mapping) else ""

    async def _block(self, number: int, header: Any) -> None:
        if not isinstance(header, Mapping) or header.get("number") != hex(number):
            raise ProofError("the node does not have it")
        check_header(header, self._parent)
        if self._hashes.get(number, header["hash"]) != header["hash"]:
            raise ProofError(f"its logs name the block {self._hashes[number]}")
        if not any(may_contain(header, address) for address in self._addresses):
            if number in self._digests:
                raise ProofError("its bloom filter excludes the logs that the node returned for it")
            return
        logs = check_receipts(header, await self._receipts(header))
        # The trie contains no block hashes or log indexes. Derive them from the position in the
        # trie instead of using the node's values: EthereumJS numbers the logs of
        # eth_getBlockReceipts from the transaction's index.
        indexed_logs = [
            {**log, "logIndex": hex(index), "blockHash": header["hash"]}
            for index, log in enumerate(logs)
        ]
        grid_logs = [log for log in indexed_logs if log["address"].lower() in self._addresses]
        if digest_of_logs(grid_logs) != self._digests.get(number, digest_of_logs([])):
            raise ProofError(
                f"it holds {len(grid_logs)} logs of the grid, and not those that the node returned"
            )

    async def _receipts(self, header: Mapping[str, Any]) -> list[Any]:
        """Return all receipts of a block, one by one if the node lacks the bulk method."""
        hashes = header["transactions"]
        try:
            (receipts,) = await self._request([("eth_getBlockReceipts", [header["number"]])])
        except EndpointError:
            requests = [("eth_getTransactionReceipt", [tx_hash]) for tx_hash in hashes]
            receipts = await self._request(requests)
        if not isinstance(receipts, list) or len(receipts) != len(hashes) or None in receipts:
            raise ProofError("the node does not return its receipts")
        for receipt, tx_hash in zip(receipts, hashes, strict=True):
            if any(log["transactionHash"] != tx_hash for log in receipt["logs"]):
                raise ProofError(f"a log of transaction {tx_hash} names another")
        return receipts

    async def _request(self, requests: Sequence[tuple[str, list[Any]]]) -> list[Any]:
        try:
            return await ask_all(self._w3, requests)
        except Web3RPCError as error:
            raise EndpointError(f"The node rejected a proof: {node_message(error)}") from None


async def compare_endpoints(
    other: AsyncWeb3[Any],
    deployment: Deployment,
    node_logs: LogDigests,
    to_block: int,
    block_hash: str,
    *,
    progress: Progress | None = None,
) -> list[AuditFinding]:
    """Return a finding for each block whose logs differ on another node, and for another last hash.

    Raises:
        EndpointError: The other node does not answer, or does not have the last block.
    """
    other_logs = LogDigests()
    history = await read_history(
        other, deployment, to_block=to_block, progress=progress, sink=other_logs
    )
    findings = []
    if history.block_hash != block_hash:
        message = f"block {to_block} is {block_hash} here and {history.block_hash} there"
        findings.append(AuditFinding("endpoint", message, to_block, ""))
    digests, other_digests = node_logs.digests, other_logs.digests
    for block in sorted({*digests, *other_digests}):
        if digests.get(block) != other_digests.get(block):
            message = f"the endpoints return different logs of block {block}"
            findings.append(AuditFinding("endpoint", message, block, ""))
    return findings[:_MAX_FINDINGS]
