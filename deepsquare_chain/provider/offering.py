"""A provider on chain: its offer, which follows the capacity left free, and its maintenance."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Final

from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.chain.transactions.sender import Sender
from deepsquare_chain.daemon.loop import BackgroundTasks
from deepsquare_chain.errors import GridError
from deepsquare_chain.executors.base import RunState
from deepsquare_chain.job import Hardware, Offer, ProviderStatus
from deepsquare_chain.observability import get_logger
from deepsquare_chain.provider.model import View

#: Minimum seconds between two changes, because each of them costs gas.
_INTERVAL: Final = 120.0
#: The offer is changed when it is wrong by at least 1/8.
_TOLERANCE: Final = 8
_log = get_logger(__name__)


def total_capacity(hardware: Hardware) -> Offer:
    """Return the total hardware of a cluster; memory in MB."""
    nodes = hardware.nodes
    return Offer(
        cpus=nodes * hardware.cpus_per_node,
        memory=nodes * hardware.mem_per_node,
        gpus=nodes * hardware.gpus_per_node,
    )


def target_offer(hardware: Offer, free: Offer, grid_usage: Offer) -> Offer:
    """Return free capacity plus that of the grid's jobs, at most the registered hardware."""
    return Offer(
        cpus=min(hardware.cpus, free.cpus + grid_usage.cpus),
        memory=min(hardware.memory, free.memory + grid_usage.memory),
        gpus=min(hardware.gpus, free.gpus + grid_usage.gpus),
    )


def is_worth_a_change(current: Offer, target: Offer) -> bool:
    """Return whether the offer of any resource is wrong by an eighth or more."""
    return any(
        offered != target and abs(offered - target) * _TOLERANCE >= max(offered, target)
        for offered, target in (
            (current.cpus, target.cpus),
            (current.memory, target.memory),
            (current.gpus, target.gpus),
        )
    )


def capacity_in_use(views: Iterable[View]) -> Offer:
    """Return the capacity that the grid's running jobs use in the cluster."""
    resources = [
        view.job.resources
        for view in views
        if view.status is not None and view.status.state is RunState.RUNNING
    ]
    return Offer(
        cpus=sum(needed.cpus for needed in resources),
        memory=sum(needed.memory for needed in resources),
        gpus=sum(needed.gpus for needed in resources),
    )


class OfferFollower:
    """Updates a provider's offer periodically, in the background.

    Args:
        contracts: Contracts of the grid.
        sender: The only transaction sender of this account.
        timeout: Seconds to wait for a receipt.
        interval: Minimum seconds between two checks.
    """

    def __init__(
        self, contracts: Contracts, sender: Sender, *, timeout: float, interval: float = _INTERVAL
    ) -> None:
        self._contracts = contracts
        self._sender = sender
        self._timeout = timeout
        self._interval = interval
        self._checked_at = float("-inf")
        self._tasks = BackgroundTasks()

    def follow(self, free: Offer | None, grid_usage: Offer) -> None:
        """Begin a change of the offer, if due; a cluster that does not answer offers nothing."""
        self._tasks.collect()
        now = time.monotonic()
        if self._tasks or now - self._checked_at < self._interval:
            return
        self._checked_at = now
        self._tasks.begin(self._change(free or Offer(0, 0, 0), grid_usage), [])

    async def close(self) -> None:
        """Wait for the change that is being sent."""
        await self._tasks.wait()
        self._tasks.cancel_all()

    async def _change(self, free: Offer, grid_usage: Offer) -> int:
        registry = self._contracts.registry
        try:
            provider = await registry.provider_of(self._sender.address)
            hardware = total_capacity(provider.hardware)
            target = target_offer(hardware, free, grid_usage)
            if provider.status is not ProviderStatus.ACTIVE or not is_worth_a_change(
                provider.offer, target
            ):
                return 0
            receipt = await self._sender.send(registry.set_offer(target), timeout=self._timeout)
        except GridError as error:
            _log.warning("offer not changed", error=error.message, hint=error.hint)
            return 0
        _log.info("offer changed", offer=str(target), block=receipt.block_number)
        return 1


# -- maintenance of a provider: its status on chain, which commands and signals can change


class Maintenance:
    """Follows and changes whether the provider drains.

    A draining provider finishes its runs, requeues jobs without a run, and is assigned no jobs.

    Args:
        contracts: Contracts of the grid.
        sender: The only transaction sender of this account.
        timeout: Seconds to wait for a receipt.
    """

    def __init__(self, contracts: Contracts, sender: Sender, *, timeout: float) -> None:
        self._contracts = contracts
        self._sender = sender
        self._timeout = timeout
        self._on_chain = False
        self._requested: bool | None = None
        self._tasks = BackgroundTasks()

    @property
    def draining(self) -> bool:
        """Whether no new runs begin; a requested change counts before it is mined."""
        return self._on_chain if self._requested is None else self._requested

    def apply_status(self, status: ProviderStatus) -> None:
        """Apply the provider's status in the registry."""
        self._tasks.collect()
        draining = status is ProviderStatus.DRAINING
        if draining != self._on_chain:
            self._on_chain = draining
            _log.info("maintenance began" if draining else "maintenance ended")
        if not self._tasks:
            self._requested = None

    def request(self, *, draining: bool) -> None:
        """Send a change, as `provider drain` and `provider resume` do; one at a time."""
        self._tasks.collect()
        if self._tasks:
            _log.warning("a change of maintenance is already pending", draining=self.draining)
            return
        _log.info("maintenance requested", draining=draining)
        self._requested = draining
        self._tasks.begin(self._send(draining), [])

    async def close(self) -> None:
        """Wait for the change that is being sent."""
        await self._tasks.wait()
        self._tasks.cancel_all()

    async def _send(self, draining: bool) -> int:
        call = self._contracts.registry.set_draining(draining)
        try:
            receipt = await self._sender.send(call, timeout=self._timeout)
        except GridError as error:
            self._requested = None
            _log.error(
                "maintenance not changed",
                draining=draining,
                error=error.message,
                hint=error.hint or "Send the signal again, or use `deepsquare provider drain`.",
            )
            return 0
        _log.info("maintenance changed", draining=draining, block=receipt.block_number)
        self._on_chain, self._requested = draining, None
        return 1
