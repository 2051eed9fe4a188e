"""Replays the events of providers: their records, load and challenges, and the fee. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from deepsquare_chain.audit.entries import JobEntry, ProviderEntry
from deepsquare_chain.audit.transaction import TransactionContext
from deepsquare_chain.chain.bindings import event_types as ev
from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.credits import fits, job_rate
from deepsquare_chain.job import JobStatus, Load, ProviderStatus, Resources


class RegistryLedger:
    """The providers and the fee: the state that decides about assignments during the replay."""

    def __init__(self, deployment: Deployment) -> None:
        self.providers: dict[str, ProviderEntry] = {}
        self.fee_bps: int | None = None
        self._lost_timeout = deployment.timeouts.get("lost_timeout", 0)

    @property
    def ids(self) -> dict[str, int]:
        """Provider IDs by account."""
        return {account: provider.id for account, provider in self.providers.items() if provider.id}

    def read(self, event: ev.Event, page: TransactionContext) -> None:
        """Apply an event of the registry, or a scheduler event that concerns a provider."""
        handler = _HANDLERS.get(type(event))
        if handler is not None:
            handler(self, event, page)

    def of(self, account: str) -> ProviderEntry:
        """Return the entry of an account, and create it if it does not exist."""
        return self.providers.setdefault(account, ProviderEntry(0, account))

    def is_gone(self, account: str, now: int) -> bool:
        """Return whether a provider's runs can count as lost, judged by time only."""
        entry = self.providers.get(account)
        return entry is not None and entry.is_gone(now, self._lost_timeout)

    def move(self, account: str, before: JobStatus, after: JobStatus, size: Resources) -> None:
        """Update a provider's load after a transition of a job of this size."""
        entry = self.of(account)
        if after is JobStatus.META_SCHEDULED:
            entry.load += Load.of(size)
        elif before.is_assigned and not after.is_assigned:
            entry.load -= Load.of(size)

    def acted(self, account: str, job_id: int, page: TransactionContext) -> None:
        """Note that a provider moved one of its jobs, which must answer its open challenge."""
        if self.of(account).answer_by:
            page.unanswered[account] = job_id

    def close(self, page: TransactionContext) -> None:
        """Record a finding for each challenge that should have been answered by the transaction."""
        for account, job_id in page.unanswered.items():
            page.find(
                "challenge",
                f"{account} moved job {job_id}, which did not answer its open challenge",
                job_id,
            )

    def check_assignment(self, job: JobEntry, page: TransactionContext) -> None:
        """Check that the contract could have assigned the job to its provider at this price."""
        provider = self.providers.get(job.provider)
        subject = f"job {job.id} was assigned to {job.provider}"
        if provider is None or provider.id == 0:
            page.find("eligible", f"{subject}, which is no approved provider", job.id)
            return
        active = provider.status is ProviderStatus.ACTIVE and provider.approved_until >= page.time
        page.check(active, "eligible", f"{subject}, which was not active then", job.id)
        size = job.terms.resources
        page.check(
            fits(provider.hardware, provider.offer, size, provider.load - Load.of(size)),
            "eligible",
            f"{subject}, whose hardware, or offer less its load, it does not fit",
            job.id,
        )
        expected = job_rate(provider.prices, job.terms.resources)
        page.check(
            job.rate == expected and 0 < job.rate < 2**72,
            "rate",
            f"job {job.id} has a rate of {job.rate}, the provider's prices make {expected}",
            job.id,
        )
        page.check(
            job.rate * job.time_limit <= job.escrow,
            "budget",
            f"the escrow of job {job.id} does not buy its time limit",
            job.id,
        )
        page.check(
            job.fee_bps == self.fee_bps,
            "fee",
            f"job {job.id} has a fee of {job.fee_bps} basis points instead of {self.fee_bps}",
            job.id,
        )

    def _registered(self, event: ev.ProviderRegistered, page: TransactionContext) -> None:
        registered = sum(1 for provider in self.providers.values() if provider.id)
        page.check(event.id == registered + 1, "ids", f"provider id {event.id} is out of order")
        entry = self.of(event.provider)
        page.check(entry.id == 0, "ids", f"{event.provider} got a second id")
        entry.id = event.id

    def _proposed(self, event: ev.HardwareProposed, page: TransactionContext) -> None:
        entry = self.of(event.provider)
        page.check(
            event.version == entry.pending_version + 1,
            "version",
            f"version {event.version} of {event.provider} is out of order",
        )
        entry.pending_version = event.version

    def _approved(self, event: ev.ProviderApproved, page: TransactionContext) -> None:
        entry = self.of(event.provider)
        page.check(
            event.approved_until > page.time and event.version <= entry.pending_version,
            "version",
            f"version {event.version} of {event.provider} can't have been approved",
        )
        entry.version = event.version
        entry.hardware = event.hardware
        entry.approved_until = event.approved_until

    def _offered(self, event: ev.OfferChanged, _: TransactionContext) -> None:
        self.of(event.provider).offer = event.offer

    def _priced(self, event: ev.PricesChanged, _: TransactionContext) -> None:
        self.of(event.provider).prices = event.prices

    def _labelled(self, event: ev.LabelsChanged, _: TransactionContext) -> None:
        self.of(event.provider).labels = event.labels

    def _drained(self, event: ev.DrainingChanged, _: TransactionContext) -> None:
        self.of(event.provider).draining = event.draining

    def _banned(self, event: ev.BanChanged, _: TransactionContext) -> None:
        self.of(event.provider).banned = event.banned

    def _challenged(self, event: ev.ProviderChallenged, page: TransactionContext) -> None:
        entry = self.of(event.provider)
        page.check(
            entry.answer_by == 0 and event.answer_by > page.time,
            "challenge",
            f"{event.provider} can't have been challenged",
            event.job_id,
        )
        entry.challenged_at, entry.answer_by = page.time, event.answer_by

    def _answered(self, event: ev.ProviderAnswered, page: TransactionContext) -> None:
        entry = self.of(event.provider)
        page.check(entry.answer_by != 0, "challenge", f"{event.provider} had nothing to answer")
        entry.challenged_at = entry.answer_by = 0
        page.unanswered.pop(event.provider, None)

    def _fee(self, event: ev.FeeChanged, page: TransactionContext) -> None:
        page.check(event.fee_bps <= 2_000, "fee", f"a fee of {event.fee_bps} basis points")
        self.fee_bps = event.fee_bps


_HANDLERS: Final[
    Mapping[type[ev.Event], Callable[[RegistryLedger, Any, TransactionContext], None]]
] = {
    ev.ProviderRegistered: RegistryLedger._registered,  # noqa: SLF001
    ev.HardwareProposed: RegistryLedger._proposed,  # noqa: SLF001
    ev.ProviderApproved: RegistryLedger._approved,  # noqa: SLF001
    ev.OfferChanged: RegistryLedger._offered,  # noqa: SLF001
    ev.PricesChanged: RegistryLedger._priced,  # noqa: SLF001
    ev.LabelsChanged: RegistryLedger._labelled,  # noqa: SLF001
    ev.DrainingChanged: RegistryLedger._drained,  # noqa: SLF001
    ev.BanChanged: RegistryLedger._banned,  # noqa: SLF001
    ev.ProviderChallenged: RegistryLedger._challenged,  # noqa: SLF001
    ev.ProviderAnswered: RegistryLedger._answered,  # noqa: SLF001
    ev.FeeChanged: RegistryLedger._fee,  # noqa: SLF001
}
