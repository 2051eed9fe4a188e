"""Customers' calls that came through the forwarder, and what became of them. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from deepsquare_chain.chain.abi import AbiError
from deepsquare_chain.chain.events import ExecutedForwardRequest, decode_logs
from deepsquare_chain.chain.forwarder import ForwardedCall, forwarded_calls

#: Artifact of the forwarder.
FORWARDER: Final = "ERC2771Forwarder"


def signed_calls(calldata: bytes) -> tuple[ForwardedCall, ...]:
    """The requests of a call of the forwarder; empty where it is none, or carries none."""
    try:
        return tuple(forwarded_calls(calldata))
    except AbiError:
        return ()


def executed(forwarder: str, logs: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, bool], ...]:
    """Signer and success of the requests that a transaction carried out, in their order.

    Args:
        forwarder: Its address, with its checksum.
        logs: Of the transaction's receipt, as JSON-RPC gives them.
    """
    return tuple(
        (event.signer, event.success)
        for event in decode_logs(logs)
        if isinstance(event, ExecutedForwardRequest) and event.address == forwarder
    )


def outcomes(
    calls: Sequence[ForwardedCall], done: Sequence[tuple[str, bool]]
) -> tuple[tuple[ForwardedCall, bool], ...]:
    """Whether each request was carried out with success.

    A batch may leave out requests that are expired, used or signed by somebody else; those leave
    no trace, so that outcomes are matched in order and by signer.
    """
    found, at = [], 0
    for call in calls:
        own = at < len(done) and done[at][0] == call.sender
        found.append((call, own and done[at][1]))
        at += own
    return tuple(found)
