"""Converts between py-evm's objects and JSON-RPC values, with the errors of geth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import rlp  # type: ignore[import-untyped]
from eth_abi.abi import decode
from eth_abi.exceptions import DecodingError
from eth_tester.utils.address import generate_contract_address

PARSE_ERROR = -32700
INVALID_REQUEST = -32600
METHOD_NOT_FOUND = -32601
INVALID_PARAMS = -32602
INTERNAL_ERROR = -32603
SERVER_ERROR = -32000
REVERTED = 3

_ERROR_STRING = bytes.fromhex("08c379a0")
_PANIC = bytes.fromhex("4e487b71")
_PANIC_WORDS = {
    0x01: "assert(false)",
    0x11: "arithmetic underflow or overflow",
    0x12: "division or modulo by zero",
    0x21: "enum overflow",
    0x22: "invalid encoded storage byte array accessed",
    0x31: "out-of-bounds array access; popping on an empty array",
    0x32: "out-of-bounds access of an array or bytesN",
    0x41: "out of memory",
    0x51: "uninitialized function",
}


class RpcError(Exception):
    """A JSON-RPC error with its code, message and, for a revert, the data as hex."""

    def __init__(self, code: int, message: str, data: Any = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.data = data

    def to_wire(self) -> dict[str, Any]:
        """Return the JSON object under ``error``."""
        body: dict[str, Any] = {"code": self.code, "message": self.message}
        if self.data is not None:
            body["data"] = self.data
        return body


def server_error(message: str) -> RpcError:
    """Return the error of a valid request that the node refuses."""
    return RpcError(SERVER_ERROR, message)


def invalid_params(message: str) -> RpcError:
    """Return the error of invalid parameters."""
    return RpcError(INVALID_PARAMS, message)


def revert_error(data: bytes) -> RpcError:
    """Return error 3 with the revert data, so that clients can decode custom errors."""
    reason = _reason(data)
    message = f"execution reverted: {reason}" if reason else "execution reverted"
    return RpcError(REVERTED, message, "0x" + data.hex())


def _reason(data: bytes) -> str:
    """Return the text of ``Error(string)`` or ``Panic(uint256)``; empty for other data."""
    try:
        if data[:4] == _ERROR_STRING:
            return str(decode(["string"], data[4:])[0])
        if data[:4] == _PANIC:
            code = int(decode(["uint256"], data[4:])[0])
            return f"panic: {_PANIC_WORDS.get(code, 'unknown panic code')} (0x{code:02x})"
    except (DecodingError, UnicodeDecodeError, OverflowError):
        pass
    return ""


Wire = dict[str, Any]
ZERO_ADDRESS = bytes(20)

_EMPTY_BLOOM = "0x" + "00" * 256
_ZERO_NONCE = "0x" + "00" * 8
_TAGS = ("latest", "safe", "finalized", "earliest", "pending")


@dataclass(frozen=True, slots=True)
class CallRequest:
    """The fields of an ``eth_call``; amounts in wei, ``to`` is empty for a contract creation."""

    sender: bytes = ZERO_ADDRESS
    to: bytes = b""
    data: bytes = b""
    value: int = 0
    gas: int | None = None
    max_fee: int | None = None


def quantity(number: int) -> str:
    return hex(number)


def data(raw: bytes) -> str:
    return "0x" + raw.hex()


def read_quantity(value: Any, name: str) -> int:
    """Parse a non-negative number from its hex form; raises ``RpcError`` for other values."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, str) and value.startswith("0x") and len(value) <= 66:
        try:
            return int(value, 16)
        except ValueError:
            pass
    raise invalid_params(f"{name} must be a hex quantity such as 0x1f, got {_shown(value)}")


def read_data(value: Any, name: str, size: int | None = None) -> bytes:
    """Parse bytes from their hex form; ``size`` is the required number of bytes, if given."""
    if isinstance(value, str) and value.startswith("0x"):
        try:
            raw = bytes.fromhex(value[2:])
        except ValueError:
            raw = None
        if raw is not None and size in (None, len(raw)):
            return raw
    expected = f"0x and {size * 2} hex digits" if size else "0x and hex digits"
    raise invalid_params(f"{name} must be {expected}, got {_shown(value)}")


def read_tag(value: Any) -> str | int | bytes:
    """Parse a block parameter: a tag, a number or a hash (also in the object form of EIP-1898)."""
    if value is None:
        return "latest"
    if isinstance(value, dict):
        if "blockHash" in value:
            return read_data(value["blockHash"], "blockHash", 32)
        value = value.get("blockNumber")
    if isinstance(value, str) and value in _TAGS:
        return value
    return read_quantity(value, "block")


def read_call(value: Any) -> CallRequest:
    """Parse the transaction object of ``eth_call`` and ``eth_estimateGas``."""
    if not isinstance(value, dict):
        raise invalid_params("the first parameter must be a transaction object")
    payload = value.get("input", value.get("data"))
    if value.get("data", payload) != payload:
        raise invalid_params('both "data" and "input" are set and not equal')
    price = value.get("maxFeePerGas", value.get("gasPrice"))
    return CallRequest(
        sender=read_data(value["from"], "from", 20) if value.get("from") else bytes(20),
        to=read_data(value["to"], "to", 20) if value.get("to") else b"",
        data=b"" if payload is None else read_data(payload, "data"),
        value=read_quantity(value.get("value") or 0, "value"),
        gas=None if value.get("gas") is None else read_quantity(value["gas"], "gas"),
        max_fee=None if price is None else read_quantity(price, "gas price"),
    )


def block_fields(header: Any, size: int) -> Wire:
    """Return the fields of a block without transactions; common values are shared to save memory."""
    return {
        "number": quantity(header.block_number),
        "hash": data(header.hash),
        "parentHash": data(header.parent_hash),
        "nonce": _ZERO_NONCE,
        "sha3Uncles": _shared(header.uncles_hash),
        "logsBloom": f"0x{header.bloom:0512x}" if header.bloom else _EMPTY_BLOOM,
        "transactionsRoot": _shared(header.transaction_root),
        "receiptsRoot": _shared(header.receipt_root),
        "stateRoot": data(header.state_root),
        "miner": _shared(header.coinbase),
        "difficulty": "0x0",
        "totalDifficulty": "0x0",
        "mixHash": data(header.mix_hash),
        "extraData": _shared(header.extra_data),
        "size": quantity(size),
        "gasLimit": quantity(header.gas_limit),
        "gasUsed": quantity(header.gas_used),
        "timestamp": quantity(header.timestamp),
        "baseFeePerGas": quantity(header.base_fee_per_gas),
        "withdrawalsRoot": _shared(header.withdrawals_root),
        "blobGasUsed": quantity(header.blob_gas_used),
        "excessBlobGas": quantity(header.excess_blob_gas),
        "parentBeaconBlockRoot": _shared(header.parent_beacon_block_root),
        "uncles": [],
        "withdrawals": [],
    }


def block_size(block: Any) -> int:
    return len(rlp.encode(block))


def transaction_fields(transaction: Any, header: Any | None, index: int | None) -> Wire:
    """Return the fields of a transaction; ``header`` and ``index`` are None while it is pending."""
    kind = transaction_type(transaction)
    parity = transaction.y_parity
    fields: Wire = {
        "type": quantity(kind),
        "hash": data(transaction.hash),
        "nonce": quantity(transaction.nonce),
        "blockHash": data(header.hash) if header else None,
        "blockNumber": quantity(header.block_number) if header else None,
        "transactionIndex": None if index is None else quantity(index),
        "from": data(transaction.sender),
        "to": data(transaction.to) if transaction.to else None,
        "value": quantity(transaction.value),
        "gas": quantity(transaction.gas),
        "gasPrice": quantity(effective_price(transaction, header)),
        "input": data(transaction.data),
        "v": quantity(parity if kind else transaction.v),
        "r": quantity(transaction.r),
        "s": quantity(transaction.s),
    }
    if kind:
        fields["yParity"] = quantity(parity)
        fields["accessList"] = [
            {"address": data(account), "storageKeys": [f"0x{key:064x}" for key in keys]}
            for account, keys in transaction.access_list
        ]
    if kind >= 2:
        fields["maxFeePerGas"] = quantity(transaction.max_fee_per_gas)
        fields["maxPriorityFeePerGas"] = quantity(transaction.max_priority_fee_per_gas)
    chain_id = transaction.chain_id
    if chain_id is not None:
        fields["chainId"] = quantity(chain_id)
    return fields


def receipt_fields(
    transaction: Any, receipt: Any, header: Any, index: int, *, gas_before: int, first_log: int
) -> Wire:
    """Return the fields of a receipt; its logs are numbered within the block from ``first_log``."""
    location = {
        "blockHash": data(header.hash),
        "blockNumber": quantity(header.block_number),
        "transactionHash": data(transaction.hash),
        "transactionIndex": quantity(index),
    }
    logs = [
        {
            "address": data(log.address),
            "topics": [f"0x{topic:064x}" for topic in log.topics],
            "data": data(log.data),
            **location,
            "logIndex": quantity(first_log + position),
            "removed": False,
        }
        for position, log in enumerate(receipt.logs)
    ]
    created = None
    if not transaction.to:
        created = data(generate_contract_address(transaction.sender, transaction.nonce))
    return {
        **location,
        "type": quantity(transaction_type(transaction)),
        "from": data(transaction.sender),
        "to": data(transaction.to) if transaction.to else None,
        "contractAddress": created,
        "status": "0x1" if receipt.state_root == b"\x01" else "0x0",
        "gasUsed": quantity(receipt.gas_used - gas_before),
        "cumulativeGasUsed": quantity(receipt.gas_used),
        "effectiveGasPrice": quantity(effective_price(transaction, header)),
        "logs": logs,
        "logsBloom": f"0x{receipt.bloom:0512x}" if receipt.bloom else _EMPTY_BLOOM,
    }


def transaction_type(transaction: Any) -> int:
    return int(getattr(transaction, "type_id", None) or 0)


def effective_price(transaction: Any, header: Any | None) -> int:
    """Return the wei per gas paid in ``header``'s block, or the maximum fee while pending."""
    if transaction_type(transaction) < 2:
        return int(transaction.gas_price)
    if header is None:
        return int(transaction.max_fee_per_gas)
    offered = header.base_fee_per_gas + transaction.max_priority_fee_per_gas
    return int(min(transaction.max_fee_per_gas, offered))


_SHARED: dict[bytes, str] = {}


def _shared(raw: bytes) -> str:
    """Return one shared string object for values that most blocks have in common."""
    if raw not in _SHARED:
        if len(_SHARED) > 64:
            return data(raw)
        _SHARED[raw] = data(raw)
    return _SHARED[raw]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:40] + "..."
