"""Customers' calls that came through the forwarder: who signed them, and what they call. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from eth_utils.address import to_checksum_address
from eth_utils.crypto import keccak

from deepsquare_chain.chain.abi import AbiError, decode_values, interface, signature_of

FORWARDER: Final = "ERC2771Forwarder"


@dataclass(frozen=True, slots=True)
class SignedCall:
    """A request of a transaction: its signer calls `to` with `data`, for at most `gas`."""

    signer: str
    to: str
    gas: int
    deadline: int
    data: bytes


def signed_calls(calldata: bytes) -> tuple[SignedCall, ...]:
    """The requests of a call of `execute` or `executeBatch`; empty where it is neither."""
    for name in ("execute", "executeBatch"):
        function = interface(FORWARDER).function(name)
        if calldata[:4] != function.selector:
            continue
        try:
            given = decode_values(function.inputs, calldata[4:])[0]
        except AbiError:
            return ()
        requests = (given,) if name == "execute" else given
        return tuple(
            SignedCall(signer, to, gas, deadline, data)
            for signer, to, _, gas, deadline, data, _ in requests
        )
    return ()


def executed(forwarder: str, logs: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, bool], ...]:
    """Signer and success of the requests that a transaction carried out, in their order.

    Args:
        forwarder: Its address.
        logs: Of the transaction's receipt, as JSON-RPC gives them.

    Raises:
        KeyError, TypeError, ValueError: A log is none.
    """
    return tuple(
        (str(to_checksum_address("0x" + log["topics"][1][-40:])), int(log["data"][-64:], 16) == 1)
        for log in logs
        if log["address"].lower() == forwarder.lower() and log["topics"][0] == _EXECUTED
    )


def outcomes(
    calls: Sequence[SignedCall], done: Sequence[tuple[str, bool]]
) -> tuple[tuple[SignedCall, bool], ...]:
    """Whether each request was carried out with success.

    A batch may leave out requests that are expired, used or signed by somebody else; those leave
    no trace, so that outcomes are matched in order and by signer.
    """
    found, at = [], 0
    for call in calls:
        own = at < len(done) and done[at][0] == call.signer
        found.append((call, own and done[at][1]))
        at += own
    return tuple(found)


(_EVENT,) = (
    entry
    for entry in interface(FORWARDER).entries("event")
    if entry["name"] == "ExecutedForwardRequest"
)
_EXECUTED: Final = "0x" + keccak(text=signature_of(_EVENT)).hex()
