"""The explorer as a service: it follows the chain into its index and answers pages meanwhile."""

from __future__ import annotations

import asyncio
import ipaddress
import re
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.daemon.loop import Daemon
from deepsquare_chain.daemon.opening import serve
from deepsquare_chain.daemon.service import ServiceSettings, open_contracts, open_daemon
from deepsquare_chain.errors import UsageError
from deepsquare_chain.indexer.service import index_service
from deepsquare_chain.observability.metrics import Metrics
from deepsquare_chain.observability.serving import HOST, LoopbackServer
from deepsquare_chain.store.definitions import DefinitionStore
from deepsquare_chain.web.api import api_routes
from deepsquare_chain.web.app import LOOPBACK, explorer_app
from deepsquare_chain.web.site import Link, Site

NAME: Final = "explorer"
PORT: Final = 8547
#: A host's name, `*.` before one for all below it, or `*` for any.
_HOST_NAME: Final = re.compile(r"\*|(?:\*\.)?[A-Za-z0-9][A-Za-z0-9._-]*|\[[0-9a-fA-F:.]+\]")


@dataclass(frozen=True, slots=True)
class Address:
    """Where pages are served.

    `names` are further host names under which they may be asked. A page of another site, whose
    name was pointed to this machine, comes with that name: only names that are known are
    answered. An address as a name can't be pointed elsewhere.
    """

    host: str = HOST
    port: int = PORT
    names: tuple[str, ...] = ()

    @property
    def allowed(self) -> tuple[str, ...]:
        """Host names that are answered.

        Raises:
            UsageError: Nobody said under which names people come, or one is no host name.
        """
        for name in self.names:
            if not _HOST_NAME.fullmatch(name):
                raise UsageError(
                    f"{name[:80]!r} is no host name",
                    hint="Write it as in a browser, without http:// and port.",
                )
        try:
            found = ipaddress.ip_address(self.host)
        except ValueError:
            own: tuple[str, ...] = (self.host,)
        else:
            own = () if found.is_unspecified else (self.host, f"[{self.host}]")
            own = LOOPBACK if found.is_loopback else own
        if self.host == "localhost":
            own = LOOPBACK
        if not own and not self.names:
            raise UsageError(
                f"Served on {self.host}, the explorer has to know under which names people come",
                hint="Give each with --name, such as --name explorer.example.org.",
            )
        return (*(own or LOOPBACK), *self.names)


async def run_explorer(
    endpoint: str,
    deployment: Deployment,
    where: str | Path | None,
    settings: ServiceSettings,
    *,
    address: Address | None = None,
    store: DefinitionStore | None = None,
    links: Sequence[Link] = (),
    gateway: str = "",
    relay: str = "",
    submissions: bool = True,
    ready: Callable[[str], None] = lambda _: None,
    stop: asyncio.Event | None = None,
) -> None:
    """Serve pages until SIGINT, SIGTERM or `stop`.

    Args:
        endpoint: JSON-RPC endpoint, or several, parted by commas.
        deployment: The grid.
        where: Database of the index, as `IndexDatabase.open` takes it.
        settings: How the indexer runs.
        address: Where pages are served.
        store: Where jobs submitted in the browser are kept for providers; None takes none.
        links: Other explorers to link to.
        gateway: URL of the gateway where browsers put definitions and read output; empty for none.
        relay: URL of the relay that pays the gas of customers; empty for none.
        submissions: Whether jobs can be submitted in the browser.
        ready: Gets the URL of the pages once they are served.
        stop: Ends it when set.

    Raises:
        UsageError: The address can't be used, or the index belongs to another grid.
        StoreError: The disk is full, or the server does not answer.
        WrongEndpointError: An endpoint serves another chain, or lacks the contracts. One that is
            down is waited for.
    """
    place = address or Address()
    hosts = place.allowed

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
            Site(service.index, contracts, store, tuple(links), gateway, relay, submissions),
            hosts=hosts,
            more_routes=api_routes(service.index),
            probe=daemon.health,
            metrics=metrics,
        )
        server = LoopbackServer(app, place.port, place.host)
        await server.start()
        parts.push_async_callback(server.stop)
        # Open streams end first, or the server would wait for them.
        parts.push_async_callback(app.state.feed.close)
        ready(server.url)
        return daemon

    await serve(NAME, open_once, stop)
