"""What an account has, and how it gets more."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import httpx2

from deepsquare_chain.chain.bindings import reverts
from deepsquare_chain.chain.bindings.calls import checked_address
from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.chain.rpc.transport import proxy_for, tls_problem
from deepsquare_chain.chain.transactions.sender import TxReceipt
from deepsquare_chain.client.gasless import GaslessWallet, PermitPlan
from deepsquare_chain.client.network import WalletConnection, transport_of
from deepsquare_chain.client.submission import allowed
from deepsquare_chain.credits import format_credits
from deepsquare_chain.errors import EndpointError, InsufficientFundsError, NotFoundError
from deepsquare_chain.settings import Settings, safe_url


@dataclass(frozen=True, slots=True)
class Balances:
    """Credit-wei of an account, and `gas` in wei of the chain's own coin.

    `allowance` is what the scheduler may take, `parked` what waits for `withdraw`.
    """

    account: str
    credits: int
    allowance: int
    parked: int
    gas: int


async def balances(contracts: Contracts, account: str) -> Balances:
    """Look at an account.

    Raises:
        UsageError: It is no address.
    """
    address = checked_address(account)
    scheduler = contracts.scheduler
    found = await asyncio.gather(
        contracts.credit.balance_of(address),
        contracts.credit.allowance(address, scheduler.address),
        scheduler.parked_of(address),
        contracts.w3.eth.get_balance(address),
    )
    return Balances(address, *found)


async def top_up(wallet: WalletConnection | GaslessWallet, job_id: int, amount: int) -> TxReceipt:
    """Add credit-wei to a live job, allowing exactly as much where the allowance is too small.

    A wallet that sends through a relay allows it by a permit in the same request.

    Raises:
        NotFoundError: There is no such job.
        InsufficientFundsError: The wallet has fewer credits.
    """
    async with wallet.sender.spending(10 * wallet.timeout):
        return await _top_up(wallet, job_id, amount)


async def _top_up(wallet: WalletConnection | GaslessWallet, job_id: int, amount: int) -> TxReceipt:
    """See `top_up`, with the wallet's lock."""
    contracts = wallet.contracts
    job = await contracts.scheduler.get_job(job_id)
    call = contracts.scheduler.top_up(job_id, job.customer, amount)
    held = await contracts.credit.balance_of(wallet.address)
    if held < amount:
        raise InsufficientFundsError(
            f"{wallet.address} has {format_credits(held)} credits, the top-up of job {job_id} "
            f"takes {format_credits(amount)}",
            hint="Get some: `deepsquare credit faucet` on a devnet.",
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
        # Everything but the allowance is in order, so that nothing is approved in vain.
        await wallet.send(approve)
    return await allowed(lambda: wallet.send(call), lambda: wallet.send(approve))


async def ask_faucet(settings: Settings, account: str) -> None:
    """Ask the devnet's faucet for credits and gas.

    Raises:
        NotFoundError: The deployment has no faucet.
        EndpointError: It does not answer, or refuses.
    """
    url = Deployment.load(settings.deployment).extra.get("faucet")
    if not isinstance(url, str):
        raise NotFoundError(
            "This deployment has no faucet", hint="Only a devnet gives credits away."
        )
    try:
        async with httpx2.AsyncClient(
            timeout=settings.timeout,
            trust_env=False,
            proxy=proxy_for(url),
            verify=transport_of(settings).context() or True,
        ) as client:
            answer = await client.post(url, json={"address": checked_address(account)})
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        why = type(error).__name__
        if isinstance(error, httpx2.ConnectError):
            why = tls_problem(error) or "no connection"
        elif isinstance(error, httpx2.TimeoutException):
            why = "no answer in time"
        raise EndpointError(
            f"The faucet at {safe_url(url)} can't be reached: {why}",
            hint="Is `deepsquare devnet up` still running?",
        ) from None
    if answer.is_error:
        raise EndpointError(f"The faucet refused: {answer.text[:200]}")
