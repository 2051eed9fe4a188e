"""Admission: shares the free capacity among the jobs of one cycle; pure."""

from __future__ import annotations

from deepsquare_chain.job import JobStatus, Offer, Resources
from deepsquare_chain.provider.model import (
    Action,
    Claim,
    ClaimAndStart,
    Phase,
    Requeue,
    Situation,
    Start,
    Submit,
    View,
    Wait,
)


class FreeCapacity:
    """The free capacity that is left for jobs without a run."""

    def __init__(self, free: Offer | None, *, unlimited: bool) -> None:
        self.known = free is not None or unlimited
        self._free = Offer(0, 0, 0) if free is None else free
        self._unlimited = unlimited

    def holds(self, resources: Resources) -> bool:
        """Return whether a job fits in the capacity that is left."""
        left = self._free
        return self._unlimited or (
            resources.cpus <= left.cpus
            and resources.memory <= left.memory
            and resources.gpus <= left.gpus
        )

    def take(self, resources: Resources) -> None:
        """Reserve the resources of a job, even beyond the free capacity: later jobs wait for it."""
        left = self._free
        self._free = Offer(
            left.cpus - resources.cpus, left.memory - resources.memory, left.gpus - resources.gpus
        )


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
        return _shortage_action(view, situation, "the provider is short of disk space")
    if not free.known:
        return _shortage_action(view, situation, "the provider's executor does not answer")
    return (
        action
        if fits
        else _shortage_action(view, situation, "the provider has no free capacity for it now")
    )


def _shortage_action(view: View, situation: Situation, reason: str) -> Action:
    waiting_seconds = situation.now - view.job.since
    return Requeue(reason) if waiting_seconds >= situation.assignment_timeout else Wait(reason)
