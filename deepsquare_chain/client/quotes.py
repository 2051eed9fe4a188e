"""Quotes: price and eligibility of a job at each provider."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.chain.rpc.connection import chain_time
from deepsquare_chain.credits import cost, fits, job_rate
from deepsquare_chain.job import Provider, ProviderStatus, Terms, parse_uses, unmet

OVER_BUDGET: Final = "over budget: the credits do not buy the time limit"


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
        (provider.approved_until <= now, "approval has run out"),
        (silent, "silent: a challenge is unanswered"),
        (not has_capacity, "does not fit its hardware or offer"),
        (bool(unmet_requirements), f"its labels do not meet: {unmet_requirements}"),
        (whole == 0, "has no price"),
        (whole > terms.amount, OVER_BUDGET),
    )
    return next((reason for applies, reason in reasons if applies), "")


def cheapest(found: Sequence[Quote]) -> Quote | None:
    """Return the quote of the cheapest eligible provider; None if there is none."""
    return next((quote for quote in found if quote.eligible), None)
