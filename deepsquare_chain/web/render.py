"""Renders templates to responses, with the context of every page; all values are escaped."""

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
    """Return the templates of this package; values are escaped, unknown names are errors."""
    templates = Environment(
        loader=FileSystemLoader(FOLDER / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters.update(formats.FILTERS)
    templates.globals.update(
        ago=formats.ago,
        count=formats.count,
        page_numbers=formats.page_numbers,
        JobStatus=JobStatus,
    )
    return templates


class PageContext:
    """The context of every page besides its own data; `page` in templates."""

    def __init__(self, site: Site, request: Request) -> None:
        self._site = site
        self.path = request.url.path
        self._query = request.query_params

    @cached_property
    def status(self) -> Status:
        """The status of the index."""
        return self._site.index.status()

    @cached_property
    def now(self) -> int:
        """See `Site.now`."""
        return self._site.now(self.status)

    @cached_property
    def sections(self) -> list[tuple[str, str, bool]]:
        """Menu entries: path, text, and whether the page is below it."""
        return [(href, text, self.path.startswith(href)) for href, text in SECTIONS]

    def link(self, **changes: object) -> str:
        """Return the URL of this page with changed query parameters; None removes one.

        The page number is removed: a new filter or order starts at the first page.
        """
        query = {key: text for key, text in self._query.items() if key != "page"}
        query |= {key: str(value) for key, value in changes.items() if value is not None}
        parameters = [
            parameter for parameter in query.items() if changes.get(parameter[0], "") is not None
        ]
        return f"{quote(self.path)}{'?' if parameters else ''}{urlencode(parameters)}"

    @property
    def order(self) -> str:
        """The sort column of the list, prefixed with `-` for descending order."""
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
        """Return the display name and the page of an account."""
        return self._names.get(account) or Name("", f"/accounts/{account}", "")

    def external(self, kind: str, key: object) -> list[tuple[str, str]]:
        """See `Site.external`."""
        return self._site.external(kind, key)

    def ago(self, seconds: int) -> str:
        """Format how long ago a time was."""
        return formats.ago(seconds, self.now)


class Renderer:
    """Renders templates for one site."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._environment = environment()

    def __call__(
        self, request: Request, template: str, *, status_code: int = 200, **context: Any
    ) -> HTMLResponse:
        """Render a page; `context` holds the template's variables besides `page`."""
        page = PageContext(self._site, request)
        body = self._environment.get_template(template).render(page=page, **context)
        # Browsers revalidate the page, but may keep it for the back button.
        return HTMLResponse(body, status_code=status_code, headers={"Cache-Control": "no-cache"})
