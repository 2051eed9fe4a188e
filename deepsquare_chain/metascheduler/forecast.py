"""When a waiting job is expected to start, by playing the policy forward. Pure.

Jobs run for what finished runs make us expect, at the speed that labels claim; nothing else is
submitted meanwhile. An expectation, not a promise: the latest time of a reservation is the bound.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, replace
from typing import Final

from deepsquare_chain.job import Job, JobStatus
from deepsquare_chain.metascheduler.eligibility import run_time
from deepsquare_chain.metascheduler.history import RunHistory
from deepsquare_chain.metascheduler.policy import Planner, Rules, Snapshot
from deepsquare_chain.metascheduler.ranking import relative_speeds

#: Waiting jobs above which nothing is forecast, and plans after which one is given up.
MAX_QUEUE: Final = 2_000
MAX_PLANS: Final = 500
#: Of a run that is longer than expected, the part of the rest of its limit that it still takes.
_REST: Final = 0.5


@dataclass(frozen=True, slots=True)
class Forecast:
    """Where and at what chain time a job is expected to start."""

    job_id: int
    provider_id: int
    at: int


def forecast(snapshot: Snapshot, rules: Rules, history: RunHistory, job_id: int) -> Forecast | None:
    """When a waiting job starts, if nothing else is submitted; None where that is not known."""
    if len(snapshot.waiting) > MAX_QUEUE:
        return None
    views = sorted(snapshot.providers, key=lambda view: view.provider.id)
    speeds = dict(
        zip(
            (view.provider.id for view in views),
            relative_speeds([view.provider.labels for view in views]),
            strict=True,
        )
    )
    waiting = {each.job.id: each for each in snapshot.waiting}
    held = {job.id: job for job in snapshot.assigned}
    ends = [
        (_end(job, snapshot.now, speeds.get(job.provider_id, 1.0), history), job.id)
        for job in held.values()
    ]
    heapq.heapify(ends)
    planner, now = Planner(), snapshot.now
    for _ in range(MAX_PLANS):
        snapshot = Snapshot(now, views, tuple(waiting.values()), tuple(held.values()))
        decided = planner.plan(snapshot, rules, history, complete=False)
        for decision in decided.decisions:
            job = decision.waiting.job
            if job.id == job_id:
                return Forecast(job_id, decision.provider_id, now + rules.start_margin)
            del waiting[job.id]
            held[job.id] = replace(
                job,
                status=JobStatus.RUNNING,
                since=now + rules.start_margin,
                provider_id=decision.provider_id,
                rate=decision.rate,
            )
            speed = speeds[decision.provider_id]
            heapq.heappush(ends, (_end(held[job.id], now, speed, history), job.id))
        if not ends:
            return None
        now = max(now, ends[0][0])
        while ends and ends[0][0] <= now:
            del held[heapq.heappop(ends)[1]]
    return None


def _end(job: Job, now: int, speed: float, history: RunHistory) -> int:
    """When an assigned job is expected to end; after `now`."""
    size = job.resources
    estimate = history.estimate(job.customer, size.cpus, size.gpus, job.time_limit)
    allotted = run_time(job, job.rate)
    begin = job.since if job.status is JobStatus.RUNNING else now
    expected = begin + min(allotted, max(1, round(estimate.used * job.time_limit / speed)))
    if expected <= now:
        expected = now + round(_REST * max(0, begin + allotted - now))
    return max(now + 1, expected)
