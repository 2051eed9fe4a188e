"""Reads blocks and transactions that are not indexed, and decodes calldata and event values."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

import pydantic_core
from eth_utils.address import to_checksum_address
from hexbytes import HexBytes
from web3.exceptions import ContractLogicError, Web3Exception

from deepsquare_chain.audit.entries import ZERO_ADDRESS
from deepsquare_chain.chain.bindings.abi import Abi, Function, interface, signature_of, type_of
from deepsquare_chain.chain.bindings.calls import checked_address
from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.chain.bindings.deployment import ROLE_NAMES
from deepsquare_chain.chain.bindings.reverts import UnknownRevertError, decode_revert
from deepsquare_chain.chain.rpc.batching import ask_all
from deepsquare_chain.errors import EndpointError, GridError, UsageError
from deepsquare_chain.indexer.block_data import FORWARDER, Header, read_header, signed_calls

_HASH: Final = re.compile(r"0x[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class NodeTransaction:
    """A transaction as read from the node; amounts in wei of the chain's native coin.

    `block` is None while it is in the mempool; `failure` is why it reverted, as far as known.
    """

    hash: str
    sender: str
    to: str | None
    contract: str
    nonce: int
    value: int
    block: int | None
    ok: bool | None
    gas_used: int
    gas_price: int
    failure: GridError | None
    call: DecodedCall | None
    requests: tuple[DecodedRequest, ...]
    input: str
    logs: Sequence[Any]


async def read_transaction(contracts: Contracts, tx_hash: str) -> NodeTransaction | None:
    """Read a transaction from the node; None if it is unknown or the node does not answer."""
    if not _HASH.fullmatch(tx_hash):
        return None
    eth = contracts.w3.eth
    transaction = await _known(eth.get_transaction(HexBytes(tx_hash)))
    if transaction is None:
        return None
    receipt = await _known(eth.get_transaction_receipt(HexBytes(tx_hash))) or {}
    failed = receipt and receipt["status"] != 1
    contract_names = contracts.deployment.contract_names
    to = str(to_checksum_address(transaction["to"])) if transaction.get("to") else None
    name = contract_names.get(to or "", "")
    data = "0x" + bytes(transaction["input"]).hex()
    return NodeTransaction(
        hash=tx_hash,
        sender=str(to_checksum_address(transaction["from"])),
        to=to,
        contract=name,
        nonce=int(transaction["nonce"]),
        value=int(transaction["value"]),
        block=receipt.get("blockNumber"),
        ok=receipt["status"] == 1 if receipt else None,
        gas_used=int(receipt.get("gasUsed", 0)),
        gas_price=int(receipt.get("effectiveGasPrice") or transaction.get("gasPrice") or 0),
        failure=await _failure(contracts, transaction, receipt["blockNumber"]) if failed else None,
        call=decode_call(name, data),
        requests=signed_requests(data, contract_names) if name == FORWARDER else (),
        input=data[:20_000],
        logs=receipt.get("logs", ()),
    )


async def _known(request: Awaitable[Any]) -> Any:
    """Return what the node knows; None if it is unknown or the node does not answer."""
    try:
        return await request
    except (Web3Exception, GridError):
        return None


async def read_block(contracts: Contracts, number_or_hash: int | str) -> Header | None:
    """Read a block by number or hash; None if there is no such block (yet).

    Raises EndpointError if the node does not answer, or its response is invalid.
    """
    if isinstance(number_or_hash, int):
        rpc_call = ("eth_getBlockByNumber", [hex(number_or_hash), False])
    elif _HASH.fullmatch(number_or_hash):
        rpc_call = ("eth_getBlockByHash", [number_or_hash, False])
    else:
        return None
    try:
        (answer,) = await ask_all(contracts.w3, [rpc_call])
        return None if answer is None else read_header(answer)
    except (Web3Exception, KeyError, TypeError, ValueError) as error:
        raise EndpointError(f"The node returned an invalid block: {str(error)[:200]}") from None


async def _failure(contracts: Contracts, sent: Any, block: int) -> GridError:
    """Return why a transaction reverted: simulate it on the parent block, the nearest state."""
    body: Any = {"from": sent["from"], "data": sent["input"], "value": sent["value"]}
    if sent.get("to"):
        body["to"] = sent["to"]
    try:
        await contracts.w3.eth.call(body, block - 1)
    except ContractLogicError as error:
        return decode_revert(error)
    except (Web3Exception, GridError):
        return UnknownRevertError("The node does not return the reason.")
    return UnknownRevertError("It ran out of gas, or the state changed within its block.")


# -- transaction inputs, and values of the forms of read functions

MAX_TEXT: Final = 4_000


@dataclass(frozen=True, slots=True)
class DecodedCall:
    """A decoded call of one of the grid's contracts; `values` are by parameter name."""

    function: str
    signature: str
    values: Mapping[str, Any]


def decode_call(contract: str, data: str) -> DecodedCall | None:
    """Decode calldata (0x-hexadecimal); None if it is not a call of that contract of the grid."""
    if not contract:
        return None
    try:
        function, values = interface(contract).read_call(bytes.fromhex(data.removeprefix("0x")))
    except ValueError:  # no hexadecimal, or no call (AbiError)
        return None
    signature = signature_of({"name": function.name, "inputs": function.inputs})
    return DecodedCall(function.name, signature, named_values(function.inputs, values))


@dataclass(frozen=True, slots=True)
class DecodedRequest:
    """A customer's signed request, and its decoded call if it calls a contract of the grid.

    `contract` is the name of that contract, or empty; `deadline` is the last valid second.
    """

    signer: str
    to: str
    contract: str
    deadline: int
    call: DecodedCall | None


def signed_requests(data: str, contracts: Mapping[str, str]) -> tuple[DecodedRequest, ...]:
    """Return the signed requests in a call of the forwarder (0x-hexadecimal); empty without one.

    `contracts` are the names of the grid's contracts by address.
    """
    try:
        raw = bytes.fromhex(data.removeprefix("0x"))
    except ValueError:
        return ()
    calls = []
    for request in signed_calls(raw):
        name = contracts.get(request.to, "")
        call = decode_call(name, request.data.hex())
        calls.append(DecodedRequest(request.sender, request.to, name, request.deadline, call))
    return tuple(calls)


def named_values(parameters: Sequence[Abi], values: Sequence[Any]) -> dict[str, Any]:
    """Return values by parameter name; structs as mappings, bytes as hexadecimal."""
    return {
        str(part["name"]) or f"[{index}]": _plain_value(part, value)
        for index, (part, value) in enumerate(zip(parameters, values, strict=True))
    }


def _plain_value(parameter: Abi, value: Any) -> Any:
    """Convert a value for pages and JSON."""
    kind = str(parameter["type"])
    if kind.endswith("]"):
        item = {**parameter, "type": kind[: kind.rindex("[")]}
        return [_plain_value(item, element) for element in value]
    if kind == "tuple":
        return named_values(parameter["components"], value)
    return "0x" + value.hex() if isinstance(value, bytes) else value


def functions(contract: str, *, read_only: bool) -> list[Abi]:
    """Return the functions that only read, or those that change state, sorted by name."""
    entries = [
        entry
        for entry in interface(contract).entries("function")
        if (entry["stateMutability"] in {"view", "pure"}) == read_only
    ]
    return sorted(entries, key=lambda entry: str(entry["name"]).lower())


def find_view(contract: str, name: str) -> Function | None:
    """Return the reading function of this name, or None."""
    names = {entry["name"] for entry in functions(contract, read_only=True)}
    return interface(contract).function(name) if name in names else None


def read_argument(parameter: Abi, text: str) -> Any:
    """Parse the text that a user entered for a parameter; lists and structs are JSON lists.

    Raises UsageError if the text is invalid; the message names the parameter.
    """
    kind, name = type_of(parameter), str(parameter["name"]) or "the argument"
    if len(text) > MAX_TEXT:
        raise UsageError(f"{name} is longer than {MAX_TEXT} characters")
    try:
        if kind.endswith("]") or kind.startswith("("):
            return _from_tree(parameter, pydantic_core.from_json(text or "[]"))
        return _from_text(kind, text.strip())
    except (ValueError, TypeError, UsageError, RecursionError) as error:
        detail = getattr(error, "message", "") or str(error)
        raise UsageError(
            f"{name} is not a valid {kind}: {detail[:200]}",
            hint="Numbers are decimal or 0x-hexadecimal; lists and structs are JSON lists.",
        ) from None


def _from_tree(parameter: Abi, tree: Any) -> Any:
    kind = str(parameter["type"])
    if kind.endswith("]"):
        if not isinstance(tree, list):
            raise ValueError("write a JSON list")
        item = {**parameter, "type": kind[: kind.rindex("[")]}
        return [_from_tree(item, element) for element in tree]
    if kind == "tuple":
        parts = parameter["components"]
        if not isinstance(tree, list) or len(tree) != len(parts):
            raise ValueError(f"write a JSON list of {len(parts)} values")
        return tuple(_from_tree(part, element) for part, element in zip(parts, tree, strict=True))
    return _from_text(kind, tree if isinstance(tree, str) else str(tree))


def _from_text(kind: str, text: str) -> Any:
    if kind == "address":
        return checked_address(text)
    if kind == "bool":
        if text.lower() not in {"true", "false"}:
            raise ValueError("write true or false")
        return text.lower() == "true"
    if kind.startswith("bytes"):
        return bytes.fromhex(text.removeprefix("0x"))
    if kind.startswith(("uint", "int")):
        return int(text, 0)
    return text


# -- values of events and calls

#: Kinds of numbers by the names of their fields in events and in the contracts.
_NUMBERS: Final[Sequence[tuple[frozenset[str], str]]] = (
    (frozenset({"amount", "escrow", "paid", "fee", "refunded", "value", "funded"}), "amount"),
    (frozenset({"rate", "cpu", "gpu", "mem"}), "rate"),
    (frozenset({"answer_by", "approved_until", "deadline", "approvedUntil", "since"}), "time"),
    (frozenset({"time_limit", "timeLimit", "billed_seconds", "secondsUsed"}), "seconds"),
    (frozenset({"job_id", "jobId", "job_ids", "jobIds", "successor"}), "job"),
)
_HEX: Final = re.compile(r"0x([0-9a-fA-F]{40}|[0-9a-fA-F]{64})")
_ADDRESS: Final = re.compile(r"\b(0x[0-9a-fA-F]{40})\b")


@dataclass(frozen=True, slots=True)
class Field:
    """A value of a nested structure, with its path.

    `kind` is amount, rate, time, seconds, account, nobody, hash, job, number, flag or text.
    """

    path: str
    kind: str
    value: Any


def link_addresses(text: str) -> tuple[Field, ...]:
    """Split a sentence into texts and addresses, so that pages can link the accounts."""
    parts = _ADDRESS.split(text)
    return tuple(
        Field("", "account" if index % 2 else "text", part)
        for index, part in enumerate(parts)
        if part
    )


def fields(values: Any, maximum: int = 120) -> tuple[Field, ...]:
    """Return the first `maximum` values of a nested structure, in order."""
    return tuple(islice(_fields(values, "", ""), maximum))


def _fields(value: Any, path: str, name: str) -> Iterator[Field]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _fields(item, f"{path}.{key}" if path else str(key), str(key))
    elif isinstance(value, list | tuple) and value:
        for index, item in enumerate(value):
            yield from _fields(item, f"{path}[{index}]", name)
    elif isinstance(value, list | tuple):
        yield Field(path, "text", "none")
    elif name == "role" and value in ROLE_NAMES:
        yield Field(path, "text", ROLE_NAMES[value])
    else:
        yield Field(path, _kind(name, value), value)


def _kind(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "flag"
    if isinstance(value, int):
        return next((kind for names, kind in _NUMBERS if name in names), "number")
    if isinstance(value, str) and (match := _HEX.fullmatch(value)):
        return "nobody" if value == ZERO_ADDRESS else {40: "account", 64: "hash"}[len(match[1])]
    return "text"
