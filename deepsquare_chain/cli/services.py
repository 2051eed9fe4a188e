"""Starts each service with the objects that its settings describe."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.chain.rpc.batching import gather_all
from deepsquare_chain.chain.transactions.fees import GWEI
from deepsquare_chain.client.network import find_own_address, open_account, transport_of
from deepsquare_chain.credits import CREDIT
from deepsquare_chain.daemon.loop import service_folder
from deepsquare_chain.errors import UsageError
from deepsquare_chain.job import DAY
from deepsquare_chain.observability import configure_logging
from deepsquare_chain.settings import Settings
from deepsquare_chain.store.database import FOLDER
from deepsquare_chain.store.definitions import DefinitionStore, FolderDefinitionStore
from deepsquare_chain.store.gateway_client import (
    GatewayDefinitionStore,
    gateway_urls,
    open_gateways,
)

if TYPE_CHECKING:
    from deepsquare_chain.chain.signers import Signer
    from deepsquare_chain.gateway.access import GatewayRules
    from deepsquare_chain.relay.requests import RelayRules


async def provide(settings: Settings) -> None:
    """Run a provider's daemon until a signal. Raises the errors of `run_provider`."""
    from deepsquare_chain.provider.service import ProviderSettings, run_provider

    deployment = Deployment.load(settings.deployment)
    account = await _account_of(settings, "provider")
    if account is None:
        return
    async with open_gateways(
        gateway_urls(settings, deployment), account, deployment, transport_of(settings)
    ) as gateways:
        definitions: DefinitionStore = FolderDefinitionStore(settings.store)
        if gateways:
            definitions = GatewayDefinitionStore(gateways)
        await run_provider(
            settings.endpoint,
            deployment,
            account,
            definitions,
            ProviderSettings(
                collect_interval=settings.collect_interval,
                collect_gas_share=settings.collect_gas_share,
                coin_value=settings.coin_value,
                max_answer_fee=int(settings.max_answer_fee_gwei * GWEI),
                unbilled_warning=int(settings.unbilled_warning * CREDIT),
                follow_offer=settings.follow_offer,
                publish_abilities=settings.publish_abilities,
                min_free=settings.disk_floor,
                keep_seconds=settings.keep_runs_days * DAY,
                keep_megabytes=settings.keep_runs_mb,
                executor=settings.executor,
                executor_options=settings.executor_options,
                allow_unisolated=settings.allow_unisolated,
                allow_root=settings.allow_root,
                private_paths=settings.private_paths,
                **_common(settings, "provider", account.address, deployment),
                # One key for all deployments, since it is published in the provider's labels.
                secrets_key=service_folder(settings.state_dir, "provider", account.address)
                / "secrets.age-key",
            ),
            gateways=gateways,
        )


async def _account_of(settings: Settings, service: str) -> Signer | None:
    """Open the account of a service, and configure its logging.

    Waits for an external signer that does not answer, as for an endpoint; returns None after SIGINT
    or SIGTERM during this wait. Raises the other errors of `open_account`.
    """
    from deepsquare_chain.daemon.loop import handle_signals
    from deepsquare_chain.daemon.service import open_with_retries

    if not settings.signer:
        account = await open_account(settings)  # may ask for the password: no signal handlers
        configure_logging(settings.log_level, settings.log_format, service=service)
        return account
    configure_logging(settings.log_level, settings.log_format, service=service)
    stop = asyncio.Event()
    async with AsyncExitStack() as stack:
        with handle_signals(lambda _number: stop.set()):
            return await open_with_retries(service, lambda _: open_account(settings), stack, stop)


def _common(
    settings: Settings, service: str, address: str, deployment: Deployment
) -> dict[str, Any]:
    """Return the arguments of `ServiceSettings`, which all services share."""
    return {
        "state_dir": service_folder(settings.state_dir, service, address, deployment.scheduler),
        "confirmations": settings.confirmations,
        "poll_interval": settings.poll_interval,
        "send_timeout": settings.timeout,
        "max_fee_per_gas": int(settings.max_fee_gwei * GWEI),
        "max_lag_blocks": settings.max_lag_blocks,
        "websocket": settings.websocket,
        "transport": transport_of(settings),
        # Shared with commands of the same wallet, which assign nonces from the same store.
        "wallets_dir": settings.state_dir / FOLDER,
        "health_port": settings.health_port,
    }


async def schedule(
    settings: Settings, *, challenge_after: int | None, rules: Path | None, dry_run: bool
) -> None:
    """Run the meta-scheduler until a signal. Raises the errors of `run_scheduler`."""
    from deepsquare_chain.metascheduler.liveness import Watch
    from deepsquare_chain.metascheduler.policy import Rules
    from deepsquare_chain.metascheduler.rules_file import read_rules
    from deepsquare_chain.metascheduler.service import SchedulerSettings, run_scheduler

    deployment = Deployment.load(settings.deployment)
    account = None
    if dry_run:
        configure_logging(settings.log_level, settings.log_format, service="metascheduler")
    else:
        account = await _account_of(settings, "metascheduler")
    if account is None and not dry_run:
        return
    instance = "dry-run" if account is None else account.address
    await run_scheduler(
        settings.endpoint,
        deployment,
        account,
        SchedulerSettings(
            watch=Watch(challenge_after=challenge_after),
            rules=Rules() if rules is None else read_rules(rules),
            **_common(settings, "metascheduler", instance, deployment),
        ),
    )


async def relay(
    settings: Settings,
    *,
    rules: RelayRules,
    collect_seconds: float,
    min_balance: int,
    host: str = "",
    port: int = 0,
    ready: Callable[[str], None],
    **more: Any,
) -> None:
    """Run a relay until a signal; `ready` is called with its URL.

    `more` are further arguments of `run_relay`, whose errors it raises.
    """
    from deepsquare_chain.relay.service import RelaySettings, run_relay

    deployment = Deployment.load(settings.deployment)
    if "served_by" in more:
        account: Signer | None = await open_account(settings)
    else:
        account = await _account_of(settings, "relay")
    if account is None:
        return
    await run_relay(
        settings.endpoint,
        deployment,
        account,
        RelaySettings(
            rules=rules,
            collect_seconds=collect_seconds,
            min_balance=min_balance,
            **_common(settings, "relay", account.address, deployment),
        ),
        host=host,
        port=port,
        ready=ready,
        **more,
    )


async def notify(settings: Settings, *, address: str | None) -> None:
    """Send notifications until a signal. Raises the errors of `run_notify`."""
    from deepsquare_chain.notify.service import (
        NotifySettings,
        deliverer_of,
        own_recipients,
        run_notify,
    )

    if settings.notify_by == "gateway":
        raise UsageError(
            "The gateway sends the notifications, by the setting notify_by",
            hint="Each event is sent by one of the two: set notify_by to run for this service.",
        )
    deployment = Deployment.load(settings.deployment)
    customer = await find_own_address(settings, address)
    configure_logging(settings.log_level, settings.log_format, service="notify")
    await run_notify(
        settings.endpoint,
        deployment,
        customer,
        deliverer_of(settings),
        NotifySettings(
            always=own_recipients(settings), **_common(settings, "notify", customer, deployment)
        ),
    )


async def serve_gateway(
    settings: Settings,
    *,
    rules: GatewayRules,
    objects: str,
    urls: tuple[str, ...],
    sites: tuple[str, ...],
    notify: bool = False,
    notify_private: bool = False,
    host: str,
    port: int,
    ready: Callable[[str], None],
    **more: Any,
) -> None:
    """Run a gateway until a signal; `ready` is called with its URL.

    `more` are further arguments of `run_gateway`, whose errors it raises.
    """
    from deepsquare_chain.gateway.app import run_gateway
    from deepsquare_chain.gateway.service import GatewaySettings
    from deepsquare_chain.notify.service import mail_server

    deployment = Deployment.load(settings.deployment)
    configure_logging(settings.log_level, settings.log_format, service="gateway")
    common = _common(settings, "gateway", "", deployment)
    common["state_dir"] = settings.state_dir / "gateway"
    await run_gateway(
        settings.endpoint,
        deployment,
        GatewaySettings(
            rules=rules,
            objects=objects,
            urls=urls,
            sites=sites,
            notify=notify,
            notify_private=notify_private,
            mail=mail_server(settings) if notify else None,
            **common,
        ),
        host=host,
        port=port,
        ready=ready,
        **more,
    )


async def serve_gateway_and_relay(
    settings: Settings,
    gateway: Mapping[str, Any],
    rules: RelayRules,
    *,
    min_balance: int,
    health_port: int | None,
    ready: Callable[[], None],
    stop: asyncio.Event | None = None,
) -> None:
    """Run a gateway and a relay on one address, in one process; if one ends, the other stops.

    Args:
        settings: Settings of both services; the wallet is the relay's.
        gateway: Arguments of `serve_gateway`.
        rules: Which requests the relay accepts.
        min_balance: Wei of coin below which the relay's wallet counts as empty.
        health_port: Port of the relay's health and metrics; None for none.
        ready: Called once the relay accepts requests.
        stop: Stops both services when set.
    """
    from deepsquare_chain.observability.serving import DeferredApp
    from deepsquare_chain.relay.service import PATHS

    relay_app, stopping = DeferredApp("relay"), stop or asyncio.Event()

    async def until_one_ends(service: Awaitable[None]) -> None:
        try:
            await service
        finally:
            stopping.set()

    await gather_all(
        until_one_ends(
            serve_gateway(settings, stop=stopping, more=dict.fromkeys(PATHS, relay_app), **gateway)
        ),
        until_one_ends(
            relay(
                settings.model_copy(update={"health_port": health_port}),
                rules=rules,
                collect_seconds=0.3,
                min_balance=min_balance,
                ready=lambda _: ready(),
                stop=stopping,
                served_by=relay_app,
            )
        ),
    )


async def explore(
    settings: Settings,
    *,
    host: str,
    port: int,
    names: tuple[str, ...],
    submissions: bool,
    ready: Callable[[str], None],
) -> None:
    """Serve the explorer until a signal; `ready` is called with its URL.

    Raises the errors of `run_explorer`.
    """
    from deepsquare_chain.client.gasless import known_relay
    from deepsquare_chain.daemon.service import ServiceSettings
    from deepsquare_chain.indexer.service import index_location
    from deepsquare_chain.web.server import Address, run_explorer
    from deepsquare_chain.web.site import Link, Site

    deployment = Deployment.load(settings.deployment)
    configure_logging(settings.log_level, settings.log_format, service="explorer")
    common = _common(settings, "explorer", "", deployment)
    common["state_dir"] = settings.state_dir
    gateways = gateway_urls(settings, deployment)
    folder = FolderDefinitionStore(settings.store) if submissions and not gateways else None
    await run_explorer(
        settings.endpoint,
        deployment,
        index_location(settings),
        ServiceSettings(**common),
        address=Address(host, port, names),
        site_of=partial(
            Site,
            store=folder,
            gateway=gateways[0] if gateways else "",
            relay=known_relay(settings, deployment),
            submissions=submissions,
            links=Link.parse(settings.explorer_links),
        ),
        ready=ready,
    )
