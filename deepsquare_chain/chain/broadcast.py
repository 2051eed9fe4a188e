"""Handing one signed transaction to the node, and what its answer means for the nonce."""

from __future__ import annotations

from enum import Enum, auto
from typing import Any, Final

from hexbytes import HexBytes
from web3 import AsyncWeb3
from web3.exceptions import TransactionNotFound, Web3RPCError

from deepsquare_chain.chain.endpoint import WrongEndpointError
from deepsquare_chain.chain.nodeerrors import NodeError, classify, error_body, node_message
from deepsquare_chain.chain.outbox import Attempt
from deepsquare_chain.errors import EndpointError


class Outcome(Enum):
    """What is known after a broadcast."""

    TAKEN = auto()  # the node has it, from now or from before
    UNCLEAR = auto()  # no proper answer, or words that nobody knows: it may have it
    GAP = auto()  # an earlier nonce is missing at the node
    UNDERPRICED = auto()  # not taken at this fee
    NONCE_USED = auto()  # the chain or another transaction has this nonce
    NO_MONEY = auto()
    BUSY = auto()  # the node's pool is full
    REFUSED = auto()  # for good


_OUTCOMES: Final = {
    NodeError.ALREADY_KNOWN: Outcome.TAKEN,
    NodeError.NONCE_TOO_LOW: Outcome.NONCE_USED,
    NodeError.NONCE_TOO_HIGH: Outcome.GAP,
    NodeError.UNDERPRICED: Outcome.UNDERPRICED,
    NodeError.REPLACEMENT_UNDERPRICED: Outcome.NONCE_USED,
    NodeError.NO_GAS_MONEY: Outcome.NO_MONEY,
    NodeError.POOL_FULL: Outcome.BUSY,
    NodeError.INVALID: Outcome.REFUSED,
}
#: JSON-RPC's own codes: the request itself was refused, before any transaction was read.
_REFUSED_CODES: Final = frozenset({-32700, -32601, -32004})


async def broadcast(w3: AsyncWeb3[Any], attempt: Attempt) -> tuple[Outcome, Web3RPCError | None]:
    """Send the bytes once; never raises for what the node or the way to it does.

    Raises:
        WrongEndpointError: The endpoint serves another chain; nothing was sent.
    """
    try:
        await w3.eth.send_raw_transaction(HexBytes(attempt.raw))
    except Web3RPCError as error:
        if error_body(error).get("code") in _REFUSED_CODES:
            return Outcome.REFUSED, error
        outcome = _OUTCOMES.get(classify(error), Outcome.UNCLEAR)
        if outcome is Outcome.REFUSED:
            outcome = await look(w3, attempt)
        return outcome, error
    except WrongEndpointError:
        raise
    except EndpointError:
        return Outcome.UNCLEAR, None
    return Outcome.TAKEN, None


async def look(w3: AsyncWeb3[Any], attempt: Attempt) -> Outcome:
    """Ask whether the node has it, whatever it said to the bytes."""
    try:
        await w3.eth.get_transaction(HexBytes(attempt.tx_hash))
    except TransactionNotFound:
        return Outcome.REFUSED
    except (Web3RPCError, EndpointError):
        return Outcome.UNCLEAR
    return Outcome.TAKEN


def refusal(error: Web3RPCError | None) -> str:
    """The node's words, or that there were none."""
    return "no answer" if error is None else node_message(error)
