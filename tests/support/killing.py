"""Daemons that die at labelled steps while a grid works, in two lives: a calm one and a rough one.

Each kill names a label and its passage. The daemon is started with the order to die there, dies by
SIGKILL, and is started again with the next order. What the grid's books say at the end of a life
judges all of its kills; a label that was never reached is a failure too.
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
from tests.support.gridlife import (
    FAILS,
    FINISHES,
    IS_CANCELLED,
    IS_COLLECTED,
    PARAMS,
    RUNS_OUT,
    SMALL,
    Customers,
    Wish,
    all_closed,
    in_turn,
    judge,
    leftovers,
    open_table,
)
from tests.support.livegrid import CHEAP, HARDWARE, LiveGrid, deploy, live_grid
from tests.support.rundaemon import DaemonProcess, until

PACKAGE = Path(__file__).resolve().parents[2] / "deepsquare_chain"
#: Transactions of each service; a label may stand for each of them.
KINDS = {
    "provider": (
        *("claim", "claim_and_start", "start", "collect"),
        *("finish", "answer", "requeue", "panic"),
    ),
    "metascheduler": ("assign", "requeue", "challenge", "panic", "cancel"),
}
ROOMS = {
    "provider": ("provider", "executors", "chain", "daemon"),
    "metascheduler": ("metascheduler", "chain", "daemon"),
}
#: First part of the labels of a service's transactions.
LABELS = {"provider": "provider", "metascheduler": "scheduler"}
#: Steps that a calm life has no need of.
ROUGH = re.compile(
    r"supervisor\.|sender\.replaced|follower\.rolled_back|provider\.extend\."
    r"|(provider|scheduler)\.(answer|requeue|panic|challenge|cancel)\."
)
#: Steps of a provider whose executor has a queue of its own: p0 of a calm life.
QUEUED = re.compile(r"provider\.(claim|start)\.")
#: A scheduler reads confirmed blocks only, and halts where those are replaced.
NEVER = {"metascheduler": {"follower.rolled_back"}, "provider": set()}
# Short enough to see every timeout, long enough for a daemon that is killed again and again.
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
#: Far more than it takes: a label is waited for by what brings it on, not by the clock.
SECONDS_TO_REACH = 240.0


@dataclass
class Kill:
    """One death, or an order that was never carried out."""

    role: str
    point: str
    seconds: float = 0.0
    reached: bool = False


def points(service: str, *, rough: bool) -> list[str]:
    """Every label in the source that a service passes in this life."""
    found: set[str] = set()
    for room in ROOMS[service]:
        for file in (PACKAGE / room).rglob("*.py"):
            if file.parent.name == "slurm":
                continue  # these services run jobs with the local executor
            for label in re.findall(r'crash_point\(f?"([^"]+)"\)', file.read_text()):
                named = label.replace("{self._service}", LABELS[service])
                found |= {named.replace("{batch.kind}", kind) for kind in KINDS[service]}
    unlikely = QUEUED if rough else ROUGH
    return sorted(each for each in found - NEVER[service] if not unlikely.match(each))


def shared(labels: Sequence[str]) -> dict[str, list[str]]:
    """Labels of a calm life for its two providers, of which p0 has an executor with a queue."""
    parts: dict[str, list[str]] = {"p0": [], "p1": []}
    for label in labels:
        if QUEUED.match(label):
            parts["p0"].append(label)
        elif label.startswith("provider.claim_and_start."):
            parts["p1"].append(label)
        else:
            min(parts.values(), key=len).append(label)
    return parts


def in_order(labels: Sequence[str], dice: random.Random) -> list[str]:
    """Shuffled, but for what one silent provider sets going and what takes its time.

    The former stands first, in the order of its steps; jobs expire last.
    """
    chain = [f"scheduler.{kind}." for kind in ("challenge", "requeue", "panic")]
    first = [
        f"{start}{step}"
        for start in chain
        for step in ("planned", "confirmed")
        if f"{start}{step}" in labels
    ]
    last = [each for each in labels if each.startswith("scheduler.cancel.")]
    rest = [each for each in labels if each not in {*first, *last}]
    dice.shuffle(rest)
    return first + rest + last


async def torment(
    role: str, daemon: DaemonProcess, orders: Sequence[str], awaited: dict[str, str]
) -> list[Kill]:
    """Start and kill a daemon at each point in turn, then let it live; `awaited` says where it is."""
    kills = []
    for point in orders:
        kill, began = Kill(role, point), time.monotonic()
        awaited[role] = point
        dead = _supervisors(daemon) if point.startswith("supervisor.") else daemon.died
        daemon.start(point)
        while not kill.reached and time.monotonic() < began + SECONDS_TO_REACH:
            await asyncio.sleep(0.05)
            kill.reached = dead()
        kill.seconds = round(time.monotonic() - began, 1)
        kills.append(kill)
        daemon.kill()
    awaited.pop(role, None)
    daemon.start()
    return kills


def _supervisors(daemon: DaemonProcess) -> Callable[[], bool]:
    """Whether a supervisor of this daemon's runs died at its label from now on."""

    def count() -> int:
        logs = daemon.folder.glob("runs/*/supervisor.log")
        return sum(b"killed at supervisor." in log.read_bytes() for log in logs)

    before = count()
    return lambda: count() > before


# ------------------------------------------------------------------------------ two lives


@dataclass
class Life:
    """A grid with two providers and a scheduler, all of them processes."""

    node: Node
    grid: LiveGrid
    customers: Customers
    folder: Path
    daemons: dict[str, DaemonProcess]
    #: The label at which each role is to die now.
    awaited: dict[str, str] = field(default_factory=dict)

    def who_awaits(self, label: str) -> list[str]:
        """Roles that are to die at a label that begins so."""
        return [role for role, point in self.awaited.items() if point.startswith(label)]

    async def end(
        self, patience: float = 180, *, emptied: bool = False, redated: bool = False
    ) -> None:
        """See every job end within `patience` seconds and every daemon stop; judge the books."""
        for name, daemon in self.daemons.items():
            assert daemon.alive, f"{name} ended by itself: {daemon.log.read_text()[-2_000:]}"
        await until(self.customers.all_final, timeout=patience)
        await until(lambda: all_closed(self.grid, self.folder), timeout=60)
        for daemon in self.daemons.values():
            assert await daemon.stop() == 0
            assert "Traceback" not in daemon.log.read_text(), daemon.log
        await judge(self.customers, self.folder, emptied=emptied, redated=redated)


@asynccontextmanager
async def life(
    node: Node,
    folder: Path,
    params: GridParams = PARAMS,
    *,
    clocks: Mapping[str, float] | None = None,
    queueing: Collection[str] = (),
    **options: Any,
) -> AsyncIterator[Life]:
    """A grid on a running node; nothing of it is left afterwards.

    Providers of `queueing` have an executor with a queue of its own. `clocks` holds the seconds by which a daemon's wall clock is wrong; `options` go to providers,
    addresses of the node to the scheduler too.
    """
    wrong = clocks or {}
    confirmations = options.setdefault("confirmations", 1)
    async with live_grid(node, await deploy(node, params)) as grid:
        customers = Customers(grid, folder)
        given = {"definitions": str(customers.place), **options}
        daemons = {
            name: DaemonProcess(
                grid,
                folder / name,
                account=account,
                clock=wrong.get(name, 0.0),
                queues=name in queueing,
                **given,
            )
            for name, account in (("p0", 4), ("p1", 5))
        }
        daemons |= {
            "scheduler": DaemonProcess(
                grid,
                folder / "m",
                kind="scheduler",
                account=1,
                clock=wrong.get("scheduler", 0.0),
                confirmations=confirmations,
                **{name: options[name] for name in ("url", "websocket") if name in options},
            ),
        }
        try:
            yield Life(node, grid, customers, folder, daemons)
        finally:
            for daemon in daemons.values():
                daemon.kill()
            left = leftovers(folder)
        assert left == []


async def calm(life: Life, orders: dict[str, Sequence[str]]) -> list[Kill]:
    """Jobs of every end, and nothing else that goes wrong."""
    return await _live(life, orders, lambda busy: [in_turn(life.customers, busy)])


async def rough(life: Life, orders: dict[str, Sequence[str]]) -> list[Kill]:
    """Lost runs with successors, requeues, challenges, top-ups, spikes of the fee, replaced blocks."""
    trouble = Trouble(life)
    await trouble.begin()
    return await _live(
        life,
        orders,
        lambda busy: [
            _again(busy, act, pause, lambda brings=brings: bool(life.who_awaits(brings)))
            for act, pause, brings in (
                (trouble.ordinary, 0.0, "provider.cancel."),
                (trouble.topped_up, 1.0, "provider.extend."),
                (trouble.misfits, 0.0, "provider.requeue."),
                (trouble.challenge, 5.0, "provider.answer."),
                (trouble.spike, 15.0, "sender.replaced"),
                (trouble.replace_head, 11.0, "follower.rolled_back"),
                (trouble.ghost, 1.0, "scheduler."),
                (trouble.forgotten, 15.0, "scheduler.cancel."),
            )
        ],
        redated=True,
    )


async def _live(
    life: Life,
    orders: dict[str, Sequence[str]],
    work: Callable[[Callable[[], bool]], Sequence[Awaitable[None]]],
    *,
    redated: bool = False,
) -> list[Kill]:
    """Torment while the work goes on, and judge."""
    for name, daemon in life.daemons.items():
        if not orders.get(name):
            daemon.start()
    tasks = [
        asyncio.create_task(torment(name, life.daemons[name], points, life.awaited))
        for name, points in orders.items()
        if points
    ]
    try:
        await asyncio.gather(*work(lambda: not all(task.done() for task in tasks)))
        kills = [kill for some in await asyncio.gather(*tasks) for kill in some]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.sleep(1)
    await life.end(redated=redated)
    return kills


async def _again(
    busy: Callable[[], bool],
    act: Callable[[], Awaitable[None]],
    pause: float,
    wanted: Callable[[], bool],
) -> None:
    """Act again and again with pauses, and at once where somebody is to die of it."""
    while busy():
        await act()
        await _soon(lambda: not busy() or wanted(), patience=pause)


async def _soon(done: Callable[[], Any], patience: float = 5.0) -> None:
    """Wait until it holds, as long as there is hope."""
    with suppress(AssertionError):
        await until(done, timeout=patience)


class Trouble:
    """Everything that a calm life lacks."""

    def __init__(self, life: Life) -> None:
        self.life, self.grid, self.customers = life, life.grid, life.customers
        self.contract = life.grid.contracts.scheduler
        self.silent, self.challenger = dev_accounts()[6:8]
        self._mining = asyncio.Lock()

    async def begin(self) -> None:
        """A third provider that has no daemon; and nobody believes what may yet be replaced."""
        for account in (*self.grid.customers, self.silent, self.challenger):
            self.grid.sender(account, confirmations=1)
        registry = self.grid.contracts.registry
        await self.grid.send(self.silent, registry.register(HARDWARE, CHEAP, {"place": "nowhere"}))
        await self.grid.send(self.grid.admin, registry.approve(self.silent.address, 1))

    async def ordinary(self) -> None:
        """Jobs of every end; the last of them is cancelled once it runs."""
        wishes = [FINISHES, FAILS, RUNS_OUT, IS_COLLECTED, IS_CANCELLED]
        place = "p0" if self.life.who_awaits("provider.cancel.") else ""
        *_, doomed = await self.customers.submit(*wishes, place=place, retries=3)
        await _soon(lambda: self._runs(doomed), patience=15)
        await self.customers.cancel([doomed])
        await asyncio.sleep(2)

    async def _runs(self, digest: bytes) -> bool:
        """Whether the last job of a line really runs."""
        job = (await self.customers.lines())[digest][-1]
        return job.status is JobStatus.RUNNING and job.id in self.customers.executions()

    async def topped_up(self) -> None:
        """A job that lasts until its credits are spent gets more of them while it runs."""
        rate = job_rate(CHEAP, SMALL)
        wish = Wish("sleep 8", JobStatus.FINISHED)
        place = "p0" if self.life.who_awaits("provider.extend.") else ""
        [digest] = await self.customers.submit(
            wish, place=place, amount=rate * 180, flags=JobFlags.UNTIL_SPENT, retries=3, customer=0
        )
        deadline = time.monotonic() + 15
        while time.monotonic() < deadline:
            # Sooner, the run would begin with the new allotment, and nothing be extended.
            if await self._runs(digest):
                owner, job = self.grid.customers[0], (await self.customers.lines())[digest][-1]
                call = self.contract.top_up(job.id, owner.address, rate * 90)
                await self._try(owner, call)
                return
            await asyncio.sleep(0.3)

    async def misfits(self) -> None:
        """One whose definition asks for something else, one that has no room anywhere."""
        other = Resources(tasks=2, cpus_per_task=1, mem_per_cpu=64, gpus=0)
        large = Resources(tasks=12, cpus_per_task=1, mem_per_cpu=64, gpus=0)
        misfit = Wish("true", JobStatus.PANICKED, asked=other)
        await self.customers.submit(
            misfit, place="p0", retries=0
        )  # a successor would wait for ever
        big = Wish("true", JobStatus.CANCELLED, resources=large)
        digests = await self.customers.submit(big, place="p0")
        deadline, given = time.monotonic() + 60, False
        while time.monotonic() < deadline:
            [job] = (await self.customers.lines())[digests[0]]
            if given and job.status is JobStatus.PENDING:
                break  # p0 has given it back
            given = given or job.status is JobStatus.META_SCHEDULED
            await asyncio.sleep(0.25)
        await self.customers.cancel(digests)

    async def challenge(self) -> None:
        """Ask the tormented provider for a sign of life."""
        await asyncio.sleep(0.5)
        held = [
            job
            for job in await self.customers.live_jobs()
            if job.status.is_assigned and job.provider_id == 1
        ]
        if held:
            await self._try(self.challenger, self.contract.challenge(held[0].id))

    async def ghost(self) -> None:
        """One job that nobody claims, one that runs nowhere: the scheduler must see to both."""
        waits = Wish("true", JobStatus.CANCELLED)
        digests = await self.customers.submit(waits, waits, place="nowhere", retries=1)
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

    async def forgotten(self) -> None:
        """A job that suits nobody, and that its customer never cancels: it expires."""
        await self.customers.submit(Wish("true", JobStatus.CANCELLED), place="elsewhere")

    async def spike(self) -> None:
        """A base fee that what is under way can't pay for some blocks."""
        while await self._base_fee() * 6 < 100 * 10**9:
            await _soon(self._somebody_waits)
            async with self._no_block():
                if not await self._somebody_waits():
                    continue  # it was mined meanwhile
                fee = max(8 * 10**9, 6 * await self._base_fee())
                await self.life.node.rpc("anvil_setNextBlockBaseFeePerGas", hex(fee))
            await _soon(lambda: not self.life.who_awaits("sender.replaced"), patience=15)
            return

    async def replace_head(self) -> None:
        """Another block of the same transactions instead of the latest one."""
        async with self._no_block():
            if self.life.who_awaits("follower.rolled_back"):
                await _soon(self._p0_saw_the_head)
            await replace_blocks(self.life.node, 1, keep=True)
        await asyncio.sleep(1)

    @asynccontextmanager
    async def _no_block(self) -> AsyncIterator[None]:
        """The chain stands still meanwhile."""
        async with self._mining:
            await self.life.node.rpc("anvil_setIntervalMining", 0)
            try:
                yield
            finally:
                await self.life.node.rpc("anvil_setIntervalMining", 1)

    async def _base_fee(self) -> int:
        block = await self.life.node.rpc("eth_getBlockByNumber", "latest", False)
        return int(block["baseFeePerGas"], 16)

    async def _somebody_waits(self) -> bool:
        """Whether a transaction waits for a block: of one who is to replace it, or of anybody."""
        pool = await self.life.node.rpc("txpool_content")
        waiting = {sender.lower() for sender in pool["pending"]}
        accounts = {"p0": self.grid.providers[0], "scheduler": self.grid.scheduler}
        roles = self.life.who_awaits("sender.replaced")
        wanted = {accounts[role].address.lower() for role in roles}
        return bool(waiting & wanted if wanted else waiting)

    async def _p0_saw_the_head(self) -> bool:
        head = int(await self.life.node.rpc("eth_blockNumber"), 16)
        _, store = open_table(self.grid, self.life.folder, 0)
        with store:
            return any(block.number == head for block in store.recent_blocks("main")[:1])

    async def _try(self, account: Any, call: Any) -> bool:
        try:
            await self.grid.send(account, call)
        except GridError:
            return False  # the state has moved on, or is being replaced
        return True


async def replace_blocks(node: Node, depth: int, *, keep: bool) -> int:
    """Reorganise: the last blocks are replaced, by ones with the same transactions or by empty ones.

    Nothing else may mine meanwhile. Returns how many transactions were taken back.
    """
    head = int(await node.rpc("eth_blockNumber"), 16)
    taken = []
    for at in range(depth):
        number = head - depth + 1 + at
        block = await node.rpc("eth_getBlockByNumber", hex(number), False)
        for each in block["transactions"]:
            taken.append([await node.rpc("eth_getRawTransactionByHash", each), at])  # noqa: PERF401
    await node.rpc("anvil_reorg", depth, taken if keep else [])
    return len(taken)


def as_rows(kills: Sequence[Kill]) -> list[dict[str, Any]]:
    """For JSON."""
    return [asdict(kill) for kill in kills]
