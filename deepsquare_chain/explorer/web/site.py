"""What every page works with: the index, the node, the templates, and how a page is answered."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from importlib import resources
from typing import Any, Final, TypeVar
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from deepsquare_chain.chain.contracts import Contracts
from deepsquare_chain.explorer.index.queries import Index
from deepsquare_chain.explorer.index.rows import ProviderRow, Status
from deepsquare_chain.explorer.web import texts
from deepsquare_chain.job import JobStatus, ProviderStatus
from deepsquare_chain.store.definitions import DefinitionStore

T = TypeVar("T")

NAVIGATION: Final = (
    ("/", "Grid"),
    ("/jobs", "Jobs"),
    ("/providers", "Providers"),
    ("/transactions", "Transactions"),
    ("/blocks", "Blocks"),
    ("/audit", "Audit"),
    ("/contracts", "Contracts"),
)
_STANDINGS: Final = {
    ProviderStatus.ACTIVE: "good",
    ProviderStatus.DRAINING: "warn",
    ProviderStatus.BANNED: "bad",
}


@dataclass(frozen=True, slots=True)
class Link:
    """Another explorer: its name, and URLs by kind (tx, address, block) with `{}` for the key."""

    name: str
    urls: Mapping[str, str]


@dataclass
class Site:
    """One explorer.

    Args:
        index: Asked in threads, since it reads a database.
        contracts: The node, for what the index does not know.
        store: Where submitted definitions are kept for providers; None takes no jobs.
        links: Other explorers.
    """

    index: Index
    contracts: Contracts
    store: DefinitionStore | None = None
    links: tuple[Link, ...] = ()
    stop: asyncio.Event = field(default_factory=asyncio.Event)

    async def ask(self, question: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """A question of the index, in a thread."""
        return await asyncio.to_thread(question, *args, **kwargs)

    async def page(
        self, request: Request, name: str, *, status_code: int = 200, **values: Any
    ) -> Response:
        """Render a template."""
        state = await self.ask(self.index.status)
        values = {"cursor": None, "query": "", **values}
        html = self._templates.get_template(name).render(
            state=state,
            here=_section(request.url.path),
            names=self.names(state),
            **values,
        )
        return HTMLResponse(html, status_code=status_code)

    def names(self, state: Status) -> Mapping[str, str]:
        """Accounts that have a name in this grid."""
        return _Names(
            {
                state.scheduler: "MetaScheduler",
                state.registry: "ProviderRegistry",
                state.credit: "Credit",
                state.treasury: "treasury",
                "0x" + "00" * 20: "nobody",
            }
        )

    def outside(self, kind: str, key: object) -> list[tuple[str, str]]:
        """Links to other explorers for something."""
        return [
            (link.name, link.urls[kind].replace("{}", quote(str(key), safe="")))
            for link in self.links
            if kind in link.urls
        ]

    @cached_property
    def _templates(self) -> Environment:
        environment = Environment(
            loader=PackageLoader("deepsquare_chain.explorer.web"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
        )
        for name in ("credits", "rate", "duration", "moment", "short", "status", "stranger"):
            environment.filters[name] = getattr(texts, name)
        for name in ("percent", "memory", "value", "grouped"):
            environment.filters[name] = getattr(texts, name)
        environment.globals |= {
            "J": JobStatus,
            "navigation": NAVIGATION,
            "static": static_url,
            "links": self.outside,
            "standing": _standing,
        }
        return environment


class _Names(dict[str, str]):
    def __missing__(self, key: str) -> str:
        return ""


def static_files() -> Mapping[str, tuple[bytes, str]]:
    """The files of our own that pages need, with the hash that names their content."""
    return _STATIC


def static_url(name: str) -> str:
    """Where a file of ours is; another content is another address, so that it may be kept."""
    return f"/static/{_STATIC[name][1]}/{name}"


def _load() -> dict[str, tuple[bytes, str]]:
    folder = resources.files("deepsquare_chain.explorer.web") / "static"
    contents = {each.name: each.read_bytes() for each in folder.iterdir() if each.is_file()}
    # One hash for all: scripts import each other by their names.
    whole = sha256(b"".join(contents[name] for name in sorted(contents))).hexdigest()[:12]
    return {name: (data, whole) for name, data in contents.items()}


_STATIC: Final = _load()


def _standing(row: ProviderRow) -> Any:
    status, tone = row.status.name.replace("_", " "), _STANDINGS.get(row.status, "")
    if row.status is ProviderStatus.ACTIVE and not row.active:
        status, tone = "NOT AVAILABLE", "warn"
    return texts.Markup('<span class="tag {}">{}</span>').format(tone, status)


def _section(path: str) -> str:
    """The entry of the navigation that a path belongs to."""
    first = "/" + path.strip("/").partition("/")[0]
    return first if first in dict(NAVIGATION) else ""
