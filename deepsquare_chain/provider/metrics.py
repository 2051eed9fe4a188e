"""Metrics of a provider."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Final

from deepsquare_chain.chain.rpc.heads import HeadMetrics
from deepsquare_chain.credits import CREDIT
from deepsquare_chain.daemon.batcher import BatchMetrics
from deepsquare_chain.executors.base import RunState
from deepsquare_chain.job import MEGABYTE, Offer
from deepsquare_chain.observability.metrics import Metrics
from deepsquare_chain.provider.model import View

KINDS: Final = (
    *("claim", "claim_and_start", "start", "collect", "finish", "requeue", "panic", "answer"),
)


class ProviderMetrics:
    """All metrics of a provider, registered at the start."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self.gas = metrics.gauge("gas_balance_coins", "Balance of the chain's coin, for gas.")
        self.head = HeadMetrics(metrics)
        self._jobs = metrics.gauge("jobs_open", "Jobs that are not closed.")
        self._live = metrics.gauge("runs_live", "Live runs at the executor.")
        self._cpus = metrics.gauge("free_cpus", "Free CPUs.")
        self._memory = metrics.gauge("free_memory_bytes", "Free memory.")
        self._gpus = metrics.gauge("free_gpus", "Free GPUs.")
        self.can_start = metrics.gauge(
            "executor_can_start", "Whether a test script could be started; if 0, no job is claimed."
        )
        self.draining = metrics.gauge(
            "provider_draining", "Whether the provider is in maintenance; if 1, no job is accepted."
        )
        self.active = metrics.gauge(
            "provider_active",
            "Whether the provider is ACTIVE in the registry; if 0, it gets no job.",
        )
        self.approved_until = metrics.gauge(
            "provider_approved_until_timestamp_seconds",
            "End of the approval, in seconds since the epoch.",
        )
        self.disk = metrics.gauge(
            "disk_free_bytes",
            "Free disk of the state folder; below disk_floor_bytes no job is claimed.",
        )
        self.disk_floor = metrics.gauge(
            "disk_floor_bytes", "Free disk below which no job is claimed."
        )
        self.kept = metrics.gauge("kept_runs", "Kept folders of ended runs.")
        self.kept_bytes = metrics.gauge("kept_runs_bytes", "Disk used by these folders.")
        self._accrued = metrics.gauge(
            "revenue_accrued_credits", "Revenue of runs that is not billed yet, without the fee."
        )
        self._at_risk = metrics.gauge(
            "revenue_at_risk_credits", "Largest part of it that the loss of one run would forfeit."
        )
        self.sent = BatchMetrics(
            metrics,
            changed=metrics.counter("provider_jobs", "Jobs changed on chain.", kind=KINDS),
            refused=metrics.counter(
                "provider_refused", "Jobs that the contract refused to change.", kind=KINDS
            ),
        ).count

    def set_kept(self, runs: int, size: int) -> None:
        """Set the number of kept folders of ended runs, and their bytes."""
        self.kept.set(runs)
        self.kept_bytes.set(size)

    def revenue(self, unbilled: Collection[int]) -> None:
        """Set the unbilled revenue from that of each run, in credit-wei."""
        self._accrued.set(sum(unbilled) / CREDIT)
        self._at_risk.set(max(unbilled, default=0) / CREDIT)

    def show(self, views: Iterable[View], free: Offer | None) -> None:
        """Set the state of a cycle; capacity keeps its value while the executor does not answer."""
        open_jobs = list(views)
        states = [view.status.state for view in open_jobs if view.status is not None]
        self._jobs.set(len(open_jobs))
        self._live.set(sum(state in {RunState.RUNNING, RunState.QUEUED} for state in states))
        if free is not None:
            self._cpus.set(free.cpus)
            self._memory.set(free.memory * MEGABYTE)
            self._gpus.set(free.gpus)
