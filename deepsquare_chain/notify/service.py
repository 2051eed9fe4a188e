"""Follows a customer's jobs and sends notifications: events are stored first, then delivered."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from sqlalchemy import Connection

from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.chain.bindings.event_types import JobTransition
from deepsquare_chain.chain.bindings.events import event_filter
from deepsquare_chain.chain.follower import Batch, Follower
from deepsquare_chain.client.jobs import histories
from deepsquare_chain.daemon.service import ServiceSettings
from deepsquare_chain.notification import JobEvent, Notify
from deepsquare_chain.notify.delivery import Deliverer, DeliveryOutcome
from deepsquare_chain.notify.messages import event_id, payload
from deepsquare_chain.observability import get_logger
from deepsquare_chain.observability.metrics import Metrics
from deepsquare_chain.store.database import Store
from deepsquare_chain.store.notifications import (
    Delivery,
    DeliveryState,
    NotificationTables,
)

_TOO_MANY: Final = "too many notifications of this customer in a day"
_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class NotifySettings(ServiceSettings):
    """Settings of the notification service.

    Attributes:
        always: Recipients for every job, in addition to those in job files.
        attempts: Maximum attempts per delivery; by default they span about a day.
        pauses: Backoff in seconds: before the second attempt, doubling with each, and the maximum.
        at_once: Maximum number of concurrent deliveries.
    """

    always: Notify = field(default_factory=Notify)
    attempts: int = 30
    pauses: tuple[float, float] = (5.0, 3_600.0)
    at_once: int = 8


class NotifyService:
    """Service that sends the notifications of one customer, or of all.

    Args:
        contracts: Contracts of the grid.
        customer: Address of the customer; None for all customers.
        store: The service's own database.
        requests: Returns the requests for a customer's definition (hexadecimal digest), in addition
            to those in the settings.
        deliverer: Sends the notifications.
        settings: Settings of the service.
        start_block: First block to read, unless the database has a later cursor.
        metrics: The service's metrics.
        concerns: Whether any notification of a customer may be requested; others' events are skipped.
        admits: Counts a notification of a customer, and returns whether it may be sent.
    """

    def __init__(
        self,
        contracts: Contracts,
        customer: str | None,
        store: Store,
        *,
        requests: Callable[[str, str], Sequence[Notify]],
        deliverer: Deliverer,
        settings: NotifySettings,
        start_block: int,
        metrics: Metrics,
        concerns: Callable[[str], bool] = lambda _customer: True,
        admits: Callable[[str], bool] = lambda _customer: True,
    ) -> None:
        self._contracts = contracts
        self._requests = requests
        self._concerns = concerns
        self._admits = admits
        self._deliverer = deliverer
        self._settings = settings
        self._tables = NotificationTables(store)
        self._follower: Follower[Connection] = Follower(
            contracts.w3,
            [contracts.scheduler.address],
            store,
            start_block=start_block,
            confirmations=settings.confirmations,
            filters=[event_filter(JobTransition, **({"customer": customer} if customer else {}))],
            metrics=metrics,
        )
        self._metrics = metrics
        self._sent = metrics.counter(
            "notifications_total",
            "Notifications by result.",
            state=("sent", "failed", "unknown"),
        )
        unknown_count = self._tables.give_up_unclear()
        if unknown_count:
            _log.warning(
                "deliveries unclear",
                count=unknown_count,
                reason="the service ended before the response",
            )
            metrics.add(self._sent, "unknown", amount=unknown_count)

    async def cycle(self) -> bool:
        """Read new events, plan their deliveries, and send due ones; return whether anything was done.

        Raises:
            EndpointError: The endpoint does not respond; due deliveries are sent nevertheless.
        """
        try:
            changed = await self._follower.poll(self._keep) > 0
            for event in self._tables.open_events():
                self._tables.plan(event.id, await self._plan(event))
                changed = True
        finally:
            sent = await self._deliver()
        return changed or sent

    def _keep(self, batch: Batch, transaction: Connection) -> None:
        """Store events as they are read; a reorg removes none, since they may have been sent."""
        deployment = self._contracts.deployment
        events = [
            JobEvent(
                event_id(
                    *(deployment.chain_id, deployment.scheduler, event.job_id),
                    *(event.after, event.tx_hash),
                ),
                *(event.job_id, event.before, event.after, event.block_number, batch.time),
            )
            for event in batch.events
            if isinstance(event, JobTransition) and self._concerns(event.customer)
        ]
        self._tables.add(transaction, events)

    async def _plan(self, event: JobEvent) -> list[Delivery]:
        """Return one delivery for each recipient that requested this event."""
        job = await self._contracts.scheduler.get_job(event.job_id)
        definition = bytes(job.definition).hex()
        requests = (self._settings.always, *self._requests(job.customer, definition))
        targets = dict.fromkeys(
            target
            for request in requests
            if request.holds(event.before, event.after)
            for target in request.to
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
        return [self._planned(event, job.customer, target, message) for target in targets]

    def _planned(self, event: JobEvent, customer: str, target: str, message: str) -> Delivery:
        if self._admits(customer):
            return Delivery(event.id, target, message)
        _log.warning("notification dropped", notification=event.id, customer=customer)
        self._metrics.add(self._sent, DeliveryState.FAILED.value)
        return Delivery(event.id, target, message, DeliveryState.FAILED, note=_TOO_MANY)

    async def _deliver(self) -> bool:
        due = self._tables.due(int(time.time()), self._settings.at_once)
        await asyncio.gather(*map(self._send, due))
        return bool(due)

    async def _send(self, delivery: Delivery) -> None:
        self._tables.begin(delivery)
        result = await self._deliverer.send(delivery)
        attempts = delivery.attempts + 1
        state, due = _STATES[result.verdict], 0
        if result.verdict is DeliveryOutcome.REFUSED:
            if attempts >= self._settings.attempts:
                state = DeliveryState.FAILED
            else:
                first, longest = self._settings.pauses
                due = int(time.time() + min(longest, first * 2 ** (attempts - 1)))
        self._tables.end(delivery, state, result.note, due)
        if state is not DeliveryState.DUE:
            self._metrics.add(self._sent, state.value)
        log = _log.info if state is DeliveryState.SENT else _log.warning
        log(
            f"notification {state.value}",
            notification=delivery.event_id,
            attempts=attempts,
            note=result.note,
        )


_STATES: Final = {
    DeliveryOutcome.ARRIVED: DeliveryState.SENT,
    DeliveryOutcome.REFUSED: DeliveryState.DUE,
    DeliveryOutcome.REFUSED_FOR_GOOD: DeliveryState.FAILED,
    DeliveryOutcome.UNKNOWN: DeliveryState.UNKNOWN,
}
