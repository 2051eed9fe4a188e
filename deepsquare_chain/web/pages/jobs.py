"""Jobs: the list, and everything about one."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from deepsquare_chain.errors import GridError, UsageError
from deepsquare_chain.indexer.read_models import JobDetail
from deepsquare_chain.job import JobStatus
from deepsquare_chain.web import views
from deepsquare_chain.web.job_explanation import verdicts, wanted
from deepsquare_chain.web.pages.common import ask, cursor_of, number_of, show, site_of
from deepsquare_chain.web.site import Site
from deepsquare_chain.workflow import Definition

#: Filters of the list: what the link says, and the statuses behind it.
FILTERS: dict[str, tuple[JobStatus, ...]] = {
    "all": (),
    "live": views.LIVE,
    **{each.name.lower(): (each,) for each in JobStatus if each},
}


async def jobs(request: Request) -> Response:
    """Jobs, latest first."""
    chosen = request.query_params.get("status", "all").lower()
    if chosen not in FILTERS:
        raise UsageError(
            f"{chosen[:40]!r} is not a status of a job", hint=f"There are {', '.join(FILTERS)}."
        )
    name = request.query_params.get("name", "").strip()[:64]
    customer = request.query_params.get("customer", "").strip()[:42]
    index = site_of(request).index
    found = await ask(
        index.jobs,
        cursor_of(request),
        statuses=FILTERS[chosen],
        name=name or None,
        customer=customer or None,
    )
    overview = await ask(index.overview)
    return await show(
        request,
        "jobs.html",
        found=found,
        chosen=chosen,
        name=name,
        customer=customer,
        filters=_filters(overview.jobs),
        total=overview.jobs_total,
    )


def _filters(counts: Any) -> list[tuple[str, str, int]]:
    return [
        (
            key,
            key if len(statuses) != 1 else statuses[0].name,
            sum(counts[each] for each in statuses or counts),
        )
        for key, statuses in FILTERS.items()
    ]


async def job(request: Request) -> Response:
    """One job."""
    site = site_of(request)
    detail = await ask(site.index.job, number_of(request.path_params["job"], "job id"))
    providers = await ask(site.index.providers)
    why = await verdicts(site.contracts, detail, providers)
    now = site.now(await ask(site.index.status))
    found = views.stages(detail.transitions, now)
    told, text = await _definition(site, detail)
    return await show(
        request,
        "job.html",
        detail=detail,
        row=detail.row,
        stages=found,
        strip=views.life_strip(found),
        flows=views.flows(detail),
        bill=views.bill(detail),
        accrued=views.accrued(detail, now),
        flags=views.flags_in_words(detail.row.flags),
        affinities=[str(each) for each in wanted(detail.uses)],
        verdicts=why,
        definition=told,
        definition_note=text,
        gateway=site.gateway,
        fields=views.fields,
    )


async def _definition(site: Site, detail: JobDetail) -> tuple[Definition | None, str]:
    """The definition where the store has it, else why it is not shown."""
    if site.store is None and site.gateway:
        return None, "It is private: its customer and its provider read it from the gateway."
    if site.store is None:
        return None, "This explorer has no store of definitions."
    try:
        data = await site.store.get(bytes.fromhex(detail.definition.removeprefix("0x")))
        return await ask(Definition.from_bytes, data), ""
    except (GridError, ValueError):
        return None, "The store of this explorer does not have it."
