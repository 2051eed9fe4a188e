"""A provider on chain: its offer, its maintenance, and the labels of its tested abilities.

The offer follows the capacity left free. A test job shows which abilities of jobs work here.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.resources import files
from typing import Final

from deepsquare_chain.chain.bindings.calls import Call
from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.chain.transactions.sender import Sender
from deepsquare_chain.daemon.loop import BackgroundTasks
from deepsquare_chain.errors import GridError
from deepsquare_chain.executors.base import Executor, RunSpec, RunState
from deepsquare_chain.job import (
    NO_LOAD,
    Hardware,
    Load,
    Offer,
    Provider,
    ProviderStatus,
    Resources,
)
from deepsquare_chain.observability import get_logger
from deepsquare_chain.provider.model import View
from deepsquare_chain.workflow.abilities import ABILITIES, LABEL_PREFIX, label_of

#: Minimum seconds between two changes, because each of them costs gas.
_OFFER_INTERVAL: Final = 120.0
#: The offer is changed when it is wrong by at least 1/8.
_TOLERANCE: Final = 8

#: Seconds between two tests.
_TEST_INTERVAL: Final = 6 * 3_600.0
#: Seconds before a failed test is retried.
_TEST_RETRY: Final = 300.0
#: Time limit of the test's run, in seconds.
_TEST_WALLTIME: Final = 600
_TEST_RESOURCES: Final = Resources(tasks=1, cpus_per_task=1, mem_per_cpu=256, gpus=0)
_READ_BYTES: Final = 65_536
_RESULT_LINE: Final = re.compile(r"ability (\S+) (yes|no)(?: (.*))?")
_YES: Final = "yes"
_log = get_logger(__name__)


def total_capacity(hardware: Hardware) -> Offer:
    """Return the total hardware of a cluster; memory in MB."""
    nodes = hardware.nodes
    return Offer(
        cpus=nodes * hardware.cpus_per_node,
        memory=nodes * hardware.mem_per_node,
        gpus=nodes * hardware.gpus_per_node,
    )


def target_offer(hardware: Offer, free: Offer, grid_usage: Load) -> Offer:
    """Return free capacity plus that of the grid's jobs, at most the registered hardware."""
    return Offer(
        cpus=min(hardware.cpus, free.cpus + grid_usage.cpus),
        memory=min(hardware.memory, free.memory + grid_usage.memory),
        gpus=min(hardware.gpus, free.gpus + grid_usage.gpus),
    )


def is_worth_a_change(current: Offer, target: Offer) -> bool:
    """Return whether the offer of any resource is wrong by an eighth or more."""
    return any(
        offered != target and abs(offered - target) * _TOLERANCE >= max(offered, target)
        for offered, target in (
            (current.cpus, target.cpus),
            (current.memory, target.memory),
            (current.gpus, target.gpus),
        )
    )


def capacity_in_use(views: Iterable[View]) -> Load:
    """Return the capacity that the grid's running jobs use in the cluster."""
    running = (
        view.job.resources
        for view in views
        if view.status is not None and view.status.state is RunState.RUNNING
    )
    return sum(map(Load.of, running), NO_LOAD)


class _RegistryUpdater:
    """Changes the registry's record of this provider, in the background.

    Args:
        contracts: Contracts of the grid.
        sender: The only transaction sender of this account.
        timeout: Seconds to wait for a receipt.
    """

    def __init__(self, contracts: Contracts, sender: Sender, *, timeout: float) -> None:
        self._registry = contracts.registry
        self._sender = sender
        self._timeout = timeout
        self._tasks = BackgroundTasks()

    async def close(self) -> None:
        """Wait for the change that is being sent."""
        await self._tasks.wait()
        self._tasks.cancel_all()

    async def _record(self) -> Provider:
        return await self._registry.provider_of(self._sender.address)

    async def _send(self, call: Call) -> int:
        """Send a change, and return the block that contains it."""
        return (await self._sender.send(call, timeout=self._timeout)).block_number


class OfferFollower(_RegistryUpdater):
    """Updates a provider's offer periodically."""

    _interval = _OFFER_INTERVAL
    _checked_at = float("-inf")

    def follow(self, free: Offer | None, grid_usage: Load) -> None:
        """Begin a change of the offer, if due; a cluster that does not answer offers nothing."""
        self._tasks.collect()
        now = time.monotonic()
        if self._tasks or now - self._checked_at < self._interval:
            return
        self._checked_at = now
        self._tasks.begin(self._change(free or Offer(0, 0, 0), grid_usage), [])

    async def _change(self, free: Offer, grid_usage: Load) -> int:
        try:
            provider = await self._record()
            target = target_offer(total_capacity(provider.hardware), free, grid_usage)
            is_active = provider.status is ProviderStatus.ACTIVE
            if not is_active or not is_worth_a_change(provider.offer, target):
                return 0
            block = await self._send(self._registry.set_offer(target))
        except GridError as error:
            _log.warning("offer not changed", error=error.message, hint=error.hint)
            return 0
        _log.info("offer changed", offer=str(target), block=block)
        return 1


class Maintenance(_RegistryUpdater):
    """Follows and changes whether the provider drains: commands and signals can change it.

    A draining provider finishes its runs, requeues jobs without a run, and is assigned no jobs.
    """

    _on_chain = False
    _requested: bool | None = None

    @property
    def draining(self) -> bool:
        """Whether no new runs begin; a requested change counts before it is mined."""
        return self._on_chain if self._requested is None else self._requested

    def apply_status(self, status: ProviderStatus) -> None:
        """Apply the provider's status in the registry."""
        self._tasks.collect()
        draining = status is ProviderStatus.DRAINING
        if draining != self._on_chain:
            self._on_chain = draining
            _log.info("maintenance began" if draining else "maintenance ended")
        if not self._tasks:
            self._requested = None

    def request(self, *, draining: bool) -> None:
        """Send a change, as `provider drain` and `provider resume` do; one at a time."""
        self._tasks.collect()
        if self._tasks:
            _log.warning("maintenance change pending", draining=self.draining)
            return
        _log.info("maintenance requested", draining=draining)
        self._requested = draining
        self._tasks.begin(self._change(draining), [])

    async def _change(self, draining: bool) -> int:
        try:
            block = await self._send(self._registry.set_draining(draining))
        except GridError as error:
            self._requested = None
            _log.error(
                "maintenance not changed",
                draining=draining,
                error=error.message,
                hint=error.hint or "Send the signal again, or use `deepsquare provider drain`.",
            )
            return 0
        _log.info("maintenance changed", draining=draining, block=block)
        self._on_chain, self._requested = draining, None
        return 1


async def probe_abilities(executor: Executor, *, wait: float = 0.5) -> dict[str, str]:
    """Return every ability with `yes`, or with the reason why jobs lack it.

    `wait` is the number of seconds between two polls of the run.

    Raises:
        ExecutorError: The executor can't run the test now.
    """
    # Networks are tested by the functions that make them for jobs.
    script = b"".join(
        files(f"deepsquare_chain.{package}").joinpath(name).read_bytes()
        for package, name in (("workflow", "networks.sh"), ("provider", "abilities.sh"))
    )
    handle = await executor.submit(
        RunSpec(
            key=f"abilities-{time.time_ns()}",
            script=script,
            resources=_TEST_RESOURCES,
            walltime=_TEST_WALLTIME,
            env={},
            comment="test of abilities",
        )
    )
    try:
        while (await executor.poll([handle]))[handle].state is not RunState.ENDED:  # noqa: ASYNC110
            await asyncio.sleep(wait)  # an executor must be polled
        output = await executor.output(handle, 0, _READ_BYTES)
    except asyncio.CancelledError:
        await executor.cancel(handle)
        raise
    await executor.forget(handle)
    return read_abilities(output.decode(errors="replace"))


def read_abilities(output: str) -> dict[str, str]:
    """Return the abilities in the test's output; those not named count as not tested."""
    abilities = dict.fromkeys(ABILITIES, "not tested")
    for line in output.splitlines():
        match = _RESULT_LINE.fullmatch(line.strip())
        if match and match[1] in abilities:
            abilities[match[1]] = _YES if match[2] == "yes" else (match[3] or "no").strip()[:200]
    return abilities


def labels_with(
    labels: Mapping[str, str], abilities: Mapping[str, str], own: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return a provider's labels, updated with `own` and with its ability labels replaced."""
    kept = {key: value for key, value in labels.items() if not key.startswith(LABEL_PREFIX)}
    usable = dict(label_of(name) for name, state in abilities.items() if state == _YES)
    return kept | dict(own or {}) | usable


class AbilityPublisher(_RegistryUpdater):
    """Tests the abilities of an executor periodically, and publishes them as labels.

    `own` returns additional labels to publish.
    """

    def __init__(
        self,
        executor: Executor,
        contracts: Contracts,
        sender: Sender,
        *,
        timeout: float,
        own: Callable[[], Mapping[str, str]] = dict,
    ) -> None:
        super().__init__(contracts, sender, timeout=timeout)
        self._own_labels = own
        self._executor = executor
        self._next_test_at = float("-inf")
        #: Every ability with `yes` or a reason; empty until the first test has ended.
        self.results: dict[str, str] = {}
        self._published: dict[str, str] = {}

    @property
    def usable(self) -> frozenset[str] | None:
        """Abilities that the last test found; None before the first one has ended."""
        if not self.results:
            return None
        return frozenset(name for name, state in self.results.items() if state == _YES)

    def follow(self) -> None:
        """Begin a test in the background, if one is due."""
        self._tasks.collect()
        now = time.monotonic()
        if self._tasks or now < self._next_test_at:
            return
        self._next_test_at = now + _TEST_RETRY
        self._tasks.begin(self._test(), [])

    def restore(self, labels: Mapping[str, str]) -> None:
        """Publish again if `labels`, those on chain, lack some, as after `provider labels`."""
        if not self._tasks and self._published.items() - labels.items():
            self._tasks.begin(self._try_to_publish(), [])

    async def close(self) -> None:
        """Cancel a test that is under way."""
        self._tasks.cancel_all()
        await self._tasks.wait()

    async def _try_to_publish(self) -> int:
        try:
            await self._publish()
        except GridError as error:
            _log.warning("abilities not published", error=error.message, hint=error.hint)
            return 0
        return 1

    async def _test(self) -> int:
        try:
            self.results = await probe_abilities(self._executor)
        except GridError as error:
            _log.warning("abilities not published", error=error.message, hint=error.hint)
            return 0
        _log.info("abilities tested", found=",".join(sorted(self.usable or ())))
        if await self._try_to_publish():
            self._next_test_at = time.monotonic() + _TEST_INTERVAL
        return 1

    async def _publish(self) -> None:
        provider = await self._record()
        own = await asyncio.to_thread(self._own_labels)
        self._published = labels_with({}, self.results, own)
        labels = labels_with(provider.labels, self.results, own)
        if labels == dict(provider.labels):
            return
        _log.info("abilities published", block=await self._send(self._registry.set_labels(labels)))
