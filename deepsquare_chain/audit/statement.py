"""The statement of an account over a range of blocks, and the check that it ends right. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from eth_utils.address import to_checksum_address

from deepsquare_chain.audit.conservation import ConservationCheck, Side, call
from deepsquare_chain.audit.entries import StatementRow
from deepsquare_chain.audit.ledger import Ledger


@dataclass(frozen=True, slots=True)
class Statement:
    """An account's movements in the blocks from `first` to `last`; balances are credit-wei."""

    account: str
    first: int
    last: int
    opening: int
    closing: int
    rows: tuple[StatementRow, ...]

    @property
    def debits(self) -> int:
        """All that went out."""
        return sum(-row.amount for row in self.rows if row.amount < 0)

    @property
    def credits(self) -> int:
        """All that came in."""
        return sum(row.amount for row in self.rows if row.amount > 0)


def statement(ledger: Ledger, account: str, first: int = 0, last: int | None = None) -> Statement:
    """An account's statement.

    Args:
        ledger: That reaches at least to `last`.
        account: Its address.
        first: First block of the range.
        last: Last block of the range; the ledger's own by default.
    """
    until = ledger.block if last is None else last
    before, rows = 0, []
    closing = 0
    for row in ledger.statement(account):
        if row.block > until:
            break
        closing = row.balance
        if row.block < first:
            before = row.balance
        else:
            rows.append(row)
    return Statement(to_checksum_address(account), first, until, before, closing, tuple(rows))


def closing_check(ledger: Ledger, statement: Statement, held: int) -> ConservationCheck:
    """The closing balance against what `balanceOf` answers at that block, in credit-wei."""
    moved = (("opening", statement.opening), ("credits", statement.credits))
    computed = Side("opening + credits - debits", (*moved, ("debits", -statement.debits)))
    repeat = call(ledger.deployment, "Credit", statement.last, "balanceOf", statement.account)
    return ConservationCheck(
        "closing balance", computed, Side("balanceOf", (("balance", held),)), (repeat,)
    )
