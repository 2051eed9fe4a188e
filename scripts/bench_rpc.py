#!/usr/bin/env python3
"""Count the RPC requests of the services: idle, per second without a block, and per job.

A meta-scheduler and a provider run as separate processes on anvil, each behind a loopback proxy that
counts. An HTTP request with a batch counts as one request and several calls.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from bench_grid import flat
from grid_measurements import Blocks, latency, read_timings
from process_grid import ProcessGrid

from deepsquare_chain.errors import GridError
from deepsquare_chain.job import JobStatus

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.support.proxy import Proxy

ROLES: Final = {"provider": "p0", "scheduler": "scheduler"}
#: Blocks before the measurement, in which services learn the block time.
_WARM_BLOCKS: Final = 6


@dataclass
class Sample:
    """Requests and calls of one service, with the number of calls of each method."""

    requests: int = 0
    calls: int = 0
    methods: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, proxy: Proxy) -> Sample:
        """Return the current counts of a proxy."""
        return cls(proxy.counts["requests"], proxy.methods.total(), Counter(proxy.methods))

    def __sub__(self, other: Sample) -> Sample:
        return Sample(
            self.requests - other.requests, self.calls - other.calls, self.methods - other.methods
        )

    def per(self, count: int, unit: str) -> dict[str, Any]:
        """Return requests and calls per unit, for `count` blocks, seconds or jobs."""
        divisor = max(count, 1)
        return {
            f"requests_per_{unit}": round(self.requests / divisor, 3),
            f"calls_per_{unit}": round(self.calls / divisor, 3),
        }


async def idle(grid: ProcessGrid, proxies: Mapping[str, Proxy], blocks: int) -> dict[str, Any]:
    """Measure idle services for this number of blocks, second by second."""

    async def head() -> int:
        return int(await grid.w3.eth.block_number)

    start_head = first = await head()
    for _ in range(36_000):
        await asyncio.sleep(0.1)
        if (first := await head()) >= start_head + _WARM_BLOCKS:
            break
    start = {name: Sample.of(proxy) for name, proxy in proxies.items()}
    quiet, seconds, since = Counter[str](), 0, time.monotonic()
    last, now = start, first
    while now < first + blocks:
        await asyncio.sleep(1 - (time.monotonic() - since) % 1)
        before, now = now, await head()
        fresh = {name: Sample.of(proxy) for name, proxy in proxies.items()}
        if now == before:
            seconds += 1
            quiet.update({name: fresh[name].requests - last[name].requests for name in proxies})
        last = fresh
    results: dict[str, Any] = {}
    for name in proxies:
        total = last[name] - start[name]
        results[name] = total.per(now - first, "block") | {
            "requests_per_second_without_block": round(quiet[name] / seconds, 3)
            if seconds
            else None,
            "requests_per_day": round(86_400 * total.requests / (time.monotonic() - since)),
            "calls": dict(sorted(total.methods.items())),
        }
    return results | {"blocks": now - first, "seconds_without_block": seconds}


async def work(grid: ProcessGrid, proxies: Mapping[str, Proxy], jobs: int) -> dict[str, Any]:
    """Measure jobs that are submitted one by one, each after the end of the previous one."""
    start = {name: Sample.of(proxy) for name, proxy in proxies.items()}
    first, ids = int(await grid.w3.eth.block_number) + 1, list[int]()
    async with Blocks(grid.w3).watching() as blocks:
        for _ in range(jobs):
            ids += await grid.submit(1)
            while True:
                (job,) = await grid.contracts.scheduler.get_jobs(ids[-1:])
                if job.status.is_final:
                    break
                await asyncio.sleep(0.1)
    timings = await read_timings(grid, first)
    results: dict[str, Any] = {
        name: (Sample.of(proxy) - start[name]).per(jobs, "job") for name, proxy in proxies.items()
    }
    return results | {
        "jobs": jobs,
        "blocks_per_job": round((timings.last - first + 1) / jobs, 2),
        "assigned_to_claim": latency(
            timings, blocks, JobStatus.META_SCHEDULED, JobStatus.SCHEDULED
        ),
        "submitted_to_claim": latency(timings, blocks, JobStatus.PENDING, JobStatus.SCHEDULED),
    }


async def measure(options: argparse.Namespace, folder: Path, *, websocket: bool) -> dict[str, Any]:
    """Measure one grid: idle with a block per second, with jobs, and idle with slow blocks."""
    async with AsyncExitStack() as parts:
        grid = await parts.enter_async_context(
            ProcessGrid(folder, 1, poll_interval=options.poll, websocket=websocket)
        )
        proxies = {
            name: await parts.enter_async_context(Proxy(grid.node.url, replacement_rule=False))
            for name in ROLES
        }
        grid.endpoints = {role: proxies[name].url for name, role in ROLES.items()}
        for role in ROLES.values():
            await grid.start(role)
        await asyncio.gather(*(grid.ready(role) for role in ROLES.values()))
        results = {"idle": await idle(grid, proxies, options.blocks)}
        results["per_job"] = await work(grid, proxies, options.jobs)
        if options.slow_blocks:
            await grid.node.rpc("evm_setIntervalMining", options.slow_seconds)
            results["idle_slow_blocks"] = await idle(grid, proxies, options.slow_blocks)
            results["idle_slow_blocks"]["seconds_per_block"] = options.slow_seconds
        for role in ROLES.values():
            await grid.services.pop(role).end()
        return results


async def bench(options: argparse.Namespace) -> dict[str, Any]:
    """Run all measurements, without and with a WebSocket."""
    results: dict[str, Any] = {
        "python": platform.python_version(),
        "poll_interval": options.poll,
    }
    with tempfile.TemporaryDirectory(prefix="deepsquare-bench-") as temporary:
        folder = Path(options.keep or temporary)
        for name, websocket in (("polling", False), ("websocket", True)):
            (folder / name).mkdir(parents=True)
            part = await measure(options, folder / name, websocket=websocket)
            # The top-level results are those of polling, which needs more requests.
            results |= {"websocket": part} if websocket else part
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--blocks", type=int, default=30, help="blocks of a second to watch")
    parser.add_argument("--slow-blocks", type=int, default=6, help="slow blocks to watch; 0: none")
    parser.add_argument("--slow-seconds", type=int, default=12, help="between two slow blocks")
    parser.add_argument("--jobs", type=int, default=5, help="to work off, one after the other")
    parser.add_argument("--poll", type=float, default=0.25, help="poll interval of the services")
    parser.add_argument("--keep", help="folder that keeps states and logs")
    parser.add_argument("--json", action="store_true", help="figures as JSON on standard output")
    options = parser.parse_args()
    try:
        results = asyncio.run(bench(options))
    except GridError as error:
        print(f"{error.message}\n{error.hint}", file=sys.stderr)
        return error.exit_code
    if options.json:
        print(json.dumps(results, indent=2))
    else:
        for name, value in flat(results):
            print(f"{name:60} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
