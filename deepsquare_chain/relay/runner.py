"""The relay's daemon: opens its resources in order, and closes them in reverse."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Final

from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.chain.signers import Signer
from deepsquare_chain.daemon import Daemon
from deepsquare_chain.daemon.service import (
    open_contracts,
    open_daemon,
    open_sender,
    open_store,
    serve,
)
from deepsquare_chain.errors import UsageError
from deepsquare_chain.observability.metrics import Metrics
from deepsquare_chain.observability.serving import DeferredApp, LoopbackServer
from deepsquare_chain.relay.app import relay_app
from deepsquare_chain.relay.service import RelayService, RelaySettings

NAME: Final = "relay"


async def run_relay(
    url: str,
    deployment: Deployment,
    account: Signer,
    settings: RelaySettings,
    *,
    host: str,
    port: int,
    ready: Callable[[str], None] = lambda _: None,
    stop: asyncio.Event | None = None,
    served_by: DeferredApp | None = None,
) -> None:
    """Run a relay until SIGINT, SIGTERM or `stop`.

    Args:
        url: JSON-RPC endpoint, or several, separated by commas.
        deployment: The deployment record of the grid.
        account: The relay's own wallet, which pays the gas.
        settings: Settings of the relay.
        host: Address to listen on.
        port: Port to listen on; 0 selects a free one.
        ready: Called with the relay's URL when it accepts requests.
        stop: Stops the relay when set.
        served_by: Serves the application instead of an own server. Host and port are then unused,
            and `ready` gets an empty string.

    Raises:
        UsageError: The deployment has no forwarder, the address can't be used, or the database is
            in use or belongs to another account or grid.
        WrongEndpointError: An endpoint serves another chain, or lacks the contracts. If an
            endpoint is down, the relay waits for it.
    """

    async def open_once(parts: AsyncExitStack, stop: asyncio.Event) -> Daemon:
        metrics = Metrics(NAME)
        contracts = await open_contracts(parts, url, deployment, settings, metrics)
        trusted = (await contracts.scheduler.parameters()).forwarder
        if int(trusted, 16) == 0 or trusted != contracts.forwarder.address:
            raise UsageError(
                f"The MetaScheduler at {contracts.scheduler.address} accepts no calls through the "
                f"forwarder {contracts.forwarder.address} of the deployment record",
                hint="Give the record of a deployment whose contracts trust its forwarder.",
            )
        store = parts.enter_context(await open_store(NAME, contracts, account, settings))
        sender = await open_sender(
            parts, contracts, account, store=store, settings=settings, metrics=metrics
        )
        service = RelayService(
            contracts,
            sender,
            store,
            domain=await contracts.forwarder.domain(),
            settings=settings,
            metrics=metrics,
        )
        parts.push_async_callback(service.close)
        daemon = await open_daemon(
            NAME,
            service.cycle,
            settings,
            chain_id=deployment.chain_id,
            metrics=metrics,
            stop=stop,
        )
        service.wake = daemon.wake
        await service.poll_wallet()
        app = relay_app(service, daemon.health)
        if served_by is not None:
            served_by.app = app
            parts.callback(setattr, served_by, "app", None)
            ready("")
            return daemon
        server = LoopbackServer(app, port, host)
        await server.start()
        parts.push_async_callback(server.stop)
        ready(server.url)
        return daemon

    await serve(NAME, open_once, stop)
