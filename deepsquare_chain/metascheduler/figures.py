"""Figures of a meta-scheduler."""

from __future__ import annotations

from typing import Final

from deepsquare_chain.chain.rpc.heads import HeadFigures
from deepsquare_chain.metascheduler.observer import World
from deepsquare_chain.observability.metrics import Metrics

KINDS: Final = ("assign", "requeue", "panic", "challenge", "cancel")


class SchedulerMetrics:
    """All figures of a scheduler, there from the start."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self.gas = metrics.gauge("gas_balance_coins", "Coins of the chain for gas.")
        self.head = HeadFigures(metrics)
        self.planning = metrics.histogram("plan_seconds", "Time to plan the queue.")
        self._queue = metrics.gauge("queue_jobs", "Jobs that are PENDING.")
        self._oldest = metrics.gauge("queue_oldest_seconds", "Longest wait in the queue.")
        self._assigned = metrics.gauge("assigned_jobs", "Jobs in the hands of providers.")
        self._silent = metrics.gauge("silent_providers", "Providers with an overdue answer.")
        self._strikes = metrics.gauge("strikes_in_a_day", "Strikes of all providers in a day.")
        self._resting = metrics.gauge("resting_providers", "Providers that rest for their strikes.")
        self._moved = metrics.counter("scheduler_jobs", "Jobs moved on chain.", kind=KINDS)
        self._refused = metrics.counter("scheduler_refused", "Jobs left out.", kind=KINDS)

    def sent(self, kind: str, moved: int, refused: int) -> None:
        """Count what a transaction did."""
        self.metrics.add(self._moved, kind, amount=moved)
        self.metrics.add(self._refused, kind, amount=refused)

    def show(self, world: World) -> None:
        """Show the state of a cycle."""
        now = world.moment.now
        waits = [now - waiting.queued_at for waiting in world.waiting]
        self._queue.set(len(waits))
        self._oldest.set(max(waits, default=0))
        self._assigned.set(len(world.assigned))
        self._silent.set(sum(view.silent for view in world.views))
        self._strikes.set(sum(view.strikes for view in world.views))
        self._resting.set(sum(view.rests_until > now for view in world.views))
