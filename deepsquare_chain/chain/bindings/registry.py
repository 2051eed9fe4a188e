"""The ProviderRegistry: who may run jobs, with what, and at which price."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from web3 import AsyncWeb3
from web3.types import BlockIdentifier

from deepsquare_chain.chain.bindings.calls import LATEST, Call, ContractBase, checked_address
from deepsquare_chain.chain.bindings.revert_messages import HINTS
from deepsquare_chain.errors import NotFoundError
from deepsquare_chain.job import Hardware, Offer, Prices, Provider, ProviderStatus

MAX_CACHED = 10_000


class RegistryContract(ContractBase):
    """Providers by their small id. Memory is in MB, prices are credit-wei a second."""

    artifact = "ProviderRegistry"

    def __init__(self, w3: AsyncWeb3[Any], address: str) -> None:
        super().__init__(w3, address)
        self._accounts: dict[int, str] = {}

    async def provider_count(self, *, block_identifier: BlockIdentifier = LATEST) -> int:
        """Number of providers ever approved; ids run from one to this."""
        return int(await self._one("providerCount", block=block_identifier))

    async def account_of(
        self, provider_id: int, *, block_identifier: BlockIdentifier = LATEST
    ) -> str | None:
        """Account of a provider, None for an unknown id."""
        known = self._accounts.get(provider_id)
        if known is None:
            found = str(await self._one("accountOf", provider_id, block=block_identifier))
            if int(found, 16) == 0:
                return None
            self._accounts[provider_id] = known = found
            if len(self._accounts) > MAX_CACHED:
                self._accounts.clear()
        return known

    async def get_provider(
        self, provider_id: int, *, block_identifier: BlockIdentifier = LATEST
    ) -> Provider | None:
        """One provider, None for an unknown id; ids are given at the first approval."""
        account = await self.account_of(provider_id, block_identifier=block_identifier)
        if account is None:
            return None
        found = await self.find(account, block_identifier=block_identifier)
        if found is None or found.id != provider_id:
            self._accounts.pop(provider_id, None)
            return None
        return found

    async def find(
        self, account: str, *, block_identifier: BlockIdentifier = LATEST
    ) -> Provider | None:
        """The provider of an account, approved or not (`id` zero); None if it never registered."""
        account = checked_address(account)
        found = _provider(await self._one("getProvider", account, block=block_identifier))
        return None if found.status is ProviderStatus.NONE else found

    async def provider_of(
        self, account: str, *, block_identifier: BlockIdentifier = LATEST
    ) -> Provider:
        """The provider of an account, approved or not.

        Raises:
            NotFoundError: It never registered.
        """
        found = await self.find(account, block_identifier=block_identifier)
        if found is None:
            raise NotFoundError(
                f"{account} is not registered as a provider", hint=HINTS["NotRegistered"]
            )
        return found

    async def providers(self, *, block_identifier: BlockIdentifier = LATEST) -> list[Provider]:
        """All providers that were ever approved, by id."""
        count = await self.provider_count(block_identifier=block_identifier)
        found = await asyncio.gather(
            *(
                self.get_provider(each, block_identifier=block_identifier)
                for each in range(1, count + 1)
            )
        )
        return [each for each in found if each is not None]

    async def id_of(self, account: str, *, block_identifier: BlockIdentifier = LATEST) -> int:
        """Id of a provider's account, zero until its first approval."""
        return int(await self._one("idOf", checked_address(account), block=block_identifier))

    async def approval_period(self, *, block_identifier: BlockIdentifier = LATEST) -> int:
        """Seconds that an approval lasts."""
        return int(await self._one("approvalPeriod", block=block_identifier))

    def register(
        self, hardware: Hardware, prices: Prices, labels: Mapping[str, str] | None = None
    ) -> Call:
        """Register the sender, or propose its new hardware; waits for the approver."""
        return self._call("register", _hardware(hardware), _prices(prices), _labels(labels or {}))

    def approve(self, account: str, version: int) -> Call:
        """Put exactly this version of a provider in force; for a holder of APPROVER_ROLE."""
        label = f"approve version {version} of {account}"
        return self._call("approve", checked_address(account), version, label=label)

    def set_offer(self, offer: Offer) -> Call:
        """Give all of the sender's hardware to the grid, or less."""
        label = f"offer {offer.cpus} cpus, {offer.memory} MB, {offer.gpus} gpus"
        return self._call("setOffer", (offer.cpus, offer.memory, offer.gpus), label=label)

    def set_prices(self, prices: Prices) -> Call:
        """Change the sender's prices for jobs assigned from now on."""
        return self._call("setPrices", _prices(prices), label="set prices")

    def set_labels(self, labels: Mapping[str, str]) -> Call:
        """Replace the sender's labels."""
        return self._call("setLabels", _labels(labels), label="set labels")

    def set_draining(self, draining: bool) -> Call:
        """Start or end the sender's maintenance."""
        label = "start maintenance" if draining else "end maintenance"
        return self._call("setDraining", draining, label=label)

    def ban(self, account: str, reason: str = "") -> Call:
        """Shut a provider out; for a holder of APPROVER_ROLE. The reason has at most 256 bytes."""
        return self._call("ban", checked_address(account), reason, label=f"ban {account}")

    def unban(self, account: str) -> Call:
        """Let a provider in again; for a holder of APPROVER_ROLE."""
        return self._call("unban", checked_address(account), label=f"unban {account}")


def _hardware(hardware: Hardware) -> tuple[int, ...]:
    return (
        hardware.nodes,
        hardware.cpus_per_node,
        hardware.mem_per_node,
        hardware.gpus_per_node,
    )


def _prices(prices: Prices) -> tuple[int, ...]:
    return (prices.cpu, prices.gpu, prices.mem)


def _labels(labels: Mapping[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in sorted(labels.items())]


def parse_labels(labels: tuple[str, ...]) -> dict[str, str]:
    """Labels by key; the first `=` divides, of two labels with one key the last counts."""
    return {key: value for key, _, value in (label.partition("=") for label in labels)}


def _provider(record: tuple[Any, ...]) -> Provider:
    number, account, status, until, version, pending, hardware, _, offer, prices, labels = record
    return Provider(
        id=number,
        account=account,
        status=ProviderStatus(status),
        approved_until=until,
        version=version,
        pending_version=pending,
        hardware=Hardware(*hardware),
        offer=Offer(*offer),
        prices=Prices(*prices),
        labels=parse_labels(labels),
    )
