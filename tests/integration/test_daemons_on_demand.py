"""Daemons as separate processes, on a chain that mines on demand."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from deepsquare_chain.chain.bindings.events import JobSubmitted
from deepsquare_chain.chain.rpc.pool import chain_time, connected
from deepsquare_chain.chain.transactions.sender import Sender
from deepsquare_chain.cli.why import explain
from deepsquare_chain.client.submission import Request, submit
from deepsquare_chain.errors import UsageError
from deepsquare_chain.job import JobStatus
from deepsquare_chain.store.database import Store
from deepsquare_chain.store.definitions import FolderDefinitionStore
from tests.support.anvil import start_anvil
from tests.support.livegrid import LiveGrid, live_grid, terms
from tests.support.provider import SMALL, bench, definition
from tests.support.relay import account_without_coin, relay_on, relayed
from tests.support.rundaemon import DaemonProcess, until

ON_DEMAND = "this chain mines on demand"


@pytest.fixture
async def grid() -> AsyncIterator[LiveGrid]:
    async with start_anvil() as node, live_grid(node) as result:
        yield result


async def test_a_job_ends_on_a_chain_without_other_blocks(grid: LiveGrid, tmp_path: Path) -> None:
    """With the default confirmations, which only an own transaction could cause."""
    store = FolderDefinitionStore(tmp_path / "definitions")
    digest = await store.put(definition("echo hi").to_bytes())
    call = grid.contracts.scheduler.submit_jobs([(terms(resources=SMALL), [digest])])
    receipt = await grid.send(grid.customers[0], call)
    [job_id] = [event.job_id for event in receipt.events if isinstance(event, JobSubmitted)]

    async def status() -> JobStatus:
        return (await grid.contracts.scheduler.get_job(job_id)).status

    async def explained() -> bool:
        return any(
            ON_DEMAND in detail for detail in (await explain(grid.contracts, job_id)).details
        )

    async def ended() -> bool:
        return (await status()).is_final

    await until(explained)
    scheduler = DaemonProcess(grid, tmp_path / "s", kind="scheduler", account=1)
    provider = DaemonProcess(grid, tmp_path / "p", definitions=str(store.path))
    async with scheduler, provider:
        await until(ended)
    assert await status() is JobStatus.FINISHED
    for value in (scheduler, provider):
        assert "on-demand chain detected" in value.log.read_text()


async def test_transaction_signed_after_an_idle_period_is_not_expired(tmp_path: Path) -> None:
    """The latest block is an hour old: a deadline counted from its time would be in the past."""
    an_hour_ago = ("--timestamp", str(int(time.time()) - 3_600))
    store = FolderDefinitionStore(tmp_path / "definitions")
    request = Request(terms(), (b"{}",))
    async with start_anvil(options=an_hour_ago) as node, live_grid(node) as grid:
        customer = grid.customers[0]
        await grid.send(
            customer, grid.contracts.credit.approve(grid.contracts.scheduler.address, 0)
        )
        await node.rpc("evm_increaseTime", 3_600)
        assert time.time() - await chain_time(grid.w3) > 3_000
        before = await grid.w3.eth.block_number
        submission = await submit(
            grid.contracts, grid.sender(customer), store, [request], permit=customer
        )
        assert len(submission.job_ids) == 1
        assert await grid.w3.eth.block_number == before + 1, "no transaction failed first"
    async with start_anvil(options=an_hour_ago) as node, live_grid(node) as grid:
        account = await account_without_coin(grid)
        await node.rpc("evm_increaseTime", 3_600)
        async with relay_on(grid, tmp_path / "relay") as url, relayed(grid, url, account) as wallet:
            submission = await submit(grid.contracts, wallet.sender, store, [request], timeout=30)
        assert len(submission.job_ids) == 1
        assert time.time() - await chain_time(grid.w3) < 600, "the first block of an hour"


async def test_a_command_is_simulated_on_the_block_that_it_causes(tmp_path: Path) -> None:
    """Actions that became possible after the time of the latest block are sent."""
    long_ago = ("--timestamp", str(int(time.time()) - 40 * 86_400))
    async with start_anvil(options=long_ago) as node, live_grid(node) as grid:
        ids = await grid.submit()
        await node.rpc("evm_increaseTime", 40 * 86_400)
        scheduler = grid.contracts.scheduler
        with Store.open(None, chain_id=1337, contract="", account=grid.stranger.address) as store:
            async with connected(node.url) as w3:
                sender = Sender(w3, grid.stranger, store, chain_id=grid.deployment.chain_id)
                await sender.send(scheduler.cancel(ids), timeout=30)
        assert (await scheduler.get_job(ids[0])).status is JobStatus.CANCELLED


async def test_a_second_daemon_of_the_account_is_noticed_on_chain(
    grid: LiveGrid, tmp_path: Path
) -> None:
    """The two have different state folders, so no lock detects the shared wallet; the nonce does."""
    async with bench(grid, tmp_path / "second") as second:
        options = {"definitions": str(second.definitions.path), "confirmations": 0}
        async with DaemonProcess(grid, tmp_path / "first", **options) as first:
            [job_id] = await second.submit("true")

            async def first_finished() -> bool:
                return (await second.job(job_id)).status is JobStatus.FINISHED

            await until(first_finished)
            await grid.node.mine(10)  # what follows is no transaction from before its start
            os.kill(first.pid, signal.SIGSTOP)
            [job_id] = await second.submit("sleep 30")
            await second.until([job_id], JobStatus.RUNNING)
            os.kill(first.pid, signal.SIGCONT)
            await until(lambda: not first.alive)
            assert await first.stop() == UsageError.exit_code
    log = first.log.read_text()
    assert f"Another provider daemon serves {second.account.address}: it sent" in log
    assert "Stop one of them" in log
