"""The provider service: each cycle reads chain and executor, and reconciles each job with them.

Actions depend on the current state only; events are hints that tell which jobs to read. Start,
restart and catch-up are ordinary cycles.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Any, Final, Self

from web3.types import BlockIdentifier

from deepsquare_chain.chain.bindings.abi import interface
from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.chain.bindings.events import (
    JobCollected,
    JobSettled,
    JobTransition,
    event_filter,
)
from deepsquare_chain.chain.follower import Follower
from deepsquare_chain.chain.rpc.batching import gather_all, merged
from deepsquare_chain.chain.rpc.heads import Head, HeadMetrics, HeadSource
from deepsquare_chain.chain.signers import Signer
from deepsquare_chain.chain.transactions.fees import GWEI
from deepsquare_chain.chain.transactions.sender import Sender
from deepsquare_chain.credits import CREDIT, format_credits, unbilled_revenue
from deepsquare_chain.daemon import Daemon
from deepsquare_chain.daemon.batcher import BatchMetrics
from deepsquare_chain.daemon.loop import BackgroundTasks
from deepsquare_chain.daemon.service import (
    ServiceSettings,
    open_contracts,
    open_daemon,
    open_sender,
    open_store,
    serve,
)
from deepsquare_chain.errors import GridError, UsageError
from deepsquare_chain.executors.base import (
    Executor,
    ExecutorContext,
    ExecutorUnavailableError,
    RunState,
    Stored,
    create_executor,
)
from deepsquare_chain.executors.local import LocalExecutor
from deepsquare_chain.faults import crash_point
from deepsquare_chain.job import DAY, MEGABYTE, JobStatus, Offer, ProviderStatus
from deepsquare_chain.observability import get_logger
from deepsquare_chain.observability.metrics import Metrics
from deepsquare_chain.provider.actions import ExecutorActions, ProviderBatches
from deepsquare_chain.provider.model import (
    Action,
    ClaimAndStart,
    Close,
    Collecting,
    Phase,
    Situation,
    Start,
    View,
)
from deepsquare_chain.provider.observer import DefinitionCache, RunObserver, free_megabytes
from deepsquare_chain.provider.offering import (
    AbilityPublisher,
    Maintenance,
    OfferFollower,
    capacity_in_use,
    total_capacity,
)
from deepsquare_chain.provider.planner import plan
from deepsquare_chain.provider.state import RunTable
from deepsquare_chain.provider.uploads import OutputUploader
from deepsquare_chain.store.database import Store
from deepsquare_chain.store.definitions import DefinitionStore, FolderDefinitionStore
from deepsquare_chain.store.encryption import ensure_result_key, secrets_labels
from deepsquare_chain.store.gateway_client import GatewayClient

_log = get_logger(__name__)
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


#: Seconds for which a cycle waits for transactions of an earlier process or cycle.
_RECOVER_SECONDS: Final = 2.0
#: Seconds between two slow checks, of what rarely changes.
_SLOW_CHECK_SECONDS: Final = 30.0
#: Gas to collect one interim payment alone; in a batch of 50, each takes a quarter of it.
COLLECT_GAS: Final = 70_000
#: Calls that only a provider's daemon sends, by selector.
_DAEMON_CALLS: Final = {
    interface("MetaScheduler").function(name).selector: name
    for name in ("claim", "start", "claimAndStart", "collect", "finish")
}


@dataclass(frozen=True, slots=True)
class ProviderSettings(ServiceSettings):
    """Settings of a provider. Its `state_dir` also holds the folders of runs.

    Attributes:
        capacity: CPUs, memory (MB) and GPUs of this machine; None for the registered hardware.
        min_free: MB of free disk below which no new job is claimed.
        keep_seconds: Seconds to keep the folder of an ended run.
        keep_megabytes: Total MB of the folders of ended runs above which the oldest are removed;
            0 for no limit.
        start_grace: Seconds after the start on chain during which a run is always launched.
        assignment_timeout: Seconds for which an assigned job may wait for its definition or for
            free capacity; None is half of the grid's claim timeout.
        env: Environment variables of every job.
        collect_interval: Seconds between interim payments of runs whose customer allows them, at
            least the grid's interval; None for the grid's, 0 for never.
        collect_gas_share: Largest share of an interim payment that its gas may cost.
        coin_value: Value of one coin of the chain in credits, to compare gas with payments; 0
            where gas is free.
        max_answer_fee: Fee ceiling in wei per gas while a challenge is open, in place of
            `max_fee_per_gas`: an answer protects the revenue of all runs.
        unbilled_warning: Unbilled revenue of one run, in credit-wei, above which a warning is
            logged; 0 never warns.
        follow_offer: Keep the offer on chain at the capacity that the cluster's own users leave
            free.
        publish_abilities: Test the abilities of jobs here, and publish them on chain as labels.
        secrets_key: File of the key for jobs' secrets; None for one in `state_dir`.
        executor: Name of the executor; see `executors.base`.
        executor_options: Options of the executor, which validates them.
        allow_unisolated: Run jobs without isolation from the daemon.
        allow_root: Run jobs as root.
        private_paths: Folders and files of the daemon, in addition to its state, that are hidden
            from jobs.
    """

    capacity: Offer | None = None
    min_free: int = 64
    keep_seconds: float = 14 * DAY
    keep_megabytes: int = 0
    start_grace: int = 60
    assignment_timeout: int | None = None
    env: dict[str, str] = field(default_factory=dict)
    collect_interval: int | None = None
    collect_gas_share: float = 0.05
    coin_value: float = 1.0
    max_answer_fee: int = 5_000 * GWEI
    unbilled_warning: int = 100 * CREDIT
    follow_offer: bool = False
    publish_abilities: bool = False
    secrets_key: Path | None = None
    executor: str = "local"
    executor_options: Mapping[str, Any] = field(default_factory=dict)
    allow_unisolated: bool = False
    allow_root: bool = False
    private_paths: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True)
class GridRegistration:
    """The registration of an account on a grid, and the grid's parameters; times in seconds."""

    provider_id: int
    claim_timeout: int
    response_timeout: int
    collect_interval: int
    hardware: Offer


async def look_up_provider(contracts: Contracts, account: str) -> GridRegistration:
    """Return the provider of this account, with the parameters of the grid.

    Raises:
        NotFoundError: The account is not registered as a provider.
        EndpointError: The endpoint does not answer.
    """
    provider = await contracts.registry.provider_of(account)
    parameters = await contracts.scheduler.parameters()
    _log.info(
        "provider identified", id=provider.id, account=provider.account, status=provider.status.name
    )
    return GridRegistration(
        provider.id,
        parameters.claim_timeout,
        parameters.response_timeout,
        parameters.collect_interval,
        total_capacity(provider.hardware),
    )


class ProviderService:
    """One provider account on one grid.

    Args:
        contracts: Contracts of the grid.
        sender: The only transaction sender of this account.
        store: Database of this account, opened after this module was imported.
        executor: Runs the jobs.
        definitions: Store of job definitions.
        settings: Settings of the provider.
        registration: Registration of the account; see `look_up_provider`.
        metrics: Metrics of the process; None for a new set.
        on_hardware: Called with the total of the registered hardware, at every refresh.
        gateways: Receive the output.
    """

    def __init__(
        self,
        contracts: Contracts,
        sender: Sender,
        store: Store,
        *,
        executor: Executor,
        definitions: DefinitionStore,
        settings: ProviderSettings,
        registration: GridRegistration,
        metrics: Metrics | None = None,
        on_hardware: Callable[[Offer], None] | None = None,
        gateways: Sequence[GatewayClient] = (),
    ) -> None:
        deployment = contracts.deployment
        self.provider_id = registration.provider_id
        self.table = RunTable(
            store,
            sender.address,
            chain_id=deployment.chain_id,
            contract=contracts.scheduler.address,
        )
        metrics = metrics or Metrics("provider")
        self.metrics = ProviderMetrics(metrics)
        self.metrics.disk_floor.set(settings.min_free * MEGABYTE)
        self._w3 = contracts.w3
        self._contracts = contracts
        self._sender = sender
        self._executor = executor
        self._definitions = definitions
        self._settings = settings
        self._registration = registration
        half_of_claim = max(1, registration.claim_timeout // 2)
        self._assignment_timeout = settings.assignment_timeout or half_of_claim
        self._on_hardware = on_hardware
        definition_cache = DefinitionCache(definitions)
        self._observer = RunObserver(
            contracts.scheduler,
            executor,
            self.table,
            definition_cache,
            provider_id=registration.provider_id,
            confirmations=settings.confirmations,
            first_block=deployment.block,
        )
        env = {"DEEPSQUARE_CHAIN_ID": str(deployment.chain_id), **settings.env}
        secrets_key = settings.secrets_key or settings.state_dir / "secrets.age-key"
        self._abilities = AbilityPublisher(
            executor,
            contracts,
            sender,
            timeout=settings.send_timeout,
            own=lambda: secrets_labels(ensure_result_key(secrets_key)[0].recipient),
        )
        self._executor_actions = ExecutorActions(
            executor,
            self.table,
            definition_cache,
            env,
            abilities=self._usable_abilities,
            secrets_key=secrets_key,
        )
        self._batches = ProviderBatches(
            sender,
            contracts.scheduler,
            size=settings.batch_size,
            timeout=settings.send_timeout,
            count=self.metrics.sent,
        )
        # Events are only hints, so they are read up to the head; irreversible actions wait for
        # confirmed state.
        self._follower = Follower(
            self._w3,
            [contracts.scheduler.address],
            store,
            start_block=deployment.block,
            confirmations=0,
            # Only this provider's events: those of all other providers would be most of the work.
            filters=[
                event_filter(JobTransition, provider=sender.address),
                event_filter(JobSettled, JobCollected, provider=sender.address),
            ],
            settled=settings.confirmations,
            metrics=metrics,
        )
        self.heads = HeadSource(
            self._w3, sender.reconcile, self.metrics.head, poll=settings.poll_interval
        )
        self._uploader = None
        if gateways:
            self._uploader = OutputUploader(executor, self.table, store, gateways, metrics=metrics)
            self._uploader.start()
        self._followed_hash = b""  # hash of a block with all events applied and no challenge open
        self._challenged_at = 0  # chain time of the open challenge; 0 for none
        self._warned: set[int] = set()
        self._checked_machine_at: float | None = None
        self._checked_account_at: float | None = None
        self._logged_actions: dict[int, Action] = {}
        self._offer = OfferFollower(contracts, sender, timeout=settings.send_timeout)
        self._maintenance = Maintenance(contracts, sender, timeout=settings.send_timeout)
        self._retention = Retention(
            executor,
            self.table,
            RetentionLimits(settings.keep_seconds, settings.keep_megabytes * MEGABYTE),
            show=self.metrics.set_kept,
        )
        self._jobs = 0
        self._fault = ""

    async def cycle(self) -> bool:
        """Run one cycle; returns True when a job changed and the next cycle should follow at once.

        Raises:
            EndpointError: The endpoint does not answer.
            StoreError: The database can't be written.
            ReorgTooDeepError: A reorg is deeper than the blocks that are considered final.
            UsageError: Another daemon serves this account.
        """
        if not await self._settle_earlier_transactions():
            return False
        # The state that this cycle reads may lack the result of tasks that end from here on.
        busy = self._executor_actions.launching | self._batches.jobs
        head = await self.heads.poll(lambda: self._batches.mined_at)
        self._refuse_second_daemon()
        if head is None or self._sender.unattended():  # a reorg may have evicted a transaction
            return False
        await self._check_machine()
        if head.hash != self._followed_hash:
            await self._follow(head)
        crash_point("provider.followed")
        return await self._carry_out(head, busy) > 0

    def details(self) -> dict[str, Any]:
        """Return the fields of the status file in addition to the daemon's own state."""
        return {
            "abilities": self._abilities.results,
            "fault": self._fault,
            "draining": self._maintenance.draining,
            "jobs": self._jobs,
            "shortage": self._disk_shortage(free_megabytes(self._settings.state_dir)),
        }

    def _usable_abilities(self) -> frozenset[str] | None:
        return self._abilities.usable if self._settings.publish_abilities else frozenset()

    def drain(self, draining: bool) -> None:
        """Begin or end the maintenance of this provider on chain; running jobs continue."""
        self._maintenance.request(draining=draining)

    async def close(self) -> None:
        """Wait for the background tasks."""
        await gather_all(self._executor_actions.close(), self._batches.close(), self._offer.close())
        others = (self._maintenance, self._retention, self._abilities)
        await gather_all(*(part.close() for part in others))
        if self._uploader is not None:
            await self._uploader.close()

    # -- the steps of a cycle

    async def _settle_earlier_transactions(self) -> bool:
        """Wait for transactions of an earlier process, or that timed out in an earlier cycle.

        The jobs that they change are no longer known, so no job is planned until they are mined.
        Returns whether all of them are.
        """
        if not self._sender.unattended():
            return True
        # An answer has a later nonce, so the pending transactions before it may cost as much.
        await self._check_challenge("latest")
        for receipt in await self._sender.recover(timeout=_RECOVER_SECONDS):
            self._batches.record_block(receipt.block_number)
        return not self._sender.unattended()

    def _refuse_second_daemon(self) -> None:
        """End if another daemon serves this account: both would run the same jobs.

        Raises:
            UsageError: A nonce was used by a call that only a provider's daemon sends.
        """
        scheduler = self._contracts.scheduler.address.lower()
        for tx in self._sender.nonce_conflicts():
            name = _DAEMON_CALLS.get(tx.data[:4])
            if name is not None and tx.to.lower() == scheduler:
                raise UsageError(
                    f"Another provider daemon serves {self._sender.address}: it sent {name} {tx}",
                    hint="Stop one of them and restart the other. Runs continue meanwhile; two "
                    "daemons with a --state-dir each would run every job twice.",
                )

    async def _follow(self, head: Head) -> None:
        """Apply new events and check for an open challenge; once per block while there is none."""
        self._followed_hash = b""
        with merged(self._w3):
            await gather_all(
                self._check_challenge(head.number),
                self._follower.poll(self.table.apply, head=head.number),
                self._observer.prepare(head),
                self._check_account(),
            )
        if not self._challenged_at and self._follower.position == head.number:
            self._followed_hash = head.hash

    async def _check_challenge(self, block: BlockIdentifier) -> None:
        """Read the provider's challenge clock; an open challenge raises the fee ceiling."""
        clock = await self._contracts.scheduler.clock_of(self.provider_id, block=block)
        if clock.challenged_at and not self._challenged_at:
            _log.info("challenge received", at=clock.challenged_at)
        self._challenged_at = clock.challenged_at
        ceiling = self._settings.max_fee_per_gas
        if clock.challenged_at:
            ceiling = max(ceiling, self._settings.max_answer_fee)
        self._sender.max_fee_per_gas = ceiling

    def _must_answer(self, head: Head, planned: Collection[tuple[View, Action]]) -> bool:
        """Return whether a challenge needs a transaction of its own.

        Any transition of a job answers it, so no answer is sent while one is pending; but no
        longer than half of the response timeout, as a transition may revert or not be mined.
        """
        if not self._challenged_at:
            return False
        waited = head.time - self._challenged_at
        if waited * 2 >= self._registration.response_timeout or self._exceeds_fee_ceiling(head):
            return True
        return not self._batches.jobs and not self._batches.would_send(planned)

    def _exceeds_fee_ceiling(self, head: Head) -> bool:
        """Return whether the base fee exceeds the fee ceiling of job transitions."""
        return head.base_fee > self._settings.max_fee_per_gas

    async def _check_machine(self) -> None:
        """Check what rarely changes on this machine: unknown runs, folders of ended runs."""
        if not _is_due(self._checked_machine_at):
            return
        try:
            await self._observer.sweep()
        except ExecutorUnavailableError as error:
            _log.warning("executor unavailable", error=error.message)
            return
        self._retention.check()
        await self._mark_store()
        self._checked_machine_at = time.monotonic()

    async def _check_account(self) -> None:
        """Read what rarely changes on chain: provider status, registered hardware, gas balance."""
        if not _is_due(self._checked_account_at):
            return
        now = time.monotonic()
        provider, balance = await asyncio.gather(
            self._contracts.registry.provider_of(self._sender.address),
            self._w3.eth.get_balance(self._sender.account.address, "latest"),
        )
        self._maintenance.apply_status(provider.status)
        self._abilities.restore(provider.labels)
        self.metrics.active.set(provider.status is ProviderStatus.ACTIVE)
        self.metrics.approved_until.set(provider.approved_until)
        if self._on_hardware is not None:
            self._on_hardware(total_capacity(provider.hardware))
        self.metrics.gas.set(balance / CREDIT)
        self._checked_account_at = now

    async def _mark_store(self) -> None:
        """Mark a shared folder of definitions as read by this provider, for its customers."""
        if isinstance(self._definitions, FolderDefinitionStore):
            with suppress(OSError):  # read access is enough to fetch definitions
                await asyncio.to_thread(self._definitions.mark_reader, self._sender.address)

    async def _carry_out(self, head: Head, busy: frozenset[int]) -> int:
        followed = self._follower.position == head.number
        views = await self._observer.views(head, followed=followed)
        free = await self._observer.free()
        self._fault = await self._observer.fault()
        self.metrics.show(views, free)
        self.metrics.can_start.set(not self._fault)
        self.metrics.draining.set(self._maintenance.draining)
        disk = free_megabytes(self._settings.state_dir)
        self.metrics.disk.set(disk * MEGABYTE)
        self._jobs = len(views)
        self._check_revenue(views, head)
        if self._settings.follow_offer:
            self._offer.follow(free, capacity_in_use(views))
        if self._settings.publish_abilities and not self._fault:
            self._abilities.follow()
        if not views:
            return 0
        situation = Situation(
            now=head.time,
            queues=self._executor.queues,
            free=free,
            fault=self._fault,
            draining=self._maintenance.draining,
            has_disk_space=not self._disk_shortage(disk),
            assignment_timeout=self._assignment_timeout,
            start_grace=self._settings.start_grace,
            collecting=self._collecting(head),
        )
        planned = [pair for pair in plan(views, situation) if pair[0].job.id not in busy]
        self._log_actions(planned)
        crash_point("provider.planned")
        self._record_intent(planned)
        sending = asyncio.ensure_future(self._send(head, planned))
        actions_done, moved = await gather_all(
            self._executor_actions.carry_out(planned, sending.done), sending
        )
        self._batches.forget(view.job.id for view, action in planned if isinstance(action, Close))
        return actions_done + moved

    def _disk_shortage(self, free: int) -> str:
        """Return why `free` MB of disk are too few to claim jobs; empty when they are enough."""
        folder, floor = self._settings.state_dir, self._settings.min_free
        if free >= floor:
            return ""
        return f"{free} MB of disk are free in {folder}, less than the {floor} MB of disk_floor"

    async def _send(self, head: Head, planned: Collection[tuple[View, Action]]) -> int:
        """Send job transitions and a challenge answer; returns the number of jobs changed."""
        answering = self._must_answer(head, planned)
        if answering and self._exceeds_fee_ceiling(head):
            # The raised ceiling is for the answer only: job transitions wait for a lower base fee.
            return int(await self._batches.answer())
        if answering:
            _, moved = await gather_all(self._batches.answer(), self._batches.send(planned))
            return int(moved)
        return await self._batches.send(planned)

    def _collecting(self, head: Head) -> Collecting | None:
        """Return when interim payments are worth their gas at this base fee; None for never."""
        settings, grid = self._settings, self._registration.collect_interval
        interval = grid if settings.collect_interval is None else settings.collect_interval
        if interval == 0:
            return None
        gas = head.base_fee * COLLECT_GAS * Fraction(settings.coin_value)
        return Collecting(max(interval, grid), ceil(gas / Fraction(settings.collect_gas_share)))

    def _check_revenue(self, views: Sequence[View], head: Head) -> None:
        """Update the metrics of unbilled revenue; warn once per run that exceeds the limit."""
        unbilled = {
            view.job.id: unbilled_revenue(view.job, head.time)
            for view in views
            if view.mine and view.chain is JobStatus.RUNNING
        }
        self.metrics.revenue(unbilled.values())
        limit = self._settings.unbilled_warning
        exceeding = {job_id for job_id, amount in unbilled.items() if limit and amount > limit}
        for job_id in sorted(exceeding - self._warned):
            _log.warning(
                "unbilled revenue limit exceeded",
                job=job_id,
                credits=format_credits(unbilled[job_id]),
                limit=format_credits(limit),
                hint="The loss of the run forfeits it. Use interimPayments in the job files of long jobs.",
            )
        self._warned = exceeding

    def _record_intent(self, planned: Sequence[tuple[View, Action]]) -> None:
        """Record the intent to start jobs, before their start is sent."""
        starts = (view.run for view, action in planned if isinstance(action, Start | ClaimAndStart))
        self.table.put(*(run.starting() for run in starts if run.phase is Phase.WATCHED))
        crash_point("provider.intended")

    def _log_actions(self, planned: Sequence[tuple[View, Action]]) -> None:
        """Log the action of each job when it changes."""
        plans = {view.job.id: action for view, action in planned}
        for view, action in planned:
            if self._logged_actions.get(view.job.id) != action:
                _log.debug(
                    "action planned", job=view.job.id, status=view.chain.name, action=str(action)
                )
        self._logged_actions = plans


def _is_due(last: float | None) -> bool:
    """Return whether a slow check is due; `last` is the monotonic time of the last one."""
    return last is None or time.monotonic() - last >= _SLOW_CHECK_SECONDS


#: Seconds between two checks of the retention.
_RETENTION_SECONDS: Final = 600.0
#: Seconds for which a folder is always kept, so that its results can be fetched.
MIN_FOLDER_AGE: Final = 3_600.0


@dataclass(frozen=True, slots=True)
class RetentionLimits:
    """Maximum age of folders in seconds, and their maximum total size in bytes; 0 for no limit."""

    age: float
    size: int = 0


@dataclass(frozen=True, slots=True)
class KeptRun:
    """The folder of a run whose job is settled; `ended_at` in seconds since the epoch."""

    key: str
    ended_at: float
    size: int


def expired_runs(kept: Collection[KeptRun], limits: RetentionLimits, now: float) -> list[KeptRun]:
    """Return the folders to remove, oldest first: those above the age or the total size.

    Nothing younger than `MIN_FOLDER_AGE` is removed.
    """
    to_remove = []
    remaining_size = sum(run.size for run in kept)
    for run in sorted(kept, key=lambda run: (run.ended_at, run.key)):
        age = now - run.ended_at
        too_much = limits.size and remaining_size > limits.size
        if age > MIN_FOLDER_AGE and (age > limits.age or too_much):
            to_remove.append(run)
            remaining_size -= run.size
    return to_remove


class Retention:
    """Removes the folders of closed runs in the background.

    Only runs of this grid whose job is settled or assigned anew are removed: runs of another
    chain or contract stay until the operator removes them. `show` is called with the number of
    kept folders and their bytes.
    """

    def __init__(
        self,
        executor: Executor,
        table: RunTable,
        limits: RetentionLimits,
        *,
        show: Callable[[int, int], None],
    ) -> None:
        self._executor = executor
        self._table = table
        self._limits = limits
        self._show = show
        self._checked_at = float("-inf")
        # The folder of a settled run is final, so its size is measured once.
        self._measured: dict[str, Stored] = {}
        self._tasks = BackgroundTasks()

    def check(self) -> None:
        """Begin to remove expired folders, if a check is due."""
        self._tasks.collect()
        now = time.monotonic()
        if self._tasks or now - self._checked_at < _RETENTION_SECONDS:
            return
        self._checked_at = now
        self._tasks.begin(self.clean(), [])

    async def close(self) -> None:
        """Cancel the removal; a partly removed folder is removed at the next start."""
        self._tasks.cancel_all()

    async def clean(self) -> int:
        """Remove expired folders; returns the number of folders removed."""
        try:
            kept = await self._kept()
        except GridError as error:
            _log.warning("kept runs not measured", error=error.message)
            return 0
        removed: list[KeptRun] = []
        for run in expired_runs(kept, self._limits, time.time()):
            try:
                await self._executor.forget(run.key)
            except GridError as error:
                _log.warning("run not removed", run=run.key, error=error.message, hint=error.hint)
                continue
            self._measured.pop(run.key, None)
            removed.append(run)
        if removed:
            freed = sum(run.size for run in removed)
            _log.info("ended runs removed", runs=len(removed), bytes=freed)
        remaining = set(kept) - set(removed)
        self._show(len(remaining), sum(run.size for run in remaining))
        return len(removed)

    async def _kept(self) -> list[KeptRun]:
        kept_runs = []
        for key in await self._executor.keys():
            parsed = self._table.parse_key(key)
            run = None if parsed is None else self._table.get(parsed[0])
            if parsed is None or run is None:
                continue
            if run.attempt == parsed[1] and run.phase is not Phase.CLOSED:
                continue
            stored = self._measured.get(key) or await self._executor.stored(key)
            if stored is None:
                continue
            self._measured[key] = stored
            ended = run.exit.ended_at if run.exit and run.attempt == parsed[1] else None
            kept_runs.append(KeptRun(key, ended or stored.changed_at, stored.size))
        return kept_runs


NAME: Final = "provider"
_MAINTENANCE: Final = ((signal.SIGUSR1, True), (signal.SIGUSR2, False))


async def run_provider(
    url: str,
    deployment: Deployment,
    account: Signer,
    definitions: DefinitionStore,
    settings: ProviderSettings,
    *,
    executor: Executor | None = None,
    gateways: Sequence[GatewayClient] = (),
    stop: asyncio.Event | None = None,
) -> None:
    """Run a provider until SIGINT, SIGTERM or `stop`; its runs continue without it.

    Args:
        url: JSON-RPC endpoint, or several, separated by commas.
        deployment: Deployment of the grid.
        account: Signer of the registered provider's account.
        definitions: Store of job definitions.
        settings: Settings of the provider.
        executor: Executor of the jobs; by default the one named in the settings.
        gateways: Receive the output; none where customers share the machine.
        stop: Ends it when set.

    Raises:
        NotFoundError: The account is not registered as a provider.
        UsageError: The database belongs to another account or is in use; the executor does not
            exist, or one of its options is invalid; jobs would run as root or without isolation,
            and the settings do not allow that.
        WrongEndpointError: An endpoint serves another chain, or lacks the contracts. One that is
            down is retried.
        ReorgTooDeepError: A reorg is deeper than the blocks that are considered final.
    """

    async def open_once(parts: AsyncExitStack, stop: asyncio.Event) -> Daemon:
        metrics = Metrics(NAME)
        contracts = await open_contracts(parts, url, deployment, settings, metrics)
        registration = await look_up_provider(contracts, account.address)
        store = parts.enter_context(await open_store(NAME, contracts, account.address, settings))
        runs_on = executor or create_executor(
            settings.executor,
            ExecutorContext(
                state_dir=settings.state_dir,
                capacity=settings.capacity or registration.hardware,
                min_free=settings.min_free,
                owner=account.address,
                options=settings.executor_options,
                allow_unisolated=settings.allow_unisolated,
                allow_root=settings.allow_root,
                private=settings.private_paths,
            ),
        )
        service = ProviderService(
            contracts,
            await open_sender(
                parts, contracts, account, store=store, settings=settings, metrics=metrics
            ),
            store,
            executor=runs_on,
            definitions=definitions,
            settings=settings,
            registration=registration,
            metrics=metrics,
            on_hardware=None if settings.capacity else _follow_hardware(runs_on),
            gateways=gateways,
        )
        daemon = await open_daemon(
            NAME,
            service.cycle,
            settings,
            chain_id=deployment.chain_id,
            metrics=metrics,
            stop=stop,
            heads=service.heads,
        )
        daemon.details = service.details
        daemon.unready = service.metrics.head.problem
        maintenance.serve(service)
        daemon.on_close("starts", service.close)
        return daemon

    with _MaintenanceSignals() as maintenance:
        await serve(NAME, open_once, stop)


class _MaintenanceSignals:
    """SIGUSR1 begins the maintenance of a provider, SIGUSR2 ends it.

    Each sends a transaction, as the commands do, so that the change is stored on chain. A signal
    that arrives before the service is open, e.g. while it waits for its endpoint, takes effect
    once it is.
    """

    def __init__(self) -> None:
        self._service: ProviderService | None = None
        self._requested: bool | None = None

    def __enter__(self) -> Self:
        loop = asyncio.get_running_loop()
        for number, draining in _MAINTENANCE:
            with suppress(RuntimeError, ValueError):  # only the main thread can handle signals
                loop.add_signal_handler(number, self._on_signal, draining)
        return self

    def __exit__(self, *_: object) -> None:
        loop = asyncio.get_running_loop()
        for number, _draining in _MAINTENANCE:
            loop.remove_signal_handler(number)

    def serve(self, service: ProviderService) -> None:
        """Set the open service, and apply a signal that arrived before."""
        self._service = service
        if self._requested is not None:
            service.drain(self._requested)

    def _on_signal(self, draining: bool) -> None:
        if self._service is None:
            self._requested = draining
        else:
            self._service.drain(draining)


def _follow_hardware(executor: Executor) -> Callable[[Offer], None] | None:
    """Return a callback that sets a local executor's capacity to the registered hardware."""
    if not isinstance(executor, LocalExecutor):
        return None

    def follow(offer: Offer) -> None:
        executor.offer = offer

    return follow
