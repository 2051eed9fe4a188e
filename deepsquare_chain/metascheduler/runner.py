"""The meta-scheduler's daemon: everything a service needs, opened in order, closed in reverse."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Any, Final

from eth_account.signers.local import LocalAccount
from web3 import AsyncWeb3

from deepsquare_chain.chain.contracts import METASCHEDULER_ROLE, Contracts
from deepsquare_chain.chain.deployment import Deployment
from deepsquare_chain.chain.follower import ReorgTooDeepError
from deepsquare_chain.chain.rpc import connected
from deepsquare_chain.chain.sender import Sender
from deepsquare_chain.daemon import Daemon
from deepsquare_chain.errors import NotAuthorisedError, UsageError
from deepsquare_chain.metascheduler.service import SchedulerService, SchedulerSettings
from deepsquare_chain.observe import get_logger
from deepsquare_chain.observe.metrics import Metrics
from deepsquare_chain.store.database import Store

DATABASE: Final = "metascheduler.db"
STATUS_FILE: Final = "metascheduler.json"
_NOBODY: Final = "0x" + "00" * 20
_GWEI: Final = 10**9
_log = get_logger(__name__)


async def run_scheduler(
    url: str,
    deployment: Deployment,
    account: LocalAccount | None,
    settings: SchedulerSettings,
    *,
    stop: asyncio.Event | None = None,
    max_fee_per_gas: int = 500 * _GWEI,
) -> None:
    """Run a meta-scheduler until SIGINT, SIGTERM or `stop`.

    Args:
        url: JSON-RPC endpoint.
        deployment: The grid.
        account: Holder of METASCHEDULER_ROLE; None for a dry run, which says what it would do.
        settings: How it runs; the database and a status file stand in its `state_dir`.
        stop: Ends it when set.
        max_fee_per_gas: Ceiling in wei; above it transactions wait.

    Raises:
        NotAuthorisedError: The account may not assign jobs.
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
        await _check_role(contracts, account)
        store = stack.enter_context(await _open(w3, deployment, account, settings))
        metrics = Metrics("metascheduler")
        sender = None
        if account is not None:
            sender = Sender(
                w3,
                account,
                store,
                chain_id=deployment.chain_id,
                max_fee_per_gas=max_fee_per_gas,
                poll_interval=min(settings.poll_interval, 0.25),
            )
        service = SchedulerService(contracts, sender, store, settings=settings, metrics=metrics)
        daemon: Daemon

        async def cycle() -> None:
            if await service.cycle():
                daemon.wake()

        daemon = Daemon(
            "metascheduler",
            cycle,
            interval=settings.poll_interval,
            stop=stop,
            max_backoff=10.0,
            fatal=(ReorgTooDeepError, UsageError),
            status_file=settings.state_dir / STATUS_FILE,
            metrics=metrics,
        )
        await daemon.run()


async def _check_role(contracts: Contracts, account: LocalAccount | None) -> None:
    if account is None:
        _log.warning("dry run", why="no wallet was given: nothing will be sent")
        return
    if not await contracts.scheduler.has_role(METASCHEDULER_ROLE, account.address):
        raise NotAuthorisedError(
            f"{account.address} may not assign jobs: it has no METASCHEDULER_ROLE",
            hint="Ask the grid's administrator to grant it, or leave the wallet out for a dry run.",
        )


async def _open(
    w3: AsyncWeb3[Any],
    deployment: Deployment,
    account: LocalAccount | None,
    settings: SchedulerSettings,
) -> Store:
    genesis = await w3.eth.get_block(0)
    return Store.open(
        settings.state_dir / DATABASE,
        chain_id=deployment.chain_id,
        contract=deployment.scheduler,
        account=account.address if account is not None else _NOBODY,
        genesis="0x" + bytes(genesis["hash"]).hex(),
        exclusive=True,
    )
