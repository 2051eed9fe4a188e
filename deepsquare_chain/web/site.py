"""What the pages stand on: the index, the node, the store, and how they are told to look."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final, TypeVar
from urllib.parse import quote

from eth_utils.address import is_address, to_checksum_address
from starlette.concurrency import run_in_threadpool

from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.client.offers import PricedOffer, offers
from deepsquare_chain.errors import UsageError
from deepsquare_chain.indexer.queries import Index
from deepsquare_chain.indexer.read_models import ProviderRow, Status
from deepsquare_chain.job import Terms
from deepsquare_chain.store.definitions import DefinitionStore

T = TypeVar("T")
#: Jobs of which the offers are kept.
_MAX_OFFERS: Final = 64
_KINDS: Final = frozenset({"tx", "address", "block"})


@dataclass(frozen=True, slots=True)
class Name:
    """What an account is called: `kind` is provider, contract, role or empty."""

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
        """Links of a setting such as `Otterscan.tx=https://otterscan.example/tx/{}`, by spaces.

        Raises:
            UsageError: A name has no known kind, or a URL no `{}` or no http.
        """
        found: dict[str, dict[str, str]] = {}
        for part in text.split():
            key, _, url = part.partition("=")
            name, _, kind = key.rpartition(".")
            usable = name and kind in _KINDS and "{}" in url
            if not usable or not url.startswith(("http://", "https://")):
                raise UsageError(
                    f"Setting explorer_links: {key[:60]!r} can't be used",
                    hint="Write NAME.tx=https://.../{} with spaces between; kinds are tx, address, "
                    "block.",
                )
            found.setdefault(name, {})[kind] = url
        return tuple(cls(name, urls) for name, urls in found.items())


@dataclass
class Site:
    """One explorer.

    Attributes:
        index: What the pages show.
        contracts: The deployment on a node, for live reads and what the index does not hold.
        store: Where definitions of jobs submitted here are kept; None where nobody can submit.
        links: Other explorers to point to.
        gateway: URL of the gateway where browsers put definitions and read output; empty for none.
        relay: URL of the relay that pays the gas of customers; empty for none.
        submissions: Whether jobs can be submitted here.
        clock: Seconds since the epoch.
    """

    index: Index
    contracts: Contracts
    store: DefinitionStore | None = None
    links: Sequence[Link] = ()
    gateway: str = ""
    relay: str = ""
    submissions: bool = True
    clock: Callable[[], float] = time.time
    _kept: dict[str, tuple[object, Any]] = field(default_factory=dict, repr=False)
    _offers: dict[object, list[PricedOffer]] = field(default_factory=dict, repr=False)

    @property
    def storing(self) -> bool:
        """Whether jobs can be submitted here: their definitions have somewhere to go."""
        return self.submissions and (self.store is not None or bool(self.gateway))

    @property
    def faucet(self) -> str:
        """Address of the devnet's faucet, empty elsewhere."""
        found = self.contracts.deployment.extra.get("faucet", "")
        return found if isinstance(found, str) else ""

    @cached_property
    def given_names(self) -> Mapping[str, str]:
        """Names that the deployment record gives to accounts, by address."""
        found = self.contracts.deployment.extra.get("names", {})
        if not isinstance(found, Mapping):
            return {}
        return {
            str(to_checksum_address(account)): str(name)[:40]
            for account, name in found.items()
            if is_address(account)
        }

    def account_of(self, text: str) -> str:
        """The address of an account that the deployment names, else the text as it is."""
        named = (account for account, name in self.given_names.items() if name == text.lower())
        return next(named, text)

    def now(self, status: Status) -> int:
        """Now, in seconds; a chain whose clock is ahead of ours is right."""
        return max(int(self.clock()), status.head_time)

    def once(self, name: str, moment: object, make: Callable[[], T]) -> T:
        """What `make` gives, made once for all readers as long as the moment is the same.

        Args:
            name: Of the thing, one of a few.
            moment: What it changes with.
            make: Makes it.
        """
        found = self._kept.get(name)
        if found is None or found[0] != moment:
            self._kept[name] = found = (moment, make())
        kept: T = found[1]
        return kept

    async def offers(self, terms: Terms) -> list[PricedOffer]:
        """What each provider would take for a job, asked of the node once for each change.

        Raises:
            EndpointError: The node does not answer.
        """
        change = (await run_in_threadpool(self.index.status)).change
        key = (change, terms.resources, terms.time_limit, terms.amount, terms.uses)
        if key not in self._offers:
            if len(self._offers) >= _MAX_OFFERS:
                self._offers.clear()
            self._offers[key] = await offers(self.contracts, terms)
        return self._offers[key]

    def names(self, change: int) -> Mapping[str, Name]:
        """Names of accounts as of a change of the index."""
        return self.once("names", change, self._read_names)

    def _read_names(self) -> dict[str, Name]:
        deployment = self.contracts.deployment
        given = self.given_names
        found = {
            account: Name(name, f"/accounts/{account}", "role") for account, name in given.items()
        }
        for row in self.index.providers():
            found[row.account] = Name(
                provider_name(row, given), f"/providers/{row.account}", "provider"
            )
        for name, account in (
            ("treasury", deployment.treasury),
            *deployment.contracts.items(),
        ):
            key = str(to_checksum_address(account))
            kind = "role" if name == "treasury" else "contract"
            found.setdefault(key, Name(name, f"/accounts/{key}", kind))
        return found

    def external(self, kind: str, key: object) -> list[tuple[str, str]]:
        """Names and addresses of a thing at other explorers."""
        text = quote(str(key), safe="")
        return [
            (link.name, link.urls[kind].replace("{}", text))
            for link in self.links
            if kind in link.urls
        ]


def provider_name(row: ProviderRow, given: Mapping[str, str]) -> str:
    """`provider 1`, with the name that the deployment gives it."""
    number = f"provider {row.id}" if row.id is not None else "applicant"
    name = given.get(row.account, "")
    return f"{number} \u00b7 {name}" if name else number
