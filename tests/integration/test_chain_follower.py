"""The follower on real chains: every event once, through real reorgs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from sqlalchemy import Connection

from deepsquare_chain.chain.bindings.events import Event, JobTransition, decode_logs
from deepsquare_chain.chain.follower import Batch, Follower
from deepsquare_chain.chain.rpc.pool import connected
from deepsquare_chain.job import JobStatus
from tests.support.anvil import start_anvil
from tests.support.livegrid import LiveGrid, live_grid
from tests.support.proxy import Proxy


class Memory:
    """Stores events in order, and removes those that are rolled back."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.rolled_back: list[int] = []

    def apply(self, batch: Batch, _connection: Connection) -> None:
        if batch.rolled_back_to is not None:
            self.rolled_back.append(batch.rolled_back_to)
            self.events = [e for e in self.events if e.block_number <= batch.rolled_back_to]
        self.events += batch.events


def follower(grid: LiveGrid, **options: int) -> Follower[Connection]:
    settings = {"start_block": grid.deployment.block, "confirmations": 0, **options}
    return Follower(grid.w3, grid.contracts.addresses, grid.store(grid.admin), **settings)


async def truth(grid: LiveGrid) -> list[Event]:
    """Return all events by a single request."""
    return decode_logs(
        await grid.w3.eth.get_logs(
            {
                "fromBlock": grid.deployment.block,
                "toBlock": "latest",
                "address": list(grid.contracts.addresses),
            }
        )
    )


async def test_events_replay_to_the_records(grid: LiveGrid) -> None:
    memory, reader = Memory(), follower(grid)
    ids = await grid.submit(count=3)
    await reader.poll(memory.apply)
    await grid.run(ids[:2])
    await grid.send(grid.customers[0], grid.contracts.scheduler.cancel(ids[1:]))
    await reader.poll(memory.apply)
    assert memory.events == await truth(grid)
    last: dict[int, JobStatus] = {}
    for event in memory.events:
        if isinstance(event, JobTransition):
            assert last.get(event.job_id, JobStatus.NONE) is event.before
            last[event.job_id] = event.after
    jobs = await grid.contracts.scheduler.get_jobs(sorted(last))
    assert {job.id: job.status for job in jobs} == last
    assert [last[job_id] for job_id in ids] == [JobStatus.RUNNING, *[JobStatus.CANCELLED] * 2]


async def test_through_a_bad_endpoint(grid: LiveGrid) -> None:
    await grid.submit()
    memory = Memory()
    faults = ["busy", "lost", "half", "page"]
    async with Proxy(grid.node.url) as proxy, connected(proxy.url) as w3:
        reader = Follower(
            w3,
            grid.contracts.addresses,
            grid.store(grid.admin),
            start_block=grid.deployment.block,
            confirmations=0,
            max_range=7,
        )
        for _ in range(8):
            proxy.orders = list(faults[:3])
            await reader.poll(memory.apply)
            if reader.position == await grid.w3.eth.block_number:
                break
    assert memory.events == await truth(grid)


@pytest.fixture
async def own_grid() -> AsyncIterator[LiveGrid]:
    """A grid on an anvil of this test."""
    async with start_anvil() as node, live_grid(node) as grid:
        yield grid


@pytest.mark.parametrize("depth", [1, 2, 7, 32, 64])
async def test_a_reorganisation_is_rolled_back(own_grid: LiveGrid, depth: int) -> None:
    grid, node = own_grid, own_grid.node
    memory, reader = Memory(), follower(own_grid)
    await grid.submit()
    for number in range(66):
        if number % 8 == 0:
            await grid.submit()
        else:
            await node.mine()
        await reader.poll(memory.apply)
    assert memory.events == await truth(grid)
    count = len(memory.events)
    await node.rpc("anvil_reorg", depth, [])
    await node.mine()
    await reader.poll(memory.apply)
    assert len(memory.rolled_back) == 1
    assert memory.events == await truth(grid)
    if depth > 8:
        assert len(memory.events) < count
    # The customer's sender resends its lost transaction, and the follower reads it.
    await grid.sender(grid.customers[0]).reconcile()
    await grid.submit()
    await asyncio.sleep(0.2)
    await reader.poll(memory.apply)
    assert memory.events == await truth(grid)
    assert await grid.contracts.scheduler.job_count() == 11


async def test_a_reverted_snapshot_is_rolled_back_once_its_blocks_are_replaced(
    own_grid: LiveGrid,
) -> None:
    grid, node = own_grid, own_grid.node
    memory, reader = Memory(), follower(own_grid)
    snapshot = await node.rpc("evm_snapshot")
    await grid.submit(name="lost")
    await node.mine(3)
    await reader.poll(memory.apply)
    await node.rpc("evm_revert", snapshot)
    assert await reader.poll(memory.apply) == 0
    grid.senders.clear()
    await grid.submit(name="kept")
    await node.mine(6)
    await reader.poll(memory.apply)
    assert memory.events == await truth(grid)
