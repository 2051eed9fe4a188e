"""Interface of the outbox, the durable record of a sender's transactions; and their receipts.

The outbox makes sending crash-safe: no transaction is repeated or lost. It is implemented in the
package `store`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from deepsquare_chain.chain.bindings.calls import Call
from deepsquare_chain.chain.bindings.events import Event, decode_logs


class TxState(StrEnum):
    """State of a recorded transaction."""

    OPEN = "open"  # signed and recorded; maybe broadcast, maybe mined
    MINED = "mined"  # in a block, with its effect
    CANCELLED = "cancelled"  # its nonce was used by a cancelling transaction without effect
    FAILED = "failed"  # in a block, but reverted: its nonce is used, without effect
    # Rejected by the node or replaced: its nonce is free, or used by another one.
    ABANDONED = "abandoned"


@dataclass(frozen=True, slots=True)
class Attempt:
    """One signed version of a transaction; later attempts pay higher fees (wei per gas).

    An attempt that `cancels` is an empty transfer to the account itself, which uses up the nonce.
    """

    tx_hash: str
    raw: bytes
    max_fee: int
    priority_fee: int
    sent_block: int
    cancels: bool = False


@dataclass(frozen=True, slots=True)
class Entry:
    """One recorded transaction with all its attempts; `key` is the caller's idempotency key.

    `created` is the local time in seconds (0 if not known), `fee` the fee in wei that was paid
    once it was mined.
    """

    id: int
    nonce: int
    call: Call
    gas: int
    state: TxState
    attempts: tuple[Attempt, ...]
    mined_hash: str = ""
    note: str = ""
    key: str | None = None
    created: int = 0
    fee: int | None = None

    @property
    def latest(self) -> Attempt:
        """The attempt with the highest fees."""
        return self.attempts[-1]


class Outbox(Protocol):
    """Durable record of one account's transactions; each method is one database transaction."""

    def spending(self, timeout: float) -> AbstractAsyncContextManager[None]:
        """Hold the wallet's lock across processes, while an allowance is set and used.

        Raises:
            WaitTimeoutError: Another holder keeps the lock for more than `timeout` seconds.
        """

    def append(
        self, call: Call, gas: int, floor: int, sign: Callable[[int], Attempt], key: str | None
    ) -> Entry:
        """Reserve the next nonce (at least `floor`), sign, and record, atomically."""

    def add_attempt(self, entry_id: int, attempt: Attempt) -> None:
        """Record a replacement before it is broadcast."""

    def set_state(
        self,
        entry_id: int,
        state: TxState,
        *,
        mined_hash: str = "",
        note: str = "",
        fee: int | None = None,
    ) -> None:
        """Record the state of an entry."""

    def spent(self) -> Sequence[tuple[int, int]]:
        """Return time of recording (seconds) and fee (wei) of the latest paid transactions."""

    def entry(self, entry_id: int) -> Entry:
        """Return the current entry."""

    def by_key(self, key: str) -> Entry | None:
        """Return the entry of an idempotency key that is OPEN or MINED, or None."""

    def open_entries(self) -> Sequence[Entry]:
        """Return all OPEN entries, ordered by nonce."""

    def entries_from(self, nonce: int) -> Sequence[Entry]:
        """Return all entries from a nonce on except ABANDONED ones, ordered by nonce."""


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
