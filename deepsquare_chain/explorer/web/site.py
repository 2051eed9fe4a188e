"""What the pages stand on: the index, the node, the store, and how they are told to look."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from eth_utils.address import is_address, to_checksum_address

from deepsquare_chain.chain.contracts import Contracts
from deepsquare_chain.explorer.index.queries import Index
from deepsquare_chain.explorer.index.rows import ProviderRow
from deepsquare_chain.store.definitions import DefinitionStore


@dataclass(frozen=True, slots=True)
class Name:
    """What an account is called: `kind` is provider, contract, role or empty."""

    text: str
    href: str
    kind: str


@dataclass
class Site:
    """One explorer.

    Attributes:
        index: What the pages show.
        contracts: The deployment on a node, for live reads and what the index does not hold.
        store: Where definitions of jobs submitted here are kept; None where nobody can submit.
        links: Templates of other explorers' addresses by what they show (tx, address, block), with
            `{hash}`, `{address}` or `{number}` in them.
        faucet: Whether the deployment gives credits away.
        clock: Seconds since the epoch.
    """

    index: Index
    contracts: Contracts
    store: DefinitionStore | None = None
    links: Mapping[str, str] = field(default_factory=dict)
    clock: Callable[[], float] = time.time
    _named: tuple[int, dict[str, Name]] = (-1, {})

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

    def names(self, change: int) -> Mapping[str, Name]:
        """Names of accounts as of a change of the index."""
        if self._named[0] != change:
            self._named = (change, self._read_names())
        return self._named[1]

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
            ("Credit", deployment.credit),
            ("ProviderRegistry", deployment.registry),
            ("MetaScheduler", deployment.scheduler),
        ):
            key = str(to_checksum_address(account))
            kind = "role" if name == "treasury" else "contract"
            found.setdefault(key, Name(name, f"/accounts/{key}", kind))
        return found

    def external(self, kind: str, value: Any) -> str:
        """Address of a thing at another explorer, empty where none is set."""
        template = self.links.get(kind, "")
        return template.replace("{" + LINK_FIELDS[kind] + "}", str(value)) if template else ""


#: What stands in braces in a link template of each kind.
LINK_FIELDS: Mapping[str, str] = {"tx": "hash", "address": "address", "block": "number"}


def provider_name(row: ProviderRow, given: Mapping[str, str]) -> str:
    """`provider 1`, with the name that the deployment gives it."""
    number = f"provider {row.id}" if row.id is not None else "applicant"
    name = given.get(row.account, "")
    return f"{number} \u00b7 {name}" if name else number
