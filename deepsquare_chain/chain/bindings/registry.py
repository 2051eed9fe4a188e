"""The ProviderRegistry contract: approved providers, their hardware and their prices."""

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
    """The contract of the providers. Memory is in MB, prices are in credit-wei per second."""

    artifact = "ProviderRegistry"

    def __init__(self, w3: AsyncWeb3[Any], address: str) -> None:
        super().__init__(w3, address)
        self._accounts: dict[int, str] = {}

    async def provider_count(self, *, block_identifier: BlockIdentifier = LATEST) -> int:
        """Return the number of providers ever approved; provider IDs are 1 to this number."""
        return int(await self._one("providerCount", block=block_identifier))

    async def account_of(
        self, provider_id: int, *, block_identifier: BlockIdentifier = LATEST
    ) -> str | None:
        """Return the account of a provider; None for an unknown ID."""
        account = self._accounts.get(provider_id)
        if account is None:
            address = str(await self._one("accountOf", provider_id, block=block_identifier))
            if int(address, 16) == 0:
                return None
            self._accounts[provider_id] = account = address
            if len(self._accounts) > MAX_CACHED:
                self._accounts.clear()
        return account

    async def get_provider(
        self, provider_id: int, *, block_identifier: BlockIdentifier = LATEST
    ) -> Provider | None:
        """Return a provider; None for an unknown ID. IDs are assigned at the first approval."""
        account = await self.account_of(provider_id, block_identifier=block_identifier)
        if account is None:
            return None
        provider = await self.find(account, block_identifier=block_identifier)
        if provider is None or provider.id != provider_id:
            self._accounts.pop(provider_id, None)
            return None
        return provider

    async def find(
        self, account: str, *, block_identifier: BlockIdentifier = LATEST
    ) -> Provider | None:
        """Return the provider of an account; None if it never registered.

        A provider that was never approved has the ID 0.
        """
        account = checked_address(account)
        provider = _provider(await self._one("getProvider", account, block=block_identifier))
        return None if provider.status is ProviderStatus.NONE else provider

    async def provider_of(
        self, account: str, *, block_identifier: BlockIdentifier = LATEST
    ) -> Provider:
        """Return the provider of an account, approved or not.

        Raises:
            NotFoundError: The account never registered.
        """
        provider = await self.find(account, block_identifier=block_identifier)
        if provider is None:
            raise NotFoundError(
                f"{account} is not registered as a provider", hint=HINTS["NotRegistered"]
            )
        return provider

    async def providers(self, *, block_identifier: BlockIdentifier = LATEST) -> list[Provider]:
        """Return all providers that were ever approved, ordered by ID."""
        count = await self.provider_count(block_identifier=block_identifier)
        providers = await asyncio.gather(
            *(
                self.get_provider(each, block_identifier=block_identifier)
                for each in range(1, count + 1)
            )
        )
        return [each for each in providers if each is not None]

    async def id_of(self, account: str, *, block_identifier: BlockIdentifier = LATEST) -> int:
        """Return the ID of a provider's account; 0 until its first approval."""
        return int(await self._one("idOf", checked_address(account), block=block_identifier))

    async def approval_period(self, *, block_identifier: BlockIdentifier = LATEST) -> int:
        """Return the seconds that an approval lasts."""
        return int(await self._one("approvalPeriod", block=block_identifier))

    def register(
        self, hardware: Hardware, prices: Prices, labels: Mapping[str, str] | None = None
    ) -> Call:
        """Register the sender, or propose its new hardware; both need approval."""
        return self._call("register", _hardware(hardware), _prices(prices), _labels(labels or {}))

    def approve(self, account: str, version: int) -> Call:
        """Approve exactly this version of a provider; for a holder of APPROVER_ROLE."""
        label = f"approve version {version} of {account}"
        return self._call("approve", checked_address(account), version, label=label)

    def set_offer(self, offer: Offer) -> Call:
        """Set the resources that the sender offers to the grid, up to its hardware."""
        label = f"offer {offer.cpus} cpus, {offer.memory} MB, {offer.gpus} gpus"
        return self._call("setOffer", (offer.cpus, offer.memory, offer.gpus), label=label)

    def set_prices(self, prices: Prices) -> Call:
        """Change the sender's prices for jobs assigned from now on."""
        return self._call("setPrices", _prices(prices), label="set prices")

    def set_labels(self, labels: Mapping[str, str]) -> Call:
        """Replace the sender's labels."""
        return self._call("setLabels", _labels(labels), label="set labels")

    def set_draining(self, draining: bool) -> Call:
        """Start or end maintenance (draining) of the sender."""
        label = "start maintenance" if draining else "end maintenance"
        return self._call("setDraining", draining, label=label)

    def ban(self, account: str, reason: str = "") -> Call:
        """Ban a provider; for a holder of APPROVER_ROLE. The reason has at most 256 bytes."""
        return self._call("ban", checked_address(account), reason, label=f"ban {account}")

    def unban(self, account: str) -> Call:
        """Lift the ban of a provider; for a holder of APPROVER_ROLE."""
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
    """Return labels by key; they are split at the first `=`, and the last of a key counts."""
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
