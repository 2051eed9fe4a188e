"""Free capacity of providers, now and as running jobs release it. Pure.

Capacity is counted as (CPUs, MB of memory, GPUs).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

from deepsquare_chain.job import Job, JobStatus, Offer, Resources
from deepsquare_chain.metascheduler.eligibility import ProviderView, run_time

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
    available = list(free)
    at: int | None = None
    for time, released in sorted(releases):
        if at is not None and time > at:
            break
        for i, amount in enumerate(released):
            available[i] += amount
        if at is None and within(requested, available):
            at = time
    return None if at is None else (at, (available[0], available[1], available[2]))


def capacity_at(free: Sequence[int], releases: Iterable[Release], at: int) -> Amounts:
    """Return all capacity that is free at chain time `at` at the latest."""
    available = list(free)
    for time, released in releases:
        if time <= at:
            for i, amount in enumerate(released):
                available[i] += amount
    return available[0], available[1], available[2]
