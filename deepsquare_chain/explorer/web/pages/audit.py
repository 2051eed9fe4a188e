"""The audit: does it add up now, and what was out of the ordinary."""

from __future__ import annotations

from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from deepsquare_chain.errors import UsageError
from deepsquare_chain.explorer.web import views
from deepsquare_chain.explorer.web.conservation import equations
from deepsquare_chain.explorer.web.pages.common import ask, cursor_of, show, site_of

#: Events that an auditor reads, by what the filter says.
EXCEPTIONS: Final[dict[str, tuple[str, ...]]] = {
    "jobs": ("JobRequeued", "JobPanicked", "TransitionSkipped", "PaymentParked"),
    "providers": ("ProviderChallenged", "ProviderAnswered", "BanChanged"),
    "administration": ("FeeChanged", "SubmissionsChanged", "RoleGranted", "RoleRevoked"),
}
TITLES: Final[dict[str, str]] = {
    "JobRequeued": "went back into the queue",
    "JobPanicked": "was given up",
    "TransitionSkipped": "was left out of a batch",
    "PaymentParked": "payment had to be parked",
    "ProviderChallenged": "provider was challenged",
    "ProviderAnswered": "provider answered",
    "BanChanged": "ban changed",
    "FeeChanged": "fee changed",
    "SubmissionsChanged": "submissions opened or closed",
    "RoleGranted": "role granted",
    "RoleRevoked": "role taken away",
}


async def audit(request: Request) -> Response:
    """Conservation, how far the index is, and exceptions."""
    site = site_of(request)
    chosen = request.query_params.get("of", "all")
    if chosen != "all" and chosen not in EXCEPTIONS:
        raise UsageError(
            f"{chosen[:40]!r} is no kind of exception",
            hint=f"There are all, {', '.join(EXCEPTIONS)}.",
        )
    names = EXCEPTIONS.get(chosen) or tuple(each for some in EXCEPTIONS.values() for each in some)
    overview = await ask(site.index.overview)
    found = await ask(site.index.events, cursor_of(request), names=names)
    return await show(
        request,
        "audit.html",
        overview=overview,
        equations=await equations(site.contracts, overview),
        found=found,
        chosen=chosen,
        kinds=["all", *EXCEPTIONS],
        titles=TITLES,
        fields=views.fields,
    )
