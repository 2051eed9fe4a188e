"""Maintenance of a provider: its status on chain, which commands and signals can change."""

from __future__ import annotations

from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.chain.transactions.sender import Sender
from deepsquare_chain.daemon.loop import BackgroundTasks
from deepsquare_chain.errors import GridError
from deepsquare_chain.job import ProviderStatus
from deepsquare_chain.observability import get_logger

_log = get_logger(__name__)


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
