"""Discrete-event simulation of a workload under the real policy, or under a baseline.

A baseline is a set of clusters with separate queues, each served with EASY backfilling (Lifka,
JSSPP 1995): the first job that does not fit gets a reservation at the earliest time at which enough
CPUs are free by time limits. Other jobs start earlier if that does not delay it.

The policy is simulated with or without chain delay. Without it, a job starts when it is assigned.
With blocks of b seconds, as on a chain, the scheduler sees a submission in the next block, a job
starts three blocks after the plan that assigned it, and the scheduler sees its end in the block
after the end.
"""

from __future__ import annotations

import heapq
import math
import random
from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from deepsquare_chain.credits import CREDIT
from deepsquare_chain.errors import UsageError
from deepsquare_chain.job import Conditions, Job, JobFlags, JobStatus, Resources, Terms
from deepsquare_chain.metascheduler.eligibility import ProviderView, Waiting
from deepsquare_chain.metascheduler.forecast import pending_job
from deepsquare_chain.metascheduler.history import FinishedRun, RunHistory
from deepsquare_chain.metascheduler.policy import Planner, Rules, Snapshot
from deepsquare_chain.metascheduler.provider_labels import relative_speeds
from deepsquare_chain.metascheduler.simulation.workload import TraceJob
from deepsquare_chain.workflow.checks import AMOUNT_MAX


@dataclass(frozen=True, slots=True)
class SimulatedRun:
    """The provider and times of a job's run: `provider` counts from 0, times are in seconds."""

    job: TraceJob
    provider: int
    start: float
    end: float

    @property
    def wait(self) -> float:
        """Seconds from the submission to the start."""
        return self.start - self.job.at


#: Sort key of a queue; smallest first.
Order = Callable[[TraceJob], tuple[float, ...]]


def smallest_area_first(job: TraceJob) -> tuple[float, ...]:
    """Order by CPUs x time limit."""
    return (job.cpus * job.limit, job.at, job.id)


def first_come_first_served(job: TraceJob) -> tuple[float, ...]:
    """Order by time of submission."""
    return (job.at, job.id)


@dataclass(slots=True)
class Cluster:
    """A cluster with CPUs of one speed, a queue, and running jobs by the end of their limits."""

    cpus: int
    speed: float
    order: Order
    free: int = 0
    queue: list[tuple[tuple[float, ...], TraceJob]] = field(default_factory=list)
    running: list[tuple[float, int, int]] = field(default_factory=list)
    #: CPUs, and CPU seconds by time limits, of running and queued jobs.
    occupied: int = 0
    queued_area: float = 0.0
    end_area: float = 0.0
    busy: int = 0

    def __post_init__(self) -> None:
        self.free = self.cpus

    def submit(self, job: TraceJob) -> None:
        """Queue a job."""
        insort(self.queue, (self.order(job), job))
        self.occupied += job.cpus
        self.queued_area += job.cpus * job.limit

    def remaining(self, now: float) -> float:
        """Return the CPU seconds of running and queued jobs that remain, by time limits."""
        return self.queued_area + self.end_area - now * self.busy

    def start_what_fits(self, now: float) -> list[TraceJob]:
        """Start jobs by EASY backfilling; return them."""
        queue, started = self.queue, []
        position = 0
        while position < len(queue) and queue[position][1].cpus <= self.free:
            started.append(queue[position][1])
            self._begin(queue[position][1], now)
            position += 1
        del queue[:position]
        if not queue or not self.free:
            return started
        shadow, extra = self._reservation(queue[0][1].cpus)
        position, free = 1, self.free
        while position < len(queue) and free:
            job = queue[position][1]
            if job.cpus <= free:
                ends_before = now + job.limit <= shadow
                if ends_before or job.cpus <= extra:
                    if not ends_before:
                        extra -= job.cpus
                    del queue[position]
                    started.append(job)
                    self._begin(job, now)
                    free = self.free
                    continue
            position += 1
        return started

    def _begin(self, job: TraceJob, now: float) -> None:
        self.free -= job.cpus
        self.busy += job.cpus
        end = now + job.limit
        insort(self.running, (end, job.id, job.cpus))
        self.queued_area -= job.cpus * job.limit
        self.end_area += job.cpus * end

    def finish(self, job: TraceJob, limit_end: float) -> None:
        """Release the CPUs of a job that ended."""
        self.free += job.cpus
        self.busy -= job.cpus
        self.occupied -= job.cpus
        self.end_area -= job.cpus * limit_end
        self.running.remove((limit_end, job.id, job.cpus))

    def _reservation(self, cpus: int) -> tuple[float, int]:
        free = self.free
        for end, _, released in self.running:
            free += released
            if free >= cpus:
                return end, free - cpus
        return float("inf"), 0


#: Returns the index of the cluster for a job at its submission.
Route = Callable[[TraceJob, Sequence[Cluster], float], int]


def to_the_only_one(_job: TraceJob, _clusters: Sequence[Cluster], _now: float) -> int:
    """Choose the first cluster."""
    return 0


def to_the_least_loaded(job: TraceJob, clusters: Sequence[Cluster], _now: float) -> int:
    """Choose the smallest ratio of CPUs of running and queued jobs to CPUs of the cluster."""
    loads = [
        (cluster.occupied / cluster.cpus, i)
        for i, cluster in enumerate(clusters)
        if job.cpus <= cluster.cpus
    ]
    return min(loads)[1]


def to_the_less_loaded_of_two(seed: int) -> Route:
    """Return a route to the less loaded of two clusters, drawn at random among those that fit."""
    rng = random.Random(f"two {seed}")  # noqa: S311 - a simulation, not a secret

    def route(job: TraceJob, clusters: Sequence[Cluster], _now: float) -> int:
        fitting = [i for i, cluster in enumerate(clusters) if job.cpus <= cluster.cpus]
        drawn = rng.sample(fitting, min(2, len(fitting)))
        return min((clusters[i].occupied / clusters[i].cpus, i) for i in drawn)[1]

    return route


def to_the_earliest_completion(job: TraceJob, clusters: Sequence[Cluster], now: float) -> int:
    """Choose the earliest end, if all earlier jobs use their limits and pack without gaps."""
    ends = []
    for i, cluster in enumerate(clusters):
        if job.cpus > cluster.cpus:
            continue
        fits = not cluster.queue and job.cpus <= cluster.free
        wait = 0.0 if fits else cluster.remaining(now) / cluster.cpus
        ends.append((wait + job.limit / cluster.speed, i))
    return min(ends)[1]


def run_clusters(
    jobs: Sequence[TraceJob], clusters: Sequence[Cluster], route: Route
) -> list[SimulatedRun]:
    """Run a workload to its end; return the runs in order of submission."""
    ends: list[tuple[float, int, int, float]] = []
    outcomes: dict[int, SimulatedRun] = {}
    by_id = {job.id: job for job in jobs}
    next_job = 0
    while next_job < len(jobs) or ends:
        now = min(
            jobs[next_job].at if next_job < len(jobs) else float("inf"),
            ends[0][0] if ends else float("inf"),
        )
        touched = set()
        while ends and ends[0][0] <= now:
            _, job_id, index, limit_end = heapq.heappop(ends)
            clusters[index].finish(by_id[job_id], limit_end)
            touched.add(index)
        while next_job < len(jobs) and jobs[next_job].at <= now:
            index = route(jobs[next_job], clusters, now)
            clusters[index].submit(jobs[next_job])
            touched.add(index)
            next_job += 1
        for index in sorted(touched):
            cluster = clusters[index]
            for job in cluster.start_what_fits(now):
                end = now + job.run_at(cluster.speed)
                outcomes[job.id] = SimulatedRun(job, index, now, end)
                heapq.heappush(ends, (end, job.id, index, now + job.limit))
    return [outcomes[job.id] for job in jobs]


#: Blocks from the plan that assigns a job to its start.
_BLOCKS_TO_START: Final = 3
_ARRIVAL, _BEGIN, _SEEN, _HOLD_ENDS = range(4)


def run_policy(
    jobs: Sequence[TraceJob],
    views: Sequence[ProviderView],
    speeds: Sequence[float],
    rules: Rules,
    *,
    block: float = 0.0,
    progress: Callable[[float], None] | None = None,
) -> list[SimulatedRun]:
    """Run a workload to its end; return the runs in order of submission.

    Args:
        jobs: Jobs in order of submission.
        views: Providers by ascending ID.
        speeds: True speed of each provider, in the workload's unit.
        rules: Rules of the policy.
        block: Seconds between blocks; 0 for no delay.
        progress: Called every 500 steps with the part of jobs that have started.

    Raises:
        UsageError: A job can run at no provider, because of its size or the prices.
    """
    return _Simulation(jobs, views, speeds, rules=rules, block=block, progress=progress).run()


class _Simulation:
    def __init__(
        self,
        jobs: Sequence[TraceJob],
        views: Sequence[ProviderView],
        speeds: Sequence[float],
        *,
        rules: Rules,
        block: float,
        progress: Callable[[float], None] | None,
    ) -> None:
        self._jobs = {job.id: job for job in jobs}
        self._views = tuple(views)
        self._indexes = {view.provider.id: index for index, view in enumerate(views)}
        self._speeds = speeds
        self._prices = [view.provider.prices.cpu / CREDIT for view in views]
        self._relative = relative_speeds([view.provider.labels for view in views])
        self._rules = replace(rules, start_margin=math.ceil(_BLOCKS_TO_START * block))
        self._block = block
        self._progress = progress
        self._planner = Planner()
        self._history = RunHistory()
        self._waiting: dict[int, Waiting] = {}
        self._assigned: dict[int, Job] = {}
        # The same as tuples; None after a change. The planner skips a tuple that it has seen.
        self._waiting_seen: tuple[Waiting, ...] | None = None
        self._assigned_seen: tuple[Job, ...] | None = None
        self._events: list[tuple[float, int, int]] = [
            (self._seen_at(job.at), _ARRIVAL, job.id) for job in jobs
        ]
        heapq.heapify(self._events)
        # The next end of a hold for which a plan is due.
        self._hold_end = math.inf
        self._outcomes: dict[int, SimulatedRun] = {}

    def run(self) -> list[SimulatedRun]:
        events, total, cycles = self._events, len(self._jobs), 0
        while events:
            now, changed = events[0][0], False
            while events and events[0][0] <= now:
                changed |= self._apply_event(*heapq.heappop(events))
            if changed and self._waiting:
                self._plan(now)
            cycles += 1
            if self._progress is not None and cycles % 500 == 0:
                self._progress(len(self._outcomes) / total)
        if self._waiting:
            job = next(iter(self._waiting.values())).job
            raise UsageError(
                f"{len(self._waiting)} of {total} jobs can run at no provider, such as job {job.id}"
                f" with {job.resources.cpus} CPUs for {job.time_limit} s",
                hint="Give the grid a cluster that can run it, at a price that its record can hold.",
            )
        return [self._outcomes[job_id] for job_id in self._jobs]

    def _seen_at(self, at: float) -> float:
        """Return the time at which the scheduler sees an event."""
        if self._block <= 0:
            return at
        return (math.floor(at / self._block) + 1) * self._block

    def _apply_event(self, now: float, kind: int, job_id: int) -> bool:
        """Apply an event; return whether a plan should follow."""
        if kind == _ARRIVAL:
            self._waiting[job_id] = _waiting(self._jobs[job_id])
            self._waiting_seen = None
        elif kind == _BEGIN:
            self._assigned[job_id] = replace(
                self._assigned[job_id], status=JobStatus.RUNNING, since=math.floor(now)
            )
            self._assigned_seen = None
            return False
        elif kind == _HOLD_ENDS:
            self._hold_end = math.inf
        else:
            del self._assigned[job_id]
            self._assigned_seen = None
            self._record(job_id)
        return True

    def _record(self, job_id: int) -> None:
        outcome = self._outcomes[job_id]
        seconds = (outcome.end - outcome.start) * self._relative[outcome.provider]
        job = outcome.job
        paid = job.cpus * (outcome.end - outcome.start) * self._prices[outcome.provider]
        self._history.record(FinishedRun(job.customer, job.cpus, 0, job.limit, seconds, paid))

    def _plan(self, now: float) -> None:
        if self._waiting_seen is None:
            self._waiting_seen = tuple(self._waiting.values())
        if self._assigned_seen is None:
            self._assigned_seen = tuple(self._assigned.values())
        snapshot = Snapshot(math.floor(now), self._views, self._waiting_seen, self._assigned_seen)
        decided = self._planner.plan(snapshot, self._rules, self._history, complete=False)
        if decided.decisions:
            self._waiting_seen = self._assigned_seen = None
        for decision in decided.decisions:
            self._start(decision.waiting.job, decision.provider_id, decision.rate, now)
        hold_end = min(decided.holds.values(), default=math.inf)
        if hold_end < self._hold_end:
            self._hold_end = hold_end
            heapq.heappush(self._events, (self._seen_at(hold_end), _HOLD_ENDS, 0))

    def _start(self, record: Job, provider_id: int, rate: int, now: float) -> None:
        index = self._indexes[provider_id]
        job = self._jobs[record.id]
        begin = now + _BLOCKS_TO_START * self._block
        end = begin + job.run_at(self._speeds[index])
        del self._waiting[job.id]
        self._outcomes[job.id] = SimulatedRun(job, index, begin, end)
        status = JobStatus.META_SCHEDULED if self._block > 0 else JobStatus.RUNNING
        self._assigned[job.id] = replace(
            record, status=status, since=math.floor(now), provider_id=provider_id, rate=rate
        )
        if self._block > 0:
            heapq.heappush(self._events, (begin, _BEGIN, job.id))
        heapq.heappush(self._events, (self._seen_at(end), _SEEN, job.id))


def _waiting(job: TraceJob) -> Waiting:
    terms = Terms(
        amount=AMOUNT_MAX,
        time_limit=job.limit,
        resources=Resources(job.cpus, 1, job.memory, 0),
        retries=0,
        flags=JobFlags.NONE,
        objective=job.objective,
        name="",
        uses=Conditions(patience=job.patience).to_uses(),
    )
    submitted_at = math.floor(job.at)
    record = pending_job(job.id, job.customer, terms, submitted_at)
    return Waiting(record, terms.objective, terms.uses, submitted_at)
