"""The ledger of a grid, rebuilt only from its events. Pure.

Each bill is recomputed from the rate, the fee and the block times. Each payment is matched with
the token's transfers in the same transaction. Anything that the contracts would not have done is
recorded as a finding.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from typing import Final, TypeAlias

from eth_utils.address import to_checksum_address

from deepsquare_chain.audit.anomalies import Anomaly, AnomalyRules
from deepsquare_chain.audit.entries import (
    MIN_COLLECT_INTERVAL,
    MIN_REPORT_GRACE,
    ZERO_ADDRESS,
    AuditFinding,
    JobEntry,
    LedgerEntry,
    MovementKind,
    ProviderEntry,
    StatementRow,
    Totals,
    TransactionContext,
    from_attributes,
)
from deepsquare_chain.chain.bindings import events as ev
from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.credits import fee as fee_of
from deepsquare_chain.credits import fits, job_rate
from deepsquare_chain.errors import AuditError
from deepsquare_chain.job import (
    JobFlags,
    JobStatus,
    Load,
    ProviderStatus,
    Resources,
    can_transition,
)


class Ledger:
    """Jobs by ID, providers and balances by account, and findings after a replay."""

    def __init__(self, deployment: Deployment) -> None:
        self.deployment = deployment
        self.findings: list[AuditFinding] = []
        #: Last block of the replay, and its chain time in seconds.
        self.block = deployment.block
        self.time = 0
        self._entries: list[LedgerEntry] = []
        self._entries_by_account: defaultdict[str, list[LedgerEntry]] = defaultdict(list)
        self._ledgers = GridLedgers(deployment)
        self._rules = AnomalyRules(deployment)
        self.jobs: Mapping[int, JobEntry] = self._ledgers.jobs.jobs
        self.providers: Mapping[str, ProviderEntry] = self._ledgers.registry.providers
        #: Balances in credit-wei, of every account that ever held credits.
        self.balances: Mapping[str, int] = self._ledgers.tokens.balances

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
        grid_events = [event for event in events if event.address in ledger.deployment.addresses]
        grid_events.sort(key=lambda event: event.position)
        ledger._check_duplicates(grid_events)
        for (block, tx_hash), group in groupby(
            grid_events, key=lambda e: (e.block_number, e.tx_hash)
        ):
            if block not in block_times:
                raise AuditError(f"The time of block {block} is missing")
            time = block_times[block]
            transaction_events = list(group)
            context = TransactionContext(block, time, tx_hash, ledger.findings, ledger._entries)
            ledger._ledgers.read(context, transaction_events)
            ledger._rules.read(transaction_events, ledger.jobs, context)
            ledger.block, ledger.time = block, time
        ledger.block = ledger.block if to_block is None else to_block
        ledger.time = ledger.time if now is None else now
        ledger._close()
        return ledger

    @property
    def provider_ids(self) -> Mapping[str, int]:
        """Provider IDs by account."""
        return {account: provider.id for account, provider in self.providers.items() if provider.id}

    @property
    def parked(self) -> Mapping[str, int]:
        """Parked credit-wei by account, until the account withdraws them."""
        return {
            account: amount for account, amount in self._ledgers.tokens.parked.items() if amount
        }

    @property
    def accounts(self) -> list[str]:
        """All accounts with a statement."""
        return sorted(self._entries_by_account)

    @property
    def anomalies(self) -> list[Anomaly]:
        """Anomalies (allowed but unusual), oldest first."""
        return self._rules.all_anomalies(self.jobs, TransactionContext(self.block, self.time))

    @property
    def totals(self) -> Totals:
        """Totals of the whole ledger."""
        jobs = self.jobs.values()
        tokens = self._ledgers.tokens
        scheduler_balance = tokens.balances.get(self.deployment.scheduler, 0)
        escrow = sum(job.escrow for job in jobs)
        parked = sum(tokens.parked.values())
        return from_attributes(
            Totals,
            tokens,  # minted, burned, supply and donated
            jobs=len(jobs),
            scheduler_balance=scheduler_balance,
            escrow=escrow,
            parked=parked,
            balances=sum(tokens.balances.values()),
            paid=sum(job.paid for job in jobs),
            fees=sum(job.fee for job in jobs),
            refunded=sum(job.refunded for job in jobs),
            difference=scheduler_balance - escrow - parked - tokens.donated,
        )

    def statement(self, account: str) -> list[StatementRow]:
        """Return all movements of an account, oldest first, with the balance after each."""
        entries = self._entries_by_account.get(to_checksum_address(account), ())
        balances = accumulate(entry.amount for entry in entries)
        return [
            from_attributes(StatementRow, entry, balance=balance)
            for entry, balance in zip(entries, balances, strict=True)
        ]

    def _check_duplicates(self, events: list[ev.Event]) -> None:
        for previous, event in pairwise(events):
            if previous.position == event.position:
                block, tx_hash = event.block_number, event.tx_hash
                message = f"log {event.log_index} of block {block} was given twice"
                self.findings.append(AuditFinding("order", message, block, tx_hash))

    def _close(self) -> None:
        """Check the invariants that hold at the end of every replay."""
        for entry in self._entries:
            self._entries_by_account[entry.account].append(entry)
        self._entries.clear()
        context = TransactionContext(self.block, self.time, findings=self.findings)
        for job in self.jobs.values():
            message = f"job {job.id} has {job.difference} credit-wei too much or too little"
            context.check(job.difference == 0, "job", message, job.id)
        totals = self.totals
        message = f"the scheduler has {totals.scheduler_balance} credit-wei, "
        message += f"{totals.difference} apart from escrow, parked and donated"
        context.check(totals.difference == 0, "conservation", message)
        all_owned = totals.balances == totals.supply
        context.check(all_owned, "supply", "the balances do not add up to the supply")
        for account in sorted({*self._entries_by_account, *self.balances}):
            total = sum(entry.amount for entry in self._entries_by_account.get(account, ()))
            message = f"the statement of {account} does not end at its balance"
            context.check(total == self.balances.get(account, 0), "statement", message)


class GridLedgers:
    """The registry, job and token ledgers of a grid."""

    def __init__(self, deployment: Deployment) -> None:
        self.registry = RegistryLedger(deployment)
        self.jobs = JobLedger(self.registry, deployment)
        self.tokens = TokenLedger(deployment.scheduler)
        self._credit = deployment.credit

    def read(self, context: TransactionContext, events: Iterable[ev.Event]) -> None:
        """Apply the events of one transaction, given in chain order."""
        transfers = []
        for event in events:
            context.log_index, context.job_id = event.log_index, getattr(event, "job_id", 0)
            if event.address == self._credit:
                if isinstance(event, ev.Transfer):
                    transfers.append(event)
                continue
            # Each ledger ignores the events that do not concern it.
            self.registry.read(event, context)
            self.jobs.read(event, context)
            if isinstance(event, ev.PaymentParked):
                self.tokens.park(event, context)
            elif isinstance(event, ev.PaymentWithdrawn):
                self.tokens.withdraw(event, context)
        context.job_id = 0
        self.jobs.close(context)
        self.registry.close(context)
        self.tokens.close(transfers, context)


# -- statements of accounts over a range of blocks


@dataclass(frozen=True, slots=True)
class Statement:
    """An account's movements in the blocks from `first` to `last`; balances are credit-wei."""

    account: str
    first: int
    last: int
    opening: int
    closing: int
    rows: tuple[StatementRow, ...]

    @property
    def debits(self) -> int:
        """Total of outgoing movements, in credit-wei."""
        return sum(-row.amount for row in self.rows if row.amount < 0)

    @property
    def credits(self) -> int:
        """Total of incoming movements, in credit-wei."""
        return sum(row.amount for row in self.rows if row.amount > 0)


def statement(ledger: Ledger, account: str, first: int = 0, last: int | None = None) -> Statement:
    """Return an account's statement over the blocks from `first` to `last`.

    The last block of the ledger is the default and the maximum for `last`.
    """
    until = ledger.block if last is None else last
    rows = [row for row in ledger.statement(account) if row.block <= until]
    earlier = [row for row in rows if row.block < first]
    opening = earlier[-1].balance if earlier else 0
    closing = rows[-1].balance if rows else 0
    in_range = tuple(rows[len(earlier) :])
    return Statement(to_checksum_address(account), first, until, opening, closing, in_range)


# -- events of jobs: every status, price and bill is checked

#: Events of a job that was submitted before.
JobChange: TypeAlias = (
    ev.JobTransition
    | ev.JobPriced
    | ev.JobToppedUp
    | ev.JobSettled
    | ev.JobCollected
    | ev.JobRetried
    | ev.JobResult
    | ev.JobRequeued
    | ev.JobPanicked
    | ev.TransitionSkipped
)


class JobLedger:
    """The ledger of all jobs."""

    def __init__(self, registry: RegistryLedger, deployment: Deployment) -> None:
        self.jobs: dict[int, JobEntry] = {}
        self._registry = registry
        self._scheduler = deployment.scheduler
        self._treasury = deployment.treasury
        self._forwarder = deployment.forwarder
        self._interval = deployment.timeouts.get("collect_interval", MIN_COLLECT_INTERVAL)

    def read(self, event: ev.Event, context: TransactionContext) -> None:
        """Apply a scheduler event that concerns a job."""
        if isinstance(event, ev.JobSubmitted):
            self._submitted(event, context)
        elif isinstance(event, JobChange):
            if (job := self.jobs.get(event.job_id)) is not None:
                self._change(job, event, context)
            # A batch may name jobs that do not exist: it skips them with the status NONE.
            elif not isinstance(event, ev.TransitionSkipped) or event.status is not JobStatus.NONE:
                name = type(event).__name__
                context.report("unknown", f"{name} of job {event.job_id}, which is unknown")

    def _change(self, job: JobEntry, event: JobChange, context: TransactionContext) -> None:
        match event:
            case ev.JobTransition():
                self._transitioned(job, event, context)
            case ev.JobPriced():
                self._priced(job, event, context)
            case ev.JobToppedUp():
                self._topped_up(job, event, context)
            case ev.JobSettled():
                self._settled(job, event, context)
            case ev.JobCollected():
                self._collected(job, event, context)
            case ev.JobRetried():
                self._retried(job, event, context)
            case ev.JobResult():
                self._result_reported(job, event, context)
            case ev.JobRequeued():
                self._requeued(job, event, context)
            case ev.JobPanicked():
                self._panicked(job, event, context)
            case ev.TransitionSkipped():
                self._skipped(job, event, context)

    def close(self, context: TransactionContext) -> None:
        """Record a finding for everything that the transaction left incomplete."""
        for job_id in context.ended:
            message = f"job {job_id} ended without a settlement or successor"
            context.report("unsettled", message, job_id)
        for job_id, name in sorted(context.awaited):
            context.report("missing", f"job {job_id} moved without its {name}", job_id)

    def _add_job(self, job: JobEntry, context: TransactionContext) -> None:
        in_order = job.id == len(self.jobs) + 1
        context.check(in_order, "ids", f"job id {job.id} is out of order", job.id)
        self.jobs[job.id] = job
        context.awaited.add((job.id, ev.JobTransition.__name__))

    def _check_cause(self, job: JobEntry, event: ev.Event, context: TransactionContext) -> None:
        """Check that the event was expected: it may only follow a transition of its job."""
        name = type(event).__name__
        awaited = (job.id, name) in context.awaited
        context.check(awaited, "stray", f"{name} of job {job.id} follows no transition")
        context.awaited.discard((job.id, name))

    def _submitted(self, event: ev.JobSubmitted, context: TransactionContext) -> None:
        terms, job_id = event.terms, event.job_id
        if job_id in self.jobs:
            context.report("ids", f"job {job_id} was submitted twice")
            return
        self._check_signer(event.customer, job_id, context)
        job = JobEntry(job_id, event.customer, event.definition, terms)
        job.funded = job.escrow = terms.amount
        job.time_limit = terms.time_limit
        job.retries_left = terms.retries
        self._add_job(job, context)
        context.owed_in[event.customer] += terms.amount
        context.add_entry(event.customer, MovementKind.ESCROW, -terms.amount, self._scheduler)

    def _check_signer(self, account: str, job_id: int, context: TransactionContext) -> None:
        """Check that the signer, not the forwarder, paid for a forwarded call."""
        by_signer = account != self._forwarder or account == ZERO_ADDRESS
        message = f"job {job_id} was paid by the forwarder instead of the signer"
        context.check(by_signer, "forwarder", message)

    def _transitioned(
        self, job: JobEntry, event: ev.JobTransition, context: TransactionContext
    ) -> None:
        moved = f"job {job.id} went from {event.before.name} to {event.after.name}"
        allowed = event.before is job.status and can_transition(event.before, event.after)
        context.check(allowed, "transition", f"{moved} while it was {job.status.name}")
        context.check(event.customer == job.customer, "party", f"job {job.id} changed its customer")
        if event.after is JobStatus.META_SCHEDULED:
            self._check_retry_chain(job, event.provider, context)
            job.provider = event.provider
        else:
            own_provider = event.provider == job.provider
            context.check(own_provider, "party", f"{moved} by another provider than its own")
        if (follower := _FOLLOWED_BY.get(event.after)) and event.before is not JobStatus.NONE:
            context.awaited.add((job.id, follower.__name__))
        context.awaited.discard((job.id, ev.JobTransition.__name__))
        job.status, job.since = event.after, context.time
        job.transitions.append((context.time, event.after, context.tx_hash))
        if event.provider != ZERO_ADDRESS:
            size = job.terms.resources
            self._registry.move(event.provider, event.before, event.after, size)
            # Only the assigned provider can set these statuses.
            if event.after.is_reported or event.after in {JobStatus.SCHEDULED, JobStatus.RUNNING}:
                self._registry.acted(event.provider, job.id, context)
        self._after_transition(job, context)

    def _after_transition(self, job: JobEntry, context: TransactionContext) -> None:
        if job.status is JobStatus.RUNNING:
            job.started_at = context.time
        elif job.status is JobStatus.PENDING:
            job.submitted_at = job.submitted_at or context.time
            context.previous_providers[job.id] = job.provider
            job.provider, job.rate, job.fee_bps = ZERO_ADDRESS, 0, 0
        elif job.status.is_final:
            job.ended_at = context.time
            context.ended[job.id] = context.time

    def _check_retry_chain(self, job: JobEntry, provider: str, context: TransactionContext) -> None:
        """Check that a retry is not assigned to a provider of one of its predecessors."""
        successor, predecessor = job, self.jobs.get(job.retry_of)
        # Predecessors have lower IDs. This check prevents an endless loop on forged events.
        while predecessor is not None and predecessor.id < successor.id:
            message = (
                f"job {job.id} went to {provider}, which lost its predecessor {predecessor.id}"
            )
            context.check(predecessor.provider != provider, "excluded", message)
            successor, predecessor = predecessor, self.jobs.get(predecessor.retry_of)

    def _priced(self, job: JobEntry, event: ev.JobPriced, context: TransactionContext) -> None:
        self._check_cause(job, event, context)
        message = f"job {job.id} was priced for another provider than its own"
        context.check(event.provider == job.provider, "party", message)
        job.rate, job.fee_bps = event.rate, event.fee_bps
        self._registry.check_assignment(job, context)

    def _topped_up(self, job: JobEntry, event: ev.JobToppedUp, context: TransactionContext) -> None:
        context.check(job.status.is_live, "top-up", f"job {job.id} was topped up after its end")
        self._check_signer(event.payer, job.id, context)
        limit = job.time_limit
        if job.rate and event.payer == job.customer and not job.terms.until_spent:
            limit += event.amount // job.rate
        escrow = job.escrow + event.amount
        context.check(
            (event.escrow, event.time_limit) == (escrow, limit),
            "top-up",
            f"a top-up of job {job.id} by {event.amount} made {event.escrow} for "
            f"{event.time_limit} s instead of {escrow} for {limit} s",
        )
        job.funded += event.amount
        job.escrow, job.time_limit = event.escrow, event.time_limit
        context.owed_in[event.payer] += event.amount
        context.add_entry(event.payer, MovementKind.TOP_UP, -event.amount, self._scheduler)

    def _settled(self, job: JobEntry, event: ev.JobSettled, context: TransactionContext) -> None:
        if context.ended.pop(job.id, None) is None:
            context.report("settlement", f"job {job.id} was settled without having ended")
        check_settlement(job, event, context, lost=self._is_lost(job, context.time))
        job.settled = True
        job.refunded += event.refunded
        job.escrow -= event.paid + event.fee + event.refunded
        self._bill(job, event, MovementKind.PAYMENT, context)
        self._pay(event.customer, MovementKind.REFUND, event.refunded, context)

    def _is_lost(self, job: JobEntry, now: int) -> bool:
        """Return whether a run can count as lost, by the minimum that every deployment requires."""
        latest_report = job.billed_until + job.allotment + MIN_REPORT_GRACE
        return self._registry.is_gone(job.provider, now) or now > latest_report

    def _bill(
        self,
        job: JobEntry,
        event: ev.JobSettled | ev.JobCollected,
        kind: MovementKind,
        context: TransactionContext,
    ) -> None:
        """Record the seconds that a payment bills, and the shares of provider and treasury."""
        job.billed_seconds += event.billed_seconds
        job.paid += event.paid
        job.fee += event.fee
        self._pay(event.provider, kind, event.paid, context)
        self._pay(self._treasury, MovementKind.FEE, event.fee, context)

    def _pay(
        self, account: str, kind: MovementKind, amount: int, context: TransactionContext
    ) -> None:
        context.owed_out[account] += amount
        context.add_entry(account, kind, amount, self._scheduler)

    def _collected(
        self, job: JobEntry, event: ev.JobCollected, context: TransactionContext
    ) -> None:
        check_collection(job, event, context, self._interval)
        job.since = context.time
        job.collected_seconds += event.billed_seconds
        job.collected_paid += event.paid
        job.collected_fee += event.fee
        job.escrow, job.time_limit = event.escrow, event.time_limit
        self._registry.acted(event.provider, job.id, context)
        self._bill(job, event, MovementKind.INTERIM, context)

    def _retried(self, job: JobEntry, event: ev.JobRetried, context: TransactionContext) -> None:
        ended = context.ended.pop(job.id, None) is not None
        allowed = ended and job.status is JobStatus.PANICKED and job.retries_left > 0
        context.check(allowed, "retry", f"job {job.id} can't have a successor")
        message = f"job {job.id} carried {event.escrow} to its successor instead of {job.escrow}"
        context.check(event.escrow == job.escrow, "retry", message)
        if event.successor in self.jobs:
            context.report("ids", f"the successor {event.successor} of job {job.id} exists already")
            return
        successor = JobEntry(event.successor, job.customer, job.definition, job.terms)
        successor.escrow = successor.carried_in = job.carried_out = event.escrow
        successor.time_limit, successor.retries_left = job.time_limit, job.retries_left - 1
        successor.retry_of, job.successor, job.escrow = job.id, event.successor, 0
        self._add_job(successor, context)

    def _result_reported(
        self, job: JobEntry, event: ev.JobResult, context: TransactionContext
    ) -> None:
        self._check_cause(job, event, context)
        succeeded = event.exit_code == 0
        consistent = {JobStatus.FINISHED: succeeded, JobStatus.FAILED: not succeeded}
        message = f"exit code {event.exit_code} does not belong to job {job.id}, {job.status.name}"
        context.check(consistent.get(job.status, True), "result", message)
        job.exit_code, job.result, job.reason = event.exit_code, event.result, event.reason

    def _requeued(self, job: JobEntry, event: ev.JobRequeued, context: TransactionContext) -> None:
        self._check_cause(job, event, context)
        if event.by == context.previous_providers.get(job.id):
            self._registry.acted(event.by, job.id, context)

    def _panicked(self, job: JobEntry, event: ev.JobPanicked, context: TransactionContext) -> None:
        self._check_cause(job, event, context)
        if event.by == job.provider:
            self._registry.acted(event.by, job.id, context)
        else:
            lost = bool(job.started_at) and self._is_lost(job, context.time)
            context.check(lost, "party", f"{event.by} gave up job {job.id}, which was not lost")

    def _skipped(
        self, job: JobEntry, event: ev.TransitionSkipped, context: TransactionContext
    ) -> None:
        skipped = f"job {job.id} was skipped as {event.status.name}"
        same_status = event.status is job.status
        context.check(same_status, "transition", f"{skipped} while it was {job.status.name}")


_FOLLOWED_BY: Final[Mapping[JobStatus, type[ev.Event]]] = {
    JobStatus.META_SCHEDULED: ev.JobPriced,
    JobStatus.PENDING: ev.JobRequeued,
    JobStatus.FINISHED: ev.JobResult,
    JobStatus.FAILED: ev.JobResult,
    JobStatus.OUT_OF_CREDITS: ev.JobResult,
    JobStatus.PANICKED: ev.JobPanicked,
}


# -- checks that bills and interim payments are those that the contract must have computed


def check_collection(
    job: JobEntry, event: ev.JobCollected, context: TransactionContext, interval: int
) -> None:
    """Recompute an interim payment, and compare it with the event that the contract emitted.

    The payment follows from the rate, the fee, and the time since the last payment or the start.
    `job` is the job before the payment, `interval` the minimum seconds between two payments.
    """
    elapsed, billed = context.time - job.billed_until, event.billed_seconds
    allowed = job.status is JobStatus.RUNNING and JobFlags.INTERIM_PAYMENTS in job.terms.flags
    cost = job.rate * billed
    share = fee_of(cost, job.fee_bps)
    escrow = job.escrow - cost
    expected = (cost - share, share, escrow, _limit_left(job, billed, escrow))
    actual = (event.paid, event.fee, event.escrow, event.time_limit)
    for holds, problem in (
        (allowed, f", which is {job.status.name}, is not allowed"),
        (_same_parties(job, event), " was made between other parties than its own"),
        (elapsed >= interval, f" came after {elapsed} of {interval} s"),
        (elapsed < job.allotment, f" came when its {job.allotment} s were used up"),
        (billed == elapsed, f" bills {billed} s, but {elapsed} s passed"),
        (
            actual == expected,
            f" made paid, fee, escrow and time limit {actual} instead of {expected}",
        ),
    ):
        context.check(holds, "interim", f"an interim payment of job {job.id}{problem}")


def _limit_left(job: JobEntry, billed: int, escrow: int) -> int:
    """Return the time limit in seconds after an interim payment that leaves this escrow.

    A job that runs until its credits are spent keeps its price ceiling, escrow / time limit.
    """
    if job.terms.until_spent:
        return max(1, job.time_limit * escrow // job.escrow) if job.escrow else 1
    return job.time_limit - billed


def check_settlement(
    job: JobEntry, event: ev.JobSettled, context: TransactionContext, *, lost: bool
) -> None:
    """Recompute a bill from rate, fee, start (or last interim payment) and end.

    `job` is the job when it ended, before its escrow was divided; `lost` tells whether its run can
    count as lost.
    """
    _check_seconds(job, event, context, lost=lost)
    final = job.status is not JobStatus.PANICKED or job.retries_left == 0
    message = f"job {job.id} was refunded although {job.retries_left} retries were left"
    context.check(final, "retry", message)
    cost = job.rate * event.billed_seconds
    share = fee_of(cost, job.fee_bps)
    expected = (cost - share, share, job.escrow - cost)
    context.check(
        (event.paid, event.fee, event.refunded) == expected,
        "settlement",
        f"job {job.id} was settled with {event.paid} paid, {event.fee} fee and {event.refunded} "
        f"refunded instead of {expected[0]}, {expected[1]} and {expected[2]}",
    )
    message = f"job {job.id} was settled between other parties than its own"
    context.check(_same_parties(job, event), "settlement", message)


def _same_parties(job: JobEntry, event: ev.JobSettled | ev.JobCollected) -> bool:
    return event.customer == job.customer and event.provider == job.provider


def _check_seconds(
    job: JobEntry, event: ev.JobSettled, context: TransactionContext, *, lost: bool
) -> None:
    billed, problem = event.billed_seconds, ""
    elapsed = context.time - job.billed_until
    if job.status.is_reported:
        maximum = min(elapsed, job.allotment)
        out_of_credits = job.status is JobStatus.OUT_OF_CREDITS
        if billed > maximum:
            problem = f"{billed} s were billed, but at most {maximum} s may be"
        elif out_of_credits != (billed == job.allotment):
            problem = f"{billed} of {job.allotment} s do not make it {job.status.name}"
    elif job.status is JobStatus.CANCELLED and job.started_at:
        charged = min(elapsed, job.allotment)
        is_free = billed == 0 and lost
        if billed != charged and not is_free:
            problem = f"{billed} s were billed, but {charged} s were used"
    elif billed:
        problem = f"{billed} s were billed although nothing may be"
    context.check(not problem, "billing", f"job {job.id}: {problem}")


# -- events of providers: their records, load and challenges, and the fee


class RegistryLedger:
    """The providers and the fee: the state that decides about assignments during the replay."""

    def __init__(self, deployment: Deployment) -> None:
        self.providers: dict[str, ProviderEntry] = {}
        self.fee_bps: int | None = None
        self._lost_timeout = deployment.timeouts.get("lost_timeout", 0)

    def read(self, event: ev.Event, context: TransactionContext) -> None:
        """Apply an event of the registry, or a scheduler event that concerns a provider."""
        match event:
            case ev.ProviderRegistered():
                self._registered(event, context)
            case ev.HardwareProposed():
                self._proposed(event, context)
            case ev.ProviderApproved():
                self._approved(event, context)
            case ev.OfferChanged():
                self.of(event.provider).offer = event.offer
            case ev.PricesChanged():
                self.of(event.provider).prices = event.prices
            case ev.LabelsChanged():
                self.of(event.provider).labels = event.labels
            case ev.DrainingChanged():
                self.of(event.provider).draining = event.draining
            case ev.BanChanged():
                self.of(event.provider).banned = event.banned
            case ev.ProviderChallenged():
                self._challenged(event, context)
            case ev.ProviderAnswered():
                self._answered(event, context)
            case ev.FeeChanged():
                self.fee_bps = fee = event.fee_bps
                context.check(fee <= 2_000, "fee", f"the fee became {fee} basis points")
            case _:
                pass

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

    def acted(self, account: str, job_id: int, context: TransactionContext) -> None:
        """Note that a provider moved one of its jobs, which must answer its open challenge."""
        if self.of(account).answer_by:
            context.unanswered[account] = job_id

    def close(self, context: TransactionContext) -> None:
        """Record a finding for each challenge that should have been answered by the transaction."""
        for account, job_id in context.unanswered.items():
            message = f"{account} moved job {job_id}, which did not answer its open challenge"
            context.report("challenge", message, job_id)

    def check_assignment(self, job: JobEntry, context: TransactionContext) -> None:
        """Check that the contract could have assigned the job to its provider at this price."""
        provider = self.providers.get(job.provider)
        subject = f"job {job.id} was assigned to {job.provider}"
        if provider is None or provider.id == 0:
            context.report("eligible", f"{subject}, which is not an approved provider")
            return
        approved = provider.approved_until >= context.time
        active = provider.status is ProviderStatus.ACTIVE and approved
        context.check(active, "eligible", f"{subject}, which was not active then")
        size = job.terms.resources
        fitting = fits(provider.hardware, provider.offer, size, provider.load - Load.of(size))
        message = f"{subject}, although it exceeds the hardware or the free part of the offer"
        context.check(fitting, "eligible", message)
        expected = job_rate(provider.prices, size)
        message = f"job {job.id} has a rate of {job.rate} instead of {expected} by the prices"
        context.check(job.rate == expected and 0 < job.rate < 2**72, "rate", message)
        message = f"the escrow of job {job.id} does not buy its time limit"
        context.check(job.rate * job.time_limit <= job.escrow, "budget", message)
        message = f"job {job.id} has a fee of {job.fee_bps} basis points instead of {self.fee_bps}"
        context.check(job.fee_bps == self.fee_bps, "fee", message)

    def _registered(self, event: ev.ProviderRegistered, context: TransactionContext) -> None:
        registered = sum(1 for provider in self.providers.values() if provider.id)
        context.check(event.id == registered + 1, "ids", f"provider id {event.id} is out of order")
        entry = self.of(event.provider)
        context.check(entry.id == 0, "ids", f"{event.provider} got a second id")
        entry.id = event.id

    def _proposed(self, event: ev.HardwareProposed, context: TransactionContext) -> None:
        entry = self.of(event.provider)
        message = f"version {event.version} of {event.provider} is out of order"
        context.check(event.version == entry.pending_version + 1, "version", message)
        entry.pending_version, entry.pending_hardware = event.version, event.hardware

    def _approved(self, event: ev.ProviderApproved, context: TransactionContext) -> None:
        entry = self.of(event.provider)
        possible = event.approved_until > context.time and event.version <= entry.pending_version
        message = f"version {event.version} of {event.provider} can't have been approved"
        context.check(possible, "version", message)
        entry.version = event.version
        entry.hardware = event.hardware
        entry.approved_until = event.approved_until

    def _challenged(self, event: ev.ProviderChallenged, context: TransactionContext) -> None:
        entry = self.of(event.provider)
        possible = entry.answer_by == 0 and event.answer_by > context.time
        context.check(possible, "challenge", f"{event.provider} can't have been challenged")
        entry.challenged_at, entry.answer_by = context.time, event.answer_by

    def _answered(self, event: ev.ProviderAnswered, context: TransactionContext) -> None:
        entry = self.of(event.provider)
        context.check(entry.answer_by != 0, "challenge", f"{event.provider} had nothing to answer")
        entry.challenged_at = entry.answer_by = 0
        context.unanswered.pop(event.provider, None)


# -- the token's transfers, which are matched with the payments that jobs require


class TokenLedger:
    """The ledger of balances, supply and parked credits. `scheduler` holds the escrow."""

    def __init__(self, scheduler: str) -> None:
        self.balances: defaultdict[str, int] = defaultdict(int)
        self.parked: defaultdict[str, int] = defaultdict(int)
        self.minted = 0
        self.burned = 0
        #: Credit-wei sent to the scheduler without a job. They cannot be recovered.
        self.donated = 0
        self._scheduler = scheduler

    @property
    def supply(self) -> int:
        """Total supply in credit-wei."""
        return self.minted - self.burned

    def park(self, event: ev.PaymentParked, context: TransactionContext) -> None:
        """Park a payment that could not be delivered to its recipient."""
        self.parked[event.recipient] += event.amount
        context.owed_out[event.recipient] -= event.amount
        context.check(event.amount > 0, "parked", "a payment of zero was parked")
        context.add_entry(event.recipient, MovementKind.PARKED, -event.amount, self._scheduler)

    def withdraw(self, event: ev.PaymentWithdrawn, context: TransactionContext) -> None:
        """Apply a withdrawal, which must take all parked credits of the recipient."""
        parked = self.parked[event.recipient]
        message = f"{event.recipient} withdrew {event.amount} of {parked} parked credit-wei"
        context.check(event.amount == parked and parked > 0, "parked", message)
        self.parked[event.recipient] = parked - event.amount
        context.owed_out[event.to] += event.amount
        context.add_entry(event.to, MovementKind.WITHDRAWAL, event.amount, self._scheduler)

    def close(self, transfers: Iterable[ev.Transfer], context: TransactionContext) -> None:
        """Apply a transaction's transfers, and match them with the payments owed in it."""
        paid_in: defaultdict[str, int] = defaultdict(int)
        paid_out: defaultdict[str, int] = defaultdict(int)
        log_indexes: dict[str, int] = {}
        for transfer in transfers:
            context.log_index = transfer.log_index
            self._move(transfer, context)
            if transfer.recipient == self._scheduler:
                paid_in[transfer.sender] += transfer.amount
                log_indexes[transfer.sender] = transfer.log_index
            elif transfer.sender == self._scheduler:
                paid_out[transfer.recipient] += transfer.amount
                log_indexes[transfer.recipient] = transfer.log_index
            else:
                self._transferred(transfer, context)
        self._match_payments_in(paid_in, log_indexes, context)
        self._match_payments_out(paid_out, log_indexes, context)

    def _move(self, transfer: ev.Transfer, context: TransactionContext) -> None:
        if transfer.sender == ZERO_ADDRESS:
            self.minted += transfer.amount
        else:
            self.balances[transfer.sender] -= transfer.amount
            covered = self.balances[transfer.sender] >= 0
            context.check(covered, "balance", f"{transfer.sender} spent more than it had")
        if transfer.recipient == ZERO_ADDRESS:
            self.burned += transfer.amount
        else:
            self.balances[transfer.recipient] += transfer.amount

    def _transferred(self, transfer: ev.Transfer, context: TransactionContext) -> None:
        if transfer.sender == ZERO_ADDRESS:
            context.add_entry(transfer.recipient, MovementKind.MINT, transfer.amount, ZERO_ADDRESS)
            return
        kind = MovementKind.BURN if transfer.recipient == ZERO_ADDRESS else MovementKind.TRANSFER
        context.add_entry(transfer.sender, kind, -transfer.amount, transfer.recipient)
        if kind is MovementKind.TRANSFER:
            context.add_entry(transfer.recipient, kind, transfer.amount, transfer.sender)

    def _match_payments_in(
        self, paid_in: dict[str, int], log_indexes: dict[str, int], context: TransactionContext
    ) -> None:
        for payer in sorted({*paid_in, *context.owed_in}):
            context.log_index = log_indexes.get(payer, context.log_index)
            paid, owed = paid_in.get(payer, 0), context.owed_in.get(payer, 0)
            context.add_entry(self._scheduler, MovementKind.ESCROW, paid, payer)
            if owed == 0:
                # No job required this payment: a gift, or a mint to the wrong address.
                self.donated += paid
                if payer != ZERO_ADDRESS:
                    context.add_entry(payer, MovementKind.TRANSFER, -paid, self._scheduler)
                continue
            message = f"{payer} paid {paid} into escrow instead of {owed} by the events of its jobs"
            context.check(paid == owed, "escrow", message)

    def _match_payments_out(
        self, paid_out: dict[str, int], log_indexes: dict[str, int], context: TransactionContext
    ) -> None:
        for recipient in sorted({*paid_out, *context.owed_out}):
            context.log_index = log_indexes.get(recipient, context.log_index)
            paid, owed = paid_out.get(recipient, 0), context.owed_out.get(recipient, 0)
            context.add_entry(self._scheduler, MovementKind.PAYMENT, -paid, recipient)
            message = (
                f"{recipient} got {paid} out of escrow instead of {owed} by the events of jobs"
            )
            context.check(paid == owed, "payment", message)
