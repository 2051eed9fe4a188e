"""A grid in memory that drives the real policy, to measure what a rule does before it is shipped.

Time jumps from event to event; jobs start the moment they are assigned (as by `claimAndStart`) and
run for a known time. The load of a provider is the sum of its running jobs, as on chain.
The defaults of `Rules` were chosen by it: four workloads of 1,500 jobs (`workload`, seeds 0 to 3),
two providers of 32 cpus, demand of 0.8, 0.95 and 1.1 times the capacity:

| jobs are aged | mean slowdown | longest wait, hours |
|---|---|---|
| never (smallest area only) | 11.1, 15.0, 24.4 | 43, 42, 39 |
| at once (oldest first, others fill in) | 7.3, 11.3, 18.8 | 5, 7, 11 |
| after 300 s | 7.5, 11.5, 18.9 | 5, 8, 11 |
| after 300 s + 1 x run time | 6.7, 11.0, 17.6 | 7, 8, 10 |
| after 300 s + 4 x run time, a day at most (the default) | 4.9, 8.5, 14.1 | 21, 22, 21 |
| after 10 x run time | 4.6, 7.9, 8.0 | 24, 27, 28 |

Aging in proportion to the run time keeps small jobs quick; the day bounds the longest wait.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from deepsquare_chain.job import Job, JobFlags, JobStatus, Objective, Resources
from deepsquare_chain.metascheduler.eligibility import ProviderView, Waiting
from deepsquare_chain.metascheduler.policy import Plan, Rules, Snapshot, plan


@dataclass(frozen=True, slots=True)
class Arrival:
    """A job that is submitted at `at` and would run for `seconds`, both in seconds."""

    at: int
    waiting: Waiting
    seconds: int


@dataclass(frozen=True, slots=True)
class SimulationOutcome:
    """How a job fared; `wait` in seconds from submission to start, None if it never started."""

    arrival: Arrival
    provider_id: int
    wait: int | None

    @property
    def slowdown(self) -> float:
        """Time in the grid over time of running, bounded below by ten seconds of running."""
        run = max(self.arrival.seconds, 10)
        return ((self.wait or 0) + run) / run


def simulate(
    arrivals: Sequence[Arrival], providers: Sequence[ProviderView], rules: Rules, *, until: int
) -> list[SimulationOutcome]:
    """Run a workload to its end, or to the time `until`; outcomes are in order of arrival."""
    return _Simulation(arrivals, providers, rules).run(until)


class _Simulation:
    def __init__(
        self, arrivals: Sequence[Arrival], providers: Sequence[ProviderView], rules: Rules
    ) -> None:
        self._arrivals = sorted(arrivals, key=lambda arrival: (arrival.at, arrival.waiting.job.id))
        self._by_id = {arrival.waiting.job.id: arrival for arrival in self._arrivals}
        self._providers = providers
        self._rules = rules
        self._waiting: dict[int, Waiting] = {}
        self._running: dict[int, Job] = {}
        self._ends: list[tuple[int, int]] = []
        self._started: dict[int, tuple[int, int]] = {}

    def run(self, until: int) -> list[SimulationOutcome]:
        pending = list(reversed(self._arrivals))
        while pending or self._ends:
            now = min([self._ends[0][0]] if self._ends else [pending[-1].at])
            if pending:
                now = min(now, pending[-1].at)
            if now > until:
                break
            while self._ends and self._ends[0][0] <= now:
                del self._running[heapq.heappop(self._ends)[1]]
            while pending and pending[-1].at <= now:
                waiting = pending.pop().waiting
                self._waiting[waiting.job.id] = waiting
            self._start(self._plan(now), now)
        return [self._outcome(arrival) for arrival in self._arrivals]

    def _plan(self, now: int) -> Plan:
        waiting = tuple(self._waiting.values())
        return plan(
            Snapshot(now, self._providers, waiting, tuple(self._running.values())), self._rules
        )

    def _start(self, decided: Plan, now: int) -> None:
        for decision in decided.decisions:
            job = decision.waiting.job
            del self._waiting[job.id]
            self._started[job.id] = now, decision.provider_id
            self._running[job.id] = replace(
                job,
                status=JobStatus.RUNNING,
                since=now,
                provider_id=decision.provider_id,
                rate=decision.rate,
            )
            heapq.heappush(self._ends, (now + self._by_id[job.id].seconds, job.id))

    def _outcome(self, arrival: Arrival) -> SimulationOutcome:
        started = self._started.get(arrival.waiting.job.id)
        if started is None:
            return SimulationOutcome(arrival, 0, None)
        return SimulationOutcome(arrival, started[1], started[0] - arrival.at)


def workload(seed: int, count: int, cpus: int, load: float) -> list[Arrival]:
    """A mix of many small and few large jobs, as clusters see it.

    Args:
        seed: Equal seeds give equal workloads.
        count: Number of jobs.
        cpus: Cpus of the largest provider; no job takes more.
        load: Demand over the capacity of `cpus`; arrivals are spread accordingly.
    """
    dice = random.Random(seed)  # noqa: S311
    shapes = []
    for _ in range(count):
        size = min(cpus, 2 ** dice.choice([0, 0, 0, 0, 1, 1, 2, 3, 4, 5]))
        limit = int(dice.lognormvariate(6.0, 1.4)) + 30
        shapes.append((size, limit, max(1, int(limit * dice.uniform(0.2, 1.0)))))
    span = sum(size * seconds for size, _, seconds in shapes) / (cpus * load)
    times = sorted(int(dice.uniform(0, span)) for _ in shapes)
    return [
        _arrival(i + 1, at, *shape) for i, (at, shape) in enumerate(zip(times, shapes, strict=True))
    ]


def _arrival(job_id: int, at: int, cpus: int, limit: int, seconds: int) -> Arrival:
    job = Job(
        id=job_id,
        customer="0x" + "11" * 20,
        status=JobStatus.PENDING,
        since=at,
        provider_id=0,
        resources=Resources(1, cpus, 1, 0),
        retries_left=0,
        flags=JobFlags.NONE,
        escrow=2**95,
        rate=0,
        time_limit=limit,
        fee_bps=0,
        definition=bytes(32),
        retry_of=0,
    )
    return Arrival(at, Waiting(job, Objective.COST, "", at), seconds)
