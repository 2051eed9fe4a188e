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

from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.chain.transactions.sender import Sender
from deepsquare_chain.daemon.loop import BackgroundTasks
from deepsquare_chain.errors import GridError
from deepsquare_chain.executors.base import Executor, RunSpec, RunState
from deepsquare_chain.job import Hardware, Offer, ProviderStatus, Resources
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


def target_offer(hardware: Offer, free: Offer, grid_usage: Offer) -> Offer:
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


def capacity_in_use(views: Iterable[View]) -> Offer:
    """Return the capacity that the grid's running jobs use in the cluster."""
    resources = [
        view.job.resources
        for view in views
        if view.status is not None and view.status.state is RunState.RUNNING
    ]
    return Offer(
        cpus=sum(needed.cpus for needed in resources),
        memory=sum(needed.memory for needed in resources),
        gpus=sum(needed.gpus for needed in resources),
    )


class OfferFollower:
    """Updates a provider's offer periodically, in the background.

    Args:
        contracts: Contracts of the grid.
        sender: The only transaction sender of this account.
        timeout: Seconds to wait for a receipt.
        interval: Minimum seconds between two checks.
    """

    def __init__(
        self,
        contracts: Contracts,
        sender: Sender,
        *,
        timeout: float,
        interval: float = _OFFER_INTERVAL,
    ) -> None:
        self._contracts = contracts
        self._sender = sender
        self._timeout = timeout
        self._interval = interval
        self._checked_at = float("-inf")
        self._tasks = BackgroundTasks()

    def follow(self, free: Offer | None, grid_usage: Offer) -> None:
        """Begin a change of the offer, if due; a cluster that does not answer offers nothing."""
        self._tasks.collect()
        now = time.monotonic()
        if self._tasks or now - self._checked_at < self._interval:
            return
        self._checked_at = now
        self._tasks.begin(self._change(free or Offer(0, 0, 0), grid_usage), [])

    async def close(self) -> None:
        """Wait for the change that is being sent."""
        await self._tasks.wait()
        self._tasks.cancel_all()

    async def _change(self, free: Offer, grid_usage: Offer) -> int:
        registry = self._contracts.registry
        try:
            provider = await registry.provider_of(self._sender.address)
            hardware = total_capacity(provider.hardware)
            target = target_offer(hardware, free, grid_usage)
            if provider.status is not ProviderStatus.ACTIVE or not is_worth_a_change(
                provider.offer, target
            ):
                return 0
            receipt = await self._sender.send(registry.set_offer(target), timeout=self._timeout)
        except GridError as error:
            _log.warning("offer not changed", error=error.message, hint=error.hint)
            return 0
        _log.info("offer changed", offer=str(target), block=receipt.block_number)
        return 1


# -- maintenance of a provider: its status on chain, which commands and signals can change


class Maintenance:
    """Follows and changes whether the provider drains.

    A draining provider finishes its runs, requeues jobs without a run, and is assigned no jobs.

    Args:
        contracts: Contracts of the grid.
        sender: The only transaction sender of this account.
        timeout: Seconds to wait for a receipt.
    """

    def __init__(self, contracts: Contracts, sender: Sender, *, timeout: float) -> None:
        self._contracts = contracts
        self._sender = sender
        self._timeout = timeout
        self._on_chain = False
        self._requested: bool | None = None
        self._tasks = BackgroundTasks()

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
        self._tasks.begin(self._send(draining), [])

    async def close(self) -> None:
        """Wait for the change that is being sent."""
        await self._tasks.wait()
        self._tasks.cancel_all()

    async def _send(self, draining: bool) -> int:
        call = self._contracts.registry.set_draining(draining)
        try:
            receipt = await self._sender.send(call, timeout=self._timeout)
        except GridError as error:
            self._requested = None
            _log.error(
                "maintenance not changed",
                draining=draining,
                error=error.message,
                hint=error.hint or "Send the signal again, or use `deepsquare provider drain`.",
            )
            return 0
        _log.info("maintenance changed", draining=draining, block=receipt.block_number)
        self._on_chain, self._requested = draining, None
        return 1


async def probe_abilities(executor: Executor, *, wait: float = 0.5) -> dict[str, str]:
    """Return every ability with `yes`, or with the reason why jobs lack it.

    Args:
        executor: Executor that runs the jobs.
        wait: Seconds between two polls of the run.

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
    return (
        kept
        | dict(own or {})
        | dict(label_of(name) for name, state in abilities.items() if state == _YES)
    )


class AbilityPublisher:
    """Tests the abilities of an executor periodically, in the background, and publishes them.

    Args:
        executor: Executor that runs the jobs.
        contracts: Contracts of the grid.
        sender: The only transaction sender of this account.
        timeout: Seconds to wait for a receipt.
        own: Returns additional labels to publish.
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
        self._own_labels = own
        self._executor = executor
        self._contracts = contracts
        self._sender = sender
        self._timeout = timeout
        self._next_test_at = float("-inf")
        self._tasks = BackgroundTasks()
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
        """Publish again if labels that were published are missing, as after `provider labels`.

        Args:
            labels: Labels of the provider on chain.
        """
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
        registry = self._contracts.registry
        provider = await registry.provider_of(self._sender.address)
        own = await asyncio.to_thread(self._own_labels)
        self._published = labels_with({}, self.results, own)
        labels = labels_with(provider.labels, self.results, own)
        if labels == dict(provider.labels):
            return
        receipt = await self._sender.send(registry.set_labels(labels), timeout=self._timeout)
        _log.info("abilities published", block=receipt.block_number)
