"""Explains why a job is pending, by the contract's eligibility check and the job's labels."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.chain.bindings.revert_messages import HINTS
from deepsquare_chain.errors import GridError
from deepsquare_chain.indexer.read_models import JobDetail, ProviderRow
from deepsquare_chain.job import Affinity, JobStatus, matches, parse_uses

#: Most providers that are checked for one page.
MOST: Final = 20
_WORDS: Final = {
    "ProviderNotActive": "is not active, or its approval has run out",
    "ProviderSilent": "has not answered a challenge",
    "ProviderExcluded": "lost this job before and can't get it again",
    "DoesNotFit": "does not have the CPUs, memory or GPUs free",
    "RateOutOfRange": "has no usable price for it",
    "OverBudget": "is too dear: the credits do not buy the time limit",
}


@dataclass(frozen=True, slots=True)
class Eligibility:
    """Whether a provider is eligible for a job now, and the reason."""

    provider: ProviderRow
    eligible: bool
    why: str


async def verdicts(
    contracts: Contracts, detail: JobDetail, providers: Sequence[ProviderRow]
) -> tuple[Eligibility, ...]:
    """Check the eligibility of each approved provider with the contract.

    Returns an empty tuple if the job is not pending, or if the node fails or is ahead of the index.
    """
    if detail.row.status is not JobStatus.PENDING:
        return ()
    approved = [provider for provider in providers if provider.id is not None][:MOST]
    try:
        answers = await asyncio.gather(
            *(
                contracts.scheduler.is_eligible(detail.row.id, provider.id or 0)
                for provider in approved
            )
        )
    except GridError:
        return ()
    return tuple(
        judge(provider, detail.uses, eligible=eligible, reason=reason)
        for provider, (eligible, reason) in zip(approved, answers, strict=True)
    )


def judge(provider: ProviderRow, uses: str, *, eligible: bool, reason: str) -> Eligibility:
    """Combine the contract's verdict with the labels, which the contract does not check."""
    if not eligible:
        return Eligibility(
            provider, eligible=False, why=_WORDS.get(reason, HINTS.get(reason, reason))
        )
    for affinity in wanted(uses):
        if not matches([affinity], provider.labels):
            value = provider.labels.get(affinity.key)
            why = "has no such label" if value is None else f"its label says {value[:60]}"
            return Eligibility(provider, eligible=False, why=f"{affinity}: {why}")
    return Eligibility(provider, eligible=True, why="could get it now")


def wanted(uses: str) -> tuple[Affinity, ...]:
    """Parse the affinities of a job; empty if the customer's text is invalid."""
    try:
        return parse_uses(uses)
    except ValueError:
        return ()
