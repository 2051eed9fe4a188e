"""What events do not tell: headers of their blocks, and the transactions that made them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final

from eth_utils.address import to_checksum_address
from web3 import AsyncWeb3
from web3.exceptions import Web3RPCError

from deepsquare_chain.chain.bindings.abi import AbiError, interfaces
from deepsquare_chain.chain.bindings.event_types import Event
from deepsquare_chain.chain.bindings.events import ExecutedForwardRequest, decode_logs
from deepsquare_chain.chain.bindings.forwarder import ForwardedCall, forwarded_calls
from deepsquare_chain.chain.rpc.batching import ask_all
from deepsquare_chain.chain.rpc.node_errors import NodeError, classify, node_message
from deepsquare_chain.errors import EndpointError

#: Questions in one request: small enough for hosted endpoints.
BATCH: Final = 100


@dataclass(frozen=True, slots=True)
class Header:
    """A block; gas is in units, `base_fee` in wei of the chain's own coin."""

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
    """A mined transaction; `to` is None where it created a contract, prices are in wei.

    `forwarded` are the signed requests that it handed to a forwarder, and whether each was carried
    out with success.
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
    """All that a batch of events needs besides them, by block number and transaction hash."""

    headers: Mapping[int, Header] = field(default_factory=dict)
    transactions: Mapping[str, Transaction] = field(default_factory=dict)


async def read_facts(w3: AsyncWeb3[Any], events: Iterable[Event]) -> BlockData | None:
    """Headers and transactions of events; None where one was replaced, or is not known yet.

    Raises:
        EndpointError: The node does not answer, refuses, or gives nonsense.
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
            f"The node refuses to show blocks and transactions: {node_message(error)}"
        ) from None
    except (KeyError, TypeError, ValueError) as error:
        raise EndpointError(
            f"The node gave no proper blocks or transactions: {str(error)[:200]}"
        ) from None
    if headers is None or transactions is None:
        return None
    return BlockData(headers, transactions)


async def _headers(
    w3: AsyncWeb3[Any], hashes: Mapping[int, str], positions: dict[str, int]
) -> dict[int, Header] | None:
    """Headers by number; `positions` gets the place of each transaction in its block."""
    found: dict[int, Header] = {}
    for some in _slices(sorted(hashes), BATCH):
        asked = [("eth_getBlockByNumber", [hex(number), False]) for number in some]
        for number, answer in zip(some, await ask_all(w3, asked), strict=True):
            if answer is None or answer["hash"] != hashes[number]:
                return None
            found[number] = read_header(answer)
            positions.update({str(each): at for at, each in enumerate(answer["transactions"])})
    return found


async def _transactions(
    w3: AsyncWeb3[Any], blocks: Mapping[str, str], positions: Mapping[str, int]
) -> dict[str, Transaction] | None:
    found: dict[str, Transaction] = {}
    for some in _slices(list(blocks), BATCH // 2):
        asked = [
            (method, [each])
            for each in some
            for method in ("eth_getTransactionByHash", "eth_getTransactionReceipt")
        ]
        answers = iter(await ask_all(w3, asked))
        for each, sent, receipt in zip(some, answers, answers, strict=True):
            if sent is None or receipt is None or receipt["blockHash"] != blocks[each]:
                return None
            found[each] = _transaction(each, sent, receipt, positions[each])
    return found


def read_header(answer: Mapping[str, Any]) -> Header:
    """A header as JSON-RPC gives it.

    Raises:
        KeyError, TypeError, ValueError: It is none.
    """
    return Header(
        number=int(answer["number"], 16),
        hash=str(answer["hash"]),
        parent=str(answer["parentHash"]),
        time=int(answer["timestamp"], 16),
        gas_used=int(answer["gasUsed"], 16),
        gas_limit=int(answer["gasLimit"], 16),
        base_fee=int(answer.get("baseFeePerGas") or "0x0", 16),
        transactions=len(answer["transactions"]),
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
        # Chains older than receipts with a status still tell by the events that it went well.
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
    """Names of our contracts' functions: by contract, by selector in hexadecimal."""
    return {
        each.name: {
            "0x" + function.selector.hex(): function.name
            for function in (each.function(entry["name"]) for entry in each.entries("function"))
        }
        for each in interfaces()
    }


def _slices(items: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
    return (items[at : at + size] for at in range(0, len(items), size))


#: Artifact of the forwarder.
FORWARDER: Final = "ERC2771Forwarder"


def signed_calls(calldata: bytes) -> tuple[ForwardedCall, ...]:
    """The requests of a call of the forwarder; empty where it is none, or carries none."""
    try:
        return tuple(forwarded_calls(calldata))
    except AbiError:
        return ()


def executed(forwarder: str, logs: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, bool], ...]:
    """Signer and success of the requests that a transaction carried out, in their order.

    Args:
        forwarder: Its address, with its checksum.
        logs: Of the transaction's receipt, as JSON-RPC gives them.
    """
    return tuple(
        (event.signer, event.success)
        for event in decode_logs(logs)
        if isinstance(event, ExecutedForwardRequest) and event.address == forwarder
    )


def outcomes(
    calls: Sequence[ForwardedCall], done: Sequence[tuple[str, bool]]
) -> tuple[tuple[ForwardedCall, bool], ...]:
    """Whether each request was carried out with success.

    A batch may leave out requests that are expired, used or signed by somebody else; those leave
    no trace, so that outcomes are matched in order and by signer.
    """
    found, at = [], 0
    for call in calls:
        own = at < len(done) and done[at][0] == call.sender
        found.append((call, own and done[at][1]))
        at += own
    return tuple(found)
