"""The projection: turns the events of a batch of blocks into table rows.

It uses the same ledgers as the audit, but ignores their findings: the index shows the events as
emitted, and only the audit judges them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from sqlalchemy import Table

from deepsquare_chain.audit.anomalies import Anomaly, AnomalyRules, name_self_scheduled
from deepsquare_chain.audit.entries import JobEntry, LedgerEntry, ProviderEntry, TransactionContext
from deepsquare_chain.audit.ledger import GridLedgers
from deepsquare_chain.chain.bindings import events as ev
from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.indexer import schema
from deepsquare_chain.indexer.block_data import FORWARDER, BlockData, Transaction, methods
from deepsquare_chain.indexer.queries import CHANGE_KINDS, anomaly_values
from deepsquare_chain.indexer.records import LogPosition, account_or_none, event_values, row_values
from deepsquare_chain.job import JobStatus, Resources

# -- running totals of a provider, updated with each event


@dataclass(slots=True)
class ProviderTotals:
    """Totals of a provider up to `time`: a row of `provider_figures`.

    `cpu_seconds` are the used CPU-seconds, `offered_seconds` the offered ones. The `_assigned`
    fields are its load on chain (memory in MB), the `_busy` fields the part used by running jobs.
    """

    time: int = 0
    assigned: int = 0
    started: int = 0
    returned: int = 0
    finished: int = 0
    failed: int = 0
    out_of_credits: int = 0
    cancelled: int = 0
    panicked: int = 0
    live: int = 0
    running: int = 0
    cpus_busy: int = 0
    gpus_busy: int = 0
    cpus_offered: int = 0
    cpus_assigned: int = 0
    memory_assigned: int = 0
    gpus_assigned: int = 0
    busy_seconds: int = 0
    earned: int = 0
    cpu_seconds: int = 0
    offered_seconds: int = 0

    def advance(self, now: int) -> None:
        """Add the CPU-seconds that were used and offered since the last update."""
        self.cpu_seconds += self.cpus_busy * (now - self.time)
        self.offered_seconds += self.cpus_offered * (now - self.time)
        self.time = now

    def move(self, before: JobStatus, after: JobStatus, resources: Resources) -> None:
        """Apply a transition of one of its jobs."""
        if after is JobStatus.META_SCHEDULED:
            self.assigned += 1
            self._load(1, resources)
        elif before.is_assigned and not after.is_assigned:
            self._load(-1, resources)
        if JobStatus.RUNNING in {before, after}:
            sign = 1 if after is JobStatus.RUNNING else -1
            self.running += sign
            self.cpus_busy += sign * resources.cpus
            self.gpus_busy += sign * resources.gpus
        if after is JobStatus.RUNNING:
            self.started += 1
        elif after is JobStatus.PENDING:
            self.returned += 1
        elif after.is_final:
            name = schema.STATUS_COLUMNS[after]
            setattr(self, name, getattr(self, name) + 1)

    def _load(self, sign: int, resources: Resources) -> None:
        self.live += sign
        self.cpus_assigned += sign * resources.cpus
        self.memory_assigned += sign * resources.memory
        self.gpus_assigned += sign * resources.gpus

    def settle(self, seconds: int, paid: int) -> None:
        """Apply a payment for one of its jobs."""
        self.busy_seconds += seconds
        self.earned += paid

    def offer(self, entry: ProviderEntry) -> None:
        """Apply a change of its offer or status. A draining provider still counts as offering."""
        approved = entry.version > 0 and not entry.banned
        self.cpus_offered = entry.offer.cpus if approved else 0


@dataclass(slots=True)
class StoredState:
    """The state in the database, before a batch, of everything that the batch touches.

    `totals` is the last row of `totals`. `last_line` returns the number of lines and the balance of an
    account's statement. `figures` returns the running totals of a provider. `challenges` are the
    open challenges.
    """

    jobs: dict[int, JobEntry]
    positions: dict[int, LogPosition]
    providers: dict[str, ProviderEntry]
    parked: Mapping[str, int]
    totals: Mapping[str, int]
    last_line: Callable[[str], tuple[int, int]]
    figures: Callable[[str], ProviderTotals]
    challenges: Iterable[ev.ProviderChallenged] = ()


@dataclass(slots=True)
class ProjectedRows:
    """The result of a projection: new rows by table, and the changed jobs and providers."""

    rows: defaultdict[Table, list[dict[str, Any]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    jobs: dict[int, JobEntry] = field(default_factory=dict)
    positions: dict[int, LogPosition] = field(default_factory=dict)
    providers: dict[str, ProviderEntry] = field(default_factory=dict)


def affected(events: Iterable[ev.Event]) -> tuple[set[int], set[str], set[str]]:
    """Return the job IDs, provider accounts and recipients of parked credits in events."""
    job_ids: set[int] = set()
    accounts: set[str] = set()
    recipients: set[str] = set()
    for event in events:
        if (job_id := _job_id(event)) is not None:
            job_ids.add(job_id)
        if isinstance(event, ev.JobRetried):
            job_ids.add(event.successor)
        if (account := _account(event)) is not None:
            accounts.add(account)
        if isinstance(event, ev.PaymentParked | ev.PaymentWithdrawn):
            recipients.add(event.recipient)
    return {job_id for job_id in job_ids if job_id <= schema.MAX_INT}, accounts, recipients


class Projection:
    """The projection of one batch."""

    def __init__(self, deployment: Deployment, stored: StoredState, block_data: BlockData) -> None:
        self._stored = stored
        self._block_data = block_data
        self._names = deployment.contract_names
        self._ledgers = GridLedgers(deployment)
        self._ledgers.jobs.jobs.update(stored.jobs)
        self._ledgers.registry.providers.update(stored.providers)
        self._ledgers.tokens.parked.update(stored.parked)
        for name in ("minted", "burned", "donated"):
            setattr(self._ledgers.tokens, name, stored.totals.get(name, 0))
        self._anomalies = AnomalyRules(deployment)
        self._anomalies.resume(stored.jobs.values(), stored.challenges)
        self._totals = Counter(stored.totals)
        self._parked = Counter(stored.parked)
        self._flows = {job.id: _flow(job) for job in stored.jobs.values()}
        self._provider_figures: dict[str, ProviderTotals] = {}
        self._last_lines: dict[str, tuple[int, int]] = {}
        self._result = ProjectedRows(positions=stored.positions)
        #: Position and block time of the current event, and providers that the block concerns.
        self._location: dict[str, int] = {}
        self._active: set[str] = set()

    def project(self, events: Iterable[ev.Event]) -> ProjectedRows:
        """Return the rows for events, which must be in chain order."""
        for number, block_events in groupby(events, key=lambda event: event.block_number):
            self._project_block(number, list(block_events))
        return self._result

    def _project_block(self, number: int, events: list[ev.Event]) -> None:
        header = self._block_data.headers[number]
        entries: list[tuple[int, LedgerEntry]] = []
        anomalies: list[tuple[int, Anomaly]] = []
        count = 0
        self._active = set()
        for tx_hash, group in groupby(events, key=lambda event: event.tx_hash):
            transaction = self._block_data.transactions[tx_hash]
            transaction_events = list(group)
            context = TransactionContext(number, header.time, tx_hash)
            self._ledgers.read(context, transaction_events)
            entries += ((transaction.position, entry) for entry in context.entries)
            self._anomalies.read(transaction_events, self._ledgers.jobs.jobs, context)
            named = name_self_scheduled(self._anomalies.take(), {tx_hash: transaction.sender})
            anomalies += ((transaction.position, row) for row in named)
            self._transaction(transaction, len(transaction_events))
            for event in transaction_events:
                self._location = {
                    "block": number,
                    "log_index": event.log_index,
                    "position": transaction.position,
                    "time": header.time,
                }
                self._event(event)
            count += 1
        self._add(schema.headers, header, all_transactions=header.transactions, transactions=count)
        self._movements(entries)
        self._result.rows[schema.anomalies] += (
            anomaly_values(row, block=number, number=index, position=position)
            for index, (position, row) in enumerate(anomalies)
        )
        changed_jobs, _, _ = affected(events)
        self._write_totals(number, header.time, changed_jobs)

    def _add(self, table: Table, record: Any, /, **values: Any) -> None:
        """Add a row: `values`, and attributes of the record by the names of the columns."""
        self._result.rows[table].append(row_values(record, table, **values))

    def _add_event(self, table: Table, event: ev.Event, /, **values: Any) -> None:
        """Add a row with the position of the current event, and the time if the table has it."""
        location = {name: number for name, number in self._location.items() if name in table.c}
        self._add(table, event, **location, **values)

    def _transaction(self, sent: Transaction, events: int) -> None:
        contract = self._names.get(sent.to or "", "")
        selector = "0x" + sent.input[:4].hex() if sent.to and len(sent.input) >= 4 else ""
        self._add(
            schema.transactions,
            sent,
            contract=contract,
            selector=selector,
            method=methods()[contract].get(selector, "") if contract else "",
            events=events,
        )
        # Other contracts can imitate the forwarder, so only calls to our own are decoded.
        if contract != FORWARDER:
            return
        for number, (call, ok) in enumerate(sent.forwarded):
            target = self._names.get(call.to, "")
            selector = "0x" + call.data[:4].hex()
            self._add(
                schema.forwarded,
                sent,
                number=number,
                signer=call.sender,
                to=call.to,
                contract=target,
                method=methods()[target].get(selector, "") if target else "",
                ok=ok and sent.ok,
            )

    # -- events

    def _event(self, event: ev.Event) -> None:
        account, contract = _account(event), self._names[event.address]
        self._add_event(
            schema.events,
            event,
            contract=contract,
            name=type(event).__name__,
            job_id=_job_id(event),
            account=account,
            body=event_values(event),
        )
        if account is not None:
            self._result.providers[account] = self._ledgers.registry.of(account)
            self._provider_totals(account).offer(self._ledgers.registry.of(account))
        match event:
            case ev.JobTransition():
                self._transition(event)
            case ev.JobSettled():
                self._settlement(event, event.refunded)
            case ev.JobCollected():
                self._settlement(event, 0)
                self._set_position(event.job_id)
            case ev.PaymentParked():
                self._parking(event, event.amount)
            case ev.PaymentWithdrawn():
                self._parking(event, -event.amount)
            case ev.RoleGranted() | ev.RoleRevoked():
                self._add_event(
                    schema.roles,
                    event,
                    contract=contract,
                    role="0x" + event.role.hex(),
                    granted=isinstance(event, ev.RoleGranted),
                    by=event.sender,
                )
            case ev.FeeChanged():
                fee = str(event.fee_bps)
                self._add_event(schema.parameters, event, name="fee_bps", value=fee)
            case ev.SubmissionsChanged():
                is_open = str(event.open).lower()
                self._add_event(schema.parameters, event, name="submissions_open", value=is_open)
            case _:
                pass

    def _set_position(self, job_id: int) -> None:
        location = self._location
        position = (location["block"], location["position"], location["log_index"])
        self._result.positions[job_id] = position

    def _transition(self, event: ev.JobTransition) -> None:
        account = account_or_none(event.provider)
        self._add_event(schema.transitions, event, provider=account)
        self._set_position(event.job_id)
        for status, sign in ((event.before, -1), (event.after, 1)):
            if status:
                self._totals[schema.STATUS_COLUMNS[status]] += sign
        job = self._ledgers.jobs.jobs.get(event.job_id)
        if job is not None and account is not None:
            self._provider_totals(account).move(event.before, event.after, job.terms.resources)

    def _settlement(self, event: ev.JobSettled | ev.JobCollected, refunded: int) -> None:
        job = self._ledgers.jobs.jobs.get(event.job_id)
        status = job.status if job is not None else JobStatus.NONE
        provider = account_or_none(event.provider)
        self._add_event(
            schema.settlements, event, status=status, provider=provider, refunded=refunded
        )
        if provider is not None:
            self._provider_totals(provider).settle(event.billed_seconds, event.paid)

    def _parking(self, event: ev.PaymentParked | ev.PaymentWithdrawn, amount: int) -> None:
        self._parked[event.recipient] += amount
        self._totals["parked"] += amount
        held = self._parked[event.recipient]
        self._add_event(schema.parkings, event, amount=amount, held=held)

    # -- totals

    def _provider_totals(self, account: str) -> ProviderTotals:
        """Return a provider's running totals, advanced to the time of the current event."""
        time = self._location["time"]
        self._active.add(account)
        if account not in self._provider_figures:
            provider_totals = self._stored.figures(account)
            provider_totals.time = provider_totals.time or time
            self._provider_figures[account] = provider_totals
        self._provider_figures[account].advance(time)
        return self._provider_figures[account]

    def _movements(self, entries: list[tuple[int, LedgerEntry]]) -> None:
        for number, (position, entry) in enumerate(entries):
            if entry.account not in self._last_lines:
                self._last_lines[entry.account] = self._stored.last_line(entry.account)
            line_number, balance = self._last_lines[entry.account]
            line_number, balance = line_number + 1, balance + entry.amount
            self._last_lines[entry.account] = line_number, balance
            self._add(
                schema.movements,
                entry,
                number=number,
                position=position,
                kind=entry.kind.value,
                job_id=entry.job_id or None,
                balance=balance,
                line=line_number,
            )

    def _write_totals(self, number: int, time: int, changed_jobs: Iterable[int]) -> None:
        """Write the totals after a block."""
        for job_id in changed_jobs:
            if (job := self._ledgers.jobs.jobs.get(job_id)) is None:
                continue
            self._result.jobs[job_id] = job
            self._totals.subtract(self._flows.get(job_id, {}))
            self._flows[job_id] = _flow(job)
            self._totals.update(self._flows[job_id])
        for name in ("minted", "burned", "donated"):
            self._totals[name] = getattr(self._ledgers.tokens, name)
        totals = {column.name: self._totals[column.name] for column in schema.totals.c}
        self._result.rows[schema.totals].append({**totals, "block": number, "time": time})
        self._result.rows[schema.provider_figures] += (
            row_values(
                self._provider_figures[account],
                schema.provider_figures,
                account=account,
                block=number,
            )
            for account in sorted(self._active)
        )


def _flow(job: JobEntry) -> dict[str, int]:
    """Return the part of the grid's totals that is due to a job."""
    return {"escrow": job.escrow, "paid": job.paid, "fees": job.fee, "refunded": job.refunded}


def _job_id(event: ev.Event) -> int | None:
    job_id: int | None = getattr(event, "job_id", None)
    if job_id is None or job_id > schema.MAX_INT:
        return None
    if isinstance(event, ev.TransitionSkipped) and event.status is JobStatus.NONE:
        return None  # anyone's batch may name jobs that do not exist yet
    return job_id


def _account(event: ev.Event) -> str | None:
    return event.provider if type(event).__name__ in CHANGE_KINDS else None  # type: ignore[attr-defined]
