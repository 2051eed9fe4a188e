"""Eligibility of providers for a job, and their free capacity. Pure.

Eligibility combines the contract's checks and the customer's requirements. The checks run in the
contract's order, so that a refusal here names the error with which the contract would reject the
assignment. Capacity is counted as (CPUs, MB of memory, GPUs).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from typing import Final, TypeAlias

from deepsquare_chain import credits
from deepsquare_chain.job import (
    Affinity,
    Job,
    JobStatus,
    Objective,
    Offer,
    Provider,
    ProviderStatus,
    Resources,
    matches,
    parse_uses,
)

#: Largest rate that fits a job record.
MAX_RATE: Final = 2**72 - 1


class Refusal(StrEnum):
    """Reasons why a job can't go to a provider."""

    UNREADABLE_USES = "unreadable-uses"
    WAITING_APPROVAL = "waiting-approval"
    DRAINING = "draining"
    BANNED = "banned"
    EXPIRED = "expired"
    SILENT = "silent"
    CHALLENGED = "challenged"
    SUSPENDED = "suspended"
    COOLDOWN = "cooldown"
    EXCLUDED = "excluded"
    TOO_LARGE = "too-large"
    LABELS = "labels"
    RATE = "rate"
    BUDGET = "budget"
    AVOIDED = "avoided"


_INACTIVE: Final[Mapping[ProviderStatus, Refusal]] = {
    ProviderStatus.BANNED: Refusal.BANNED,
    ProviderStatus.DRAINING: Refusal.DRAINING,
}


@dataclass(frozen=True, slots=True)
class ProviderView:
    """The scheduler's view of a provider at one block.

    `silent`: it left a challenge unanswered for too long. `challenged`: it has an open challenge
    and gets no new jobs until it answers. `suspended_until`: chain time until which it gets no new jobs
    because of its `strikes` of the last day; zero for none. `cooldown_until`: chain time until
    which it gets no new jobs because the contract refused an assignment; zero for none.
    """

    provider: Provider
    silent: bool = False
    challenged: bool = False
    suspended_until: int = 0
    strikes: int = 0
    cooldown_until: int = 0


@dataclass(frozen=True, slots=True)
class Waiting:
    """A PENDING job, with data that only events and history carry.

    `queued_at` is the chain time at which the job, or the first job of its retries, began to wait.
    `excluded` are the ids of providers that lost a predecessor. `avoided` maps providers that
    returned the job, or let it time out, to the chain time from which they are tried again.
    """

    job: Job
    objective: Objective
    uses: str
    queued_at: int
    excluded: frozenset[int] = frozenset()
    avoided: Mapping[int, int] = field(default_factory=dict)


@lru_cache(maxsize=4096)
def demands(uses: str) -> tuple[Affinity, ...] | None:
    """Return the affinities of a job; None if they can't be parsed: the job matches no provider."""
    try:
        return parse_uses(uses)
    except ValueError:
        return None


def standing(view: ProviderView, now: int) -> Refusal | None:
    """Return why a provider gets no new jobs at all at chain time `now`, or None."""
    provider = view.provider
    if provider.status != ProviderStatus.ACTIVE:
        return _INACTIVE.get(provider.status, Refusal.WAITING_APPROVAL)
    if provider.approved_until <= now:
        return Refusal.EXPIRED
    if view.silent:
        return Refusal.SILENT
    if view.challenged:
        return Refusal.CHALLENGED
    if view.suspended_until > now:
        return Refusal.SUSPENDED
    return Refusal.COOLDOWN if view.cooldown_until > now else None


def eligible_rate(provider: Provider, job: Job, uses: str) -> int | Refusal:
    """Return a provider's rate (credit-wei per second) for a job, or why it can't run the job.

    Checks hardware, offer and labels, but not budget, exclusions and `standing`: the result holds
    for every job of the same resources and affinities.
    """
    affinities = demands(uses)
    if affinities is None:
        return Refusal.UNREADABLE_USES
    if not credits.fits(provider.hardware, provider.offer, job.resources):
        return Refusal.TOO_LARGE
    if not matches(affinities, provider.labels):
        return Refusal.LABELS
    rate = credits.job_rate(provider.prices, job.resources)
    return rate if 0 < rate <= MAX_RATE else Refusal.RATE


def affordable(job: Job, rate: int) -> bool:
    """Return whether the escrow covers the time limit at a rate."""
    return credits.cost(rate, job.time_limit) <= job.escrow


def highest_rate(job: Job) -> int:
    """Return the highest rate, in credit-wei per second, at which a job is affordable."""
    return job.escrow // max(job.time_limit, 1)


def refusal(waiting: Waiting, view: ProviderView, now: int) -> Refusal | None:
    """Return why a job can't go to a provider at chain time `now`, or None. Ignores its load."""
    reason = standing(view, now)
    if reason is not None:
        return reason
    if view.provider.id in waiting.excluded:
        return Refusal.EXCLUDED
    rate = eligible_rate(view.provider, waiting.job, waiting.uses)
    if isinstance(rate, Refusal):
        return rate
    if not affordable(waiting.job, rate):
        return Refusal.BUDGET
    if waiting.avoided.get(view.provider.id, 0) > now:
        return Refusal.AVOIDED
    return None


def run_time(job: Job, rate: int) -> int:
    """Return the most seconds that a job may run at a rate."""
    return credits.allotment(job.time_limit, job.until_spent, job.escrow, rate)


Amounts: TypeAlias = tuple[int, int, int]

#: Chain time at which a job has left its provider at the latest, and what it releases then.
Release: TypeAlias = tuple[int, Sequence[int]]


def amounts(resources: Resources) -> Amounts:
    """Return resources as amounts."""
    return resources.cpus, resources.memory, resources.gpus


def within(requested: Sequence[int], available: Sequence[int]) -> bool:
    """Return whether `available` suffices for all of `requested`."""
    return (
        requested[0] <= available[0]
        and requested[1] <= available[1]
        and requested[2] <= available[2]
    )


def less(available: Sequence[int], taken: Sequence[int]) -> Amounts:
    """Return what is left; negative if an offer was lowered below the load."""
    return available[0] - taken[0], available[1] - taken[1], available[2] - taken[2]


def available_capacity(
    providers: Iterable[ProviderView], assigned: Iterable[Job]
) -> dict[int, Amounts]:
    """Return the offer minus the resources of assigned jobs, by provider id."""
    available = {view.provider.id: offered(view.provider.offer) for view in providers}
    for job in assigned:
        if job.provider_id in available:
            available[job.provider_id] = less(available[job.provider_id], amounts(job.resources))
    return available


def offered(offer: Offer) -> Amounts:
    """Return an offer as amounts."""
    return offer.cpus, offer.memory, offer.gpus


def release(job: Job, now: int, start_margin: int) -> Release:
    """Return the latest release of an assigned job. One not running may take `start_margin`."""
    allotted = run_time(job, job.rate)
    if job.status != JobStatus.RUNNING:
        return now + start_margin + allotted, amounts(job.resources)
    # A job past its end may be reported as ended at any moment.
    return max(job.since + allotted, now + 1), amounts(job.resources)


def fits_from(
    requested: Amounts, free: Sequence[int], releases: Iterable[Release], now: int
) -> tuple[int, Amounts] | None:
    """Return the latest chain time from which `requested` fits, and all capacity that is free then.

    None if even all releases together do not suffice.
    """
    if within(requested, free):
        return now, (free[0], free[1], free[2])
    needed_cpus, needed_memory, needed_gpus = requested
    cpus, memory, gpus = free
    at: int | None = None
    for time, released in sorted(releases):
        if at is not None and time > at:
            break
        cpus += released[0]
        memory += released[1]
        gpus += released[2]
        if at is None and cpus >= needed_cpus and memory >= needed_memory and gpus >= needed_gpus:
            at = time
    return None if at is None else (at, (cpus, memory, gpus))


def capacity_at(free: Sequence[int], releases: Iterable[Release], at: int) -> Amounts:
    """Return all capacity that is free at chain time `at` at the latest."""
    available = list(free)
    for time, released in releases:
        if time <= at:
            for i, amount in enumerate(released):
                available[i] += amount
    return available[0], available[1], available[2]
