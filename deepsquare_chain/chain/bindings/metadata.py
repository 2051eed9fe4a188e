"""The compiler's metadata of our contracts, which links deployed code to its sources; no I/O.

solc appends a CBOR map to the code with the IPFS hash of `metadata.json`, which contains the keccak
of every source. Deployed code therefore determines the sources that it was compiled from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Final

from eth_utils.crypto import keccak

from deepsquare_chain.chain.bindings.artifacts import load_artifact, standard_input

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
