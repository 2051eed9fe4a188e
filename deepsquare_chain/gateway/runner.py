"""Runs the gateway daemon: opens its resources in order and closes them in reverse order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from typing import Final

from starlette.types import ASGIApp

from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.daemon import Daemon
from deepsquare_chain.daemon.service import open_contracts, open_daemon, open_store, serve
from deepsquare_chain.gateway.access import Access
from deepsquare_chain.gateway.app import gateway_app
from deepsquare_chain.gateway.objects import Objects, open_object_store
from deepsquare_chain.gateway.records import GatewayRecords
from deepsquare_chain.gateway.service import GatewayService, GatewaySettings
from deepsquare_chain.observability.metrics import Metrics
from deepsquare_chain.observability.serving import LoopbackServer

NAME: Final = "gateway"


async def run_gateway(
    url: str,
    deployment: Deployment,
    settings: GatewaySettings,
    *,
    host: str,
    port: int,
    ready: Callable[[str], None] = lambda _: None,
    stop: asyncio.Event | None = None,
    more: Mapping[str, ASGIApp] | None = None,
) -> None:
    """Run a gateway until SIGINT, SIGTERM or `stop`; it needs no wallet.

    Args:
        url: JSON-RPC endpoint, or several, separated by commas.
        deployment: The grid.
        settings: Settings of the gateway.
        host: Address to listen on.
        port: Port to listen on; 0 for a free port.
        ready: Called with the gateway's URL once it accepts requests.
        stop: Stops the gateway when set.
        more: Applications of other services by path of this server, such as a relay.

    Raises:
        UsageError: The address or the object store is invalid, or the database is in use or belongs
            to another grid.
        StoreError: The object store failed.
        WrongEndpointError: An endpoint serves another chain, or lacks the contracts. An endpoint
            that is down is retried.
    """

    async def open_once(parts: AsyncExitStack, stop: asyncio.Event) -> Daemon:
        metrics = Metrics(NAME)
        contracts = await open_contracts(parts, url, deployment, settings, metrics)
        store = parts.enter_context(await open_store(NAME, contracts, None, settings))
        records = GatewayRecords(store)
        objects = Objects(
            open_object_store(settings.objects or settings.state_dir / "objects"), records
        )
        await objects.check()
        access = Access(contracts, records, settings.rules)
        service = GatewayService(
            contracts, access, records, objects, rules=settings.rules, metrics=metrics
        )
        daemon = await open_daemon(
            NAME, service.cycle, settings, chain_id=deployment.chain_id, metrics=metrics, stop=stop
        )
        server = LoopbackServer(gateway_app(service, daemon.health, more or {}), port, host)
        await server.start()
        urls = tuple(public_url.rstrip("/") for public_url in settings.urls) or _own(server.url)
        access.serve_under(urls, [public_url.rstrip("/") for public_url in settings.sites])
        parts.push_async_callback(server.stop)
        # Close open streams first: the server waits for them when it stops.
        parts.push_async_callback(service.close)
        ready(urls[0])
        return daemon

    await serve(NAME, open_once, stop)


def _own(url: str) -> tuple[str, ...]:
    """Return the URL of the server; for 127.0.0.1 also with the name localhost."""
    return (url, url.replace("127.0.0.1", "localhost", 1)) if "127.0.0.1" in url else (url,)
