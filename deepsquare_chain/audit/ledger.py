"""The ledger of a grid, rebuilt from its events and from nothing else. Pure.

Each bill is computed again from rate, fee and block times; each payment is matched with the
token's transfers in the same transaction. What the contracts would not have done is a finding.
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
        #: Up to where it reaches: block, and chain time in seconds.
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
        """Read events from the deployment on, in any order.

        Args:
            events: All events of the three contracts; those of other addresses are passed over.
            deployment: Where the contracts and the treasury are.
            block_times: Chain time of every block that holds an event, in seconds.
            to_block: Up to which the events were read; that of the last one by default.
            now: Its chain time, in seconds; likewise.

        Raises:
            AuditError: The time of a block is missing.
        """
        ledger = cls(deployment)
        ours = [event for event in events if event.address in ledger.deployment.addresses]
        ours.sort(key=lambda event: event.place)
        ledger._check_places(ours)
        for (block, tx_hash), run in groupby(ours, key=lambda e: (e.block_number, e.tx_hash)):
            if block not in block_times:
                raise AuditError(f"The time of block {block} is missing")
            time = block_times[block]
            of_transaction = list(run)
            ledger._books.read(
                TransactionContext(block, time, tx_hash, ledger.findings, ledger._entries),
                of_transaction,
            )
            ledger._watch.read(of_transaction, ledger.jobs, Spot(block, time, tx_hash))
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
        """Credits by account, of everybody who ever had some."""
        return self._books.cash.balances

    @property
    def parked(self) -> Mapping[str, int]:
        """What waits for somebody's withdrawal."""
        return {who: amount for who, amount in self._books.cash.parked.items() if amount}

    @property
    def accounts(self) -> list[str]:
        """All accounts with a statement."""
        return sorted(self._of)

    @property
    def exceptions(self) -> list[Anomaly]:
        """What is lawful but worth a look, oldest first."""
        return self._watch.so_far(self.jobs, Spot(self.block, self.time))

    @property
    def totals(self) -> Totals:
        """The sums of everything."""
        jobs = self.jobs.values()
        held = self._books.cash.balances.get(self.deployment.scheduler, 0)
        escrow = sum(job.escrow for job in jobs)
        parked = sum(self._books.cash.parked.values())
        return Totals(
            jobs=len(self.jobs),
            minted=self._books.cash.minted,
            burned=self._books.cash.burned,
            supply=self._books.cash.supply,
            scheduler_balance=held,
            escrow=escrow,
            parked=parked,
            donated=self._books.cash.donated,
            balances=sum(self.balances.values()),
            paid=sum(job.paid for job in jobs),
            fees=sum(job.fee for job in jobs),
            refunded=sum(job.refunded for job in jobs),
            difference=held - escrow - parked - self._books.cash.donated,
        )

    def statement(self, account: str) -> list[StatementRow]:
        """All movements of an account, oldest first, with the balance after each."""
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
        for before, after in pairwise(events):
            if before.place == after.place:
                block, tx_hash = after.block_number, after.tx_hash
                message = f"log {after.log_index} of block {block} was given twice"
                self.findings.append(AuditFinding("order", message, block, tx_hash))

    def _close(self) -> None:
        """What must hold at the end of any replay."""
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
    """Addresses spelled as in events, so that they can be compared."""
    return dataclasses.replace(
        deployment,
        credit=to_checksum_address(deployment.credit),
        registry=to_checksum_address(deployment.registry),
        scheduler=to_checksum_address(deployment.scheduler),
        treasury=to_checksum_address(deployment.treasury),
        forwarder=to_checksum_address(deployment.forwarder),
    )


class GridLedgers:
    """The three books of a grid; addresses of the deployment are spelled as in events."""

    def __init__(self, deployment: Deployment) -> None:
        self.registry = RegistryLedger(deployment)
        self.jobs = JobLedger(self.registry, deployment)
        self.cash = TokenLedger(deployment.scheduler)
        self._deployment = deployment

    def read(self, page: TransactionContext, events: Iterable[ev.Event]) -> None:
        """Write one transaction, whose events are in the order of the chain."""
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
