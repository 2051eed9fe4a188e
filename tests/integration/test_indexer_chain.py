"""The index of a live chain, in SQLite and PostgreSQL: reorgs, restarts, rebuilding."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from deepsquare_chain.audit.reader import read_ledger
from deepsquare_chain.daemon import service as daemon_service
from deepsquare_chain.daemon.service import ServiceSettings
from deepsquare_chain.devnet.node.base import Anvil
from deepsquare_chain.errors import StoreError, UsageError
from deepsquare_chain.indexer.service import IndexService, open_index
from deepsquare_chain.job import JobStatus
from deepsquare_chain.observability.metrics import Metrics
from deepsquare_chain.web.server import Address, run_explorer
from tests.support.index import dump
from tests.support.livegrid import LiveGrid, deploy, live_grid
from tests.support.postgres import Server
from tests.support.proxy import Proxy

Location = Callable[[], Any]


@pytest.fixture
async def own_grid(anvil: Anvil) -> AsyncIterator[LiveGrid]:
    """A grid on a node of this test, which may replace its blocks."""
    deployment = await deploy(anvil)
    async with live_grid(anvil, deployment) as grid:
        yield grid


@pytest.fixture(params=["file", "server"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    """Return a function that makes URLs of new databases of one kind."""
    if request.param == "file":
        counter = iter(range(100))
        return lambda: tmp_path / f"index{next(counter)}.db"
    server: Server = request.getfixturevalue("postgres_server")
    return server.database


def opened(grid: LiveGrid, database: Any, **options: Any) -> Any:
    """Return an indexer that requires no confirmations."""
    options = {"confirmations": 0, **options}
    return open_index(grid.node.url, grid.deployment, database, **options)


async def reorganise(grid: LiveGrid, depth: int) -> None:
    """Replace the last blocks with empty ones."""
    await grid.w3.provider.make_request("anvil_reorg", [depth, []])  # type: ignore[arg-type]
    grid.senders.clear()


async def test_the_tables_do_not_depend_on_batches_reorganisations_and_restarts(
    own_grid: LiveGrid, location: Location
) -> None:
    database = location()
    async with opened(own_grid, database) as service:
        await service.cycle()
    ids = await own_grid.end_some_jobs()
    metrics = Metrics("explorer")
    async with opened(own_grid, database, metrics=metrics) as service:
        assert await service.cycle()
        assert service.index.job(ids[2]).row.status is JobStatus.PANICKED
        assert service.index.job(ids[2]).row.successor == ids[3] + 1
        # Panic, cancellation, end, start and claim never happened.
        await reorganise(own_grid, 5)
        await service.cycle()
        assert metrics.value("index_reorganisations_total") == 1
        assert [service.index.job(job_id).row.status for job_id in ids] == [
            *[JobStatus.META_SCHEDULED] * 3,
            JobStatus.PENDING,
        ]
        assert service.index.overview().jobs_total == 4
        await own_grid.send(own_grid.customers[0], own_grid.contracts.scheduler.cancel(ids[:2]))
    async with opened(own_grid, database) as service:
        # A reorg while no indexer runs, which replaces indexed blocks.
        await own_grid.send(own_grid.providers[0], own_grid.contracts.scheduler.claim(ids[2:3]))
        await service.cycle()
    await reorganise(own_grid, 2)
    await own_grid.end_some_jobs()
    async with opened(own_grid, database) as service:
        await service.cycle()
        tables = dump(service.database)
        await check_against_storage(own_grid, service)
    for fresh in (None, location()):
        async with opened(own_grid, fresh) as service:
            await service.cycle()
            assert dump(service.database) == tables
    async with opened(own_grid, database, rebuild=True) as service:
        assert not any(dump(service.database).values())
        await service.cycle()
        assert dump(service.database) == tables


async def check_against_storage(grid: LiveGrid, service: IndexService) -> None:
    """Records, balances and ledgers of the index equal the contracts' storage."""
    contracts, index = grid.contracts, service.index
    ledger, _ = await read_ledger(contracts)
    assert index.overview().jobs_total == await contracts.scheduler.job_count()
    for job in await contracts.scheduler.get_jobs(range(1, len(ledger.jobs) + 1)):
        row = index.job(job.id).row
        assert (row.status, row.customer, row.rate) == (job.status, job.customer, job.rate)
        balance = row.paid + row.fee if job.status.is_final else row.escrow
        assert balance == job.escrow
    for account in ledger.accounts:
        balance = await contracts.credit.balance_of(account)
        assert index.account(account).balance == balance
    assert index.overview().supply == await contracts.credit.total_supply()
    head = await grid.w3.eth.get_block("latest")
    status = index.status()
    assert (status.block, status.lag) == (head["number"], 0)
    assert status.block_hash == "0x" + bytes(head["hash"]).hex()


async def test_facts_of_transactions_and_blocks(own_grid: LiveGrid) -> None:
    ids = await own_grid.submit(2)
    async with opened(own_grid, None) as service:
        await service.cycle()
        page = service.index.transactions(sender=own_grid.customers[0].address)
        row = page.items[0]
        receipt = await own_grid.w3.eth.get_transaction_receipt(row.at.tx_hash)  # type: ignore[arg-type]
        sent_transaction = await own_grid.w3.eth.get_transaction(row.at.tx_hash)  # type: ignore[arg-type]
        assert (row.contract, row.method, row.ok) == ("MetaScheduler", "submitJobs", True)
        assert (row.gas_used, row.gas_price) == (receipt["gasUsed"], receipt["effectiveGasPrice"])
        detail = service.index.transaction(row.at.tx_hash)
        assert detail.input == "0x" + bytes(sent_transaction["input"]).hex()
        assert [event.name for event in detail.events].count("JobSubmitted") == 2
        assert {move.job_id for move in detail.movements} == {None, *ids}
        block = service.index.block(row.at.block)
        head = await own_grid.w3.eth.get_block(row.at.block)
        assert block.row.hash == "0x" + bytes(head["hash"]).hex()
        assert block.row.base_fee == head["baseFeePerGas"]
        assert [transaction.at.tx_hash for transaction in block.transactions] == [row.at.tx_hash]
        assert service.index.block(block.row.hash) == block


async def test_final_blocks_are_marked(own_grid: LiveGrid) -> None:
    [job_id] = await own_grid.submit()
    async with opened(own_grid, None) as service:
        await service.cycle()
        before = service.index.status()
        assert not service.index.job(job_id).row.changed.finalized
        # anvil calls a block final once 64 others are on top of it.
        await own_grid.w3.provider.make_request("anvil_mine", ["0x50"])  # type: ignore[arg-type]
        await service.cycle()
        assert service.index.job(job_id).row.changed.finalized
        after = service.index.status()
        assert after.finalized > before.finalized
        kinds = [change.kind for change in service.index.changes(before.change).items]
        assert kinds == ["finality"]


async def test_only_confirmed_blocks(own_grid: LiveGrid) -> None:
    [job_id] = await own_grid.submit()
    async with opened(own_grid, None, confirmations=2) as service:
        await service.cycle()
        assert service.index.overview().jobs_total == 0
        assert service.index.status().lag == 2
        await own_grid.w3.provider.make_request("anvil_mine", ["0x2"])  # type: ignore[arg-type]
        assert await service.cycle()
        assert service.index.job(job_id).row.id == job_id


async def test_one_writer_at_a_time(own_grid: LiveGrid, location: Location) -> None:
    database = location()
    async with opened(own_grid, database):
        with pytest.raises(UsageError, match="being written by another process"):
            async with opened(own_grid, database):
                pass
    async with opened(own_grid, database) as service:
        await service.cycle()


async def test_another_grid_is_refused(own_grid: LiveGrid, location: Location) -> None:
    database = location()
    async with opened(own_grid, database) as service:
        await service.cycle()
    other = await deploy(own_grid.node)
    with pytest.raises(UsageError, match="belongs to another scheduler"):
        async with open_index(own_grid.node.url, other, database):
            pass
    async with open_index(
        own_grid.node.url, other, database, rebuild=True, confirmations=0
    ) as service:
        await service.cycle()
        assert service.index.status().scheduler == other.scheduler
        assert service.index.overview().jobs_total == 0


async def test_a_database_server_that_is_down_is_reported(
    own_grid: LiveGrid, postgres_server: Server
) -> None:
    missing = f"postgresql+psycopg://grid@127.0.0.1:{postgres_server.port}/nothing"
    with pytest.raises(StoreError, match="does not exist"):
        async with opened(own_grid, missing):
            pass
    database = postgres_server.database()
    async with opened(own_grid, database) as service:
        await service.cycle()
        name = database.rpartition("/")[2]
        # The server drops everybody, the lock of the only writer included.
        query = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = "
        postgres_server.psql("postgres", query + f"'{name}'")
        await own_grid.submit()
        assert await service.cycle()
        with pytest.raises(UsageError, match="being written"):
            async with opened(own_grid, database):
                pass


async def test_the_explorer_waits_for_its_endpoint(
    own_grid: LiveGrid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon_service, "_PAUSES", (0.01, 0.05))
    # Empty blocks are those of a schedule: the head must not count as final after four seconds.
    await own_grid.w3.provider.make_request("anvil_mine", ["0x10"])  # type: ignore[arg-type]
    stop, pages = asyncio.Event(), asyncio.Queue[str]()
    async with Proxy(own_grid.node.url, {"broken": 1.0}) as proxy, asyncio.timeout(60):
        running = asyncio.create_task(
            run_explorer(
                proxy.url,
                own_grid.deployment,
                tmp_path / "index.db",
                ServiceSettings(tmp_path, confirmations=2, poll_interval=0.05),
                address=Address(port=0),
                ready=pages.put_nowait,
                stop=stop,
            )
        )
        while proxy.faults < 10:  # noqa: ASYNC110 - the proxy only counts
            await asyncio.sleep(0.01)
        assert pages.empty()
        assert not running.done()
        proxy.calm()
        url = await pages.get()
        async with httpx2.AsyncClient(base_url=url, trust_env=False) as web:
            while (await web.get("/healthz")).status_code != 200:  # noqa: ASYNC110 - as a probe
                await asyncio.sleep(0.05)
            assert (await web.get("/")).status_code == 200
            # Blocks that are not indexed yet are read from the node.
            head = await own_grid.w3.eth.block_number
            assert "is not indexed yet" in (await web.get(f"/blocks/{head}")).text
            assert (await web.get(f"/blocks/{head + 1}")).status_code == 404
        stop.set()
        await running


async def test_an_explorer_on_all_addresses_needs_host_names(
    own_grid: LiveGrid, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="host names by which users"):
        await run_explorer(
            own_grid.node.url,
            own_grid.deployment,
            tmp_path / "index.db",
            ServiceSettings(tmp_path),
            address=Address("0.0.0.0", 0),  # noqa: S104 - what is refused
        )
    assert not (tmp_path / "index.db").exists()
