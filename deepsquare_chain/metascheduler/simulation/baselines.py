"""Baselines: clusters with queues of their own, each served with EASY backfilling.

EASY (Lifka, JSSPP 1995): the first job that does not fit gets the earliest time at which enough
CPUs are free by time limits; others start before it where that does not delay it.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from deepsquare_chain.metascheduler.simulation.workload import TraceJob


@dataclass(frozen=True, slots=True)
class SimulatedRun:
    """When and where a job ran: `provider` counts from 0, times in seconds."""

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
    """CPUs x time limit."""
    return (job.cpus * job.limit, job.at, job.id)


def first_come_first_served(job: TraceJob) -> tuple[float, ...]:
    """Time of submission."""
    return (job.at, job.id)


@dataclass(slots=True)
class Cluster:
    """One cluster: CPUs of one speed, a queue, and what runs by the end of its limit."""

    cpus: int
    speed: float
    order: Order
    free: int = 0
    queue: list[tuple[tuple[float, ...], TraceJob]] = field(default_factory=list)
    running: list[tuple[float, int, int]] = field(default_factory=list)
    #: CPUs and CPU seconds, by time limits, of what runs or is queued.
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
        """CPU seconds by time limits that are still to be done."""
        return self.queued_area + self.end_area - now * self.busy

    def start_what_fits(self, now: float) -> list[TraceJob]:
        """Start jobs by EASY backfilling."""
        queue, started = self.queue, []
        at = 0
        while at < len(queue) and queue[at][1].cpus <= self.free:
            started.append(queue[at][1])
            self._begin(queue[at][1], now)
            at += 1
        del queue[:at]
        if not queue or not self.free:
            return started
        shadow, extra = self._reservation(queue[0][1].cpus)
        at, free = 1, self.free
        while at < len(queue) and free:
            job = queue[at][1]
            if job.cpus <= free:
                ends_before = now + job.limit <= shadow
                if ends_before or job.cpus <= extra:
                    if not ends_before:
                        extra -= job.cpus
                    del queue[at]
                    started.append(job)
                    self._begin(job, now)
                    free = self.free
                    continue
            at += 1
        return started

    def _begin(self, job: TraceJob, now: float) -> None:
        self.free -= job.cpus
        self.busy += job.cpus
        end = now + job.limit
        insort(self.running, (end, job.id, job.cpus))
        self.queued_area -= job.cpus * job.limit
        self.end_area += job.cpus * end

    def finish(self, job: TraceJob, limit_end: float) -> None:
        """Take back what a job occupied."""
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


#: Chooses a cluster for a job at its submission.
Route = Callable[[TraceJob, Sequence[Cluster], float], int]


def to_the_only_one(_job: TraceJob, _clusters: Sequence[Cluster], _now: float) -> int:
    """All to the first cluster."""
    return 0


def to_the_least_loaded(job: TraceJob, clusters: Sequence[Cluster], _now: float) -> int:
    """The smallest share of CPUs that run or wait for jobs."""
    loads = [
        (cluster.occupied / cluster.cpus, i)
        for i, cluster in enumerate(clusters)
        if job.cpus <= cluster.cpus
    ]
    return min(loads)[1]


def to_the_earliest_completion(job: TraceJob, clusters: Sequence[Cluster], now: float) -> int:
    """The earliest end, if all work before it takes its limit and packs without gaps."""
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
    """Run a workload to its end; outcomes are in order of submission."""
    ends: list[tuple[float, int, int, float]] = []
    outcomes: dict[int, SimulatedRun] = {}
    by_id = {job.id: job for job in jobs}
    at = 0
    while at < len(jobs) or ends:
        now = min(
            jobs[at].at if at < len(jobs) else float("inf"), ends[0][0] if ends else float("inf")
        )
        touched = set()
        while ends and ends[0][0] <= now:
            _, job_id, place, limit_end = heapq.heappop(ends)
            clusters[place].finish(by_id[job_id], limit_end)
            touched.add(place)
        while at < len(jobs) and jobs[at].at <= now:
            place = route(jobs[at], clusters, now)
            clusters[place].submit(jobs[at])
            touched.add(place)
            at += 1
        for place in sorted(touched):
            cluster = clusters[place]
            for job in cluster.start_what_fits(now):
                end = now + job.run_at(cluster.speed)
                outcomes[job.id] = SimulatedRun(job, place, now, end)
                heapq.heappush(ends, (end, job.id, place, now + job.limit))
    return [outcomes[job.id] for job in jobs]
