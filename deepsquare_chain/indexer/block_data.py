"""Data that events lack: the headers of their blocks, and the transactions that emitted them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final

from eth_utils.address import to_checksum_address
from web3 import AsyncWeb3
from web3.exceptions import Web3RPCError

from deepsquare_chain.chain.bindings.abi import AbiError, interfaces
from deepsquare_chain.chain.bindings.events import Event, ExecutedForwardRequest, decode_logs
from deepsquare_chain.chain.bindings.forwarder import ForwardedCall, forwarded_calls
from deepsquare_chain.chain.rpc.batching import BATCH, ask_all, block_headers, chunks
from deepsquare_chain.chain.rpc.responses import NodeError, classify, node_message
from deepsquare_chain.errors import EndpointError


@dataclass(frozen=True, slots=True)
class Header:
    """A block header. Gas is in units, `base_fee` in wei of the chain's native coin."""

    number: int
    hash: str
    parent: str
    time: int
    gas_used: int
    gas_limit: int
    base_fee: int
    transactions: int


@dataclass(frozen=True, slots=True)
class Transaction:
    """A mined transaction. `to` is None if it created a contract; prices are in wei.

    `forwarded` are the signed requests that it submitted to a forwarder, each with its success.
    """

    hash: str
    block: int
    position: int
    sender: str
    to: str | None
    ok: bool
    gas_used: int
    gas_price: int
    nonce: int
    value: int
    input: bytes
    forwarded: tuple[tuple[ForwardedCall, bool], ...] = ()


@dataclass(frozen=True, slots=True)
class BlockData:
    """Headers by block number, and transactions by hash, for a batch of events."""

    headers: Mapping[int, Header] = field(default_factory=dict)
    transactions: Mapping[str, Transaction] = field(default_factory=dict)


async def read_block_data(w3: AsyncWeb3[Any], events: Iterable[Event]) -> BlockData | None:
    """Read headers and transactions of events.

    Returns:
        None if a block or transaction was replaced, or if the node does not have it yet.

    Raises:
        EndpointError: The node does not answer, refuses, or its response is invalid.
    """
    hashes: dict[int, str] = {}
    blocks: dict[str, str] = {}
    for event in events:
        hashes[event.block_number] = event.block_hash
        blocks[event.tx_hash] = event.block_hash
    try:
        positions: dict[str, int] = {}
        headers = await _headers(w3, hashes, positions)
        transactions = None if headers is None else await _transactions(w3, blocks, positions)
    except Web3RPCError as error:
        if classify(error) is NodeError.UNKNOWN_BLOCK:
            return None
        raise EndpointError(
            f"The node rejected a request for blocks and transactions: {node_message(error)}"
        ) from None
    except (KeyError, TypeError, ValueError) as error:
        raise EndpointError(
            f"The node returned invalid blocks or transactions: {str(error)[:200]}"
        ) from None
    if headers is None or transactions is None:
        return None
    return BlockData(headers, transactions)


async def _headers(
    w3: AsyncWeb3[Any], hashes: Mapping[int, str], positions: dict[str, int]
) -> dict[int, Header] | None:
    """Read headers by number, and store the position of each transaction in `positions`."""
    headers: dict[int, Header] = {}
    async for number, response in block_headers(w3, sorted(hashes)):
        if response is None or response["hash"] != hashes[number]:
            return None
        headers[number] = read_header(response)
        positions.update(
            {str(tx_hash): position for position, tx_hash in enumerate(response["transactions"])}
        )
    return headers


async def _transactions(
    w3: AsyncWeb3[Any], blocks: Mapping[str, str], positions: Mapping[str, int]
) -> dict[str, Transaction] | None:
    transactions: dict[str, Transaction] = {}
    for hashes in chunks(list(blocks), BATCH // 2):
        requests = [
            (method, [tx_hash])
            for tx_hash in hashes
            for method in ("eth_getTransactionByHash", "eth_getTransactionReceipt")
        ]
        responses = iter(await ask_all(w3, requests))
        for tx_hash, transaction, receipt in zip(hashes, responses, responses, strict=True):
            if transaction is None or receipt is None or receipt["blockHash"] != blocks[tx_hash]:
                return None
            transactions[tx_hash] = _transaction(tx_hash, transaction, receipt, positions[tx_hash])
    return transactions


def read_header(response: Mapping[str, Any]) -> Header:
    """Parse a header in JSON-RPC form.

    Raises:
        KeyError, TypeError, ValueError: The header is invalid.
    """
    return Header(
        number=int(response["number"], 16),
        hash=str(response["hash"]),
        parent=str(response["parentHash"]),
        time=int(response["timestamp"], 16),
        gas_used=int(response["gasUsed"], 16),
        gas_limit=int(response["gasLimit"], 16),
        base_fee=int(response.get("baseFeePerGas") or "0x0", 16),
        transactions=len(response["transactions"]),
    )


def _transaction(
    tx_hash: str, sent: Mapping[str, Any], receipt: Mapping[str, Any], position: int
) -> Transaction:
    price = receipt.get("effectiveGasPrice") or sent.get("gasPrice") or "0x0"
    data = sent.get("input") or sent.get("data") or "0x"
    to = sent.get("to")
    body = bytes.fromhex(data.removeprefix("0x"))
    calls = signed_calls(body)
    return Transaction(
        hash=tx_hash,
        block=int(receipt["blockNumber"], 16),
        position=position,
        sender=str(to_checksum_address(sent["from"])),
        to=str(to_checksum_address(to)) if to else None,
        # Receipts of old chains have no status, but only a successful transaction has events.
        ok=int(receipt.get("status") or "0x1", 16) == 1,
        gas_used=int(receipt["gasUsed"], 16),
        gas_price=int(price, 16),
        nonce=int(sent["nonce"], 16),
        value=int(sent.get("value") or "0x0", 16),
        input=body,
        forwarded=outcomes(calls, executed(str(to_checksum_address(to)), receipt["logs"]))
        if to and calls
        else (),
    )


@cache
def methods() -> Mapping[str, Mapping[str, str]]:
    """Return function names of the grid's contracts, by contract and hexadecimal selector."""
    return {
        contract.name: {
            "0x" + function.selector.hex(): function.name
            for function in (
                contract.function(entry["name"]) for entry in contract.entries("function")
            )
        }
        for contract in interfaces()
    }


#: Artifact name of the forwarder.
FORWARDER: Final = "ERC2771Forwarder"


def signed_calls(calldata: bytes) -> tuple[ForwardedCall, ...]:
    """Return the signed requests in calldata; empty if it is not a call of the forwarder."""
    try:
        return tuple(forwarded_calls(calldata))
    except AbiError:
        return ()


def executed(forwarder: str, logs: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, bool], ...]:
    """Return signer and success of each request that the logs of a forwarder report, in order."""
    return tuple(
        (event.signer, event.success)
        for event in decode_logs(logs)
        if isinstance(event, ExecutedForwardRequest) and event.address == forwarder
    )


def outcomes(
    calls: Sequence[ForwardedCall], executed_requests: Sequence[tuple[str, bool]]
) -> tuple[tuple[ForwardedCall, bool], ...]:
    """Return each request with whether it succeeded.

    A batch may skip requests that are expired, already used or signed by another account. Skipped
    requests emit no event, so outcomes are matched by order and signer.
    """
    results, index = [], 0
    for call in calls:
        was_executed = index < len(executed_requests) and executed_requests[index][0] == call.sender
        results.append((call, was_executed and executed_requests[index][1]))
        index += was_executed
    return tuple(results)
