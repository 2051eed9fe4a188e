"""Reorgs under real daemons: events are rolled back and applied again; too deep a reorg halts them.

Senders send vanished transactions again. Two depths are tested here, all of them in
`make reorgs`. Several blocks are mined per second; replaced ones get other timestamps.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from deepsquare_chain.chain.bindings.deployment import Timeouts
from deepsquare_chain.chain.deploying import GridParams
from deepsquare_chain.devnet.node.base import Node
from deepsquare_chain.job import JobStatus
from tests.support.anvil import start_anvil
from tests.support.crash_scenarios import DaemonGrid, daemon_grid, replace_blocks
from tests.support.customers import PlannedJob, open_table
from tests.support.rundaemon import until

# Long timeouts, because each step of a job waits for its confirmations.
PARAMS = GridParams(
    admin_delay=0,
    timeouts=Timeouts(
        claim_timeout=3_600,
        pending_timeout=36_000,
        response_timeout=3_600,
        response_blocks=1_000,
        lost_timeout=3_600,
        report_grace=36_000,
        top_up_notice=10,
    ),
)
LONG = 20_000
PLANNED_JOBS = (
    PlannedJob("sleep 1", JobStatus.FINISHED, limit=LONG),
    PlannedJob("exit 3", JobStatus.FAILED, limit=LONG),
    PlannedJob("sleep 900", JobStatus.CANCELLED, limit=LONG),
)
TIMES = 3
WHOLE = os.environ.get("DEEPSQUARE_REORGS") == "all"
#: Depth, and whether the node puts the replaced transactions into the new blocks.
CASES = [(depth, keep) for depth in (1, 2, 7, 32, 64) for keep in (True, False)]
SHORT = [(2, True), (7, False)]


class Miner:
    """The only miner of the node: one block per `pace` seconds, paused while `lock` is held."""

    def __init__(self, node: Node, pace: float) -> None:
        self.node, self.pace, self.lock = node, pace, asyncio.Lock()

    async def run(self) -> None:
        while True:
            async with self.lock:
                await self.node.mine()
            await asyncio.sleep(self.pace)

    async def blocks(self, count: int) -> None:
        """Wait for `count` more blocks."""
        until_number = await self.head() + count
        while await self.head() < until_number:  # noqa: ASYNC110 - another process
            await asyncio.sleep(self.pace)

    async def head(self) -> int:
        return int(await self.node.rpc("eth_blockNumber"), 16)


@asynccontextmanager
async def grid_with_miner(
    folder: Path, confirmations: int, pace: float
) -> AsyncIterator[tuple[DaemonGrid, Miner]]:
    """Provide a grid whose customers require the same confirmations as its daemons."""
    async with start_anvil(options=("--no-mining",)) as node:
        miner = Miner(node, pace)
        mining = asyncio.create_task(miner.run())
        try:
            async with daemon_grid(node, folder, PARAMS, confirmations=confirmations) as scenario:
                for account in scenario.grid.customers:
                    scenario.grid.sender(account, confirmations=confirmations)
                await miner.blocks(confirmations + 2)
                yield scenario, miner
        finally:
            mining.cancel()
            await asyncio.gather(mining, return_exceptions=True)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("depth", "keep"), CASES if WHOLE else SHORT)
async def test_replaced_blocks_are_done_again(tmp_path: Path, depth: int, keep: bool):
    pace = 0.25 if depth < 10 else 0.1
    async with grid_with_miner(tmp_path, depth, pace) as (scenario, miner):
        for daemon in scenario.daemons.values():
            daemon.start()
        is_over = asyncio.Event()
        working = asyncio.create_task(submit_jobs(scenario, is_over))
        reorganised = 0
        for _ in range(TIMES):
            await miner.blocks(depth + 12)
            reorganised += await replace_something(scenario, miner, depth, keep)
        is_over.set()
        await working
        assert reorganised >= TIMES
        await scenario.end(timestamps_changed=True)
        rolled_back = sum(
            daemon.log.read_text().count("chain reorganised")
            for daemon in scenario.daemons.values()
        )
        jobs = len(await scenario.customers.jobs())
        print(f"depth {depth}, kept {keep}: {reorganised} transactions taken back, {jobs} jobs")
        assert rolled_back, "no daemon noticed a reorg"


async def replace_something(scenario: DaemonGrid, miner: Miner, depth: int, keep: bool) -> int:
    """Replace recent blocks that contain transactions; returns how many. No block is mined meanwhile."""
    for _ in range(600):
        async with miner.lock:
            if await recent_transactions(miner, depth):
                await wait_until_read(scenario, await miner.head())
                return await replace_blocks(miner.node, depth, keep=keep)
        await asyncio.sleep(miner.pace / 2)
    raise AssertionError("no block with a transaction")


async def wait_until_read(scenario: DaemonGrid, number: int) -> None:
    """Wait at most two seconds until a provider has read a block; it may be waiting for the next one."""
    for _ in range(40):
        for provider in range(len(scenario.grid.providers)):
            _, store = open_table(scenario.grid, scenario.folder, provider)
            with store:
                if any(block.number >= number for block in store.recent_blocks("main")[:1]):
                    return
        await asyncio.sleep(0.05)


async def submit_jobs(scenario: DaemonGrid, is_over: asyncio.Event) -> None:
    number = 0
    while not is_over.is_set():
        if len(await scenario.customers.live_jobs()) < 12:
            *_, to_cancel = await scenario.customers.submit(
                *PLANNED_JOBS, provider=f"p{number % 2}"
            )
            await asyncio.sleep(1)
            await scenario.customers.cancel([to_cancel])
            number += 1
        await asyncio.sleep(0.3)


async def recent_transactions(miner: Miner, depth: int) -> bool:
    """Whether the last `depth` blocks contain transactions."""
    head = await miner.head()
    for number in range(head - depth + 1, head + 1):
        block = await miner.node.rpc("eth_getBlockByNumber", hex(number), False)
        if block["transactions"]:
            return True
    return False


async def test_too_deep_a_reorganisation_halts_and_an_empty_state_continues(tmp_path: Path):
    """A confirmed report is reverted: the provider stops and logs the reason, after each start.

    An operator who then starts it with an empty database, as the message says, loses nothing: the
    run is recovered from its folder and reported again.
    """
    async with grid_with_miner(tmp_path, 2, 0.25) as (scenario, miner):
        provider = scenario.daemons["p0"]
        for daemon in scenario.daemons.values():
            daemon.start()
        planned_job = PlannedJob("sleep 4", JobStatus.FINISHED, limit=LONG)
        await scenario.customers.submit(planned_job, provider="p0")
        await until(scenario.customers.all_final)
        await miner.blocks(4)  # until the report is confirmed
        async with miner.lock:
            await replace_blocks(miner.node, 7, keep=False)
        for name, daemon in scenario.daemons.items():
            await until(lambda daemon=daemon: not daemon.alive)
            log = daemon.log.read_text()
            assert "service failed" in log, name
            assert "which had enough confirmations" in log, name
            assert "empty state folder" in log, name
            assert "Traceback" not in log, name
        provider.start()
        await until(lambda: not provider.alive)
        for daemon in scenario.daemons.values():
            for file in daemon.folder.glob("*.db*"):
                file.unlink()
            before = daemon.log.read_text().count("service started")
            daemon.start()
            await until(lambda d=daemon, n=before: d.log.read_text().count("service started") > n)
        await until(lambda: has_run_records(scenario))
        await scenario.end(database_reset=True)


def has_run_records(scenario: DaemonGrid) -> bool:
    table, store = open_table(scenario.grid, scenario.folder, 0)
    with store:
        return bool(table.all())
