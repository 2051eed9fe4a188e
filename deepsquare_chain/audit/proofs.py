"""Proofs that a node can't fake: header hashes, receipts' roots, blooms. Pure.

A block's hash is the keccak of its header; the header holds the root of a trie of all receipts,
and each receipt all of its logs. So a hash that somebody trusts fixes every log of the block and,
through the parents' hashes, of all blocks before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

import rlp  # type: ignore[import-untyped]
from eth_bloom.bloom import BloomFilter
from eth_utils.crypto import keccak
from trie.hexary import HexaryTrie

#: Fields of a header in the order of the chain; those of later forks follow where they exist.
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
#: Types of receipts whose encoding is common to all chains; rollups have more of their own.
_PLAIN_TYPES: Final = range(5)


class ProofError(ValueError):
    """An answer of a node that can't be true, or that no proof exists for."""


def header_hash(header: Mapping[str, Any]) -> str:
    """The hash of a header as JSON-RPC gives it.

    Raises:
        ProofError: A field is missing or unreadable.
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
    """A header has the hash that it says, and the parent that came before it.

    Raises:
        ProofError: It has not.
    """
    found = header_hash(header)
    if found != header.get("hash"):
        raise ProofError(f"its header hashes to {found}, the node says {header.get('hash')}")
    if parent and header["parentHash"] != parent:
        raise ProofError(f"its parent is {header['parentHash']}, not {parent}")


def may_hold(header: Mapping[str, Any], address: str) -> bool:
    """Whether a block's bloom allows for logs of an address; false is certain."""
    bloom = BloomFilter(int(str(header["logsBloom"]), 16))
    return _bytes(address) in bloom


def receipts_root(receipts: Sequence[Mapping[str, Any]]) -> str:
    """The root of the trie of a block's receipts, as JSON-RPC gives them.

    Raises:
        ProofError: A receipt can't be read, or is of a kind of its own chain.
    """
    trie = HexaryTrie(db={}, prune=True)
    for place, receipt in enumerate(receipts):
        try:
            trie[rlp.encode(place)] = _receipt(receipt)
        except (KeyError, TypeError, ValueError) as error:
            raise ProofError(f"receipt {place} can't be read: {error}") from None
    return "0x" + bytes(trie.root_hash).hex()


def _receipt(receipt: Mapping[str, Any]) -> bytes:
    kind = _number(receipt.get("type") or "0x0")
    if kind not in _PLAIN_TYPES:
        raise ProofError(f"type {kind} is one of this chain alone")
    logs = [
        [_bytes(log["address"]), [_bytes(topic) for topic in log["topics"]], _bytes(log["data"])]
        for log in receipt["logs"]
    ]
    done = _number(receipt["status"])
    fields = [done, _number(receipt["cumulativeGasUsed"]), _bytes(receipt["logsBloom"]), logs]
    encoded = cast("bytes", rlp.encode(fields))
    return bytes([kind]) + encoded if kind else encoded


def check_receipts(
    header: Mapping[str, Any], receipts: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """All logs of a block, proven to be the ones that its header stands for.

    Raises:
        ProofError: The receipts' root or their bloom is another than the header's.
    """
    root = receipts_root(receipts)
    if root != header["receiptsRoot"]:
        raise ProofError(f"its receipts make the root {root}, its header {header['receiptsRoot']}")
    logs = [log for receipt in receipts for log in receipt["logs"]]
    bloom = BloomFilter()
    for log in logs:
        bloom.add(_bytes(log["address"]))
        bloom.extend(_bytes(topic) for topic in log["topics"])
    if int(bloom) != int(str(header["logsBloom"]), 16):
        raise ProofError("its bloom is not that of its logs")
    return logs


def _bytes(value: Any) -> bytes:
    return bytes.fromhex(value.removeprefix("0x")) if isinstance(value, str) else bytes(value)


def _number(value: Any) -> int:
    return int(value, 16) if isinstance(value, str) else int(value)
