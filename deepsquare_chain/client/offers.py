"""Quotes and offers of providers: price, eligibility and estimated start; and an overview of a grid."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.chain.rpc.pool import chain_time
from deepsquare_chain.client.jobs import histories
from deepsquare_chain.credits import cost, fits, job_rate
from deepsquare_chain.job import (
    Job,
    JobStatus,
    Offer,
    Provider,
    ProviderStatus,
    Resources,
    Terms,
    parse_uses,
    unmet,
)
from deepsquare_chain.metascheduler.eligibility import (
    ProviderView,
    amounts,
    available_capacity,
    fits_from,
    release,
)
from deepsquare_chain.metascheduler.provider_labels import energy_use

# -- quotes

OVER_BUDGET: Final = "over budget: the credits are not sufficient for the time limit"

#: Number of ended jobs of the customer, listed after the live jobs.
_MAX_ENDED = 20


@dataclass(frozen=True, slots=True)
class Quote:
    """A provider's quote for the terms of a job.

    `rate` is in credit-wei per second, `cost` is the price of the whole time limit in credit-wei,
    `seconds` is the run time that the escrow pays for; `refusal` is the reason why the provider is
    not eligible, empty if it is.
    """

    provider: Provider
    rate: int
    cost: int
    seconds: int
    refusal: str

    @property
    def eligible(self) -> bool:
        """Return whether the provider is eligible for the job."""
        return not self.refusal


async def quotes(contracts: Contracts, terms: Terms) -> list[Quote]:
    """Return the quotes of all providers; eligible providers first, then by price.

    Capacity used by running jobs is ignored, because it becomes free.
    """
    providers, now = await asyncio.gather(contracts.registry.providers(), chain_time(contracts.w3))
    silent = await asyncio.gather(
        *(contracts.scheduler.is_silent(provider.id) for provider in providers)
    )
    unsorted = [
        quote(provider, terms, now=now, silent=is_silent)
        for provider, is_silent in zip(providers, silent, strict=True)
    ]
    return sorted(unsorted, key=lambda each: (not each.eligible, each.cost, each.provider.id))


def quote(provider: Provider, terms: Terms, *, now: int, silent: bool = False) -> Quote:
    """Return a provider's quote at chain time `now`."""
    rate = job_rate(provider.prices, terms.resources)
    total = cost(rate, terms.time_limit)
    seconds = terms.amount // rate if rate else 0
    return Quote(provider, rate, total, seconds, _refusal(provider, terms, total, now, silent))


def _refusal(provider: Provider, terms: Terms, whole: int, now: int, silent: bool) -> str:
    active = provider.status is ProviderStatus.ACTIVE
    has_capacity = fits(provider.hardware, provider.offer, terms.resources)
    unmet_requirements = ", ".join(
        str(requirement) for requirement in unmet(parse_uses(terms.uses), provider.labels)
    )
    reasons = (
        (not active, provider.status.name.lower().replace("_", " ")),
        (provider.approved_until <= now, "approval has expired"),
        (silent, "silent: a challenge is unanswered"),
        (not has_capacity, "exceeds its hardware or offer"),
        (bool(unmet_requirements), f"its labels do not meet: {unmet_requirements}"),
        (whole == 0, "has no price"),
        (whole > terms.amount, OVER_BUDGET),
    )
    return next((reason for applies, reason in reasons if applies), "")


def cheapest(quotes_by_price: Sequence[Quote]) -> Quote | None:
    """Return the quote of the cheapest eligible provider; None if there is none."""
    return next((quote for quote in quotes_by_price if quote.eligible), None)


#: Number of newest records that are searched for live jobs; live jobs are rarely older.
SEARCHED_RECORDS: Final = 2_000
_PAGE: Final = 500


@dataclass(frozen=True, slots=True)
class PricedOffer:
    """Price and estimated start of a job at a provider.

    Attributes:
        provider_id: ID of the provider.
        account: Address of the provider.
        rate: Price in credit-wei per second.
        cost: Price of the whole time limit in credit-wei.
        longest: Seconds that the escrow pays for.
        starts_in: Upper bound in seconds until capacity is free, if the job is first in the queue;
            None if the provider is not eligible, or its whole offer is too small.
        refusal: Reason why the provider is not eligible; empty if it is.
        joules: Energy of the whole time limit by the provider's labels; None if they do not state
            it. The values are not measured or verified.
        grams: Carbon dioxide of the whole time limit in grams, likewise.
    """

    provider_id: int
    account: str
    rate: int
    cost: int
    longest: int
    starts_in: int | None
    refusal: str
    joules: int | None = None
    grams: float | None = None

    @property
    def eligible(self) -> bool:
        """Return whether the provider is eligible for the job."""
        return not self.refusal

    @property
    def is_over_budget(self) -> bool:
        """Return whether too few credits are the only reason that it is not eligible."""
        return self.refusal == OVER_BUDGET

    @property
    def start(self) -> str:
        """Return the estimated start as text."""
        if self.starts_in is None:
            return "-"
        return "now" if self.starts_in == 0 else f"within {self.starts_in} s"


async def offers(contracts: Contracts, terms: Terms) -> list[PricedOffer]:
    """Return the offers of all providers; eligible providers first, then by price.

    The start is estimated from the time limits of assigned jobs, an upper bound since most jobs end
    early. PENDING jobs ahead in the queue are not counted.

    Raises:
        EndpointError: The endpoint does not answer.
    """
    all_quotes = await quotes(contracts, terms)
    assigned = [job for job in await _newest_jobs(contracts) if job.status.is_assigned]
    now = await chain_time(contracts.w3)
    return [_offer(quote, terms.resources, terms.time_limit, assigned, now) for quote in all_quotes]


def _offer(
    quote: Quote, wanted: Resources, limit: int, assigned: Sequence[Job], now: int
) -> PricedOffer:
    provider = quote.provider
    starts_in = _starts_in(provider, wanted, assigned, now) if quote.eligible else None
    joules, grams = energy_use(provider.labels, wanted.cpus, limit, now)
    return PricedOffer(
        *(provider.id, provider.account, quote.rate, quote.cost, quote.seconds),
        *(starts_in, quote.refusal, joules, grams),
    )


def _starts_in(
    provider: Provider, wanted: Resources, assigned: Sequence[Job], now: int
) -> int | None:
    assigned_jobs = [job for job in assigned if job.provider_id == provider.id]
    free = available_capacity([ProviderView(provider)], assigned_jobs)[provider.id]
    releases = [release(job, now, 0) for job in assigned_jobs]
    start = fits_from(amounts(wanted), free, releases, now)
    return None if start is None else max(0, start[0] - now)


async def _newest_jobs(contracts: Contracts) -> list[Job]:
    """Return the newest `SEARCHED_RECORDS` jobs, newest first."""
    jobs: list[Job] = []
    top = await contracts.scheduler.job_count()
    last = max(0, top - SEARCHED_RECORDS)
    while top > last:
        bottom = max(last, top - _PAGE)
        jobs += await contracts.scheduler.get_jobs(range(top, bottom, -1))
        top = bottom
    return jobs


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

    Without a `customer` it lists the jobs of all customers.
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
        records = await _newest_jobs(contracts)
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
