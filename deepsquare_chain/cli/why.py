"""A job's situation in words, by the meta-scheduler's own reasoning in a dry run."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from deepsquare_chain.chain.contracts import Contracts
from deepsquare_chain.client.history import histories
from deepsquare_chain.credits import format_credits
from deepsquare_chain.job import Job, JobStatus
from deepsquare_chain.metascheduler.explain import (
    explain_assigned,
    explain_decision,
    explain_wait,
)
from deepsquare_chain.metascheduler.service import SchedulerService, SchedulerSettings
from deepsquare_chain.store.database import Store

_NOBODY = "0x" + "00" * 20
_LOOKS = 3


async def explain(contracts: Contracts, job_id: int) -> str:
    """Why a job is where it is, in a few lines.

    Raises:
        NotFoundError: There is no such job.
        EndpointError: The node does not answer.
    """
    job = await contracts.scheduler.get_job(job_id)
    if job.status.is_final:
        return await _ended(contracts, job)
    return await _live(contracts, job)


async def _ended(contracts: Contracts, job: Job) -> str:
    told = (await histories(contracts, [job.id]))[job.id]
    where = f" at provider {job.provider_id}" if job.provider_id else ""
    lines = [f"job {job.id} ended {job.status.name}{where}"]
    if told.exit_code is not None:
        lines.append(f"its exit code is {told.exit_code}")
    if told.reason:
        lines.append(f"the reason given is {told.reason!r}")
    if told.billed_seconds is not None:
        used, back = told.paid + told.fee, told.refunded
        lines.append(
            f"{told.billed_seconds} s were billed: {format_credits(used)} credits used, "
            f"{format_credits(back)} refunded"
        )
    if told.successor is not None:
        lines.append(f"job {told.successor} goes on with its credits")
    return "\n".join(lines)


async def _live(contracts: Contracts, job: Job) -> str:
    service = await _look(contracts)
    world = service.world
    if world is None:
        return f"job {job.id} is {job.status.name}"
    if job.status is not JobStatus.PENDING:
        return explain_assigned(job, world.moment.now)
    found = next((each for each in _reasons(service) if each.job_id == job.id), None)
    if found is None:
        return f"job {job.id} is {job.status.name}"
    return "\n".join([found.text, *(f"  {each}" for each in found.details)])


@dataclass(frozen=True, slots=True)
class Reason:
    """What a meta-scheduler would do with a waiting job; `provider_id` is None if it must wait."""

    job_id: int
    provider_id: int | None
    text: str
    details: tuple[str, ...] = ()


async def reasons(contracts: Contracts) -> list[Reason]:
    """What a meta-scheduler would decide now, in its own order.

    Raises:
        EndpointError: The node does not answer.
    """
    return list(_reasons(await _look(contracts)))


def _reasons(service: SchedulerService) -> Iterator[Reason]:
    world, decided = service.world, set()
    if world is None:
        return
    for decision in service.plan.decisions:
        job_id = decision.waiting.job.id
        decided.add(job_id)
        text = f"a meta-scheduler would assign it now: {explain_decision(decision)}"
        yield Reason(job_id, decision.provider_id, text)
    for waiting in world.waiting:
        if waiting.job.id not in decided:
            found = explain_wait(waiting, world.snapshot, service.plan)
            details = tuple(each.text for each in found.verdicts)
            yield Reason(waiting.job.id, None, found.text, details)


async def _look(contracts: Contracts) -> SchedulerService:
    """A scheduler without a wallet, after it has seen the grid."""
    deployment = contracts.deployment
    with Store.open(
        None, chain_id=deployment.chain_id, contract=deployment.scheduler, account=_NOBODY
    ) as store:
        settings = SchedulerSettings(state_dir=Path(), confirmations=0)
        service = SchedulerService(contracts, None, store, settings=settings)
        for _ in range(_LOOKS):
            await service.cycle()
            if service.world is not None:
                break
            await asyncio.sleep(settings.poll_interval)
    return service
