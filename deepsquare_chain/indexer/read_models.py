"""Read models: the immutable rows that queries of the index return.

Amounts are credit-wei, gas prices are wei of the chain's native coin, times are chain time in
seconds. Names, labels and reasons are untrusted text; never treat them as markup.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from enum import Enum
from typing import (
    Annotated,
    Any,
    Final,
    Generic,
    TypeAlias,
    TypeVar,
    dataclass_transform,
    get_origin,
    get_type_hints,
)

from pydantic import GetCoreSchemaHandler, InstanceOf, PlainSerializer, WithJsonSchema
from pydantic_core import CoreSchema, core_schema

from deepsquare_chain import job
from deepsquare_chain.credits import format_credits, hourly

# -- types of read model fields: their units and their JSON representation
#
# An amount becomes two JSON members, such as `paid` in credit-wei and `paid_credits` in credits. Both
# are strings, because a JSON number can't represent them exactly. A rate also gets its price per
# hour. Enums are represented by their names, flags by a list of the names that are set.

_AS_TEXT: Final = PlainSerializer(str, return_type=str)


def _integer(unit: str) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", "pattern": "^-?[0-9]+$", "description": unit})


@dataclass(frozen=True, slots=True)
class Companion:
    """Annotation that adds a decimal JSON member, named like the field plus a suffix."""

    suffix: str
    show: Callable[[int], str]

    def field(self, name: str) -> core_schema.ComputedField:
        """Return the computed field for the field of this name."""
        shown = core_schema.plain_serializer_function_ser_schema(
            self.show, return_schema=core_schema.str_schema(pattern=r"^-?[0-9]+(\.[0-9]+)?$")
        )
        schema = core_schema.int_schema(serialization=shown)
        return core_schema.computed_field(name, schema, alias=f"{name}_{self.suffix}")


@dataclass(frozen=True, slots=True)
class Record:
    """Annotation that serialises a dataclass of `deepsquare_chain.job` with its properties.

    `member` replaces the type of all fields if the record does not declare their unit.
    """

    member: Any = None

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return _with_properties(source, handler, self.member)


@dataclass_transform(frozen_default=True)
class ReadModel:
    """Base of read models, which are frozen dataclasses.

    JSON includes fields, properties, and the companions of amounts.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        dataclass(frozen=True)(cls)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return _with_properties(source, handler)


def _with_properties(source: Any, handler: GetCoreSchemaHandler, member: Any = None) -> CoreSchema:
    schema = handler(source)
    model: Any = handler.resolve_ref_schema(schema)
    model["config"] = {**model.get("config", {}), "extra_fields_behavior": "forbid"}
    kind = get_origin(source) or source
    computed: list[core_schema.ComputedField] = []
    hints = get_type_hints(kind, include_extras=True)
    for dataclass_field in fields(kind):
        computed += _companions(dataclass_field.name, member or hints[dataclass_field.name])
    if member is not None:
        for field in model["schema"]["fields"]:
            field["schema"] = handler.generate_schema(member)
    for name, attribute in vars(kind).items():
        if isinstance(attribute, property) and attribute.fget is not None:
            hint = get_type_hints(attribute.fget, include_extras=True)["return"]
            computed.append(core_schema.computed_field(name, handler.generate_schema(hint)))
            computed += _companions(name, hint)
    model["schema"]["computed_fields"] = computed
    return schema


def _companions(name: str, hint: Any) -> list[core_schema.ComputedField]:
    notes = getattr(hint, "__metadata__", ())
    return [note.field(name) for note in notes if isinstance(note, Companion)]


def _integers_as_text(value: Any) -> Any:
    """Convert integers of event values to strings, because they may exceed a JSON number."""
    if isinstance(value, Mapping):
        return {key: _integers_as_text(member) for key, member in value.items()}
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value


def _names(kind: type[Enum]) -> dict[str, Any]:
    return {"type": "string", "enum": [member.name for member in kind]}


def _name_of(kind: type[Enum]) -> WithJsonSchema:
    return WithJsonSchema(_names(kind))


_BY_NAME: Final = PlainSerializer(lambda member: member.name)


def _by_status(value: Mapping[job.JobStatus, int]) -> dict[str, int]:
    return {status.name: count for status, count in value.items()}


#: Credit-wei.
Credits: TypeAlias = Annotated[
    int, _AS_TEXT, _integer("credit-wei"), Companion("credits", format_credits)
]
#: Credit-wei per second.
Rate: TypeAlias = Annotated[
    int, _AS_TEXT, _integer("credit-wei per second"), Companion("credits_per_hour", hourly)
]
#: Wei of the chain's native coin.
Coin: TypeAlias = Annotated[int, _AS_TEXT, _integer("wei of the chain's own coin")]
#: Units of gas.
Gas: TypeAlias = Annotated[int, _AS_TEXT, _integer("units of gas")]
#: Fields of an event by name.
Values: TypeAlias = Annotated[
    Mapping[str, Any], PlainSerializer(_integers_as_text), WithJsonSchema({"type": "object"})
]
JobStatus: TypeAlias = Annotated[InstanceOf[job.JobStatus], _BY_NAME, _name_of(job.JobStatus)]
JobFlags: TypeAlias = Annotated[
    InstanceOf[job.JobFlags],
    PlainSerializer(lambda flags: [flag.name for flag in flags]),
    WithJsonSchema({"type": "array", "items": _names(job.JobFlags)}),
]
Objective: TypeAlias = Annotated[InstanceOf[job.Objective], _BY_NAME, _name_of(job.Objective)]
ProviderStatus: TypeAlias = Annotated[
    InstanceOf[job.ProviderStatus], _BY_NAME, _name_of(job.ProviderStatus)
]
JobCounts: TypeAlias = Annotated[
    Mapping[job.JobStatus, int],
    PlainSerializer(_by_status),
    WithJsonSchema(
        {
            "type": "object",
            "additionalProperties": {"type": "integer"},
            "propertyNames": {"enum": [status.name for status in job.JobStatus]},
        }
    ),
]
Resources: TypeAlias = Annotated[job.Resources, Record()]
Hardware: TypeAlias = Annotated[job.Hardware, Record()]
Offer: TypeAlias = Annotated[job.Offer, Record()]
Load: TypeAlias = Annotated[job.Load, Record()]
Prices: TypeAlias = Annotated[job.Prices, Record(Rate)]


T = TypeVar("T")


class Page(ReadModel, Generic[T]):
    """A page of a list. `next` is the cursor of the following page, None at the end."""

    items: tuple[T, ...]
    next: str | None


class NumberedPage(Page[T]):
    """A page of a list with numbered pages, starting at 1. `total` is the number of all rows."""

    number: int
    pages: int
    total: int


class Place(ReadModel):
    """A position on the chain.

    A reorg can still undo it until it is `finalized`. `log_index` is the index of the log in its
    block, None for a whole transaction.
    """

    block: int
    time: int
    tx_hash: str
    log_index: int | None
    finalized: bool


class Status(ReadModel):
    """The progress of the index.

    `block` is the last indexed block; `block_hash` and `time` belong to it, and are empty and zero
    before the first. `finalized` is the last finalized block, `head` the highest block seen, and
    `head_time` its time. `change` increases with every change of the tables. `built_since` is the
    time at which the tables were created, in seconds since the epoch.
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


class Overview(ReadModel):
    """Summary of the grid at chain time `time`. CPUs are those of active providers.

    `donated` was sent to the scheduler contract without a job, and can't be recovered.
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


class JobRow(ReadModel):
    """A job in a list.

    `escrow` is the current escrow, zero once the job is final. `provider` is None while the job is
    not assigned. `paid`, `fee` and `billed_seconds` are totals of interim payments and the
    settlement. `changed` is the position of the last transition or interim payment.
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


class TransitionRow(ReadModel):
    """A transition of a job. `provider` is None if no provider was involved."""

    at: Place
    job_id: int
    before: JobStatus
    after: JobStatus
    customer: str
    provider: str | None


class MovementRow(ReadModel):
    """One line of a statement. `debit` or `credit` is zero; `balance` is the balance after it.

    `kind` is a value of `audit.entries.MovementKind`. If one transfer pays several jobs, each has
    its own line.
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
        """Signed change of the balance."""
        return self.credit - self.debit


class EventRow(ReadModel):
    """An event; `values` are its fields by name.

    Enums are represented by names, bytes as 0x-hexadecimal, structs as mappings, and integers as
    integers.
    """

    at: Place
    contract: str
    name: str
    job_id: int | None
    values: Values


class LineRow(ReadModel):
    """One job of a chain of retries. `carried` is the escrow that it passed to its successor."""

    id: int
    status: JobStatus
    provider: str | None
    carried: Credits


class ChallengeRow(ReadModel):
    """A provider's open challenge. The provider must answer by chain time `answer_by`."""

    at: Place
    job_id: int
    provider: str
    by: str
    answer_by: int


class JobDetail(ReadModel):
    """All details of a job.

    If `more_events`, then `events` are only the first ones; `Index.events` returns all in pages.
    `line` is its chain of retries from first to last, including the job. `challenge` is the open
    challenge of its provider. `payments` are its interim payments and its settlement, oldest first,
    limited to the first ones. The `collected_` fields are totals of all interim payments.
    `allotment` is the number of seconds after `billed_until`, zero until the job is assigned.
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
        """Chain time up to which interim payments billed the job; its start if there are none."""
        return self.row.started_at + self.collected_seconds

    @property
    def deadline(self) -> int:
        """Chain time at which a running job will have used its allotment; zero for other jobs."""
        running = self.row.status is job.JobStatus.RUNNING
        return self.billed_until + self.allotment if running else 0


class RoleRow(ReadModel):
    """A grant or revocation of a role. `contract` is Credit, ProviderRegistry or MetaScheduler."""

    at: Place
    contract: str
    role: str
    name: str
    account: str
    granted: bool
    by: str


class Roles(ReadModel):
    """Roles: `held` are the grants in force, `history` are all grants and revocations."""

    held: tuple[RoleRow, ...]
    history: tuple[RoleRow, ...]


class AccountRow(ReadModel):
    """An account. `alias` is its role in the grid (a contract's name, treasury), or empty.

    `jobs` and `jobs_live` count the jobs that it submitted, `movements` the lines of its statement.
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


class ProviderFigures(ReadModel):
    """Totals of a provider's work.

    `assigned`, `started` and `returned` (requeued) count events. The final statuses count jobs,
    whether or not they had started. `busy_seconds` are the billed seconds. `cpu_seconds` are the
    CPUs of running jobs times seconds, up to the last indexed block. `earned` excludes fees.
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
        """Number of jobs that ended with any final status."""
        return self.finished + self.failed + self.out_of_credits + self.cancelled + self.panicked

    @property
    def success_rate(self) -> float | None:
        """Share of jobs that ended without a panic; None if there are none.

        Failed jobs count as success, because a failing script is not the provider's fault.
        Cancelled jobs are excluded, because the customer decided to cancel them.
        """
        succeeded = self.finished + self.failed + self.out_of_credits
        return succeeded / (succeeded + self.panicked) if succeeded + self.panicked else None


class ProviderRow(ReadModel):
    """The current state of a provider.

    `id` is None before its first approval. `answer_by` is zero if there is no open challenge.
    `load` is the part of its offer that its live assigned jobs occupy.
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


class ProviderChange(ReadModel):
    """A change of a provider.

    `kind` is registered, hardware, approved, offer, prices, labels, draining, ban, challenged or
    answered. `values` are encoded as in `EventRow`.
    """

    at: Place
    kind: str
    values: Values


class ProviderDetail(ReadModel):
    """A provider with its latest changes. `Index.provider_history` returns all changes in pages."""

    row: ProviderRow
    history: tuple[ProviderChange, ...]
    more_history: bool
    challenge: ChallengeRow | None


class TransactionRow(ReadModel):
    """A transaction that emitted events of this grid.

    `to` is None if it created a contract. `contract` is the name of the grid's contract that it
    called, or empty. `method` is the name of the called function, or empty if it is unknown.
    `gas_price` is the price that was paid.
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


class ForwardedRow(ReadModel):
    """A customer's signed request that a relayer submitted to the forwarder.

    `contract` is the name of the grid's contract that it calls, or empty. `ok` is false if it
    failed or was skipped.
    """

    signer: str
    to: str
    contract: str
    method: str
    ok: bool


class TransactionDetail(ReadModel):
    """A transaction with its input (0x-hexadecimal), events, and movements of credits.

    `forwarded` are its signed requests, if the transaction calls the forwarder.
    """

    row: TransactionRow
    nonce: int
    value: Coin
    input: str
    forwarded: tuple[ForwardedRow, ...]
    events: tuple[EventRow, ...]
    more_events: bool
    movements: tuple[MovementRow, ...]


class BlockRow(ReadModel):
    """A block with events of this grid. `transactions` counts the transactions with such events."""

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


class BlockDetail(ReadModel):
    """A block with its transactions, only the first ones if `more_transactions`."""

    row: BlockRow
    transactions: tuple[TransactionRow, ...]
    more_transactions: bool


class SettlementRow(ReadModel):
    """A settlement or an interim payment of a job.

    `status` is the status of the job at that time: RUNNING for an interim payment.
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
        """Whether this is an interim payment."""
        return self.status is job.JobStatus.RUNNING


class AnomalyRow(ReadModel):
    """An anomaly (allowed but unusual), by the rules of `audit verify`.

    `code` is its kind. `subject` is jobs, providers, credits or administration. `severity` is
    notice or warning. Conditions that are open at the last indexed block have no transaction.
    """

    at: Place
    code: str
    subject: str
    severity: str
    job_id: int | None
    account: str | None
    message: str


class OpenAnomalies(ReadModel):
    """Open conditions that no transaction caused. `more` is true if only the first are included."""

    items: tuple[AnomalyRow, ...]
    more: bool


class ParameterRow(ReadModel):
    """A value of a parameter. `since` is None if the deployment fixed it permanently."""

    name: str
    value: str
    since: Place | None


class ParameterHistory(ReadModel):
    """All current parameters, and the changes of those that can change, latest first."""

    now: tuple[ParameterRow, ...]
    history: tuple[ParameterRow, ...]


class Hit(ReadModel):
    """A search result.

    `kind` is job, account, provider, transaction or block. `key` is the argument for the query
    method of that kind.
    """

    kind: str
    key: str
    text: str


class StatusPoint(ReadModel):
    """Number of jobs by status at a time."""

    time: int
    jobs: JobCounts


class EscrowPoint(ReadModel):
    """Totals of credits at a time."""

    time: int
    escrow: Credits
    parked: Credits
    supply: Credits
    paid: Credits
    fees: Credits


class UsePoint(ReadModel):
    """CPU-seconds that a provider used and offered in the interval that ends at `time`."""

    time: int
    cpu_seconds: int
    offered_seconds: int

    @property
    def share(self) -> float:
        """Used share of the offered CPU-seconds; zero if none were offered."""
        return self.cpu_seconds / self.offered_seconds if self.offered_seconds else 0.0


class Utilisation(ReadModel):
    """Utilisation of one provider over time."""

    account: str
    points: tuple[UsePoint, ...]


class Change(ReadModel):
    """A change of the index, after which pages may show different data.

    `kind` is blocks (new blocks), reorg (blocks from `first_block` on were undone), finality
    (blocks up to `last_block` are final) or rebuilt (the index was deleted). `jobs` are the changed
    jobs, at most the hundred latest.
    """

    number: int
    kind: str
    first_block: int
    last_block: int
    jobs: tuple[int, ...]


class Changes(ReadModel):
    """Changes after a given number, oldest first.

    If `missed`, some changes are no longer kept, and the client should reload the page. `latest` is
    the number to pass in the next request.
    """

    latest: int
    items: tuple[Change, ...]
    missed: bool
