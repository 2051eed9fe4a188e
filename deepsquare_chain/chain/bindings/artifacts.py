"""The compiled contracts in this package: ABI, bytecode, compiler input and metadata."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any, Final

from eth_utils.crypto import keccak

from deepsquare_chain.errors import NotFoundError

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
    file = resources.files(__package__) / "artifacts" / f"{name}.json"
    try:
        built = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFoundError(
            f"The built contract {name} is missing from the package",
            hint="Run scripts/compile.py.",
        ) from None
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
    file = resources.files(__package__) / "artifacts" / "standard-input.json"
    try:
        compiler_input: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFoundError(
            "The compiler's input is missing from the package", hint="Run scripts/compile.py."
        ) from None
    return compiler_input


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
