"""The meta-scheduler daemon: opens what the service needs in order and closes it in reverse."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Final

from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.chain.bindings.deployment import METASCHEDULER_ROLE, Deployment
from deepsquare_chain.chain.signers import Signer
from deepsquare_chain.daemon import Daemon
from deepsquare_chain.daemon.service import (
    open_contracts,
    open_daemon,
    open_sender,
    open_store,
    serve,
)
from deepsquare_chain.errors import NotAuthorisedError
from deepsquare_chain.metascheduler.service import SchedulerService, SchedulerSettings
from deepsquare_chain.observability import get_logger
from deepsquare_chain.observability.metrics import Metrics

NAME: Final = "metascheduler"
_log = get_logger(__name__)


async def run_scheduler(
    url: str,
    deployment: Deployment,
    account: Signer | None,
    settings: SchedulerSettings,
    *,
    stop: asyncio.Event | None = None,
) -> None:
    """Run a meta-scheduler until SIGINT, SIGTERM or `stop`.

    Args:
        url: JSON-RPC endpoint, or several, separated by commas.
        deployment: Deployment of the grid.
        account: Holder of METASCHEDULER_ROLE; None for a dry run, which only logs transactions.
        settings: Settings of the scheduler.
        stop: Stops the daemon when set.

    Raises:
        NotAuthorisedError: The account may not assign jobs.
        UsageError: The database belongs to another account or grid, or is in use.
        WrongEndpointError: An endpoint serves another chain, or lacks the contracts. An endpoint
            that is down is retried instead.
        ReorgTooDeepError: A reorg goes deeper than the follower can roll back.
    """

    async def open_once(parts: AsyncExitStack, stop: asyncio.Event) -> Daemon:
        metrics = Metrics(NAME)
        contracts = await open_contracts(parts, url, deployment, settings, metrics)
        await _check_role(contracts, account)
        store = parts.enter_context(await open_store(NAME, contracts, account, settings))
        sender = None
        if account is not None:
            sender = await open_sender(
                parts, contracts, account, store=store, settings=settings, metrics=metrics
            )
        service = SchedulerService(contracts, sender, store, settings=settings, metrics=metrics)
        daemon = await open_daemon(
            NAME,
            service.cycle,
            settings,
            chain_id=deployment.chain_id,
            metrics=metrics,
            stop=stop,
            heads=service.heads,
        )
        daemon.unready = service.metrics.head.problem
        return daemon

    await serve(NAME, open_once, stop)


async def _check_role(contracts: Contracts, account: Signer | None) -> None:
    if account is None:
        _log.warning("dry run started", reason="no wallet was given: nothing will be sent")
        return
    if not await contracts.scheduler.has_role(METASCHEDULER_ROLE, account.address):
        raise NotAuthorisedError(
            f"{account.address} can't assign jobs: it does not have METASCHEDULER_ROLE",
            hint="Ask the grid's administrator to grant it, or omit the wallet for a dry run.",
        )
