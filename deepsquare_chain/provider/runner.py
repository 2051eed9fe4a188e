"""A provider's daemon: everything a service needs, opened in order and closed in reverse."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Final

from eth_account.signers.local import LocalAccount

from deepsquare_chain.chain.contracts import Contracts
from deepsquare_chain.chain.deployment import Deployment
from deepsquare_chain.chain.follower import ReorgTooDeepError
from deepsquare_chain.chain.rpc import connected
from deepsquare_chain.chain.sender import Sender
from deepsquare_chain.daemon import Daemon
from deepsquare_chain.errors import UsageError
from deepsquare_chain.executors.base import Executor
from deepsquare_chain.executors.local import LocalExecutor
from deepsquare_chain.job import Offer
from deepsquare_chain.observe.metrics import Metrics
from deepsquare_chain.provider.service import ProviderService, ProviderSettings, look_up
from deepsquare_chain.store.database import Store
from deepsquare_chain.store.definitions import DefinitionStore

DATABASE: Final = "provider.db"
STATUS_FILE: Final = "provider.json"
_GWEI: Final = 10**9


async def run_provider(
    url: str,
    deployment: Deployment,
    account: LocalAccount,
    definitions: DefinitionStore,
    settings: ProviderSettings,
    *,
    executor: Executor | None = None,
    stop: asyncio.Event | None = None,
    max_fee_per_gas: int = 500 * _GWEI,
) -> None:
    """Run a provider until SIGINT, SIGTERM or `stop`; its runs go on without it.

    Args:
        url: JSON-RPC endpoint.
        deployment: The grid.
        account: Registered provider, who signs.
        definitions: Where definitions stand.
        settings: How it runs; the database and a status file stand in its `state_dir`.
        executor: Where jobs run; processes of this machine by default.
        stop: Ends it when set.
        max_fee_per_gas: Ceiling in wei; above it transactions wait.

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
        genesis = await w3.eth.get_block(0)
        store = stack.enter_context(
            Store.open(
                settings.state_dir / DATABASE,
                chain_id=deployment.chain_id,
                contract=deployment.scheduler,
                account=account.address,
                genesis="0x" + bytes(genesis["hash"]).hex(),
                exclusive=True,
            )
        )
        local = LocalExecutor(settings.state_dir, settings.capacity or standing.hardware)
        metrics = Metrics("provider")
        service = ProviderService(
            contracts,
            Sender(
                w3,
                account,
                store,
                chain_id=deployment.chain_id,
                max_fee_per_gas=max_fee_per_gas,
                poll_interval=min(settings.poll_interval, 0.25),
            ),
            store,
            executor=executor or local,
            definitions=definitions,
            settings=settings,
            standing=standing,
            metrics=metrics,
            on_hardware=None if settings.capacity else _follow_hardware(local),
        )
        daemon: Daemon

        async def cycle() -> None:
            if await service.cycle():
                daemon.wake()

        daemon = Daemon(
            "provider",
            cycle,
            interval=settings.poll_interval,
            stop=stop,
            max_backoff=10.0,
            fatal=(ReorgTooDeepError, UsageError),
            status_file=settings.state_dir / STATUS_FILE,
            metrics=metrics,
        )
        await daemon.run()


def _follow_hardware(executor: LocalExecutor) -> Callable[[Offer], None]:
    """Keep a local executor at the hardware that the registry has."""

    def follow(offer: Offer) -> None:
        executor.offer = offer

    return follow
