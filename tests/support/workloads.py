"""Providers and jobs in memory, with defaults for all fields that a test does not set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deepsquare_chain.credits import CREDIT
from deepsquare_chain.job import (
    Hardware,
    Job,
    JobFlags,
    JobStatus,
    Objective,
    Offer,
    Prices,
    Provider,
    ProviderStatus,
    Resources,
)
from deepsquare_chain.metascheduler.eligibility import ProviderView, Waiting

NOW = 1_800_000_000


def address(number: int) -> str:
    """Return the address of a number."""
    return f"0x{number:040x}"


def provider(
    number: int = 1,
    *,
    cpus: int = 8,
    memory: int = 8_000,
    gpus: int = 2,
    price: int = 1_000,
    labels: Mapping[str, str] | None = None,
    silent: bool = False,
    challenged: bool = False,
    **changes: Any,
) -> ProviderView:
    """Return an approved provider with one node."""
    defaults = {
        "id": number,
        "account": address(number),
        "status": ProviderStatus.ACTIVE,
        "approved_until": NOW + 10**8,
        "version": 1,
        "pending_version": 1,
        "hardware": Hardware(1, cpus, memory, gpus),
        "offer": Offer(cpus, memory, gpus),
        "prices": Prices(price, price, 0),
        "labels": labels or {},
    }
    return ProviderView(Provider(**(defaults | changes)), silent, challenged)


def job(
    number: int = 1,
    *,
    cpus: int = 1,
    tasks: int = 1,
    mem_per_cpu: int = 100,
    gpus: int = 0,
    **changes: Any,
) -> Job:
    """Return a PENDING job of one minute and one credit."""
    defaults = {
        "id": number,
        "customer": address(10**6),
        "status": JobStatus.PENDING,
        "since": NOW,
        "provider_id": 0,
        "resources": Resources(tasks, cpus, mem_per_cpu, gpus),
        "retries_left": 0,
        "flags": JobFlags.NONE,
        "escrow": CREDIT,
        "rate": 0,
        "time_limit": 60,
        "fee_bps": 0,
        "definition": bytes(32),
        "retry_of": 0,
    }
    return Job(**(defaults | changes))


def waiting(
    number: int = 1,
    *,
    objective: Objective = Objective.COST,
    uses: str = "",
    queued_at: int | None = None,
    excluded: frozenset[int] = frozenset(),
    avoided: Mapping[int, int] | None = None,
    **changes: Any,
) -> Waiting:
    """Return a queued job."""
    record = job(number, **changes)
    since = record.since if queued_at is None else queued_at
    return Waiting(record, objective, uses, since, excluded, avoided or {})


def running(number: int, provider_id: int = 1, **changes: Any) -> Job:
    """Return a job that has been running since `NOW`."""
    defaults = {"status": JobStatus.RUNNING, "provider_id": provider_id, "rate": 1_000}
    return job(number, **(defaults | changes))
