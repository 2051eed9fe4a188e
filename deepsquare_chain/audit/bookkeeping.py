"""How a transaction is written into the books: jobs and providers first, then its money. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from deepsquare_chain.audit.job_ledger import JobBook
from deepsquare_chain.audit.registry_ledger import RegistryBook
from deepsquare_chain.audit.token_ledger import CashBook
from deepsquare_chain.audit.transaction import Page
from deepsquare_chain.chain import eventtypes as ev
from deepsquare_chain.chain.deployment import Deployment


class Bookkeeping:
    """The three books of a grid; addresses of the deployment are spelled as in events."""

    def __init__(self, deployment: Deployment) -> None:
        self.registry = RegistryBook(deployment)
        self.jobs = JobBook(self.registry, deployment)
        self.cash = CashBook(deployment.scheduler)
        self._deployment = deployment

    def read(self, page: Page, events: Iterable[ev.Event]) -> None:
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

    def _read_parked(self, event: ev.Event, page: Page) -> None:
        if event.address != self._deployment.scheduler:
            return
        if isinstance(event, ev.PaymentParked):
            self.cash.park(event, page)
        elif isinstance(event, ev.PaymentWithdrawn):
            self.cash.withdraw(event, page)
