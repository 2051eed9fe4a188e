"""The meta-scheduler's service: one cycle looks at the grid and does what follows.

State is the truth, events are hints: they say what a customer wants and what has changed. Several
schedulers at once are safe: what one has done, the contract leaves out for the others.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.chain.bindings.events import event_topics
from deepsquare_chain.chain.follower import Follower
from deepsquare_chain.chain.rpc.batching import gather_all, merged
from deepsquare_chain.chain.rpc.heads import Head, HeadSource
from deepsquare_chain.chain.transactions.sender import Sender
from deepsquare_chain.credits import CREDIT
from deepsquare_chain.daemon.service import ServiceSettings
from deepsquare_chain.faults import crash_point
from deepsquare_chain.job import Job, JobStatus
from deepsquare_chain.metascheduler.batches import SchedulerBatches
from deepsquare_chain.metascheduler.dependencies import Hold
from deepsquare_chain.metascheduler.eligibility import Waiting
from deepsquare_chain.metascheduler.explain import explain_decision, explain_rest, explain_wait
from deepsquare_chain.metascheduler.liveness import (
    Watch,
    expired,
    lost,
    stuck,
    suspicions,
    to_requeue,
)
from deepsquare_chain.metascheduler.metrics import SchedulerMetrics
from deepsquare_chain.metascheduler.observer import ClusterSnapshot, GridObserver
from deepsquare_chain.metascheduler.policy import Plan, Planner, Rules, Snapshot, plan
from deepsquare_chain.metascheduler.state import CURSOR, FOLLOWED, SchedulerState
from deepsquare_chain.observability import get_logger
from deepsquare_chain.observability.metrics import Metrics
from deepsquare_chain.store.database import Store

_log = get_logger(__name__)
#: Seconds to wait in a cycle for transactions of an earlier process or cycle.
_RECOVER_SECONDS: Final = 2.0
#: Waiting jobs whose reasons are logged, oldest first.
_EXPLAINED: Final = 20
_SLOW_LOOKS: Final = 30.0


@dataclass(frozen=True, slots=True)
class SchedulerSettings(ServiceSettings):
    """How a meta-scheduler runs.

    Attributes:
        rules: How the queue is served.
        watch: How closely providers are watched.
    """

    rules: Rules = field(default_factory=Rules)
    watch: Watch = field(default_factory=Watch)


class SchedulerService:
    """One scheduler of one grid.

    Args:
        contracts: Of the grid.
        sender: The one sender of an account with METASCHEDULER_ROLE; None for a dry run, which
            says what it would do.
        store: Database of this scheduler, opened after this module was imported.
        settings: How it runs.
        metrics: Where the figures go.
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
        metrics = metrics or Metrics("metascheduler")
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
            counted=self.metrics.sent,
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
            None if sender is None else sender.tend,
            self.metrics.head,
            poll=settings.poll_interval,
        )
        self._followed = (b"", False)  # a block up to which all believed events are taken in
        self._looked_slowly: float | None = None
        self._waits: dict[int, str] = {}
        self._holds: dict[int, Hold] = {}
        self._resting: frozenset[int] = frozenset()

    async def cycle(self) -> bool:
        """Look once and act; True when something moved, so that the next look should follow.

        Raises:
            EndpointError: The chain does not answer.
            StoreError: The database can't be written.
            ReorgTooDeepError: The chain replaced what was believed long ago.
        """
        head = await self._settle_old()
        if head is None:
            return False
        await self._follow(head)
        crash_point("scheduler.followed")
        cluster = await self._look(head)
        self.cluster = cluster
        self.metrics.show(cluster, self.state.history())
        self._tell_who_rests(cluster)
        # Different jobs each: only the waiting for a block is shared.
        moved = await asyncio.gather(self._hold_to_account(cluster), self._assign(cluster))
        return any(moved)

    # -- the steps of a cycle

    async def _settle_old(self) -> Head | None:
        """The latest block; None unless every earlier transaction is mined.

        Only then the chain shows what they did. None too from an endpoint that lags behind.
        """
        pending = self._sender is not None and bool(self._sender.pending())
        head = await self._head(again=pending)
        if self._sender is None or not self._sender.pending():
            return head
        await self._sender.recover(timeout=_RECOVER_SECONDS)
        return None if self._sender.pending() else await self._head(again=True)

    async def _head(self, *, again: bool = False) -> Head | None:
        return await self.heads.look(lambda: self._batches.mined_at, again=again)

    async def _follow(self, head: Head) -> None:
        """Take in the events of a block and read what the next look needs of it, once."""
        if self._followed == (head.hash, head.final):
            return
        with merged(self._w3):
            await gather_all(
                self._follower.poll(self.state.apply, head=head.number),
                self.observer.prepare(head),
                self._look_slowly(),
            )
        depth = 0 if head.final else self._settings.confirmations
        if self._follower.position >= head.number - depth:
            self._followed = (head.hash, head.final)

    async def _look(self, head: Head) -> ClusterSnapshot:
        """The grid at a block."""
        return await self.observer.look(head, events=self._follower.position)

    async def _look_slowly(self) -> None:
        last, now = self._looked_slowly, time.monotonic()
        if self._sender is None or (last is not None and now - last < _SLOW_LOOKS):
            return
        balance = await self._w3.eth.get_balance(self._sender.account.address, "latest")
        self.metrics.gas.set(balance / CREDIT)
        self._looked_slowly = now

    def _tell_who_rests(self, cluster: ClusterSnapshot) -> None:
        """Log who begins to rest, and who comes back."""
        resting = {
            v.provider.id: v for v in cluster.views if v.rests_until > cluster.block_context.now
        }
        for provider_id in resting.keys() - self._resting:
            why = explain_rest(resting[provider_id])
            _log.warning("provider rests", provider=provider_id, why=f"it {why}")
        for provider_id in self._resting - resting.keys():
            _log.info("provider is back", provider=provider_id)
        self._resting = frozenset(resting)

    async def _hold_to_account(self, cluster: ClusterSnapshot) -> int:
        """Requeue, challenge and panic; capacity that this frees is assigned in the next cycle."""
        block_context, now = cluster.block_context, cluster.block_context.now
        stranded = to_requeue(cluster.assigned, cluster.watched, block_context)
        doubted = suspicions(cluster.assigned, cluster.watched, block_context, self._settings.watch)
        gone = lost(cluster.assigned, cluster.watched, block_context)
        for suspicion in doubted:
            _log.info("suspicious", provider=suspicion.provider_id, why=suspicion.why)
        for job in gone:
            _log.warning("lost job", job=job.id, provider=job.provider_id)
        moved = await asyncio.gather(
            self._batches.requeue(_ids(stranded), now),
            self._batches.panic(_ids(gone), now),
            *(self._batches.challenge(each.job_id, now) for each in doubted),
        )
        return sum(moved)

    async def _assign(self, cluster: ClusterSnapshot) -> int:
        now = cluster.block_context.now
        snapshot = self._snapshot(cluster)
        began = time.perf_counter()
        self.plan = self._planner.plan(snapshot, self.rules, self.state.history())
        self.metrics.planning.observe(time.perf_counter() - began)
        self._explain(snapshot, self.plan)
        self._tell_held(cluster)
        crash_point("scheduler.planned")
        groups = self.plan.by_provider()
        prices = {view.provider.id: view.provider.prices for view in cluster.views}
        priced = {(provider, prices[provider]): ids for provider, ids in groups.items()}
        refusals = self._batches.refusals
        moved = await self._batches.assign(priced, now)
        if self._batches.refusals > refusals:
            self.state.registry_changed = True  # prices, an offer or a standing have changed
        self.observer.doubt(job_id for ids in groups.values() for job_id in ids)
        moved += await self._cancel_expired(cluster)
        return moved + await self._free_stuck(cluster, snapshot)

    def _snapshot(self, cluster: ClusterSnapshot) -> Snapshot:
        """The grid as the plan sees it: without jobs and providers that are left alone for now."""
        now = cluster.block_context.now
        due = set(self._batches.due("assign", [each.job.id for each in cluster.waiting], now))
        return dataclasses.replace(
            cluster.snapshot,
            waiting=[each for each in cluster.snapshot.waiting if each.job.id in due],
            providers=[
                dataclasses.replace(
                    view, cooldown_until=self._batches.cooldown_until(view.provider.id)
                )
                for view in cluster.views
            ],
        )

    async def _cancel_expired(self, cluster: ClusterSnapshot) -> int:
        """Give customers the credits of jobs back that nobody took for the pending expiry."""
        going = {decision.waiting.job.id for decision in self.plan.decisions}
        queued = [each.job for each in cluster.waiting if each.job.id not in going]
        ids = _ids(expired(queued, cluster.block_context))
        if ids:
            _log.info("jobs expired", jobs=ids[:_EXPLAINED], count=len(ids))
        moved = await self._batches.cancel(ids, cluster.block_context.now)
        self.observer.doubt(ids)
        return moved

    async def _free_stuck(self, cluster: ClusterSnapshot, snapshot: Snapshot) -> int:
        """Take back what a cluster queues too long, where another provider would start it now."""
        block_context = cluster.block_context
        jobs = {job.id: job for job in stuck(cluster.assigned, cluster.watched, block_context)}
        known = self.state.live() if jobs else {}
        waiting = [
            Waiting(
                job=job,
                objective=known[job.id].objective,
                uses=known[job.id].uses,
                queued_at=job.since,
                excluded=await self.observer.line(job.retry_of) | {job.provider_id},
            )
            for job in jobs.values()
            if job.id in known
        ]
        if not waiting:
            return 0
        elsewhere = plan(
            Snapshot(
                block_context.now,
                snapshot.providers,
                waiting,
                [*cluster.assigned, *_as_assigned(self.plan, block_context.now)],
            ),
            self.rules,
            self.state.history(),
        )
        ids = [decision.waiting.job.id for decision in elsewhere.decisions]
        return await self._batches.requeue(ids, block_context.now)

    def _explain(self, snapshot: Snapshot, decided: Plan) -> None:
        """Log every decision, and the oldest waits when their reasons change."""
        for decision in decided.decisions:
            _log.info(
                "assigns", job=decision.waiting.job.id, why=explain_decision(decision, decided)
            )
        going = {decision.waiting.job.id for decision in decided.decisions}
        staying = [waiting for waiting in snapshot.waiting if waiting.job.id not in going]
        staying.sort(key=lambda waiting: (waiting.queued_at, waiting.job.id))
        waits: dict[int, str] = {}
        for waiting in staying[:_EXPLAINED]:
            text = explain_wait(waiting, snapshot, decided, self.rules).text
            waits[waiting.job.id] = text
            if self._waits.get(waiting.job.id) != text:
                _log.info("waits", job=waiting.job.id, why=text)
        self._waits = waits

    def _tell_held(self, cluster: ClusterSnapshot) -> None:
        """Log why jobs are not offered to the policy, and again when the reason changes."""
        first = dict(sorted(cluster.held.items())[:_EXPLAINED])
        for job_id, hold in first.items():
            if self._holds.get(job_id) != hold:
                _log.info("job held", job=job_id, why=hold.text, final=hold.final)
        self._holds = first


def _ids(jobs: Sequence[Job]) -> list[int]:
    return [job.id for job in jobs]


def _as_assigned(decided: Plan, now: int) -> list[Job]:
    """The jobs of a plan as they will be."""
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
