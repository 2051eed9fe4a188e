"""Crash tests: daemons are killed at crash points while a grid works, in a calm and a rough scenario.

Each kill names a crash point, and optionally its passage. The daemon is started with this crash
point, is killed there by SIGKILL, and is restarted with the next one. The ledgers of the grid are
checked at the end of each scenario. A crash point that is never reached counts as a failure.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from deepsquare_chain.chain.bindings.deployment import Timeouts
from deepsquare_chain.chain.deploying import GridParams
from deepsquare_chain.credits import job_rate
from deepsquare_chain.devnet.node.base import Node, dev_accounts
from deepsquare_chain.errors import GridError
from deepsquare_chain.job import JobFlags, JobStatus, Resources
from tests.support.customers import (
    FAILS,
    FINISHES,
    IS_CANCELLED,
    IS_COLLECTED,
    PARAMS,
    RUNS_OUT,
    SMALL,
    Customers,
    PlannedJob,
    all_applied,
    check_all_ledgers,
    kill_remaining_processes,
    open_table,
    submit_in_turns,
)
from tests.support.livegrid import CHEAP, HARDWARE, LiveGrid, deploy, live_grid
from tests.support.rundaemon import DaemonProcess, until

PACKAGE = Path(__file__).resolve().parents[2] / "deepsquare_chain"
#: Kinds of transactions of each service; a label with a placeholder exists for each of them.
KINDS = {
    "provider": (
        *("claim", "claim_and_start", "start", "collect"),
        *("finish", "answer", "requeue", "panic"),
    ),
    "metascheduler": ("assign", "requeue", "challenge", "panic", "cancel"),
}
SERVICE_PACKAGES = {
    "provider": ("provider", "executors", "chain", "daemon"),
    "metascheduler": ("metascheduler", "chain", "daemon"),
}
#: Prefix of the labels of a service's transactions.
LABELS = {"provider": "provider", "metascheduler": "scheduler"}
#: Labels that are not reached in the calm scenario.
ROUGH = re.compile(
    r"supervisor\.|sender\.replaced|follower\.rolled_back|provider\.extend\."
    r"|(provider|scheduler)\.(answer|requeue|panic|challenge|cancel)\."
)
#: Labels of a provider whose executor has a queue: p0 in the calm scenario.
QUEUED = re.compile(r"provider\.(claim|start)\.")
#: The scheduler reads confirmed blocks only, and stops if they are reorganised.
NEVER = {"metascheduler": {"follower.rolled_back"}, "provider": set()}
# Short enough to reach every timeout, long enough for a daemon that is killed repeatedly.
ROUGH_PARAMS = GridParams(
    admin_delay=0,
    timeouts=Timeouts(
        claim_timeout=14,
        pending_timeout=90,
        pending_expiry=90,
        response_timeout=12,
        response_blocks=5,
        lost_timeout=20,
        report_grace=3_600,
        top_up_notice=10,
        collect_interval=5,
    ),
)
#: A generous timeout: the scenario causes each label, independent of timing.
SECONDS_TO_REACH = 240.0


@dataclass
class Kill:
    """One kill, or a crash point that was not reached."""

    role: str
    point: str
    seconds: float = 0.0
    reached: bool = False


def points(service: str, *, rough: bool) -> list[str]:
    """Return all labels in the source code that a service reaches in this scenario."""
    labels: set[str] = set()
    for package in SERVICE_PACKAGES[service]:
        for file in (PACKAGE / package).rglob("*.py"):
            if file.parent.name == "slurm":
                continue  # these services run jobs with the local executor
            for label in re.findall(r'crash_point\(f?"([^"]+)"\)', file.read_text()):
                expanded = label.replace("{self._service}", LABELS[service])
                labels |= {expanded.replace("{batch.kind}", kind) for kind in KINDS[service]}
    excluded = QUEUED if rough else ROUGH
    return sorted(label for label in labels - NEVER[service] if not excluded.match(label))


def shared(labels: Sequence[str]) -> dict[str, list[str]]:
    """Distribute the labels of the calm scenario to both providers; p0's executor has a queue."""
    parts: dict[str, list[str]] = {"p0": [], "p1": []}
    for label in labels:
        if QUEUED.match(label):
            parts["p0"].append(label)
        elif label.startswith("provider.claim_and_start."):
            parts["p1"].append(label)
        else:
            min(parts.values(), key=len).append(label)
    return parts


def in_order(labels: Sequence[str], rng: random.Random) -> list[str]:
    """Shuffle labels, except those caused by one silent provider and those of expired jobs.

    The former come first, in the order of their steps; the latter come last.
    """
    chain = [f"scheduler.{kind}." for kind in ("challenge", "requeue", "panic")]
    first = [
        f"{start}{step}"
        for start in chain
        for step in ("planned", "confirmed")
        if f"{start}{step}" in labels
    ]
    last = [label for label in labels if label.startswith("scheduler.cancel.")]
    others = [label for label in labels if label not in {*first, *last}]
    rng.shuffle(others)
    return first + others + last


async def kill_at_each_point(
    role: str, daemon: DaemonProcess, orders: Sequence[str], current_points: dict[str, str]
) -> list[Kill]:
    """Start and kill a daemon at each crash point in turn, then restart it without one.

    `current_points` is updated with the current crash point of the role.
    """
    kills = []
    for point in orders:
        kill, start = Kill(role, point), time.monotonic()
        current_points[role] = point
        dead = _supervisors(daemon) if point.startswith("supervisor.") else daemon.died
        daemon.start(point)
        while not kill.reached and time.monotonic() < start + SECONDS_TO_REACH:
            await asyncio.sleep(0.05)
            kill.reached = dead()
        kill.seconds = round(time.monotonic() - start, 1)
        kills.append(kill)
        daemon.kill()
    current_points.pop(role, None)
    daemon.start()
    return kills


def _supervisors(daemon: DaemonProcess) -> Callable[[], bool]:
    """Return a function that tells whether a supervisor of the daemon's runs has been killed since."""

    def count() -> int:
        logs = daemon.folder.glob("runs/*/supervisor.log")
        return sum(b"killed at supervisor." in log.read_bytes() for log in logs)

    before = count()
    return lambda: count() > before


# ------------------------------------------------------------------------------ two scenarios


@dataclass
class DaemonGrid:
    """A grid with the daemons of two providers and a scheduler as processes."""

    node: Node
    grid: LiveGrid
    customers: Customers
    folder: Path
    daemons: dict[str, DaemonProcess]
    #: The current crash point of each role.
    current_points: dict[str, str] = field(default_factory=dict)

    def roles_at(self, label: str) -> list[str]:
        """Return the roles whose current crash point begins with `label`."""
        return [role for role, point in self.current_points.items() if point.startswith(label)]

    async def end(
        self,
        timeout: float = 300,
        *,
        database_reset: bool = False,
        timestamps_changed: bool = False,
    ) -> None:
        """Wait at most `timeout` seconds until all jobs end, stop the daemons, check the ledgers."""
        for name, daemon in self.daemons.items():
            assert daemon.alive, f"{name} ended by itself: {daemon.log.read_text()[-2_000:]}"
        await until(self.customers.all_final, timeout=timeout)
        head = await self.grid.w3.eth.block_number
        await until(lambda: all_applied(self.grid, self.folder, head), timeout=180)
        for daemon in self.daemons.values():
            assert await daemon.stop() == 0
            assert "Traceback" not in daemon.log.read_text(), daemon.log
        await check_all_ledgers(
            self.customers,
            self.folder,
            database_reset=database_reset,
            timestamps_changed=timestamps_changed,
        )


@asynccontextmanager
async def daemon_grid(
    node: Node,
    folder: Path,
    params: GridParams = PARAMS,
    *,
    clocks: Mapping[str, float] | None = None,
    queueing: Collection[str] = (),
    **options: Any,
) -> AsyncIterator[DaemonGrid]:
    """Provide a grid on a running node; no process of it remains afterwards.

    Providers in `queueing` have an executor with a queue. `clocks` holds offsets of the daemons'
    wall clocks in seconds. `options` are passed to the providers; URLs of the node also to the
    scheduler.
    """
    offsets = clocks or {}
    confirmations = options.setdefault("confirmations", 1)
    async with live_grid(node, await deploy(node, params)) as grid:
        customers = Customers(grid, folder)
        provider_options = {"definitions": str(customers.definitions_folder), **options}
        daemons = {
            name: DaemonProcess(
                grid,
                folder / name,
                account=account,
                clock=offsets.get(name, 0.0),
                queues=name in queueing,
                **provider_options,
            )
            for name, account in (("p0", 4), ("p1", 5))
        }
        daemons |= {
            "scheduler": DaemonProcess(
                grid,
                folder / "m",
                kind="scheduler",
                account=1,
                clock=offsets.get("scheduler", 0.0),
                confirmations=confirmations,
                **{name: options[name] for name in ("url", "websocket") if name in options},
            ),
        }
        try:
            yield DaemonGrid(node, grid, customers, folder, daemons)
        finally:
            for daemon in daemons.values():
                daemon.kill()
            remaining = kill_remaining_processes(folder)
        assert remaining == []


async def calm(daemon_grid: DaemonGrid, orders: dict[str, Sequence[str]]) -> list[Kill]:
    """Run jobs with all final statuses, without other disturbances."""
    return await _run_scenario(
        daemon_grid, orders, lambda busy: [submit_in_turns(daemon_grid.customers, busy)]
    )


async def rough(daemon_grid: DaemonGrid, orders: dict[str, Sequence[str]]) -> list[Kill]:
    """Run with lost runs and retries, requeues, challenges, top-ups, fee spikes and reorgs."""
    disturbances = Disturbances(daemon_grid)
    await disturbances.begin()
    return await _run_scenario(
        daemon_grid,
        orders,
        lambda busy: [
            _repeat(busy, act, pause, lambda brings=brings: bool(daemon_grid.roles_at(brings)))
            for act, pause, brings in (
                (disturbances.ordinary, 0.0, "provider.cancel."),
                (disturbances.topped_up, 1.0, "provider.extend."),
                (disturbances.unfit_jobs, 0.0, "provider.requeue."),
                (disturbances.challenge, 5.0, "provider.answer."),
                (disturbances.raise_base_fee, 15.0, "sender.replaced"),
                (disturbances.replace_head, 11.0, "follower.rolled_back"),
                (disturbances.unclaimed, 1.0, "scheduler."),
                (disturbances.expiring, 15.0, "scheduler.cancel."),
            )
        ],
        timestamps_changed=True,
    )


async def _run_scenario(
    daemon_grid: DaemonGrid,
    orders: dict[str, Sequence[str]],
    work: Callable[[Callable[[], bool]], Sequence[Awaitable[None]]],
    *,
    timestamps_changed: bool = False,
) -> list[Kill]:
    """Kill the daemons repeatedly during the work, and check the ledgers."""
    for name, daemon in daemon_grid.daemons.items():
        if not orders.get(name):
            daemon.start()
    tasks = [
        asyncio.create_task(
            kill_at_each_point(name, daemon_grid.daemons[name], points, daemon_grid.current_points)
        )
        for name, points in orders.items()
        if points
    ]
    try:
        await asyncio.gather(*work(lambda: not all(task.done() for task in tasks)))
        kills = [kill for role_kills in await asyncio.gather(*tasks) for kill in role_kills]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.sleep(1)
    await daemon_grid.end(timestamps_changed=timestamps_changed)
    return kills


async def _repeat(
    busy: Callable[[], bool],
    act: Callable[[], Awaitable[None]],
    pause: float,
    condition: Callable[[], bool],
) -> None:
    """Repeat an action with pauses, but without pause while a crash point depends on it."""
    while busy():
        await act()
        await _wait_briefly(lambda: not busy() or condition(), timeout=pause)


async def _wait_briefly(condition: Callable[[], Any], timeout: float = 5.0) -> None:
    """Wait until `condition()` returns True, at most `timeout` seconds; a timeout is not an error."""
    with suppress(AssertionError):
        await until(condition, timeout=timeout)


class Disturbances:
    """The disturbances of the rough scenario."""

    def __init__(self, daemon_grid: DaemonGrid) -> None:
        self.daemon_grid, self.grid, self.customers = (
            daemon_grid,
            daemon_grid.grid,
            daemon_grid.customers,
        )
        self.contract = daemon_grid.grid.contracts.scheduler
        self.silent, self.challenger = dev_accounts()[6:8]
        self._mining = asyncio.Lock()

    async def begin(self) -> None:
        """Register a third provider without a daemon; require a confirmation for all senders."""
        for account in (*self.grid.customers, self.silent, self.challenger):
            self.grid.sender(account, confirmations=1)
        registry = self.grid.contracts.registry
        await self.grid.send(self.silent, registry.register(HARDWARE, CHEAP, {"place": "nowhere"}))
        await self.grid.send(self.grid.admin, registry.approve(self.silent.address, 1))

    async def ordinary(self) -> None:
        """Submit jobs with all final statuses; cancel the last of them when it runs."""
        planned_jobs = [FINISHES, FAILS, RUNS_OUT, IS_COLLECTED, IS_CANCELLED]
        provider = "p0" if self.daemon_grid.roles_at("provider.cancel.") else ""
        *_, to_cancel = await self.customers.submit(*planned_jobs, provider=provider, retries=3)
        await _wait_briefly(lambda: self._runs(to_cancel), timeout=15)
        await self.customers.cancel([to_cancel])
        await asyncio.sleep(2)

    async def _runs(self, digest: bytes) -> bool:
        """Whether the last job with a definition is RUNNING and has been executed."""
        job = (await self.customers.lines())[digest][-1]
        return job.status is JobStatus.RUNNING and job.id in self.customers.executions()

    async def topped_up(self) -> None:
        """Top up a running job that runs until its credits are spent."""
        rate = job_rate(CHEAP, SMALL)
        planned_job = PlannedJob("sleep 8", JobStatus.FINISHED)
        provider = "p0" if self.daemon_grid.roles_at("provider.extend.") else ""
        [digest] = await self.customers.submit(
            planned_job,
            provider=provider,
            amount=rate * 180,
            flags=JobFlags.UNTIL_SPENT,
            retries=3,
            customer=0,
        )
        deadline = time.monotonic() + 15
        while time.monotonic() < deadline:
            # Before that, the run would start with the new allotment, and would not be extended.
            if await self._runs(digest):
                owner, job = self.grid.customers[0], (await self.customers.lines())[digest][-1]
                call = self.contract.top_up(job.id, owner.address, rate * 90)
                await self._try(owner, call)
                return
            await asyncio.sleep(0.3)

    async def unfit_jobs(self) -> None:
        """Submit a job whose definition has other resources, and one that is too large."""
        other = Resources(tasks=2, cpus_per_task=1, mem_per_cpu=64, gpus=0)
        large = Resources(tasks=12, cpus_per_task=1, mem_per_cpu=64, gpus=0)
        mismatched = PlannedJob("true", JobStatus.PANICKED, definition_resources=other)
        await self.customers.submit(
            mismatched, provider="p0", retries=0
        )  # a successor would never be claimed
        oversized = PlannedJob("true", JobStatus.CANCELLED, resources=large)
        digests = await self.customers.submit(oversized, provider="p0")
        deadline, was_assigned = time.monotonic() + 60, False
        while time.monotonic() < deadline:
            [job] = (await self.customers.lines())[digests[0]]
            if was_assigned and job.status is JobStatus.PENDING:
                break  # p0 has requeued it
            was_assigned = was_assigned or job.status is JobStatus.META_SCHEDULED
            await asyncio.sleep(0.25)
        await self.customers.cancel(digests)

    async def challenge(self) -> None:
        """Challenge the provider that is being killed repeatedly."""
        await asyncio.sleep(0.5)
        assigned_jobs = [
            job
            for job in await self.customers.live_jobs()
            if job.status.is_assigned and job.provider_id == 1
        ]
        if assigned_jobs:
            await self._try(self.challenger, self.contract.challenge(assigned_jobs[0].id))

    async def unclaimed(self) -> None:
        """Submit a job that is never claimed and one that never runs; the scheduler handles both."""
        planned_job = PlannedJob("true", JobStatus.CANCELLED)
        digests = await self.customers.submit(
            planned_job, planned_job, provider="nowhere", retries=1
        )
        deadline, started = time.monotonic() + 120, False
        while time.monotonic() < deadline:
            first = (await self.customers.lines())[digests[0]][0]
            if first.status is JobStatus.META_SCHEDULED and not started:
                started = await self._try(self.silent, self.contract.claim([first.id]))
                await self._try(self.silent, self.contract.start([first.id]))
            if first.status is JobStatus.PANICKED:
                break
            await asyncio.sleep(0.5)
        await self.customers.cancel(digests)
        await self._try(self.silent, self.contract.answer())

    async def expiring(self) -> None:
        """Submit a job without eligible providers that is not cancelled: it expires."""
        await self.customers.submit(PlannedJob("true", JobStatus.CANCELLED), provider="elsewhere")

    async def raise_base_fee(self) -> None:
        """Raise the base fee, so that pending transactions can't pay it for some blocks."""
        while await self._base_fee() * 6 < 100 * 10**9:
            await _wait_briefly(self._has_pending_transaction)
            async with self._paused_mining():
                if not await self._has_pending_transaction():
                    continue  # mined in the meantime
                fee = max(8 * 10**9, 6 * await self._base_fee())
                await self.daemon_grid.node.rpc("anvil_setNextBlockBaseFeePerGas", hex(fee))
            await _wait_briefly(
                lambda: not self.daemon_grid.roles_at("sender.replaced"), timeout=15
            )
            return

    async def replace_head(self) -> None:
        """Replace the latest block by another one with the same transactions."""
        async with self._paused_mining():
            if self.daemon_grid.roles_at("follower.rolled_back"):
                # A longer pause looks like a chain that mines on demand, whose head is final.
                await _wait_briefly(self._p0_has_read_the_head, timeout=2.0)
            await replace_blocks(self.daemon_grid.node, 1, keep=True)
        await asyncio.sleep(1)

    @asynccontextmanager
    async def _paused_mining(self) -> AsyncIterator[None]:
        """Pause mining within the block."""
        async with self._mining:
            await self.daemon_grid.node.rpc("anvil_setIntervalMining", 0)
            try:
                yield
            finally:
                await self.daemon_grid.node.rpc("anvil_setIntervalMining", 1)

    async def _base_fee(self) -> int:
        block = await self.daemon_grid.node.rpc("eth_getBlockByNumber", "latest", False)
        return int(block["baseFeePerGas"], 16)

    async def _has_pending_transaction(self) -> bool:
        """Whether a transaction is pending: of roles that are to replace it, or else of any account."""
        pool = await self.daemon_grid.node.rpc("txpool_content")
        senders = {sender.lower() for sender in pool["pending"]}
        accounts = {"p0": self.grid.providers[0], "scheduler": self.grid.scheduler}
        roles = self.daemon_grid.roles_at("sender.replaced")
        addresses = {accounts[role].address.lower() for role in roles}
        return bool(senders & addresses if addresses else senders)

    async def _p0_has_read_the_head(self) -> bool:
        head = int(await self.daemon_grid.node.rpc("eth_blockNumber"), 16)
        _, store = open_table(self.grid, self.daemon_grid.folder, 0)
        with store:
            return any(block.number == head for block in store.recent_blocks("main")[:1])

    async def _try(self, account: Any, call: Any) -> bool:
        try:
            await self.grid.send(account, call)
        except GridError:
            return False  # the state has changed, or a reorg is in progress
        return True


async def replace_blocks(node: Node, depth: int, *, keep: bool) -> int:
    """Cause a reorg: replace the last blocks, by ones with the same transactions or by empty ones.

    Nothing else may mine meanwhile. Returns the number of transactions in the replaced blocks.
    """
    head = int(await node.rpc("eth_blockNumber"), 16)
    transactions = []
    for index in range(depth):
        number = head - depth + 1 + index
        block = await node.rpc("eth_getBlockByNumber", hex(number), False)
        for tx_hash in block["transactions"]:
            transactions.append([await node.rpc("eth_getRawTransactionByHash", tx_hash), index])  # noqa: PERF401
    await node.rpc("anvil_reorg", depth, transactions if keep else [])
    return len(transactions)


def as_rows(kills: Sequence[Kill]) -> list[dict[str, Any]]:
    """Convert kills to values for JSON."""
    return [asdict(kill) for kill in kills]
