"""Records of the model: jobs, providers, and the expected effects of a call."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from deepsquare_chain import credits as money
from deepsquare_chain.job import (
    Hardware,
    JobFlags,
    JobStatus,
    Load,
    Offer,
    Prices,
    ProviderStatus,
    Resources,
)

S = JobStatus
ARROWS = {
    S.NONE: {S.PENDING},
    S.PENDING: {S.META_SCHEDULED, S.CANCELLED},
    S.META_SCHEDULED: {S.SCHEDULED, S.CANCELLED, S.PANICKED, S.PENDING},
    S.SCHEDULED: {S.RUNNING, S.CANCELLED, S.PANICKED, S.PENDING},
    S.RUNNING: {S.CANCELLED, S.FINISHED, S.FAILED, S.OUT_OF_CREDITS, S.PANICKED},
}


class Refused(Exception):  # noqa: N818 - as events, what happened
    """The whole call must revert with this error."""


@dataclass(frozen=True)
class GhostJob:
    """One record, and where its money came from and went; interim payments are in paid and fee."""

    id: int
    customer: str
    status: JobStatus
    since: int
    resources: Resources
    retries: int
    flags: JobFlags
    escrow: int
    limit: int
    definition: bytes
    retry_of: int = 0
    provider: int = 0
    rate: int = 0
    fee_bps: int = 0
    barred: frozenset[int] = frozenset()
    started: int = 0
    funded: int = 0
    carried_in: int = 0
    paid: int = 0
    fee: int = 0
    refunded: int = 0
    carried_out: int = 0

    @property
    def until_spent(self) -> bool:
        return JobFlags.UNTIL_SPENT in self.flags

    @property
    def allotment(self) -> int:
        return money.allotment(self.limit, self.until_spent, self.escrow, self.rate)

    @property
    def load(self) -> Load:
        """Resources that the job occupies at its provider now."""
        return Load.of(self.resources) if self.status.is_assigned else Load()


NO_HARDWARE, NO_OFFER, NO_PRICES = Hardware(0, 0, 0, 0), Offer(0, 0, 0), Prices(0, 0, 0)


@dataclass
class GhostProvider:
    account: str
    id: int = 0
    version: int = 0
    pending_version: int = 0
    hardware: Hardware = NO_HARDWARE
    pending: Hardware = NO_HARDWARE
    offer: Offer = NO_OFFER
    prices: Prices = NO_PRICES
    approved_until: int = 0
    draining: bool = False
    banned: bool = False
    challenged_at: int = 0
    challenged_block: int = 0
    answered_at: int = 0

    @property
    def status(self) -> ProviderStatus:
        if not self.pending_version:
            return ProviderStatus.NONE
        if self.banned:
            return ProviderStatus.BANNED
        if not self.version:
            return ProviderStatus.WAITING_APPROVAL
        return ProviderStatus.DRAINING if self.draining else ProviderStatus.ACTIVE


@dataclass
class Outcome:
    """Expected effects of a call."""

    moves: list[tuple[int, JobStatus, JobStatus]] = field(default_factory=list)
    skipped: list[tuple[int, JobStatus, str]] = field(default_factory=list)
    settled: list[tuple[int, money.Settlement]] = field(default_factory=list)
    collected: list[tuple[int, int, int, int]] = field(default_factory=list)
    answered: list[str] = field(default_factory=list)
    retried: list[tuple[int, int]] = field(default_factory=list)
    due: Counter[str] = field(default_factory=Counter)
    # Providers of the jobs that moved.
    movers: set[str] = field(default_factory=set)


def whole(hardware: Hardware) -> Offer:
    return Offer(
        hardware.nodes * hardware.cpus_per_node,
        hardware.nodes * hardware.mem_per_node,
        hardware.nodes * hardware.gpus_per_node,
    )
