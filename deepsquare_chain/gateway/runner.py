"""The gateway's daemon: everything it needs, opened in order, closed in reverse."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from typing import Final

from starlette.types import ASGIApp

from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.daemon import Daemon
from deepsquare_chain.daemon.opening import serve
from deepsquare_chain.daemon.service import open_contracts, open_daemon, open_store
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
        settings: How it runs.
        host: Address on which it listens.
        port: Port on which it listens; 0 takes a free one.
        ready: Gets the gateway's URL once it answers.
        stop: Ends it when set.
        more: Applications of other services at paths of this server, such as a relay's.

    Raises:
        UsageError: The address or the place of the object store can't be used, or the database is
            in use or belongs to another grid.
        StoreError: The object store can't be used now.
        WrongEndpointError: An endpoint serves another chain, or lacks the contracts. One that is
            down is waited for.
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
        urls = tuple(each.rstrip("/") for each in settings.urls) or _own(server.url)
        access.serve_under(urls, [each.rstrip("/") for each in settings.sites])
        parts.push_async_callback(server.stop)
        # Open streams end first, or the server would wait for them.
        parts.push_async_callback(service.close)
        ready(urls[0])
        return daemon

    await serve(NAME, open_once, stop)


def _own(url: str) -> tuple[str, ...]:
    """The address that the server has, and its other name on loopback."""
    return (url, url.replace("127.0.0.1", "localhost", 1)) if "127.0.0.1" in url else (url,)
