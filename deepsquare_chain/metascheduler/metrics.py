"""Metrics of a meta-scheduler."""

from __future__ import annotations

from typing import Final

from deepsquare_chain.chain.rpc.heads import HeadMetrics
from deepsquare_chain.daemon.batcher import BatchMetrics
from deepsquare_chain.metascheduler.history import RunHistory
from deepsquare_chain.metascheduler.observer import ClusterSnapshot
from deepsquare_chain.observability.metrics import Metrics

KINDS: Final = ("assign", "requeue", "panic", "challenge", "cancel")


class SchedulerMetrics:
    """All metrics of a scheduler, registered at creation."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self.gas = metrics.gauge("gas_balance_coins", "Balance of the chain's coin, for gas.")
        self.head = HeadMetrics(metrics)
        self.planning = metrics.histogram("plan_seconds", "Time to plan the queue.")
        self._queue = metrics.gauge("queue_jobs", "Jobs that are PENDING.")
        self._oldest = metrics.gauge("queue_oldest_seconds", "Longest wait in the queue.")
        self._assigned = metrics.gauge("assigned_jobs", "Jobs assigned to providers.")
        self._silent = metrics.gauge("silent_providers", "Providers with an unanswered challenge.")
        self._strikes = metrics.gauge("strikes_in_a_day", "Strikes of all providers in a day.")
        self._suspended = metrics.gauge(
            "resting_providers", "Providers that are suspended because of strikes."
        )
        self._share_error = metrics.gauge(
            "fair_share_error_ratio",
            "Fraction of recent payments by which use differs from equal shares.",
        )
        self._paid = -1
        self.sent = BatchMetrics(
            metrics,
            changed=metrics.counter("scheduler_jobs", "Jobs changed on chain.", kind=KINDS),
            refused=metrics.counter(
                "scheduler_refused", "Jobs that the contract refused to change.", kind=KINDS
            ),
        ).count

    def show(self, cluster: ClusterSnapshot, history: RunHistory) -> None:
        """Set the gauges from a cycle's cluster snapshot and history."""
        if history.payments != self._paid:
            self._paid = history.payments
            self._share_error.set(history.share_error())
        now = cluster.block_context.now
        waits = [now - waiting.queued_at for waiting in cluster.waiting]
        self._queue.set(len(waits))
        self._oldest.set(max(waits, default=0))
        self._assigned.set(len(cluster.assigned))
        self._silent.set(sum(view.silent for view in cluster.views))
        self._strikes.set(sum(view.strikes for view in cluster.views))
        self._suspended.set(sum(view.suspended_until > now for view in cluster.views))
