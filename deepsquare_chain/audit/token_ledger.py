"""Replays the token's transfers, and matches them with the payments that jobs require. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from deepsquare_chain.audit.entries import ZERO_ADDRESS, MovementKind
from deepsquare_chain.audit.transaction import TransactionContext
from deepsquare_chain.chain.bindings import event_types as ev


class TokenLedger:
    """The ledger of balances, supply and parked credits. `scheduler` holds the escrow."""

    def __init__(self, scheduler: str) -> None:
        self.balances: defaultdict[str, int] = defaultdict(int)
        self.parked: defaultdict[str, int] = defaultdict(int)
        self.minted = 0
        self.burned = 0
        #: Credit-wei sent to the scheduler without a job. They cannot be recovered.
        self.donated = 0
        self._scheduler = scheduler

    @property
    def supply(self) -> int:
        """Total supply in credit-wei."""
        return self.minted - self.burned

    def park(self, event: ev.PaymentParked, page: TransactionContext) -> None:
        """Park a payment that could not be delivered to its recipient."""
        self.parked[event.recipient] += event.amount
        page.owed_out[event.recipient] -= event.amount
        page.check(event.amount > 0, "parked", "nothing was parked")
        page.enter(event.recipient, MovementKind.PARKED, -event.amount, self._scheduler)

    def withdraw(self, event: ev.PaymentWithdrawn, page: TransactionContext) -> None:
        """Apply a withdrawal, which must take all parked credits of the recipient."""
        parked = self.parked[event.recipient]
        page.check(
            event.amount == parked and parked > 0,
            "parked",
            f"{event.recipient} took out {event.amount} of {parked} parked",
        )
        self.parked[event.recipient] = parked - event.amount
        page.owed_out[event.to] += event.amount
        page.enter(event.to, MovementKind.WITHDRAWAL, event.amount, self._scheduler)

    def close(self, transfers: Iterable[ev.Transfer], page: TransactionContext) -> None:
        """Apply a transaction's transfers, and match them with the payments owed in it."""
        paid_in: defaultdict[str, int] = defaultdict(int)
        paid_out: defaultdict[str, int] = defaultdict(int)
        log_indexes: dict[str, int] = {}
        for transfer in transfers:
            page.log_index = transfer.log_index
            self._move(transfer, page)
            if transfer.recipient == self._scheduler:
                paid_in[transfer.sender] += transfer.amount
                log_indexes[transfer.sender] = transfer.log_index
            elif transfer.sender == self._scheduler:
                paid_out[transfer.recipient] += transfer.amount
                log_indexes[transfer.recipient] = transfer.log_index
            else:
                self._between_others(transfer, page)
        self._match_in(paid_in, log_indexes, page)
        self._match_out(paid_out, log_indexes, page)

    def _move(self, transfer: ev.Transfer, page: TransactionContext) -> None:
        if transfer.sender == ZERO_ADDRESS:
            self.minted += transfer.amount
        else:
            self.balances[transfer.sender] -= transfer.amount
            page.check(
                self.balances[transfer.sender] >= 0,
                "balance",
                f"{transfer.sender} spent more than it had",
            )
        if transfer.recipient == ZERO_ADDRESS:
            self.burned += transfer.amount
        else:
            self.balances[transfer.recipient] += transfer.amount

    def _between_others(self, transfer: ev.Transfer, page: TransactionContext) -> None:
        if transfer.sender == ZERO_ADDRESS:
            page.enter(transfer.recipient, MovementKind.MINT, transfer.amount, ZERO_ADDRESS)
            return
        kind = MovementKind.BURN if transfer.recipient == ZERO_ADDRESS else MovementKind.TRANSFER
        page.enter(transfer.sender, kind, -transfer.amount, transfer.recipient)
        if kind is MovementKind.TRANSFER:
            page.enter(transfer.recipient, kind, transfer.amount, transfer.sender)

    def _match_in(
        self, paid_in: dict[str, int], places: dict[str, int], page: TransactionContext
    ) -> None:
        for payer in sorted({*paid_in, *page.owed_in}):
            page.log_index = places.get(payer, page.log_index)
            paid, owed = paid_in.get(payer, 0), page.owed_in.get(payer, 0)
            page.enter(self._scheduler, MovementKind.ESCROW, paid, payer)
            if owed == 0:
                # No job required this payment: a gift, or a mint to the wrong address.
                self.donated += paid
                kind = MovementKind.TRANSFER
                if payer != ZERO_ADDRESS:
                    page.enter(payer, kind, -paid, self._scheduler)
                continue
            page.check(
                paid == owed,
                "escrow",
                f"{payer} paid {paid} into escrow where its jobs say {owed}",
            )

    def _match_out(
        self, paid_out: dict[str, int], places: dict[str, int], page: TransactionContext
    ) -> None:
        for recipient in sorted({*paid_out, *page.owed_out}):
            page.log_index = places.get(recipient, page.log_index)
            paid, owed = paid_out.get(recipient, 0), page.owed_out.get(recipient, 0)
            page.enter(self._scheduler, MovementKind.PAYMENT, -paid, recipient)
            page.check(
                paid == owed,
                "payment",
                f"{recipient} got {paid} out of escrow where its jobs say {owed}",
            )
