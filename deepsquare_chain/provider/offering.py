"""Keeps the offer on chain at what the cluster's own users leave free."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Final

from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.chain.transactions.sender import Sender
from deepsquare_chain.daemon.background import BackgroundTasks
from deepsquare_chain.errors import GridError
from deepsquare_chain.executors.base import RunState
from deepsquare_chain.job import Hardware, Offer, ProviderStatus
from deepsquare_chain.observability import get_logger
from deepsquare_chain.provider.model import View

#: Least seconds between two changes, because each of them costs gas.
_INTERVAL: Final = 120.0
#: Part of itself by which the offer must be wrong before it is changed.
_TOLERANCE: Final = 8
_log = get_logger(__name__)


def in_all(hardware: Hardware) -> Offer:
    """Everything that a cluster has; memory in MB."""
    nodes = hardware.nodes
    return Offer(
        cpus=nodes * hardware.cpus_per_node,
        memory=nodes * hardware.mem_per_node,
        gpus=nodes * hardware.gpus_per_node,
    )


def wanted_offer(hardware: Offer, free: Offer, held: Offer) -> Offer:
    """What can be given to the grid: what is free and what its jobs hold, of what is registered."""
    return Offer(
        cpus=min(hardware.cpus, free.cpus + held.cpus),
        memory=min(hardware.memory, free.memory + held.memory),
        gpus=min(hardware.gpus, free.gpus + held.gpus),
    )


def is_worth_a_change(current: Offer, wanted: Offer) -> bool:
    """Whether the offer of anything is wrong by an eighth or more."""
    return any(
        now != then and abs(now - then) * _TOLERANCE >= max(now, then)
        for now, then in (
            (current.cpus, wanted.cpus),
            (current.memory, wanted.memory),
            (current.gpus, wanted.gpus),
        )
    )


def held_by(views: Iterable[View]) -> Offer:
    """What the grid's running jobs occupy in the cluster."""
    jobs = [
        view.job.resources
        for view in views
        if view.status is not None and view.status.state is RunState.RUNNING
    ]
    return Offer(
        cpus=sum(each.cpus for each in jobs),
        memory=sum(each.memory for each in jobs),
        gpus=sum(each.gpus for each in jobs),
    )


class OfferFollower:
    """Updates a provider's offer periodically, in the background.

    Args:
        contracts: Of the grid.
        sender: The one sender of this account.
        timeout: Seconds to wait for a receipt.
        interval: Least seconds between two looks.
    """

    def __init__(
        self, contracts: Contracts, sender: Sender, *, timeout: float, interval: float = _INTERVAL
    ) -> None:
        self._contracts = contracts
        self._sender = sender
        self._timeout = timeout
        self._interval = interval
        self._looked_at = float("-inf")
        self._tasks = BackgroundTasks()

    def follow(self, free: Offer | None, held: Offer) -> None:
        """Begin to change the offer, if it is time; a cluster that does not answer has none."""
        self._tasks.collect()
        now = time.monotonic()
        if self._tasks or now - self._looked_at < self._interval:
            return
        self._looked_at = now
        self._tasks.begin(self._change(free or Offer(0, 0, 0), held), [])

    async def close(self) -> None:
        """Wait for the change that is on its way."""
        await self._tasks.wait()
        self._tasks.cut_off()

    async def _change(self, free: Offer, held: Offer) -> int:
        registry = self._contracts.registry
        try:
            provider = await registry.provider_of(self._sender.address)
            hardware = in_all(provider.hardware)
            wanted = wanted_offer(hardware, free, held)
            if provider.status is not ProviderStatus.ACTIVE or not is_worth_a_change(
                provider.offer, wanted
            ):
                return 0
            receipt = await self._sender.send(registry.set_offer(wanted), timeout=self._timeout)
        except GridError as error:
            _log.warning("offer not changed", error=error.message, hint=error.hint)
            return 0
        _log.info("offer changed", offer=str(wanted), block=receipt.block_number)
        return 1
