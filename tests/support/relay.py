"""A relay for a test's grid, and wallets with credits but without coins."""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
from eth_account import Account
from eth_account.signers.local import LocalAccount

from deepsquare_chain.chain.bindings.calls import Call
from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.chain.bindings.forwarder import ForwardRequest, SignedRequest
from deepsquare_chain.chain.rpc.pool import chain_time
from deepsquare_chain.client.gasless import Confirm, GaslessWallet, RelayClient, gasless_wallet
from deepsquare_chain.client.network import WalletConnection
from deepsquare_chain.client.transactions import Preview
from deepsquare_chain.credits import CREDIT
from deepsquare_chain.relay.requests import RelayRules
from deepsquare_chain.relay.service import RelaySettings, run_relay
from deepsquare_chain.store.database import Store
from tests.support.livegrid import LiveGrid


@dataclass
class PreviewRecorder:
    """Confirms all requests, and records their previews."""

    previews: list[Preview] = field(default_factory=list)

    def __call__(self, preview: Preview) -> bool:
        # A prompt in another thread would not end at Ctrl-C.
        assert threading.current_thread() is threading.main_thread()
        self.previews.append(preview)
        return True


async def account_without_coin(grid: LiveGrid, amount: int = 100 * CREDIT) -> LocalAccount:
    """Create an account with credits that has never had coins."""
    account: LocalAccount = Account.from_key(secrets.token_bytes(32))
    await grid.send(grid.admin, grid.contracts.credit.mint(account.address, amount))
    return account


@asynccontextmanager
async def relayed(
    grid: LiveGrid,
    url: str,
    account: LocalAccount,
    *,
    confirm: Confirm | None = None,
    store: Store | None = None,
    timeout: float = 60.0,
    transport: httpx2.AsyncBaseTransport | None = None,
    contracts: Contracts | None = None,
) -> AsyncIterator[GaslessWallet]:
    """Provide a wallet that sends through the relay at a URL.

    `contracts` are the grid's contracts accessed through another endpoint.
    """
    store = store or grid.store(account)
    wallet = WalletConnection(
        contracts or grid.contracts, account, grid.sender(account, store=store), store, timeout
    )
    async with RelayClient(url, transport=transport) as client:
        yield gasless_wallet(wallet, client, confirm or PreviewRecorder(), poll_interval=0.05)


@asynccontextmanager
async def relay_on(
    grid: LiveGrid,
    folder: Path,
    *,
    account: LocalAccount | None = None,
    rules: RelayRules | None = None,
    collect_seconds: float = 0.05,
    **more: Any,
) -> AsyncIterator[str]:
    """Run a relay in this process and yield its URL; by default, the grid's stranger pays."""
    settings = RelaySettings(
        state_dir=folder,
        poll_interval=0.1,
        rules=rules or RelayRules(),
        collect_seconds=collect_seconds,
        **more,
    )
    stop = asyncio.Event()
    url: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(
        run_relay(
            grid.node.url,
            grid.deployment,
            account or grid.stranger,
            settings,
            host="127.0.0.1",
            port=0,
            ready=url.set_result,
            stop=stop,
        )
    )
    await asyncio.wait({task, url}, return_when=asyncio.FIRST_COMPLETED)
    try:
        if task.done():
            task.result()
        yield url.result()
    finally:
        stop.set()
        await asyncio.wait_for(task, 30)


async def sign(
    grid: LiveGrid,
    account: LocalAccount,
    call: Call,
    *,
    signer: LocalAccount | None = None,
    domain: Callable[[Any], Any] = lambda domain: domain,
    lead: int = 300,
    **changes: Any,
) -> SignedRequest:
    """Return a signed request for a call; `changes` replace fields before signing."""
    forwarder = grid.contracts.forwarder
    values: dict[str, Any] = {
        "sender": account.address,
        "to": call.to,
        "value": 0,
        "gas": 500_000,
        "nonce": await forwarder.nonce_of(account.address),
        "deadline": await chain_time(grid.w3) + lead,
        "data": call.data,
    }
    request = ForwardRequest(**(values | changes))
    return request.sign(signer or account, domain(await forwarder.domain()))
