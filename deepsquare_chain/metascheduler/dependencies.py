"""Holds of waiting jobs: dependencies, throttled arrays, start times. Pure.

Holds are applied before the policy, which never gets a job that is held.
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
    """The reason why a waiting job is held; `final` if its condition can never be met."""

    text: str
    final: bool = False


def chain_time(at: int) -> str:
    """Return a chain time as UTC text; times beyond year 9999 have no date."""
    if at >= datetime.max.replace(tzinfo=UTC).timestamp() - 1:
        return "no foreseeable time"
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M:%S} UTC"


@lru_cache(maxsize=4096)
def conditions(uses: str) -> Conditions | None:
    """Return the conditions of a job; None if they can't be parsed: the job is never assigned.

    Requirements that can't be parsed but contain no condition are left to the policy.
    """
    try:
        return parse_conditions(uses)
    except ValueError:
        return None if CONDITION_PREFIX in uses else Conditions()


def dependencies(uses: Iterable[str]) -> set[int]:
    """Return the ids of all jobs that others depend on."""
    return {number for text in uses for _, number in (conditions(text) or Conditions()).after}


def held(
    waiting: Iterable[tuple[Job, str]],
    assigned: Iterable[tuple[Job, str]],
    ends: Mapping[int, JobStatus],
    now: int,
) -> dict[int, Hold]:
    """Return the waiting jobs that must not be assigned now, with the reason.

    Args:
        waiting: PENDING jobs, each with its `uses`.
        assigned: Jobs at providers, each with its `uses`.
        ends: Final status, by id, of jobs that others depend on; a retried job has that of its
            last successor. Jobs that have not ended are left out.
        now: Chain time in seconds.
    """
    holds: dict[int, Hold] = {}
    busy = Counter(_group(job, uses) for job, uses in assigned)
    for job, uses in sorted(waiting, key=lambda entry: entry[0].id):
        requested = conditions(uses)
        hold = _unmet(job, requested, ends) or _unmet_time(job, requested, now)
        if hold is None and requested is not None and requested.throttle:
            group = _group(job, uses)
            if busy[group] >= requested.throttle:
                hold = Hold(
                    f"{busy[group]} jobs of {requested.array} are at providers or before it in the queue, "
                    f"and no more than {requested.throttle} may be at once"
                )
            busy[group] += 1
        if hold is not None:
            holds[job.id] = hold
    return holds


def _group(job: Job, uses: str) -> tuple[str, str]:
    """Return the key of a job's array: with the customer, since customers choose array names."""
    requested = conditions(uses)
    return (job.customer, requested.array if requested else "")


def _unmet_time(job: Job, requested: Conditions | None, now: int) -> Hold | None:
    if requested is None:
        return None
    # A retried job has started once already, which satisfies its start condition.
    if requested.start_before and now >= requested.start_before and not job.retry_of:
        return Hold(f"it had to start before {chain_time(requested.start_before)}", final=True)
    if now < requested.start_after:
        return Hold(f"it starts at {chain_time(requested.start_after)} at the earliest")
    return None


def _unmet(job: Job, requested: Conditions | None, ends: Mapping[int, JobStatus]) -> Hold | None:
    if requested is None:
        return Hold("its conditions are invalid", final=True)
    unfinished: list[int] = []
    for kind, number in requested.after:
        if number >= (job.retry_of or job.id):
            return Hold(f"it depends on job {number}, which is not an earlier job", final=True)
        end = ends.get(number)
        if end is None:
            unfinished.append(number)
        elif not kind.holds(end):
            return Hold(
                f"its condition is {kind}:{number}, but job {number} ended {end.name}", final=True
            )
    if not unfinished:
        return None
    shown = ", ".join(map(str, unfinished[:5])) + (" ..." if len(unfinished) > 5 else "")
    return Hold(f"it waits for the end of job{'s' * (len(unfinished) > 1)} {shown}")
