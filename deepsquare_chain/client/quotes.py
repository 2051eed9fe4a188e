"""What a job would cost at each provider, before anybody pays."""

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
    """A provider's answer to terms.

    `rate` is in credit-wei a second, `cost` the credit-wei of the whole time limit, `seconds` what
    the offered credits buy; `refusal` is empty if the job could run there now.
    """

    provider: Provider
    rate: int
    cost: int
    seconds: int
    refusal: str

    @property
    def eligible(self) -> bool:
        """Whether the provider could take the job."""
        return not self.refusal


async def quotes(contracts: Contracts, terms: Terms) -> list[Quote]:
    """Every provider's answer: those that suit first, the cheapest first.

    Capacity that running jobs use now is ignored: it becomes free.
    """
    providers, now = await asyncio.gather(contracts.registry.providers(), chain_time(contracts.w3))
    silent = await asyncio.gather(
        *(contracts.scheduler.is_silent(provider.id) for provider in providers)
    )
    found = [
        quote(provider, terms, now=now, silent=is_silent)
        for provider, is_silent in zip(providers, silent, strict=True)
    ]
    return sorted(found, key=lambda each: (not each.eligible, each.cost, each.provider.id))


def quote(provider: Provider, terms: Terms, *, now: int, silent: bool = False) -> Quote:
    """One provider's answer at chain time `now`."""
    rate = job_rate(provider.prices, terms.resources)
    whole = cost(rate, terms.time_limit)
    seconds = terms.amount // rate if rate else 0
    return Quote(provider, rate, whole, seconds, _refusal(provider, terms, whole, now, silent))


def _refusal(provider: Provider, terms: Terms, whole: int, now: int, silent: bool) -> str:
    active = provider.status is ProviderStatus.ACTIVE
    fitting = fits(provider.hardware, provider.offer, terms.resources)
    lacking = ", ".join(str(each) for each in unmet(parse_uses(terms.uses), provider.labels))
    reasons = (
        (not active, provider.status.name.lower().replace("_", " ")),
        (provider.approved_until <= now, "approval has run out"),
        (silent, "silent: a challenge is unanswered"),
        (not fitting, "does not fit its hardware or offer"),
        (bool(lacking), f"its labels do not meet: {lacking}"),
        (whole == 0, "has no price"),
        (whole > terms.amount, OVER_BUDGET),
    )
    return next((reason for applies, reason in reasons if applies), "")


def cheapest(found: Sequence[Quote]) -> Quote | None:
    """The cheapest eligible provider, None if there is none."""
    return next((each for each in found if each.eligible), None)
