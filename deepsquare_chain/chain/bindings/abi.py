"""The compiled contracts, ABI encoding of calldata, and decoding of return values and logs.

A contract's strings may hold any bytes. Invalid UTF-8 is replaced instead of raising an error, so
that no sender can stop a daemon with it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from importlib import resources
from typing import Any, Final

from eth_abi.codec import ABICodec
from eth_abi.decoding import StringDecoder
from eth_abi.exceptions import DecodingError, EncodingError
from eth_abi.registry import BaseEquals, registry
from eth_typing import ChecksumAddress
from eth_utils.address import to_checksum_address
from eth_utils.crypto import keccak

from deepsquare_chain.errors import NotFoundError, UsageError

CONTRACTS: Final = ("Credit", "ProviderRegistry", "MetaScheduler", "ERC2771Forwarder")


@dataclass(frozen=True, slots=True)
class Artifact:
    """One compiled contract.

    `input_digest` is the SHA-256 of the compiler's input, `metadata` the exact text of the
    compiler's `metadata.json`.
    """

    name: str
    abi: tuple[Mapping[str, Any], ...] = field(repr=False)
    bytecode: bytes = field(repr=False)
    deployed_bytecode: bytes = field(repr=False)
    immutables: tuple[tuple[int, int], ...] = field(repr=False)
    input_digest: str
    metadata: str = field(repr=False)

    def masked(self, code: bytes) -> bytes:
        """Return the code with its immutables set to zero, as in the compiler's output."""
        masked_code = bytearray(code)
        for start, length in self.immutables:
            masked_code[start : start + length] = bytes(length)
        return bytes(masked_code[: len(code)])

    def matches(self, code: bytes) -> bool:
        """Return whether code on a chain is this contract, for any constructor arguments."""
        if len(code) != len(self.deployed_bytecode):
            return False
        return self.masked(code) == self.masked(self.deployed_bytecode)


@cache
def load_artifact(name: str) -> Artifact:
    """Read a compiled contract.

    Raises:
        NotFoundError: The package contains no contract of this name.
    """
    if name not in CONTRACTS:
        raise NotFoundError(f"There is no built contract {name!r}", hint=f"One of {CONTRACTS}.")
    built = _read_artifact(f"{name}.json", f"The built contract {name}")
    references = (
        reference for group in built["immutableReferences"].values() for reference in group
    )
    return Artifact(
        name=name,
        abi=tuple(built["abi"]),
        bytecode=bytes.fromhex(built["bytecode"].removeprefix("0x")),
        deployed_bytecode=bytes.fromhex(built["deployedBytecode"].removeprefix("0x")),
        immutables=tuple((reference["start"], reference["length"]) for reference in references),
        input_digest=built["inputDigest"],
        metadata=built["metadata"],
    )


@cache
def standard_input() -> Mapping[str, Any]:
    """Return the compiler's input: standard JSON with all sources.

    Raises:
        NotFoundError: The package does not contain it.
    """
    return _read_artifact("standard-input.json", "The compiler's input")


def _read_artifact(file_name: str, description: str) -> dict[str, Any]:
    file = resources.files(__package__) / "artifacts" / file_name
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFoundError(
            f"{description} is missing from the package", hint="Run scripts/compile.py."
        ) from None
    return content


# -- the compiler's metadata of our contracts, which links deployed code to its sources; no I/O
#
# solc appends a CBOR map to the code with the IPFS hash of `metadata.json`, which contains the keccak
# of every source. Deployed code therefore determines the sources that it was compiled from.

#: Size of an IPFS block in bytes; solc splits longer metadata into several.
_CHUNK: Final = 262_144
_BASE58: Final = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
#: A CBOR map of two entries, the first of them `ipfs` with 34 bytes (a SHA-256 multihash).
_TRAILER: Final = b"\xa2\x64ipfs\x58\x22"


def ipfs_hash(content: bytes) -> str:
    """Return the IPFS CIDv0 of a file (dag-pb, UnixFS), as `ipfs add` and solc compute it.

    Raises:
        ValueError: The file does not fit into one block.
    """
    if len(content) > _CHUNK:
        raise ValueError(f"{len(content)} bytes are more than one block of IPFS")
    size = _varint(len(content))
    data = b"\x12" + size + content if content else b""
    unixfs = b"\x08\x02" + data + b"\x18" + size
    node = b"\x0a" + _varint(len(unixfs)) + unixfs
    return base58(b"\x12\x20" + hashlib.sha256(node).digest())


def base58(raw: bytes) -> str:
    """Encode bytes in base 58, the encoding of IPFS hashes."""
    number, text = int.from_bytes(raw, "big"), ""
    while number:
        number, digit = divmod(number, 58)
        text = _BASE58[digit] + text
    return "1" * (len(raw) - len(raw.lstrip(b"\0"))) + text


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def metadata_hash(code: bytes) -> str:
    """Return the IPFS hash at the end of deployed code; empty if there is none."""
    if len(code) < 2:
        return ""
    trailer = code[-2 - int.from_bytes(code[-2:], "big") : -2]
    if not trailer.startswith(_TRAILER):
        return ""
    start = len(_TRAILER)
    return base58(trailer[start : start + 34])


def sources_of(name: str) -> dict[str, str]:
    """Return the sources of a contract by path, verified against its metadata.

    Raises:
        ValueError: A source of the package does not have the keccak in the metadata.
    """
    sources = standard_input()["sources"]
    verified = {}
    for path, entry in metadata_of(name)["sources"].items():
        content = str(sources.get(path, {}).get("content", ""))
        if "0x" + keccak(text=content).hex() != entry["keccak256"]:
            raise ValueError(f"the source {path} is not the source that {name} was compiled from")
        verified[path] = content
    return verified


def metadata_of(name: str) -> Mapping[str, Any]:
    """Return the compiler's metadata of a contract."""
    metadata: Mapping[str, Any] = json.loads(load_artifact(name).metadata)
    return metadata


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
