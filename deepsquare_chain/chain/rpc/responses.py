"""Responses of nodes: validates results, and classifies error messages. No I/O.

web3 formats the fields of a result by name and fails with arbitrary errors. A required field that
is missing or invalid is rejected here; an invalid field that is not required is removed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Final

from web3.exceptions import Web3RPCError

_QUANTITY: Final = re.compile(r"0x[0-9a-fA-F]{1,64}")
#: Any number of digits; a pattern for pairs takes six times as long.
_DIGITS: Final = re.compile(r"0x[0-9a-fA-F]*")
_HASH: Final = re.compile(r"0x[0-9a-fA-F]{64}")
_ADDRESS: Final = re.compile(r"0x[0-9a-fA-F]{40}")


class InvalidResultError(ValueError):
    """A required field of a result is missing or invalid."""


def checked(method: str, result: Any) -> Any:
    """Validate the result of a method; results of unknown methods are returned unchanged.

    Invalid fields that are not required are removed, because web3 would fail on them. Duplicate
    logs are merged, and logs marked as removed are left out.

    Raises:
        InvalidResultError: It is not a valid result of that method.
    """
    check = _CHECKS.get(method)
    return result if check is None else check(result)


def is_error(error: Any) -> bool:
    """Return whether this is a valid JSON-RPC error object."""
    return (
        isinstance(error, dict)
        and type(error.get("code")) is int
        and isinstance(error.get("message"), str)
    )


def _text(pattern: re.Pattern[str]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and pattern.fullmatch(value) is not None


_quantity, _digits, _hash, _address = map(_text, (_QUANTITY, _DIGITS, _HASH, _ADDRESS))


def _bytes(value: Any) -> bool:
    return _digits(value) and len(value) % 2 == 0


def _number(value: Any) -> bool:
    # Some nodes write plain numbers into fields that are not read here.
    return _quantity(value) or (type(value) is int and value >= 0)


def _all(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(check(item) for item in value)


def _access(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and _address(value.get("address"))
        and _all(_hash)(value.get("storageKeys"))
    )


def _withdrawal(value: Any) -> bool:
    names = ("index", "validatorIndex", "amount")
    return isinstance(value, dict) and all(_quantity(value.get(name)) for name in names)


#: Checks by field name, for all kinds of objects; null is allowed here and handled by the caller.
#: Fields that are not listed are passed on, except those in `_DROPPED`.
_FIELDS: Final[Mapping[str, Callable[[Any], bool]]] = MappingProxyType(
    {
        **dict.fromkeys(
            (
                "number", "blockNumber", "timestamp", "gasLimit", "gasUsed", "baseFeePerGas", "size",
                "cumulativeGasUsed", "effectiveGasPrice", "status", "transactionIndex", "logIndex",
                "gas", "gasPrice", "maxFeePerGas", "maxPriorityFeePerGas", "value", "type",
                "chainId", "v", "yParity", "difficulty", "totalDifficulty", "blobGasUsed",
                "excessBlobGas", "blobGasPrice", "maxFeePerBlobGas", "l1Fee", "blockTimestamp",
                "oldestBlock", "r", "s",
            ),
            _number,
        ),
        **dict.fromkeys(
            (
                "hash", "blockHash", "transactionHash", "parentHash", "stateRoot", "receiptsRoot",
                "transactionsRoot", "sha3Uncles", "mixHash", "withdrawalsRoot",
                "parentBeaconBlockRoot", "requestsHash",
            ),
            _hash,
        ),
        **dict.fromkeys(("extraData", "logsBloom", "input", "data"), _bytes),
        **dict.fromkeys(("from", "to", "miner", "address", "contractAddress"), _address),
        "nonce": _text(re.compile(r"0x[0-9a-fA-F]{1,16}")),
        "topics": _all(_hash),
        "transactions": _all(lambda each: _hash(each) or isinstance(each, dict)),
        "uncles": _all(_hash),
        "removed": lambda value: isinstance(value, bool),
        "gasUsedRatio": _all(lambda value: isinstance(value, int | float)),
        "reward": _all(_all(_quantity)),
        "accessList": _all(_access),
        "withdrawals": _all(_withdrawal),
        "blobVersionedHashes": _all(_hash),
    }
)  # fmt: skip


#: Known fields that may be null, because the object is not in a block or has no such part.
_NULLABLE: Final = frozenset(
    {"to", "blockNumber", "blockHash", "transactionIndex", "contractAddress"}
)
#: Fields that web3 formats but that are not read here; they change with every fork.
_DROPPED: Final = frozenset({"authorizationList", "publicKey", "raw", "standardV"})


def _object_with(*required: str) -> Callable[[Any], dict[str, Any]]:
    """Return a check for an object with these required fields, which drops other invalid fields."""

    def check(value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise InvalidResultError("not an object")
        for name in required:
            field = value.get(name)
            if field is None or type(field) is int or not _is_valid_field(name, field):
                raise InvalidResultError(f"missing or invalid {name}")
        return {
            name: field
            for name, field in value.items()
            if name not in _DROPPED
            and (
                _is_valid_field(name, field)
                if field is not None
                else name in _NULLABLE or name not in _FIELDS
            )
        }

    return check


def _is_valid_field(name: str, value: Any) -> bool:
    field = _FIELDS.get(name)
    return field is None or field(value)


_log = _object_with("address", "topics", "data")
_placed_log = _object_with(
    "address", "topics", "data", "blockNumber", "blockHash", "transactionHash", "logIndex"
)


def _logs(value: Any, check: Callable[[Any], dict[str, Any]] = _placed_log) -> list[Any]:
    """Return the logs without duplicates; a log is identified by block hash and index."""
    if not isinstance(value, list):
        raise InvalidResultError("not a list of logs")
    logs: dict[Any, dict[str, Any]] = {}
    for log in map(check, value):
        if log.get("removed") is True:
            continue
        position = (log.get("blockHash"), log.get("logIndex"))
        key = len(logs) if None in position else position
        known = logs.setdefault(key, log)
        if any(known.get(name) != log.get(name) for name in ("address", "topics", "data")):
            raise InvalidResultError("different logs of the same block and index")
    return list(logs.values())


def _receipt(value: Any) -> dict[str, Any] | None:
    if isinstance(value, dict) and "logs" in value and value.get("blockHash") is None:
        return None  # some nodes return a receipt for a pending transaction
    receipt = _RECEIPT(value)
    return receipt | {"logs": _logs(value.get("logs"), _log)}


def _block(value: Any) -> dict[str, Any]:
    block = _BLOCK(value)
    transactions = block.get("transactions")
    if transactions and isinstance(transactions[0], dict):
        block["transactions"] = [_object_with("hash")(transaction) for transaction in transactions]
    return block


def _or_none(check: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else check(value)


def _valid_if(check: Callable[[Any], bool]) -> Callable[[Any], Any]:
    def checked_value(value: Any) -> Any:
        if not check(value):
            raise InvalidResultError("invalid value")
        return value

    return checked_value


def _fee_history(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not _all(_quantity)(value.get("baseFeePerGas")):
        raise InvalidResultError("no base fees")
    rest = {name: field for name, field in value.items() if name != "baseFeePerGas"}
    return _object_with()(rest) | {"baseFeePerGas": value["baseFeePerGas"]}


_BLOCK: Final = _object_with("number", "hash", "timestamp")
_RECEIPT: Final = _object_with(
    "transactionHash", "blockHash", "blockNumber", "gasUsed", "status", "logs"
)
_CHECKS: Final[Mapping[str, Callable[[Any], Any]]] = MappingProxyType(
    {
        **dict.fromkeys(
            (
                "eth_blockNumber", "eth_chainId", "eth_getTransactionCount", "eth_getBalance",
                "eth_gasPrice", "eth_estimateGas", "eth_maxPriorityFeePerGas",
            ),
            _valid_if(_quantity),
        ),
        **dict.fromkeys(("eth_call", "eth_getCode", "eth_getStorageAt"), _valid_if(_bytes)),
        "eth_sendRawTransaction": _valid_if(_hash),
        "eth_getBlockByNumber": _or_none(_block),
        "eth_getBlockByHash": _or_none(_block),
        "eth_getTransactionReceipt": _or_none(_receipt),
        "eth_getTransactionByHash": _or_none(_object_with("hash", "nonce")),
        "eth_getLogs": _logs,
        "eth_feeHistory": _fee_history,
    }
)  # fmt: skip


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
    # Alchemy, Ankr, publicnode, Chainstack, reth; quoted in foundry-rs/foundry, issue 12687
    ("block range", NodeError.RANGE_TOO_LARGE),
    ("range is too", NodeError.RANGE_TOO_LARGE),
    ("range too large", NodeError.RANGE_TOO_LARGE),
    ("exceeds limit of", NodeError.RANGE_TOO_LARGE),  # Infura: INFURA/infura, issue 237
    # Tenderly: bobanetwork/boba_legacy, issue 827
    ("bigger than range limit", NodeError.RANGE_TOO_LARGE),
    ("ranges over", NodeError.RANGE_TOO_LARGE),  # dRPC: foundry-rs/foundry, issue 12687
    ("exceeds max results", NodeError.RANGE_TOO_LARGE),  # reth: paradigmxyz/reth, issue 23810
    ("too many blocks", NodeError.RANGE_TOO_LARGE),
    ("maximum rpc range", NodeError.RANGE_TOO_LARGE),  # Besu
    # docs.metamask.io (Infura): eth_getLogs
    ("query returned more than", NodeError.RANGE_TOO_LARGE),
    ("response size", NodeError.RANGE_TOO_LARGE),  # Alchemy: bancorprotocol/webapp, issue 523
    # paritytech/jsonrpsee, of zkSync and others
    ("response is too big", NodeError.RANGE_TOO_LARGE),
    # docs.metamask.io (Infura): ten seconds per query
    ("query timeout", NodeError.RANGE_TOO_LARGE),
    # QuickNode, BlockPI: ethers-io/ethers.js, issue 3612; foundry-rs/foundry, issue 12687
    ("limited to", NodeError.RANGE_TOO_LARGE),
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
