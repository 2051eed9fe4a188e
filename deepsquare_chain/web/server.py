"""The explorer as a service: it indexes the chain and serves the pages at the same time."""

from __future__ import annotations

import asyncio
import ipaddress
import re
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.daemon.loop import Daemon
from deepsquare_chain.daemon.service import ServiceSettings, open_contracts, open_daemon, serve
from deepsquare_chain.errors import UsageError
from deepsquare_chain.indexer.queries import Index
from deepsquare_chain.indexer.service import index_service
from deepsquare_chain.observability.metrics import Metrics
from deepsquare_chain.observability.serving import HOST, LoopbackServer
from deepsquare_chain.web.api import api_routes
from deepsquare_chain.web.app import LOOPBACK, explorer_app
from deepsquare_chain.web.site import Site

NAME: Final = "explorer"
PORT: Final = 8547
#: A host name, `*.` and a domain for all its subdomains, or `*` for any host.
_HOST_NAME: Final = re.compile(r"\*|(?:\*\.)?[A-Za-z0-9][A-Za-z0-9._-]*|\[[0-9a-fA-F:.]+\]")


@dataclass(frozen=True, slots=True)
class Address:
    """Host, port and host names of the explorer.

    `names` are further allowed host names. In a DNS rebinding attack, a browser sends the host
    name of the attacker's site; only allowed names are served. An IP address can't be rebound.
    """

    host: str = HOST
    port: int = PORT
    names: tuple[str, ...] = ()

    @property
    def allowed(self) -> tuple[str, ...]:
        """Allowed host names.

        Raises:
            UsageError: `host` is unspecified (0.0.0.0 or ::) and no name is given, or a name is
                not a host name.
        """
        for name in self.names:
            if not _HOST_NAME.fullmatch(name):
                raise UsageError(
                    f"{name[:80]!r} is not a host name",
                    hint="Write it as in a browser, without http:// and port.",
                )
        own_names = self._own_names()
        if not own_names and not self.names:
            raise UsageError(
                f"Served on {self.host}, the explorer needs the host names by which users reach it",
                hint="Give each with --name, such as --name explorer.example.org.",
            )
        return (*(own_names or LOOPBACK), *self.names)

    def _own_names(self) -> Sequence[str]:
        """Return the host names that follow from `host`."""
        try:
            ip = ipaddress.ip_address("127.0.0.1" if self.host == "localhost" else self.host)
        except ValueError:
            return (self.host,)
        if ip.is_loopback:
            return LOOPBACK
        return () if ip.is_unspecified else (self.host, f"[{self.host}]")


async def run_explorer(
    endpoint: str,
    deployment: Deployment,
    where: str | Path | None,
    settings: ServiceSettings,
    *,
    address: Address | None = None,
    site_of: Callable[[Index, Contracts], Site] = Site,
    ready: Callable[[str], None] = lambda _: None,
    stop: asyncio.Event | None = None,
) -> None:
    """Serve pages until SIGINT, SIGTERM or `stop` is set.

    Args:
        endpoint: JSON-RPC endpoint, or several, separated by commas.
        deployment: The deployment record of the grid.
        where: Database of the index, as for `IndexDatabase.open`.
        settings: Settings of the indexer.
        address: Host, port and host names of the pages.
        site_of: Returns the site of an index and contracts: `Site` with settings.
        ready: Called with the URL of the pages when the server is ready.
        stop: Event that stops the service.

    Raises:
        UsageError: The address can't be used, or the index belongs to another grid.
        StoreError: The disk is full, or the server does not answer.
        WrongEndpointError: An endpoint serves another chain, or lacks the contracts. If an
            endpoint is down, the service waits for it.
    """
    address = address or Address()
    hosts = address.allowed

    async def open_once(parts: AsyncExitStack, stop: asyncio.Event) -> Daemon:
        metrics = Metrics(NAME)
        contracts = await open_contracts(parts, endpoint, deployment, settings, metrics)
        service = await parts.enter_async_context(
            index_service(contracts, where, confirmations=settings.confirmations, metrics=metrics)
        )
        daemon = await open_daemon(
            NAME, service.cycle, settings, chain_id=deployment.chain_id, metrics=metrics, stop=stop
        )
        app = explorer_app(
            site_of(service.index, contracts),
            hosts=hosts,
            more_routes=api_routes(service.index),
            probe=daemon.health,
            metrics=metrics,
        )
        server = LoopbackServer(app, address.port, address.host, metrics)
        await server.start()
        parts.push_async_callback(server.stop)
        # Close the open streams first: the server would wait for them.
        parts.push_async_callback(app.state.feed.close)
        ready(server.url)
        return daemon

    await serve(NAME, open_once, stop)
