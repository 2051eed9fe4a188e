"""Which waiting jobs must not be assigned now: dependencies, throttled arrays, times of start.

Pure; applied before the policy, which never sees a job that is held.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache

from deepsquare_chain.job import CONDITION_PREFIX, Conditions, Job, JobStatus, parse_conditions


@dataclass(frozen=True, slots=True)
class Hold:
    """Why a waiting job is not assigned; `final` when its condition can't hold any more."""

    text: str
    final: bool = False


def chain_time(at: int) -> str:
    """Chain time for people; far futures have no date."""
    if at >= datetime.max.replace(tzinfo=UTC).timestamp() - 1:
        return "no foreseeable time"
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M:%S} UTC"


@lru_cache(maxsize=4096)
def conditions(uses: str) -> Conditions | None:
    """The conditions of a job, None where they can't be read: such a job is never assigned.

    Requirements that can't be read, without a condition among them, are left to the policy.
    """
    try:
        return parse_conditions(uses)
    except ValueError:
        return None if CONDITION_PREFIX in uses else Conditions()


def dependencies(uses: Iterable[str]) -> set[int]:
    """Ids of all jobs that others wait for."""
    return {number for text in uses for _, number in (conditions(text) or Conditions()).after}


def held(
    waiting: Iterable[tuple[Job, str]],
    assigned: Iterable[tuple[Job, str]],
    ends: Mapping[int, JobStatus],
    now: int,
) -> dict[int, Hold]:
    """The waiting jobs that must not be assigned now.

    Args:
        waiting: PENDING jobs, each with its `uses`.
        assigned: Jobs that are with providers, each with its `uses`.
        ends: How the jobs that others depend on ended, by id; one that was retried ended as the
            last of its line did. Jobs that have not ended are left out.
        now: Chain time in seconds.
    """
    found: dict[int, Hold] = {}
    busy = Counter(_group(job, uses) for job, uses in assigned)
    for job, uses in sorted(waiting, key=lambda each: each[0].id):
        wanted = conditions(uses)
        hold = _unmet(job, wanted, ends) or _at_another_time(job, wanted, now)
        if hold is None and wanted is not None and wanted.throttle:
            group = _group(job, uses)
            if busy[group] >= wanted.throttle:
                hold = Hold(
                    f"{busy[group]} jobs of {wanted.array} are at providers or go before it, and "
                    f"no more than {wanted.throttle} may be at once"
                )
            busy[group] += 1
        if hold is not None:
            found[job.id] = hold
    return found


def _group(job: Job, uses: str) -> tuple[str, str]:
    """The array of a job; ids of submissions are chosen by customers, so each has its own."""
    wanted = conditions(uses)
    return (job.customer, wanted.array if wanted else "")


def _at_another_time(job: Job, wanted: Conditions | None, now: int) -> Hold | None:
    if wanted is None:
        return None
    # A retried job has started once, which is what its customer asked for.
    if wanted.start_before and now >= wanted.start_before and not job.retry_of:
        return Hold(f"it was to start before {chain_time(wanted.start_before)}", final=True)
    if now < wanted.start_after:
        return Hold(f"it starts at {chain_time(wanted.start_after)} at the earliest")
    return None


def _unmet(job: Job, wanted: Conditions | None, ends: Mapping[int, JobStatus]) -> Hold | None:
    if wanted is None:
        return Hold("its conditions can't be read", final=True)
    waits: list[int] = []
    for kind, number in wanted.after:
        if number >= (job.retry_of or job.id):
            return Hold(f"it depends on job {number}, which is not an earlier job", final=True)
        end = ends.get(number)
        if end is None:
            waits.append(number)
        elif not kind.holds(end):
            return Hold(
                f"it was to run {kind}:{number}, and job {number} ended {end.name}", final=True
            )
    if not waits:
        return None
    shown = ", ".join(map(str, waits[:5])) + (" ..." if len(waits) > 5 else "")
    return Hold(f"it waits for the end of job{'s' * (len(waits) > 1)} {shown}")
