"""A live overview of a grid: a customer's jobs, the queue, and the providers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.chain.rpc.pool import chain_time
from deepsquare_chain.client.jobs import histories
from deepsquare_chain.client.offers import SEARCHED_RECORDS
from deepsquare_chain.job import Job, JobStatus, Offer, Provider, ProviderStatus

_PAGE = 500
#: Number of ended jobs of the customer, listed after the live jobs.
_MAX_ENDED = 20


@dataclass(frozen=True, slots=True)
class JobLine:
    """A job; `elapsed` is the seconds in its current status, `left` those until its time limit."""

    job: Job
    name: str
    elapsed: int
    left: int | None


@dataclass(frozen=True, slots=True)
class ProviderLine:
    """A provider, with the number and the resources of its assigned jobs."""

    provider: Provider
    jobs: int
    used: Offer


@dataclass(frozen=True, slots=True)
class GridSnapshot:
    """A grid at one block; `balance` is the customer's credit-wei, None without a customer."""

    block: int
    time: int
    balance: int | None
    jobs: tuple[JobLine, ...]
    queue: tuple[JobLine, ...]
    providers: tuple[ProviderLine, ...]


class OverviewReader:
    """Reads overviews; names of jobs never change and are cached.

    Args:
        contracts: Contracts of the grid.
        customer: Customer whose jobs are listed; None for all jobs.
    """

    def __init__(self, contracts: Contracts, customer: str | None) -> None:
        self._contracts = contracts
        self._customer = customer
        self._names: dict[int, str] = {}

    async def read(self) -> GridSnapshot:
        """Return the current overview.

        Raises:
            EndpointError: The endpoint does not answer.
        """
        contracts, customer = self._contracts, self._customer
        records = await self._records()
        now = await chain_time(contracts.w3)
        customer_jobs = [job for job in records if customer in (None, job.customer)]
        live = [job for job in customer_jobs if job.status.is_live]
        listed = sorted(live, key=lambda job: (job.status is not JobStatus.RUNNING, job.id))
        listed += [job for job in customer_jobs if job.status.is_final][:_MAX_ENDED]
        queue = sorted(
            (job for job in records if job.status.is_live and job.status is not JobStatus.RUNNING),
            key=lambda job: job.id,
        )
        await self._load_names([*listed, *queue])
        providers = await contracts.registry.providers()
        return GridSnapshot(
            block=int(await contracts.w3.eth.block_number),
            time=now,
            balance=None if customer is None else await contracts.credit.balance_of(customer),
            jobs=tuple(self._line(job, now) for job in listed),
            queue=tuple(self._line(job, now) for job in queue),
            providers=tuple(
                _provider_line(provider, records)
                for provider in providers
                if provider.status is not ProviderStatus.NONE
            ),
        )

    async def _records(self) -> list[Job]:
        """Return the newest records, newest first; live jobs are rarely older."""
        jobs: list[Job] = []
        top = await self._contracts.scheduler.job_count()
        last = max(0, top - SEARCHED_RECORDS)
        while top > last:
            bottom = max(last, top - _PAGE)
            jobs += await self._contracts.scheduler.get_jobs(range(top, bottom, -1))
            top = bottom
        return jobs

    async def _load_names(self, jobs: Sequence[Job]) -> None:
        unknown = [job.id for job in jobs if job.id not in self._names]
        if unknown:
            history_by_id = await histories(self._contracts, unknown)
            self._names |= {job_id: history_by_id[job_id].name for job_id in unknown}

    def _line(self, job: Job, now: int) -> JobLine:
        elapsed = max(0, now - job.since)
        left = None
        if job.status is JobStatus.RUNNING and not job.until_spent:
            left = max(0, job.time_limit - elapsed)
        return JobLine(job, self._names.get(job.id, ""), elapsed, left)


def _provider_line(provider: Provider, records: Sequence[Job]) -> ProviderLine:
    assigned_jobs = [
        job for job in records if job.provider_id == provider.id and job.status.is_assigned
    ]
    used = Offer(
        cpus=sum(job.resources.cpus for job in assigned_jobs),
        memory=sum(job.resources.memory for job in assigned_jobs),
        gpus=sum(job.resources.gpus for job in assigned_jobs),
    )
    return ProviderLine(provider, len(assigned_jobs), used)
