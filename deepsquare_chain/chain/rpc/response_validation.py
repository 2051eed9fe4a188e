"""Response validation: whether a node's result holds what is read of it; pure.

A library below reads results by their names and fails with whatever error comes first. What is
needed and wrong is turned down here; what is odd and not needed is left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

_QUANTITY: Final = re.compile(r"0x[0-9a-fA-F]{1,64}")
_BYTES: Final = re.compile(r"0x(?:[0-9a-fA-F]{2})*")
_HASH: Final = re.compile(r"0x[0-9a-fA-F]{64}")
_ADDRESS: Final = re.compile(r"0x[0-9a-fA-F]{40}")


class UnfitError(ValueError):
    """A result lacks what is read of it, or holds something else there."""


def checked(method: str, result: Any) -> Any:
    """The result of a method with what is read of it checked; unknown methods may say anything.

    Known fields that nobody needs and that are not what they should be are left out, because a
    library below would fail over them; logs that come twice, or were removed, count once or never.

    Raises:
        UnfitError: It can't be the answer to that method.
    """
    check = _CHECKS.get(method)
    return result if check is None else check(result)


def is_error(error: Any) -> bool:
    """Whether this is an error as JSON-RPC has it."""
    return (
        isinstance(error, dict)
        and type(error.get("code")) is int
        and isinstance(error.get("message"), str)
    )


def _text(pattern: re.Pattern[str]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and pattern.fullmatch(value) is not None


_quantity, _bytes, _hash, _address = map(_text, (_QUANTITY, _BYTES, _HASH, _ADDRESS))


def _number(value: Any) -> bool:
    # Nodes write plain numbers into fields that nobody here reads.
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


#: What stands under these names wherever they stand; null is left to those who read them. Fields
#: that are not listed are passed on, unless a library reads them (`_DROPPED`).
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


#: Known fields that may be null: of what is in no block, or of what has no such part.
_NULL: Final = frozenset({"to", "blockNumber", "blockHash", "transactionIndex", "contractAddress"})
#: A library below formats these, and nobody here reads them: they change with every fork.
_DROPPED: Final = frozenset({"authorizationList", "publicKey", "raw", "standardV"})


def _record(*needed: str) -> Callable[[Any], dict[str, Any]]:
    """An object that has these; of the others, known ones that are odd are left out."""

    def check(value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise UnfitError("no object")
        for name in needed:
            found = value.get(name)
            if found is None or type(found) is int or not _fits(name, found):
                raise UnfitError(f"no proper {name}")
        return {
            name: found
            for name, found in value.items()
            if name not in _DROPPED
            and (_fits(name, found) if found is not None else name in _NULL or name not in _FIELDS)
        }

    return check


def _fits(name: str, value: Any) -> bool:
    field = _FIELDS.get(name)
    return field is None or field(value)


_log = _record("address", "topics", "data")
_placed_log = _record(
    "address", "topics", "data", "blockNumber", "blockHash", "transactionHash", "logIndex"
)


def _logs(value: Any, check: Callable[[Any], dict[str, Any]] = _placed_log) -> list[Any]:
    """Logs, each once: a place is the hash of its block and its index there."""
    if not isinstance(value, list):
        raise UnfitError("no list of logs")
    found: dict[Any, dict[str, Any]] = {}
    for each in map(check, value):
        if each.get("removed") is True:
            continue
        place = (each.get("blockHash"), each.get("logIndex"))
        key = len(found) if None in place else place
        same = found.setdefault(key, each)
        if any(same.get(name) != each.get(name) for name in ("address", "topics", "data")):
            raise UnfitError("two logs of one place")
    return list(found.values())


def _receipt(value: Any) -> dict[str, Any] | None:
    if isinstance(value, dict) and "logs" in value and value.get("blockHash") is None:
        return None  # of a transaction that waits for its block, as some nodes show it
    found = _RECEIPT(value)
    return found | {"logs": _logs(value.get("logs"), _log)}


def _block(value: Any) -> dict[str, Any]:
    found = _BLOCK(value)
    some = found.get("transactions")
    if some and isinstance(some[0], dict):
        found["transactions"] = [_record("hash")(each) for each in some]
    return found


def _or_none(check: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else check(value)


def _plain(check: Callable[[Any], bool]) -> Callable[[Any], Any]:
    def checked_value(value: Any) -> Any:
        if not check(value):
            raise UnfitError("no proper value")
        return value

    return checked_value


def _fee_history(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not _all(_quantity)(value.get("baseFeePerGas")):
        raise UnfitError("no base fees")
    rest = {name: found for name, found in value.items() if name != "baseFeePerGas"}
    return _record()(rest) | {"baseFeePerGas": value["baseFeePerGas"]}


_BLOCK: Final = _record("number", "hash", "timestamp")
_RECEIPT: Final = _record(
    "transactionHash", "blockHash", "blockNumber", "gasUsed", "status", "logs"
)
_CHECKS: Final[Mapping[str, Callable[[Any], Any]]] = MappingProxyType(
    {
        **dict.fromkeys(
            (
                "eth_blockNumber", "eth_chainId", "eth_getTransactionCount", "eth_getBalance",
                "eth_gasPrice", "eth_estimateGas", "eth_maxPriorityFeePerGas",
            ),
            _plain(_quantity),
        ),
        **dict.fromkeys(("eth_call", "eth_getCode", "eth_getStorageAt"), _plain(_bytes)),
        "eth_sendRawTransaction": _plain(_hash),
        "eth_getBlockByNumber": _or_none(_block),
        "eth_getBlockByHash": _or_none(_block),
        "eth_getTransactionReceipt": _or_none(_receipt),
        "eth_getTransactionByHash": _or_none(_record("hash", "nonce")),
        "eth_getLogs": _logs,
        "eth_feeHistory": _fee_history,
    }
)  # fmt: skip
