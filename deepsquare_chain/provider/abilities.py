"""Tests the abilities of jobs at a provider, and publishes them as labels.

The test is a run of the executor, as a job is, so that its results hold for jobs, also on the nodes
of a cluster and in a sandbox.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Final

from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.chain.transactions.sender import Sender
from deepsquare_chain.daemon.loop import BackgroundTasks
from deepsquare_chain.errors import GridError
from deepsquare_chain.executors.base import Executor, RunSpec, RunState
from deepsquare_chain.job import Resources
from deepsquare_chain.observability import get_logger
from deepsquare_chain.workflow.abilities import ABILITIES, LABEL_PREFIX, label_of

#: Seconds between two tests.
_TEST_INTERVAL: Final = 6 * 3_600.0
#: Seconds before a failed test is retried.
_RETRY: Final = 300.0
#: Time limit of the test's run, in seconds.
_WALLTIME: Final = 600
_SIZE: Final = Resources(tasks=1, cpus_per_task=1, mem_per_cpu=256, gpus=0)
_PAGE: Final = 65_536
_LINE: Final = re.compile(r"ability (\S+) (yes|no)(?: (.*))?")
_YES: Final = "yes"
_log = get_logger(__name__)


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
            resources=_SIZE,
            walltime=_WALLTIME,
            env={},
            comment="test of abilities",
        )
    )
    try:
        while (await executor.poll([handle]))[handle].state is not RunState.ENDED:  # noqa: ASYNC110
            await asyncio.sleep(wait)  # an executor must be polled
        output = await executor.output(handle, 0, _PAGE)
    except asyncio.CancelledError:
        await executor.cancel(handle)
        raise
    await executor.forget(handle)
    return read_abilities(output.decode(errors="replace"))


def read_abilities(output: str) -> dict[str, str]:
    """Return the abilities in the test's output; those not named count as not tested."""
    abilities = dict.fromkeys(ABILITIES, "not tested")
    for line in output.splitlines():
        match = _LINE.fullmatch(line.strip())
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
        self.found: dict[str, str] = {}

    @property
    def usable(self) -> frozenset[str] | None:
        """Abilities that the last test found; None before the first one has ended."""
        if not self.found:
            return None
        return frozenset(name for name, state in self.found.items() if state == _YES)

    def follow(self) -> None:
        """Begin a test in the background, if one is due."""
        self._tasks.collect()
        now = time.monotonic()
        if self._tasks or now < self._next_test_at:
            return
        self._next_test_at = now + _RETRY
        self._tasks.begin(self._test(), [])

    async def close(self) -> None:
        """Cancel a test that is under way."""
        self._tasks.cancel_all()
        await self._tasks.wait()

    async def _test(self) -> int:
        try:
            self.found = await probe_abilities(self._executor)
            _log.info("abilities tested", found=",".join(sorted(self.usable or ())))
            await self._publish()
        except GridError as error:
            _log.warning("abilities not published", error=error.message, hint=error.hint)
            return 0
        self._next_test_at = time.monotonic() + _TEST_INTERVAL
        return 1

    async def _publish(self) -> None:
        registry = self._contracts.registry
        provider = await registry.provider_of(self._sender.address)
        labels = labels_with(provider.labels, self.found, await asyncio.to_thread(self._own_labels))
        if labels == dict(provider.labels):
            return
        receipt = await self._sender.send(registry.set_labels(labels), timeout=self._timeout)
        _log.info("abilities published", block=receipt.block_number)
