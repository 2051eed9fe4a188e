"""Receipts of mined transactions: cost, events, and the reason of a failure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from web3 import AsyncWeb3
from web3.exceptions import ContractLogicError, Web3RPCError

from deepsquare_chain.chain.bindings.events import Event, decode_logs
from deepsquare_chain.chain.bindings.reverts import UnknownRevertError, decode_revert
from deepsquare_chain.chain.transactions.fees import request
from deepsquare_chain.chain.transactions.outbox import Entry
from deepsquare_chain.errors import EndpointError, RevertedError


@dataclass(frozen=True, slots=True)
class TxReceipt:
    """A mined transaction; `fee_wei` is its cost in wei of the chain's native coin."""

    hash: str
    block_number: int
    block_hash: str
    gas_used: int
    fee_wei: int
    events: tuple[Event, ...] = field(repr=False)
    label: str = ""
    contract: str = ""  # address of a contract that this deployed


class OutOfGasError(RevertedError):
    """The gas limit was too low: the state changed between the estimate and the block."""


def read_receipt(entry: Entry, receipt: Any) -> TxReceipt:
    """Convert a node's receipt."""
    return TxReceipt(
        hash=hash_of(receipt),
        block_number=int(receipt["blockNumber"]),
        block_hash=to_hex(receipt["blockHash"]),
        gas_used=int(receipt["gasUsed"]),
        fee_wei=fee_of(receipt),
        events=tuple(decode_logs(receipt["logs"])),
        label=entry.call.label,
        contract=str(receipt.get("contractAddress") or ""),
    )


def hash_of(receipt: Any) -> str:
    """Return the transaction hash of a receipt as 0x-prefixed hex."""
    return to_hex(receipt["transactionHash"])


def to_hex(value: Any) -> str:
    """Return bytes as 0x-prefixed hex."""
    return "0x" + bytes(value).hex()


def fee_of(receipt: Any) -> int:
    """Return the cost of a mined transaction in wei of the chain's native coin."""
    price = int(receipt.get("effectiveGasPrice") or 0)
    return int(receipt["gasUsed"]) * price + _rollup_fee(receipt)


def _rollup_fee(receipt: Any) -> int:
    """Return the fee in wei that a rollup adds for publishing data on its parent chain."""
    fee = receipt.get("l1Fee")
    if fee is None:
        return 0
    return int(fee, 16) if isinstance(fee, str) else int(fee)


async def revert_reason(
    w3: AsyncWeb3[Any], sender: str, entry: Entry, receipt: Any
) -> RevertedError:
    """Return the reason of a failed transaction, by repeating the call on its block's state."""
    tx_hash = hash_of(receipt)
    if int(receipt["gasUsed"]) >= entry.gas:
        return OutOfGasError(f"{entry.call.label!r} ran out of gas ({tx_hash})")
    try:
        await w3.eth.call(request(sender, entry.call), receipt["blockNumber"])
    except ContractLogicError as error:
        return decode_revert(error)
    except (Web3RPCError, EndpointError):
        pass
    return UnknownRevertError(
        f"{entry.call.label!r} was rejected by the contract ({tx_hash})",
        hint="The state may have changed meanwhile; check it and try again.",
    )
