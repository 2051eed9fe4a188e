"""What a transaction's input says, and values from and for the forms of read functions. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import pydantic_core

from deepsquare_chain.chain.bindings.abi import (
    Abi,
    AbiError,
    Function,
    decode_values,
    interface,
    signature_of,
    type_of,
)
from deepsquare_chain.chain.bindings.calls import checked_address
from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.errors import UsageError
from deepsquare_chain.indexer.block_data import signed_calls

MAX_TEXT: Final = 4_000


@dataclass(frozen=True, slots=True)
class DecodedCall:
    """A call of one of our contracts, its values by the names of the ABI."""

    function: str
    signature: str
    values: Mapping[str, Any]


def decode_call(contract: str, data: str) -> DecodedCall | None:
    """Read calldata (0x-hexadecimal); None where it is no call of that contract."""
    try:
        raw = bytes.fromhex(data.removeprefix("0x"))
    except ValueError:
        return None
    for entry in interface(contract).entries("function"):
        function = interface(contract).function(entry["name"])
        if raw[:4] == function.selector:
            try:
                values = decode_values(function.inputs, raw[4:])
            except AbiError:
                return None
            return DecodedCall(function.name, signature_of(entry), named(function.inputs, values))
    return None


@dataclass(frozen=True, slots=True)
class InnerCall:
    """A customer's signed request: what it calls, and what that says if it is one of ours.

    `contract` is the name of ours or empty; `deadline` is the last second at which it is good.
    """

    signer: str
    to: str
    contract: str
    deadline: int
    call: DecodedCall | None


def inner_calls(data: str, contracts: Mapping[str, str]) -> tuple[InnerCall, ...]:
    """The signed requests in a call of the forwarder; empty where there are none.

    Args:
        data: Its input, 0x-hexadecimal.
        contracts: Names of our contracts by address.
    """
    try:
        raw = bytes.fromhex(data.removeprefix("0x"))
    except ValueError:
        return ()
    found = []
    for each in signed_calls(raw):
        name = contracts.get(each.to, "")
        call = decode_call(name, "0x" + each.data.hex()) if name else None
        found.append(InnerCall(each.sender, each.to, name, each.deadline, call))
    return tuple(found)


def names_of(deployment: Deployment) -> dict[str, str]:
    """Names of a deployment's contracts by address, with its checksum."""
    return {str(checked_address(address)): name for name, address in deployment.contracts.items()}


def named(parameters: Sequence[Abi], values: Sequence[Any]) -> dict[str, Any]:
    """Values by name; structs as mappings, bytes as hexadecimal."""
    return {
        str(part["name"]) or f"[{at}]": plain(part, value)
        for at, (part, value) in enumerate(zip(parameters, values, strict=True))
    }


def plain(parameter: Abi, value: Any) -> Any:
    """A value as pages and JSON show it."""
    kind = str(parameter["type"])
    if kind.endswith("]"):
        item = {**parameter, "type": kind[: kind.rindex("[")]}
        return [plain(item, each) for each in value]
    if kind == "tuple":
        return named(parameter["components"], value)
    return "0x" + value.hex() if isinstance(value, bytes) else value


def views(contract: str) -> list[Abi]:
    """Functions that only read, by name."""
    return _functions(contract, {"view", "pure"})


def changes(contract: str) -> list[Abi]:
    """Functions that change something, by name."""
    return _functions(contract, {"nonpayable", "payable"})


def _functions(contract: str, kinds: set[str]) -> list[Abi]:
    found = [e for e in interface(contract).entries("function") if e["stateMutability"] in kinds]
    return sorted(found, key=lambda entry: str(entry["name"]).lower())


def find_view(contract: str, name: str) -> tuple[Abi, Function] | None:
    """A reading function by its name."""
    for entry in views(contract):
        if entry["name"] == name:
            return entry, interface(contract).function(name)
    return None


def read_argument(parameter: Abi, text: str) -> Any:
    """A value that somebody typed, for a parameter of a function.

    Lists and structs are written as JSON lists.

    Raises:
        UsageError: It is not valid; the message names the parameter.
    """
    kind, name = type_of(parameter), str(parameter["name"]) or "the argument"
    if len(text) > MAX_TEXT:
        raise UsageError(f"{name} is longer than {MAX_TEXT} characters")
    try:
        if kind.endswith("]") or kind.startswith("("):
            tree = pydantic_core.from_json(text or "[]")
            return _from_tree(parameter, tree)
        return _from_text(kind, text.strip())
    except (ValueError, TypeError, UsageError, RecursionError) as error:
        detail = getattr(error, "message", "") or str(error)
        raise UsageError(
            f"{name} is no {kind}: {detail[:200]}",
            hint="Numbers are decimal or 0x-hexadecimal; lists and structs are JSON lists.",
        ) from None


def _from_tree(parameter: Abi, tree: Any) -> Any:
    kind = str(parameter["type"])
    if kind.endswith("]"):
        if not isinstance(tree, list):
            raise ValueError("write a JSON list")
        item = {**parameter, "type": kind[: kind.rindex("[")]}
        return [_from_tree(item, each) for each in tree]
    if kind == "tuple":
        parts = parameter["components"]
        if not isinstance(tree, list) or len(tree) != len(parts):
            raise ValueError(f"write a JSON list of {len(parts)} values")
        return tuple(_from_tree(part, each) for part, each in zip(parts, tree, strict=True))
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
