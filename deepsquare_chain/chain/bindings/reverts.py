"""Reverts of the contracts as typed exceptions: one class per custom error of our ABIs.

`from deepsquare_chain.chain.bindings.reverts import TooEarly` works for every error; its fields are
attributes in snake case (`error.job_id`). Errors about money are also `InsufficientFundsError`,
those about roles also `NotAuthorisedError`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar, Final

from eth_utils.crypto import keccak

from deepsquare_chain.chain.bindings.abi import (
    AbiError,
    decode_values,
    interfaces,
    signature_of,
    snake_case,
)
from deepsquare_chain.chain.bindings.revert_messages import HINTS, KINDS, sentence
from deepsquare_chain.errors import RevertedError

_ERROR_STRING: Final = keccak(text="Error(string)")[:4]
_PANIC: Final = keccak(text="Panic(uint256)")[:4]


class ContractError(RevertedError):
    """A custom error of a contract; `fields` holds its values by name."""

    signature: ClassVar[str] = ""
    selector: ClassVar[bytes] = b""
    inputs: ClassVar[tuple[Mapping[str, Any], ...]] = ()

    def __init__(
        self, message: str = "", *, hint: str = "", fields: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(message or type(self).__name__, hint=hint)
        self.fields = dict(fields or {})

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["fields"][name]
        except KeyError:
            raise AttributeError(name) from None

    @classmethod
    def from_data(cls, data: bytes) -> ContractError:
        """Decode revert data of this error.

        Raises:
            AbiError: The data does not hold the error's fields.
        """
        values = decode_values(cls.inputs, data[4:])
        names = (snake_case(part["name"]) for part in cls.inputs)
        fields = dict(zip(names, values, strict=True))
        name = cls.__name__
        return cls(sentence(name, fields), hint=HINTS.get(name, ""), fields=fields)


class UnknownRevertError(RevertedError):
    """A revert with no custom error of our contracts; `data` is the revert data."""

    def __init__(self, message: str, *, hint: str = "", data: bytes = b"") -> None:
        super().__init__(message, hint=hint)
        self.data = data


def _build() -> dict[bytes, type[ContractError]]:
    classes: dict[bytes, type[ContractError]] = {}
    names: set[str] = set()
    # The scheduler's errors keep their names; an error of the same name elsewhere gets a prefix.
    for contract in sorted(interfaces(), key=lambda interface: interface.name != "MetaScheduler"):
        for entry in contract.entries("error"):
            signature = signature_of(entry)
            selector = keccak(text=signature)[:4]
            if selector in classes:
                continue
            name = entry["name"]
            if name in names:
                name = f"{contract.name.removeprefix('Provider')}{name}"
            names.add(name)
            base = KINDS.get(name)
            bases = (ContractError,) if base is None else (ContractError, base)
            body: dict[str, Any] = {
                "__module__": __name__,
                "__doc__": f"`{signature}`",
                "signature": signature,
                "selector": selector,
                "inputs": tuple(entry["inputs"]),
            }
            if base is not None:
                body["exit_code"] = base.exit_code
            classes[selector] = type(name, bases, body)
    return classes


#: All custom errors by their selector.
ERRORS: Final[Mapping[bytes, type[ContractError]]] = _build()
_BY_NAME: Final = {each.__name__: each for each in ERRORS.values()}


def __getattr__(name: str) -> type[ContractError]:
    try:
        return _BY_NAME[name]
    except KeyError:
        raise AttributeError(f"no contract has an error {name}") from None


def selector_name(selector: bytes) -> str:
    """Return the name of the error with this selector (`TransitionSkipped.reason`), or its hex."""
    error = ERRORS.get(bytes(selector[:4]))
    return error.__name__ if error else "0x" + bytes(selector).hex()


def decode_revert(source: object) -> RevertedError:
    """Convert a revert to the typed exception.

    Args:
        source: Bytes, hex text, or an exception: web3's ContractCustomError, ContractLogicError
            and Web3RPCError, eth-tester's TransactionFailed. A RevertedError is returned as it is.
    """
    if isinstance(source, RevertedError):
        return source
    data = revert_data(source)
    if data is None:
        return UnknownRevertError(f"The contract rejected the call: {_words(source)}")
    try:
        return _decode(data)
    except AbiError:
        return UnknownRevertError(
            f"The contract rejected the call with 0x{data[:36].hex()}", data=data
        )


def _decode(data: bytes) -> RevertedError:
    selector, encoded = data[:4], data[4:]
    error = ERRORS.get(selector)
    if error is not None:
        return error.from_data(data)
    if not data:
        return UnknownRevertError("The contract rejected the call without a reason")
    if selector == _ERROR_STRING:
        (text,) = decode_values(({"type": "string"},), encoded)
        return UnknownRevertError(f"The contract rejected the call: {text[:300]}", data=data)
    if selector == _PANIC:
        (code,) = decode_values(({"type": "uint256"},), encoded)
        return UnknownRevertError(f"The contract failed with panic 0x{code:02x}", data=data)
    raise AbiError("it is not a known error")


_HEX: Final = re.compile(r"0x([0-9a-fA-F]{8}(?:[0-9a-fA-F]{2})*)")


def revert_data(source: object) -> bytes | None:
    """Return the revert data of an exception or error object; None if there is none."""
    if isinstance(source, bytes | bytearray):
        return bytes(source)
    if isinstance(source, str):
        return _from_text(source)
    if isinstance(source, Mapping):
        return revert_data(source.get("data"))
    if not isinstance(source, BaseException):
        return None
    response = getattr(source, "rpc_response", None)
    body = response.get("error") if isinstance(response, Mapping) else None
    candidates = (getattr(source, "data", None), body, *source.args)
    return next(
        (data for candidate in candidates if (data := revert_data(candidate)) is not None), None
    )


def _from_text(text: str) -> bytes | None:
    """Decode hex, or a bytes literal as in eth-tester's messages; None for other text."""
    if match := _HEX.fullmatch(text.strip().removeprefix("Reverted ")):
        return bytes.fromhex(match[1])
    if text[:2] in ("b'", 'b"') and text[-1:] == text[1]:
        try:
            raw = text[2:-1].encode("latin-1").decode("unicode_escape").encode("latin-1")
        except (UnicodeDecodeError, UnicodeEncodeError):
            return None
        return raw
    return None


def _words(source: object) -> str:
    message = getattr(source, "message", None)
    return str(message or source)[:300]
