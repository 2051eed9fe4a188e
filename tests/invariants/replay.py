"""The ledger rebuilt from events alone, without calls and storage."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from deepsquare_chain.job import JobStatus
from tests.support.evm import ZERO, Event
from tests.support.grid import SUCCESSOR

S = JobStatus


@dataclass
class Entry:
    """A record rebuilt from events, with the field names of the contract."""

    customer: str
    definition: bytes
    terms: Any
    escrow: int
    timeLimit: int  # noqa: N815
    retriesLeft: int  # noqa: N815
    retryOf: int = 0  # noqa: N815
    status: int = 0
    since: int = 0
    provider: str = ZERO
    rate: int = 0
    feeBps: int = 0  # noqa: N815
    funded: int = 0
    carried_in: int = 0
    paid_out: int = 0
    carried_out: int = 0
    used: int = 0
    started: int = 0


class Replay:
    """Feed it every event with its block's time, in order."""

    def __init__(self) -> None:
        self.jobs: dict[int, Entry] = {}
        self.balances: Counter[str] = Counter()
        self.parked: Counter[str] = Counter()
        self.ids: dict[str, int] = {ZERO: 0}

    def feed(self, event: Event, time: int) -> None:
        handler = getattr(self, f"_on_{event.name}", None)
        if handler is not None:
            handler(event, time)

    def _on_Transfer(self, event: Event, _: int) -> None:  # noqa: N802
        self.balances[event.parameters["from"]] -= event.value
        self.balances[event.parameters["to"]] += event.value

    def _on_PaymentParked(self, event: Event, _: int) -> None:  # noqa: N802
        self.parked[event.recipient] += event.amount

    def _on_PaymentWithdrawn(self, event: Event, _: int) -> None:  # noqa: N802
        self.parked[event.recipient] -= event.amount

    def _on_ProviderRegistered(self, event: Event, _: int) -> None:  # noqa: N802
        self.ids[event.provider] = event.id

    def _on_JobSubmitted(self, event: Event, _: int) -> None:  # noqa: N802
        terms = event.terms
        self.jobs[event.jobId] = Entry(
            customer=event.customer,
            definition=event.definition,
            terms=terms,
            escrow=terms.amount,
            timeLimit=terms.timeLimit,
            retriesLeft=terms.retries,
            funded=terms.amount,
        )

    def _on_JobTransition(self, event: Event, time: int) -> None:  # noqa: N802
        job = self.jobs[event.jobId]
        assert job.status == event.parameters["from"]
        assert job.customer == event.customer
        job.status, job.since = event.to, time
        if event.to == S.RUNNING:
            job.started = time
        if event.to == S.PENDING:
            job.provider, job.rate, job.feeBps = ZERO, 0, 0
        else:
            job.provider = event.provider

    def _on_JobPriced(self, event: Event, _: int) -> None:  # noqa: N802
        job = self.jobs[event.jobId]
        assert job.provider == event.provider
        job.rate, job.feeBps = event.rate, event.feeBps

    def _on_JobToppedUp(self, event: Event, _: int) -> None:  # noqa: N802
        job = self.jobs[event.jobId]
        assert job.escrow + event.amount == event.escrow
        job.escrow, job.timeLimit = event.escrow, event.timeLimit
        job.funded += event.amount

    def _on_JobSettled(self, event: Event, _: int) -> None:  # noqa: N802
        job = self.jobs[event.jobId]
        assert event.paid + event.fee + event.refunded == job.escrow
        job.escrow = event.paid + event.fee
        job.used += event.paid + event.fee
        job.paid_out += event.paid + event.fee + event.refunded

    def _on_JobCollected(self, event: Event, time: int) -> None:  # noqa: N802
        job = self.jobs[event.jobId]
        assert (job.provider, job.customer) == (event.provider, event.customer)
        assert event.paid + event.fee + event.escrow == job.escrow
        job.escrow, job.timeLimit, job.since = event.escrow, event.timeLimit, time
        job.used += event.paid + event.fee
        job.paid_out += event.paid + event.fee

    def _on_JobRetried(self, event: Event, _: int) -> None:  # noqa: N802
        old = self.jobs[event.jobId]
        assert event.escrow == old.escrow
        self.jobs[event.successor] = Entry(
            customer=old.customer,
            definition=old.definition,
            terms=old.terms,
            escrow=event.escrow,
            timeLimit=old.timeLimit,
            retriesLeft=old.retriesLeft - 1,
            retryOf=event.jobId,
            carried_in=event.escrow,
        )
        old.escrow = 0
        old.carried_out = event.escrow

    def differences(self, job_id: int, record: Any) -> list[str]:
        """Return the fields in which a record in storage differs from the events."""
        job = self.jobs[job_id]
        terms = job.terms
        replayed = {
            "customer": job.customer,
            "status": job.status,
            "since": job.since,
            "providerId": self.ids[job.provider],
            "memPerCpu": terms.memPerCpu,
            "retriesLeft": job.retriesLeft,
            "flags": terms.flags | (SUCCESSOR if job.retryOf else 0),
            "escrow": job.escrow,
            "rate": job.rate,
            "timeLimit": job.timeLimit,
            "tasks": terms.tasks,
            "cpusPerTask": terms.cpusPerTask,
            "gpus": terms.gpus,
            "feeBps": job.feeBps,
            "definition": job.definition,
            "retryOf": job.retryOf,
        }
        assert set(replayed) == set(record._fields)
        return [
            f"job {job_id}: {name} is {getattr(record, name)!r}, events say {value!r}"
            for name, value in replayed.items()
            if getattr(record, name) != value
        ]
