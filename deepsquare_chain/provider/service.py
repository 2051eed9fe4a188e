"""The provider's service: one cycle looks at chain and executor and does what follows.

State is the truth, events are hints: they say which jobs to look at. Start, restart and catch-up
are ordinary cycles.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from deepsquare_chain.chain.abi import interface
from deepsquare_chain.chain.contracts import Contracts
from deepsquare_chain.chain.events import JobSettled, JobTransition, event_filter
from deepsquare_chain.chain.follower import Follower
from deepsquare_chain.chain.sender import Sender
from deepsquare_chain.chain.stillness import stands_still
from deepsquare_chain.credits import CREDIT
from deepsquare_chain.daemon.service import ServiceSettings
from deepsquare_chain.errors import UsageError
from deepsquare_chain.executors.base import Executor, ExecutorUnavailableError
from deepsquare_chain.faults import crash_point
from deepsquare_chain.job import Offer
from deepsquare_chain.observe import get_logger
from deepsquare_chain.observe.metrics import Metrics
from deepsquare_chain.provider import rows
from deepsquare_chain.provider.batches import Batches
from deepsquare_chain.provider.figures import Figures
from deepsquare_chain.provider.handlers import Handlers
from deepsquare_chain.provider.materials import Materials
from deepsquare_chain.provider.model import Action, Close, Phase, Situation, Start, View
from deepsquare_chain.provider.observer import Head, Observer, free_megabytes
from deepsquare_chain.provider.offering import OfferFollower, held_by, in_all
from deepsquare_chain.provider.planner import plan
from deepsquare_chain.provider.state import RunTable
from deepsquare_chain.provider.together import together
from deepsquare_chain.store.database import Store
from deepsquare_chain.store.definitions import DefinitionStore

_log = get_logger(__name__)
#: Seconds to wait in a cycle for transactions of an earlier process or cycle.
_RECOVER_SECONDS: Final = 2.0
_SLOW_LOOKS: Final = 30.0
#: Calls that nothing but a provider's daemon sends, by their selectors.
_DAEMON_CALLS: Final = {
    interface("MetaScheduler").function(entry["name"]).selector: entry["name"]
    for entry in interface("MetaScheduler").entries("function")
    if entry["name"] in {"claim", "start", "claimAndStart", "finish"}
}


@dataclass(frozen=True, slots=True)
class ProviderSettings(ServiceSettings):
    """How a provider runs; runs stand in its `state_dir` too.

    Attributes:
        capacity: Cpus, memory (MB) and gpus of this machine; None takes the registered hardware.
        min_free: MB of disk below which nothing new is claimed.
        start_grace: Seconds after its start on chain within which a run is begun in any case.
        patience: Seconds that an assigned job may wait for its definition or for room; None is
            half of the grid's claim timeout.
        env: Variables that every job gets.
        follow_offer: Keep the offer at what the cluster's own users leave free.
        executor: Name of the executor; see `executors.registry`.
        executor_options: Options of it, which it checks itself.
    """

    capacity: Offer | None = None
    min_free: int = 64
    start_grace: int = 60
    patience: int | None = None
    env: dict[str, str] = field(default_factory=dict)
    follow_offer: bool = False
    executor: str = "local"
    executor_options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Standing:
    """Who an account is on a grid; `claim_timeout` is in seconds."""

    provider_id: int
    claim_timeout: int
    hardware: Offer


async def look_up(contracts: Contracts, account: str) -> Standing:
    """Who this account is.

    Raises:
        NotFoundError: It is not registered as a provider.
        EndpointError: The chain does not answer.
    """
    provider = await contracts.registry.provider_of(account)
    parameters = await contracts.scheduler.parameters()
    _log.info("provider", id=provider.id, account=provider.account, status=provider.status.name)
    return Standing(provider.id, parameters.claim_timeout, in_all(provider.hardware))


class ProviderService:
    """One provider account on one grid.

    Args:
        contracts: Of the grid.
        sender: The one sender of this account.
        store: Database of this account, opened after this module was imported.
        executor: Where jobs run.
        definitions: Where definitions stand.
        settings: How it runs.
        standing: Who this account is; see `look_up`.
        metrics: Where the figures go.
        on_hardware: Told what the registered hardware offers in all, now and then.
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
        standing: Standing,
        metrics: Metrics | None = None,
        on_hardware: Callable[[Offer], None] | None = None,
    ) -> None:
        deployment = contracts.deployment
        self.provider_id = standing.provider_id
        self.table = RunTable(
            store,
            sender.address,
            chain_id=deployment.chain_id,
            contract=contracts.scheduler.address,
        )
        metrics = metrics or Metrics("provider")
        self.figures = Figures(metrics)
        self._w3 = contracts.w3
        self._contracts = contracts
        self._sender = sender
        self._executor = executor
        self._settings = settings
        self._patience = settings.patience or max(1, standing.claim_timeout // 2)
        self._on_hardware = on_hardware
        materials = Materials(definitions)
        self._observer = Observer(
            contracts.scheduler,
            executor,
            self.table,
            materials,
            provider_id=standing.provider_id,
            confirmations=settings.confirmations,
            first_block=deployment.block,
        )
        env = {"DEEPSQUARE_CHAIN_ID": str(deployment.chain_id), **settings.env}
        self._handlers = Handlers(executor, self.table, materials, env)
        self._batches = Batches(
            sender,
            contracts.scheduler,
            size=settings.batch_size,
            timeout=settings.send_timeout,
            counted=self.figures.sent,
        )
        # Events are hints here, so they are read up to the head; what can't be undone waits
        # for confirmed state.
        self._follower = Follower(
            self._w3,
            [contracts.scheduler.address],
            store,
            start_block=deployment.block,
            confirmations=0,
            # Only its own: what all the others do would be most of its work.
            filters=[
                event_filter(kind, provider=sender.address) for kind in (JobTransition, JobSettled)
            ],
            settled=settings.confirmations,
            metrics=metrics,
        )
        self._head = Head(0, 0, b"")
        self._followed = b""  # the block up to which events are taken in, and a challenge seen
        self._looked_slowly: float | None = None
        self._told: dict[int, Action] = {}
        self._offer = OfferFollower(contracts, sender, timeout=settings.send_timeout)
        self._fault = ""

    async def cycle(self) -> bool:
        """Look once and act; True when something moved, so that the next look should follow.

        Raises:
            EndpointError: The chain does not answer.
            StoreError: The database can't be written.
            ReorgTooDeepError: The chain replaced what was believed long ago.
            UsageError: Another daemon serves this account.
        """
        if not await self._settle_old():
            return False
        # Whatever ends from here on may be missing in what this cycle sees.
        busy = self._handlers.starting | self._batches.jobs
        head, _ = await together(self._look_at_head(), self._sender.tend())
        self._refuse_second_daemon()
        if head is None or self._sender.unattended():  # the chain may have taken one back
            return False
        await self._look_slowly()
        if head.hash != self._followed:
            await self._follow(head)
        crash_point("provider.followed")
        return await self._act(head, busy) > 0

    def details(self) -> dict[str, str]:
        """What the status file says beside the daemon's own state."""
        return {"fault": self._fault}

    async def close(self) -> None:
        """Wait for what goes on beside the cycles."""
        await together(self._handlers.close(), self._batches.close(), self._offer.close())

    # -- the steps of a cycle

    async def _settle_old(self) -> bool:
        """Whether every transaction is mined that an earlier process sent, or a cycle gave up.

        Nobody knows any more which jobs they move, so that first the chain must show it.
        """
        if not self._sender.unattended():
            return True
        for receipt in await self._sender.recover(timeout=_RECOVER_SECONDS):
            self._batches.mined_at = max(self._batches.mined_at, receipt.block_number)
        return not self._sender.unattended()

    def _refuse_second_daemon(self) -> None:
        """End where another daemon serves this account: it would run the same jobs once more.

        Raises:
            UsageError: A nonce was used by a call that only such a daemon sends.
        """
        scheduler = self._contracts.scheduler.address.lower()
        for each in self._sender.foreign():
            name = _DAEMON_CALLS.get(each.data[:4])
            if name is not None and each.to.lower() == scheduler:
                raise UsageError(
                    f"Another provider daemon serves {self._sender.address}: it sent {name} {each}",
                    hint="Stop one of them and start the other again. Runs go on meanwhile; two "
                    "daemons with a --state-dir each would run every job twice.",
                )

    async def _look_at_head(self) -> Head | None:
        """The latest block; None from an endpoint that lags behind what was seen before."""
        seen = max(self._head.number, self._batches.mined_at)
        block = await self._w3.eth.get_block("latest")
        # Where only transactions make blocks, time goes on without them; the next has it.
        still = await stands_still(self._w3)
        now = int(block["timestamp"]) + int(still)
        head = Head(int(block["number"]), now, bytes(block["hash"]), final=still > 0)
        if head.number < seen:
            _log.warning("endpoint lags", head=head.number, seen=seen)
            return None
        self._head = head
        self.figures.head.saw(int(block["timestamp"]))
        return head

    async def _follow(self, head: Head) -> None:
        """Take in events and answer a challenge; a block with which that is done is left alone."""
        self._followed = b""
        following = self._follower.poll(self.table.apply, head=head.number)
        preparing = self._observer.prepare(head)
        answered, _, _ = await together(self._answer(head), following, preparing)
        if answered and self._follower.position == head.number:
            self._followed = head.hash

    async def _answer(self, head: Head) -> bool:
        """Whether no challenge is left to answer."""
        clock = await self._contracts.scheduler.clock_of(
            self.provider_id, block_identifier=head.number
        )
        if not clock.challenged_at:
            return True
        _log.info("challenged", at=clock.challenged_at)
        return await self._batches.answer()

    async def _look_slowly(self) -> None:
        """What changes rarely: forgotten runs, gas, registered hardware."""
        last, now = self._looked_slowly, time.monotonic()
        if last is not None and now - last < _SLOW_LOOKS:
            return
        try:
            contract = self._contracts.scheduler.address
            await self._observer.sweep(self._contracts.deployment.chain_id, contract)
        except ExecutorUnavailableError as error:
            _log.warning("executor unavailable", error=error.message)
            return
        if self._on_hardware is not None:
            provider = await self._contracts.registry.provider_of(self._sender.address)
            self._on_hardware(in_all(provider.hardware))
        balance = await self._w3.eth.get_balance(self._sender.account.address, "latest")
        self.figures.gas.set(balance / CREDIT)
        self._looked_slowly = now

    async def _act(self, head: Head, busy: frozenset[int]) -> int:
        views = await self._observer.views(head)
        free = await self._observer.free()
        self._fault = await self._observer.fault()
        self.figures.show(views, free)
        self.figures.can_start.set(not self._fault)
        if self._settings.follow_offer:
            self._offer.follow(free, held_by(views))
        if not views:
            return 0
        situation = Situation(
            now=head.time,
            queues=self._executor.queues,
            free=free,
            fault=self._fault,
            room_to_write=free_megabytes(self._settings.state_dir) >= self._settings.min_free,
            patience=self._patience,
            start_grace=self._settings.start_grace,
        )
        planned = [each for each in plan(views, situation) if each[0].job.id not in busy]
        self._tell(planned)
        crash_point("provider.planned")
        self._intend(planned)
        sending = asyncio.ensure_future(self._batches.send(planned))
        done, moved = await together(self._handlers.carry_out(planned, sending.done), sending)
        self._batches.forget(view.job.id for view, action in planned if isinstance(action, Close))
        return done + moved

    def _intend(self, planned: Sequence[tuple[View, Action]]) -> None:
        """Write down which jobs are about to be started, before it is done."""
        self.table.put(
            *(
                rows.starting(view.run)
                for view, action in planned
                if isinstance(action, Start) and view.run.phase is Phase.WATCHED
            )
        )
        crash_point("provider.intended")

    def _tell(self, planned: Sequence[tuple[View, Action]]) -> None:
        """Log each job's plan when it changes."""
        plans = {view.job.id: action for view, action in planned}
        for view, action in planned:
            if self._told.get(view.job.id) != action:
                _log.debug("planned", job=view.job.id, status=view.chain.name, action=str(action))
        self._told = plans
