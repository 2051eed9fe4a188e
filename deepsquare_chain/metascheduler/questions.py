"""Why a job waits, for somebody who runs no scheduler: everything is read from the chain now."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from deepsquare_chain.chain.contracts import Contracts
from deepsquare_chain.errors import NotFoundError
from deepsquare_chain.job import JobStatus
from deepsquare_chain.metascheduler.explain import (
    Explanation,
    explain_assigned,
    explain_decision,
    explain_wait,
)
from deepsquare_chain.metascheduler.observer import World
from deepsquare_chain.metascheduler.policy import Rules, plan
from deepsquare_chain.metascheduler.service import SchedulerService, SchedulerSettings
from deepsquare_chain.store.database import Store

_NOBODY = "0x" + "00" * 20


async def look(contracts: Contracts) -> World:
    """The grid at the latest block.

    Raises:
        EndpointError: The chain does not answer, or its endpoint lags.
    """
    deployment = contracts.deployment
    store = Store.open(
        None, chain_id=deployment.chain_id, contract=deployment.scheduler, account=_NOBODY
    )
    with store:
        settings = SchedulerSettings(state_dir=Path(), confirmations=0)
        return await SchedulerService(contracts, None, store, settings=settings).observe()


async def why(
    contracts: Contracts, job_id: int, *, world: World | None = None, rules: Rules | None = None
) -> Explanation:
    """Where a job stands and why; with one verdict a provider while it is PENDING.

    Args:
        contracts: Of the grid.
        job_id: The job.
        world: What `look` gave, to ask about several jobs.
        rules: Those of the grid's scheduler, as far as they are known.

    Raises:
        NotFoundError: There is no such job.
        EndpointError: The chain does not answer.
    """
    world = world or await look(contracts)
    now = world.moment.now
    for job in world.assigned:
        if job.id == job_id:
            return Explanation(job_id, explain_assigned(job, now))
    waiting = next((each for each in world.waiting if each.job.id == job_id), None)
    if waiting is None:
        return await _over(contracts, job_id)
    decided = plan(world.snapshot, rules)
    for decision in decided.decisions:
        if decision.waiting.job.id == job_id:
            told = explain_wait(waiting, world.snapshot, decided, rules)
            return dataclasses.replace(told, text=f"{explain_decision(decision)}, any moment now")
    return explain_wait(waiting, world.snapshot, decided, rules)


async def _over(contracts: Contracts, job_id: int) -> Explanation:
    job = await contracts.scheduler.get_job(job_id)
    if job.status is JobStatus.NONE:
        raise NotFoundError(f"Job {job_id} does not exist")
    if job.status.is_final:
        return Explanation(job_id, f"job {job_id} has ended: it is {job.status.name}")
    return Explanation(job_id, f"job {job_id} is {job.status.name}")
