"""Endpoints that misbehave: what each fault becomes, and a grid that works through all of them.

Thirty of a hundred answers are wrong, late, lost or from a node that is behind, and yet nothing is
lost and nothing is run or billed twice: events, contract storage, databases, balances and real
executions must agree to the wei.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from web3.exceptions import BlockNotFound, TransactionNotFound

from deepsquare_chain.chain.events import JobSubmitted
from deepsquare_chain.chain.rpc import TransientEndpointError, connect, connected
from deepsquare_chain.devnet.anvil import Anvil, find_anvil
from deepsquare_chain.devnet.chain import ChainProcess
from deepsquare_chain.devnet.node import Node, dev_accounts
from deepsquare_chain.errors import NotFoundError
from deepsquare_chain.job import JobStatus
from tests.e2e.test_kills import (
    PARAMS,
    SMALL,
    Customers,
    all_closed,
    all_final,
    compare,
    leftovers,
)
from tests.support.livegrid import deploy, live_grid, terms
from tests.support.provider import definition
from tests.support.proxy import MIXED, Proxy, mixed
from tests.support.rundaemon import DaemonProcess, until

SEED = 20_262
RATE = 0.3
#: Twelve jobs each; 84 make the thousand of the long run.
ROUNDS = int(os.environ.get("DEEPSQUARE_FAULT_ROUNDS", "3"))
# Everything that is no proper answer; "stale" may be one.
REFUSED = sorted(set(MIXED) - {"stale"})


def a_node() -> Node:
    """The quicker of the nodes that are here, with blocks by the clock."""
    try:
        find_anvil()
    except NotFoundError:
        return ChainProcess(block_time=1)
    return Anvil(block_time=1)


@pytest.fixture
async def node() -> AsyncIterator[Node]:
    async with a_node() as found:
        yield found


async def test_each_fault_is_told_in_plain_words_and_passes(node: Node):
    async with Proxy(node.url, hang=0.2) as proxy, connected(proxy.url, attempts=2) as w3:
        for fault in REFUSED:
            proxy.rates = {fault: 1.0}
            with pytest.raises(TransientEndpointError) as caught:
                await w3.eth.block_number
            assert proxy.url in caught.value.message, fault
            assert proxy.counts[fault] == 2, f"{fault}: a read is tried again"
        proxy.calm()
        assert await w3.eth.chain_id == node.chain_id


async def test_a_silent_endpoint_is_given_up_in_time(node: Node):
    async with Proxy(node.url, hang=30) as proxy:
        proxy.rates = {"hang": 1.0}
        began = time.monotonic()
        with pytest.raises(TransientEndpointError, match="no answer in time"):
            await connect(proxy.url, attempts=1, timeout=0.3)
        assert time.monotonic() - began < 5


async def test_the_latest_block_is_never_missing(node: Node):
    async with Proxy(node.url) as proxy, connected(proxy.url, attempts=2) as w3:
        proxy.rates = {"null": 1.0}
        with pytest.raises(TransientEndpointError, match="empty answer to eth_getBlockByNumber"):
            await w3.eth.get_block("latest")
        # A block, a transaction or a receipt by number or hash may well be unknown.
        with pytest.raises(BlockNotFound):
            await w3.eth.get_block(10**9)
        with pytest.raises(TransactionNotFound):
            await w3.eth.get_transaction_receipt("0x" + "11" * 32)


@pytest.mark.parametrize("fault", ["lost", "truncated", "wrong_id", "null"])
async def test_a_send_is_never_repeated_by_the_connection(node: Node, fault: str):
    me = dev_accounts()[6]
    signed = me.sign_transaction(
        {
            "type": 2,
            "chainId": node.chain_id,
            "nonce": 0,
            "to": me.address,
            "value": 1,
            "gas": 21_000,
            "maxFeePerGas": 10**11,
            "maxPriorityFeePerGas": 10**9,
        }
    )
    async with Proxy(node.url) as proxy, connected(proxy.url) as w3:
        proxy.rates = {fault: 1.0}
        with pytest.raises(TransientEndpointError):
            await w3.eth.send_raw_transaction(signed.raw_transaction)
        assert proxy.methods["eth_sendRawTransaction"] == 1


#: As it is where the embedded EVM is imported: py_ecc raises the limit for the whole process.
DEEP = """
import asyncio, sys
sys.setrecursionlimit(100_000)
from deepsquare_chain.chain.rpc import connect
from deepsquare_chain.errors import EndpointError
try:
    asyncio.run(connect(sys.argv[1], attempts=1))
except EndpointError as error:
    print(error.message)
"""


async def test_a_deeply_nested_answer_kills_nobody(node: Node):
    async with Proxy(node.url) as proxy:
        proxy.rates = {"nested": 1.0}
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", DEEP, proxy.url, stdout=asyncio.subprocess.PIPE
        )
        out, _ = await child.communicate()
    assert child.returncode == 0
    assert b"gave no JSON" in out


# --------------------------------------------------------------------------- a whole grid


class Crowd(Customers):
    """Customers who submit many jobs in one transaction."""

    async def submit_all(self, wanted: Sequence[tuple[str, JobStatus]], place: str) -> list[int]:
        """Jobs for one provider; each leaves a mark each time it runs."""
        mark = f'echo ran >> "{self.tally}/$DEEPSQUARE_JOB_ID"'
        orders = []
        for command, status in wanted:
            made = definition(f"{mark}; {command}", SMALL)
            longest = 3 if status is JobStatus.OUT_OF_CREDITS else 60
            asked = terms(resources=SMALL, time_limit=longest, uses=f"place={place}")
            orders.append((asked, [await self.store.put(made.to_bytes())]))
        call = self.grid.contracts.scheduler.submit_jobs(orders)
        receipt = await self.grid.send(self.grid.customers[len(self.ids) % 2], call)
        ids = [each.job_id for each in receipt.events if isinstance(each, JobSubmitted)]
        self.ids += ids
        self.expected |= dict(zip(ids, (status for _, status in wanted), strict=True))
        return ids

    async def has_room(self) -> bool:
        """Whether few enough jobs wait that none is given back for its age."""
        jobs = await self.grid.contracts.scheduler.get_jobs(self.ids[-48:])
        return sum(not job.status.is_final for job in jobs) <= 24

    async def live(self, rounds: int) -> None:
        """Twelve jobs a round, of every end, for each provider in turn."""
        ends = [
            *[("true", JobStatus.FINISHED)] * 8,
            *[("exit 3", JobStatus.FAILED)] * 2,
            ("sleep 600", JobStatus.OUT_OF_CREDITS),
            ("sleep 500", JobStatus.CANCELLED),
        ]
        for number in range(rounds):
            await until(self.has_room, timeout=120)
            ids = await self.submit_all(ends, f"p{number % 2}")
            await asyncio.sleep(1)
            await self.cancel(ids[-1])


def ready(daemon: DaemonProcess) -> bool:
    """Whether a daemon has looked at the endpoint and begun."""
    return daemon.log.exists() and "service starts" in daemon.log.read_text()


@pytest.mark.timeout(120 + 20 * ROUNDS)
async def test_a_grid_works_through_thirty_percent_of_faults(tmp_path: Path):
    (tmp_path / "tally").mkdir()
    async with (
        a_node() as node,
        live_grid(node, await deploy(node, PARAMS)) as grid,
        Proxy(node.url, seed=SEED, hang=0.5) as proxy,
    ):
        place = tmp_path / "definitions"
        crowd = Crowd(grid, place, tmp_path / "tally")
        shared = {"url": proxy.url, "definitions": str(place)}
        daemons = [
            DaemonProcess(grid, tmp_path / "p0", account=4, **shared),
            DaemonProcess(grid, tmp_path / "p1", account=5, **shared),
            DaemonProcess(grid, tmp_path / "m", kind="scheduler", account=1, url=proxy.url),
        ]
        try:
            for daemon in daemons:
                daemon.start()
            # Who can't look at the endpoint when it starts says so and ends: no part of this.
            await until(lambda: all(ready(daemon) for daemon in daemons))
            proxy.rates, proxy.counts = mixed(RATE), Counter()
            await crowd.live(ROUNDS)
            await until(lambda: all_final(grid, crowd.ids), timeout=60 + 10 * ROUNDS)
            await until(lambda: all_closed(grid, tmp_path), timeout=30)
            print(f"{len(crowd.ids)} jobs, {proxy.counts.total()} requests, {proxy.counts}")
            assert proxy.faults > RATE * 0.8 * (proxy.faults + proxy.counts["fair"])
            assert all(proxy.counts[fault] for fault in MIXED), proxy.counts
            for daemon in daemons:
                assert daemon.alive, daemon.log.read_text()[-2_000:]
                assert await daemon.stop() == 0
                assert "Traceback" not in daemon.log.read_text(), daemon.log
            await compare(grid, crowd, tmp_path)
        finally:
            for daemon in daemons:
                daemon.kill()
            left = leftovers(tmp_path)
        assert left == []
