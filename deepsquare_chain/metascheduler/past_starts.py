"""How well the starts of past jobs would have been forecast when they were submitted.

The grid at a past block is reconstructed from events: which jobs waited and which were at providers.
The forecast for a job that was submitted in that block is compared with its actual start. This needs
no record of earlier forecasts: all readers of the same events can repeat it. The forecast uses
today's provider records and estimates of run times.

Only jobs that had to wait are judged: prompt starts are easy to forecast. The work is bounded: the
latest such starts are judged, each once.
"""

from __future__ import annotations

import statistics
from bisect import bisect_left
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from deepsquare_chain.chain.bindings import events as ev
from deepsquare_chain.chain.follower import Batch
from deepsquare_chain.credits import job_rate
from deepsquare_chain.job import JobStatus, Terms
from deepsquare_chain.metascheduler.dependencies import conditions
from deepsquare_chain.metascheduler.eligibility import ProviderView, Waiting
from deepsquare_chain.metascheduler.forecast import StartAccuracy, forecast, pending_job
from deepsquare_chain.metascheduler.history import RunHistory
from deepsquare_chain.metascheduler.policy import Rules, Snapshot

#: Latest starts that are judged.
MAX_STARTS: Final = 20
#: Blocks within which a job starts that finds free capacity; only later starts are judged.
PROMPT_BLOCKS: Final = 5
#: Most ended jobs that are remembered, and times of blocks.
_MAX_ENDED: Final = 2_000
_MAX_TIMES: Final = 10_000
#: Most jobs, live ones and recently ended ones, with which starts are judged.
_MAX_JOBS: Final = 5_000
#: Largest product of the queue's length and the number of providers for which a start is judged.
_MAX_WORK: Final = 20_000

FOLLOWED: Final = (ev.JobSubmitted, ev.JobTransition, ev.JobRetried)


@dataclass(slots=True)
class _PastJob:
    """A job with the blocks of its submission, assignment, start and end; 0 for none yet.

    `is_plain` is false for a job that waited for something other than its turn.
    """

    job_id: int
    customer: str
    terms: Terms
    submitted: int
    provider: str = ""
    assigned: int = 0
    started: int = 0
    ended: int = 0
    is_plain: bool = True


class PastStarts:
    """The times of recent jobs, from events, and the errors of forecasts of their starts."""

    def __init__(self) -> None:
        self._jobs: dict[int, _PastJob] = {}
        self._ended: deque[int] = deque()
        self._starts: deque[int] = deque(maxlen=MAX_STARTS)
        self._times: dict[int, int] = {}
        #: The first block from which all live jobs are known; None before the first submission.
        self._known_from: int | None = None
        #: Seconds of error and of wait, by job; None for a start that can't be judged.
        self._errors: dict[int, tuple[int, int] | None] = {}

    # -- events

    def apply(self, batch: Batch) -> None:
        """Apply a follower's batch."""
        if batch.rolled_back_to is not None:
            self._roll_back(batch.rolled_back_to)
        if any(isinstance(event, FOLLOWED) for event in batch.events):
            self._times[batch.to_block] = batch.time
            if len(self._times) > _MAX_TIMES:
                del self._times[next(iter(self._times))]
        for event in batch.events:
            if isinstance(event, ev.JobSubmitted):
                self._submit(event)
            elif isinstance(event, ev.JobRetried):
                self._retry(event)
            elif isinstance(event, ev.JobTransition) and event.job_id in self._jobs:
                self._move(self._jobs[event.job_id], event)

    def _submit(self, event: ev.JobSubmitted) -> None:
        if self._known_from is None:
            # Events of earlier jobs were applied before this process began.
            self._known_from = event.block_number if event.job_id == 1 else 2**62
        self._jobs[event.job_id] = _PastJob(
            event.job_id,
            event.customer,
            event.terms,
            event.block_number,
            is_plain=_waits_for_its_turn_only(event.terms.uses),
        )

    def _retry(self, event: ev.JobRetried) -> None:
        earlier = self._jobs.get(event.job_id)
        if earlier is not None:
            self._jobs[event.successor] = _PastJob(
                event.successor,
                earlier.customer,
                earlier.terms,
                event.block_number,
                is_plain=False,
            )

    def _move(self, job: _PastJob, event: ev.JobTransition) -> None:
        block = event.block_number
        if event.after is JobStatus.META_SCHEDULED:
            job.assigned, job.provider = block, event.provider
        elif event.after is JobStatus.RUNNING:
            job.started = block
            waited = block - job.submitted > PROMPT_BLOCKS
            if job.is_plain and waited and job.job_id not in self._starts:
                self._starts.append(job.job_id)
        elif event.after is JobStatus.PENDING and event.before is not JobStatus.NONE:
            job.assigned, job.is_plain = 0, False
        elif event.after.is_final:
            job.ended = block
            self._ended.append(job.job_id)
            if len(self._ended) > _MAX_ENDED:
                self._drop(self._ended.popleft())

    def _drop(self, job_id: int) -> None:
        job = self._jobs.pop(job_id, None)
        if job is not None:
            self._known_from = max(self._known_from or 0, job.ended)

    def _roll_back(self, block: int) -> None:
        for job_id, job in list(self._jobs.items()):
            if job.submitted > block:
                del self._jobs[job_id]
            for event in ("assigned", "started", "ended"):
                if getattr(job, event) > block:
                    setattr(job, event, 0)
                    self._errors.pop(job_id, None)
        self._times = {number: time for number, time in self._times.items() if number <= block}
        self._ended = deque(i for i in self._ended if i in self._jobs and self._jobs[i].ended)
        started = (i for i in self._starts if i in self._jobs and self._jobs[i].started)
        self._starts = deque(started, maxlen=MAX_STARTS)

    # -- times of blocks

    def undated(self) -> list[int]:
        """Return the blocks whose times are needed to judge starts, and are not known."""
        needed = {block for job in self._unjudged() for block in (job.submitted, job.started)}
        return sorted(needed - self._times.keys())

    def date(self, times: Mapping[int, int]) -> None:
        """Set the chain times of blocks."""
        self._times |= times

    # -- errors

    @property
    def accuracy(self) -> StartAccuracy | None:
        """The accuracy of the latest forecasts; None without a start that could be judged."""
        errors_and_waits = (self._errors.get(job_id) for job_id in self._starts)
        judged = [entry for entry in errors_and_waits if entry is not None]
        if not judged:
            return None
        errors = sorted(error for error, _ in judged)
        return StartAccuracy(
            len(errors),
            round(statistics.median(errors)),
            errors[-(-9 * len(errors) // 10) - 1],
            statistics.median(error / max(wait, 1) for error, wait in judged),
        )

    def judge(self, providers: Sequence[ProviderView], rules: Rules, history: RunHistory) -> None:
        """Forecast the latest starts that have not been judged, and keep the errors.

        Starts of which a block's time is unknown are left for later.
        """
        views = [ProviderView(view.provider) for view in providers]
        ids = {view.provider.account: view.provider.id for view in providers}
        times = self._times
        unjudged = [j for j in self._unjudged() if j.submitted in times and j.started in times]
        if not unjudged:
            return
        time_of = _Interpolation(times)
        for job in unjudged:
            self._errors[job.job_id] = None
            snapshot = self._before_assignment(job, views, ids, time_of)
            if len(snapshot.waiting) * len(views) > _MAX_WORK:
                continue
            expected = forecast(snapshot, rules, history, job.job_id)
            if expected is not None:
                start, submitted = times[job.started], times[job.submitted]
                self._errors[job.job_id] = (abs(expected.at - start), start - submitted)
        self._errors = {i: error for i, error in self._errors.items() if i in self._starts}

    def _unjudged(self) -> list[_PastJob]:
        if len(self._jobs) > _MAX_JOBS:
            return []
        known_from = 2**62 if self._known_from is None else self._known_from
        started = (self._jobs[i] for i in self._starts if i in self._jobs)
        known = (job for job in started if job.submitted >= known_from)
        return [job for job in known if job.job_id not in self._errors]

    def _before_assignment(
        self,
        judged: _PastJob,
        views: Sequence[ProviderView],
        ids: Mapping[str, int],
        time_of: _Interpolation,
    ) -> Snapshot:
        """Return the grid as it was after the block in which a job was submitted."""
        block = judged.submitted
        waiting, assigned = [], []
        prices = {view.provider.id: view.provider.prices for view in views}
        for job in self._jobs.values():
            if job.submitted > block or 0 < job.ended <= block:
                continue
            record = pending_job(job.job_id, job.customer, job.terms, time_of(job.submitted))
            if job is judged or not 0 < job.assigned <= block:
                if _waits_for_its_turn_only(job.terms.uses):
                    terms = job.terms
                    waiting.append(Waiting(record, terms.objective, terms.uses, record.since))
            elif (provider_id := ids.get(job.provider)) is not None:
                runs = 0 < job.started <= block
                assigned.append(
                    replace(
                        record,
                        status=JobStatus.RUNNING if runs else JobStatus.META_SCHEDULED,
                        since=time_of(job.started if runs else job.assigned),
                        provider_id=provider_id,
                        rate=job_rate(prices[provider_id], record.resources),
                    )
                )
        return Snapshot(time_of(block), views, waiting, assigned)


def _waits_for_its_turn_only(uses: str) -> bool:
    """Return whether a job waits neither for other jobs nor for a time."""
    job_conditions = conditions(uses)
    return job_conditions is not None and not (
        job_conditions.after or job_conditions.start_after or job_conditions.throttle
    )


class _Interpolation:
    """Chain times of blocks, linear between those that are known."""

    def __init__(self, times: Mapping[int, int]) -> None:
        self._blocks = sorted(times)
        self._times = [times[block] for block in self._blocks]

    def __call__(self, block: int) -> int:
        i = bisect_left(self._blocks, block)
        if i == len(self._blocks):
            return self._times[-1]
        if self._blocks[i] == block or i == 0:
            return self._times[i]
        (first, last), (begin, end) = self._blocks[i - 1 : i + 1], self._times[i - 1 : i + 1]
        return begin + (end - begin) * (block - first) // (last - first)
