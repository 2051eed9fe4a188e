"""What a sender remembers of each transaction, so that a crash neither repeats nor loses one.

The store keeps it; this module says what that means.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from deepsquare_chain.chain.bindings.calls import Call


class TxState(StrEnum):
    """Where a transaction stands."""

    OPEN = "open"  # signed and recorded; maybe broadcast, maybe mined
    MINED = "mined"  # in a block, with its effect
    CANCELLED = "cancelled"  # its nonce is used by a transaction that does nothing, as was wanted
    FAILED = "failed"  # in a block, refused by the contract: its nonce is used, without effect
    ABANDONED = (
        "abandoned"  # refused by the node or overtaken: its nonce is free or used by another
    )


@dataclass(frozen=True, slots=True)
class Attempt:
    """One signed form of a transaction; later ones pay higher fees (wei per gas).

    One that `cancels` pays the account itself nothing, to use up the nonce.
    """

    tx_hash: str
    raw: bytes
    max_fee: int
    priority_fee: int
    sent_block: int
    cancels: bool = False


@dataclass(frozen=True, slots=True)
class Entry:
    """One transaction, whichever of its attempts is mined; `key` is the caller's own name.

    `created` is this machine's clock in seconds (0 where it is not known), `fee` wei that were
    paid once it was mined.
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
    """Durable memory of one account's transactions; each method is one database transaction."""

    def spending(self, timeout: float) -> AbstractAsyncContextManager[None]:
        """The wallet's lock around an allowance and what uses it, across processes.

        Raises:
            WaitTimeoutError: Somebody else has it for longer than `timeout` seconds.
        """

    def append(
        self, call: Call, gas: int, floor: int, sign: Callable[[int], Attempt], key: str | None
    ) -> Entry:
        """Take the next nonce (at least `floor`), sign, and record, all or nothing."""

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
        """Record how it stands."""

    def spent(self) -> Sequence[tuple[int, int]]:
        """When each of the latest paid transactions was recorded (seconds), and its fee (wei)."""

    def entry(self, entry_id: int) -> Entry:
        """One entry as it stands now."""

    def by_key(self, key: str) -> Entry | None:
        """The entry of that key which is OPEN or MINED."""

    def open_entries(self) -> Sequence[Entry]:
        """All OPEN entries by nonce."""

    def entries_from(self, nonce: int) -> Sequence[Entry]:
        """All entries from a nonce on, by nonce, but for the ABANDONED."""
