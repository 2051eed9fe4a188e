"""Data sources and settings of the explorer, forecasts of starts, and the rendering of pages."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import quote, urlencode

from eth_utils.address import is_address, to_checksum_address
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from deepsquare_chain.chain.bindings.abi import signature_of
from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.client.offers import PricedOffer, offers
from deepsquare_chain.client.periods import parse_period
from deepsquare_chain.errors import GridError, NotFoundError, UsageError
from deepsquare_chain.indexer.queries import Index, TimeRange
from deepsquare_chain.indexer.read_models import Status
from deepsquare_chain.indexer.schema import MAX_INT
from deepsquare_chain.job import DAY, HOUR, JobStatus, Terms
from deepsquare_chain.metascheduler.dry_run import DryRunScheduler
from deepsquare_chain.metascheduler.forecast import Prospect, StartAccuracy, prospect_of
from deepsquare_chain.metascheduler.history import RunHistory
from deepsquare_chain.metascheduler.policy import Rules, Snapshot
from deepsquare_chain.observability import get_logger
from deepsquare_chain.store.definitions import DefinitionStore
from deepsquare_chain.web import formats
from deepsquare_chain.web.lookup import fields, link_addresses

_log = get_logger(__name__)
#: Seconds after which the grid is read again, and for which a page waits for that.
_KEPT_SECONDS: Final = 5.0
_WAIT_SECONDS: Final = 2.0


@dataclass(frozen=True, slots=True)
class _GridState:
    """What a forecast needs. `history` is a copy: the scheduler goes on with its own."""

    snapshot: Snapshot
    rules: Rules
    history: RunHistory
    version: tuple[int, int]
    starts: StartAccuracy | None


class Forecasts:
    """Forecasts by the rules of a meta-scheduler without a rules file.

    The first one reads all events of the deployment in the background. Pages do not wait for it
    for more than two seconds.
    """

    def __init__(self, contracts: Contracts) -> None:
        self._contracts = contracts
        self._dry_run: DryRunScheduler | None = None
        self._reading: asyncio.Task[None] | None = None
        self._read_at = float("-inf")
        self._state: _GridState | None = None

    async def of(self, job_id: int) -> Prospect | None:
        """Return the prospect of a job; None if it is not in the queue, or not known yet."""
        is_reading = self._reading is not None and not self._reading.done()
        if not is_reading and time.monotonic() - self._read_at > _KEPT_SECONDS:
            self._reading = asyncio.create_task(self._read())
        if self._reading is not None:
            await asyncio.wait([self._reading], timeout=_WAIT_SECONDS)
        state = self._state
        if state is None or all(entry.job.id != job_id for entry in state.snapshot.waiting):
            return None
        return await run_in_threadpool(
            prospect_of, state.snapshot, state.rules, state.history, job_id, starts=state.starts
        )

    async def _read(self) -> None:
        try:
            self._dry_run = self._dry_run or DryRunScheduler(self._contracts)
            service = await self._dry_run.read()
            await self._dry_run.judge_starts()
        except GridError as error:
            # The events read so far may be of blocks that were replaced: the next read starts anew.
            _log.debug("forecast failed", error=str(error))
            self._dry_run = self._state = None
            return
        finally:
            self._read_at = time.monotonic()
        if service.cluster is None:
            return
        history, starts = service.state.history(), self._dry_run.start_accuracy
        version = (history.version, history.payments)
        if self._state is not None and self._state.version == version:
            copy = self._state.history
        else:
            copy = RunHistory.of_rows(history.rows())
        self._state = _GridState(service.cluster.snapshot, service.rules, copy, version, starts)


T = TypeVar("T")
#: Jobs whose offers are cached.
_MAX_OFFERS: Final = 64
#: Seconds for which offers are cached at most.
_OFFER_SECONDS: Final = 30
_LINK: Final = re.compile(r"(?P<name>[^=]+)\.(?P<kind>tx|address|block)=(?P<url>https?://.*\{\}.*)")


@dataclass(frozen=True, slots=True)
class Name:
    """The display name of an account; `kind` is provider, contract, role or empty."""

    text: str
    href: str
    kind: str


@dataclass(frozen=True, slots=True)
class Link:
    """Another explorer: its name, and URLs by kind (tx, address, block) with `{}` for the key."""

    name: str
    urls: Mapping[str, str]

    @classmethod
    def parse(cls, text: str) -> tuple[Link, ...]:
        """Parse a setting such as `Otterscan.tx=https://otterscan.example/tx/{} NAME.block=...`.

        Raises UsageError if a kind is unknown, or a URL has no `{}` or is not http(s).
        """
        urls_by_name: dict[str, dict[str, str]] = {}
        for part in text.split():
            match = _LINK.fullmatch(part)
            if match is None:
                raise UsageError(
                    f"Setting explorer_links: {part.partition('=')[0][:60]!r} can't be used",
                    hint="Write NAME.tx=https://.../{} with spaces between; kinds are tx, address, "
                    "block.",
                )
            urls_by_name.setdefault(match["name"], {})[match["kind"]] = match["url"]
        return tuple(cls(name, urls) for name, urls in urls_by_name.items())


@dataclass
class Site:
    """One explorer.

    Attributes:
        index: The index that the pages show.
        contracts: The deployment on a node, for live reads and for data that is not indexed.
        store: Store of the definitions of jobs that are submitted here, or None.
        links: Other explorers to link to.
        gateway: URL of the gateway where browsers upload definitions and read output, or empty.
        relay: URL of the relay that pays the gas of customers, or empty.
        submissions: Whether jobs can be submitted here.
        clock: Returns the time in seconds since the epoch.
    """

    index: Index
    contracts: Contracts
    store: DefinitionStore | None = None
    links: Sequence[Link] = ()
    gateway: str = ""
    relay: str = ""
    submissions: bool = True
    clock: Callable[[], float] = time.time
    _cache: dict[str, tuple[object, Any]] = field(default_factory=dict, repr=False)

    @cached_property
    def forecasts(self) -> Forecasts:
        """Forecasts of PENDING jobs."""
        return Forecasts(self.contracts)

    @property
    def accepts_jobs(self) -> bool:
        """Whether jobs can be submitted here: allowed, and there is a store or a gateway."""
        return self.submissions and (self.store is not None or bool(self.gateway))

    @property
    def faucet(self) -> str:
        """Address of the faucet on a devnet, else empty."""
        address = self.contracts.deployment.extra.get("faucet", "")
        return address if isinstance(address, str) else ""

    @cached_property
    def recorded_names(self) -> Mapping[str, str]:
        """Account names of the deployment record, by address."""
        names = self.contracts.deployment.extra.get("names", {})
        if not isinstance(names, Mapping):
            return {}
        return {
            str(to_checksum_address(account)): str(name)[:40]
            for account, name in names.items()
            if is_address(account)
        }

    def account_of(self, text: str) -> str:
        """Return the address of an account by its name in the deployment record, else `text`."""
        names = self.recorded_names.items()
        return next((account for account, name in names if name == text.lower()), text)

    def cached(self, name: str, version: object, make: Callable[[], T]) -> T:
        """Return a value that is cached under one of a few names until `version` changes.

        `version` is that of the data from which `make` computes the value.
        """
        entry = self._cache.get(name)
        if entry is None or entry[0] != version:
            self._cache[name] = entry = (version, make())
        value: T = entry[1]
        return value

    async def offers(self, terms: Terms) -> list[PricedOffer]:
        """Return each provider's offer for a job, read from the node.

        An offer is cached until the index changes, for at most 30 seconds: its start is relative.
        Raises EndpointError if the node does not answer.
        """
        change = (await run_in_threadpool(self.index.status)).change
        version = (change, int(time.monotonic()) // _OFFER_SECONDS)
        cache: dict[object, list[PricedOffer]] = self.cached("offers", version, dict)
        key = (terms.resources, terms.time_limit, terms.amount, terms.uses)
        if key not in cache:
            if len(cache) >= _MAX_OFFERS:
                cache.clear()
            cache[key] = await offers(self.contracts, terms)
        return cache[key]

    def names(self, change: int) -> Mapping[str, Name]:
        """Return the names of accounts as of a change of the index."""
        return self.cached("names", change, self._read_names)

    def _read_names(self) -> dict[str, Name]:
        deployment = self.contracts.deployment
        roles = {deployment.treasury: "treasury", **self.recorded_names}
        named = [
            *((account, name, "contract") for account, name in deployment.contract_names.items()),
            *((account, name, "role") for account, name in roles.items()),
        ]
        names = {account: Name(name, f"/accounts/{account}", kind) for account, name, kind in named}
        for row in self.index.providers():
            number = "applicant" if row.id is None else f"provider {row.id}"
            text = " \u00b7 ".join(filter(None, (number, self.recorded_names.get(row.account))))
            names[row.account] = Name(text, f"/providers/{row.account}", "provider")
        return names

    def external(self, kind: str, key: object) -> list[tuple[str, str]]:
        """Return (name, URL) pairs of an object at other explorers."""
        text = quote(str(key), safe="")
        return [
            (link.name, link.urls[kind].replace("{}", text))
            for link in self.links
            if kind in link.urls
        ]


# -- templates rendered to responses, with the context of every page; all values are escaped

FOLDER: Final = Path(__file__).parent
#: Links of the navigation: paths without slash.
SECTIONS: Final = ("jobs", "providers", "transactions", "blocks", "audit", "contracts")
#: Time ranges of charts by link text, in seconds; zero is unlimited.
RANGES: Final = {"hour": HOUR, "day": DAY, "week": 7 * DAY, "all": 0}


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
        count=formats.count,
        page_numbers=formats.page_numbers,
        fields=fields,
        link_addresses=link_addresses,
        signature_of=signature_of,
        JobStatus=JobStatus,
        sections=SECTIONS,
        ranges=tuple(RANGES),
    )
    return templates


TEMPLATES: Final = environment()


def site_of(request: Request) -> Site:
    """Return the site of the application."""
    site: Site = request.app.state.site
    return site


class PageRequest:
    """A request for a page: its site, its parameters, and its rendering; `page` in templates.

    Its methods block. Handlers of pages that only query the index are plain functions, which
    Starlette calls in a thread; a handler that also awaits the node uses `run_in_threadpool`.
    """

    def __init__(self, request: Request) -> None:
        self.site = site_of(request)
        self.index = self.site.index
        self.path = request.url.path
        self.query: Mapping[str, str] = request.query_params
        self._path_params = request.path_params

    # -- parameters

    def argument(self, name: str) -> str:
        """Return a part of the path."""
        return str(self._path_params[name])

    def argument_number(self, name: str, noun: str) -> int:
        """Return a number in the path; raises NotFoundError if no object has such a number."""
        text = self.argument(name)
        if not text.isascii() or not text.isdigit() or int(text[:20]) > MAX_INT:
            raise NotFoundError(f"{text[:80]!r} is not a {noun}", hint="Use the search to find it.")
        return int(text[:20])

    def text(self, name: str) -> str:
        """Return a query parameter, cut to 64 characters; empty if absent."""
        return self.query.get(name, "").strip()[:64]

    def choice(self, name: str, choices: Collection[str], noun: str, default: str) -> str:
        """Return a query parameter that is one of some lower-case words, or the default if absent.

        Raises UsageError if it is not one of them; the message calls it by `noun`.
        """
        choice = self.query.get(name, default).lower()
        if choice != default and choice not in choices:
            raise UsageError(
                f"{choice[:40]!r} is not a {noun}", hint=f"There are {', '.join(choices)}."
            )
        return choice

    @property
    def number(self) -> int:
        """The page number of a list; 1 is the first. Raises UsageError if it is not a number."""
        text = self.query.get("page", "1")
        if not text.isascii() or not text.isdigit() or len(text) > 9:
            raise UsageError(f"{text[:40]!r} is not the number of a page", hint="Use page=1.")
        return int(text)

    @property
    def order(self) -> str:
        """The sort column of the list, prefixed with `-` for descending order."""
        return self.text("sort")

    @property
    def days(self) -> dict[str, str]:
        """The texts of the first and last day of the period, `from` and `to`."""
        return {name: self.text(name) for name in ("from", "to")}

    @property
    def period(self) -> TimeRange | None:
        """The period from day `from` to day `to` inclusive, in UTC; None if neither is given.

        Raises UsageError if one is not a date, or `to` is before `from`.
        """
        since, until = self.days.values()
        if not since and not until:
            return None
        for text in (since, until):
            if text.isdigit():
                raise UsageError(f"{text!r} is not a date", hint="Write 2026-11-27.")
        period = parse_period(None, since or None, until or None)
        return TimeRange(period.start, period.end)

    @property
    def time_range(self) -> str:
        """The chosen time range of charts. Raises UsageError if there is no such range."""
        return self.choice("range", RANGES, "range", "all")

    @property
    def range_start(self) -> int | None:
        """First second of the time range, before the last indexed block; None for no bound."""
        seconds = RANGES[self.time_range]
        return max(0, self.status.time - seconds) if seconds else None

    # -- context of templates

    @cached_property
    def status(self) -> Status:
        """The status of the index."""
        return self.index.status()

    @cached_property
    def now(self) -> int:
        """The current time in seconds: the later of the local clock and the chain's."""
        return max(int(self.site.clock()), self.status.head_time)

    def link(self, **changes: object) -> str:
        """Return the URL of this page with changed query parameters; None removes one.

        The page number is removed: a new filter or order starts at the first page.
        """
        query = {key: text for key, text in self.query.items() if key != "page"} | changes
        parameters = {key: value for key, value in query.items() if value is not None}
        return f"{quote(self.path)}{'?' if parameters else ''}{urlencode(parameters)}"

    @cached_property
    def _names(self) -> Mapping[str, Name]:
        return self.site.names(self.status.change)

    def name_of(self, account: str) -> Name:
        """Return the display name and the page of an account."""
        return self._names.get(account) or Name("", f"/accounts/{account}", "")

    def ago(self, seconds: int) -> str:
        """Format how long ago a time was."""
        return formats.ago(seconds, self.now)

    def render(self, template: str, *, status_code: int = 200, **context: Any) -> Response:
        """Render a template; `context` holds its variables besides `page`."""
        body = TEMPLATES.get_template(template).render(page=self, **context)
        # Browsers revalidate the page, but may keep it for the back button.
        headers = {"Cache-Control": "no-cache"}
        return HTMLResponse(body, status_code=status_code, headers=headers)
