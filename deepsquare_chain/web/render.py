"""Templates to responses: what every page knows, and nothing that could become markup."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlencode

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import HTMLResponse

from deepsquare_chain.indexer.read_models import Status
from deepsquare_chain.job import JobStatus
from deepsquare_chain.web import formats
from deepsquare_chain.web.site import Name, Site

FOLDER: Final = Path(__file__).parent
SECTIONS: Final = (
    ("/jobs", "Jobs"),
    ("/providers", "Providers"),
    ("/transactions", "Transactions"),
    ("/blocks", "Blocks"),
    ("/audit", "Audit"),
    ("/contracts", "Contracts"),
)


def environment() -> Environment:
    """Templates of this package; every value is escaped, an unknown one is an error."""
    found = Environment(
        loader=FileSystemLoader(FOLDER / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters.update(formats.FILTERS)
    found.globals.update(
        ago=formats.ago,
        count=formats.count,
        page_numbers=formats.page_numbers,
        JobStatus=JobStatus,
    )
    return found


class PageContext:
    """What one page knows besides its own data; templates call it `page`."""

    def __init__(self, site: Site, request: Request) -> None:
        self._site = site
        self.path = request.url.path
        self._query = request.query_params

    @cached_property
    def status(self) -> Status:
        """How far the index is."""
        return self._site.index.status()

    @cached_property
    def now(self) -> int:
        """See `Site.now`."""
        return self._site.now(self.status)

    @cached_property
    def sections(self) -> list[tuple[str, str, bool]]:
        """Places of the menu, and whether one is here."""
        return [(href, text, self.path.startswith(href)) for href, text in SECTIONS]

    def link(self, **changes: object) -> str:
        """This page with other parameters in its address; None takes one away.

        Another filter or order begins at the first page.
        """
        query = {key: text for key, text in self._query.items() if key != "page"}
        query |= {key: str(value) for key, value in changes.items() if value is not None}
        kept = [each for each in query.items() if changes.get(each[0], "") is not None]
        return f"{quote(self.path)}{'?' if kept else ''}{urlencode(kept)}"

    @property
    def order(self) -> str:
        """The column that the list is sorted by, after a `-` for the greatest first."""
        return self._query.get("sort", "")

    @property
    def can_submit(self) -> bool:
        """Whether jobs can be submitted here."""
        return self._site.storing

    @property
    def faucet(self) -> str:
        """See `Site.faucet`."""
        return self._site.faucet

    @cached_property
    def _names(self) -> Mapping[str, Name]:
        return self._site.names(self.status.change)

    def who(self, account: str) -> Name:
        """What an account is called, and where its page is."""
        return self._names.get(account) or Name("", f"/accounts/{account}", "")

    def external(self, kind: str, key: object) -> list[tuple[str, str]]:
        """See `Site.external`."""
        return self._site.external(kind, key)

    def ago(self, seconds: int) -> str:
        """How long ago a time is."""
        return formats.ago(seconds, self.now)


class Renderer:
    """Renders templates for one site."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._environment = environment()

    def __call__(
        self, request: Request, template: str, *, status_code: int = 200, **context: Any
    ) -> HTMLResponse:
        """A page; `context` is what its template needs besides `page`."""
        scene = PageContext(self._site, request)
        body = self._environment.get_template(template).render(page=scene, **context)
        # A page shows one moment: it is asked for again, but a browser may go back to it.
        return HTMLResponse(body, status_code=status_code, headers={"Cache-Control": "no-cache"})
