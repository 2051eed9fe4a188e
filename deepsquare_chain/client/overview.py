"""What happens on a grid now: a customer's jobs, the queue of everybody, and the providers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.chain.rpc.connection import chain_time
from deepsquare_chain.client.history import histories
from deepsquare_chain.client.offers import LOOKED_AT
from deepsquare_chain.job import Job, JobStatus, Offer, Provider, ProviderStatus

_PAGE = 500
#: Ended jobs of the customer that are shown after those that live.
_ENDED = 20


@dataclass(frozen=True, slots=True)
class JobLine:
    """A job; `elapsed` is seconds in its present status, `left` seconds until its time limit."""

    job: Job
    name: str
    elapsed: int
    left: int | None


@dataclass(frozen=True, slots=True)
class ProviderLine:
    """A provider with what its assigned jobs occupy."""

    provider: Provider
    jobs: int
    used: Offer


@dataclass(frozen=True, slots=True)
class Overview:
    """A grid at one block; `balance` is the customer's credit-wei, None without a customer."""

    block: int
    time: int
    balance: int | None
    jobs: tuple[JobLine, ...]
    queue: tuple[JobLine, ...]
    providers: tuple[ProviderLine, ...]


class OverviewReader:
    """Reads overviews; names of jobs never change and are read once.

    Args:
        contracts: The grid.
        customer: Whose jobs are listed; None lists everybody's.
    """

    def __init__(self, contracts: Contracts, customer: str | None) -> None:
        self._contracts = contracts
        self._customer = customer
        self._names: dict[int, str] = {}

    async def read(self) -> Overview:
        """The grid now.

        Raises:
            EndpointError: The node did not answer.
        """
        contracts, customer = self._contracts, self._customer
        records = await self._records()
        now = await chain_time(contracts.w3)
        own = [job for job in records if customer in (None, job.customer)]
        live = [job for job in own if job.status.is_live]
        mine = sorted(live, key=lambda job: (job.status is not JobStatus.RUNNING, job.id))
        mine += [job for job in own if job.status.is_final][:_ENDED]
        waiting = sorted(
            (job for job in records if job.status.is_live and job.status is not JobStatus.RUNNING),
            key=lambda job: job.id,
        )
        await self._learn_names([*mine, *waiting])
        providers = await contracts.registry.providers()
        return Overview(
            block=int(await contracts.w3.eth.block_number),
            time=now,
            balance=None if customer is None else await contracts.credit.balance_of(customer),
            jobs=tuple(self._line(job, now) for job in mine),
            queue=tuple(self._line(job, now) for job in waiting),
            providers=tuple(
                _provider_line(each, records)
                for each in providers
                if each.status is not ProviderStatus.NONE
            ),
        )

    async def _records(self) -> list[Job]:
        """The newest records, newest first: what lives is rarely older."""
        found: list[Job] = []
        top = await self._contracts.scheduler.job_count()
        last = max(0, top - LOOKED_AT)
        while top > last:
            bottom = max(last, top - _PAGE)
            found += await self._contracts.scheduler.get_jobs(range(top, bottom, -1))
            top = bottom
        return found

    async def _learn_names(self, jobs: Sequence[Job]) -> None:
        unknown = [job.id for job in jobs if job.id not in self._names]
        if unknown:
            found = await histories(self._contracts, unknown)
            self._names |= {number: found[number].name for number in unknown}

    def _line(self, job: Job, now: int) -> JobLine:
        elapsed = max(0, now - job.since)
        left = None
        if job.status is JobStatus.RUNNING and not job.until_spent:
            left = max(0, job.time_limit - elapsed)
        return JobLine(job, self._names.get(job.id, ""), elapsed, left)


def _provider_line(provider: Provider, records: Sequence[Job]) -> ProviderLine:
    held = [job for job in records if job.provider_id == provider.id and job.status.is_assigned]
    used = Offer(
        cpus=sum(job.resources.cpus for job in held),
        memory=sum(job.resources.memory for job in held),
        gpus=sum(job.resources.gpus for job in held),
    )
    return ProviderLine(provider, len(held), used)
