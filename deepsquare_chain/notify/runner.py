"""Opens and runs the notification daemon, and sends test notifications."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.chain.wallet import read_secret
from deepsquare_chain.client.gateways import webhook_key
from deepsquare_chain.client.network import transport_of
from deepsquare_chain.daemon import Daemon
from deepsquare_chain.daemon.service import open_contracts, open_daemon, serve
from deepsquare_chain.errors import UsageError
from deepsquare_chain.job import JobStatus
from deepsquare_chain.notification import (
    DESKTOP,
    JobEvent,
    Notify,
    is_email,
    standing_request,
)
from deepsquare_chain.notify.delivery import Deliverer, DeliveryOutcome, MailServer
from deepsquare_chain.notify.messages import payload
from deepsquare_chain.notify.service import NotifyService, NotifySettings
from deepsquare_chain.observability.metrics import Metrics
from deepsquare_chain.settings import Settings
from deepsquare_chain.store.database import Store, open_wallet_store
from deepsquare_chain.store.notifications import (
    Delivery,
    NotificationTables,
    requested_notify,
)

NAME: Final = "notify"


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

    Args:
        url: JSON-RPC endpoint, or several, separated by commas.
        deployment: Deployment of the grid.
        customer: Address of the customer.
        deliverer: Sends the notifications.
        settings: Settings of the service.
        stop: Stops the service when set.

    Raises:
        UsageError: The database is in use, or belongs to another customer or grid.
        WrongEndpointError: An endpoint serves another chain, or lacks the contracts. One that is
            down is retried.
    """

    async def open_once(parts: AsyncExitStack, stop: asyncio.Event) -> Daemon:
        metrics = Metrics(NAME)
        contracts = await open_contracts(parts, url, deployment, settings, metrics)
        genesis = await contracts.w3.eth.get_block(0)
        store = parts.enter_context(
            Store.open(
                settings.state_dir / f"{NAME}.db",
                chain_id=deployment.chain_id,
                contract=deployment.scheduler,
                account=customer,
                genesis="0x" + bytes(genesis["hash"]).hex(),
                landmark=getattr(contracts.w3.provider, "landmark", None) or "",
                exclusive=True,
            )
        )
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
        customer="",
        provider_id=0,
        name="test of notifications",
        provider="",
        exit_code=0,
        reason="",
        paid=0,
        refunded=0,
        chain_id=deployment.chain_id,
        contract=deployment.scheduler,
    )
    results = await asyncio.gather(
        *(deliverer.send(Delivery(event.id, target, message)) for target in targets)
    )
    return [
        (target, verdict is DeliveryOutcome.ARRIVED, note)
        for target, (verdict, note) in zip(targets, results, strict=True)
    ]


def sent(
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
