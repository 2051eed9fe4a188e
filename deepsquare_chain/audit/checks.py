"""Verifies a ledger, and compares it with the contracts' storage. Pure.

The comparison with storage also proves that the events are complete.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from deepsquare_chain.audit.entries import AuditFinding, Totals
from deepsquare_chain.audit.ledger import Ledger
from deepsquare_chain.job import Job, Load, Provider


@dataclass(frozen=True, slots=True)
class Storage:
    """The contracts' storage at one block, as fetched by `reader.read_storage`.

    `loads` are the loads of providers by account.
    """

    block: int
    jobs: Sequence[Job]
    providers: Sequence[Provider]
    balances: Mapping[str, int]
    parked: Mapping[str, int]
    supply: int
    loads: Mapping[str, Load]


@dataclass(frozen=True, slots=True)
class Audit:
    """The result of verifying a ledger. `compared` tells whether storage was compared."""

    block: int
    totals: Totals
    findings: tuple[AuditFinding, ...]
    compared: bool

    @property
    def difference(self) -> int:
        """Credit-wei that the scheduler holds without an owner; must be zero."""
        return self.totals.difference

    @property
    def ok(self) -> bool:
        """Whether there are no findings and no difference."""
        return not self.findings and self.difference == 0


def verify(ledger: Ledger, storage: Storage | None = None) -> Audit:
    """Verify a ledger, and compare it with the contracts' storage if that is given."""
    findings = list(ledger.findings)
    if storage is not None:
        findings += compare(ledger, storage)
    return Audit(ledger.block, ledger.totals, tuple(findings), storage is not None)


def compare(ledger: Ledger, storage: Storage) -> list[AuditFinding]:
    """Return a finding for each difference between ledger and storage, both at the same block."""
    findings: list[AuditFinding] = []

    def compare_values(subject: str, from_events: object, stored: object, job_id: int = 0) -> None:
        if from_events != stored:
            message = f"{subject}: events say {from_events}, storage says {stored}"
            findings.append(AuditFinding("storage", message, storage.block, "", job_id))

    def compare_fields(subject: str, from_events: Any, stored: Any, job_id: int = 0) -> None:
        for field in fields(stored):
            values = getattr(from_events, field.name), getattr(stored, field.name)
            compare_values(f"{field.name} of {subject}", *values, job_id)

    ids = ledger.provider_ids
    compare_values("number of jobs", len(ledger.jobs), len(storage.jobs))
    for job in storage.jobs:
        if (entry := ledger.jobs.get(job.id)) is not None:
            compare_fields(f"job {job.id}", entry.record(ids), job, job.id)
    compare_values("number of providers", len(ids), len(storage.providers))
    for provider in storage.providers:
        if (provider_entry := ledger.providers.get(provider.account)) is not None:
            compare_fields(f"provider {provider.account}", provider_entry.record(), provider)
    for account, amount in sorted(storage.balances.items()):
        compare_values(f"balance of {account}", ledger.balances.get(account, 0), amount)
    for account, amount in sorted(storage.parked.items()):
        compare_values(f"parked credits of {account}", ledger.parked.get(account, 0), amount)
    for account, load in sorted(storage.loads.items()):
        if (provider_entry := ledger.providers.get(account)) is not None:
            compare_fields(f"the load of {account}", provider_entry.load, load)
    compare_values("supply of credits", ledger.totals.supply, storage.supply)
    return findings
