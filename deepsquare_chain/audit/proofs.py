"""Proofs that a node can't fake: header hashes, receipts roots and bloom filters. Pure.

A block's hash is the Keccak-256 hash of its header. The header contains the root of a trie of all
receipts, and each receipt contains its logs. A trusted block hash therefore determines every log of
the block and, through the parent hashes, every log of all earlier blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

import rlp  # type: ignore[import-untyped]
from eth_bloom.bloom import BloomFilter
from eth_utils.crypto import keccak
from trie.hexary import HexaryTrie

#: Fields of a header in encoding order. Fields of later forks come last, and may be absent.
_FIELDS: Final = (
    *("parentHash", "sha3Uncles", "miner", "stateRoot", "transactionsRoot", "receiptsRoot"),
    *("logsBloom", "difficulty", "number", "gasLimit", "gasUsed", "timestamp", "extraData"),
    *("mixHash", "nonce", "baseFeePerGas", "withdrawalsRoot", "blobGasUsed", "excessBlobGas"),
    *("parentBeaconBlockRoot", "requestsHash"),
)
_NUMBERS: Final = frozenset(
    {
        *("difficulty", "number", "gasLimit", "gasUsed", "timestamp", "baseFeePerGas"),
        *("blobGasUsed", "excessBlobGas"),
    }
)
#: Receipt types whose encoding is the same on all chains. Rollups have additional types.
_PLAIN_TYPES: Final = range(5)


class ProofError(ValueError):
    """A node's response is provably wrong, or can't be proven."""


def header_hash(header: Mapping[str, Any]) -> str:
    """Compute the hash of a header in JSON-RPC form.

    Raises:
        ProofError: A field is missing or invalid.
    """
    try:
        parts = [
            _number(header[name]) if name in _NUMBERS else _bytes(header[name])
            for name in _FIELDS
            if header.get(name) is not None
        ]
        return "0x" + keccak(rlp.encode(parts)).hex()
    except (KeyError, TypeError, ValueError) as error:
        raise ProofError(f"its header can't be read: {error}") from None


def check_header(header: Mapping[str, Any], parent: str = "") -> None:
    """Check that a header has the stated hash and, if given, the expected parent hash.

    Raises:
        ProofError: A hash differs.
    """
    computed_hash = header_hash(header)
    if computed_hash != header.get("hash"):
        raise ProofError(
            f"its header hashes to {computed_hash}, the node says {header.get('hash')}"
        )
    if parent and header["parentHash"] != parent:
        raise ProofError(f"its parent is {header['parentHash']}, not {parent}")


def may_contain(header: Mapping[str, Any], address: str) -> bool:
    """Return whether a block's bloom filter may match an address. False is certain."""
    bloom = BloomFilter(int(str(header["logsBloom"]), 16))
    return _bytes(address) in bloom


def receipts_root(receipts: Sequence[Mapping[str, Any]]) -> str:
    """Compute the root of the trie of a block's receipts, given in JSON-RPC form.

    Raises:
        ProofError: A receipt is invalid, or has a chain-specific type.
    """
    trie = HexaryTrie(db={}, prune=True)
    for index, receipt in enumerate(receipts):
        try:
            trie[rlp.encode(index)] = _receipt(receipt)
        except (KeyError, TypeError, ValueError) as error:
            raise ProofError(f"receipt {index} can't be read: {error}") from None
    return "0x" + bytes(trie.root_hash).hex()


def _receipt(receipt: Mapping[str, Any]) -> bytes:
    receipt_type = _number(receipt.get("type") or "0x0")
    if receipt_type not in _PLAIN_TYPES:
        raise ProofError(f"type {receipt_type} is specific to this chain")
    logs = [
        [_bytes(log["address"]), [_bytes(topic) for topic in log["topics"]], _bytes(log["data"])]
        for log in receipt["logs"]
    ]
    status = _number(receipt["status"])
    fields = [status, _number(receipt["cumulativeGasUsed"]), _bytes(receipt["logsBloom"]), logs]
    encoded = cast("bytes", rlp.encode(fields))
    return bytes([receipt_type]) + encoded if receipt_type else encoded


def check_receipts(
    header: Mapping[str, Any], receipts: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """Return all logs of a block, after proving them against its header.

    Raises:
        ProofError: The root or the bloom filter of the receipts differs from the header's.
    """
    root = receipts_root(receipts)
    if root != header["receiptsRoot"]:
        raise ProofError(f"its receipts have the root {root}, not {header['receiptsRoot']}")
    logs = [log for receipt in receipts for log in receipt["logs"]]
    bloom = BloomFilter()
    for log in logs:
        bloom.add(_bytes(log["address"]))
        bloom.extend(_bytes(topic) for topic in log["topics"])
    if int(bloom) != int(str(header["logsBloom"]), 16):
        raise ProofError("its bloom filter does not match its logs")
    return logs


def _bytes(value: Any) -> bytes:
    return bytes.fromhex(value.removeprefix("0x")) if isinstance(value, str) else bytes(value)


def _number(value: Any) -> int:
    return int(value, 16) if isinstance(value, str) else int(value)
