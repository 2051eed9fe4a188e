"""The ledger of a grid, rebuilt only from its events. Pure.

Each bill is recomputed from the rate, the fee and the block times. Each payment is matched with
the token's transfers in the same transaction. Anything that the contracts would not have done is
recorded as a finding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby, pairwise

from eth_utils.address import to_checksum_address

from deepsquare_chain.audit.anomalies import Anomaly, Spot
from deepsquare_chain.audit.anomaly_rules import AnomalyRules
from deepsquare_chain.audit.entries import (
    AuditFinding,
    JobEntry,
    LedgerEntry,
    ProviderEntry,
    StatementRow,
    Totals,
)
from deepsquare_chain.audit.job_ledger import JobLedger
from deepsquare_chain.audit.registry_ledger import RegistryLedger
from deepsquare_chain.audit.token_ledger import TokenLedger
from deepsquare_chain.audit.transaction import TransactionContext
from deepsquare_chain.chain.bindings import event_types as ev
from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.errors import AuditError


class Ledger:
    """Jobs, providers, balances and findings after a replay."""

    def __init__(self, deployment: Deployment) -> None:
        self.deployment = deployment = normalised(deployment)
        self.findings: list[AuditFinding] = []
        #: Last block of the replay, and its chain time in seconds.
        self.block = deployment.block
        self.time = 0
        self._entries: list[LedgerEntry] = []
        self._of: dict[str, list[LedgerEntry]] = {}
        self._books = GridLedgers(deployment)
        self._watch = AnomalyRules(deployment)

    @classmethod
    def replay(
        cls,
        events: Iterable[ev.Event],
        deployment: Deployment,
        block_times: Mapping[int, int],
        *,
        to_block: int | None = None,
        now: int | None = None,
    ) -> Ledger:
        """Build a ledger from all events since the deployment, given in any order.

        Args:
            events: All events of the three contracts; events of other addresses are ignored.
            deployment: Addresses of the contracts and the treasury.
            block_times: Chain time of every block with an event, in seconds.
            to_block: Last block that was read; the block of the last event by default.
            now: Chain time of that block in seconds; the time of the last event by default.

        Raises:
            AuditError: The time of a block is missing.
        """
        ledger = cls(deployment)
        ours = [event for event in events if event.address in ledger.deployment.addresses]
        ours.sort(key=lambda event: event.place)
        ledger._check_places(ours)
        for (block, tx_hash), group in groupby(ours, key=lambda e: (e.block_number, e.tx_hash)):
            if block not in block_times:
                raise AuditError(f"The time of block {block} is missing")
            time = block_times[block]
            transaction_events = list(group)
            ledger._books.read(
                TransactionContext(block, time, tx_hash, ledger.findings, ledger._entries),
                transaction_events,
            )
            ledger._watch.read(transaction_events, ledger.jobs, Spot(block, time, tx_hash))
            ledger.block, ledger.time = block, time
        ledger.block = ledger.block if to_block is None else to_block
        ledger.time = ledger.time if now is None else now
        ledger._close()
        return ledger

    @property
    def jobs(self) -> Mapping[int, JobEntry]:
        """All jobs by id."""
        return self._books.jobs.jobs

    @property
    def providers(self) -> Mapping[str, ProviderEntry]:
        """All providers by account."""
        return self._books.registry.providers

    @property
    def provider_ids(self) -> Mapping[str, int]:
        """Provider ids by account."""
        return self._books.registry.ids

    @property
    def balances(self) -> Mapping[str, int]:
        """Balances in credit-wei, of every account that ever held credits."""
        return self._books.cash.balances

    @property
    def parked(self) -> Mapping[str, int]:
        """Parked credit-wei by account, until the account withdraws them."""
        return {account: amount for account, amount in self._books.cash.parked.items() if amount}

    @property
    def accounts(self) -> list[str]:
        """All accounts with a statement."""
        return sorted(self._of)

    @property
    def exceptions(self) -> list[Anomaly]:
        """Anomalies (allowed but unusual), oldest first."""
        return self._watch.so_far(self.jobs, Spot(self.block, self.time))

    @property
    def totals(self) -> Totals:
        """Totals of the whole ledger."""
        jobs = self.jobs.values()
        scheduler_balance = self._books.cash.balances.get(self.deployment.scheduler, 0)
        escrow = sum(job.escrow for job in jobs)
        parked = sum(self._books.cash.parked.values())
        return Totals(
            jobs=len(self.jobs),
            minted=self._books.cash.minted,
            burned=self._books.cash.burned,
            supply=self._books.cash.supply,
            scheduler_balance=scheduler_balance,
            escrow=escrow,
            parked=parked,
            donated=self._books.cash.donated,
            balances=sum(self.balances.values()),
            paid=sum(job.paid for job in jobs),
            fees=sum(job.fee for job in jobs),
            refunded=sum(job.refunded for job in jobs),
            difference=scheduler_balance - escrow - parked - self._books.cash.donated,
        )

    def statement(self, account: str) -> list[StatementRow]:
        """Return all movements of an account, oldest first, with the balance after each."""
        return list(self._rows(to_checksum_address(account)))

    def _rows(self, account: str) -> Iterator[StatementRow]:
        balance = 0
        for entry in self._of.get(account, ()):
            balance += entry.amount
            yield StatementRow(
                entry.block,
                entry.time,
                entry.kind,
                entry.amount,
                entry.job_id,
                entry.counterparty,
                entry.tx_hash,
                balance,
                entry.log_index,
            )

    def _check_places(self, events: list[ev.Event]) -> None:
        for previous, event in pairwise(events):
            if previous.place == event.place:
                block, tx_hash = event.block_number, event.tx_hash
                message = f"log {event.log_index} of block {block} was given twice"
                self.findings.append(AuditFinding("order", message, block, tx_hash))

    def _close(self) -> None:
        """Check the invariants that hold at the end of every replay."""
        for entry in self._entries:
            self._of.setdefault(entry.account, []).append(entry)
        self._entries.clear()
        for job in self.jobs.values():
            if job.difference:
                message = f"job {job.id} has {job.difference} credit-wei too much or too little"
                self.findings.append(AuditFinding("job", message, self.block, "", job.id))
        totals = self.totals
        if totals.difference:
            message = (
                f"the scheduler holds {totals.scheduler_balance} credit-wei, "
                f"{totals.difference} apart from escrow, parked and donated"
            )
            self.findings.append(AuditFinding("conservation", message, self.block, ""))
        if sum(self.balances.values()) != totals.supply:
            message = "the balances do not add up to the supply"
            self.findings.append(AuditFinding("supply", message, self.block, ""))
        self._check_statements()

    def _check_statements(self) -> None:
        for account in sorted({*self._of, *self.balances}):
            total = sum(entry.amount for entry in self._of.get(account, ()))
            if total != self.balances.get(account, 0):
                message = f"the statement of {account} does not end at its balance"
                self.findings.append(AuditFinding("statement", message, self.block, ""))


def normalised(deployment: Deployment) -> Deployment:
    """Return the deployment with checksummed addresses, to compare them with those in events."""
    return dataclasses.replace(
        deployment,
        credit=to_checksum_address(deployment.credit),
        registry=to_checksum_address(deployment.registry),
        scheduler=to_checksum_address(deployment.scheduler),
        treasury=to_checksum_address(deployment.treasury),
        forwarder=to_checksum_address(deployment.forwarder),
    )


class GridLedgers:
    """The registry, job and token ledgers of a grid. The deployment must be `normalised`."""

    def __init__(self, deployment: Deployment) -> None:
        self.registry = RegistryLedger(deployment)
        self.jobs = JobLedger(self.registry, deployment)
        self.cash = TokenLedger(deployment.scheduler)
        self._deployment = deployment

    def read(self, page: TransactionContext, events: Iterable[ev.Event]) -> None:
        """Apply the events of one transaction, given in chain order."""
        transfers = []
        for event in events:
            page.log_index = event.log_index
            if event.address == self._deployment.credit:
                if isinstance(event, ev.Transfer):
                    transfers.append(event)
            elif event.address == self._deployment.registry or not hasattr(event, "job_id"):
                self.registry.read(event, page)
                self._read_parked(event, page)
            else:
                self.registry.read(event, page)
                self.jobs.read(event, page)
        self.jobs.close(page)
        self.registry.close(page)
        self.cash.close(transfers, page)

    def _read_parked(self, event: ev.Event, page: TransactionContext) -> None:
        if event.address != self._deployment.scheduler:
            return
        if isinstance(event, ev.PaymentParked):
            self.cash.park(event, page)
        elif isinstance(event, ev.PaymentWithdrawn):
            self.cash.withdraw(event, page)
