#!/usr/bin/env python3
"""Measure the explorer's index: build time, size, and response times.

The real writer indexes a long, valid history (`tests/support/history.py`) in a file and, if
PostgreSQL is installed, in a server. Then the queries of all pages run with keys and cursors from the
whole history. The pages themselves are requested from the web application, and fully rendered. The
rate of reading from a real node (anvil) is measured separately.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import httpx2
import psutil
from rich.console import Console
from rich.progress import Progress
from web3 import AsyncWeb3
from web3.providers.async_base import AsyncBaseProvider
from web3.types import RPCEndpoint, RPCResponse

sys.path.insert(0, str(Path(__file__).parents[1]))

from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.chain.bindings.records import Report
from deepsquare_chain.chain.follower import Batch
from deepsquare_chain.errors import EndpointError
from deepsquare_chain.indexer.block_data import BlockData
from deepsquare_chain.indexer.database import IndexDatabase
from deepsquare_chain.indexer.queries import Index
from deepsquare_chain.indexer.service import open_index
from deepsquare_chain.indexer.writer import IndexWriter
from deepsquare_chain.job import JobStatus
from deepsquare_chain.web.api import api_routes
from deepsquare_chain.web.app import explorer_app
from deepsquare_chain.web.site import Site
from tests.support.anvil import start_anvil
from tests.support.history import DEPLOYMENT, History, address
from tests.support.livegrid import deploy, live_grid
from tests.support.postgres import Server, postgres

BATCH: Final = 500  # blocks per database transaction, about as many as in a catch-up
#: Targets in milliseconds at the 95th percentile.
KEY_MS: Final = 20.0
PAGE_MS: Final = 100.0


def build(database: IndexDatabase, jobs: int, progress: Progress) -> dict[str, float]:
    """Index a history with this number of jobs; the time to generate it is excluded."""
    writer = IndexWriter(DEPLOYMENT)
    task = progress.add_task(f"writing {database.location}", total=jobs)
    spent, events, blocks, seen = 0.0, 0, 0, 0
    batch: list[Any] = []

    def flush() -> None:
        nonlocal spent, events, blocks
        all_events = tuple(event for block in batch for event in block.events)
        headers = {block.header.number: block.header for block in batch}
        transactions = {
            transaction.hash: transaction for block in batch for transaction in block.transactions
        }
        first, last = batch[0].header, batch[-1].header
        start = time.perf_counter()
        with database.begin() as connection:
            merged = Batch(all_events, first.number, last.number, time=last.time)
            writer.apply(merged, connection, BlockData(headers, transactions))
        spent += time.perf_counter() - start
        events += len(all_events)
        blocks += len(batch)
        batch.clear()

    for generated in History(jobs).blocks():
        batch.append(generated)
        seen += sum(type(event).__name__ == "JobSubmitted" for event in generated.events)
        if len(batch) == BATCH:
            flush()
            progress.update(task, completed=seen)
    if batch:
        flush()
    progress.remove_task(task)
    return {
        "seconds": round(spent, 1),
        "blocks": blocks,
        "events": events,
        "events_per_second": round(events / spent),
        "jobs_per_second": round(jobs / spent),
    }


def questions(index: Index, rng: random.Random) -> dict[str, tuple[float, Callable[[], Any]]]:
    """Return the queries of pages, each with its target."""
    total = index.overview().jobs_total
    numbers = [row.number for row in index.blocks(limit=200).items]
    deep = {name: _walk(getattr(index, name)) for name in ("jobs", "transactions", "movements")}
    hashes = [row.at.tx_hash for row in index.transactions(limit=200).items]

    def customer() -> str:
        return address(2, rng.randrange(200))

    def provider() -> str:
        return address(1, rng.randrange(20))

    def status() -> JobStatus:
        return rng.choice([final_status for final_status in JobStatus if final_status.is_final])

    keys: dict[str, Callable[[], Any]] = {
        "job": lambda: index.job(rng.randint(1, total)),
        "account": lambda: index.account(customer()),
        "provider": lambda: index.provider(provider()),
        "transaction": lambda: index.transaction(rng.choice(hashes)),
        "block": lambda: index.block(rng.choice(numbers)),
        "status": index.status,
        "changes": lambda: index.changes(index.status().change - 5),
    }
    pages: dict[str, Callable[[], Any]] = {
        "overview": index.overview,
        "jobs": index.jobs,
        "jobs, deep": lambda: index.jobs(deep["jobs"]),
        "jobs by status": lambda: index.jobs(statuses=[status()]),
        "jobs by rare status": lambda: index.jobs(statuses=[JobStatus.RUNNING]),
        "jobs by customer": lambda: index.jobs(customer=customer()),
        "jobs by provider and status": lambda: index.jobs(provider=provider(), statuses=[status()]),
        "jobs by name": lambda: index.jobs(name=str(rng.randint(1, total))),
        "jobs by name, none": lambda: index.jobs(name="no such name"),
        "statement": lambda: index.statement(customer()),
        "statement of the scheduler": lambda: index.statement(DEPLOYMENT.scheduler),
        "transactions": index.transactions,
        "transactions, deep": lambda: index.transactions(deep["transactions"]),
        "blocks": index.blocks,
        "movements, deep": lambda: index.movements(deep["movements"]),
        "transitions": index.transitions,
        "settlements": index.settlements,
        "settlements of a provider": lambda: index.settlements(provider=provider()),
        "events of a job": lambda: index.events(job_id=rng.randint(1, total)),
        "providers": index.providers,
        "jobs by status over time, 100": lambda: index.jobs_by_status_over_time(100),
        "escrow over time, 100": lambda: index.escrow_over_time(100),
        "utilisation of all, 60": lambda: index.utilisation(60),
        "search, a number": lambda: index.search(str(rng.randint(1, total))),
        "search, a name": lambda: index.search("render 77"),
        "exceptions": index.anomalies,
        "exceptions of a rare kind": lambda: index.anomalies(kind="fee-change"),
        "exceptions that stand open": index.open_anomalies,
        "roles": index.roles,
        "parameters": index.parameters,
    }
    return {
        **{name: (KEY_MS, ask) for name, ask in keys.items()},
        **{name: (PAGE_MS, ask) for name, ask in pages.items()},
    }


def _walk(ask: Callable[..., Any]) -> str | None:
    """Return a cursor deep within a list."""
    cursor = None
    for _ in range(100):
        cursor = ask(cursor, 200).next or cursor
    return cursor


class NoNode(AsyncBaseProvider):
    """A node that is down, because reads from the node do not count as time of the index."""

    async def make_request(self, method: RPCEndpoint, params: Any) -> RPCResponse:
        """Fail all requests."""
        raise EndpointError(f"no node answers {method} {params}")


def paths(index: Index, rng: random.Random) -> dict[str, Callable[[], str]]:
    """Return functions that make URL paths, by kind of page."""
    total = index.overview().jobs_total
    numbers = [row.number for row in index.blocks(limit=200).items]
    hashes = [row.at.tx_hash for row in index.transactions(limit=200).items]
    deep = _walk(index.jobs)
    return {
        "/": lambda: "/",
        "/?range=day": lambda: "/?range=day",
        "/jobs": lambda: "/jobs",
        "/jobs, deep": lambda: f"/jobs?cursor={deep}",
        "/jobs?status=live": lambda: "/jobs?status=live",
        "/jobs/N": lambda: f"/jobs/{rng.randint(1, total)}",
        "/accounts/A": lambda: f"/accounts/{address(2, rng.randrange(200))}",
        "/accounts/SCHEDULER": lambda: f"/accounts/{DEPLOYMENT.scheduler}",
        "/accounts/A/jobs": lambda: f"/accounts/{address(2, rng.randrange(200))}/jobs",
        "/providers": lambda: "/providers",
        "/providers/A": lambda: f"/providers/{address(1, rng.randrange(20))}",
        "/transactions": lambda: "/transactions",
        "/transactions/H": lambda: f"/transactions/{rng.choice(hashes)}",
        "/blocks": lambda: "/blocks",
        "/blocks/N": lambda: f"/blocks/{rng.choice(numbers)}",
        "/audit": lambda: "/audit",
        "/audit?of=administration": lambda: "/audit?of=administration",
        "/search?q=": lambda: f"/search?q=render {rng.randint(1, 9)}",
        "/api/v1/jobs": lambda: "/api/v1/jobs",
        "/api/v1/jobs/N": lambda: f"/api/v1/jobs/{rng.randint(1, total)}",
    }


async def measure_pages(index: Index, rounds: int) -> dict[str, dict[str, Any]]:
    """Measure each page in milliseconds, from the request to the last byte."""
    site = Site(index, Contracts(AsyncWeb3(NoNode()), DEPLOYMENT))
    app = explorer_app(site, hosts=["*"], more_routes=api_routes(index, rate=0))
    results = {}
    async with httpx2.AsyncClient(
        transport=httpx2.ASGITransport(app=app), base_url="http://explorer"
    ) as web:
        for name, path in paths(index, random.Random(7)).items():  # noqa: S311
            times = []
            for round_number in range(rounds + 1):
                start = time.perf_counter()
                response = await web.get(path())
                if response.status_code not in {200, 303}:
                    raise RuntimeError(f"{response.url} is answered {response.status_code}")
                if round_number:  # the first request fills caches
                    times.append((time.perf_counter() - start) * 1_000)
            results[name] = _row(times, PAGE_MS)
    return results


def measure(index: Index, rounds: int, progress: Progress) -> dict[str, dict[str, Any]]:
    """Measure each query and page in milliseconds, and compare it with its target."""
    results = {}
    queries = questions(index, random.Random(7))  # noqa: S311
    for name, (aim, ask) in progress.track(list(queries.items()), description="asking"):
        ask()  # warms the database's query plans and pages, as in a running service
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            ask()
            times.append((time.perf_counter() - start) * 1_000)
        results[name] = _row(times, aim)
    return results | asyncio.run(measure_pages(index, rounds))


def _row(times: list[float], aim: float) -> dict[str, Any]:
    p95 = statistics.quantiles(times, n=20)[-1]
    return {
        "median_ms": round(statistics.median(times), 2),
        "p95_ms": round(p95, 2),
        "aim_ms": aim,
        "reached": p95 < aim,
    }


@contextmanager
def _places(folder: Path, *, servers: bool) -> Iterator[list[tuple[str, Any, Callable[[], int]]]]:
    """Yield the databases to measure: kind, location, and a function for the size in bytes."""
    file = folder / "index.db"
    sqlite = ("SQLite", file, lambda: sum(path.stat().st_size for path in folder.glob("index.db*")))
    if not servers:
        yield [sqlite]
        return
    with postgres() as server:
        url = server.database()
        yield [sqlite, ("PostgreSQL", url, lambda: _size(server, url))]


def _size(server: Server, location: str) -> int:
    name = location.rpartition("/")[2]
    return int(server.psql(name, "SELECT pg_database_size(current_database())"))


async def read_node(jobs: int) -> dict[str, float]:
    """Measure the rate of a catch-up from a real node, with jobs processed in batches of fifty."""
    async with AsyncExitStack() as stack:
        node = await stack.enter_async_context(start_anvil())
        deployment = await deploy(node)
        grid = await stack.enter_async_context(live_grid(node, deployment))
        for _ in range(jobs // 50):
            ids = await grid.submit(50)
            await grid.run(ids)
            reports = [Report(job_id, 1, 0) for job_id in ids]
            await grid.send(grid.providers[0], grid.contracts.scheduler.finish(reports))
        service = await stack.enter_async_context(
            open_index(node.url, deployment, None, confirmations=0)
        )
        start = time.perf_counter()
        await service.cycle()
        seconds = time.perf_counter() - start
        events = 0
        cursor = None
        while True:
            page = service.index.events(cursor, 200)
            events += len(page.items)
            if (cursor := page.next) is None:
                break
    return {
        "jobs": jobs,
        "events": events,
        "seconds": round(seconds, 2),
        "events_per_second": round(events / seconds),
        "jobs_per_second": round(jobs / seconds),
    }


def main() -> int:
    """Measure and print; return 1 if a target is missed."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--jobs", type=int, default=100_000)
    options.add_argument("--rounds", type=int, default=60, help="of each question")
    options.add_argument("--node-jobs", type=int, default=1_000, help="0 leaves the node out")
    options.add_argument("--no-server", action="store_true", help="leave PostgreSQL out")
    options.add_argument(
        "--wait", action="store_true", help="for a line of input between building and measuring"
    )
    options.add_argument("--json", action="store_true")
    arguments = options.parse_args()
    result: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}, {psutil.virtual_memory().total / 2**30:.0f} GB",
        "jobs": arguments.jobs,
        "databases": {},
    }
    with (
        Progress(console=Console(stderr=True), transient=True) as progress,
        tempfile.TemporaryDirectory(prefix="bench-explorer-") as folder,
        _places(Path(folder), servers=not arguments.no_server) as places,
    ):
        for kind, location, size in places:
            with IndexDatabase.open(location, DEPLOYMENT, writer=True) as database:
                built = build(database, arguments.jobs, progress)
            result["databases"][kind] = {
                "build": built,
                "bytes": size(),
                "bytes_per_job": round(size() / arguments.jobs),
            }
        if arguments.wait:
            print("built", file=sys.stderr, flush=True)
            sys.stdin.readline()
        result["load_average"] = round(os.getloadavg()[0], 1)
        for kind, location, _ in places:
            with IndexDatabase.open(location, DEPLOYMENT) as database:
                measured = measure(Index(database, DEPLOYMENT), arguments.rounds, progress)
            result["databases"][kind]["questions"] = measured
    if arguments.node_jobs:
        result["node"] = asyncio.run(read_node(arguments.node_jobs))
    print(json.dumps(result, indent=2) if arguments.json else _table(result))
    missed_targets = [
        name
        for database_result in result["databases"].values()
        for name, row in database_result["questions"].items()
        if not row["reached"]
    ]
    return 1 if missed_targets else 0


def _table(result: dict[str, Any]) -> str:
    lines = [f"{result['machine']}; load average {result['load_average']}; {result['jobs']:,} jobs"]
    for kind, database_result in result["databases"].items():
        built = database_result["build"]
        lines.append(
            f"\n{kind}: {built['events']:,} events in {built['seconds']} s "
            f"({built['events_per_second']:,}/s), {database_result['bytes'] / 2**20:,.0f} MB"
        )
        for name, row in database_result["questions"].items():
            suffix = "" if row["reached"] else "   MISSED"
            lines.append(
                f"  {name:34} median {row['median_ms']:8.2f} ms   95 % {row['p95_ms']:8.2f} ms"
                f"   aim {row['aim_ms']:.0f}{suffix}"
            )
    if node := result.get("node"):
        lines.append(
            f"\nFrom a node: {node['events']:,} events in {node['seconds']} s "
            f"({node['events_per_second']:,}/s, {node['jobs_per_second']:,} jobs/s)"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
