#!/usr/bin/env python3
"""Measure a gateway: throughput compared with a plain copy, log streams, uploads and memory.

The gateway is a separate process that stores objects in a folder; the chain is real, with few jobs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from deepsquare_chain.chain.bindings.events import JobSubmitted
from deepsquare_chain.credits import CREDIT
from deepsquare_chain.devnet.node.base import ChildProcess
from deepsquare_chain.devnet.node.embedded import ChainProcess
from deepsquare_chain.job import Resources
from deepsquare_chain.store.gateway_client import GatewayClient, open_gateways
from deepsquare_chain.workflow import Definition, Step
from tests.support.livegrid import LiveGrid, live_grid, terms

MB: Final = 1024 * 1024
_PART: Final = 4 * MB
_SMALL: Final = Resources(1, 1, 1, 0)


def definition(name: str) -> bytes:
    """Return a small definition, different for each name."""
    return Definition(_SMALL, {}, (Step.simple("only", f"echo {name}"),)).to_bytes()


@asynccontextmanager
async def gateway(grid: LiveGrid, folder: Path) -> AsyncIterator[tuple[str, psutil.Process]]:
    """Run a gateway, and yield its URL and process."""
    record = folder / "deployment.json"
    grid.deployment.save(record)
    inherited = {key: text for key, text in os.environ.items() if not key.startswith("DEEPSQUARE_")}
    command = ["gateway", "serve", "--port", "0", "--per-account", "0", "-o", "json"]
    child = await ChildProcess.spawn(
        [sys.executable, "-m", "deepsquare_chain.cli", *command],
        stdout=asyncio.subprocess.PIPE,
        env={
            **inherited,
            "DEEPSQUARE_ENDPOINT": grid.node.url,
            "DEEPSQUARE_DEPLOYMENT": str(record),
            "DEEPSQUARE_STATE_DIR": str(folder / "gateway"),
            "DEEPSQUARE_LOG_LEVEL": "error",
        },
    )
    try:
        assert child.stdout is not None  # noqa: S101 - requested as a pipe
        yield json.loads(await child.stdout.readline())["url"], psutil.Process(child.pid)
    finally:
        await child.end()


async def running_jobs(grid: LiveGrid, data: bytes, count: int) -> list[tuple[int, int]]:
    """Start jobs with one definition, half at each of two providers.

    Returns the job IDs, each with the index of its provider.
    """
    digest = Definition.from_bytes(data).digest
    job_terms = terms(amount=CREDIT // 10, resources=_SMALL, time_limit=3_600)
    jobs: list[tuple[int, int]] = []
    for start in range(0, count, 25):
        digests = [digest] * min(25, count - start)
        call = grid.contracts.scheduler.submit_jobs([(job_terms, digests)])
        receipt = await grid.send(grid.customers[0], call)
        ids = [event.job_id for event in receipt.events if isinstance(event, JobSubmitted)]
        provider_index = start // 25 % 2
        await grid.run(ids, provider_index)
        jobs += [(job, provider_index) for job in ids]
    return jobs


class Peak:
    """Measures the maximum resident memory of a process during a block, in MB."""

    def __init__(self, process: psutil.Process) -> None:
        self._process = process
        self.before = self.most = self._now()

    async def __aenter__(self) -> Peak:
        self._task = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()

    def _now(self) -> float:
        return self._process.memory_info().rss / MB

    async def _watch(self) -> None:
        while True:
            self.most = max(self.most, self._now())
            await asyncio.sleep(0.05)

    def figures(self) -> dict[str, float]:
        """Return the memory before, and the maximum during the block."""
        return {"memory_before_mb": round(self.before, 1), "memory_peak_mb": round(self.most, 1)}


async def transfer(  # noqa: PLR0917
    host: GatewayClient,
    alice: GatewayClient,
    process: psutil.Process,
    job: int,
    folder: Path,
    size: int,
) -> dict[str, Any]:
    """Measure upload and download of one large result, and a plain copy of the same bytes."""
    source, copy, download = (folder / name for name in ("source", "copy", "got"))
    with source.open("wb") as file:
        for _ in range(size // _PART):
            file.write(os.urandom(_PART))
    start = time.perf_counter()
    await asyncio.to_thread(shutil.copyfile, source, copy)
    copy_seconds = time.perf_counter() - start
    copy.unlink()
    async with Peak(process) as peak:
        start, offset = time.perf_counter(), 0
        with source.open("rb") as file:
            while data := await asyncio.to_thread(file.read, _PART):
                last = offset + len(data) == size
                await host.append(job, "work/large", offset, data, complete=last)
                offset += len(data)
        upload_seconds = time.perf_counter() - start
        start = time.perf_counter()
        with download.open("wb") as target:
            async with alice.download(job, "work/large") as pieces:
                async for data in pieces:
                    await asyncio.to_thread(target.write, data)
        download_seconds = time.perf_counter() - start
    is_complete = download.stat().st_size == size
    for path in (source, download):
        path.unlink()
    return {
        "megabytes": size // MB,
        "copy_mb_per_s": round(size / MB / copy_seconds, 1),
        "upload_mb_per_s": round(size / MB / upload_seconds, 1),
        "download_mb_per_s": round(size / MB / download_seconds, 1),
        "complete": is_complete,
        **peak.figures(),
    }


async def streams(
    hosts: Sequence[GatewayClient],
    alice: GatewayClient,
    process: psutil.Process,
    jobs: list[tuple[int, int]],
    seconds: float,
) -> dict[str, Any]:
    """Write one log line per second and job, followed by a reader per job; measure the delays.

    Counts the logs that readers did not receive unchanged.
    """
    delays: list[float] = []

    async def write(job: int, host: GatewayClient) -> bytes:
        log_data = b""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            line = f"{time.monotonic():.6f}\n".encode()
            await host.append(job, "log", len(log_data), line)
            log_data += line
            await asyncio.sleep(1.0)
        await host.append(job, "log", len(log_data), b"", complete=True)
        return log_data

    async def read(job: int) -> bytes:
        log_data = b""
        async for part in alice.follow(job):
            now = time.monotonic()
            delays.extend(now - float(line) for line in part.data.split())
            log_data += part.data
        return log_data

    async with Peak(process) as peak:
        written, seen = await asyncio.gather(
            asyncio.gather(*(write(job, hosts[place]) for job, place in jobs)),
            asyncio.gather(*(read(job) for job, _ in jobs)),
        )
    mismatches = sum(
        written_log != read_log for written_log, read_log in zip(written, seen, strict=True)
    )
    delays.sort()
    return {
        "streams": len(jobs),
        "lines": len(delays),
        "with_gaps_or_repeats": mismatches,
        "delay_median_s": round(statistics.median(delays), 3),
        "delay_95th_percentile_s": round(delays[int(len(delays) * 0.95)], 3),
        **peak.figures(),
    }


async def uploads(alice: GatewayClient, process: psutil.Process, count: int) -> dict[str, Any]:
    """Measure the upload of `count` definitions, 32 at a time."""
    gate = asyncio.Semaphore(32)

    async def put(number: int) -> None:
        async with gate:
            await alice.put_definition(definition(f"job {number}"))

    async with Peak(process) as peak:
        start = time.perf_counter()
        await asyncio.gather(*(put(number) for number in range(count)))
        seconds = time.perf_counter() - start
    return {
        "definitions": count,
        "seconds": round(seconds, 2),
        "per_second": round(count / seconds, 1),
        **peak.figures(),
    }


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run all measurements."""
    with tempfile.TemporaryDirectory(prefix="bench-gateway-") as name:
        folder = Path(name)
        async with ChainProcess(block_time=0) as node, live_grid(node) as grid:
            data = definition("bench")
            jobs = await running_jobs(grid, data, args.streams)
            alice, (one, two) = grid.customers[0], grid.providers
            async with (
                gateway(grid, folder) as (url, process),
                open_gateways([url], alice, grid.deployment) as (reader,),
                open_gateways([url], one, grid.deployment) as (first,),
                open_gateways([url], two, grid.deployment) as (second,),
            ):
                await reader.put_definition(data)
                return {
                    "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}",
                    "uploads": await uploads(reader, process, args.jobs),
                    "streams": await streams((first, second), reader, process, jobs, args.seconds),
                    "transfer": await transfer(
                        first, reader, process, jobs[0][0], folder, args.megabytes * MB
                    ),
                }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--jobs", type=int, default=1_000, help="definitions to upload")
    parser.add_argument("--streams", type=int, default=100, help="logs that are followed at once")
    parser.add_argument("--seconds", type=float, default=10.0, help="how long logs grow")
    parser.add_argument("--megabytes", type=int, default=1_024, help="size of the large result")
    args = parser.parse_args()
    results = asyncio.run(measure(args))
    if args.json:
        print(json.dumps(results, indent=2))
        return
    for part, figures in results.items():
        print(f"{part}: {figures}")


if __name__ == "__main__":
    main()
