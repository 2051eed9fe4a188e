"""Discrete-event simulation of a workload under the real policy.

Without chain delay a job starts when it is assigned. With blocks of b seconds, as on a chain, the
scheduler sees a submission in the next block, a job starts three blocks after the plan that
assigned it, and the scheduler sees its end in the block after the end.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

from deepsquare_chain.credits import CREDIT
from deepsquare_chain.job import Conditions, Job, JobFlags, JobStatus, Resources
from deepsquare_chain.metascheduler.eligibility import ProviderView, Waiting
from deepsquare_chain.metascheduler.history import FinishedRun, RunHistory
from deepsquare_chain.metascheduler.policy import Planner, Rules, Snapshot
from deepsquare_chain.metascheduler.ranking import relative_speeds
from deepsquare_chain.metascheduler.simulation.baselines import SimulatedRun
from deepsquare_chain.metascheduler.simulation.workload import TraceJob

_ESCROW: Final = 2**95
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
        views: Providers by ascending id.
        speeds: True speed of each provider, in the workload's unit.
        rules: Rules of the policy.
        block: Seconds between blocks; 0 for no delay.
        progress: Called every 500 steps with the part of jobs that have started.
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
        self._places = {view.provider.id: place for place, view in enumerate(views)}
        self._speeds = speeds
        self._prices = [view.provider.prices.cpu / CREDIT for view in views]
        self._relative = relative_speeds([view.provider.labels for view in views])
        self._rules = replace(rules, start_margin=math.ceil(_BLOCKS_TO_START * block))
        self._block = block
        self._progress = progress
        self._planner = Planner()
        self._history = RunHistory()
        self._waiting: dict[int, Waiting] = {}
        self._held: dict[int, Job] = {}
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
        elif kind == _BEGIN:
            self._held[job_id] = replace(
                self._held[job_id], status=JobStatus.RUNNING, since=math.floor(now)
            )
            return False
        elif kind == _HOLD_ENDS:
            self._hold_end = math.inf
        else:
            del self._held[job_id]
            self._record(job_id)
        return True

    def _record(self, job_id: int) -> None:
        outcome = self._outcomes[job_id]
        seconds = (outcome.end - outcome.start) * self._relative[outcome.provider]
        job = outcome.job
        paid = job.cpus * (outcome.end - outcome.start) * self._prices[outcome.provider]
        self._history.record(FinishedRun(job.customer, job.cpus, 0, job.limit, seconds, paid))

    def _plan(self, now: float) -> None:
        snapshot = Snapshot(
            math.floor(now), self._views, tuple(self._waiting.values()), tuple(self._held.values())
        )
        decided = self._planner.plan(snapshot, self._rules, self._history, complete=False)
        for decision in decided.decisions:
            self._start(decision.waiting.job, decision.provider_id, decision.rate, now)
        hold_end = min(decided.holds.values(), default=math.inf)
        if hold_end < self._hold_end:
            self._hold_end = hold_end
            heapq.heappush(self._events, (self._seen_at(hold_end), _HOLD_ENDS, 0))

    def _start(self, record: Job, provider_id: int, rate: int, now: float) -> None:
        index = self._places[provider_id]
        job = self._jobs[record.id]
        begin = now + _BLOCKS_TO_START * self._block
        end = begin + job.run_at(self._speeds[index])
        del self._waiting[job.id]
        self._outcomes[job.id] = SimulatedRun(job, index, begin, end)
        status = JobStatus.META_SCHEDULED if self._block > 0 else JobStatus.RUNNING
        self._held[job.id] = replace(
            record, status=status, since=math.floor(now), provider_id=provider_id, rate=rate
        )
        if self._block > 0:
            heapq.heappush(self._events, (begin, _BEGIN, job.id))
        heapq.heappush(self._events, (self._seen_at(end), _SEEN, job.id))


def _waiting(job: TraceJob) -> Waiting:
    record = Job(
        id=job.id,
        customer=job.customer,
        status=JobStatus.PENDING,
        since=math.floor(job.at),
        provider_id=0,
        resources=Resources(job.cpus, 1, job.memory, 0),
        retries_left=0,
        flags=JobFlags.NONE,
        escrow=_ESCROW,
        rate=0,
        time_limit=job.limit,
        fee_bps=0,
        definition=b"",
        retry_of=0,
    )
    uses = Conditions(patience=job.patience).to_uses()
    return Waiting(record, job.objective, uses, math.floor(job.at))
