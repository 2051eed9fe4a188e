#!/usr/bin/env python3
"""Measure a gateway: MB per second against a plain copy, log streams, uploads of definitions, memory.

The gateway is a process of its own, with its objects in a folder, before a real chain of a few jobs.
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
from deepsquare_chain.chain.bindings.event_types import JobSubmitted
from deepsquare_chain.credits import CREDIT
from deepsquare_chain.devnet.node.embedded import ChainProcess
from deepsquare_chain.devnet.node.process import ChildProcess
from deepsquare_chain.job import Resources
from deepsquare_chain.store.gateway_client import GatewayClient, open_gateways
from deepsquare_chain.workflow import Definition, Step
from tests.support.livegrid import LiveGrid, live_grid, terms

MB: Final = 1024 * 1024
_PART: Final = 4 * MB
_SMALL: Final = Resources(1, 1, 1, 0)


def definition(name: str) -> bytes:
    """A small definition, different for each name."""
    return Definition(_SMALL, {}, (Step.simple("only", f"echo {name}"),)).to_bytes()


@asynccontextmanager
async def gateway(grid: LiveGrid, folder: Path) -> AsyncIterator[tuple[str, psutil.Process]]:
    """A gateway's URL and process."""
    record = folder / "deployment.json"
    grid.deployment.save(record)
    own = {key: text for key, text in os.environ.items() if not key.startswith("DEEPSQUARE_")}
    words = ["gateway", "serve", "--port", "0", "--per-account", "0", "-o", "json"]
    child = await ChildProcess.spawn(
        [sys.executable, "-m", "deepsquare_chain.cli", *words],
        stdout=asyncio.subprocess.PIPE,
        env={
            **own,
            "DEEPSQUARE_ENDPOINT": grid.node.url,
            "DEEPSQUARE_DEPLOYMENT": str(record),
            "DEEPSQUARE_STATE_DIR": str(folder / "gateway"),
            "DEEPSQUARE_LOG_LEVEL": "error",
        },
    )
    try:
        assert child.stdout is not None  # noqa: S101 - it was asked for
        yield json.loads(await child.stdout.readline())["url"], psutil.Process(child.pid)
    finally:
        await child.end()


async def running_jobs(grid: LiveGrid, data: bytes, count: int) -> list[tuple[int, int]]:
    """Jobs of one definition that run, each with the place of its provider: half at each of two."""
    digest = Definition.from_bytes(data).digest
    asked = terms(amount=CREDIT // 10, resources=_SMALL, time_limit=3_600)
    found: list[tuple[int, int]] = []
    for start in range(0, count, 25):
        digests = [digest] * min(25, count - start)
        call = grid.contracts.scheduler.submit_jobs([(asked, digests)])
        receipt = await grid.send(grid.customers[0], call)
        made = [event.job_id for event in receipt.events if isinstance(event, JobSubmitted)]
        place = start // 25 % 2
        await grid.run(made, place)
        found += [(job, place) for job in made]
    return found


class Peak:
    """The largest resident memory of a process while this block runs, in MB."""

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
        """Before, and the most meanwhile."""
        return {"memory_before_mb": round(self.before, 1), "memory_peak_mb": round(self.most, 1)}


async def transfer(  # noqa: PLR0917
    host: GatewayClient,
    alice: GatewayClient,
    process: psutil.Process,
    job: int,
    folder: Path,
    size: int,
) -> dict[str, Any]:
    """One large result up and down, and a plain copy of the same bytes."""
    source, copy, got = (folder / name for name in ("source", "copy", "got"))
    with source.open("wb") as file:
        for _ in range(size // _PART):
            file.write(os.urandom(_PART))
    began = time.perf_counter()
    await asyncio.to_thread(shutil.copyfile, source, copy)
    copied = time.perf_counter() - began
    copy.unlink()
    async with Peak(process) as peak:
        began, offset = time.perf_counter(), 0
        with source.open("rb") as file:
            while data := await asyncio.to_thread(file.read, _PART):
                last = offset + len(data) == size
                await host.append(job, "work/large", offset, data, complete=last)
                offset += len(data)
        uploaded = time.perf_counter() - began
        began = time.perf_counter()
        with got.open("wb") as target:
            async with alice.download(job, "work/large") as pieces:
                async for data in pieces:
                    await asyncio.to_thread(target.write, data)
        downloaded = time.perf_counter() - began
    same = got.stat().st_size == size
    for path in (source, got):
        path.unlink()
    return {
        "megabytes": size // MB,
        "copy_mb_per_s": round(size / MB / copied, 1),
        "upload_mb_per_s": round(size / MB / uploaded, 1),
        "download_mb_per_s": round(size / MB / downloaded, 1),
        "complete": same,
        **peak.figures(),
    }


async def streams(
    hosts: Sequence[GatewayClient],
    alice: GatewayClient,
    process: psutil.Process,
    jobs: list[tuple[int, int]],
    seconds: float,
) -> dict[str, Any]:
    """A line per second and job, each followed by a reader: delays, and bytes that differ."""
    delays: list[float] = []

    async def write(job: int, host: GatewayClient) -> bytes:
        whole = b""
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            line = f"{time.monotonic():.6f}\n".encode()
            await host.append(job, "log", len(whole), line)
            whole += line
            await asyncio.sleep(1.0)
        await host.append(job, "log", len(whole), b"", complete=True)
        return whole

    async def read(job: int) -> bytes:
        whole = b""
        async for part in alice.follow(job):
            now = time.monotonic()
            delays.extend(now - float(line) for line in part.data.split())
            whole += part.data
        return whole

    async with Peak(process) as peak:
        written, seen = await asyncio.gather(
            asyncio.gather(*(write(job, hosts[place]) for job, place in jobs)),
            asyncio.gather(*(read(job) for job, _ in jobs)),
        )
    wrong = sum(one != other for one, other in zip(written, seen, strict=True))
    delays.sort()
    return {
        "streams": len(jobs),
        "lines": len(delays),
        "with_gaps_or_repeats": wrong,
        "delay_median_s": round(statistics.median(delays), 3),
        "delay_95th_percentile_s": round(delays[int(len(delays) * 0.95)], 3),
        **peak.figures(),
    }


async def uploads(alice: GatewayClient, process: psutil.Process, count: int) -> dict[str, Any]:
    """Definitions of so many jobs, 32 at once."""
    gate = asyncio.Semaphore(32)

    async def put(number: int) -> None:
        async with gate:
            await alice.put_definition(definition(f"job {number}"))

    async with Peak(process) as peak:
        began = time.perf_counter()
        await asyncio.gather(*(put(number) for number in range(count)))
        took = time.perf_counter() - began
    return {
        "definitions": count,
        "seconds": round(took, 2),
        "per_second": round(count / took, 1),
        **peak.figures(),
    }


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
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
    found = asyncio.run(measure(args))
    if args.json:
        print(json.dumps(found, indent=2))
        return
    for part, figures in found.items():
        print(f"{part}: {figures}")


if __name__ == "__main__":
    main()
