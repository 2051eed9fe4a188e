"""A busy grid on a real node, with the explorer's server, in a separate thread."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import httpx2
from eth_account.signers.local import LocalAccount

from deepsquare_chain.chain.bindings.calls import Call
from deepsquare_chain.chain.bindings.events import JobSubmitted
from deepsquare_chain.chain.bindings.forwarder import ForwardRequest
from deepsquare_chain.chain.bindings.records import Report
from deepsquare_chain.chain.rpc.pool import chain_time
from deepsquare_chain.credits import CREDIT
from deepsquare_chain.daemon.service import ServiceSettings
from deepsquare_chain.job import JobFlags, Resources
from deepsquare_chain.store.definitions import FolderDefinitionStore
from deepsquare_chain.web.server import Address, run_explorer
from deepsquare_chain.web.site import Link, Site
from deepsquare_chain.workflow import Definition, Step
from tests.support.anvil import start_anvil
from tests.support.busygrid import HOSTILE, BusyGrid, some_terms
from tests.support.livegrid import LiveGrid, digest, live_grid

T = TypeVar("T")
NAMES = ("alice", "bob", "alpine", "jura")


@dataclass
class BusyExplorer:
    """The explorer's URL, the node's URL, and access to the grid."""

    url: str
    node_url: str
    grid: LiveGrid
    busy: BusyGrid
    definitions: Path
    loop: asyncio.AbstractEventLoop

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the grid's event loop, and wait for its result."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(120)

    @property
    def bob(self) -> str:
        """Address of the second customer, who submits no hostile texts."""
        return self.grid.customers[1].address

    @property
    def alice(self) -> str:
        """Address of the first customer."""
        return self.grid.customers[0].address


@contextmanager
def busy_explorer(folder: Path, jobs: int = 5) -> Iterator[BusyExplorer]:
    """Run grid and explorer within a `with` block, after four rounds of `jobs` jobs."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    explorer = _opened(folder, jobs, loop)
    try:
        yield asyncio.run_coroutine_threadsafe(explorer.__aenter__(), loop).result(240)
    finally:
        try:
            asyncio.run_coroutine_threadsafe(explorer.__aexit__(None, None, None), loop).result(60)
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join(10)
            loop.close()


@asynccontextmanager
async def _opened(
    folder: Path, jobs: int, loop: asyncio.AbstractEventLoop
) -> AsyncIterator[BusyExplorer]:
    async with start_anvil() as node, live_grid(node) as grid:
        busy = BusyGrid(grid)
        store = FolderDefinitionStore(folder / "definitions")
        await busy.play(4, jobs)
        await _make_interim_payments(busy)
        await _add_hostile_texts(busy, store)
        known = zip((*grid.customers, *grid.providers), NAMES, strict=True)
        names = {account.address: name for account, name in known}
        deployment = dataclasses.replace(grid.deployment, extra={"names": names})
        stop, pages = asyncio.Event(), asyncio.Queue[str]()
        follow_task = asyncio.create_task(
            run_explorer(
                node.url,
                deployment,
                folder / "index.db",
                ServiceSettings(state_dir=folder, confirmations=0, poll_interval=0.2),
                address=Address(port=0),
                site_of=partial(
                    Site, store=store, links=Link.parse("Otter.tx=https://otter.example/tx/{}")
                ),
                ready=pages.put_nowait,
                stop=stop,
            )
        )
        async with asyncio.timeout(120):
            url = await pages.get()
            async with httpx2.AsyncClient(base_url=url, trust_env=False) as web:
                while (await web.get("/healthz")).status_code != 200:  # noqa: ASYNC110 - as a probe
                    await asyncio.sleep(0.05)
        yield BusyExplorer(url, node.url, grid, busy, store.path, loop)
        stop.set()
        await follow_task


async def _make_interim_payments(busy: BusyGrid) -> None:
    """Start two runs with interim payments; one ends, one continues."""
    grid, host = busy.grid, busy.grid.providers[0]
    scheduler = grid.contracts.scheduler
    flags = JobFlags.INTERIM_PAYMENTS | JobFlags.NO_SELF_SCHEDULING
    small = {"resources": Resources(2, 1, 500, 0), "amount": 4 * CREDIT, "time_limit": 7_200}
    ids = await busy.submit(1, 1, name="long simulation", flags=flags, retries=1, **small)
    terms = some_terms(busy.chance, "signed request", flags=flags, retries=1, **small)
    call = scheduler.submit_jobs([(terms, [digest("signed request")])])
    ids += await _relay(grid, grid.customers[1], call)
    await grid.assign({1: ids})
    await grid.send(host, scheduler.claim_and_start(ids))
    for seconds in (1_800, 2_400):
        await _advance_time(grid, seconds)
        await grid.send(host, scheduler.collect(ids))
    await _advance_time(grid, 600)
    await grid.send(host, scheduler.finish([Report(ids[0], 500, 0)]))
    busy.waiting = [job_id for job_id in busy.waiting if job_id not in ids]


async def _relay(grid: LiveGrid, customer: LocalAccount, call: Call) -> list[int]:
    """Send a call signed by a customer from another account; return the IDs of submitted jobs."""
    forwarder = grid.contracts.forwarder
    request = ForwardRequest(
        sender=customer.address,
        to=call.to,
        value=0,
        gas=1_000_000,
        nonce=await forwarder.nonce_of(customer.address),
        deadline=await chain_time(grid.w3) + 600,
        data=call.data,
    )
    signed = request.sign(customer, await forwarder.domain())
    receipt = await grid.send(
        grid.stranger, forwarder.execute_batch([signed, signed], grid.stranger.address)
    )
    return [event.job_id for event in receipt.events if isinstance(event, JobSubmitted)]


async def _advance_time(grid: LiveGrid, seconds: int) -> None:
    await grid.node.rpc("evm_increaseTime", seconds)
    await grid.node.rpc("evm_mine")


async def _add_hostile_texts(busy: BusyGrid, store: FolderDefinitionStore) -> None:
    """Put hostile texts in all fields that users control."""
    grid = busy.grid
    registry, scheduler = grid.contracts.registry, grid.contracts.scheduler
    steps = tuple(
        Step.simple(f"step {index}", text.replace("\x07", "")) for index, text in enumerate(HOSTILE)
    )
    definition = Definition(Resources(1, 1, 500, 0), {"TEXT": HOSTILE[0]}, steps)
    digest = await store.put(definition.to_bytes())
    cheap = {"resources": Resources(1, 1, 500, 0), "amount": 4 * CREDIT, "time_limit": 300}
    ids = [(await busy.submit(1, name=text, definition=digest, **cheap))[0] for text in HOSTILE]
    await grid.send(grid.providers[1], registry.set_labels({"site": HOSTILE[1][:60], "x": "y"}))
    await grid.assign({2: ids[:2]})
    await grid.send(grid.providers[1], scheduler.requeue(ids[:1], HOSTILE[0]))
    await grid.send(grid.providers[1], scheduler.panic(ids[1:2], HOSTILE[1]))
    await busy.submit(1, uses=f"site={HOSTILE[0][:20].replace('<', '').replace('>', '')}")
