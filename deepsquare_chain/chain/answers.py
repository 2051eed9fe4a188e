"""Whether a node's result has the shape that its method promises; pure.

A library below reads results by their names and fails with whatever error comes first. What is
looked at here is turned down as an endpoint's nonsense instead.
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


def fits(method: str, result: Any) -> bool:
    """Whether this can be an answer to that method; unknown methods may say anything."""
    check = _CHECKS.get(method)
    return check is None or bool(check(result))


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


#: What stands under these names wherever they stand; null is left to those who read them.
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
        "logs": lambda value: isinstance(value, list) and all(map(_log, value)),
        "transactions": _all(lambda each: _hash(each) or _record("hash")(each)),
        "uncles": _all(_hash),
        "removed": lambda value: isinstance(value, bool),
        "gasUsedRatio": _all(lambda value: isinstance(value, int | float)),
        "reward": _all(_all(_quantity)),
        "accessList": lambda value: isinstance(value, list) and all(map(_access, value)),
        "withdrawals": lambda value: isinstance(value, list) and all(map(_withdrawal, value)),
        "blobVersionedHashes": _all(_hash),
        "authorizationList": lambda value: value == [],
    }
)  # fmt: skip


def _access(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and _address(value.get("address"))
        and _all(_hash)(value.get("storageKeys"))
    )


def _withdrawal(value: Any) -> bool:
    names = ("index", "validatorIndex", "amount")
    return isinstance(value, dict) and all(_quantity(value.get(name)) for name in names)


def _record(*needed: str) -> Callable[[Any], bool]:
    """An object that has these, and whose other known fields are what they should be."""

    def check(value: Any) -> bool:
        if not isinstance(value, dict) or any(value.get(name) is None for name in needed):
            return False
        if any(type(value[name]) is int for name in needed):
            return False
        known = ((_FIELDS.get(name), found) for name, found in value.items() if found is not None)
        return all(field is None or field(found) for field, found in known)

    return check


def _log(value: Any) -> bool:
    return _record("address", "topics", "data")(value)


def _or_none(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


def _fee_history(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    rest = {name: found for name, found in value.items() if name != "baseFeePerGas"}
    return _all(_quantity)(value.get("baseFeePerGas")) and _record()(rest)


_BLOCK: Final = _or_none(_record("number", "hash", "timestamp"))
_CHECKS: Final[Mapping[str, Callable[[Any], bool]]] = MappingProxyType(
    {
        **dict.fromkeys(
            (
                "eth_blockNumber", "eth_chainId", "eth_getTransactionCount", "eth_getBalance",
                "eth_gasPrice", "eth_estimateGas", "eth_maxPriorityFeePerGas",
            ),
            _quantity,
        ),
        **dict.fromkeys(("eth_call", "eth_getCode", "eth_getStorageAt"), _bytes),
        "eth_sendRawTransaction": _hash,
        "eth_getBlockByNumber": _BLOCK,
        "eth_getBlockByHash": _BLOCK,
        "eth_getTransactionReceipt": _or_none(
            _record("transactionHash", "blockHash", "blockNumber", "gasUsed", "status", "logs")
        ),
        "eth_getTransactionByHash": _or_none(_record("hash", "nonce")),
        "eth_getLogs": _all(
            _record("address", "topics", "data", "blockNumber", "blockHash", "transactionHash",
                    "logIndex")
        ),
        "eth_feeHistory": _fee_history,
    }
)  # fmt: skip
