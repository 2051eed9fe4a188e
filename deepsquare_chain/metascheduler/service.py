"""The meta-scheduler service. Each cycle takes a cluster snapshot, plans and sends transactions.

Contract state is authoritative. Events only supply the terms of jobs and mark what has changed. Several schedulers may run at once: the contract skips jobs that another one has handled.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Final

from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.chain.bindings.deployment import METASCHEDULER_ROLE, Deployment
from deepsquare_chain.chain.bindings.events import event_topics
from deepsquare_chain.chain.follower import Follower
from deepsquare_chain.chain.rpc.batching import gather_all, merged
from deepsquare_chain.chain.rpc.heads import Head, HeadMetrics, HeadSource
from deepsquare_chain.chain.signers import Signer
from deepsquare_chain.chain.transactions.sender import Sender
from deepsquare_chain.credits import CREDIT
from deepsquare_chain.daemon import Daemon
from deepsquare_chain.daemon.batcher import BatchMetrics
from deepsquare_chain.daemon.service import (
    ServiceSettings,
    open_contracts,
    open_daemon,
    open_sender,
    open_store,
    serve,
)
from deepsquare_chain.errors import NotAuthorisedError
from deepsquare_chain.faults import crash_point
from deepsquare_chain.job import Job, JobStatus
from deepsquare_chain.metascheduler.batches import SchedulerBatches
from deepsquare_chain.metascheduler.dependencies import Hold
from deepsquare_chain.metascheduler.eligibility import ProviderView, Waiting
from deepsquare_chain.metascheduler.explain import (
    explain_decision,
    explain_suspension,
    explain_wait,
)
from deepsquare_chain.metascheduler.history import RunHistory
from deepsquare_chain.metascheduler.liveness import (
    Watch,
    expired,
    lost,
    stuck,
    suspicions,
    to_requeue,
)
from deepsquare_chain.metascheduler.observer import ClusterSnapshot, GridObserver
from deepsquare_chain.metascheduler.policy import Plan, Planner, Rules, Snapshot, plan
from deepsquare_chain.metascheduler.state import CURSOR, FOLLOWED, SchedulerState
from deepsquare_chain.observability import get_logger
from deepsquare_chain.observability.metrics import Metrics
from deepsquare_chain.store.database import Store

NAME: Final = "metascheduler"
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
            "suspended_providers", "Providers that are suspended because of strikes."
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


_log = get_logger(__name__)
#: Seconds to wait in a cycle for transactions of an earlier process or cycle.
_RECOVER_SECONDS: Final = 2.0
#: Most waiting jobs whose reasons are logged, oldest first.
_MAX_EXPLAINED: Final = 20
#: Seconds between two reads of the account's balance.
_BALANCE_SECONDS: Final = 30.0


@dataclass(frozen=True, slots=True)
class SchedulerSettings(ServiceSettings):
    """Settings of a meta-scheduler.

    Attributes:
        rules: Scheduling rules of the queue.
        watch: Thresholds of the liveness checks.
    """

    rules: Rules = field(default_factory=Rules)
    watch: Watch = field(default_factory=Watch)


class SchedulerService:
    """A meta-scheduler of one grid.

    `sender` is the only sender of an account with METASCHEDULER_ROLE; None for a dry run, which
    logs the transactions instead. `store` must be opened after this module was imported.
    """

    def __init__(
        self,
        contracts: Contracts,
        sender: Sender | None,
        store: Store,
        *,
        settings: SchedulerSettings,
        metrics: Metrics | None = None,
    ) -> None:
        self.state = SchedulerState(store)
        self.observer = GridObserver(contracts, self.state, settings.watch)
        metrics = metrics or Metrics(NAME)
        self.metrics = SchedulerMetrics(metrics)
        self.cluster: ClusterSnapshot | None = None
        self.plan = Plan()
        self.rules = settings.rules
        self._planner = Planner()
        self._w3 = contracts.w3
        self._sender = sender
        self._settings = settings
        self._batches = SchedulerBatches(
            sender,
            contracts.scheduler,
            size=settings.batch_size,
            timeout=settings.send_timeout,
            count=self.metrics.sent,
        )
        self._follower = Follower(
            self._w3,
            [contracts.scheduler.address, contracts.registry.address],
            store,
            start_block=contracts.deployment.block,
            confirmations=settings.confirmations,
            name=CURSOR,
            metrics=metrics,
            filters=[[event_topics(*FOLLOWED)]],
            settled=settings.confirmations,
        )
        self.heads = HeadSource(
            self._w3,
            None if sender is None else sender.reconcile,
            self.metrics.head,
            poll=settings.poll_interval,
        )
        self._followed_block = (b"", False)  # block up to which all confirmed events were applied
        self._balance_checked_at: float | None = None
        self._logged_waits: dict[int, str] = {}
        self._logged_assignments: dict[int, str] = {}
        self._suspected: frozenset[int] = frozenset()
        self._holds: dict[int, Hold] = {}
        self._suspended: frozenset[int] = frozenset()

    async def cycle(self) -> bool:
        """Run one cycle. Return True if a transaction took effect: the next should follow at once.

        Raises:
            EndpointError: No endpoint answers.
            StoreError: The database can't be written.
            ReorgTooDeepError: A reorg goes deeper than the follower can roll back.
        """
        head = await self._settle_earlier_transactions()
        if head is None:
            return False
        await self._follow(head)
        crash_point("scheduler.followed")
        cluster = await self.observer.read(head, events=self._follower.position)
        self.cluster = cluster
        self.metrics.show(cluster, self.state.history())
        self._log_suspensions(cluster)
        # The two steps handle different jobs. Run together, they wait for a block only once.
        moved = await asyncio.gather(self._check_liveness(cluster), self._assign(cluster))
        return any(moved)

    # -- the steps of a cycle

    async def _settle_earlier_transactions(self) -> Head | None:
        """Return the latest block, or None while an earlier transaction is not mined.

        Contract state includes the effects of those transactions only after that. Also returns None
        if the endpoint lags behind.
        """
        pending = self._sender is not None and bool(self._sender.pending())
        head = await self._head(again=pending)
        if self._sender is None or not self._sender.pending():
            return head
        await self._sender.recover(timeout=_RECOVER_SECONDS)
        return None if self._sender.pending() else await self._head(again=True)

    async def _head(self, *, again: bool = False) -> Head | None:
        return await self.heads.poll(lambda: self._batches.mined_at, again=again)

    async def _follow(self, head: Head) -> None:
        """Apply the events up to a block and prefetch data for the snapshot, once per block."""
        if self._followed_block == (head.hash, head.final):
            return
        with merged(self._w3):
            await gather_all(
                self._follower.poll(self.state.apply, head=head.number),
                self.observer.prepare(head),
                self._check_balance(),
            )
        depth = 0 if head.final else self._settings.confirmations
        if self._follower.position >= head.number - depth:
            self._followed_block = (head.hash, head.final)

    async def _check_balance(self) -> None:
        last_read, now = self._balance_checked_at, time.monotonic()
        if self._sender is None or (last_read is not None and now - last_read < _BALANCE_SECONDS):
            return
        balance = await self._w3.eth.get_balance(self._sender.account.address, "latest")
        self.metrics.gas.set(balance / CREDIT)
        self._balance_checked_at = now

    def _log_suspensions(self, cluster: ClusterSnapshot) -> None:
        """Log the beginnings and ends of suspensions."""
        suspended = {
            v.provider.id: v for v in cluster.views if v.suspended_until > cluster.block_context.now
        }
        for provider_id in suspended.keys() - self._suspended:
            reason = explain_suspension(suspended[provider_id])
            _log.warning("provider cooldown started", provider=provider_id, reason=f"it {reason}")
        for provider_id in self._suspended - suspended.keys():
            _log.info("provider cooldown ended", provider=provider_id)
        self._suspended = frozenset(suspended)

    async def _check_liveness(self, cluster: ClusterSnapshot) -> int:
        """Requeue, challenge and panic. The next cycle assigns the capacity that this frees."""
        block_context, now = cluster.block_context, cluster.block_context.now
        stranded_jobs = to_requeue(cluster.assigned, cluster.watched, block_context)
        lost_jobs = lost(cluster.assigned, cluster.watched, block_context)
        all_suspicions = suspicions(
            cluster.assigned, cluster.watched, block_context, self._settings.watch
        )
        for suspicion in all_suspicions:
            if suspicion.provider_id not in self._suspected:
                _log.info(
                    "provider suspected", provider=suspicion.provider_id, reason=suspicion.why
                )
        self._suspected = frozenset(suspicion.provider_id for suspicion in all_suspicions)
        for job in lost_jobs:
            _log.warning("job lost", job=job.id, provider=job.provider_id)
        moved = await asyncio.gather(
            self._batches.requeue(_ids(stranded_jobs), now),
            self._batches.panic(_ids(lost_jobs), now),
            *(self._batches.challenge(challenge.job_id, now) for challenge in all_suspicions),
        )
        return sum(moved)

    async def _assign(self, cluster: ClusterSnapshot) -> int:
        now = cluster.block_context.now
        snapshot = self._snapshot(cluster)
        began = time.perf_counter()
        self.plan = self._planner.plan(snapshot, self.rules, self.state.history())
        self.metrics.planning.observe(time.perf_counter() - began)
        self._log_decisions(snapshot, self.plan)
        self._log_held_jobs(cluster)
        crash_point("scheduler.planned")
        groups = self.plan.by_provider()
        prices = {view.provider.id: view.provider.prices for view in cluster.views}
        priced = {(provider, prices[provider]): ids for provider, ids in groups.items()}
        refusals = self._batches.refusals
        moved = await self._batches.assign(priced, now)
        if self._batches.refusals > refusals:
            self.state.registry_changed = True  # prices, an offer or a provider's status changed
        self.observer.evict(job_id for ids in groups.values() for job_id in ids)
        moved += await self._cancel_expired(cluster)
        return moved + await self._requeue_stuck(cluster, snapshot)

    def _snapshot(self, cluster: ClusterSnapshot) -> Snapshot:
        """Return the planner's input: without jobs in backoff, and with cooldowns of providers."""

        def with_cooldown(view: ProviderView) -> ProviderView:
            until = self._batches.cooldown_until(view.provider.id)
            return dataclasses.replace(view, cooldown_until=until)

        now = cluster.block_context.now
        due = set(self._batches.due("assign", [waiting.job.id for waiting in cluster.waiting], now))
        return dataclasses.replace(
            cluster.snapshot,
            waiting=[waiting for waiting in cluster.snapshot.waiting if waiting.job.id in due],
            providers=[with_cooldown(view) for view in cluster.views],
        )

    async def _cancel_expired(self, cluster: ClusterSnapshot) -> int:
        """Cancel jobs that were PENDING for the pending expiry; this refunds their customers."""
        assigned_ids = {decision.waiting.job.id for decision in self.plan.decisions}
        queued = [waiting.job for waiting in cluster.waiting if waiting.job.id not in assigned_ids]
        ids = _ids(expired(queued, cluster.block_context))
        if ids:
            _log.info("jobs expired", jobs=ids[:_MAX_EXPLAINED], count=len(ids))
        moved = await self._batches.cancel(ids, cluster.block_context.now)
        self.observer.evict(ids)
        return moved

    async def _requeue_stuck(self, cluster: ClusterSnapshot, snapshot: Snapshot) -> int:
        """Requeue jobs that a cluster queues too long, if another provider would start them now."""
        block_context = cluster.block_context
        now, waiting = block_context.now, []
        for job in stuck(cluster.assigned, cluster.watched, block_context):
            known = self.state.live().get(job.id)
            if known is not None:
                lost_at = await self.observer.providers_that_lost(job.retry_of)
                excluded = lost_at | {job.provider_id}
                waiting.append(Waiting(job, known.objective, known.uses, job.since, excluded))
        if not waiting:
            return 0
        assigned = [*cluster.assigned, *_as_assigned(self.plan, now)]
        others = Snapshot(now, snapshot.providers, waiting, assigned)
        elsewhere = plan(others, self.rules, self.state.history())
        ids = [decision.waiting.job.id for decision in elsewhere.decisions]
        return await self._batches.requeue(ids, now)

    def _log_decisions(self, snapshot: Snapshot, decided: Plan) -> None:
        """Log decisions, and why the oldest waiting jobs wait, when the reason changes."""
        assignments = {d.waiting.job.id: explain_decision(d, decided) for d in decided.decisions}
        for job_id, text in assignments.items():
            # A decision is made again in each cycle until its transaction is sent.
            if self._logged_assignments.get(job_id) != text:
                _log.info("job assigned", job=job_id, reason=text)
        self._logged_assignments = assignments
        waiting_jobs = [entry for entry in snapshot.waiting if entry.job.id not in assignments]
        waiting_jobs.sort(key=lambda waiting: (waiting.queued_at, waiting.job.id))
        waits: dict[int, str] = {}
        for waiting in waiting_jobs[:_MAX_EXPLAINED]:
            text = explain_wait(waiting, snapshot, decided, self.rules).text
            waits[waiting.job.id] = text
            if self._logged_waits.get(waiting.job.id) != text:
                _log.info("job deferred", job=waiting.job.id, reason=text)
        self._logged_waits = waits

    def _log_held_jobs(self, cluster: ClusterSnapshot) -> None:
        """Log why jobs are held back from the planner, and again when the reason changes."""
        oldest = dict(sorted(cluster.held.items())[:_MAX_EXPLAINED])
        for job_id, hold in oldest.items():
            if self._holds.get(job_id) != hold:
                _log.info("job held", job=job_id, reason=hold.text, final=hold.final)
        self._holds = oldest


async def run_scheduler(
    url: str,
    deployment: Deployment,
    account: Signer | None,
    settings: SchedulerSettings,
    *,
    stop: asyncio.Event | None = None,
) -> None:
    """Run a meta-scheduler until SIGINT, SIGTERM or `stop`.

    Args:
        url: JSON-RPC endpoint, or several, separated by commas.
        deployment: Deployment of the grid.
        account: Holder of METASCHEDULER_ROLE; None for a dry run, which only logs transactions.
        settings: Settings of the scheduler.
        stop: Stops the daemon when set.

    Raises:
        NotAuthorisedError: The account may not assign jobs.
        UsageError: The database belongs to another account or grid, or is in use.
        WrongEndpointError: An endpoint serves another chain, or lacks the contracts. An endpoint
            that is down is retried instead.
        ReorgTooDeepError: A reorg goes deeper than the follower can roll back.
    """

    async def open_once(parts: AsyncExitStack, stop: asyncio.Event) -> Daemon:
        metrics = Metrics(NAME)
        contracts = await open_contracts(parts, url, deployment, settings, metrics)
        await _check_role(contracts, account)
        address = None if account is None else account.address
        store = parts.enter_context(await open_store(NAME, contracts, address, settings))
        sender = None
        if account is not None:
            sender = await open_sender(
                parts, contracts, account, store=store, settings=settings, metrics=metrics
            )
        service = SchedulerService(contracts, sender, store, settings=settings, metrics=metrics)
        daemon = await open_daemon(
            NAME,
            service.cycle,
            settings,
            chain_id=deployment.chain_id,
            metrics=metrics,
            stop=stop,
            heads=service.heads,
        )
        daemon.unready = service.metrics.head.problem
        return daemon

    await serve(NAME, open_once, stop)


async def _check_role(contracts: Contracts, account: Signer | None) -> None:
    if account is None:
        _log.warning("dry run started", reason="no wallet was given: nothing will be sent")
        return
    if not await contracts.scheduler.has_role(METASCHEDULER_ROLE, account.address):
        raise NotAuthorisedError(
            f"{account.address} can't assign jobs: it does not have METASCHEDULER_ROLE",
            hint="Ask the grid's administrator to grant it, or omit the wallet for a dry run.",
        )


def _ids(jobs: Sequence[Job]) -> list[int]:
    return [job.id for job in jobs]


def _as_assigned(decided: Plan, now: int) -> list[Job]:
    """Return the jobs of a plan as they will be once assigned."""
    return [
        dataclasses.replace(
            decision.waiting.job,
            status=JobStatus.META_SCHEDULED,
            provider_id=decision.provider_id,
            rate=decision.rate,
            since=now,
        )
        for decision in decided.decisions
    ]
