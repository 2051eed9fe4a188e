"""Forecast of a waiting job's start, by simulating the policy. Pure.

The simulation uses run times estimated from finished runs and speeds from labels, and assumes that
no other jobs are submitted. The forecast is an estimate; only a reservation is an upper bound.
`quote`, `job why` and the job page show the same `Prospect`.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from deepsquare_chain.job import Job, JobStatus, Terms
from deepsquare_chain.metascheduler.dependencies import conditions
from deepsquare_chain.metascheduler.eligibility import ProviderView, Waiting, run_time
from deepsquare_chain.metascheduler.history import RunHistory
from deepsquare_chain.metascheduler.policy import Planner, Rules, Snapshot, plan
from deepsquare_chain.metascheduler.provider_labels import relative_speeds

#: Longest queue that is forecast, and most plans per forecast.
MAX_QUEUE: Final = 2_000
MAX_PLANS: Final = 500
#: Part of its remaining limit that a run still takes if it is already longer than expected.
_REMAINING_PART: Final = 0.5
#: Part of a job's patience after which the forecast looks at it again.
_PATIENCE_STEP: Final = 0.1


@dataclass(frozen=True, slots=True)
class Forecast:
    """The provider and chain time at which a job is expected to start."""

    job_id: int
    provider_id: int
    at: int


@dataclass(frozen=True, slots=True)
class StartAccuracy:
    """The errors of forecasts of past starts of jobs that had to wait.

    Attributes:
        starts: Number of starts.
        median, p90: Median and 90th percentile of |forecast - actual start|, in seconds.
        relative: Median of the errors as parts of the actual waits.
    """

    starts: int
    median: int
    p90: int
    relative: float

    @property
    def text(self) -> str:
        """The accuracy as a clause."""
        if self.starts == 1:
            return (
                f"for the last job that had to wait, the forecast would have been off by "
                f"{self.median} s ({self.relative:.0%} of the wait)"
            )
        return (
            f"for the last {self.starts} jobs that had to wait, forecasts would have been off by "
            f"{self.median} s in the median ({self.relative:.0%} of the wait) and {self.p90} s at "
            "the 90th percentile"
        )


@dataclass(frozen=True, slots=True)
class Prospect:
    """The expected wait of a job that waits, or would if it were submitted now.

    Attributes:
        now: Chain time.
        place: Its place in the queue; None if unknown.
        length: Jobs in the queue, with this one.
        forecast: Its expected start; None if unknown.
        error: Factor by which estimates of recent run times were off; None without finished runs.
        starts: How far forecasts of recent starts would have been off; None if unknown.
    """

    now: int
    place: int | None
    length: int
    forecast: Forecast | None
    error: float | None = None
    starts: StartAccuracy | None = None

    @property
    def starts_in(self) -> dict[int, int]:
        """Seconds until the expected start, at the provider where it is expected."""
        expected = self.forecast
        return {} if expected is None else {expected.provider_id: max(0, expected.at - self.now)}

    @property
    def text(self) -> str:
        """The prospect as a sentence."""
        if self.place is None:
            queue = f"{self.length - 1} jobs are waiting"
        else:
            queue = f"it would be number {self.place} of {self.length} in the queue"
        if self.forecast is None:
            return f"Now {queue}; when it would start is not known."
        provider = self.forecast.provider_id
        seconds = self.starts_in[provider]
        when = f"in about {seconds} s" if seconds else "at once"
        return (
            f"Now {queue}, and is expected to start {when} at provider {provider}, if no other job "
            f"is submitted meanwhile. {self.reliability.capitalize()}."
        )

    @property
    def reliability(self) -> str:
        """How good past estimates were, as a clause."""
        clauses = [] if self.starts is None else [self.starts.text]
        if self.error is not None:
            clauses.append(
                f"estimates of recent run times were off by a factor of {self.error:.1f} on average"
            )
        return "; ".join(clauses) or "no finished run shows yet how accurate such estimates are"


def prospect_of(
    snapshot: Snapshot,
    rules: Rules,
    history: RunHistory,
    job_id: int,
    *,
    starts: StartAccuracy | None = None,
) -> Prospect:
    """Return the prospect of a waiting job."""
    return Prospect(
        snapshot.now,
        plan(snapshot, rules, history).ranking.place(job_id),
        len(snapshot.waiting),
        forecast(snapshot, rules, history, job_id),
        history.typical_error,
        starts,
    )


def prospect(
    snapshot: Snapshot,
    rules: Rules,
    history: RunHistory,
    terms: Terms,
    *,
    starts: StartAccuracy | None = None,
) -> Prospect:
    """Return the prospect of a job of an unknown customer; conditions of the job are ignored."""
    known = [waiting.job.id for waiting in snapshot.waiting]
    known += [job.id for job in snapshot.assigned]
    job = pending_job(1 + max(known, default=0), "", terms, snapshot.now)
    added = Waiting(job, terms.objective, terms.uses, snapshot.now)
    snapshot = replace(snapshot, waiting=[*snapshot.waiting, added])
    return prospect_of(snapshot, rules, history, job.id, starts=starts)


def pending_job(job_id: int, customer: str, terms: Terms, since: int) -> Job:
    """Return the record of a job that was submitted at chain time `since`."""
    return Job(
        id=job_id,
        customer=customer,
        status=JobStatus.PENDING,
        since=since,
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


def forecast(snapshot: Snapshot, rules: Rules, history: RunHistory, job_id: int) -> Forecast | None:
    """Return the expected start of a waiting job if no other job is submitted; None if unknown."""
    if len(snapshot.waiting) > MAX_QUEUE:
        return None
    views = sorted(snapshot.providers, key=lambda view: view.provider.id)
    provider_ids = [view.provider.id for view in views]
    labels = [view.provider.labels for view in views]
    speeds = dict(zip(provider_ids, relative_speeds(labels), strict=True))
    waiting = {entry.job.id: entry for entry in snapshot.waiting}
    assigned = {job.id: job for job in snapshot.assigned}
    planner, now = Planner(), snapshot.now
    ends = [
        (_end(job, now, speeds.get(job.provider_id, 1.0), history), job.id)
        for job in assigned.values()
    ]
    heapq.heapify(ends)
    for _ in range(MAX_PLANS):
        snapshot = Snapshot(now, views, tuple(waiting.values()), tuple(assigned.values()))
        decided = planner.plan(snapshot, rules, history, complete=False)
        for decision in decided.decisions:
            job = decision.waiting.job
            if job.id == job_id:
                return Forecast(job_id, decision.provider_id, now + rules.start_margin)
            del waiting[job.id]
            assigned[job.id] = replace(
                job,
                status=JobStatus.RUNNING,
                since=now + rules.start_margin,
                provider_id=decision.provider_id,
                rate=decision.rate,
            )
            speed = speeds[decision.provider_id]
            heapq.heappush(ends, (_end(assigned[job.id], now, speed, history), job.id))
        times = [*(end for end, _ in ends[:1]), *decided.holds.values()]
        later = min((*times, *_returns(views, waiting.values(), now)), default=None)
        if later is None:
            return None
        now = max(now + 1, later)
        while ends and ends[0][0] <= now:
            del assigned[heapq.heappop(ends)[1]]
    return None


def _returns(views: Sequence[ProviderView], waiting: Iterable[Waiting], now: int) -> Iterator[int]:
    """Yield the later times at which a provider or a more expensive one may get waiting jobs."""
    for view in views:
        yield from (at for at in (view.suspended_until, view.cooldown_until) if at > now)
    for entry in waiting:
        yield from (at for at in entry.avoided.values() if at > now)
        job_conditions = conditions(entry.uses)
        if job_conditions is not None and job_conditions.patience:
            yield now + max(1, round(_PATIENCE_STEP * job_conditions.patience))


def _end(job: Job, now: int, speed: float, history: RunHistory) -> int:
    """Return the chain time, after `now`, at which an assigned job is expected to end."""
    size = job.resources
    estimate = history.estimate(job.customer, size.cpus, size.gpus, job.time_limit)
    allotted = run_time(job, job.rate)
    begin = job.since if job.status is JobStatus.RUNNING else now
    expected = begin + min(allotted, max(1, round(estimate.used * job.time_limit / speed)))
    if expected <= now:
        expected = now + round(_REMAINING_PART * max(0, begin + allotted - now))
    return max(now + 1, expected)
