#!/usr/bin/env python3
"""Measure a whole grid on a real node (anvil, a block per second): throughput, latency, gas, load.

A customer submits jobs that do nothing; a meta-scheduler and providers, as separate processes,
process them. The limit of the node alone is measured in the same run on the same machine, to show
which share of it the grid uses.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from grid_measurements import Blocks, JobTimings, latency, loads, node_limit, read_timings
from process_grid import ProcessGrid
from rich.console import Console
from rich.progress import Progress

from deepsquare_chain.errors import GridError
from deepsquare_chain.job import JobStatus

BATCH: Final = 50


async def work_off(
    grid: ProcessGrid, jobs: int, on_progress: Callable[[int], None]
) -> dict[str, Any]:
    """Submit all jobs as fast as possible, and wait until the last one has ended."""
    start, ids = time.monotonic(), list[int]()
    while len(ids) < jobs:
        ids += await grid.submit(min(BATCH, jobs - len(ids)))
    submitted = time.monotonic() - start
    waiting = set(ids)
    while waiting:
        batch = sorted(waiting)[: 8 * BATCH]
        jobs_read = await grid.contracts.scheduler.get_jobs(batch)
        waiting -= {job.id for job in jobs_read if job.status.is_final}
        on_progress(jobs - len(waiting))
        await asyncio.sleep(0.25)
    return {"submitted": submitted, "seconds": time.monotonic() - start, "ids": ids}


async def catch_up(grid: ProcessGrid, role: str) -> float:
    """Return the seconds from the start of a daemon with empty state to its first good cycle."""
    start = time.monotonic()
    await grid.start(role)
    await grid.ready(role)
    seconds = time.monotonic() - start
    await grid.services.pop(role).end()
    return round(seconds, 2)


async def history(grid: ProcessGrid, jobs: int, on_progress: Callable[[int], None]) -> None:
    """Create events without runs: submit and cancel jobs, eight batches at a time."""
    sizes = [min(BATCH, jobs - progress) for progress in range(0, jobs, BATCH)]
    gate, progress = asyncio.Semaphore(8), 0

    async def one(size: int) -> None:
        nonlocal progress
        async with gate:
            ids = await grid.submit(size)
            await grid.send("customer", grid.contracts.scheduler.cancel(ids))
        progress += size
        on_progress(progress)

    await asyncio.gather(*(one(size) for size in sizes))


async def bench(options: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """Run all measurements; values are in seconds unless their name has another unit."""
    with tempfile.TemporaryDirectory(prefix="deepsquare-bench-") as temporary:
        folder = Path(options.keep or temporary)
        async with ProcessGrid(
            folder,
            options.providers,
            options.confirmations,
            options.poll,
            options.cpus,
            options.log_level,
        ) as grid:
            return await _bench(grid, options, progress)


async def _bench(
    grid: ProcessGrid, options: argparse.Namespace, progress: Progress
) -> dict[str, Any]:
    jobs: int = options.jobs
    bar = progress.add_task("the node alone", total=None)
    limit = await node_limit(grid.node)
    progress.update(bar, description="starting daemons")
    fresh = {"scheduler": await catch_up(grid, "scheduler@empty")}
    fresh["provider"] = await catch_up(grid, "p0@empty")
    for role in ["scheduler", *grid.provider_roles]:
        await grid.start(role)
    await asyncio.gather(*(grid.ready(role) for role in list(grid.services)))
    progress.update(bar, description="idle")
    _, idle = await loads(grid, lambda: asyncio.sleep(options.idle))
    progress.update(bar, description="working off", total=jobs, completed=0)
    first = int(await grid.w3.eth.block_number) + 1
    async with Blocks(grid.w3).watching() as blocks:
        job_timings, busy = await loads(
            grid,
            lambda: work_off(grid, jobs, lambda count: progress.update(bar, completed=count)),
        )
    timings = await read_timings(grid, first)
    final_statuses = Counter(max(timings.steps[job_id]).name for job_id in job_timings["ids"])
    for role in list(grid.services):
        await grid.services.pop(role).end()
    if options.history:
        progress.update(bar, description="history", total=options.history, completed=0)
        await history(grid, options.history, lambda count: progress.update(bar, completed=count))
    progress.update(bar, description="catching up", total=None)
    late = {"scheduler": await catch_up(grid, "scheduler@late")}
    late["provider"] = await catch_up(grid, "p0@late")
    return _report(grid, options, limit, job_timings, timings, blocks) | {
        "ends": dict(final_statuses),
        "idle": idle,
        "busy": busy,
        "catch_up": {
            "jobs": jobs + options.history,
            "seconds": late,
            "seconds_on_an_empty_grid": fresh,
        },
    }


def _report(  # noqa: PLR0917
    grid: ProcessGrid,
    options: argparse.Namespace,
    limit: Mapping[str, float],
    job_timings: Mapping[str, Any],
    timings: JobTimings,
    blocks: Blocks,
) -> dict[str, Any]:
    jobs, seconds = options.jobs, job_timings["seconds"]
    rate = timings.sent.total() / seconds
    status = JobStatus
    return {
        "machine": {
            "cpus": os.cpu_count(),
            "load_average": [round(value, 1) for value in os.getloadavg()],
            "python": platform.python_version(),
        },
        "jobs": jobs,
        "providers": grid.providers,
        "confirmations": grid.confirmations,
        "seconds": round(seconds, 1),
        "seconds_of_submission": round(job_timings["submitted"], 1),
        "jobs_per_minute": round(60 * jobs / seconds, 1),
        "latency": {
            "submitted_to_claim": latency(timings, blocks, status.PENDING, status.SCHEDULED),
            "submitted_to_assigned": latency(
                timings, blocks, status.PENDING, status.META_SCHEDULED
            ),
            "assigned_to_claim": latency(timings, blocks, status.META_SCHEDULED, status.SCHEDULED),
            "claim_to_start": latency(timings, blocks, status.SCHEDULED, status.RUNNING),
            "start_to_end": latency(timings, blocks, status.RUNNING, status.FINISHED),
        },
        "transactions_per_job": {
            **{role: round(count / jobs, 3) for role, count in timings.sent.items()},
            "all": round(timings.sent.total() / jobs, 3),
        },
        "gas_per_job": {
            **{role: round(count / jobs) for role, count in timings.gas.items()},
            "all": round(timings.gas.total() / jobs),
        },
        "node": {
            **limit,
            "grid_transactions_per_second": round(rate, 2),
            "share_of_its_limit": round(rate / limit["transactions_per_second"], 4),
            "share_of_block_gas": round(
                timings.gas.total() / (60e6 * (timings.last - timings.first + 1)), 4
            ),
        },
    }


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Yield nested values with dotted names."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--providers", type=int, default=4)
    parser.add_argument("--cpus", type=int, default=64, help="of each provider")
    parser.add_argument("--confirmations", type=int, default=1)
    parser.add_argument("--poll", type=float, default=0.25, help="seconds between idle cycles")
    parser.add_argument("--idle", type=float, default=5.0, help="seconds of watching idle daemons")
    parser.add_argument("--history", type=int, default=0, help="more jobs, only for catching up")
    parser.add_argument("--log-level", default="warning", help="of the daemons")
    parser.add_argument("--keep", help="folder that keeps states and logs")
    parser.add_argument("--json", action="store_true", help="figures as JSON on standard output")
    options = parser.parse_args()
    try:
        with Progress(console=Console(stderr=True), transient=True) as progress:
            results = asyncio.run(bench(options, progress))
    except GridError as error:
        print(f"{error.message}\n{error.hint}", file=sys.stderr)
        return error.exit_code
    if options.json:
        print(json.dumps(results, indent=2))
    else:
        for name, value in flat(results):
            print(f"{name:45} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
