"""Deploys a grid with the wallet of the settings, plans it for another account, and records it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from web3 import AsyncWeb3

from deepsquare_chain.chain.bindings.calls import Call, checked_address
from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.chain.deploying import GridParams, deploy_grid, plan_grid, read_deployment
from deepsquare_chain.chain.rpc.connection import connected
from deepsquare_chain.chain.signers import Signer
from deepsquare_chain.chain.transactions.sender import Sender
from deepsquare_chain.chain.wallet import stated_address
from deepsquare_chain.client.network import no_keystore, open_account, transport_of
from deepsquare_chain.client.unsigned import AddressOnly, UnsignedSender
from deepsquare_chain.errors import UsageError
from deepsquare_chain.settings import Settings, safe_url
from deepsquare_chain.store.database import Store

_GWEI: Final = 10**9
_ATTEMPTS: Final = 2


@dataclass(frozen=True, slots=True)
class DeploymentPlan:
    """Calls that deploy a grid when `account` sends them in this order, and the contracts' addresses."""

    account: str
    deployment: Deployment
    calls: Sequence[Call]


async def deploy(settings: Settings, params: GridParams) -> Deployment:
    """Deploy new contracts and write the deployment record; an interrupted deployment is resumed.

    Raises:
        UsageError: The record exists already, or no wallet is set.
        GridError: As `deploy_grid`.
    """
    _check_no_record(settings)
    if settings.keystore is None and not settings.signer:
        raise no_keystore()
    if settings.keystore is not None and not settings.signer:
        stated_address(settings.keystore)
    progress = settings.deployment.with_name(f".{settings.deployment.name}.progress.db")
    async with _connect(settings) as w3:
        account = await open_account(settings)
        deployment = await _deploy(w3, account, settings, params, progress)
    deployment.save(settings.deployment)
    for leftover in progress.parent.glob(f"{progress.name}*"):
        leftover.unlink(missing_ok=True)
    return deployment


async def plan(settings: Settings, params: GridParams, account: str, salt: int) -> DeploymentPlan:
    """Plan a deployment by an account whose key is not here; nothing is sent or written.

    Raises:
        GridError: As `plan_grid`.
    """
    address = checked_address(account)
    async with _connect(settings) as w3:
        chain_id = int(await w3.eth.chain_id)
        with Store.open(None, chain_id=chain_id, contract="deploying", account=address) as store:
            sender = UnsignedSender(w3, AddressOnly(address), store, chain_id=chain_id)
            deployment = await plan_grid(w3, sender, params, salt=salt)
    return DeploymentPlan(address, deployment, sender.calls)


async def record(settings: Settings, scheduler: str, since_block: int | None) -> Deployment:
    """Write the deployment record of contracts that exist, from the address of their MetaScheduler.

    Raises:
        UsageError: The record exists already, or see `read_deployment`.
        EndpointError: The endpoint does not answer.
    """
    _check_no_record(settings)
    async with _connect(settings) as w3:
        deployment = await read_deployment(w3, scheduler, since_block)
    extra = {**deployment.extra, "endpoint": safe_url(settings.endpoint)}
    deployment = replace(deployment, extra=extra)
    deployment.save(settings.deployment)
    return deployment


def _connect(settings: Settings) -> AbstractAsyncContextManager[AsyncWeb3[Any]]:
    return connected(
        settings.endpoint,
        chain_id=settings.chain_id,
        attempts=_ATTEMPTS,
        transport=transport_of(settings),
    )


def _check_no_record(settings: Settings) -> None:
    if settings.deployment.exists():
        raise UsageError(
            f"{settings.deployment} exists already, and a record is never overwritten",
            hint="Verify what it says, move it away, or name another place for the new one.",
        )


async def _deploy(
    w3: AsyncWeb3[Any],
    account: Signer,
    settings: Settings,
    params: GridParams,
    progress: Path,
) -> Deployment:
    chain_id = int(await w3.eth.chain_id)
    genesis = bytes((await w3.eth.get_block(0))["hash"]).hex()
    with Store.open(
        progress,
        chain_id=chain_id,
        contract="deploying",
        account=account.address,
        genesis=genesis,
        exclusive=True,
    ) as store:
        ceiling = int(settings.max_fee_gwei * _GWEI)
        sender = Sender(w3, account, store, chain_id=chain_id, max_fee_per_gas=ceiling)
        await sender.recover(timeout=settings.timeout)
        return await deploy_grid(
            w3,
            sender,
            params,
            extra={"endpoint": safe_url(settings.endpoint)},
            timeout=settings.timeout,
            resumable=True,
        )
