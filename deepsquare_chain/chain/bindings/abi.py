"""ABI coding of our contracts: arguments to calldata, answers and logs back to values.

Strings of a contract are any bytes; whoever sends no UTF-8 must not stop a daemon, so that they
are read leniently.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Final

from eth_abi.codec import ABICodec
from eth_abi.decoding import StringDecoder
from eth_abi.exceptions import DecodingError, EncodingError
from eth_abi.registry import BaseEquals, registry
from eth_typing import ChecksumAddress
from eth_utils.address import to_checksum_address
from eth_utils.crypto import keccak

from deepsquare_chain.chain.bindings.artifacts import CONTRACTS, load_artifact
from deepsquare_chain.errors import UsageError

Abi = Mapping[str, Any]


class AbiError(ValueError):
    """Bytes that are not what the ABI promises."""


class _LenientString(StringDecoder):
    def __init__(self) -> None:
        super().__init__("replace")  # type: ignore[no-untyped-call]


def _lenient_codec() -> ABICodec:
    own = registry.copy()  # type: ignore[no-untyped-call]
    own.unregister_decoder("string")
    anyway = BaseEquals("string")  # type: ignore[no-untyped-call]
    own.register_decoder(anyway, _LenientString, label="string")
    return ABICodec(own)


_CODEC: Final = _lenient_codec()
_CAPITAL: Final = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


def snake_case(name: str) -> str:
    """`jobId` as Python writes it: `job_id`."""
    return _CAPITAL.sub("_", name).lower()


def type_of(parameter: Abi) -> str:
    """The canonical type of an ABI parameter; a struct becomes a tuple of its parts."""
    kind = str(parameter["type"])
    if not kind.startswith("tuple"):
        return kind
    inner = ",".join(type_of(part) for part in parameter["components"])
    return f"({inner}){kind.removeprefix('tuple')}"


def signature_of(entry: Abi) -> str:
    """`name(type,...)`, of which selectors and topics are hashes."""
    return f"{entry['name']}({','.join(type_of(part) for part in entry['inputs'])})"


def decode_values(parameters: Sequence[Abi], data: bytes) -> tuple[Any, ...]:
    """Values of the parameters, addresses with their checksum.

    Raises:
        AbiError: The data does not hold them.
    """
    try:
        values = _CODEC.decode([type_of(part) for part in parameters], data)
    except (DecodingError, ValueError, OverflowError) as error:
        raise AbiError(f"undecodable data of {len(data)} bytes: {error}") from None
    return tuple(_read(part, value) for part, value in zip(parameters, values, strict=True))


def _read(parameter: Abi, value: Any) -> Any:
    kind = str(parameter["type"])
    if kind.endswith("]"):
        item = {**parameter, "type": kind[: kind.rindex("[")]}
        return tuple(_read(item, each) for each in value)
    if kind == "tuple":
        parts = zip(parameter["components"], value, strict=True)
        return tuple(_read(part, each) for part, each in parts)
    return checksummed(value) if kind == "address" else value


@lru_cache(maxsize=4096)
def checksummed(address: str) -> ChecksumAddress:
    """An address with its checksum, a hash that is worth remembering: few are met again and again."""
    return to_checksum_address(address)


@dataclass(frozen=True, slots=True)
class Function:
    """One function of a contract."""

    name: str
    selector: bytes
    inputs: tuple[Abi, ...]
    outputs: tuple[Abi, ...]

    def encode(self, *arguments: Any) -> bytes:
        """Calldata; structs are given as tuples in the order of their fields."""
        return self.selector + encode_values(self.inputs, arguments)

    def decode(self, data: bytes) -> tuple[Any, ...]:
        """What the function answered, always as a tuple."""
        return decode_values(self.outputs, data)


def encode_values(parameters: Sequence[Abi], arguments: Sequence[Any]) -> bytes:
    """Encode arguments.

    Raises:
        UsageError: A value does not fit its type.
    """
    try:
        return bytes(_CODEC.encode([type_of(part) for part in parameters], arguments))
    except (EncodingError, UnicodeEncodeError) as error:
        raise UsageError(f"A value does not fit the contract: {error}") from None


class Interface:
    """The functions, errors, events and constructor of one contract."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._abi = load_artifact(name).abi
        self._functions = {
            entry["name"]: Function(
                name=entry["name"],
                selector=keccak(text=signature_of(entry))[:4],
                inputs=tuple(entry["inputs"]),
                outputs=tuple(entry["outputs"]),
            )
            for entry in self.entries("function")
        }

    def entries(self, kind: str) -> list[Abi]:
        """All ABI entries of a kind: function, error, event."""
        return [entry for entry in self._abi if entry["type"] == kind]

    def function(self, name: str) -> Function:
        """A function by its name; none of ours is overloaded."""
        return self._functions[name]

    def read_call(self, data: bytes) -> tuple[Function, tuple[Any, ...]]:
        """The function that calldata names, and its arguments.

        Raises:
            AbiError: It is no call of this contract.
        """
        for function in self._functions.values():
            if data[:4] == function.selector:
                return function, decode_values(function.inputs, data[4:])
        raise AbiError(f"no function of {self.name} has the selector 0x{data[:4].hex()}")

    def creation_code(self, *arguments: Any) -> bytes:
        """Code that deploys the contract with these constructor arguments."""
        inputs = self.entries("constructor")[0]["inputs"]
        return load_artifact(self.name).bytecode + encode_values(inputs, arguments)


@cache
def interface(name: str) -> Interface:
    """The interface of a built contract by its name."""
    return Interface(name)


def interfaces() -> tuple[Interface, ...]:
    """All of our contracts."""
    return tuple(interface(name) for name in CONTRACTS)
