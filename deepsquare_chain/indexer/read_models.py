"""What the index answers: frozen rows in the grid's vocabulary.

Amounts are credit-wei, gas prices wei of the chain's own coin, times seconds of chain time.
Names, labels and reasons are texts of strangers: data, never markup.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from deepsquare_chain import job
from deepsquare_chain.indexer.units import (
    Coin,
    Credits,
    Gas,
    Hardware,
    JobCounts,
    JobFlags,
    JobStatus,
    Load,
    Objective,
    Offer,
    Prices,
    ProviderStatus,
    Rate,
    ReadModel,
    Resources,
    Values,
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Page(ReadModel, Generic[T]):
    """Some rows of a list; `next` is the cursor of those that follow, None at the end."""

    items: tuple[T, ...]
    next: str | None


@dataclass(frozen=True, slots=True)
class NumberedPage(Page[T]):
    """Some rows of a list whose pages have numbers, from 1 on; `total` counts the rows of all."""

    number: int
    pages: int
    total: int


@dataclass(frozen=True, slots=True)
class Place(ReadModel):
    """Where on the chain something stands.

    Until `finalized` a reorganisation can still undo it. `log_index` is that of the log in its
    block, None where a whole transaction is meant.
    """

    block: int
    time: int
    tx_hash: str
    log_index: int | None
    finalized: bool


@dataclass(frozen=True, slots=True)
class Status(ReadModel):
    """How far the index is.

    `block` is the last one whose effects are in the tables (`block_hash` and `time` are its own,
    empty and zero before the first), `finalized` the last one that the chain calls final, `head`
    the highest that was seen and `head_time` its time. `change` grows with every change of the
    tables. `built_since` is when these tables were begun, in seconds since the epoch.
    """

    chain_id: int
    scheduler: str
    registry: str
    credit: str
    treasury: str
    genesis: str
    start_block: int
    block: int
    block_hash: str
    time: int
    finalized: int
    head: int
    head_time: int
    change: int
    built_since: float

    @property
    def lag(self) -> int:
        """Blocks between the head and the index."""
        return max(0, self.head - self.block)


@dataclass(frozen=True, slots=True)
class Overview(ReadModel):
    """The grid at a glance, at chain time `time`; cpus are those of providers in good standing.

    `donated` is what was given to the scheduler's contract without a job: nobody's any more.
    """

    block: int
    time: int
    jobs: JobCounts
    jobs_total: int
    submitted_last_hour: int
    ended_last_hour: int
    providers: int
    providers_active: int
    cpus_offered: int
    cpus_busy: int
    supply: Credits
    minted: Credits
    burned: Credits
    escrow: Credits
    parked: Credits
    donated: Credits
    paid: Credits
    fees: Credits
    refunded: Credits


@dataclass(frozen=True, slots=True)
class JobRow(ReadModel):
    """A job in a list.

    `escrow` is what is held now, zero once it is final; `provider` is None while nobody has it;
    `paid`, `fee` and `billed_seconds` are sums over interim payments and the settlement; `changed`
    is the place of its last transition or interim payment.
    """

    id: int
    name: str
    customer: str
    provider: str | None
    status: JobStatus
    resources: Resources
    time_limit: int
    flags: JobFlags
    objective: Objective
    rate: Rate
    funded: Credits
    escrow: Credits
    paid: Credits
    fee: Credits
    refunded: Credits
    billed_seconds: int
    submitted_at: int
    started_at: int
    ended_at: int
    retry_of: int | None
    successor: int | None
    changed: Place


@dataclass(frozen=True, slots=True)
class TransitionRow(ReadModel):
    """A status change; `provider` is None where no provider was involved."""

    at: Place
    job_id: int
    before: JobStatus
    after: JobStatus
    customer: str
    provider: str | None


@dataclass(frozen=True, slots=True)
class MovementRow(ReadModel):
    """One line of a statement: of `debit` and `credit` one is zero; `balance` is after it.

    `kind` is one of `audit.entries.Kind`; several jobs that are paid in one transfer have a line
    each.
    """

    at: Place
    account: str
    kind: str
    job_id: int | None
    counterparty: str
    debit: Credits
    credit: Credits
    balance: Credits

    @property
    def amount(self) -> Credits:
        """Signed: what the balance changed by."""
        return self.credit - self.debit


@dataclass(frozen=True, slots=True)
class EventRow(ReadModel):
    """An event: `values` are its fields by name.

    Enums stand as names, bytes as 0x-hexadecimal, structs as mappings, integers as integers.
    """

    at: Place
    contract: str
    name: str
    job_id: int | None
    values: Values


@dataclass(frozen=True, slots=True)
class LineRow(ReadModel):
    """One job of a line of retries; `carried` is the escrow that it passed on."""

    id: int
    status: JobStatus
    provider: str | None
    carried: Credits


@dataclass(frozen=True, slots=True)
class ChallengeRow(ReadModel):
    """A provider's open challenge: it is silent when `answer_by` passes without an answer."""

    at: Place
    job_id: int
    provider: str
    by: str
    answer_by: int


@dataclass(frozen=True, slots=True)
class JobDetail(ReadModel):
    """Everything about a job.

    `events` are the first ones only where `more_events`; `Index.events` pages through all.
    `line` is its line of retries from the first to the last, itself included. `challenge` is the
    open one of its provider. `payments` are its interim payments and its settlement, oldest first,
    the first ones where there are many; the `collected_` sums are those of all interim payments.
    `allotment` is in seconds from `billed_until` on, zero until the job is assigned.
    """

    row: JobRow
    definition: str
    uses: str
    fee_bps: int
    retries_left: int
    carried_in: Credits
    carried_out: Credits
    collected_paid: Credits
    collected_fee: Credits
    collected_seconds: int
    allotment: int
    exit_code: int | None
    result: str
    reason: str
    transitions: tuple[TransitionRow, ...]
    payments: tuple[SettlementRow, ...]
    movements: tuple[MovementRow, ...]
    events: tuple[EventRow, ...]
    more_events: bool
    line: tuple[LineRow, ...]
    challenge: ChallengeRow | None

    @property
    def billed_until(self) -> int:
        """Chain time up to which interim payments bill it; its start where there is none."""
        return self.row.started_at + self.collected_seconds

    @property
    def deadline(self) -> int:
        """Chain time at which a running job has used its allotment, else zero."""
        running = self.row.status is job.JobStatus.RUNNING
        return self.billed_until + self.allotment if running else 0


@dataclass(frozen=True, slots=True)
class RoleRow(ReadModel):
    """A grant or a loss of a role; `contract` is Credit, ProviderRegistry or MetaScheduler."""

    at: Place
    contract: str
    role: str
    name: str
    account: str
    granted: bool
    by: str


@dataclass(frozen=True, slots=True)
class Roles(ReadModel):
    """Who holds what now, by the grant that gave it, and everything that led there."""

    held: tuple[RoleRow, ...]
    history: tuple[RoleRow, ...]


@dataclass(frozen=True, slots=True)
class AccountRow(ReadModel):
    """An account: `alias` is what it is to this grid (a contract's name, treasury), or empty.

    `jobs` and `jobs_live` count those that it submitted, `movements` the lines of its statement.
    """

    address: str
    alias: str
    balance: Credits
    parked: Credits
    jobs: int
    jobs_live: int
    movements: int
    provider_id: int | None
    roles: tuple[RoleRow, ...]


@dataclass(frozen=True, slots=True)
class ProviderFigures(ReadModel):
    """What a provider did with what it was given.

    `assigned`, `started` and `returned` (requeued) count events, the endings count jobs that had
    started or not. `busy_seconds` is what was billed, `cpu_seconds` the running jobs' cpus times
    seconds up to the index's last block; `earned` is without fees.
    """

    assigned: int
    started: int
    returned: int
    finished: int
    failed: int
    out_of_credits: int
    cancelled: int
    panicked: int
    live: int
    running: int
    cpus_busy: int
    gpus_busy: int
    earned: Credits
    busy_seconds: int
    cpu_seconds: int

    @property
    def ended(self) -> int:
        """Jobs that ended, in whatever way."""
        return self.finished + self.failed + self.out_of_credits + self.cancelled + self.panicked

    @property
    def success_rate(self) -> float | None:
        """Share of jobs that ended by themselves among those that it should have ended.

        A script that fails is no fault of the provider; cancellation is the customer's will.
        None before the first end.
        """
        good = self.finished + self.failed + self.out_of_credits
        return good / (good + self.panicked) if good + self.panicked else None


@dataclass(frozen=True, slots=True)
class ProviderRow(ReadModel):
    """A provider now; `id` is None before its first approval; `answer_by` zero unchallenged.

    `load` is what its live assigned jobs occupy of its offer.
    """

    account: str
    id: int | None
    status: ProviderStatus
    active: bool
    hardware: Hardware
    offer: Offer
    load: Load
    prices: Prices
    labels: Mapping[str, str]
    version: int
    pending_version: int
    approved_until: int
    answer_by: int
    figures: ProviderFigures


@dataclass(frozen=True, slots=True)
class ProviderChange(ReadModel):
    """One change: `kind` is registered, hardware, approved, offer, prices, labels, draining, ban,
    challenged or answered; `values` as in `EventRow`."""

    at: Place
    kind: str
    values: Values


@dataclass(frozen=True, slots=True)
class ProviderDetail(ReadModel):
    """A provider with its history, latest first; `Index.provider_history` pages through all."""

    row: ProviderRow
    history: tuple[ProviderChange, ...]
    more_history: bool
    challenge: ChallengeRow | None


@dataclass(frozen=True, slots=True)
class TransactionRow(ReadModel):
    """A transaction that made events of this grid.

    `to` is None where it created a contract; `contract` is the name of ours that it called, or
    empty; `method` the function's name where it is one of ours. `gas_price` is what was paid.
    """

    at: Place
    position: int
    sender: str
    to: str | None
    contract: str
    selector: str
    method: str
    ok: bool
    gas_used: int
    gas_price: Coin
    events: int


@dataclass(frozen=True, slots=True)
class ForwardedRow(ReadModel):
    """A customer's signed request that a relayer handed to the forwarder.

    `contract` is the name of ours that it calls, or empty; `ok` is false where it was refused or
    left out.
    """

    signer: str
    to: str
    contract: str
    method: str
    ok: bool


@dataclass(frozen=True, slots=True)
class TransactionDetail(ReadModel):
    """The same with its input (0x-hexadecimal), events, and the movements that they made.

    `forwarded` are the signed requests in it, where it is one to the forwarder.
    """

    row: TransactionRow
    nonce: int
    value: Coin
    input: str
    forwarded: tuple[ForwardedRow, ...]
    events: tuple[EventRow, ...]
    more_events: bool
    movements: tuple[MovementRow, ...]


@dataclass(frozen=True, slots=True)
class BlockRow(ReadModel):
    """A block with events of this grid; `transactions` counts those with such events."""

    number: int
    hash: str
    parent: str
    time: int
    gas_used: int
    gas_limit: Gas
    base_fee: Coin
    all_transactions: int
    transactions: int
    finalized: bool


@dataclass(frozen=True, slots=True)
class BlockDetail(ReadModel):
    """A block with its transactions, the first ones where `more_transactions`."""

    row: BlockRow
    transactions: tuple[TransactionRow, ...]
    more_transactions: bool


@dataclass(frozen=True, slots=True)
class SettlementRow(ReadModel):
    """How a job's escrow was divided: at its end, or in part by an interim payment.

    `status` is the one that the job then had, so RUNNING for an interim payment.
    """

    at: Place
    job_id: int
    name: str
    status: JobStatus
    customer: str
    provider: str | None
    billed_seconds: int
    paid: Credits
    fee: Credits
    refunded: Credits

    @property
    def interim(self) -> bool:
        """Whether the job went on afterwards."""
        return self.status is job.JobStatus.RUNNING


@dataclass(frozen=True, slots=True)
class AnomalyRow(ReadModel):
    """Something lawful that is worth a look, by the rules of `audit verify`.

    `code` is its kind and `subject` what it is about: jobs, providers, credits or administration;
    `severity` is notice or warning. What stands open at the index's block has no transaction.
    """

    at: Place
    code: str
    subject: str
    severity: str
    job_id: int | None
    account: str | None
    message: str


@dataclass(frozen=True, slots=True)
class OpenAnomalies(ReadModel):
    """What stands open now without anybody having acted; `more` where only the first are here."""

    items: tuple[AnomalyRow, ...]
    more: bool


@dataclass(frozen=True, slots=True)
class ParameterRow(ReadModel):
    """A parameter in force; `since` is None where the deployment fixed it for good."""

    name: str
    value: str
    since: Place | None


@dataclass(frozen=True, slots=True)
class ParameterHistory(ReadModel):
    """All parameters now, and how those that can change came there, latest first."""

    now: tuple[ParameterRow, ...]
    history: tuple[ParameterRow, ...]


@dataclass(frozen=True, slots=True)
class Hit(ReadModel):
    """Something that a search found: `kind` is job, account, provider, transaction or block;
    `key` is what the methods of those take."""

    kind: str
    key: str
    text: str


@dataclass(frozen=True, slots=True)
class StatusPoint(ReadModel):
    """Jobs by status at a time."""

    time: int
    jobs: JobCounts


@dataclass(frozen=True, slots=True)
class EscrowPoint(ReadModel):
    """Where credits were at a time."""

    time: int
    escrow: Credits
    parked: Credits
    supply: Credits
    paid: Credits
    fees: Credits


@dataclass(frozen=True, slots=True)
class UsePoint(ReadModel):
    """Of one provider in the time up to `time`: cpu-seconds used and offered."""

    time: int
    cpu_seconds: int
    offered_seconds: int

    @property
    def share(self) -> float:
        """Used of offered; zero where nothing was offered."""
        return self.cpu_seconds / self.offered_seconds if self.offered_seconds else 0.0


@dataclass(frozen=True, slots=True)
class Utilisation(ReadModel):
    """Use over time of one provider."""

    account: str
    points: tuple[UsePoint, ...]


@dataclass(frozen=True, slots=True)
class Change(ReadModel):
    """Why pages may look different now.

    `kind` is blocks (new ones), reorg (blocks from `first_block` on did not happen), finality
    (blocks up to `last_block` are final) or rebuilt (forget everything). `jobs` are those that
    moved, the latest hundred where there are more.
    """

    number: int
    kind: str
    first_block: int
    last_block: int
    jobs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Changes(ReadModel):
    """Changes after a number, oldest first.

    With `missed` some are no longer kept, and a page should be read anew. `latest` is the number
    to ask with the next time.
    """

    latest: int
    items: tuple[Change, ...]
    missed: bool
