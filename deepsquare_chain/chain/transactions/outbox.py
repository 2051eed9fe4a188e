"""Interface of the outbox: the durable record of a sender's transactions.

The outbox makes sending crash-safe: no transaction is repeated or lost. It is implemented in the
package `store`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from deepsquare_chain.chain.bindings.calls import Call


class TxState(StrEnum):
    """State of a recorded transaction."""

    OPEN = "open"  # signed and recorded; maybe broadcast, maybe mined
    MINED = "mined"  # in a block, with its effect
    CANCELLED = "cancelled"  # its nonce was used by a cancelling transaction without effect
    FAILED = "failed"  # in a block, but reverted: its nonce is used, without effect
    ABANDONED = (
        "abandoned"  # rejected by the node or replaced: its nonce is free or used by another
    )


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
