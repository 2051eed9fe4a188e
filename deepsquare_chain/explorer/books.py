"""What a replay of events writes down. Amounts are credit-wei, times seconds of chain time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from deepsquare_chain.credits import allotment
from deepsquare_chain.job import (
    Hardware,
    Job,
    JobFlags,
    JobStatus,
    Offer,
    Prices,
    Provider,
    ProviderStatus,
    Terms,
)

ZERO_ADDRESS: Final = "0x" + "00" * 20
ZERO_HARDWARE: Final = Hardware(0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that the contracts would not have done; `job_id` is zero where no job is meant."""

    code: str
    message: str
    block: int
    tx_hash: str
    job_id: int = 0

    def __str__(self) -> str:
        place = f" (block {self.block}, transaction {self.tx_hash})" if self.tx_hash else ""
        return f"{self.message}{place}"


class Kind(StrEnum):
    """Why a balance moved."""

    MINT = "mint"
    BURN = "burn"
    ESCROW = "escrow"
    TOP_UP = "top-up"
    REFUND = "refund"
    PAYMENT = "payment"
    FEE = "fee"
    PARKED = "parked"
    WITHDRAWAL = "withdrawal"
    TRANSFER = "transfer"


@dataclass(frozen=True, slots=True)
class Entry:
    """One movement of one account; `amount` is signed, `job_id` zero where no job is meant.

    `log_index` is that of the event that caused it: one transfer may pay several jobs.
    """

    account: str
    block: int
    time: int
    kind: Kind
    amount: int
    job_id: int
    counterparty: str
    tx_hash: str
    log_index: int


@dataclass(frozen=True, slots=True)
class StatementRow:
    """An entry with the account's balance after it."""

    block: int
    time: int
    kind: Kind
    amount: int
    job_id: int
    counterparty: str
    tx_hash: str
    balance: int
    log_index: int


@dataclass(slots=True)
class JobEntry:
    """A job as its events tell it.

    While the job is live, funded + carried_in = escrow; once it is final,
    funded + carried_in = paid + fee + refunded + carried_out, and escrow is zero.
    """

    id: int
    customer: str
    definition: bytes
    terms: Terms
    status: JobStatus = JobStatus.NONE
    provider: str = ZERO_ADDRESS
    since: int = 0
    rate: int = 0
    fee_bps: int = 0
    escrow: int = 0
    time_limit: int = 0
    retries_left: int = 0
    funded: int = 0
    carried_in: int = 0
    carried_out: int = 0
    paid: int = 0
    fee: int = 0
    refunded: int = 0
    billed_seconds: int = 0
    settled: bool = False
    submitted_at: int = 0
    started_at: int = 0
    ended_at: int = 0
    exit_code: int | None = None
    result: bytes = b""
    reason: str = ""
    retry_of: int = 0
    successor: int = 0
    transitions: list[tuple[int, JobStatus, str]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Name that the customer gave, data of a stranger."""
        return self.terms.name

    @property
    def allotment(self) -> int:
        """Seconds that it may run; zero until it is assigned."""
        return allotment(self.time_limit, self.terms.until_spent, self.escrow, self.rate)

    @property
    def difference(self) -> int:
        """What came in minus what is held or went out: zero, or the books do not add up."""
        out = self.paid + self.fee + self.refunded + self.carried_out
        return self.funded + self.carried_in - self.escrow - out

    def record(self, provider_ids: Mapping[str, int]) -> Job:
        """The record that the contract must hold, if the events are true."""
        final = self.status.is_final
        return Job(
            id=self.id,
            customer=self.customer,
            status=self.status,
            since=self.since,
            provider_id=provider_ids.get(self.provider, 0),
            resources=self.terms.resources,
            retries_left=self.retries_left,
            flags=self.terms.flags | (JobFlags.SUCCESSOR if self.retry_of else JobFlags.NONE),
            escrow=self.paid + self.fee if final else self.escrow,
            rate=self.rate,
            time_limit=self.time_limit,
            fee_bps=self.fee_bps,
            definition=self.definition,
            retry_of=self.retry_of,
        )


@dataclass(slots=True)
class ProviderEntry:
    """A provider as its events tell it; `answer_by` is zero while no challenge is open."""

    id: int
    account: str
    hardware: Hardware = ZERO_HARDWARE
    offer: Offer = field(default_factory=lambda: Offer(0, 0, 0))
    prices: Prices = field(default_factory=lambda: Prices(0, 0, 0))
    labels: Mapping[str, str] = field(default_factory=dict)
    version: int = 0
    pending_version: int = 0
    approved_until: int = 0
    draining: bool = False
    banned: bool = False
    answer_by: int = 0

    @property
    def status(self) -> ProviderStatus:
        """Standing, as the registry names it."""
        if self.banned:
            return ProviderStatus.BANNED
        if self.version == 0:
            return ProviderStatus.WAITING_APPROVAL
        return ProviderStatus.DRAINING if self.draining else ProviderStatus.ACTIVE

    def record(self) -> Provider:
        """The record that the registry must hold, if the events are true."""
        return Provider(
            id=self.id,
            account=self.account,
            status=self.status,
            approved_until=self.approved_until,
            version=self.version,
            pending_version=self.pending_version,
            hardware=self.hardware,
            offer=self.offer,
            prices=self.prices,
            labels=self.labels,
        )

    def overdue_answer(self, now: int) -> bool:
        """Whether it left a challenge unanswered for too long, as far as time alone tells."""
        return self.answer_by != 0 and now > self.answer_by


@dataclass(frozen=True, slots=True)
class Totals:
    """The sums of a ledger; `difference` is what the scheduler holds without an owner: zero.

    `donated` went to the scheduler for no job, `balances` is the sum over all accounts.
    """

    jobs: int
    minted: int
    burned: int
    supply: int
    scheduler_balance: int
    escrow: int
    parked: int
    donated: int
    balances: int
    paid: int
    fees: int
    refunded: int
    difference: int
