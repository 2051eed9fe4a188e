"""JSON-RPC errors of the embedded node, with the codes and messages of geth."""

from __future__ import annotations

from typing import Any

from eth_abi.abi import decode
from eth_abi.exceptions import DecodingError

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


def refused(message: str) -> RpcError:
    """Return the error of a valid request that the node refuses."""
    return RpcError(SERVER_ERROR, message)


def bad_params(message: str) -> RpcError:
    """Return the error of invalid parameters."""
    return RpcError(INVALID_PARAMS, message)


def reverted(data: bytes) -> RpcError:
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
