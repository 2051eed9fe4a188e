"""Measurements of a working grid: latency from events, load of processes, limit of the node."""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx2
import psutil
from eth_account import Account
from eth_account.signers.local import LocalAccount
from process_grid import ProcessGrid
from web3 import AsyncWeb3

from deepsquare_chain.chain.bindings.events import JobTransition, decode_logs
from deepsquare_chain.devnet.node.base import Anvil, ChildProcess
from deepsquare_chain.job import JobStatus


class Blocks:
    """Records when each block was first seen, in seconds of the monotonic clock."""

    def __init__(self, w3: AsyncWeb3[Any]) -> None:
        self._w3 = w3
        self.seen: dict[int, float] = {}

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[Blocks]:
        task = asyncio.create_task(self._watch())
        try:
            yield self
        finally:
            task.cancel()

    async def _watch(self) -> None:
        last = int(await self._w3.eth.block_number)
        while True:
            head = int(await self._w3.eth.block_number)
            for number in range(last, head + 1):
                self.seen.setdefault(number, time.monotonic())
            last = head
            await asyncio.sleep(0.03)


@dataclass(frozen=True)
class Load:
    """CPU seconds and memory (MB) of one process at one time."""

    at: float
    cpu: float
    memory: int


def load_of(child: ChildProcess) -> Load:
    """Return the load of a daemon, without the jobs that it started."""
    process = psutil.Process(child.pid)
    times = process.cpu_times()
    return Load(time.monotonic(), times.user + times.system, process.memory_info().rss >> 20)


def between(before: Load, after: Load) -> dict[str, float]:
    """Return the CPU usage in percent of one core, and the memory in MB."""
    share = (after.cpu - before.cpu) / max(after.at - before.at, 1e-6)
    return {"cpu_percent": round(100 * share, 1), "memory_mb": after.memory}


async def loads(grid: ProcessGrid, work: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
    """Run `work`; return its result, the load of the daemons, and CPU seconds by consumer."""
    cpu_used = cpu_seconds(grid)
    before = {role: load_of(child) for role, child in grid.services.items()}
    result = await work()
    cpu_used = {
        consumer: round(after - cpu_used[consumer], 1)
        for consumer, after in cpu_seconds(grid).items()
    }
    role_loads = {role: between(before[role], load_of(grid.services[role])) for role in before}
    providers = [role_loads[role] for role in grid.provider_roles if role in role_loads]
    mean = {
        key: round(statistics.fmean(load[key] for load in providers), 1)
        for key in ("cpu_percent", "memory_mb")
    }
    return result, {
        "scheduler": role_loads["scheduler"],
        "provider_mean": mean,
        "cpu_seconds": cpu_used,
    }


def cpu_seconds(grid: ProcessGrid) -> dict[str, float]:
    """Return the CPU seconds used on this machine so far, by consumer.

    `jobs` are the providers' fork servers with all their ended children: supervisors, shells and
    commands. `others` is the rest of the machine's CPU time, `idle` its unused time.
    """
    seconds_used = dict.fromkeys(("scheduler", "providers", "jobs"), 0.0)
    for role, child in grid.services.items():
        process = psutil.Process(child.pid)
        times = process.cpu_times()
        consumer = "scheduler" if role.startswith("scheduler") else "providers"
        seconds_used[consumer] += times.user + times.system
        seconds_used["jobs"] += times.children_user + times.children_system
        for server in process.children():
            with contextlib.suppress(psutil.Error):
                seconds_used["jobs"] += sum(server.cpu_times()[:4])
    for consumer, pid in (("node", grid.node.pid), ("bench", os.getpid())):
        times = psutil.Process(pid).cpu_times()
        seconds_used[consumer] = times.user + times.system
    machine = psutil.cpu_times()
    idle = machine.idle + getattr(machine, "iowait", 0.0)
    busy = sum(machine[:8]) - idle  # the other fields are included in these
    return {**seconds_used, "others": busy - sum(seconds_used.values()), "idle": idle}


async def node_limit(node: Anvil, seconds: float = 4.0) -> dict[str, float]:
    """Measure the plain transfers per second of the node, sent in batches by eight accounts."""
    accounts = [Account.from_key((10_000 + number).to_bytes(32, "big")) for number in range(8)]
    for account in accounts:
        await node.rpc("anvil_setBalance", account.address, hex(10**24))
    queues = [_payments(node.chain_id, account, 600) for account in accounts]
    start = time.monotonic()
    async with httpx2.AsyncClient(base_url=node.url, timeout=60, trust_env=False) as client:

        async def pour(queue: list[str]) -> int:
            count_sent = 0
            while count_sent < len(queue) and time.monotonic() - start < seconds:
                batch = queue[count_sent : count_sent + 25]
                await client.post("/", json=[_request(payment) for payment in batch])
                count_sent += len(batch)
            return count_sent

        counts = await asyncio.gather(*(pour(payments) for payments in queues))
    for account, count in zip(accounts, counts, strict=True):
        while int(await node.rpc("eth_getTransactionCount", account.address, "latest"), 16) < count:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    return {"transactions_per_second": round(sum(counts) / (time.monotonic() - start), 1)}


def _payments(chain_id: int, account: LocalAccount, count: int) -> list[str]:
    fields = {"type": 2, "chainId": chain_id, "to": account.address, "value": 1, "gas": 21_000}
    fields |= {"maxFeePerGas": 10**12, "maxPriorityFeePerGas": 10**9}
    signed = (account.sign_transaction({**fields, "nonce": nonce}) for nonce in range(count))
    return ["0x" + bytes(transaction.raw_transaction).hex() for transaction in signed]


def _request(raw: str) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": 1, "method": "eth_sendRawTransaction", "params": [raw]}


@dataclass
class JobTimings:
    """Data of jobs from the chain: block of each step, transactions and gas by sender."""

    steps: dict[int, dict[JobStatus, int]]
    sent: Counter[str]
    gas: Counter[str]
    first: int
    last: int


async def read_timings(grid: ProcessGrid, first: int) -> JobTimings:
    """Read all events and receipts from a block on."""
    last = int(await grid.w3.eth.block_number)
    logs = await grid.w3.eth.get_logs(
        {"address": grid.deployment.scheduler, "fromBlock": hex(first), "toBlock": hex(last)}
    )
    steps: dict[int, dict[JobStatus, int]] = defaultdict(dict)
    for event in decode_logs(logs):
        if isinstance(event, JobTransition):
            steps[event.job_id][event.after] = event.block_number
    names = {account.address.lower(): role for role, account in grid.accounts.items()}
    sent: Counter[str] = Counter()
    gas: Counter[str] = Counter()
    for number in range(first, last + 1):
        for receipt in await grid.node.rpc("eth_getBlockReceipts", hex(number)):
            role = names.get(receipt["from"], "others")
            kind = "providers" if role.startswith("p") else role
            sent[kind] += 1
            gas[kind] += int(receipt["gasUsed"], 16)
    return JobTimings(dict(steps), sent, gas, first, last)


def spread(values: Iterable[float]) -> dict[str, float]:
    """Return median and 95th percentile."""
    ordered = sorted(values)
    if not ordered:
        return {}
    index = min(len(ordered) - 1, int(0.95 * len(ordered)))
    return {"median": round(statistics.median(ordered), 1), "p95": round(ordered[index], 1)}


def latency(
    timings: JobTimings, blocks: Blocks, before: JobStatus, after: JobStatus
) -> dict[str, dict[str, float]]:
    """Return the latency between two steps, in blocks and in milliseconds between their arrivals."""
    pairs = [
        (steps[before], steps[after])
        for steps in timings.steps.values()
        if before in steps and after in steps
    ]
    arrivals = [
        1_000 * (blocks.seen[second] - blocks.seen[first])
        for first, second in pairs
        if first in blocks.seen and second in blocks.seen
    ]
    return {"blocks": spread(second - first for first, second in pairs), "ms": spread(arrivals)}
