"""ABI encoding of arguments to calldata, and decoding of return values and logs.

A contract's strings may hold any bytes. Invalid UTF-8 is replaced instead of raising an error, so
that no sender can stop a daemon with it.
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
    """Data that does not match the ABI."""


class _LenientString(StringDecoder):
    def __init__(self) -> None:
        super().__init__("replace")  # type: ignore[no-untyped-call]


def _lenient_codec() -> ABICodec:
    lenient = registry.copy()  # type: ignore[no-untyped-call]
    lenient.unregister_decoder("string")
    is_string = BaseEquals("string")  # type: ignore[no-untyped-call]
    lenient.register_decoder(is_string, _LenientString, label="string")
    return ABICodec(lenient)


_CODEC: Final = _lenient_codec()
_CAPITAL: Final = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


def snake_case(name: str) -> str:
    """Convert a name from camel case (`jobId`) to snake case (`job_id`)."""
    return _CAPITAL.sub("_", name).lower()


def type_of(parameter: Abi) -> str:
    """Return the canonical type of an ABI parameter; a struct becomes a tuple of its fields."""
    type_name = str(parameter["type"])
    if not type_name.startswith("tuple"):
        return type_name
    inner = ",".join(type_of(part) for part in parameter["components"])
    return f"({inner}){type_name.removeprefix('tuple')}"


def signature_of(entry: Abi) -> str:
    """Return the signature `name(type,...)`, whose hash gives the selector or topic."""
    return f"{entry['name']}({','.join(type_of(part) for part in entry['inputs'])})"


def decode_values(parameters: Sequence[Abi], data: bytes) -> tuple[Any, ...]:
    """Decode the values of parameters; addresses get their checksum.

    Raises:
        AbiError: The data does not match the parameters.
    """
    try:
        values = _CODEC.decode([type_of(part) for part in parameters], data)
    except (DecodingError, ValueError, OverflowError) as error:
        raise AbiError(f"undecodable data of {len(data)} bytes: {error}") from None
    return tuple(_read(part, value) for part, value in zip(parameters, values, strict=True))


def _read(parameter: Abi, value: Any) -> Any:
    type_name = str(parameter["type"])
    if type_name.endswith("]"):
        item = {**parameter, "type": type_name[: type_name.rindex("[")]}
        return tuple(_read(item, item_value) for item_value in value)
    if type_name == "tuple":
        components = zip(parameter["components"], value, strict=True)
        return tuple(_read(component, item_value) for component, item_value in components)
    return checksummed(value) if type_name == "address" else value


@lru_cache(maxsize=4096)
def checksummed(address: str) -> ChecksumAddress:
    """Return an address with its checksum; cached, because the same addresses occur often."""
    return to_checksum_address(address)


@dataclass(frozen=True, slots=True)
class Function:
    """One function of a contract."""

    name: str
    selector: bytes
    inputs: tuple[Abi, ...]
    outputs: tuple[Abi, ...]

    def encode(self, *arguments: Any) -> bytes:
        """Return the calldata; structs are passed as tuples in the order of their fields."""
        return self.selector + encode_values(self.inputs, arguments)

    def decode(self, data: bytes) -> tuple[Any, ...]:
        """Decode the return values, always as a tuple."""
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
        """Return all ABI entries of a kind: function, error, event, constructor."""
        return [entry for entry in self._abi if entry["type"] == kind]

    def function(self, name: str) -> Function:
        """Return a function by name; none of our functions is overloaded."""
        return self._functions[name]

    def read_call(self, data: bytes) -> tuple[Function, tuple[Any, ...]]:
        """Return the function and the arguments of calldata.

        Raises:
            AbiError: It is not a call of this contract.
        """
        for function in self._functions.values():
            if data[:4] == function.selector:
                return function, decode_values(function.inputs, data[4:])
        raise AbiError(f"no function of {self.name} has the selector 0x{data[:4].hex()}")

    def creation_code(self, *arguments: Any) -> bytes:
        """Return the creation code that deploys the contract with these constructor arguments."""
        inputs = self.entries("constructor")[0]["inputs"]
        return load_artifact(self.name).bytecode + encode_values(inputs, arguments)


@cache
def interface(name: str) -> Interface:
    """Return the interface of a compiled contract by name."""
    return Interface(name)


def interfaces() -> tuple[Interface, ...]:
    """Return the interfaces of all our contracts."""
    return tuple(interface(name) for name in CONTRACTS)
