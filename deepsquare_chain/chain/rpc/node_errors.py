"""What nodes say when they turn something down, sorted into kinds.

JSON-RPC has one code for nearly everything, so that the words of geth, anvil, erigon, nethermind,
besu and the hosted services decide; this table is the only place that looks at them.
"""

from __future__ import annotations

import re
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
    INVALID = "invalid transaction"
    OUT_OF_GAS = "out of gas"
    OTHER = "other"


# The first hit counts: narrower words stand before wider ones.
_WORDS: Final[tuple[tuple[str, NodeError], ...]] = (
    ("already known", NodeError.ALREADY_KNOWN),
    ("already imported", NodeError.ALREADY_KNOWN),
    ("already exists", NodeError.ALREADY_KNOWN),
    ("alreadyknown", NodeError.ALREADY_KNOWN),
    ("known transaction", NodeError.ALREADY_KNOWN),
    ("existing tx with same hash", NodeError.ALREADY_KNOWN),
    # erigon, txpool/txpoolcfg: DiscardReason NotReplaced
    ("could not replace existing tx", NodeError.REPLACEMENT_UNDERPRICED),
    ("replacement", NodeError.REPLACEMENT_UNDERPRICED),
    ("nonce too low", NodeError.NONCE_TOO_LOW),
    ("nonce is too low", NodeError.NONCE_TOO_LOW),
    ("oldnonce", NodeError.NONCE_TOO_LOW),
    ("nonce too high", NodeError.NONCE_TOO_HIGH),
    ("nonce is too high", NodeError.NONCE_TOO_HIGH),
    ("nonce gap", NodeError.NONCE_TOO_HIGH),
    ("gapped-nonce", NodeError.NONCE_TOO_HIGH),
    # Nethermind, TxPool/AcceptTxResult: NonceGap
    ("noncegap", NodeError.NONCE_TOO_HIGH),
    # Besu, TransactionInvalidReason: NONCE_TOO_FAR_IN_FUTURE_FOR_SENDER
    ("nonce is too distant", NodeError.NONCE_TOO_HIGH),
    ("underpriced", NodeError.UNDERPRICED),
    ("max fee per gas less than block base fee", NodeError.UNDERPRICED),
    ("feetoolow", NodeError.UNDERPRICED),
    ("fee too low", NodeError.UNDERPRICED),
    ("gas price below", NodeError.UNDERPRICED),
    ("insufficient funds", NodeError.NO_GAS_MONEY),
    ("insufficient balance", NodeError.NO_GAS_MONEY),
    ("upfront cost exceeds account balance", NodeError.NO_GAS_MONEY),
    ("insufficientfunds", NodeError.NO_GAS_MONEY),
    ("intrinsic gas", NodeError.INVALID),
    ("exceeds block gas limit", NodeError.INVALID),
    ("gas limit too high", NodeError.INVALID),
    ("exceeds the configured cap", NodeError.INVALID),
    ("invalid sender", NodeError.INVALID),
    ("invalid signature", NodeError.INVALID),
    ("invalid chain id", NodeError.INVALID),
    ("chain id mismatch", NodeError.INVALID),
    ("transaction type not supported", NodeError.INVALID),
    ("oversized data", NodeError.INVALID),
    ("max initcode size", NodeError.INVALID),
    ("rlp:", NodeError.INVALID),
    ("txpool is full", NodeError.POOL_FULL),
    ("pool is full", NodeError.POOL_FULL),
    # geth, core/txpool/legacypool: ErrFutureReplacePending, returned by a pool that is full
    ("future transaction tries to replace pending", NodeError.POOL_FULL),
    # geth, core/txpool: ErrInflightTxLimitReached, for accounts with delegated code
    ("in-flight transaction limit reached", NodeError.POOL_FULL),
    ("rate limit", NodeError.RATE_LIMITED),
    ("too many requests", NodeError.RATE_LIMITED),
    ("request limit", NodeError.RATE_LIMITED),
    ("exceeded its compute", NodeError.RATE_LIMITED),
    ("compute units per second", NodeError.RATE_LIMITED),
    ("requests per second", NodeError.RATE_LIMITED),
    ("request count exceeded", NodeError.RATE_LIMITED),
    # Infura, documentation of rate limits: "project ID request rate exceeded"
    ("request rate exceeded", NodeError.RATE_LIMITED),
    # Chainstack, documentation of limits: "You've exceeded the RPS limit available on the current plan"
    ("exceeded the rps limit", NodeError.RATE_LIMITED),
    ("beyond current head", NodeError.UNKNOWN_BLOCK),
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
    ("out of gas", NodeError.OUT_OF_GAS),
    ("outofgas", NodeError.OUT_OF_GAS),
    ("gas required exceeds", NodeError.OUT_OF_GAS),
    ("header not found", NodeError.UNKNOWN_BLOCK),
    ("unknown block", NodeError.UNKNOWN_BLOCK),
    ("block not found", NodeError.UNKNOWN_BLOCK),
)


_TOO_MANY: Final = 429
_LIMITED: Final = -32005
#: -32601 is JSON-RPC's own code, -32004 the one of EIP-1474.
_UNSUPPORTED_CODES: Final = frozenset({-32601, -32004})
_UNSUPPORTED_WORDS: Final = (
    "method not found",
    "method not supported",
    "does not exist/is not available",
    "unsupported method",
    "method is not available",
)
_SIMULATIONS: Final = frozenset({"eth_call", "eth_estimateGas"})
#: 3 is geth's, -32015 that of OpenEthereum and its heirs.
_EXECUTION_CODES: Final = frozenset({3, -32015})
_EXECUTION_WORDS: Final = (
    "revert",
    "out of gas",
    "gas required exceeds",
    "invalid opcode",
    "invalid jump",
    "stack underflow",
    "stack overflow",
    "stack limit reached",
    "vm execution error",
    "vm exception",
    "evm error",
    "write protection",
)
_EXECUTION_KINDS: Final = frozenset(
    {NodeError.NO_GAS_MONEY, NodeError.UNDERPRICED, NodeError.INVALID}
)
_REVERT_DATA: Final = re.compile(r"(?:reverted )?0x[0-9a-f]{8}", re.IGNORECASE)


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
    return kind_of(node_message(error))


def kind_of(message: str) -> NodeError:
    """The same of the words of an error object."""
    words = message.lower()
    return next((kind for text, kind in _WORDS if text in words), NodeError.OTHER)


def is_busy(error: Mapping[str, Any]) -> bool:
    """Whether this error object asks to come again later."""
    words = str(error.get("message", ""))
    if error.get("code") == _TOO_MANY or kind_of(words) is NodeError.RATE_LIMITED:
        return True
    # -32005 is also what some nodes say to a too wide range of logs; that is no busy signal.
    return error.get("code") == _LIMITED and "rate" in words.lower()


def is_unsupported(error: Mapping[str, Any]) -> bool:
    """Whether this endpoint does not serve such a question at all; another one may."""
    words = str(error.get("message", "")).lower()
    return error.get("code") in _UNSUPPORTED_CODES or any(
        each in words for each in _UNSUPPORTED_WORDS
    )


def is_verdict(method: str, error: Mapping[str, Any]) -> bool:
    """Whether this error object is the answer itself: what the EVM made of a simulated call.

    Everything else that a node says instead of an answer to a read may be different a moment
    later, or at another endpoint.
    """
    if method not in _SIMULATIONS:
        return False
    words, data = str(error.get("message", "")).lower(), error.get("data")
    if error.get("code") in _EXECUTION_CODES or any(each in words for each in _EXECUTION_WORDS):
        return True
    if isinstance(data, str) and _REVERT_DATA.match(data):
        return True
    return kind_of(words) in _EXECUTION_KINDS
