"""Twenty kills of each daemon while a grid works: nothing lost, nothing run or billed twice.

Events, contract storage, the provider's database and the real executions must agree to the wei.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from deepsquare_chain.chain.deploying import GridParams, Timeouts
from deepsquare_chain.chain.events import JobSubmitted
from deepsquare_chain.devnet.chain import ChainProcess
from deepsquare_chain.job import JobStatus, Resources
from deepsquare_chain.provider.state import RunTable
from deepsquare_chain.store.database import Store
from deepsquare_chain.store.definitions import FolderDefinitionStore
from tests.support.livegrid import WEALTH, LiveGrid, deploy, live_grid, terms
from tests.support.oracle import check_executions, check_ledger, check_provider, replay
from tests.support.provider import all_events, definition
from tests.support.rundaemon import DaemonProcess, until

SEED = 20_261
KILLS = 20
SMALL = Resources(tasks=1, cpus_per_task=1, mem_per_cpu=64, gpus=0)
# Need a reorganisation, a price that moves, a top-up.
NEVER = {"follower.rolled_back", "sender.replaced"} | {
    f"provider.extend.{x}" for x in ("planned", "done")
}
PACKAGE = Path(__file__).resolve().parents[2] / "deepsquare_chain"
# Long enough that nobody who comes back within seconds is given up.
PARAMS = GridParams(
    admin_delay=0,
    timeouts=Timeouts(
        claim_timeout=60,
        pending_timeout=300,
        response_timeout=60,
        response_blocks=10,
        report_grace=3_600,
        top_up_notice=10,
    ),
)


def labels(room: str, *kinds: str) -> list[str]:
    """Every crash point that a healthy grid passes in one room, and in the chain room below it."""
    found = set()
    for place in (room, "chain"):
        for file in (PACKAGE / place).rglob("*.py"):
            found |= set(re.findall(r'crash_point\(f?"([^"]+)"\)', file.read_text()))
    for label in [each for each in found if "{batch.kind}" in each]:
        found.remove(label)
        found |= {label.replace("{batch.kind}", kind) for kind in kinds}
    return sorted(found - NEVER)


def weighted(rng: random.Random, points: Sequence[str]) -> str:
    """A crash point: the first passage, or a later one."""
    return f"{rng.choice(points)}:{rng.choice([1, 1, 1, 1, 2])}"


async def torment(daemon: DaemonProcess, rng: random.Random, points: Sequence[str]) -> list[str]:
    """Start and kill a daemon; the crash points at which it died, "" for a kill by the clock."""
    deaths = []
    for _ in range(KILLS):
        point = weighted(rng, points)
        daemon.start(point)
        deadline = time.monotonic() + rng.uniform(1.2, 2.8)
        while daemon.alive and time.monotonic() < deadline:  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.05)
        deaths.append("" if daemon.alive else point)
        daemon.kill()
    daemon.start()
    return deaths


class Customers:
    """Submit small jobs of every kind, and cancel one now and then."""

    def __init__(self, grid: LiveGrid, store: Path, tally: Path) -> None:
        self.grid = grid
        self.store = FolderDefinitionStore(store)
        self.tally = tally
        self.ids: list[int] = []
        self.expected: dict[int, JobStatus] = {}

    async def submit(self, command: str, expected: JobStatus, **changes: object) -> int:
        """One job that leaves a mark each time it runs."""
        mark = f'echo ran >> "{self.tally}/$DEEPSQUARE_JOB_ID"'
        digest = await self.store.put(definition(f"{mark}; {command}", SMALL).to_bytes())
        call = self.grid.contracts.scheduler.submit_jobs(
            [(terms(resources=SMALL, **changes), [digest])]
        )
        receipt = await self.grid.send(self.grid.customers[len(self.ids) % 2], call)
        [job_id] = [each.job_id for each in receipt.events if isinstance(each, JobSubmitted)]
        self.ids.append(job_id)
        self.expected[job_id] = expected
        return job_id

    async def cancel(self, job_id: int) -> None:
        job = await self.grid.contracts.scheduler.get_job(job_id)
        [owner] = [each for each in self.grid.customers if each.address == job.customer]
        await self.grid.send(owner, self.grid.contracts.scheduler.cancel([job_id]))

    async def live(self, tormented: Sequence[asyncio.Task[list[str]]]) -> None:
        """Business as usual while daemons are killed."""
        doomed: list[int] = []
        while not all(each.done() for each in tormented):
            nap = 1 + len(self.ids) % 3
            await self.submit(f"sleep {nap}", JobStatus.FINISHED)
            await self.submit("exit 3", JobStatus.FAILED)
            if len(self.ids) % 3 == 0:
                await self.submit("sleep 600", JobStatus.OUT_OF_CREDITS, time_limit=5)
                doomed.append(await self.submit("sleep 500", JobStatus.CANCELLED))
            elif doomed:
                await self.cancel(doomed.pop())
        for job_id in doomed:
            await self.cancel(job_id)

    def executions(self) -> dict[int, int]:
        """How often each job really ran."""
        return {int(mark.name): len(mark.read_text().splitlines()) for mark in self.tally.iterdir()}


@pytest.mark.timeout(150)
async def test_twenty_kills_of_each_daemon(tmp_path: Path):
    tally = tmp_path / "tally"
    tally.mkdir()
    async with (
        ChainProcess(block_time=1) as node,
        live_grid(node, await deploy(node, PARAMS)) as grid,
    ):
        place = str(tmp_path / "definitions")
        customers = Customers(grid, tmp_path / "definitions", tally)
        first = DaemonProcess(grid, tmp_path / "p0", account=4, definitions=place)
        second = DaemonProcess(grid, tmp_path / "p1", account=5, definitions=place)
        scheduler = DaemonProcess(grid, tmp_path / "m", kind="scheduler", account=1)
        daemons = (first, second, scheduler)
        try:
            second.start()
            tormented = [
                asyncio.create_task(torment(daemon, random.Random(seed), points))
                for daemon, seed, points in (
                    (first, SEED, labels("provider", "claim", "start", "finish")),
                    (scheduler, SEED + 1, labels("metascheduler", "assign")),
                )
            ]
            await customers.live(tormented)
            for deaths in await asyncio.gather(*tormented):
                assert len([each for each in deaths if each]) >= KILLS // 4, deaths
            await until(lambda: all_final(grid, customers.ids), timeout=60)
            await until(lambda: all_closed(grid, tmp_path), timeout=20)
            for daemon in daemons:
                assert await daemon.stop() == 0
            await compare(grid, customers, tmp_path)
        finally:
            for daemon in daemons:
                daemon.kill()
            left = leftovers(tmp_path)
        assert left == []


async def compare(grid: LiveGrid, customers: Customers, folder: Path) -> None:
    """Events, storage, databases, balances and executions."""
    ledger = replay(await all_events(grid))
    count = await grid.contracts.scheduler.job_count()
    jobs = await grid.contracts.scheduler.get_jobs(list(range(1, count + 1)))
    by_id = {job.id: job for job in jobs}
    assert {each: by_id[each].status for each in customers.ids} == customers.expected
    check_ledger(ledger, jobs)
    check_executions(ledger, customers.executions())
    for number, account in enumerate(grid.providers):
        table, store = open_table(grid, folder, number)
        with store:
            check_provider(account.address, ledger, by_id, table.all(), table.earned())
    await check_balances(grid, ledger)


async def check_balances(grid: LiveGrid, ledger) -> None:
    """Every account holds what the ledger says; the contract keeps nothing."""
    balance = grid.contracts.credit.balance_of
    for account in grid.providers:
        own = sum(line.paid for line in ledger.values() if line.provider == account.address)
        assert await balance(account.address) == own
    for account in grid.customers:
        spent = sum(
            line.paid + line.fee for line in ledger.values() if line.customer == account.address
        )
        assert await balance(account.address) == WEALTH - spent
    fees = sum(line.fee for line in ledger.values())
    assert await balance(grid.deployment.treasury) == fees
    assert await balance(grid.deployment.scheduler) == 0


def open_table(grid: LiveGrid, folder: Path, number: int) -> tuple[RunTable, Store]:
    account = grid.providers[number].address
    place = {"chain_id": grid.deployment.chain_id, "contract": grid.deployment.scheduler}
    store = Store.open(folder / f"p{number}" / "provider.db", account=account, **place)
    return RunTable(store, account, **place), store


async def all_final(grid: LiveGrid, ids: list[int]) -> bool:
    jobs = await grid.contracts.scheduler.get_jobs(ids)
    return all(job.status.is_final for job in jobs)


def all_closed(grid: LiveGrid, folder: Path) -> bool:
    """Whether the providers know that everything is over."""
    for number in range(len(grid.providers)):
        table, store = open_table(grid, folder, number)
        with store:
            if table.open():
                return False
    return True


def leftovers(folder: Path) -> list[str]:
    """Processes that still work in this test's folders; they are ended."""
    found = []
    for process in psutil.process_iter(["cmdline", "cwd"]):
        words = [*(process.info["cmdline"] or []), process.info["cwd"] or ""]
        if any(str(folder) in word for word in words):
            found.append(" ".join(words))
            process.kill()
    return found
