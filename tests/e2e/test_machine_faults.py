"""Faults of a machine: a full disk, no file descriptor left, a wrong clock. The ledgers must agree."""

from __future__ import annotations

import asyncio
import os
import re
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx2
import psutil
import pytest

from deepsquare_chain.devnet.node.embedded import ChainProcess
from deepsquare_chain.job import JobStatus
from tests.support.crash_scenarios import DaemonGrid, daemon_grid
from tests.support.customers import FAILS, FINISHES, IS_CANCELLED, PARAMS, RUNS_OUT, PlannedJob
from tests.support.rundaemon import DaemonProcess, until

MEGABYTE = 2**20
DAYS = 3 * 86_400


@contextmanager
def small_disk(mount_point: Path, megabytes: int) -> Iterator[None]:
    """Mount a small file system at a new folder; skips the test if this user may not mount."""
    mount_point.mkdir()
    result = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(mount_point)],
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        pytest.skip(f"no small file system can be mounted here: {result.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(mount_point)], check=False)


def fill(file: Path) -> None:
    """Fill a file system to its last byte."""
    with file.open("wb", buffering=0) as stream:
        for size in (MEGABYTE, 4096, 1):
            try:
                while True:
                    stream.write(b"\0" * size)
            except OSError:
                continue


def has_started(daemon: DaemonProcess) -> bool:
    return daemon.log.exists() and "service started" in daemon.log.read_text()


async def start_daemons(scenario: DaemonGrid) -> None:
    for daemon in scenario.daemons.values():
        daemon.start()
    await until(lambda: all(has_started(daemon) for daemon in scenario.daemons.values()))


async def statuses(scenario: DaemonGrid, digests: list[bytes]) -> list[JobStatus]:
    lines = await scenario.customers.lines()
    return [lines[digest][-1].status for digest in digests]


async def all_running(scenario: DaemonGrid, digests: list[bytes]) -> bool:
    return set(await statuses(scenario, digests)) == {JobStatus.RUNNING}


async def test_a_full_disk_loses_nothing(tmp_path: Path):
    """A run ends and is reported later; no job is claimed until there is free space again."""
    with small_disk(tmp_path / "p0", 24):
        async with (
            ChainProcess(block_time=1) as node,
            daemon_grid(node, tmp_path, min_free=4) as scenario,
        ):
            await start_daemons(scenario)
            provider, ballast = scenario.daemons["p0"], tmp_path / "p0" / "ballast"
            runs = await scenario.customers.submit(
                PlannedJob("sleep 6", JobStatus.FINISHED), provider="p0"
            )
            await until(lambda: all_running(scenario, runs))
            await until(lambda: len(scenario.customers.executions()) == 1)
            fill(ballast)
            waits = await scenario.customers.submit(FINISHES, FAILS, provider="p0")
            await asyncio.sleep(10)
            assert provider.alive, "the provider ended on a full disk"
            assert not set(await statuses(scenario, waits)) & {
                JobStatus.SCHEDULED,
                JobStatus.RUNNING,
            }
            ballast.unlink()
            await scenario.end()


async def test_no_descriptor_left_loses_nothing(tmp_path: Path):
    # Jobs that a provider gives back go to it again after multiples of the claim timeout.
    params = replace(PARAMS, timeouts=replace(PARAMS.timeouts, claim_timeout=10))
    async with ChainProcess(block_time=1) as node, daemon_grid(node, tmp_path, params) as scenario:
        await start_daemons(scenario)
        provider = scenario.daemons["p0"]
        runs = await scenario.customers.submit(
            PlannedJob("sleep 5", JobStatus.FINISHED), provider="p0"
        )
        await until(lambda: all_running(scenario, runs))
        process = psutil.Process(provider.pid)
        before = resource.prlimit(provider.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(
            provider.pid, resource.RLIMIT_NOFILE, (max(3, process.num_fds() - 2), before[1])
        )
        await scenario.customers.submit(FINISHES, FAILS, provider="p0")
        await asyncio.sleep(8)
        assert provider.alive, "the provider ended without descriptors"
        resource.prlimit(provider.pid, resource.RLIMIT_NOFILE, before)
        await scenario.end()


async def test_a_wrong_clock_changes_only_a_metric(tmp_path: Path):
    """Bills and timeouts use chain time; clocks that are three days off only appear in the metrics."""
    async with (
        ChainProcess(block_time=1) as node,
        daemon_grid(
            node, tmp_path, clocks={"p0": DAYS, "p1": -DAYS, "scheduler": DAYS}, health_port=0
        ) as scenario,
    ):
        await start_daemons(scenario)
        to_cancel = []
        for provider in ("p0", "p1"):
            digests = await scenario.customers.submit(
                FINISHES, FAILS, RUNS_OUT, IS_CANCELLED, provider=provider
            )
            to_cancel.append(digests[-1])
        await until(lambda: all_running(scenario, to_cancel))
        await scenario.customers.cancel(to_cancel)
        for name, wrong in (("p0", DAYS), ("p1", -DAYS)):
            assert abs(await clock_skew(scenario.daemons[name]) - wrong) < 600, name
        await scenario.end()


async def clock_skew(daemon: DaemonProcess) -> float:
    """Return the clock skew in a provider's metrics, in seconds."""
    url = re.findall(
        r"http://127\.0\.0\.1:\d+", daemon.log.read_text().split("health server started")[1]
    )
    async with httpx2.AsyncClient(trust_env=False) as client:
        text = (await client.get(f"{url[0]}/metrics")).text
    [line] = [line for line in text.splitlines() if "skew" in line and not line.startswith("#")]
    return float(line.split()[-1])


def test_the_disk_is_small_and_full(tmp_path: Path):
    """Check the helpers of the first test."""
    with small_disk(tmp_path / "disk", 1):
        fill(tmp_path / "disk" / "ballast")
        with pytest.raises(OSError, match="No space left"):
            (tmp_path / "disk" / "more").write_bytes(b"x" * 10_000)
        assert os.statvfs(tmp_path / "disk").f_bfree == 0
