"""Jobs: the list, and the page of one job."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from deepsquare_chain.audit.bill import (
    STYLE,
    Invoice,
    InvoiceLine,
    make_invoice,
    recompute_bill,
    render_html,
)
from deepsquare_chain.audit.entries import JobEntry
from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.chain.bindings.reverts import HINTS
from deepsquare_chain.client.transactions import FLAG_TEXTS
from deepsquare_chain.errors import GridError, UsageError
from deepsquare_chain.indexer.queries import LIVE
from deepsquare_chain.indexer.read_models import JobDetail, MovementRow, ProviderRow, TransitionRow
from deepsquare_chain.job import Affinity, JobFlags, JobStatus, parse_uses, unmet
from deepsquare_chain.web import charts
from deepsquare_chain.web.formats import duration
from deepsquare_chain.web.security import CONTENT_SECURITY_POLICY
from deepsquare_chain.web.site import PageRequest, Site
from deepsquare_chain.workflow import Definition

#: Filters of the list: link text, and the statuses that it selects.
FILTERS: dict[str, tuple[JobStatus, ...]] = {
    "all": (),
    "live": LIVE,
    **{status.name.lower(): (status,) for status in JobStatus if status},
}


def jobs(request: Request) -> Response:
    """The list of jobs, filtered and sorted; latest first by default."""
    page = PageRequest(request)
    site, index = page.site, page.index
    chosen = page.choice("status", FILTERS, "status of a job", "all")
    texts = {name: page.text(name) for name in ("name", "customer", "provider")}
    listing = index.jobs(
        page.number,
        statuses=FILTERS[chosen],
        name=texts["name"] or None,
        customer=site.account_of(texts["customer"]) or None,
        provider=site.account_of(texts["provider"]) or None,
        submitted=page.period,
        sort=page.order,
    )
    overview = index.overview()
    return page.render(
        "jobs.html",
        listing=listing,
        chosen=chosen,
        texts=texts | page.days,
        filters=_filters(overview.jobs),
        total=overview.jobs_total,
        customers=sorted(site.recorded_names.values()),
    )


def _filters(counts: Mapping[JobStatus, int]) -> list[tuple[str, str, int]]:
    """Return key, link text and number of jobs of each filter."""
    return [
        (
            key,
            key if len(statuses) != 1 else statuses[0].name,
            sum(counts[status] for status in statuses or counts),
        )
        for key, statuses in FILTERS.items()
    ]


async def job(request: Request) -> Response:
    """The page of one job."""
    page = PageRequest(request)
    site, index = page.site, page.index
    job_id = page.argument_number("job", "job ID")
    detail, entry = await run_in_threadpool(index.job_with_entry, job_id)
    providers = await run_in_threadpool(index.providers)
    now = await run_in_threadpool(lambda: page.now)
    job_stages = stages(detail.transitions, now)
    definition, definition_note = await _definition(site, detail)
    bill = recompute_bill(entry, now=now)
    is_pending = detail.row.status is JobStatus.PENDING
    return await run_in_threadpool(
        page.render,
        "job.html",
        detail=detail,
        stages=job_stages,
        timeline=timeline(job_stages),
        flows=flows(detail),
        bill=bill if bill.settled else None,
        # Seconds that interim payments have already billed are not included.
        accrued=bill.cost,
        flags=flags_in_words(detail.row.flags),
        prospect=await site.forecasts.of(job_id) if is_pending else None,
        accounts={row.id: row.account for row in providers},
        requirements=[str(affinity) for affinity in requirements_of(detail.uses)],
        eligibility=await eligibility(site.contracts, detail, providers),
        definition=definition,
        definition_note=definition_note,
        lines=sum(text.count("\n") + 1 for _, text in definition.commands()) if definition else 0,
    )


def invoice(request: Request) -> Response:
    """The invoice of an ended job: the same page as from `deepsquare audit invoice --html`."""
    page = PageRequest(request)
    detail, entry = page.index.job_with_entry(page.argument_number("job", "job ID"))
    deployment, block = page.site.contracts.deployment, page.status.block
    body = render_html(job_invoice(entry, detail.movements, deployment, block))
    style = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    policy = CONTENT_SECURITY_POLICY.replace("style-src 'self'", f"style-src 'sha256-{style}'")
    headers = {"Content-Security-Policy": policy, "Cache-Control": "no-cache"}
    return HTMLResponse(body, headers=headers)


async def _definition(site: Site, detail: JobDetail) -> tuple[Definition | None, str]:
    """Return the definition, or None and the reason why it is not shown."""
    if site.store is None:
        private = "It is private: only its customer and its provider can read it from the gateway."
        return None, private if site.gateway else "This explorer has no store of definitions."
    try:
        data = await site.store.get(bytes.fromhex(detail.definition.removeprefix("0x")))
        return await run_in_threadpool(Definition.from_bytes, data), ""
    except (GridError, ValueError):
        return None, "The store of this explorer does not have it."


# -- why a job is pending, by the contract's eligibility check and the job's labels

#: Most providers that are checked for one page.
MAX_PROVIDERS: Final = 20
_WORDS: Final = {
    "ProviderNotActive": "is not active, or its approval has expired",
    "ProviderSilent": "has an unanswered challenge",
    "ProviderExcluded": "lost this job before and can't get it again",
    "DoesNotFit": "does not have enough free CPUs, memory or GPUs",
    "RateOutOfRange": "has no valid price for it",
    "OverBudget": "is too expensive: the credits are not sufficient for the time limit",
}


@dataclass(frozen=True, slots=True)
class Eligibility:
    """Whether a provider is eligible for a job now, and the reason."""

    provider: ProviderRow
    eligible: bool
    explanation: str


async def eligibility(
    contracts: Contracts, detail: JobDetail, providers: Sequence[ProviderRow]
) -> tuple[Eligibility, ...]:
    """Check the eligibility of each approved provider with the contract.

    Returns an empty tuple if the job is not pending, or if the node fails or is ahead of the index.
    """
    if detail.row.status is not JobStatus.PENDING:
        return ()
    approved = [provider for provider in providers if provider.id is not None][:MAX_PROVIDERS]
    try:
        is_eligible = partial(contracts.scheduler.is_eligible, detail.row.id)
        answers = await asyncio.gather(*(is_eligible(row.id or 0) for row in approved))
    except GridError:
        return ()
    return tuple(
        eligibility_of(provider, detail.uses, eligible=eligible, reason=reason)
        for provider, (eligible, reason) in zip(approved, answers, strict=True)
    )


def eligibility_of(provider: ProviderRow, uses: str, *, eligible: bool, reason: str) -> Eligibility:
    """Combine the contract's verdict with the labels, which the contract does not check."""
    unmet_requirements = unmet(requirements_of(uses), provider.labels)
    if not eligible:
        explanation = _WORDS.get(reason, HINTS.get(reason, reason))
    elif unmet_requirements:
        requirement = unmet_requirements[0]
        label = provider.labels.get(requirement.key)
        mismatch = "has no such label" if label is None else f"its label says {label[:60]}"
        explanation = f"{requirement}: {mismatch}"
    else:
        explanation = "is eligible"
    return Eligibility(provider, eligible and not unmet_requirements, explanation)


def requirements_of(uses: str) -> tuple[Affinity, ...]:
    """Parse the affinities of a job; empty if the customer's text is invalid."""
    try:
        return parse_uses(uses)
    except ValueError:
        return ()


# -- what the page of a job shows: timeline, credits, invoice, options


@dataclass(frozen=True, slots=True)
class Stage:
    """A status change, and the seconds in that status; `ongoing` for the current live status."""

    row: TransitionRow
    seconds: int
    ongoing: bool


def stages(rows: Sequence[TransitionRow], now: int) -> tuple[Stage, ...]:
    """Return a job's status changes with durations; the last one is counted until `now`."""
    ends = [*(row.at.time for row in rows[1:]), now]
    return tuple(
        Stage(row, max(0, end - row.at.time), row is rows[-1] and not row.after.is_final)
        for row, end in zip(rows, ends, strict=False)
    )


def timeline(stages: Sequence[Stage]) -> tuple[charts.ChartSegment, ...]:
    """Return the timeline of a job's live statuses as a strip."""
    segments = []
    for stage in stages:
        name = stage.row.after.name
        text = f"{name} {duration(stage.seconds)}{' so far' if stage.ongoing else ''}"
        if stage.row.after.is_live:
            segments.append((f"f-{name}", stage.seconds, text))
    return charts.timeline(segments)


def flows(detail: JobDetail) -> tuple[charts.WaterfallStep, ...]:
    """Return the credits into and out of the escrow as a waterfall, ending at its current value."""
    row = detail.row
    parts = [
        ("funded", "in", row.funded),
        ("carried in", "carried", detail.carried_in),
        ("paid", "paid", -row.paid),
        ("fee", "fee", -row.fee),
        ("refunded", "back", -row.refunded),
        ("carried out", "carried", -detail.carried_out),
    ]
    return charts.waterfall(
        [part for part in parts if part[2]], total=("in escrow", "held", row.escrow)
    )


def job_invoice(
    job: JobEntry, movements: Iterable[MovementRow], deployment: Deployment, block: int
) -> Invoice:
    """Return the invoice of a job at the last indexed block; raises UsageError until it ends."""
    if not job.status.is_final:
        raise UsageError(
            f"Job {job.id} has not ended, so that there is no invoice yet",
            hint=f"See /jobs/{job.id} for what it has cost so far.",
        )
    lines = (
        (row.account, InvoiceLine(row.at.time, row.kind, row.amount, row.at.tx_hash))
        for row in movements
    )
    return make_invoice(job, recompute_bill(job), deployment, block, lines)


def flags_in_words(flags: JobFlags) -> tuple[str, ...]:
    """Return the descriptions of a job's flags."""
    return tuple(words for flag, words in FLAG_TEXTS.items() if flag in flags)
