"""Submitting a job once more, as it was."""

from __future__ import annotations

from deepsquare_chain.client.gasless import GaslessWallet
from deepsquare_chain.client.history import histories
from deepsquare_chain.client.network import WalletConnection
from deepsquare_chain.client.submission import Request, Submitted, submit
from deepsquare_chain.errors import RevertedError
from deepsquare_chain.job import JobFlags, Terms
from deepsquare_chain.settings import Settings
from deepsquare_chain.store.definitions import FolderDefinitionStore


async def resubmit(
    wallet: WalletConnection | GaslessWallet, settings: Settings, job_id: int, amount: int | None
) -> Submitted:
    """Pay for an ended job again.

    Args:
        wallet: The customer that pays, not necessarily the one that paid before.
        settings: Name the store that holds the definition.
        job_id: The ended job.
        amount: Escrow in credit-wei; what its line was funded with if None.

    Raises:
        NotFoundError: There is no such job, or the store has not got its definition.
        RevertedError: The job is live.
        InsufficientFundsError: Too few credits, or no gas.
    """
    job = await wallet.contracts.scheduler.get_job(job_id)
    if job.status.is_live:
        raise RevertedError(
            f"Job {job_id} is {job.status.name} and has not ended",
            hint=f"Cancel it first: `deepsquare job cancel {job_id}`.",
        )
    told = (await histories(wallet.contracts, [job_id]))[job_id]
    store = FolderDefinitionStore(settings.store)
    data = await store.get(job.definition)
    terms = Terms(
        amount=told.funded + told.carried_in if amount is None else amount,
        time_limit=job.time_limit,
        resources=job.resources,
        retries=job.retries_left,
        flags=job.flags & ~JobFlags.SUCCESSOR,
        objective=told.objective,
        name=told.name,
        uses=told.uses,
    )
    return await submit(
        wallet.contracts,
        wallet.sender,
        store,
        [Request(terms, (data,))],
        timeout=settings.timeout,
    )
