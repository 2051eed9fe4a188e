"""Validates a node's result, without I/O.

web3 formats the fields of a result by name and fails with arbitrary errors. A required field that
is missing or invalid is rejected here; an invalid field that is not required is removed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

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
    return lambda value: isinstance(value, list) and all(check(each) for each in value)


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
            raise InvalidResultError("no object")
        for name in required:
            field = value.get(name)
            if field is None or type(field) is int or not _is_valid_field(name, field):
                raise InvalidResultError(f"no proper {name}")
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
        raise InvalidResultError("no list of logs")
    logs: dict[Any, dict[str, Any]] = {}
    for log in map(check, value):
        if log.get("removed") is True:
            continue
        position = (log.get("blockHash"), log.get("logIndex"))
        key = len(logs) if None in position else position
        known = logs.setdefault(key, log)
        if any(known.get(name) != log.get(name) for name in ("address", "topics", "data")):
            raise InvalidResultError("two logs of one place")
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
            raise InvalidResultError("no proper value")
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
