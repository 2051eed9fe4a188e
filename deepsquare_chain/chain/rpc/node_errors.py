"""Classifies the error messages of nodes.

JSON-RPC uses one code for nearly all errors, so that the messages of geth, anvil, erigon,
nethermind, besu and the hosted services must be matched. This table is the only place that does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Final

from web3.exceptions import Web3RPCError


class NodeError(StrEnum):
    """Kinds of node errors that are handled differently."""

    ALREADY_KNOWN = "already known"
    NONCE_TOO_LOW = "nonce too low"
    NONCE_TOO_HIGH = "nonce too high"
    UNDERPRICED = "underpriced"
    REPLACEMENT_UNDERPRICED = "replacement underpriced"
    INSUFFICIENT_FUNDS = "insufficient funds"
    RANGE_TOO_LARGE = "range too large"
    RATE_LIMITED = "rate limited"
    UNKNOWN_BLOCK = "unknown block"
    POOL_FULL = "pool full"
    INVALID = "invalid transaction"
    OUT_OF_GAS = "out of gas"
    OTHER = "other"


# The first match counts, so specific texts come before general ones. Sources of the texts:
#   geth        ethereum/go-ethereum: core/error.go, core/txpool/errors.go, core/txpool/legacypool/legacypool.go
#   erigon      erigontech/erigon: txnprovider/txpool/txpoolcfg/txpoolcfg.go (String of DiscardReason)
#   Nethermind  NethermindEth/nethermind: Nethermind.TxPool/TxPoolErrorMessages.cs; until 2025 the names of
#               AcceptTxResult.cs in one word (NonceGap)
#   Besu        hyperledger/besu: ...internal/response/RpcErrorType.java
#   reth        paradigmxyz/reth: crates/rpc/rpc-eth-types/src/error/mod.rs
#   anvil       foundry-rs/foundry: crates/anvil/src/eth/error.rs
#   hardhat     NomicFoundation/edr: texts of the compiled package @nomicfoundation/edr
#   EthereumJS  ethereumjs/ethereumjs-monorepo: packages/client/src/service/txpool.ts
_MESSAGES: Final[tuple[tuple[str, NodeError], ...]] = (
    ("already known", NodeError.ALREADY_KNOWN),  # geth, erigon, Nethermind, reth
    ("already imported", NodeError.ALREADY_KNOWN),  # anvil
    ("alreadyknown", NodeError.ALREADY_KNOWN),  # Nethermind until 2025
    ("known transaction", NodeError.ALREADY_KNOWN),  # Besu, hardhat
    ("existing tx with same hash", NodeError.ALREADY_KNOWN),  # erigon 2
    ("existing txn with same hash", NodeError.ALREADY_KNOWN),  # erigon 3
    ("already in the txpool", NodeError.ALREADY_KNOWN),  # EthereumJS
    ("already exists", NodeError.ALREADY_KNOWN),
    ("could not replace existing tx", NodeError.REPLACEMENT_UNDERPRICED),  # erigon: NotReplaced
    ("to replace existing transaction", NodeError.REPLACEMENT_UNDERPRICED),  # anvil
    ("replacement", NodeError.REPLACEMENT_UNDERPRICED),  # all others
    ("ownnoncealreadyused", NodeError.REPLACEMENT_UNDERPRICED),  # Nethermind until 2025
    ("nonce too low", NodeError.NONCE_TOO_LOW),  # all but the next two
    ("nonce is too low", NodeError.NONCE_TOO_LOW),
    ("oldnonce", NodeError.NONCE_TOO_LOW),  # Nethermind until 2025
    ("nonce too high", NodeError.NONCE_TOO_HIGH),  # geth, Nethermind, Besu, reth, anvil, hardhat
    ("nonce is too high", NodeError.NONCE_TOO_HIGH),
    ("nonce too far in future", NodeError.NONCE_TOO_HIGH),  # Nethermind
    ("nonce gap", NodeError.NONCE_TOO_HIGH),  # Nethermind, of delegated accounts
    ("noncegap", NodeError.NONCE_TOO_HIGH),  # Nethermind until 2025
    ("gapped-nonce", NodeError.NONCE_TOO_HIGH),  # geth: ErrOutOfOrderTxFromDelegated
    # Besu: NONCE_TOO_FAR_IN_FUTURE_FOR_SENDER
    ("nonce is too distant", NodeError.NONCE_TOO_HIGH),
    # Besu: LOWER_NONCE_INVALID_TRANSACTION_EXISTS
    ("invalid transaction with a lower nonce", NodeError.NONCE_TOO_HIGH),
    ("underpriced", NodeError.UNDERPRICED),  # geth, erigon, Nethermind, reth
    ("max fee per gas less than block base fee", NodeError.UNDERPRICED),  # geth, reth, anvil
    ("feetoolow", NodeError.UNDERPRICED),  # Nethermind until 2025
    ("fee too low", NodeError.UNDERPRICED),  # erigon
    ("gas price below", NodeError.UNDERPRICED),  # Besu
    ("priority fee below", NodeError.UNDERPRICED),  # reth
    ("does not pay the minimum gas price", NodeError.UNDERPRICED),  # EthereumJS
    ("cannot pay basefee", NodeError.UNDERPRICED),  # EthereumJS
    ("insufficient funds", NodeError.INSUFFICIENT_FUNDS),  # geth, erigon, Nethermind, reth, anvil
    ("insufficient balance", NodeError.INSUFFICIENT_FUNDS),  # EthereumJS
    ("upfront cost exceeds account balance", NodeError.INSUFFICIENT_FUNDS),  # Besu
    ("insufficientfunds", NodeError.INSUFFICIENT_FUNDS),  # Nethermind until 2025
    ("doesn't have enough funds", NodeError.INSUFFICIENT_FUNDS),  # hardhat
    ("intrinsic gas", NodeError.INVALID),  # geth, Besu, reth, anvil
    ("intrinsicgas", NodeError.INVALID),  # erigon
    ("exceeds block gas limit", NodeError.INVALID),  # geth, Besu, reth, EthereumJS
    ("gas limit reached", NodeError.INVALID),  # Nethermind
    ("gaslimitexceeded", NodeError.INVALID),  # Nethermind until 2025
    ("gas limit too high", NodeError.INVALID),  # reth
    ("gas limit is too high", NodeError.INVALID),  # erigon
    ("exceeds max transaction gas limit", NodeError.INVALID),  # reth
    ("greater than the block gas limit", NodeError.INVALID),  # anvil
    ("exceeds the configured cap", NodeError.INVALID),  # geth, reth
    ("fee cap exceeded", NodeError.INVALID),  # Besu
    ("invalid sender", NodeError.INVALID),  # geth, erigon, reth
    ("failed to recover sender", NodeError.INVALID),  # Nethermind
    ("sender not an eoa", NodeError.INVALID),  # geth, Nethermind, anvil
    ("sender is not an eoa", NodeError.INVALID),  # reth
    ("invalid signature", NodeError.INVALID),  # Besu
    ("invalid chain id", NodeError.INVALID),  # geth, reth, anvil
    ("wrong chainid", NodeError.INVALID),  # Besu
    ("chain id mismatch", NodeError.INVALID),
    ("transaction type not supported", NodeError.INVALID),  # geth, reth
    ("unsupported transaction type", NodeError.INVALID),  # Nethermind
    ("invalid transaction type", NodeError.INVALID),  # Besu
    ("oversized data", NodeError.INVALID),  # geth, erigon, reth
    ("transaction too large", NodeError.INVALID),  # Nethermind
    ("max initcode size", NodeError.INVALID),  # geth, reth, anvil
    ("initcode too large", NodeError.INVALID),  # erigon
    ("rlptoolong", NodeError.INVALID),  # erigon
    ("rlp:", NodeError.INVALID),  # geth
    ("txpool is full", NodeError.POOL_FULL),  # geth, reth
    ("pool is full", NodeError.POOL_FULL),  # erigon ("pending sub-pool is full"), EthereumJS
    ("spammer", NodeError.POOL_FULL),  # erigon: too many transactions of one sender
    ("account limit exceeded", NodeError.POOL_FULL),  # geth: ErrAccountLimitExceeded
    ("already have max amount of txs", NodeError.POOL_FULL),  # EthereumJS
    # geth: ErrAlreadyReserved, of a sender with a transaction in another pool; reth
    ("address already reserved", NodeError.POOL_FULL),
    ("pending transaction type conflict", NodeError.POOL_FULL),  # Nethermind
    ("delegation authority has pending", NodeError.POOL_FULL),  # Nethermind
    # geth: ErrFutureReplacePending, of a full pool for a transaction behind a nonce gap
    ("future transaction tries to replace pending", NodeError.POOL_FULL),
    # geth: ErrInflightTxLimitReached, for accounts with delegated code
    ("in-flight transaction limit reached", NodeError.POOL_FULL),
    ("rate limit", NodeError.RATE_LIMITED),
    ("too many requests", NodeError.RATE_LIMITED),  # docs.metamask.io (Infura): rate limits
    ("payment required", NodeError.RATE_LIMITED),  # the same, of credits per day
    ("request limit", NodeError.RATE_LIMITED),  # QuickNode: "15/second request limit reached"
    ("exceeded its compute", NodeError.RATE_LIMITED),  # Alchemy
    ("compute units per second", NodeError.RATE_LIMITED),  # Alchemy
    ("requests per second", NodeError.RATE_LIMITED),
    # Infura until 2024, as quoted in issues of gochain/web3 and of status-im/status-app
    ("request count exceeded", NodeError.RATE_LIMITED),
    ("request rate exceeded", NodeError.RATE_LIMITED),
    # Chainstack, without a 429: BobTheBuidler/dank_mids, dank_mids/types.py
    ("exceeded the rps limit", NodeError.RATE_LIMITED),
    # EthereumJS: packages/client/src/rpc/modules/eth.ts, before its first block
    ("not aware of the current chain height", NodeError.RATE_LIMITED),
    ("beyond current head", NodeError.UNKNOWN_BLOCK),  # reth, erigon
    ("block range", NodeError.RANGE_TOO_LARGE),
    ("range is too", NodeError.RANGE_TOO_LARGE),
    ("range too large", NodeError.RANGE_TOO_LARGE),
    ("too many blocks", NodeError.RANGE_TOO_LARGE),
    ("maximum rpc range", NodeError.RANGE_TOO_LARGE),  # Besu
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
    ("limit exceeded", NodeError.RANGE_TOO_LARGE),  # EIP-1474
    ("out of gas", NodeError.OUT_OF_GAS),  # reth, anvil
    ("outofgas", NodeError.OUT_OF_GAS),
    ("gas required exceeds", NodeError.OUT_OF_GAS),  # geth, reth
    ("header not found", NodeError.UNKNOWN_BLOCK),  # geth
    ("unknown block", NodeError.UNKNOWN_BLOCK),  # geth, Besu
    ("block not found", NodeError.UNKNOWN_BLOCK),  # Besu, reth
)


_TOO_MANY: Final = 429
_LIMITED: Final = -32005
#: JSON-RPC error code of an unknown method.
_NO_METHOD: Final = -32601
#: EIP-1474 error code of an unsupported method; Besu uses it for an account that can't pay.
_NOT_SUPPORTED: Final = -32004
_UNSUPPORTED_MESSAGES: Final = (
    "method not found",
    "method not supported",
    "does not exist/is not available",
    "unsupported method",
    "method is not available",
)
_SIMULATIONS: Final = frozenset({"eth_call", "eth_estimateGas"})
#: Error codes of a revert: 3 of geth, -32015 of OpenEthereum and its successors.
_EXECUTION_CODES: Final = frozenset({3, -32015})
_EXECUTION_MESSAGES: Final = (
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
    {NodeError.INSUFFICIENT_FUNDS, NodeError.UNDERPRICED, NodeError.INVALID}
)
_REVERT_DATA: Final = re.compile(r"(?:reverted )?0x[0-9a-f]{8}", re.IGNORECASE)


def error_body(error: Web3RPCError) -> Mapping[str, Any]:
    """Return the `error` object of the node's response; empty if there is none."""
    response: Mapping[str, Any] = error.rpc_response or {}
    body = response.get("error")
    return body if isinstance(body, Mapping) else {}


def node_message(error: Web3RPCError) -> str:
    """Return the node's error message, truncated for error texts and logs."""
    return str(error_body(error).get("message") or error.message or "no message")[:300]


def classify(error: Web3RPCError) -> NodeError:
    """Return the kind of an error; OTHER if its message is not known."""
    return kind_of(node_message(error))


def kind_of(message: str) -> NodeError:
    """Return the kind of an error message; OTHER if it is not known."""
    lowered = message.lower()
    return next((kind for text, kind in _MESSAGES if text in lowered), NodeError.OTHER)


def is_busy(error: Mapping[str, Any]) -> bool:
    """Return whether this error object reports a rate limit."""
    message = str(error.get("message", ""))
    if error.get("code") == _TOO_MANY or kind_of(message) is NodeError.RATE_LIMITED:
        return True
    # Some nodes also use -32005 for a log range that is too wide, which is not a rate limit.
    return error.get("code") == _LIMITED and "rate" in message.lower()


def is_unsupported(error: Mapping[str, Any]) -> bool:
    """Return whether the endpoint does not support the method; another endpoint may."""
    message, code = str(error.get("message", "")).lower(), error.get("code")
    if code == _NOT_SUPPORTED:
        return kind_of(message) is NodeError.OTHER
    return code == _NO_METHOD or any(text in message for text in _UNSUPPORTED_MESSAGES)


def is_execution_error(method: str, error: Mapping[str, Any]) -> bool:
    """Return whether this error object is the EVM's result of a simulated call.

    Any other error in response to a read may disappear on a retry or at another endpoint.
    """
    if method not in _SIMULATIONS:
        return False
    message, data = str(error.get("message", "")).lower(), error.get("data")
    if error.get("code") in _EXECUTION_CODES or any(
        text in message for text in _EXECUTION_MESSAGES
    ):
        return True
    if isinstance(data, str) and _REVERT_DATA.match(data):
        return True
    return kind_of(message) in _EXECUTION_KINDS
