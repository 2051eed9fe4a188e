"""Plans the next action of each job; pure.

The plan depends only on the state on chain, the run record in the database and the status at the
executor. It uses no other history, so that the daemon is crash-safe: after a kill at any point it
plans the same next step.

A definition that is certainly missing from the store, or that no provider can run, ends in a
panic before billing starts: the customer is refunded at once, or the job continues elsewhere as a
successor if its customer asked for retries.
A store that does not answer proves nothing about the job, so the job is requeued.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Final

from deepsquare_chain.credits import cost, fee
from deepsquare_chain.executors.base import MAX_WALLTIME, Exit, RunState
from deepsquare_chain.job import NO_LOAD, Job, JobStatus, Load, Offer, Resources
from deepsquare_chain.provider.model import (
    MAX_REASON_BYTES,
    MAX_SECONDS,
    Action,
    Adopt,
    Cancel,
    Claim,
    ClaimAndStart,
    Close,
    Collect,
    DefinitionState,
    Extend,
    Panic,
    Phase,
    RecordEnd,
    Release,
    Requeue,
    RunReport,
    Situation,
    Start,
    Submit,
    View,
    Wait,
)

# -- admission: shares the free capacity among the jobs of one cycle; pure


class FreeCapacity:
    """The free capacity that is left for jobs without a run."""

    def __init__(self, free: Offer | None, *, unlimited: bool) -> None:
        self.known = free is not None or unlimited
        self._left = NO_LOAD if free is None else Load(free.cpus, free.memory, free.gpus)
        self._unlimited = unlimited

    def holds(self, resources: Resources) -> bool:
        """Return whether a job fits in the capacity that is left."""
        left = self._left - Load.of(resources)
        return self._unlimited or min(left.cpus, left.memory, left.gpus) >= 0

    def take(self, resources: Resources) -> None:
        """Reserve the resources of a job, even beyond the free capacity: later jobs wait for it."""
        self._left -= Load.of(resources)


def drain(view: View, action: Action, situation: Situation) -> Action:
    """Requeue a job without a run during maintenance; runs continue."""
    is_waiting = view.chain in {JobStatus.META_SCHEDULED, JobStatus.SCHEDULED}
    is_start = isinstance(action, Claim | ClaimAndStart | Start | Submit)
    if situation.draining and is_waiting and is_start and not view.run.began:
        return Requeue("the provider is draining for maintenance")
    return action


def admit(view: View, action: Action, situation: Situation, free: FreeCapacity) -> Action:
    """Admit jobs while there is free capacity; requeue those that can't start soon."""
    resources = view.job.resources
    if view.run.began and (view.placed or view.run.phase is not Phase.SUBMITTING):
        return action  # the executor already counts it as used capacity
    fits = free.holds(resources)
    if fits or view.chain is not JobStatus.META_SCHEDULED:
        free.take(resources)
    if not isinstance(action, Claim | ClaimAndStart | Start) or view.run.began:
        return action
    if situation.fault:
        # The fault may last: requeue at once, so that another provider can claim the job.
        return Requeue(f"the provider can't start jobs: {situation.fault}")
    if not isinstance(action, Start) and not situation.has_disk_space:
        shortage = "the provider is short of disk space"
    elif not free.known:
        shortage = "the provider's executor does not answer"
    elif not fits:
        shortage = "the provider has no free capacity for it now"
    else:
        return action
    waited = situation.now - view.job.since
    return Requeue(shortage) if waited >= situation.assignment_timeout else Wait(shortage)


def plan(views: Iterable[View], situation: Situation) -> list[tuple[View, Action]]:
    """Return one action per job; a job that exceeds the free capacity waits or is requeued."""
    ordered = sorted(views, key=lambda view: (-view.chain, view.job.since, view.job.id))
    free = FreeCapacity(situation.free, unlimited=situation.queues)
    planned = []
    for view in ordered:
        action = plan_job(view, situation)
        if view.mine:
            action = admit(view, drain(view, action, situation), situation, free)
        planned.append((view, _with_clipped_reason(action)))
    return planned


def plan_job(view: View, situation: Situation) -> Action:
    """Return the action of one job, without regard to other jobs and free capacity."""
    if not view.mine:
        return _not_mine(view, situation)
    if view.chain is JobStatus.META_SCHEDULED:
        return _meta_scheduled(view, situation)
    if view.chain is JobStatus.SCHEDULED:
        return _scheduled(view, situation)
    return _running(view, situation)


# ------------------------------------------------------------------------ by status


def _not_mine(view: View, situation: Situation) -> Action:
    """Final, requeued, or assigned to another provider: no run of it may remain here."""
    if view.run.phase is Phase.CLOSED:
        return Wait("closed")
    if not view.settled:
        return Wait("waiting for confirmations")
    if view.run.handle is None and view.lookup is not None and view.lookup.handle is not None:
        return Adopt(view.lookup.handle)
    if not view.run.began:
        return Close() if view.chain.is_final else Wait("is not assigned to this provider")
    return _cancel_and_close(view, situation)


def _cancel_and_close(view: View, situation: Situation) -> Action:
    """Cancel the run if it is alive, then release or close its record."""
    state = _run_state(view, situation)
    if state is RunState.UNKNOWN:
        return Wait("the executor does not know its state")
    if state is None or state is RunState.ENDED:
        return Close() if view.chain.is_final else Release()
    return Cancel(f"the job is {view.chain.name} on chain")


def _meta_scheduled(view: View, situation: Situation) -> Action:
    if view.run.phase is Phase.REFUSED:
        return Panic(view.run.note)
    if view.run.began and situation.queues:
        # Only this provider claims: a run before the claim belongs to an earlier assignment.
        return _not_mine(view, situation)
    if view.run.began:
        # Without a queue, runs begin when their job is RUNNING, which is never reverted by the
        # contract: a reorg removed the start, which is sent again.
        return ClaimAndStart()
    problem = _definition_problem(view, situation)
    return problem or (Claim() if situation.queues else ClaimAndStart())


def _scheduled(view: View, situation: Situation) -> Action:
    if view.run.phase is Phase.REFUSED:
        return Requeue(view.run.note)
    if situation.queues:
        return _queued(view, situation)
    if view.run.began:
        # A reorg removed the block that started this job: the start is sent again.
        return Start()
    return _definition_problem(view, situation) or Start()


def _queued(view: View, situation: Situation) -> Action:
    """SCHEDULED, and the executor has its own queue: billing starts after the run has begun."""
    state = _run_state(view, situation)
    if view.run.handle is None and view.run.phase is not Phase.ENDED:
        return _submit_or_adopt(view, situation)
    if state is None:
        return Requeue("the run vanished before its start")
    ended = view.run.exit or (view.status.exit if view.status else None)
    if ended is not None and ended.reason in _LOST_REASONS:
        # A run that was lost before its billing started costs the customer nothing.
        return Requeue(_LOST_REASONS[ended.reason])
    if state in {RunState.UNKNOWN, RunState.QUEUED}:
        return Wait(f"the run is {state}")
    return Start()


def _running(view: View, situation: Situation) -> Action:
    run = view.run
    if run.phase is Phase.REFUSED:
        return Panic(run.note)
    if run.exit is not None:
        return _end(view, run.exit, situation)
    if run.handle is None:
        return _submit_or_adopt(view, situation)
    return _running_run(view, situation)


def _running_run(view: View, situation: Situation) -> Action:
    """RUNNING, and the executor has the run."""
    state = _run_state(view, situation)
    if state is None:
        return Panic("the run vanished")
    if state is RunState.UNKNOWN:
        return Wait("the executor does not know its state")
    if view.status is not None and view.status.exit is not None:
        return RecordEnd(view.status.exit)
    if view.collected is None:
        return Wait("the events of its interim payments have not been read yet")
    if view.allotment != view.run.allotment:
        return Extend(_walltime(view.allotment, view.run.lead), view.allotment)
    return Collect() if _worth_collecting(view, situation) else Wait("runs")


#: Last seconds of an allotment without interim payments: the final report bills them.
_NEAR_END = 15


def _worth_collecting(view: View, situation: Situation) -> bool:
    """Return whether an interim payment of a live run is allowed, due and worth its gas."""
    job, conditions = view.job, situation.collecting
    alive = view.status is not None and view.status.state is RunState.RUNNING
    if conditions is None or not alive or not job.allows_interim_payments or not view.settled:
        return False
    elapsed = situation.now - job.since
    near_end = job.since + view.allotment - (view.collected or 0) - _NEAR_END
    if elapsed < conditions.interval or situation.now >= near_end:
        return False
    due = cost(job.rate, elapsed)
    return due - fee(due, job.fee_bps) >= conditions.min_unbilled


# ------------------------------------------------------------------------- helpers


def _definition_problem(view: View, situation: Situation) -> Action | None:
    """Return the action for a definition that is not READY; None when it is."""
    state, reason = view.cached_definition.state, view.cached_definition.reason
    waited = situation.now - view.job.since
    if state is DefinitionState.READY:
        return None
    if state is DefinitionState.INVALID:
        return Panic(reason)
    if state is DefinitionState.PENDING or waited < situation.assignment_timeout:
        return Wait(reason or "the definition is being fetched")
    if state is DefinitionState.UNREACHABLE and view.chain is not JobStatus.RUNNING:
        return Requeue(reason)
    return Panic(reason)


def _submit_or_adopt(view: View, situation: Situation) -> Action:
    """Submit the run, or adopt it if the executor has it; wait for the result of the lookup."""
    if view.lookup is None:
        return Wait("the executor has not answered")
    if view.lookup.handle is not None:
        return Adopt(view.lookup.handle)
    return _submit(view, situation) if view.settled else Wait("waiting for confirmations")


def _submit(view: View, situation: Situation) -> Action:
    """Submit the run, which certainly never began here."""
    if view.chain is JobStatus.RUNNING and view.run.phase is Phase.WATCHED:
        # Started, but without a record in this database: the fate of that run is unknown.
        return Panic("the record of this run was lost")
    problem = _definition_problem(view, situation)
    if problem is not None:
        return problem
    allotted = view.allotment
    late = situation.now - view.job.since if view.chain is JobStatus.RUNNING else 0
    if late > situation.start_grace and late * 2 > allotted:
        return Panic(f"the run could not begin for {late} seconds after its start")
    # At least half of a short allotment is left: the chain accepts reports after the deadline.
    lead = max(0, min(late, allotted // 2))
    return Submit(_walltime(allotted, lead), allotted, lead)


def _end(view: View, ended: Exit, situation: Situation) -> Action:
    """Report the end, once the chain time allows the contract to bill the seconds due."""
    if ended.reason in _LOST_REASONS:
        return Panic(_LOST_REASONS[ended.reason])
    if view.collected is None:
        return Wait("the events of its interim payments have not been read yet")
    allotted = view.allotment
    due = min(ended.seconds, allotted)
    reason = _reason(view.job, ended)
    if ended.reason == "walltime":
        if _sent_allotment(view, ended, allotted) >= allotted:
            due = allotted
        else:
            reason = "time limit reached; a top-up came too late for this run"
    # Interim payments have billed all time before `since`, including seconds outside the run.
    due = max(0, due - view.collected)
    elapsed = situation.now - view.job.since
    if elapsed < due:
        return Wait(f"is reported in {due - elapsed} seconds of chain time")
    return RunReport(min(due, MAX_SECONDS), ended.code, reason)


def _sent_allotment(view: View, ended: Exit, allotted: int) -> int:
    """Return the allotment last sent to the run; if unknown, estimate it from the duration."""
    if view.run.allotment:
        return view.run.allotment
    return allotted if ended.seconds * 2 >= allotted else 0


#: Ends for which the customer pays nothing, with the reason that is reported.
_LOST_REASONS: Final = {
    "lost": "the run was lost before its end was known",
    "cancelled": "the provider ended the run",
    "unstarted": "the provider's machine could not execute the script",
    "full": "the disk of the provider's machine was full",
}
#: Ends by a limit, with the reason that is reported.
_LIMIT_REASONS: Final = {
    "disk": "the provider's disk quota exceeded",
    "processes": "the provider's limit of processes exceeded",
    "walltime": "time limit reached",
}


def _reason(job: Job, ended: Exit) -> str:
    if ended.reason == "memory":
        return f"memory limit of {job.resources.memory} MB exceeded"
    if ended.reason in _LIMIT_REASONS:
        return _LIMIT_REASONS[ended.reason]
    if ended.reason == "signalled":
        return f"ended by signal {ended.code - 128}"
    return f"exited with code {ended.code}" if ended.code else ""


def _run_state(view: View, situation: Situation) -> RunState | None:
    """Return the run's state; None only after repeated lookups that did not find the run."""
    if view.run.phase is Phase.ENDED:
        return RunState.ENDED
    absent = view.lookup is not None and view.lookup.handle is None
    if view.run.handle is None:
        return None if absent else RunState.UNKNOWN
    if view.status is not None and view.status.state is not RunState.UNKNOWN:
        return view.status.state
    return None if absent and view.misses >= situation.max_misses else RunState.UNKNOWN


def _walltime(allotted: int, lead: int) -> int:
    return max(1, min(allotted - lead, MAX_WALLTIME))


def _with_clipped_reason(action: Action) -> Action:
    if isinstance(action, Panic | Requeue | RunReport):
        return replace(action, reason=clip(action.reason))
    return action


def clip(reason: str) -> str:
    """Return a reason as the contract accepts it: at most 256 bytes of UTF-8, in one line."""
    line = "".join(char if char.isprintable() else " " for char in reason)
    return line.encode("utf-8", "replace")[:MAX_REASON_BYTES].decode("utf-8", "ignore")
