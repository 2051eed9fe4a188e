"""What a job would cost at each provider, and when it could start there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.chain.rpc.connection import chain_time
from deepsquare_chain.client.quotes import OVER_BUDGET, Quote, quotes
from deepsquare_chain.job import Job, Resources, Terms
from deepsquare_chain.metascheduler.eligibility import ProviderView
from deepsquare_chain.metascheduler.free_capacity import amounts, free_room, release, room_from
from deepsquare_chain.metascheduler.ranking import energy_use

#: Newest records that are looked through for live jobs; what lives is rarely older.
LOOKED_AT: Final = 2_000
_PAGE: Final = 500


@dataclass(frozen=True, slots=True)
class PricedOffer:
    """A provider's answer to a job.

    Attributes:
        provider_id: Of the provider.
        account: Its address.
        rate: Credit-wei a second.
        cost: Credit-wei of the whole time limit.
        longest: Seconds that the offered credits buy.
        starts_in: Seconds until there is free capacity at the latest, if the job goes first; None where
            the provider can't take it, or its whole offer is too small.
        refusal: Why it can't run there, empty if it can.
        joules: Energy of the whole time limit by the provider's labels; None where they do not
            tell. The provider's word: nobody measures it.
        grams: Carbon dioxide of the same, in grams.
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
        """Whether the provider could take the job."""
        return not self.refusal

    @property
    def is_over_budget(self) -> bool:
        """Whether nothing but the credits is too little."""
        return self.refusal == OVER_BUDGET

    @property
    def start(self) -> str:
        """When it could start, in words."""
        if self.starts_in is None:
            return "-"
        return "now" if self.starts_in == 0 else f"within {self.starts_in} s"


async def offers(contracts: Contracts, terms: Terms) -> list[PricedOffer]:
    """Every provider's answer: those that suit first, of those the cheapest first.

    The start is counted from what assigned jobs may still use, an upper bound since most end
    early; PENDING jobs that wait before it are not counted.

    Raises:
        EndpointError: The node does not answer.
    """
    found = await quotes(contracts, terms)
    live, now = await _live(contracts), await chain_time(contracts.w3)
    return [_offer(each, terms.resources, terms.time_limit, live, now) for each in found]


def _offer(
    quote: Quote, wanted: Resources, limit: int, live: Sequence[Job], now: int
) -> PricedOffer:
    starts_in = _starts_in(quote, wanted, live, now) if quote.eligible else None
    joules, grams = energy_use(quote.provider.labels, wanted.cpus, limit, now)
    return PricedOffer(
        quote.provider.id,
        quote.provider.account,
        quote.rate,
        quote.cost,
        quote.seconds,
        starts_in,
        quote.refusal,
        joules,
        grams,
    )


def _starts_in(quote: Quote, wanted: Resources, live: Sequence[Job], now: int) -> int | None:
    provider = quote.provider
    held = [job for job in live if job.provider_id == provider.id]
    free = free_room([ProviderView(provider)], held)[provider.id]
    releases = [release(job, now, 0) for job in held]
    found = room_from(amounts(wanted), free, releases, now)
    return None if found is None else max(0, found[0] - now)


async def _live(contracts: Contracts) -> list[Job]:
    """Assigned jobs among the newest records."""
    found: list[Job] = []
    top = await contracts.scheduler.job_count()
    last = max(0, top - LOOKED_AT)
    while top > last:
        bottom = max(last, top - _PAGE)
        page = await contracts.scheduler.get_jobs(range(bottom + 1, top + 1))
        found += [job for job in page if job.status.is_assigned]
        top = bottom
    return found
