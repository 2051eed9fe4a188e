"""When a waiting job is expected to start, by playing the policy forward. Pure.

Jobs run for what finished runs make us expect, at the speed that labels claim; nothing else is
submitted meanwhile. An expectation, not a promise: the latest time of a reservation is the bound.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, replace
from typing import Final

from deepsquare_chain.job import Job, JobStatus, Terms
from deepsquare_chain.metascheduler.eligibility import Waiting, run_time
from deepsquare_chain.metascheduler.history import RunHistory
from deepsquare_chain.metascheduler.policy import Planner, Rules, Snapshot, plan
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


@dataclass(frozen=True, slots=True)
class Prospect:
    """What a job would meet if it were submitted now: its place in a queue of `length` jobs, itself
    included, and its forecast; None where they are not known. `now` is chain time.
    """

    now: int
    place: int | None
    length: int
    forecast: Forecast | None

    @property
    def starts_in(self) -> dict[int, int]:
        """Seconds until the expected start, at the provider where it is expected."""
        found = self.forecast
        return {} if found is None else {found.provider_id: max(0, found.at - self.now)}

    @property
    def text(self) -> str:
        """All of it in a sentence."""
        if self.place is None:
            queue = f"{self.length - 1} jobs wait"
        else:
            queue = f"it would be number {self.place} of {self.length} in the queue"
        if self.forecast is None:
            return f"Now {queue}; when it would start is not known."
        provider = self.forecast.provider_id
        seconds = self.starts_in[provider]
        when = f"in about {seconds} s" if seconds else "at once"
        return (
            f"Now {queue}, and is expected to start {when} at provider {provider}, if nothing else "
            "is submitted meanwhile."
        )


def prospect(snapshot: Snapshot, rules: Rules, history: RunHistory, terms: Terms) -> Prospect:
    """What a job of an unknown customer would meet; its conditions are left aside."""
    known = [each.job.id for each in snapshot.waiting] + [each.id for each in snapshot.assigned]
    job = Job(
        id=1 + max(known, default=0),
        customer="",
        status=JobStatus.PENDING,
        since=snapshot.now,
        provider_id=0,
        resources=terms.resources,
        retries_left=terms.retries,
        flags=terms.flags,
        escrow=terms.amount,
        rate=0,
        time_limit=terms.time_limit,
        fee_bps=0,
        definition=b"",
        retry_of=0,
    )
    added = Waiting(job, terms.objective, terms.uses, snapshot.now)
    snapshot = replace(snapshot, waiting=[*snapshot.waiting, added])
    place = plan(snapshot, rules, history).ranking.place(job.id)
    return Prospect(
        snapshot.now, place, len(snapshot.waiting), forecast(snapshot, rules, history, job.id)
    )


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
