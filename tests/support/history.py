"""Generates a long, valid history of a grid: events as the contracts would emit them.

A model of customers, providers and a scheduler moves jobs through all transitions. A test checks the
result with the ledgers of the audit, so that measurements with it apply to realistic histories.
"""

from __future__ import annotations

import hashlib
import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from eth_utils import to_checksum_address

from deepsquare_chain.audit.entries import ZERO_ADDRESS
from deepsquare_chain.chain.bindings import events as ev
from deepsquare_chain.chain.bindings.deployment import (
    APPROVER_ROLE,
    METASCHEDULER_ROLE,
    MINTER_ROLE,
    Deployment,
)
from deepsquare_chain.credits import CREDIT, job_rate
from deepsquare_chain.credits import fee as fee_of
from deepsquare_chain.indexer.block_data import Header, Transaction
from deepsquare_chain.job import (
    Hardware,
    JobFlags,
    JobStatus,
    Objective,
    Offer,
    Prices,
    Resources,
    Terms,
)

START = 1_750_000_000
FEE_BPS = 500
LIMIT = 600
#: Seconds between interim payments.
INTERVAL = 20
HARDWARE = Hardware(nodes=1_000, cpus_per_node=64, mem_per_node=256_000, gpus_per_node=4)
OFFER = Offer(cpus=64_000, memory=256_000_000, gpus=4_000)
#: The ends of jobs, with their relative frequency.
ENDS = {
    "finished": 66,
    "failed": 10,
    "spent": 6,
    "cancelled early": 5,
    "cancelled": 4,
    "panicked": 3,
    "retried": 3,
    "requeued": 3,
}


def address(kind: int, number: int) -> str:
    """Return a deterministic, random-looking address."""
    return str(
        to_checksum_address("0x" + hashlib.sha256(b"%d %d" % (kind, number)).hexdigest()[:40])
    )


DEPLOYMENT = Deployment(
    chain_id=31_337,
    credit=address(0, 1),
    registry=address(0, 2),
    scheduler=address(0, 3),
    treasury=address(0, 4),
    forwarder=address(0, 7),
    block=1,
)
ADMIN, META = address(0, 5), address(0, 6)


@dataclass(slots=True)
class GeneratedBlock:
    """A block with its transactions and events."""

    header: Header
    transactions: list[Transaction] = field(default_factory=list)
    events: list[ev.Event] = field(default_factory=list)


@dataclass(slots=True)
class Live:
    """A job that has not ended."""

    id: int
    customer: str
    terms: Terms
    end: str
    escrow: int
    retries: int
    time_limit: int
    provider: str = ZERO_ADDRESS
    rate: int = 0
    started: int = 0
    billed: int = 0


class History:
    """Generates the blocks of a grid, one after the other.

    Args:
        jobs: Number of submitted jobs.
        providers: Number of providers.
        customers: Number of customers.
        seed: Seed of the random numbers.
    """

    def __init__(self, jobs: int, *, providers: int = 20, customers: int = 200, seed: int = 1):
        self._random = random.Random(seed)
        self._jobs = jobs
        self._prices = {
            address(1, number): Prices(10**12 + number * 10**9 + 7, 10**13 + 3, 10**8 + 1)
            for number in range(providers)
        }
        self._customers = [address(2, number) for number in range(customers)]
        self._count = 0
        self._number = 0
        self._now = START
        self._block: GeneratedBlock | None = None
        self._nonces: dict[str, int] = {}
        self._pending: deque[Live] = deque()
        self._assigned: deque[Live] = deque()
        self._claimed: deque[Live] = deque()
        self._running: deque[Live] = deque()
        self._lost_by: dict[int, set[str]] = {}
        self._paid: dict[str, int] = {}

    def blocks(self) -> Iterator[GeneratedBlock]:
        """Yield all blocks, until the last job has ended."""
        yield self._deploy()
        submitted = 0
        while submitted < self._jobs or self._pending or self._assigned or self._running:
            self._begin()
            while submitted < self._jobs and self._random.random() < 0.75:
                size = min(self._random.choice((1, 1, 2, 3, 5, 10)), self._jobs - submitted)
                self._submit(self._random.choice(self._customers), size)
                submitted += size
            self._finish_due()
            self._start()
            self._claim()
            self._assign()
            if self._block is not None and self._block.events:
                yield self._block

    # -- transactions

    def _begin(self) -> None:
        self._number += 1
        self._now += 2
        self._block = GeneratedBlock(
            Header(
                number=self._number,
                hash=self._hash("block", self._number),
                parent=self._hash("block", self._number - 1),
                time=self._now,
                gas_used=1_234_567,
                gas_limit=30_000_000,
                base_fee=10**9,
                transactions=0,
            )
        )

    @staticmethod
    def _hash(*parts: Any) -> str:
        return "0x" + hashlib.sha256(repr(parts).encode()).hexdigest()

    def _send(self, sender: str, to: str, events: list[ev.Event], size: int = 100) -> None:
        """Add a transaction with these events, and set block and log index of the events."""
        block = self._block
        assert block is not None
        nonce = self._nonces[sender] = self._nonces.get(sender, -1) + 1
        transaction = Transaction(
            hash=self._hash(sender, nonce),
            block=self._number,
            position=len(block.transactions),
            sender=sender,
            to=to,
            ok=True,
            gas_used=21_000 + 30_000 * len(events),
            gas_price=10**9 + nonce,
            nonce=nonce,
            value=0,
            input=bytes.fromhex("2e340823") + bytes(size),
        )
        block.transactions.append(transaction)
        block.header = replace(block.header, transactions=len(block.transactions))
        for event in events:
            location = {
                "block_number": self._number,
                "block_hash": block.header.hash,
                "tx_hash": transaction.hash,
                "log_index": len(block.events),
            }
            block.events.append(replace(event, **location))

    def _deploy(self) -> GeneratedBlock:
        self._begin()
        credit, registry, scheduler = DEPLOYMENT.addresses
        roles = ((credit, MINTER_ROLE, ADMIN), (registry, APPROVER_ROLE, ADMIN))
        for contract, role, account in (*roles, (scheduler, METASCHEDULER_ROLE, META)):
            admin = ev.RoleGranted(bytes(32), ADMIN, ADMIN, address=contract)
            granted = ev.RoleGranted(role, account, ADMIN, address=contract)
            self._send(ADMIN, contract, [admin, granted])
        submissions_opened = ev.SubmissionsChanged(True, address=scheduler)
        self._send(
            ADMIN, scheduler, [ev.FeeChanged(FEE_BPS, address=scheduler), submissions_opened]
        )
        for customer in self._customers:
            mint = ev.Transfer(ZERO_ADDRESS, customer, 10**9 * CREDIT, address=credit)
            self._send(ADMIN, credit, [mint])
        for number, (account, prices) in enumerate(self._prices.items(), start=1):
            events = [
                ev.HardwareProposed(account, 1, HARDWARE, address=registry),
                ev.PricesChanged(account, prices, address=registry),
                ev.LabelsChanged(account, {"region": f"r{number % 3}"}, address=registry),
            ]
            self._send(account, registry, events)
            approved_until = START + 10**9
            approved = ev.ProviderApproved(account, 1, HARDWARE, approved_until, address=registry)
            provider_registered = ev.ProviderRegistered(number, account, address=registry)
            offer = ev.OfferChanged(account, OFFER, address=registry)
            self._send(ADMIN, registry, [provider_registered, approved, offer])
        assert self._block is not None
        return self._block

    def _event(self, kind: Any, *values: Any) -> ev.Event:
        event: ev.Event = kind(*values, address=DEPLOYMENT.scheduler)
        return event

    def _transfer(self, sender: str, recipient: str, amount: int) -> ev.Event:
        return ev.Transfer(sender, recipient, amount, address=DEPLOYMENT.credit)

    def _move(self, job: Live, before: JobStatus, after: JobStatus) -> ev.Event:
        return self._event(ev.JobTransition, job.id, job.customer, job.provider, before, after)

    def _submit(self, customer: str, size: int) -> None:
        events: list[ev.Event] = []
        total = 0
        for _ in range(size):
            self._count += 1
            end = self._random.choices(list(ENDS), list(ENDS.values()))[0]
            # Only a job without retries ends as panicked.
            terms = self._terms(self._count, retries=0 if end == "panicked" else 1)
            job = Live(
                self._count, customer, terms, end, terms.amount, terms.retries, terms.time_limit
            )
            digest = hashlib.sha256(terms.name.encode()).digest()
            events += (
                self._event(ev.JobSubmitted, job.id, customer, digest, terms),
                self._move(job, JobStatus.NONE, JobStatus.PENDING),
            )
            total += terms.amount
            self._pending.append(job)
        events.append(self._transfer(customer, DEPLOYMENT.scheduler, total))
        self._send(customer, DEPLOYMENT.scheduler, events, 200 + 32 * size)

    def _terms(self, number: int, retries: int) -> Terms:
        resources = Resources(
            tasks=self._random.choice((1, 1, 2, 4)),
            cpus_per_task=self._random.choice((1, 2, 8)),
            mem_per_cpu=self._random.choice((512, 2_000)),
            gpus=self._random.choice((0, 0, 0, 1)),
        )
        rate = job_rate(Prices(2 * 10**12, 2 * 10**13, 2 * 10**8), resources)
        return Terms(
            amount=rate * LIMIT + self._random.randrange(10**9),
            time_limit=LIMIT,
            resources=resources,
            retries=retries,
            flags=JobFlags.NONE if number % 10 else JobFlags.INTERIM_PAYMENTS,
            objective=Objective.COST,
            name=f"{self._random.choice(('train', 'render', 'fold', 'simulate'))} {number}",
            uses="region=r1" if number % 4 == 0 else "",
        )

    def _by_provider(self, jobs: deque[Live], limit: int) -> dict[str, list[Live]]:
        jobs_by_provider: dict[str, list[Live]] = {}
        for _ in range(min(limit, len(jobs))):
            job = jobs.popleft()
            jobs_by_provider.setdefault(job.provider, []).append(job)
        return jobs_by_provider

    def _assign(self) -> None:
        events: list[ev.Event] = []
        for _ in range(min(50, len(self._pending))):
            job = self._pending.popleft()
            if job.end == "cancelled early":
                self._end(job, JobStatus.PENDING, JobStatus.CANCELLED, 0)
                continue
            barred = self._lost_by.get(job.id, set())
            job.provider = self._random.choice([p for p in self._prices if p not in barred])
            job.rate = job_rate(self._prices[job.provider], job.terms.resources)
            events.append(self._move(job, JobStatus.PENDING, JobStatus.META_SCHEDULED))
            events.append(self._event(ev.JobPriced, job.id, job.provider, job.rate, FEE_BPS))
            self._assigned.append(job)
        if events:
            self._send(META, DEPLOYMENT.scheduler, events)

    def _claim(self) -> None:
        for provider, jobs in self._by_provider(self._assigned, 100).items():
            requeued = [job for job in jobs if job.end == "requeued"]
            claimed = [job for job in jobs if job.end != "requeued"]
            events: list[ev.Event] = []
            for job in requeued:
                events.append(self._move(job, JobStatus.META_SCHEDULED, JobStatus.PENDING))
                events.append(self._event(ev.JobRequeued, job.id, provider, "no room"))
                job.provider, job.rate, job.end = ZERO_ADDRESS, 0, "finished"
                self._pending.append(job)
            if events:
                self._send(provider, DEPLOYMENT.scheduler, events)
            if claimed:
                moves = [
                    self._move(job, JobStatus.META_SCHEDULED, JobStatus.SCHEDULED)
                    for job in claimed
                ]
                self._send(provider, DEPLOYMENT.scheduler, moves)
                self._claimed.extend(claimed)

    def _start(self) -> None:
        for provider, jobs in self._by_provider(self._claimed, 100).items():
            moves = [self._move(job, JobStatus.SCHEDULED, JobStatus.RUNNING) for job in jobs]
            self._send(provider, DEPLOYMENT.scheduler, moves)
            for job in jobs:
                job.started = job.billed = self._now
                self._running.append(job)
                if job.id % 50 == 0:
                    self._top_up(job)

    def _top_up(self, job: Live) -> None:
        amount = job.rate * 60
        job.escrow += amount
        job.time_limit += 60
        event = self._event(
            ev.JobToppedUp, job.id, job.customer, amount, job.escrow, job.time_limit
        )
        paid = self._transfer(job.customer, DEPLOYMENT.scheduler, amount)
        self._send(job.customer, DEPLOYMENT.scheduler, [event, paid])

    # -- ends

    def _finish_due(self) -> None:
        reports: dict[str, list[tuple[Live, JobStatus, int]]] = {}
        for _ in range(len(self._running)):
            job = self._running.popleft()
            elapsed = self._now - job.billed
            duration = job.time_limit + 2
            if job.end != "spent":
                duration = 10 + job.id % 90 - (job.billed - job.started)
            if elapsed < duration:
                self._running.append(job)
                lasts = INTERVAL <= elapsed < job.time_limit
                if lasts and JobFlags.INTERIM_PAYMENTS in job.terms.flags:
                    self._collect(job, elapsed)
            elif job.end in {"finished", "failed", "spent"}:
                status = {
                    "finished": JobStatus.FINISHED,
                    "failed": JobStatus.FAILED,
                    "spent": JobStatus.OUT_OF_CREDITS,
                }[job.end]
                seconds = job.time_limit if job.end == "spent" else elapsed
                reports.setdefault(job.provider, []).append((job, status, seconds))
            elif job.end == "cancelled":
                self._end(job, JobStatus.RUNNING, JobStatus.CANCELLED, elapsed)
            else:
                self._panic(job)
        for provider, provider_reports in reports.items():
            for offset in range(0, len(provider_reports), 50):
                self._report(provider, provider_reports[offset : offset + 50])

    def _report(self, provider: str, runs: list[tuple[Live, JobStatus, int]]) -> None:
        events: list[ev.Event] = []
        for job, status, seconds in runs:
            code = 1 if status is JobStatus.FAILED else 0
            events.append(self._move(job, JobStatus.RUNNING, status))
            events.append(self._event(ev.JobResult, job.id, code, bytes(32), ""))
            events.append(self._settle(job, seconds))
        self._send(provider, DEPLOYMENT.scheduler, [*events, *self._payments()], 160 * len(runs))

    def _settle(self, job: Live, seconds: int) -> ev.Event:
        cost = job.rate * seconds
        fee = fee_of(cost, FEE_BPS)
        refund = job.escrow - cost
        for account, amount in (
            (job.provider, cost - fee),
            (DEPLOYMENT.treasury, fee),
            (job.customer, refund),
        ):
            self._paid[account] = self._paid.get(account, 0) + amount
        values = (job.id, job.provider, job.customer, seconds, cost - fee, fee, refund)
        return self._event(ev.JobSettled, *values)

    def _collect(self, job: Live, seconds: int) -> None:
        """Make an interim payment."""
        cost = job.rate * seconds
        fee = fee_of(cost, FEE_BPS)
        job.escrow -= cost
        job.time_limit -= seconds
        job.billed = self._now
        for account, amount in ((job.provider, cost - fee), (DEPLOYMENT.treasury, fee)):
            self._paid[account] = self._paid.get(account, 0) + amount
        values = (job.id, job.provider, job.customer, seconds, cost - fee, fee)
        event = self._event(ev.JobCollected, *values, job.escrow, job.time_limit)
        self._send(job.provider, DEPLOYMENT.scheduler, [event, *self._payments()])

    def _payments(self) -> list[ev.Event]:
        """Return one transfer per recipient for the whole batch."""
        paid, self._paid = self._paid, {}
        return [
            self._transfer(DEPLOYMENT.scheduler, account, amount)
            for account, amount in paid.items()
            if amount
        ]

    def _end(self, job: Live, before: JobStatus, after: JobStatus, seconds: int) -> None:
        events = [self._move(job, before, after), self._settle(job, seconds)]
        self._send(job.customer, DEPLOYMENT.scheduler, [*events, *self._payments()])

    def _panic(self, job: Live) -> None:
        transition = self._move(job, JobStatus.RUNNING, JobStatus.PANICKED)
        events = [transition, self._event(ev.JobPanicked, job.id, job.provider, "node lost")]
        if job.end != "retried":
            events.append(self._settle(job, 0))
            self._send(job.provider, DEPLOYMENT.scheduler, [*events, *self._payments()])
            return
        self._count += 1
        successor = replace(job, id=self._count, end="finished", retries=job.retries - 1)
        successor.provider, successor.rate, successor.started, successor.billed = (
            ZERO_ADDRESS,
            0,
            0,
            0,
        )
        self._lost_by[successor.id] = self._lost_by.get(job.id, set()) | {job.provider}
        events.append(self._event(ev.JobRetried, job.id, successor.id, job.escrow))
        events.append(self._move(successor, JobStatus.NONE, JobStatus.PENDING))
        self._send(job.provider, DEPLOYMENT.scheduler, events)
        self._pending.append(successor)
