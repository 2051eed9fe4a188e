"""A provider's daemon: everything a service needs, opened in order and closed in reverse."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Final

from eth_account.signers.local import LocalAccount

from deepsquare_chain.chain.contracts import Contracts
from deepsquare_chain.chain.deployment import Deployment
from deepsquare_chain.chain.rpc import connected
from deepsquare_chain.daemon.service import open_daemon, open_sender, open_store
from deepsquare_chain.executors.base import Executor
from deepsquare_chain.executors.local import LocalExecutor
from deepsquare_chain.job import Offer
from deepsquare_chain.observe.metrics import Metrics
from deepsquare_chain.provider.service import ProviderService, ProviderSettings, look_up
from deepsquare_chain.store.definitions import DefinitionStore

NAME: Final = "provider"


async def run_provider(
    url: str,
    deployment: Deployment,
    account: LocalAccount,
    definitions: DefinitionStore,
    settings: ProviderSettings,
    *,
    executor: Executor | None = None,
    stop: asyncio.Event | None = None,
) -> None:
    """Run a provider until SIGINT, SIGTERM or `stop`; its runs go on without it.

    Args:
        url: JSON-RPC endpoint.
        deployment: The grid.
        account: Registered provider, who signs.
        definitions: Where definitions stand.
        settings: How it runs.
        executor: Where jobs run; processes of this machine by default.
        stop: Ends it when set.

    Raises:
        NotFoundError: The account is not registered as a provider.
        UsageError: The database belongs to somebody else, or is in use.
        EndpointError: The endpoint is down, or serves another chain.
        ReorgTooDeepError: The chain replaced what was believed long ago.
    """
    async with AsyncExitStack() as stack:
        w3 = await stack.enter_async_context(
            connected(
                url,
                chain_id=deployment.chain_id,
                contracts=[deployment.registry, deployment.scheduler],
            )
        )
        contracts = Contracts(w3, deployment)
        standing = await look_up(contracts, account.address)
        store = stack.enter_context(await open_store(NAME, contracts, account, settings))
        local = LocalExecutor(
            settings.state_dir,
            settings.capacity or standing.hardware,
            min_free=settings.min_free,
        )
        metrics = Metrics(NAME)
        service = ProviderService(
            contracts,
            open_sender(contracts, account, store, settings),
            store,
            executor=executor or local,
            definitions=definitions,
            settings=settings,
            standing=standing,
            metrics=metrics,
            on_hardware=None if settings.capacity else _follow_hardware(local),
        )
        daemon = await open_daemon(NAME, service.cycle, settings, metrics=metrics, stop=stop)
        await daemon.run()


def _follow_hardware(executor: LocalExecutor) -> Callable[[Offer], None]:
    """Keep a local executor at the hardware that the registry has."""

    def follow(offer: Offer) -> None:
        executor.offer = offer

    return follow
