"""Mined transactions: what they cost, what they said, and why they failed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from web3 import AsyncWeb3
from web3.exceptions import ContractLogicError, Web3RPCError

from deepsquare_chain.chain.bindings.events import Event, decode_logs
from deepsquare_chain.chain.bindings.reverts import UnknownRevertError, decode_revert
from deepsquare_chain.chain.transactions.outbox import Entry
from deepsquare_chain.chain.transactions.preflight import request
from deepsquare_chain.errors import EndpointError, RevertedError


@dataclass(frozen=True, slots=True)
class TxReceipt:
    """A mined transaction; `fee_wei` is what it cost, in wei of the chain's own coin."""

    hash: str
    block_number: int
    block_hash: str
    gas_used: int
    fee_wei: int
    events: tuple[Event, ...] = field(repr=False)
    label: str = ""
    contract: str = ""  # address of a contract that this deployed


class OutOfGasError(RevertedError):
    """The gas limit was too low: the state moved between the estimate and the block."""


def read_receipt(entry: Entry, receipt: Any) -> TxReceipt:
    """A node's receipt in our words."""
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
    """The transaction's hash as text."""
    return to_hex(receipt["transactionHash"])


def to_hex(value: Any) -> str:
    """Bytes as text, with 0x."""
    return "0x" + bytes(value).hex()


def fee_of(receipt: Any) -> int:
    """What a mined transaction cost, in wei of the chain's own coin."""
    price = int(receipt.get("effectiveGasPrice") or 0)
    return int(receipt["gasUsed"]) * price + _rollup_fee(receipt)


def _rollup_fee(receipt: Any) -> int:
    """What a rollup adds for its data on another chain, in wei."""
    fee = receipt.get("l1Fee")
    if fee is None:
        return 0
    return int(fee, 16) if isinstance(fee, str) else int(fee)


async def why_failed(w3: AsyncWeb3[Any], sender: str, entry: Entry, receipt: Any) -> RevertedError:
    """The reason of a mined failure: the same call on the state that it left behind."""
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
        f"{entry.call.label!r} was refused by the contract ({tx_hash})",
        hint="The state has moved on since; look at it and try again.",
    )
