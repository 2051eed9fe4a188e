"""Deploying a grid from the settings' wallet."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from deepsquare_chain.chain.deploying import DEMO_PARAMS, GridParams, deploy_grid
from deepsquare_chain.chain.deployment import Deployment
from deepsquare_chain.chain.rpc import connected
from deepsquare_chain.chain.sender import Sender
from deepsquare_chain.chain.wallet import load_account
from deepsquare_chain.errors import UsageError
from deepsquare_chain.settings import Settings, safe_url
from deepsquare_chain.store.database import Store

_GWEI: Final = 10**9
_ATTEMPTS: Final = 2


async def deploy(
    settings: Settings,
    *,
    fee_bps: int,
    treasury: str,
    schedulers: Sequence[str],
    demo_timeouts: bool,
) -> Deployment:
    """Deploy new contracts and write their record.

    Raises:
        UsageError: There is a record at that place already, or no wallet.
        GridError: As `deploy_grid`.
    """
    if settings.deployment.exists():
        raise UsageError(
            f"{settings.deployment} exists already, and a record is never overwritten",
            hint="Move it away, or name another place with --deployment.",
        )
    if settings.keystore is None:
        raise UsageError("No wallet is set", hint="Name one with --keystore.")
    base = DEMO_PARAMS if demo_timeouts else GridParams()
    params = replace(base, fee_bps=fee_bps, treasury=treasury, schedulers=tuple(schedulers))
    async with connected(settings.endpoint, chain_id=settings.chain_id, attempts=_ATTEMPTS) as w3:
        account = await asyncio.to_thread(load_account, settings.keystore, settings.password_file)
        chain_id = int(await w3.eth.chain_id)
        # A new grid has no earlier transactions of its own to look after.
        with Store.open(None, chain_id=chain_id, contract="", account=account.address) as store:
            ceiling = int(settings.max_fee_gwei * _GWEI)
            sender = Sender(w3, account, store, chain_id=chain_id, max_fee_per_gas=ceiling)
            deployment = await deploy_grid(
                w3,
                sender,
                params,
                extra={"endpoint": safe_url(settings.endpoint)},
                timeout=settings.timeout,
            )
    deployment.save(settings.deployment)
    return deployment
