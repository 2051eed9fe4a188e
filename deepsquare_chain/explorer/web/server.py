"""The explorer as a service: it follows the chain into its index and answers pages meanwhile."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from deepsquare_chain.chain.contracts import Contracts
from deepsquare_chain.chain.deployment import Deployment
from deepsquare_chain.chain.rpc import connected
from deepsquare_chain.daemon.loop import Daemon
from deepsquare_chain.daemon.service import ServiceSettings, open_daemon
from deepsquare_chain.explorer.api.app import api_routes
from deepsquare_chain.explorer.index.service import open_index
from deepsquare_chain.explorer.web.app import LOOPBACK, explorer_app
from deepsquare_chain.explorer.web.site import Link, Site
from deepsquare_chain.observe.metrics import Metrics
from deepsquare_chain.observe.serving import HOST, LoopbackServer
from deepsquare_chain.store.definitions import DefinitionStore

NAME: Final = "explorer"
PORT: Final = 8547


@dataclass(frozen=True, slots=True)
class Address:
    """Where pages are served.

    `names` are further host names under which they may be asked; on loopback only its own names
    are answered, so that no page of another site can read a private explorer.
    """

    host: str = HOST
    port: int = PORT
    names: tuple[str, ...] = ()

    @property
    def allowed(self) -> tuple[str, ...]:
        """Host names that are answered."""
        if _is_loopback(self.host):
            return (*LOOPBACK, *self.names)
        return self.names or ("*",)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True, slots=True)
class Explorer:
    """A running explorer: `url` answers, `daemon.run()` keeps its index up."""

    url: str
    daemon: Daemon


@asynccontextmanager
async def open_explorer(
    endpoint: str,
    deployment: Deployment,
    where: str | Path | None,
    settings: ServiceSettings,
    *,
    address: Address | None = None,
    store: DefinitionStore | None = None,
    links: Sequence[Link] = (),
    stop: asyncio.Event | None = None,
) -> AsyncIterator[Explorer]:
    """Serve pages, closed in order at the end of the block.

    Args:
        endpoint: JSON-RPC endpoint.
        deployment: The grid.
        where: Database of the index, as `IndexDatabase.open` takes it.
        settings: How the indexer runs.
        address: Where pages are served.
        store: Where jobs submitted in the browser are kept for providers; None takes none.
        links: Other explorers to link to.
        stop: Ends the daemon when set.

    Raises:
        UsageError: The port can't be used, or the index belongs to another grid.
        StoreError: The disk is full, or the server does not answer.
        EndpointError: The endpoint is down, or serves another chain.
    """
    address, metrics = address or Address(), Metrics(NAME)
    async with (
        connected(
            endpoint,
            chain_id=deployment.chain_id,
            contracts=deployment.addresses,
            max_lag_blocks=settings.max_lag_blocks,
            metrics=metrics,
        ) as w3,
        open_index(
            endpoint,
            deployment,
            where,
            confirmations=settings.confirmations,
            metrics=metrics,
        ) as service,
    ):
        site = Site(service.index, Contracts(w3, deployment), store, tuple(links))
        daemon = await open_daemon(
            NAME,
            service.cycle,
            settings,
            chain_id=deployment.chain_id,
            metrics=metrics,
            stop=stop,
        )
        app = explorer_app(
            site,
            hosts=address.allowed,
            more_routes=api_routes(service.index),
            probe=daemon.health,
            metrics=metrics,
        )
        server = LoopbackServer(app, address.port, address.host)
        await server.start()
        try:
            yield Explorer(server.url, daemon)
        finally:
            # Open streams end first, or the server would wait for them.
            await app.state.feed.close()
            await server.stop()
