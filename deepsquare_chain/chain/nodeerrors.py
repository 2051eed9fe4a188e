"""What nodes say when they turn something down, sorted into kinds.

JSON-RPC has one code for nearly everything, so that the words of geth, anvil, erigon, nethermind,
besu and the hosted services decide; this table is the only place that looks at them.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Final

from web3.exceptions import Web3RPCError


class NodeError(StrEnum):
    """Kinds of refusal that somebody acts on."""

    ALREADY_KNOWN = "already known"
    NONCE_TOO_LOW = "nonce too low"
    NONCE_TOO_HIGH = "nonce too high"
    UNDERPRICED = "underpriced"
    REPLACEMENT_UNDERPRICED = "replacement underpriced"
    NO_GAS_MONEY = "insufficient funds"
    RANGE_TOO_LARGE = "range too large"
    RATE_LIMITED = "rate limited"
    UNKNOWN_BLOCK = "unknown block"
    POOL_FULL = "pool full"
    OTHER = "other"


# The first hit counts: narrower words stand before wider ones.
_WORDS: Final[tuple[tuple[str, NodeError], ...]] = (
    ("already known", NodeError.ALREADY_KNOWN),
    ("already imported", NodeError.ALREADY_KNOWN),
    ("already exists", NodeError.ALREADY_KNOWN),
    ("alreadyknown", NodeError.ALREADY_KNOWN),
    ("known transaction", NodeError.ALREADY_KNOWN),
    ("existing tx with same hash", NodeError.ALREADY_KNOWN),
    ("replacement", NodeError.REPLACEMENT_UNDERPRICED),
    ("nonce too low", NodeError.NONCE_TOO_LOW),
    ("nonce is too low", NodeError.NONCE_TOO_LOW),
    ("oldnonce", NodeError.NONCE_TOO_LOW),
    ("nonce too high", NodeError.NONCE_TOO_HIGH),
    ("nonce is too high", NodeError.NONCE_TOO_HIGH),
    ("nonce gap", NodeError.NONCE_TOO_HIGH),
    ("gapped-nonce", NodeError.NONCE_TOO_HIGH),
    ("underpriced", NodeError.UNDERPRICED),
    ("max fee per gas less than block base fee", NodeError.UNDERPRICED),
    ("feetoolow", NodeError.UNDERPRICED),
    ("fee too low", NodeError.UNDERPRICED),
    ("gas price below", NodeError.UNDERPRICED),
    ("insufficient funds", NodeError.NO_GAS_MONEY),
    ("insufficient balance", NodeError.NO_GAS_MONEY),
    ("upfront cost exceeds account balance", NodeError.NO_GAS_MONEY),
    ("insufficientfunds", NodeError.NO_GAS_MONEY),
    ("txpool is full", NodeError.POOL_FULL),
    ("pool is full", NodeError.POOL_FULL),
    ("rate limit", NodeError.RATE_LIMITED),
    ("too many requests", NodeError.RATE_LIMITED),
    ("request limit", NodeError.RATE_LIMITED),
    ("exceeded its compute", NodeError.RATE_LIMITED),
    ("block range", NodeError.RANGE_TOO_LARGE),
    ("range is too", NodeError.RANGE_TOO_LARGE),
    ("range too large", NodeError.RANGE_TOO_LARGE),
    ("too many blocks", NodeError.RANGE_TOO_LARGE),
    ("query returned more than", NodeError.RANGE_TOO_LARGE),
    ("more than 10000 results", NodeError.RANGE_TOO_LARGE),
    ("log response size exceeded", NodeError.RANGE_TOO_LARGE),
    ("response size", NodeError.RANGE_TOO_LARGE),
    ("response is too big", NodeError.RANGE_TOO_LARGE),
    ("query timeout", NodeError.RANGE_TOO_LARGE),
    ("is limited to", NodeError.RANGE_TOO_LARGE),
    ("max range", NodeError.RANGE_TOO_LARGE),
    ("maximum range", NodeError.RANGE_TOO_LARGE),
    ("response too large", NodeError.RANGE_TOO_LARGE),
    ("too many results", NodeError.RANGE_TOO_LARGE),
    ("too many logs", NodeError.RANGE_TOO_LARGE),
    ("exceed max", NodeError.RANGE_TOO_LARGE),
    ("limit exceeded", NodeError.RANGE_TOO_LARGE),
    ("header not found", NodeError.UNKNOWN_BLOCK),
    ("unknown block", NodeError.UNKNOWN_BLOCK),
    ("block not found", NodeError.UNKNOWN_BLOCK),
)


def error_body(error: Web3RPCError) -> Mapping[str, Any]:
    """The JSON object under `error` of the node's answer; empty when it is none."""
    response: Mapping[str, Any] = error.rpc_response or {}
    body = response.get("error")
    return body if isinstance(body, Mapping) else {}


def node_message(error: Web3RPCError) -> str:
    """The node's own words, bounded: they end up in messages and logs."""
    return str(error_body(error).get("message") or error.message or "no message")[:300]


def classify(error: Web3RPCError) -> NodeError:
    """Which kind of refusal this is; OTHER when nothing is known about it."""
    words = node_message(error).lower()
    return next((kind for text, kind in _WORDS if text in words), NodeError.OTHER)
