"""Reverts become typed exceptions with clear messages, from every kind of node."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
from eth_abi import encode
from eth_tester.exceptions import TransactionFailed
from hypothesis import given
from hypothesis import strategies as st
from web3.exceptions import ContractCustomError, ContractLogicError, Web3RPCError

from deepsquare_chain.chain.bindings import reverts
from deepsquare_chain.chain.bindings.abi import interfaces, type_of
from deepsquare_chain.chain.bindings.deployment import APPROVER_ROLE
from deepsquare_chain.chain.bindings.reverts import (
    _SENTENCES,
    ERRORS,
    HINTS,
    KINDS,
    ContractError,
    UnknownRevertError,
    decode_revert,
    revert_data,
    selector_name,
)
from deepsquare_chain.errors import InsufficientFundsError, NotAuthorisedError, RevertedError

A = "0x" + "11" * 20
SAMPLES = {"address": A, "bytes32": b"limit".ljust(32, b"\0"), "string": "long", "uint8": 4}


def data_of(kind: type[ContractError]) -> bytes:
    """Return the encoded error with made-up values."""
    kinds = [type_of(part) for part in kind.inputs]
    return kind.selector + encode(kinds, [SAMPLES.get(kind, 5) for kind in kinds])


@pytest.mark.parametrize("kind", ERRORS.values(), ids=lambda kind: kind.__name__)
def test_every_error_of_the_contracts(kind: type[ContractError]) -> None:
    revert = decode_revert(data_of(kind))
    assert type(revert) is kind
    assert isinstance(revert, RevertedError)
    assert revert.message
    assert selector_name(kind.selector) == kind.__name__
    for name, value in revert.fields.items():
        assert getattr(revert, name) == value
    assert "{" not in revert.message


def test_all_errors_are_there() -> None:
    entries = {entry["name"] for interface in interfaces() for entry in interface.entries("error")}
    names = {kind.__name__ for kind in ERRORS.values()}
    assert entries <= names
    assert names - entries == {
        "RegistryReasonTooLong"
    }  # an error of the same name with other fields
    # A message for an error that does not exist would never be shown.
    assert set(_SENTENCES) <= names
    # Each error with a message also says what to do next.
    assert set(_SENTENCES) == set(HINTS) <= names
    assert set(KINDS) <= names


def test_words_and_fields() -> None:
    revert = decode_revert(
        reverts.InvalidTransition.selector + encode(["uint256", "uint8", "uint8"], [7, 4, 5])
    )
    assert revert.message == "Job 7 is RUNNING and can't become CANCELLED"
    assert (revert.job_id, revert.to) == (7, 5)  # type: ignore[attr-defined]
    second = decode_revert(
        reverts.InvalidTransition.selector + encode(["uint256", "uint8", "uint8"], [7, 5, 5])
    )
    assert second.message == "Job 7 is CANCELLED already"
    missing = decode_revert(
        reverts.InvalidTransition.selector + encode(["uint256", "uint8", "uint8"], [7, 0, 5])
    )
    assert missing.message == "Job 7 does not exist"
    balance_error = decode_revert(
        reverts.ERC20InsufficientBalance.selector
        + encode(["address", "uint256", "uint256"], [A, 10**17, 3 * 10**18])
    )
    assert balance_error.message == f"{A} has 0.1 credits, less than the 3 credits needed"
    assert balance_error.hint
    nobody = decode_revert(reverts.ERC20InvalidReceiver.selector + encode(["address"], [A]))
    assert (nobody.message, nobody.hint) == (f"{A} can't receive credits", "Check the address.")
    with pytest.raises(AttributeError):
        _ = balance_error.colour  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("role", "name"),
    [
        (bytes(32), "DEFAULT_ADMIN_ROLE"),
        (APPROVER_ROLE, "APPROVER_ROLE"),
        (b"\x01" * 32, "0x" + "01" * 32),
    ],
)
def test_a_missing_role_is_named(role: bytes, name: str) -> None:
    revert = decode_revert(
        reverts.AccessControlUnauthorizedAccount.selector
        + encode(["address", "bytes32"], [A, role])
    )
    assert revert.message == f"{A} does not have {name}, which this needs"


def test_kinds_decide_the_exit_code() -> None:
    assert issubclass(reverts.ERC20InsufficientBalance, InsufficientFundsError)
    assert issubclass(reverts.ERC20InsufficientAllowance, InsufficientFundsError)
    assert issubclass(reverts.AccessControlUnauthorizedAccount, NotAuthorisedError)
    assert decode_revert(data_of(reverts.ERC20InsufficientAllowance)).exit_code == 5
    assert decode_revert(data_of(reverts.AccessControlUnauthorizedAccount)).exit_code == 8
    assert decode_revert(data_of(reverts.NotCustomer)).exit_code == 8
    assert decode_revert(data_of(reverts.TooEarly)).exit_code == 6


def wrapped(data: bytes) -> list[Any]:
    """Return one revert in the formats of all nodes and libraries."""
    text = "0x" + data.hex()

    def rpc(body: dict[str, Any]) -> Web3RPCError:
        return Web3RPCError(str(body), rpc_response={"jsonrpc": "2.0", "id": 1, "error": body})

    return [
        data,
        bytearray(data),
        text,
        ContractCustomError(text, data=text),
        ContractLogicError("execution reverted", data=text),
        ContractLogicError("execution reverted", data={"data": text}),  # type: ignore[dict-item]
        rpc({"code": 3, "message": "execution reverted", "data": text}),
        rpc({"code": 3, "message": "execution reverted", "data": {"data": text}}),
        rpc({"code": -32015, "message": "VM execution error", "data": f"Reverted {text}"}),
        TransactionFailed(data),
        TransactionFailed(str(data)),
        TransactionFailed(text),
        TransactionFailed(repr(data)),
    ]


def test_every_wrapping_is_opened() -> None:
    for data in (data_of(reverts.TooEarly), data_of(reverts.OfferTooLarge)):
        for source in wrapped(data):
            revert = decode_revert(source)
            assert type(revert) is ERRORS[data[:4]], source


def test_bytes_that_print_strangely_survive_eth_tester() -> None:
    data = reverts.TooEarly.selector + bytes([0] * 28 + [0x27, 0x22, 0x5C, 0x0A])
    revert = decode_revert(TransactionFailed(str(data)))
    assert revert.job_id == 0x27225C0A  # type: ignore[attr-defined]


def test_plain_reasons_panics_and_silence() -> None:
    text = bytes.fromhex("08c379a0") + encode(["string"], ["not today"])
    assert "not today" in decode_revert(text).message
    panic = bytes.fromhex("4e487b71") + encode(["uint256"], [0x11])
    assert "panic 0x11" in decode_revert(panic).message
    assert "without a reason" in decode_revert(b"").message
    assert "0xdeadbeef" in decode_revert(b"\xde\xad\xbe\xef").message
    assert "out of luck" in decode_revert(ContractLogicError("out of luck")).message
    assert revert_data(ValueError("no data")) is None
    assert revert_data(None) is None


def test_cut_off_data_is_unknown_not_a_crash() -> None:
    revert = decode_revert(data_of(reverts.InvalidTransition)[:20])
    assert isinstance(revert, UnknownRevertError)
    assert selector_name(b"\1\2\3\4") == "0x01020304"


def test_a_typed_error_is_not_converted() -> None:
    revert = decode_revert(data_of(reverts.TooEarly))
    assert decode_revert(revert) is revert
    for copied in (pickle.loads(pickle.dumps(revert)), copy.copy(revert)):  # noqa: S301 - our own
        assert type(copied) is reverts.TooEarly
        assert (copied.job_id, copied.message, copied.hint) == (5, revert.message, revert.hint)


def test_there_is_no_error_of_another_name() -> None:
    with pytest.raises(AttributeError, match="no contract has an error Nonsense"):
        _ = reverts.Nonsense


@given(data=st.binary(max_size=200), known=st.sampled_from(sorted(ERRORS)))
def test_no_bytes_crash_it(data: bytes, known: bytes) -> None:
    for source in (*wrapped(data), *wrapped(known + data)):
        assert isinstance(decode_revert(source), RevertedError)


@given(text=st.text(max_size=60))
def test_no_text_crashes_it(text: str) -> None:
    assert isinstance(decode_revert(text), RevertedError)
    assert isinstance(decode_revert(TransactionFailed(text)), RevertedError)
    assert isinstance(decode_revert(ContractLogicError(text, data=text)), RevertedError)
