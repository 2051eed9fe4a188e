"""The statement of an account over a range of blocks, and a check of its closing balance. Pure."""

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
        """Total of outgoing movements, in credit-wei."""
        return sum(-row.amount for row in self.rows if row.amount < 0)

    @property
    def credits(self) -> int:
        """Total of incoming movements, in credit-wei."""
        return sum(row.amount for row in self.rows if row.amount > 0)


def statement(ledger: Ledger, account: str, first: int = 0, last: int | None = None) -> Statement:
    """Return an account's statement.

    Args:
        ledger: A ledger that covers all blocks up to `last`.
        account: Address of the account.
        first: First block of the range.
        last: Last block of the range; the last block of the ledger by default.
    """
    until = ledger.block if last is None else last
    opening, rows = 0, []
    closing = 0
    for row in ledger.statement(account):
        if row.block > until:
            break
        closing = row.balance
        if row.block < first:
            opening = row.balance
        else:
            rows.append(row)
    return Statement(to_checksum_address(account), first, until, opening, closing, tuple(rows))


def closing_check(ledger: Ledger, statement: Statement, held: int) -> ConservationCheck:
    """Return the check of the closing balance against `held`, the `balanceOf` in credit-wei."""
    terms = (("opening", statement.opening), ("credits", statement.credits))
    computed = Side("opening + credits - debits", (*terms, ("debits", -statement.debits)))
    repeat = call(ledger.deployment, "Credit", statement.last, "balanceOf", statement.account)
    return ConservationCheck(
        "closing balance", computed, Side("balanceOf", (("balance", held),)), (repeat,)
    )
