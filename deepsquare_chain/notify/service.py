"""Follows a customer's jobs and notifies: events first into the database, then out of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from sqlalchemy import Connection

from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.chain.bindings.event_types import JobTransition
from deepsquare_chain.chain.bindings.events import event_filter
from deepsquare_chain.chain.follower import Batch, Follower
from deepsquare_chain.client.history import histories
from deepsquare_chain.daemon.service import ServiceSettings
from deepsquare_chain.faults import crash_point
from deepsquare_chain.notification import JobEvent, Notify
from deepsquare_chain.notify.delivery import Deliverer, Verdict
from deepsquare_chain.notify.messages import event_id, payload
from deepsquare_chain.observability import get_logger
from deepsquare_chain.observability.metrics import Metrics
from deepsquare_chain.store.database import Store
from deepsquare_chain.store.notifications import (
    Delivery,
    DeliveryState,
    NotificationTables,
)

#: Deliveries at the same time.
_AT_ONCE: Final = 8
_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class NotifySettings(ServiceSettings):
    """How notifications are sent.

    Attributes:
        always: Who is told of every job, in addition to those that job files name.
        attempts: Tries of one delivery; about a day of them by default.
        pauses: Seconds before the second try, doubled with each, and at most.
    """

    always: Notify = field(default_factory=Notify)
    attempts: int = 30
    pauses: tuple[float, float] = (5.0, 3_600.0)


class NotifyService:
    """One customer's notifications.

    Args:
        contracts: The grid.
        customer: Whose jobs.
        store: The service's own database.
        asked: What the job file of a definition (hexadecimal digest) asks for.
        deliverer: Sends.
        settings: How it runs.
        start_block: First block whose events count, where the database knows no later one.
        metrics: The service's metrics.
    """

    def __init__(
        self,
        contracts: Contracts,
        customer: str,
        store: Store,
        *,
        asked: Callable[[str], Notify],
        deliverer: Deliverer,
        settings: NotifySettings,
        start_block: int,
        metrics: Metrics,
    ) -> None:
        self._contracts = contracts
        self._asked = asked
        self._deliverer = deliverer
        self._settings = settings
        self._tables = NotificationTables(store)
        self._follower: Follower[Connection] = Follower(
            contracts.w3,
            [contracts.scheduler.address],
            store,
            start_block=start_block,
            confirmations=settings.confirmations,
            filters=[event_filter(JobTransition, customer=customer)],
            metrics=metrics,
        )
        self._metrics = metrics
        self._sent = metrics.counter(
            "notifications_total",
            "Notifications by what came of them.",
            state=("sent", "failed", "unknown"),
        )
        unclear = self._tables.give_up_unclear()
        if unclear:
            _log.warning("deliveries unclear", count=unclear, reason="the service ended meanwhile")
            metrics.add(self._sent, "unknown", amount=unclear)

    async def cycle(self) -> bool:
        """Read new events, plan their deliveries, send those that are due; whether anything was done.

        Raises:
            EndpointError: The chain does not answer; what is due goes out all the same.
        """
        try:
            moved = await self._follower.poll(self._keep) > 0
            for event in self._tables.open_events():
                self._tables.plan(event.id, await self._plan(event))
                moved = True
        finally:
            sent = await self._deliver()
        return moved or sent

    def _keep(self, batch: Batch, transaction: Connection) -> None:
        """Events are kept when they are read; a rollback undoes none, for they may have been sent."""
        deployment = self._contracts.deployment
        found = [
            JobEvent(
                event_id(
                    *(deployment.chain_id, deployment.scheduler, event.job_id),
                    *(event.after, event.tx_hash),
                ),
                *(event.job_id, event.before, event.after, event.block_number, batch.time),
            )
            for event in batch.events
            if isinstance(event, JobTransition)
        ]
        self._tables.add(transaction, found)

    async def _plan(self, event: JobEvent) -> list[Delivery]:
        """One delivery for each recipient who wants this event."""
        job = await self._contracts.scheduler.get_job(event.job_id)
        wanted = (self._settings.always, self._asked(bytes(job.definition).hex()))
        targets = dict.fromkeys(
            target for each in wanted if each.holds(event.before, event.after) for target in each.to
        )
        if not targets:
            return []
        history = (await histories(self._contracts, [event.job_id]))[event.job_id]
        ended = event.after.is_final
        deployment = self._contracts.deployment
        message = payload(
            event,
            customer=job.customer,
            provider_id=job.provider_id,
            name=history.name,
            provider=history.provider,
            exit_code=history.exit_code if ended else None,
            reason=history.reason if ended else "",
            paid=history.paid,
            refunded=history.refunded if ended else 0,
            chain_id=deployment.chain_id,
            contract=deployment.scheduler,
        )
        return [Delivery(event.id, target, message) for target in targets]

    async def _deliver(self) -> bool:
        due = self._tables.due(int(time.time()), _AT_ONCE)
        await asyncio.gather(*map(self._send, due))
        return bool(due)

    async def _send(self, delivery: Delivery) -> None:
        self._tables.begin(delivery)
        crash_point("notify.sending")
        result = await self._deliverer.send(delivery)
        crash_point("notify.sent")
        attempts = delivery.attempts + 1
        state, due = _STATES[result.verdict], 0
        if result.verdict is Verdict.REFUSED:
            if attempts >= self._settings.attempts:
                state = DeliveryState.FAILED
            else:
                first, longest = self._settings.pauses
                due = int(time.time() + min(longest, first * 2 ** (attempts - 1)))
        self._tables.end(delivery, state, result.note, due)
        if state is not DeliveryState.DUE:
            self._metrics.add(self._sent, state.value)
        say = _log.info if state is DeliveryState.SENT else _log.warning
        say(
            f"notification {state.value}",
            notification=delivery.event_id,
            attempts=attempts,
            note=result.note,
        )


_STATES: Final = {
    Verdict.ARRIVED: DeliveryState.SENT,
    Verdict.REFUSED: DeliveryState.DUE,
    Verdict.REFUSED_FOR_GOOD: DeliveryState.FAILED,
    Verdict.UNKNOWN: DeliveryState.UNKNOWN,
}
