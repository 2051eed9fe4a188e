"""A relay killed at each crash point: after a restart the same request has the same transaction."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest

from deepsquare_chain.chain.bindings.events import JobSubmitted
from deepsquare_chain.chain.wallet import import_key
from tests.support.anvil import start_anvil
from tests.support.livegrid import LiveGrid, digest, live_grid, terms
from tests.support.relay import relayed
from tests.support.relayprocess import RelayProcess

LABELS = ("relay.taken", "relay.assigned", "sender.broadcast", "relay.mined")


@pytest.fixture
async def grid(anvil_binary: Path) -> AsyncIterator[LiveGrid]:
    async with start_anvil() as node, live_grid(node) as result:
        yield result


def wallet_of(grid: LiveGrid, folder: Path) -> None:
    (folder / "password").write_text("a relay's password\n")
    (folder / "password").chmod(0o600)
    key = bytes(grid.stranger.key)
    import_key(folder / "wallet.json", key, "a relay's password", light=True)


async def test_killed_anywhere_it_carries_each_request_out_once(
    grid: LiveGrid, tmp_path: Path
) -> None:
    relay = RelayProcess(grid, tmp_path / "relay")
    wallet_of(grid, tmp_path / "relay")
    account = grid.customers[0]
    scheduler, forwarder = grid.contracts.scheduler, grid.contracts.forwarder
    sent_before = await grid.w3.eth.get_transaction_count(grid.stranger.address)
    for number, label in enumerate(LABELS, 1):
        await relay.start(label)
        call = scheduler.submit_jobs([(terms(), [digest(label)])])
        nonce = await forwarder.nonce_of(account.address)
        async with relayed(grid, relay.url, account, timeout=90) as wallet:
            send_task = asyncio.create_task(wallet.send(call))
            await relay.killed()
            # From the broadcast on the chain may have it, whatever becomes of the relay.
            assert not send_task.done() or label in {"sender.broadcast", "relay.mined"}
            await relay.start()
            receipt = await send_task
        assert len([e for e in receipt.events if isinstance(e, JobSubmitted)]) == 1
        # Submitted again, the request returns the transaction on chain.
        (recorded,) = (
            recent_request
            for recent_request in wallet.store.recent_requests()
            if recent_request.call.data == call.data
        )
        async with httpx2.AsyncClient(base_url=relay.url, trust_env=False, timeout=30) as web:
            while True:
                answer = await web.post("/v1/requests", json=recorded.signed.to_wire())
                if answer.json()["state"] == "executed":
                    break
                await asyncio.sleep(0.1)
        assert answer.json()["transaction"] == receipt.hash, label
        assert await forwarder.nonce_of(account.address) == nonce + 1, label
        count = await grid.w3.eth.get_transaction_count(grid.stranger.address)
        assert count - sent_before == number, label
        await relay.stop()
    assert await scheduler.job_count() == len(LABELS)
