"""Free room of providers now, and as running jobs will give it back. Pure.

Room is counted as (cpus, MB, gpus).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

from deepsquare_chain.job import Job, JobStatus, Offer, Resources
from deepsquare_chain.metascheduler.eligibility import ProviderView, run_time

Amounts: TypeAlias = tuple[int, int, int]

#: Chain time at which a job has left its provider at the latest, and what it gives back then.
Release: TypeAlias = tuple[int, Amounts]


def amounts(resources: Resources) -> Amounts:
    """What a job occupies."""
    return resources.cpus, resources.memory, resources.gpus


def within(wanted: Sequence[int], room: Sequence[int]) -> bool:
    """Whether there is enough of everything."""
    return wanted[0] <= room[0] and wanted[1] <= room[1] and wanted[2] <= room[2]


def less(room: Sequence[int], taken: Sequence[int]) -> Amounts:
    """What is left; negative where an offer was lowered below what runs."""
    return room[0] - taken[0], room[1] - taken[1], room[2] - taken[2]


def free_room(providers: Iterable[ProviderView], assigned: Iterable[Job]) -> dict[int, Amounts]:
    """Offer minus what assigned jobs hold, by provider id."""
    room = {view.provider.id: offered(view.provider.offer) for view in providers}
    for job in assigned:
        if job.provider_id in room:
            room[job.provider_id] = less(room[job.provider_id], amounts(job.resources))
    return room


def offered(offer: Offer) -> Amounts:
    """An offer as room."""
    return offer.cpus, offer.memory, offer.gpus


def release(job: Job, now: int, start_margin: int) -> Release:
    """When an assigned job leaves at the latest; one that does not run yet may start late."""
    allotted = run_time(job, job.rate)
    if job.status != JobStatus.RUNNING:
        return now + start_margin + allotted, amounts(job.resources)
    # Past its end it may be reported at any moment.
    return max(job.since + allotted, now + 1), amounts(job.resources)


def room_from(
    wanted: Amounts, free: Amounts, releases: Iterable[Release], now: int
) -> tuple[int, Amounts] | None:
    """The chain time from which there is room at the latest, and all that is free then.

    None where even all releases do not make enough.
    """
    if within(wanted, free):
        return now, free
    room = list(free)
    at: int | None = None
    for time, given in sorted(releases):
        if at is not None and time > at:
            break
        for i, amount in enumerate(given):
            room[i] += amount
        if at is None and within(wanted, room):
            at = time
    return None if at is None else (at, (room[0], room[1], room[2]))
