"""Runs the provider's daemon: opens its parts in order, and closes them in reverse."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, suppress
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
from deepsquare_chain.executors.base import Executor, ExecutorContext
from deepsquare_chain.executors.local import LocalExecutor
from deepsquare_chain.executors.registry import create_executor
from deepsquare_chain.job import Offer
from deepsquare_chain.observability.metrics import Metrics
from deepsquare_chain.provider.service import ProviderService, ProviderSettings, look_up
from deepsquare_chain.store.definitions import DefinitionStore
from deepsquare_chain.store.gateway_client import GatewayClient

NAME: Final = "provider"
_MAINTENANCE: Final = ((signal.SIGUSR1, True), (signal.SIGUSR2, False))


async def run_provider(
    url: str,
    deployment: Deployment,
    account: Signer,
    definitions: DefinitionStore,
    settings: ProviderSettings,
    *,
    executor: Executor | None = None,
    gateways: Sequence[GatewayClient] = (),
    stop: asyncio.Event | None = None,
) -> None:
    """Run a provider until SIGINT, SIGTERM or `stop`; its runs continue without it.

    Args:
        url: JSON-RPC endpoint, or several, separated by commas.
        deployment: Deployment of the grid.
        account: Signer of the registered provider's account.
        definitions: Store of job definitions.
        settings: Settings of the provider.
        executor: Executor that runs the jobs; by default the one named in the settings.
        gateways: Gateways to which output is delivered; none where customers share the machine.
        stop: Ends it when set.

    Raises:
        NotFoundError: The account is not registered as a provider.
        UsageError: The database belongs to another account or is in use; the executor does not
            exist, or one of its options is invalid; jobs would run as root or without isolation,
            and the settings do not allow that.
        WrongEndpointError: An endpoint serves another chain, or lacks the contracts. One that is
            down is retried.
        ReorgTooDeepError: A reorg is deeper than the blocks that are considered final.
    """

    async def open_once(parts: AsyncExitStack, stop: asyncio.Event) -> Daemon:
        metrics = Metrics(NAME)
        contracts = await open_contracts(parts, url, deployment, settings, metrics)
        standing = await look_up(contracts, account.address)
        store = parts.enter_context(await open_store(NAME, contracts, account, settings))
        runs_on = executor or create_executor(
            settings.executor,
            ExecutorContext(
                state_dir=settings.state_dir,
                capacity=settings.capacity or standing.hardware,
                min_free=settings.min_free,
                owner=account.address,
                options=settings.executor_options,
                allow_unisolated=settings.allow_unisolated,
                allow_root=settings.allow_root,
                private=settings.private_paths,
            ),
        )
        service = ProviderService(
            contracts,
            await open_sender(
                parts, contracts, account, store=store, settings=settings, metrics=metrics
            ),
            store,
            executor=runs_on,
            definitions=definitions,
            settings=settings,
            standing=standing,
            metrics=metrics,
            on_hardware=None if settings.capacity else _follow_hardware(runs_on),
            gateways=gateways,
        )
        daemon = await open_daemon(
            NAME,
            service.cycle,
            settings,
            chain_id=deployment.chain_id,
            metrics=metrics,
            stop=stop,
            heads=service.heads,
        )
        daemon.details = service.details
        daemon.unready = service.metrics.head.problem
        maintenance.serve(service)
        daemon.on_close("starts", service.close)
        return daemon

    maintenance = _MaintenanceSignals()
    with maintenance:
        await serve(NAME, open_once, stop)


class _MaintenanceSignals:
    """SIGUSR1 begins the maintenance of a provider, SIGUSR2 ends it.

    Each sends a transaction, as the commands do, so that the change is stored on chain. A signal
    that arrives before the service is open, e.g. while it waits for its endpoint, takes effect
    once it is.
    """

    def __init__(self) -> None:
        self._service: ProviderService | None = None
        self._requested: bool | None = None

    def __enter__(self) -> None:
        loop = asyncio.get_running_loop()
        for number, draining in _MAINTENANCE:
            with suppress(RuntimeError, ValueError):  # only the main thread can handle signals
                loop.add_signal_handler(number, self._ask, draining)

    def __exit__(self, *_: object) -> None:
        loop = asyncio.get_running_loop()
        for number, _draining in _MAINTENANCE:
            loop.remove_signal_handler(number)

    def serve(self, service: ProviderService) -> None:
        """Set the open service, and apply a signal that arrived before."""
        self._service = service
        if self._requested is not None:
            service.drain(self._requested)

    def _ask(self, draining: bool) -> None:
        if self._service is None:
            self._requested = draining
        else:
            self._service.drain(draining)


def _follow_hardware(executor: Executor) -> Callable[[Offer], None] | None:
    """Return a callback that sets a local executor's capacity to the registered hardware."""
    if not isinstance(executor, LocalExecutor):
        return None

    def follow(offer: Offer) -> None:
        executor.offer = offer

    return follow
