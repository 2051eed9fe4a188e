"""Records that a replay of events produces. Pure. Amounts are credit-wei, times are seconds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, Final, TypeVar, cast

from deepsquare_chain.credits import allotment
from deepsquare_chain.job import (
    NO_LOAD,
    Hardware,
    Job,
    JobFlags,
    JobStatus,
    Load,
    Offer,
    Prices,
    Provider,
    ProviderStatus,
    Terms,
)

T = TypeVar("T")

ZERO_ADDRESS: Final = "0x" + "00" * 20
ZERO_HARDWARE: Final = Hardware(0, 0, 0, 0)
#: Minimum grace period in seconds in which a provider may report, in any deployment.
MIN_REPORT_GRACE: Final = 3_600
#: Minimum seconds between two interim payments in any deployment.
MIN_COLLECT_INTERVAL: Final = 5


@dataclass(frozen=True, slots=True)
class AuditFinding:
    """Something that the contracts would not have done.

    `tx_hash` is empty and `job_id` is zero if none applies.
    """

    code: str
    message: str
    block: int
    tx_hash: str = ""
    job_id: int = 0

    def __str__(self) -> str:
        location = f" (block {self.block}, transaction {self.tx_hash})" if self.tx_hash else ""
        return f"{self.message}{location}"


def from_attributes(kind: type[T], source: object, /, **values: Any) -> T:
    """Return a dataclass whose fields are `values`, or attributes of `source` of the same name."""
    names = (field.name for field in fields(cast("Any", kind)) if field.name not in values)
    return kind(**values, **{name: getattr(source, name) for name in names})


class MovementKind(StrEnum):
    """The reason for a movement of credits."""

    MINT = "mint"
    BURN = "burn"
    ESCROW = "escrow"
    TOP_UP = "top-up"
    REFUND = "refund"
    PAYMENT = "payment"
    INTERIM = "interim-payment"
    FEE = "fee"
    PARKED = "parked"
    WITHDRAWAL = "withdrawal"
    TRANSFER = "transfer"


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """One movement of one account. `amount` is signed; `job_id` is zero if no job is involved.

    `log_index` belongs to the event that caused the movement: one transfer may pay several jobs.
    """

    account: str
    block: int
    time: int
    kind: MovementKind
    amount: int
    job_id: int
    counterparty: str
    tx_hash: str
    log_index: int


@dataclass(frozen=True, slots=True)
class StatementRow(LedgerEntry):
    """A ledger entry with the account's balance after it."""

    balance: int


#: Columns of a statement in the command, in exports and in the explorer's CSV.
STATEMENT_COLUMNS: Final = (
    *("block", "time", "kind", "job_id", "job_name", "debit", "credit", "balance"),
    *("counterparty", "transaction", "log_index"),
)


def statement_cells(row: StatementRow, job_name: str) -> tuple[Any, ...]:
    """Return the values of `STATEMENT_COLUMNS`; None if there is no value."""
    debit, credit = max(-row.amount, 0), max(row.amount, 0)
    return (
        *(row.block, row.time, row.kind.value, row.job_id or None, job_name or None),
        *(debit or None, credit or None, row.balance),
        *(row.counterparty or None, row.tx_hash, row.log_index),
    )


@dataclass(slots=True)
class JobEntry:
    """The state of a job, as derived from its events.

    While the job is live, funded + carried_in = escrow + paid + fee. Once it is final,
    funded + carried_in = paid + fee + refunded + carried_out, and escrow is zero. `paid`, `fee` and
    `billed_seconds` are totals of interim payments and the settlement; the `collected_` fields are
    totals of interim payments only. `since` is the time of the last transition or interim payment.
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
    collected_paid: int = 0
    collected_fee: int = 0
    collected_seconds: int = 0
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
        """Name given by the customer; untrusted text."""
        return self.terms.name

    @property
    def billed_until(self) -> int:
        """Chain time up to which interim payments billed the run; its start if there are none."""
        return self.started_at + self.collected_seconds

    @property
    def allotment(self) -> int:
        """Seconds that the job may run after `billed_until`; zero until it is assigned."""
        return allotment(self.time_limit, self.terms.until_spent, self.last_escrow, self.rate)

    @property
    def collected(self) -> int:
        """Total of interim payments and their fees, in credit-wei."""
        return self.collected_paid + self.collected_fee

    @property
    def last_escrow(self) -> int:
        """Escrow in credit-wei after interim payments, but before the settlement."""
        return self.funded + self.carried_in - self.collected

    @property
    def difference(self) -> int:
        """Inflow minus escrow and outflow, in credit-wei; nonzero if the ledger is unbalanced."""
        out = self.paid + self.fee + self.refunded + self.carried_out
        return self.funded + self.carried_in - self.escrow - out

    def record(self, provider_ids: Mapping[str, int]) -> Job:
        """Return the record that the contract must store if the events are correct."""
        consumed = self.paid + self.fee - self.collected
        return from_attributes(
            Job,
            self,
            provider_id=provider_ids.get(self.provider, 0),
            resources=self.terms.resources,
            flags=self.terms.flags | (JobFlags.SUCCESSOR if self.retry_of else JobFlags.NONE),
            escrow=consumed if self.status.is_final else self.escrow,
        )


@dataclass(slots=True)
class ProviderEntry:
    """The state of a provider, as derived from its events.

    `challenged_at` and `answer_by` are zero while no challenge is open. `load` is the resources of
    its live assigned jobs.
    """

    id: int
    account: str
    hardware: Hardware = ZERO_HARDWARE
    offer: Offer = field(default_factory=lambda: Offer(0, 0, 0))
    prices: Prices = field(default_factory=lambda: Prices(0, 0, 0))
    labels: Mapping[str, str] = field(default_factory=dict)
    version: int = 0
    pending_version: int = 0
    pending_hardware: Hardware = ZERO_HARDWARE
    approved_until: int = 0
    draining: bool = False
    banned: bool = False
    challenged_at: int = 0
    answer_by: int = 0
    load: Load = NO_LOAD

    @property
    def status(self) -> ProviderStatus:
        """Status, as defined by the registry."""
        if self.banned:
            return ProviderStatus.BANNED
        if self.version == 0:
            return ProviderStatus.WAITING_APPROVAL
        return ProviderStatus.DRAINING if self.draining else ProviderStatus.ACTIVE

    def record(self) -> Provider:
        """Return the record that the registry must store if the events are correct."""
        return from_attributes(Provider, self)

    def is_gone(self, now: int, lost_timeout: int) -> bool:
        """Return whether the provider's runs count as lost, judged by time only.

        The contract also counts blocks. On a rollup, its block numbers differ from those of the
        events, so they are not checked here.

        Args:
            now: Chain time in seconds.
            lost_timeout: Lost timeout of the deployment in seconds. Zero if unknown; then the
                response timeout applies, which is never longer.
        """
        return self.answer_by != 0 and now > max(self.answer_by, self.challenged_at + lost_timeout)


@dataclass(frozen=True, slots=True)
class Totals:
    """The totals of a ledger, in credit-wei except for `jobs`.

    `donated` was sent to the scheduler without a job. `balances` is the sum over all accounts.
    `difference` is the part of the scheduler's balance that has no owner; it must be zero.
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


# -- the transaction being replayed: its position, the payments it owes, and its findings


@dataclass(slots=True)
class TransactionContext:
    """The context of one transaction, or of the end of a replay, which has no hash.

    Attributes:
        owed_in: Credit-wei that each account must pay to the scheduler. At the end of the
            transaction, `owed_in` and `owed_out` are matched with the token's transfers.
        owed_out: Credit-wei that the scheduler must pay to each account.
        ended: Jobs that became final but were not yet settled or succeeded by a retry.
        awaited: Events that must still follow a transition: job ID and event name.
        unanswered: Providers that moved a job (the value) while a challenge was open, which
            must answer the challenge.
        previous_providers: Former providers of jobs that returned to PENDING, by job.
        log_index: Index of the event that is applied.
        job_id: Its job, zero if none applies; findings and entries belong to it.
    """

    block: int
    time: int
    tx_hash: str = ""
    findings: list[AuditFinding] = field(default_factory=list)
    entries: list[LedgerEntry] = field(default_factory=list)
    owed_in: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    owed_out: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    ended: dict[int, int] = field(default_factory=dict)
    awaited: set[tuple[int, str]] = field(default_factory=set)
    unanswered: dict[str, int] = field(default_factory=dict)
    previous_providers: dict[int, str] = field(default_factory=dict)
    log_index: int = 0
    job_id: int = 0

    def report(self, code: str, message: str, job_id: int | None = None) -> None:
        """Record a finding of the current job, or of another one."""
        job_id = self.job_id if job_id is None else job_id
        self.findings.append(AuditFinding(code, message, self.block, self.tx_hash, job_id))

    def check(self, holds: bool, code: str, message: str, job_id: int | None = None) -> None:
        """Record a finding unless `holds` is true."""
        if not holds:
            self.report(code, message, job_id)

    def add_entry(self, account: str, kind: MovementKind, amount: int, counterparty: str) -> None:
        """Record a movement of an account. An amount of zero is not recorded."""
        if amount:
            position = (self.tx_hash, self.log_index)
            values = (kind, amount, self.job_id, counterparty, *position)
            self.entries.append(LedgerEntry(account, self.block, self.time, *values))
