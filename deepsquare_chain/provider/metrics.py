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
        self.gas = metrics.gauge("gas_balance_coins", "Coins of the chain for gas.")
        self.head = HeadMetrics(metrics)
        self._jobs = metrics.gauge("jobs_open", "Jobs that may still need something.")
        self._live = metrics.gauge("runs_live", "Runs that the executor has now.")
        self._cpus = metrics.gauge("free_cpus", "Cpus that are free.")
        self._memory = metrics.gauge("free_memory_bytes", "Memory that is free.")
        self._gpus = metrics.gauge("free_gpus", "Gpus that are free.")
        self.can_start = metrics.gauge(
            "executor_can_start", "Whether a test script could be started; 0 claims no job."
        )
        self.draining = metrics.gauge(
            "provider_draining", "Whether the provider is in maintenance; 1 accepts no job."
        )
        self.active = metrics.gauge(
            "provider_active", "Whether the registry has the provider as ACTIVE; 0 gets no job."
        )
        self.approved_until = metrics.gauge(
            "provider_approved_until_timestamp_seconds", "End of the approval, since the epoch."
        )
        self.disk = metrics.gauge(
            "disk_free_bytes",
            "Free disk of the state folder; below disk_floor_bytes none is claimed.",
        )
        self.disk_floor = metrics.gauge(
            "disk_floor_bytes", "Free disk below which no job is claimed."
        )
        self.kept = metrics.gauge("kept_runs", "Folders of ended runs that are kept.")
        self.kept_bytes = metrics.gauge("kept_runs_bytes", "Disk that these folders take.")
        self._accrued = metrics.gauge(
            "revenue_accrued_credits", "Revenue of runs that is not billed yet, without the fee."
        )
        self._at_risk = metrics.gauge(
            "revenue_at_risk_credits", "Largest part of it that one lost run would forfeit now."
        )
        self.sent = BatchMetrics(
            metrics,
            changed=metrics.counter("provider_jobs", "Jobs moved on chain.", kind=KINDS),
            refused=metrics.counter(
                "provider_refused", "Jobs that the contract refused to move.", kind=KINDS
            ),
        ).count

    def keeps(self, runs: int, size: int) -> None:
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
