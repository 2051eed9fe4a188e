"""Balances of accounts, top-ups of jobs, and the faucet of a devnet."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import httpx2

from deepsquare_chain.chain.bindings import reverts
from deepsquare_chain.chain.bindings.calls import checked_address
from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.chain.rpc.transport import failure_reason, http_client
from deepsquare_chain.chain.transactions.sender import TxReceipt
from deepsquare_chain.client.gasless import GaslessWallet, PermitPlan
from deepsquare_chain.client.network import WalletConnection, transport_of
from deepsquare_chain.client.submission import pay_with_allowance
from deepsquare_chain.credits import credit_count, format_credits
from deepsquare_chain.errors import EndpointError, InsufficientFundsError, NotFoundError
from deepsquare_chain.settings import Settings, safe_url


@dataclass(frozen=True, slots=True)
class Balances:
    """Balances of an account in credit-wei, and `gas` in wei of the chain's native coin.

    `allowance` is the scheduler's allowance, `parked` the credits that `withdraw` pays out.
    """

    account: str
    credits: int
    allowance: int
    parked: int
    gas: int


async def balances(contracts: Contracts, account: str) -> Balances:
    """Return the balances of an account.

    Raises:
        UsageError: The address is invalid.
    """
    address = checked_address(account)
    scheduler = contracts.scheduler
    amounts = await asyncio.gather(
        contracts.credit.balance_of(address),
        contracts.credit.allowance(address, scheduler.address),
        scheduler.parked_of(address),
        contracts.w3.eth.get_balance(address),
    )
    return Balances(address, *amounts)


async def top_up(wallet: WalletConnection | GaslessWallet, job_id: int, amount: int) -> TxReceipt:
    """Add credit-wei to a live job; approve exactly the amount if the allowance is too small.

    A gasless wallet uses a permit in the same request instead of an approval.

    Raises:
        NotFoundError: The job does not exist.
        InsufficientFundsError: The wallet has too few credits.
    """
    async with wallet.sender.spending(10 * wallet.timeout):
        return await _top_up(wallet, job_id, amount)


async def _top_up(wallet: WalletConnection | GaslessWallet, job_id: int, amount: int) -> TxReceipt:
    """Top up a job while the wallet's lock is held; see `top_up`."""
    contracts = wallet.contracts
    job = await contracts.scheduler.get_job(job_id)
    call = contracts.scheduler.top_up(job_id, job.customer, amount)
    balance = await contracts.credit.balance_of(wallet.address)
    if balance < amount:
        raise InsufficientFundsError(
            f"{wallet.address} has {credit_count(balance)}, the top-up of job {job_id} "
            f"takes {format_credits(amount)}",
            hint="Get credits: on a devnet with `deepsquare credit faucet`.",
        )
    if isinstance(wallet, GaslessWallet):
        scheduler, plan = contracts.scheduler, None
        if await contracts.credit.allowance(wallet.address, scheduler.address) < amount:
            plan = PermitPlan(
                amount,
                lambda signed: scheduler.top_up_with_permit(job_id, job.customer, amount, signed),
            )
        return await wallet.send(call, permit=plan)
    approve = contracts.credit.approve(contracts.scheduler.address, amount)
    try:
        await wallet.sender.simulate(call)
    except reverts.ERC20InsufficientAllowance:
        # Only the allowance is missing, so the approval is not wasted.
        await wallet.send(approve)
    return await pay_with_allowance(lambda: wallet.send(call), lambda: wallet.send(approve))


async def ask_faucet(settings: Settings, account: str) -> None:
    """Ask the devnet's faucet for credits and gas.

    Raises:
        NotFoundError: The deployment has no faucet.
        EndpointError: The faucet does not answer, or refuses.
    """
    url = Deployment.load(settings.deployment).extra.get("faucet")
    if not isinstance(url, str):
        raise NotFoundError("This deployment has no faucet", hint="Only a devnet has a faucet.")
    try:
        async with http_client(url, transport_of(settings), timeout=settings.timeout) as client:
            response = await client.post(url, json={"address": checked_address(account)})
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise EndpointError(
            f"The faucet at {safe_url(url)} can't be reached: {failure_reason(error)}",
            hint="Check that `deepsquare devnet up` is still running.",
        ) from None
    if response.is_error:
        raise EndpointError(f"The faucet refused: {response.text[:200]}")
