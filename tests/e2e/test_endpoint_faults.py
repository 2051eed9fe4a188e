"""Faulty endpoints: the error that each fault raises, and a grid that works in spite of all of them.

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
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from web3.exceptions import BlockNotFound, TransactionNotFound

from deepsquare_chain.chain.rpc.endpoint import TransientEndpointError
from deepsquare_chain.chain.rpc.pool import connect, connected
from deepsquare_chain.devnet.node.base import Anvil, Node, dev_accounts
from deepsquare_chain.devnet.node.embedded import ChainProcess
from deepsquare_chain.job import JobStatus
from tests.support.anvil import has_anvil, start_anvil
from tests.support.crash_scenarios import daemon_grid
from tests.support.customers import FAILS, FINISHES, IS_CANCELLED, RUNS_OUT, Customers, PlannedJob
from tests.support.proxy import MIXED, Proxy, Wire, mixed
from tests.support.rundaemon import DaemonProcess, until

SEED = 20_262
RATE = 0.3
#: Twelve jobs each; 84 make the thousand of the long run.
ROUNDS = int(os.environ.get("DEEPSQUARE_FAULT_ROUNDS", "3"))
# Faults that a read must report; a "stale" response may be correct.
REFUSED = sorted(set(MIXED) - {"stale"})


def quick_node() -> Node:
    """Return the quicker of the installed nodes, with blocks by the clock."""
    return Anvil(block_time=1) if has_anvil() else ChainProcess(block_time=1)


@pytest.fixture
async def node() -> AsyncIterator[Node]:
    async with quick_node() as result:
        yield result


async def test_each_fault_is_reported_and_recovered_from(node: Node):
    async with Proxy(node.url, hang=0.2) as proxy, connected(proxy.url, attempts=2) as w3:
        for fault in REFUSED:
            proxy.rates = {fault: 1.0}
            with pytest.raises(TransientEndpointError) as error_info:
                await w3.eth.block_number
            assert proxy.url in error_info.value.message, fault
            assert proxy.counts[fault] == 2, f"{fault}: a read is tried again"
        proxy.calm()
        assert await w3.eth.chain_id == node.chain_id


async def test_a_silent_endpoint_is_given_up_in_time(node: Node):
    async with Proxy(node.url, hang=30) as proxy:
        proxy.rates = {"hang": 1.0}
        start = time.monotonic()
        with pytest.raises(TransientEndpointError, match="no answer in time"):
            await connect(proxy.url, attempts=1, timeout=0.3)
        assert time.monotonic() - start < 25


async def test_the_latest_block_is_never_missing(node: Node):
    async with Proxy(node.url) as proxy, connected(proxy.url, attempts=2) as w3:
        proxy.rates = {"null": 1.0}
        with pytest.raises(TransientEndpointError, match="empty result for eth_getBlockByNumber"):
            await w3.eth.get_block("latest")
        # Unlike the latest block, a block or receipt by number or hash may be unknown.
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


#: The recursion limit is that of a process which imports the embedded EVM: py_ecc raises it.
DEEP = """
import asyncio, sys
sys.setrecursionlimit(100_000)
from deepsquare_chain.chain.rpc.pool import connect
from deepsquare_chain.errors import EndpointError
try:
    asyncio.run(connect(sys.argv[1], attempts=1))
except EndpointError as error:
    print(error.message)
"""


async def test_a_deeply_nested_response_crashes_nothing(node: Node):
    async with Proxy(node.url) as proxy:
        proxy.rates = {"nested": 1.0}
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", DEEP, proxy.url, stdout=asyncio.subprocess.PIPE
        )
        output, _ = await child.communicate()
    assert child.returncode == 0
    assert b"that is not JSON" in output


# --------------------------------------------------------------------------- a whole grid


#: Twelve jobs with all final statuses.
ROUND = [FINISHES] * 8 + [FAILS] * 2 + [RUNS_OUT, IS_CANCELLED]


async def submit_rounds(customers: Customers, rounds: int) -> None:
    """Submit rounds of jobs to the providers in turn; few at a time, so that no claim times out."""
    for number in range(rounds):
        await until(lambda: is_below_limit(customers), timeout=120)
        *_, to_cancel = await customers.submit(*ROUND, provider=f"p{number % 2}")
        await asyncio.sleep(1)
        await customers.cancel([to_cancel])


async def is_below_limit(customers: Customers) -> bool:
    return len(await customers.live_jobs()) <= 24


@pytest.mark.timeout(600 + 20 * ROUNDS)
async def test_a_grid_works_through_thirty_percent_of_faults(tmp_path: Path):
    async with (
        quick_node() as node,
        Proxy(node.url, seed=SEED, hang=0.5) as proxy,
        daemon_grid(node, tmp_path, url=proxy.url) as grid,
    ):
        daemons = grid.daemons.values()
        for daemon in daemons:
            daemon.start()
        # A daemon that can't reach its endpoint at the start ends; that is not tested here.
        await until(lambda: all(logged(daemon, "service started") for daemon in daemons))
        proxy.rates, proxy.counts = mixed(RATE), Counter()
        await submit_rounds(grid.customers, ROUNDS)
        await grid.end(timeout=300 + 10 * ROUNDS)
        print(f"{12 * ROUNDS} jobs, {proxy.counts['requests']} requests, {proxy.counts}")
        assert proxy.faults > RATE * 0.8 * (proxy.faults + proxy.counts["fair"])
        assert all(proxy.counts[fault] for fault in MIXED), proxy.counts


async def test_services_continue_when_the_first_endpoint_and_the_websocket_fail(tmp_path: Path):
    """Jobs are at different steps when both fail; a provider is also restarted without them."""
    async with (
        start_anvil(block_time=1) as node,
        Proxy(node.url) as first,
        Wire(node.url) as wire,
        daemon_grid(node, tmp_path, url=f"{first.url},{node.url}", websocket=wire.url) as grid,
    ):
        daemons = grid.daemons.values()
        for daemon in daemons:
            daemon.start()
        await until(lambda: all(logged(daemon, "websocket subscribed") for daemon in daemons))
        outlives = PlannedJob("sleep 4", JobStatus.FINISHED)
        for provider in ("p0", "p1"):
            await grid.customers.submit(outlives, RUNS_OUT, FAILS, IS_CANCELLED, provider=provider)
        await until(lambda: is_running(grid.customers, 2))
        await grid.customers.submit(FINISHES, FINISHES)
        sends = first.methods["eth_sendRawTransaction"]
        await first.die()
        await wire.die()
        assert sends >= 3, "the first one served until its end"
        *_, to_cancel = await grid.customers.submit(*ROUND)
        await until(lambda: all(logged(daemon, "endpoint changed") for daemon in daemons))
        await until(lambda: all(logged(daemon, "websocket lost") for daemon in daemons))
        grid.daemons["p0"].kill()
        grid.daemons["p0"].start()
        await grid.customers.cancel([to_cancel])
        await grid.end()


def logged(daemon: DaemonProcess, message: str) -> bool:
    return daemon.log.exists() and message in daemon.log.read_text()


async def is_running(customers: Customers, count: int) -> bool:
    """Whether `count` jobs run, on chain and as processes."""
    running = [job.id for job in await customers.live_jobs() if job.status is JobStatus.RUNNING]
    return len(customers.executions().keys() & set(running)) >= count
