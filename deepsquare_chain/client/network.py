"""Opens the deployment and the wallet of the settings."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Final

from deepsquare_chain.chain.bindings.calls import Call, checked_address
from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.chain.rpc.pool import connected
from deepsquare_chain.chain.rpc.transport import Transport
from deepsquare_chain.chain.signers import ExternalSigner, Signer, in_daemon_thread
from deepsquare_chain.chain.transactions.fees import GWEI
from deepsquare_chain.chain.transactions.sender import Sender, TxReceipt
from deepsquare_chain.chain.wallet import AddressBook, read_password, stated_address, unlock
from deepsquare_chain.errors import NotFoundError, UsageError
from deepsquare_chain.job import Provider
from deepsquare_chain.settings import Settings
from deepsquare_chain.store.database import FOLDER, Store, open_wallet_store

#: For interactive use: an endpoint that is down is reported after seconds, not minutes.
_ATTEMPTS: Final = 4


@dataclass(frozen=True, slots=True)
class WalletConnection:
    """An account that can send transactions, on one deployment.

    `store` records all transactions; `timeout` is the timeout for a receipt in seconds.
    """

    contracts: Contracts
    account: Signer
    sender: Sender
    store: Store
    timeout: float

    @property
    def address(self) -> str:
        """Return the address of the account."""
        return self.account.address

    async def send(self, call: Call) -> TxReceipt:
        """Send a call and wait until it is mined; errors as `Sender.send`."""
        return await self.sender.send(call, timeout=self.timeout)


@asynccontextmanager
async def open_grid(settings: Settings) -> AsyncIterator[Contracts]:
    """Open the contracts of the deployment record, after checking that the endpoint serves them.

    Raises:
        NotFoundError: The deployment record does not exist.
        UsageError: The record is invalid, or for another chain than in the settings.
        EndpointError: The endpoint is down, serves another chain, or lacks the contracts.
    """
    deployment = Deployment.load(settings.deployment)
    if settings.chain_id is not None and settings.chain_id != deployment.chain_id:
        raise UsageError(
            f"{settings.deployment} is a record of chain {deployment.chain_id}, the settings want "
            f"chain {settings.chain_id}",
            hint="Give the record of that chain with --deployment.",
        )
    async with connected(
        settings.endpoint,
        chain_id=deployment.chain_id,
        contracts=deployment.addresses,
        landmark=deployment.block,
        attempts=_ATTEMPTS,
        max_lag_blocks=settings.max_lag_blocks,
        transport=transport_of(settings),
    ) as w3:
        yield Contracts(w3, deployment)


def transport_of(settings: Settings) -> Transport:
    """Return certificates and headers of the settings for requests; errors as `Transport.read`."""
    return Transport.read(settings.ca_file, settings.headers_file)


@asynccontextmanager
async def open_wallet(settings: Settings) -> AsyncIterator[WalletConnection]:
    """Open the wallet of the settings, with its database of sent transactions.

    Raises:
        NotFoundError: The keystore or password file does not exist.
        NotAuthorisedError: The password is wrong, or there is no terminal to ask for it.
        GridError: As `open_grid`.
    """
    check_wallet_settings(settings)
    async with open_grid(settings) as contracts:
        account = await open_account(settings)
        deployment = contracts.deployment
        folder = settings.state_dir / FOLDER
        with await open_wallet_store(contracts.w3, deployment, account.address, folder) as store:
            sender = Sender(
                contracts.w3,
                account,
                store,
                chain_id=deployment.chain_id,
                max_fee_per_gas=int(settings.max_fee_gwei * GWEI),
            )
            yield WalletConnection(contracts, account, sender, store, settings.timeout)


def check_wallet_settings(settings: Settings) -> None:
    """Check that a wallet is set and its file exists, before an endpoint or a password is asked for.

    Raises:
        UsageError: Neither a keystore nor a signer is set, or the file is no keystore.
        NotFoundError: The file does not exist.
    """
    if not settings.signer:
        if settings.keystore is None:
            raise no_keystore()
        stated_address(settings.keystore)


async def open_account(settings: Settings) -> Signer:
    """Open the account of the external signer of the settings, or else of the keystore.

    Raises:
        UsageError: Neither is set, or it is invalid.
        NotAuthorisedError: The password is wrong, or there is no terminal to ask for it.
        EndpointError: The signer does not answer.
    """
    if settings.signer:
        return await in_daemon_thread(partial(_external, settings))
    if settings.keystore is None:
        raise no_keystore()
    stated_address(settings.keystore)  # report a wrong file before asking for its password
    # In this thread: Ctrl-C would not end a prompt in another one.
    password = read_password(settings.keystore, settings.password_file)
    account = await asyncio.to_thread(unlock, settings.keystore, password)
    address_book(settings).remember(settings.keystore, account)
    return account


def own_address(settings: Settings, given: str | None) -> str:
    """Return the given address, or else the address of the signer or keystore of the settings.

    The address is derived from the key, never read from the file: a keystore that was not opened on
    this machine before is opened now.

    Raises:
        UsageError: The address is invalid, or no wallet is set.
        NotAuthorisedError: The password is wrong, or there is no terminal to ask for it.
    """
    if given is not None:
        return checked_address(given)
    if settings.signer:
        return checked_address(settings.signer_account or _external(settings).address)
    if settings.keystore is None:
        raise no_keystore()
    return address_book(settings).address_of(settings.keystore, settings.password_file)


async def find_own_address(settings: Settings, given: str | None) -> str:
    """Return `own_address`; the event loop runs while an external signer answers."""
    if settings.signer and given is None:
        return await in_daemon_thread(partial(own_address, settings, given))
    return own_address(settings, given)  # in this thread, as in `open_account`


async def selected_provider(
    contracts: Contracts, settings: Settings, given: str | None
) -> Provider:
    """Return the provider with the given ID or address, or else that of the settings' wallet.

    Raises:
        NotFoundError: There is no such provider.
        UsageError, NotAuthorisedError: As `own_address`.
    """
    if given is None or not (given.isascii() and given.isdigit()):
        account = await find_own_address(settings, given)
        return await contracts.registry.provider_of(account)
    # An ID of more digits than a uint256 has is unknown too.
    provider = await contracts.registry.get_provider(int(given)) if len(given) < 78 else None
    if provider is None:
        count = await contracts.registry.provider_count()
        raise NotFoundError(
            f"Provider {given} does not exist: there are {count}",
            hint="`deepsquare provider status --all` lists them.",
        )
    return provider


def _external(settings: Settings) -> ExternalSigner:
    transport = transport_of(settings)
    return ExternalSigner(settings.signer or "", settings.signer_account or "", transport)


def address_book(settings: Settings) -> AddressBook:
    """Return the cached addresses of keystores that were opened with these settings."""
    return AddressBook(settings.state_dir / FOLDER / "addresses")


def no_keystore() -> UsageError:
    """Return the error of a command that needs a wallet if none is set."""
    return UsageError(
        "No wallet is configured",
        hint="Give one with --keystore or DEEPSQUARE_KEYSTORE, or an external signer with --signer; "
        "`deepsquare wallet new FILE` makes "
        "one, and `deepsquare devnet up` a local grid with wallets for this folder.",
    )
