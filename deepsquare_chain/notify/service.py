"""Follows a customer's jobs and sends notifications: events are stored first, then delivered.

Also opens and runs the daemon, and sends test notifications.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

from sqlalchemy import Connection

from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.chain.bindings.events import JobTransition, event_filter
from deepsquare_chain.chain.follower import Batch, Follower
from deepsquare_chain.chain.wallet import read_secret
from deepsquare_chain.client.gateways import webhook_key
from deepsquare_chain.client.jobs import histories
from deepsquare_chain.client.network import transport_of
from deepsquare_chain.daemon import Daemon
from deepsquare_chain.daemon.service import (
    ServiceSettings,
    open_contracts,
    open_daemon,
    open_store,
    serve,
)
from deepsquare_chain.errors import UsageError
from deepsquare_chain.job import JobStatus
from deepsquare_chain.notification import DESKTOP, JobEvent, Notify, is_email, standing_request
from deepsquare_chain.notify.delivery import Deliverer, DeliveryOutcome, MailServer
from deepsquare_chain.notify.messages import event_id, payload
from deepsquare_chain.observability import get_logger
from deepsquare_chain.observability.metrics import Metrics
from deepsquare_chain.settings import Settings
from deepsquare_chain.store.database import Store, open_wallet_store
from deepsquare_chain.store.notifications import (
    Delivery,
    DeliveryState,
    NotificationTables,
    requested_notify,
)

_TOO_MANY: Final = "too many notifications of this customer in a day"
_log = get_logger(__name__)

NAME: Final = "notify"


@dataclass(frozen=True, slots=True)
class NotifySettings(ServiceSettings):
    """Settings of the notification service."""

    #: Recipients for every job, in addition to those in job files.
    always: Notify = field(default_factory=Notify)
    attempts: int = 30  # maximum attempts per delivery; by default they span about a day
    #: Backoff in seconds: before the second attempt, doubling with each, and the maximum.
    pauses: tuple[float, float] = (5.0, 3_600.0)
    at_once: int = 8  # maximum number of concurrent deliveries


class NotifyService:
    """Service that sends the notifications of one customer, or of all.

    Args:
        customer: Address of the customer; None for all customers.
        requests: Returns the requests for a customer's definition (hexadecimal digest), in addition
            to those in the settings.
        start_block: First block to read, unless the database has a later cursor.
        has_requests: Whether a customer may have requested notifications; other events are skipped.
        take_quota: Counts a notification of a customer, and returns whether it may be sent.
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
        has_requests: Callable[[str], bool] = lambda _customer: True,
        take_quota: Callable[[str], bool] = lambda _customer: True,
    ) -> None:
        self._contracts = contracts
        self._requests = requests
        self._has_requests = has_requests
        self._take_quota = take_quota
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
            "notifications_total", "Notifications by result.", state=("sent", "failed", "unknown")
        )
        unknown_count = self._tables.give_up_unclear()
        if unknown_count:
            _log.warning(
                "delivery outcomes lost",
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
        transitions = (event for event in batch.events if isinstance(event, JobTransition))
        events = [
            self._job_event(event, batch.time)
            for event in transitions
            if self._has_requests(event.customer)
        ]
        self._tables.add(transaction, events)

    def _job_event(self, event: JobTransition, time: int) -> JobEvent:
        job_id, after = event.job_id, event.after
        chain_id, contract = (
            self._contracts.deployment.chain_id,
            self._contracts.deployment.scheduler,
        )
        name = event_id(chain_id, contract, job_id, after, event.tx_hash)
        return JobEvent(name, job_id, event.before, after, event.block_number, time)

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
        if self._take_quota(customer):
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


async def run_notify(
    url: str,
    deployment: Deployment,
    customer: str,
    deliverer: Deliverer,
    settings: NotifySettings,
    *,
    stop: asyncio.Event | None = None,
) -> None:
    """Send notifications of a customer's jobs until SIGINT, SIGTERM or `stop`; needs no private key.

    Raises:
        UsageError: The database is in use, or belongs to another customer or grid.
        WrongEndpointError: An endpoint serves another chain, or lacks the contracts. One that is
            down is retried.
    """

    async def open_once(parts: AsyncExitStack, stop: asyncio.Event) -> Daemon:
        metrics = Metrics(NAME)
        contracts = await open_contracts(parts, url, deployment, settings, metrics)
        store = parts.enter_context(await open_store(NAME, contracts, customer, settings))
        # Commands that submit jobs store the `notify` requests of job files in the wallet's database.
        wallet = parts.enter_context(
            await open_wallet_store(
                contracts.w3, deployment, customer, settings.wallets_dir or settings.state_dir
            )
        )
        service = NotifyService(
            contracts,
            customer,
            store,
            requests=lambda _, definition: (requested_notify(wallet, definition),),
            deliverer=deliverer,
            settings=settings,
            start_block=int(await contracts.w3.eth.block_number) + 1,
            metrics=metrics,
        )
        return await open_daemon(
            NAME, service.cycle, settings, chain_id=deployment.chain_id, metrics=metrics, stop=stop
        )

    await serve(NAME, open_once, stop)


def own_recipients(settings: Settings) -> Notify:
    """Return the recipients in the settings, with the desktop, notified of every job of the wallet."""
    request = standing_request(settings.notify_to, settings.notify_on)
    return replace(request, to=(*request.to, DESKTOP)) if settings.notify_desktop else request


def deliverer_of(settings: Settings) -> Deliverer:
    """Return the `Deliverer` that the settings describe.

    Raises:
        NotFoundError: The file of a secret does not exist.
        UsageError: The file is empty or readable by others, or e-mail has no sender.
    """
    secret = webhook_key(settings).encode()
    return Deliverer(transport_of(settings), secret=secret, mail=mail_server(settings))


def mail_server(settings: Settings) -> MailServer | None:
    """Return the mail server of the settings; None without one. Raises as `deliverer_of`."""
    if settings.smtp is None:
        return None
    user = unquote(urlsplit(settings.smtp).username or "")
    sender = settings.smtp_from or (user if is_email(user) else "")
    if not sender:
        raise UsageError(
            "E-mail has no sender: the user of the mail server is not an address",
            hint='Set smtp_from, such as smtp_from = "grid@example.org".',
        )
    password = ""
    if settings.smtp_password_file is not None:
        password = read_secret(settings.smtp_password_file, "password of the mail server")
    return MailServer(settings.smtp, sender, password)


async def try_targets(settings: Settings, deployment: Deployment) -> list[tuple[str, bool, str]]:
    """Send one test notification to each recipient of the settings.

    Returns:
        For each recipient: the recipient, whether it arrived, and a note.

    Raises:
        UsageError: The settings name no recipient.
        GridError: See `deliverer_of`.
    """
    targets = own_recipients(settings).to
    if not targets:
        raise UsageError(
            "The setting notify_to has no recipient, and notify_desktop is off",
            hint='Set it, such as notify_to = ["me@example.org", "https://example.org/hook"].',
        )
    deliverer = deliverer_of(settings)
    now = int(time.time())
    event = JobEvent(f"evt_test_{now:x}", 0, JobStatus.RUNNING, JobStatus.FINISHED, 0, now)
    message = payload(
        event,
        chain_id=deployment.chain_id,
        contract=deployment.scheduler,
        name="test of notifications",
        exit_code=0,
    )
    results = await asyncio.gather(
        *(deliverer.send(Delivery(event.id, target, message)) for target in targets)
    )
    return [
        (target, verdict is DeliveryOutcome.ARRIVED, note)
        for target, (verdict, note) in zip(targets, results, strict=True)
    ]


def latest_notifications(
    folder: Path, deployment: Deployment, customer: str, limit: int
) -> list[tuple[JobEvent, Delivery]]:
    """Return a customer's newest notifications from the service's database in a state folder."""
    path = folder / f"{NAME}.db"
    if not path.exists():
        return []
    with Store.open(
        path, chain_id=deployment.chain_id, contract=deployment.scheduler, account=customer
    ) as store:
        return NotificationTables(store).latest(limit)
