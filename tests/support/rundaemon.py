"""Daemons as separate processes that can be killed and restarted many times per minute.

They are forked from a server that has imported all modules, so a restart takes milliseconds.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Self

from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.devnet.node.base import dev_accounts
from deepsquare_chain.errors import GridError
from deepsquare_chain.executors.base import ExecutorContext
from deepsquare_chain.executors.isolation import LocalOptions, isolate
from deepsquare_chain.executors.local import LocalExecutor
from deepsquare_chain.faults import VARIABLE
from deepsquare_chain.job import Offer
from deepsquare_chain.metascheduler.liveness import Watch
from deepsquare_chain.metascheduler.service import SchedulerSettings, run_scheduler
from deepsquare_chain.observability import configure_logging
from deepsquare_chain.provider.service import ProviderSettings, run_provider
from deepsquare_chain.store.definitions import FolderDefinitionStore
from tests.support.cli import FORKS
from tests.support.isolation import ALLOWED
from tests.support.livegrid import LiveGrid

CAPACITY = Offer(cpus=8, memory=4096, gpus=0)


class DaemonProcess:
    """A daemon of a grid in a process; its log is next to its state folder.

    Args:
        kind: provider or scheduler.
        account: Index of the wallet among the development accounts.
        clock: Offset of its wall clock in seconds.
        options: Additional arguments of the function of this kind.
    """

    def __init__(
        self,
        grid: LiveGrid,
        folder: Path,
        *,
        kind: str = "provider",
        account: int = 4,
        clock: float = 0.0,
        **options: Any,
    ) -> None:
        self._clock = clock
        self.folder = folder
        self.log = folder.with_name(f"{folder.name}.log")
        self._arguments = {
            "url": grid.node.url,
            "deployment": grid.deployment.to_json(),
            "account": account,
            "folder": str(folder),
            **options,
        }
        self._kind = kind
        self._process: BaseProcess | None = None

    def start(self, crash_at: str = "") -> None:
        """Start the daemon; with a label, it is killed at that crash point."""
        arguments = (self._kind, self._arguments, crash_at, self._clock, str(self.log))
        self._process = FORKS.Process(target=_main, args=arguments, daemon=True)
        self._process.start()

    @property
    def pid(self) -> int:
        """PID of the running process."""
        assert self._process is not None
        assert self._process.pid is not None
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.is_alive()

    def died(self) -> bool:
        """Whether it was killed by SIGKILL."""
        return self._process is not None and self._process.exitcode == -signal.SIGKILL

    def kill(self) -> None:
        """Kill it with SIGKILL, as a power cut would."""
        if self._process is not None:
            self._process.kill()
            self._process.join(10)

    async def stop(self) -> int:
        """Stop it with SIGTERM, as an operator would, and return its exit code."""
        assert self._process is not None
        self._process.terminate()
        await asyncio.to_thread(self._process.join, 60)
        assert self._process.exitcode is not None, "it does not stop"
        return self._process.exitcode

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.kill()


async def until(condition: Callable[[], Any], *, timeout: float = 120.0) -> None:
    """Wait until `condition()`, which may be a coroutine function, returns True."""
    deadline = time.monotonic() + timeout
    while True:
        result = condition()
        if await result if asyncio.iscoroutine(result) else result:
            return
        assert time.monotonic() < deadline, f"not reached in {timeout:.0f} seconds"
        await asyncio.sleep(0.1)


def _main(kind: str, arguments: dict[str, Any], crash_at: str, clock: float, log: str) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.pop(VARIABLE, None)
    if crash_at:
        os.environ[VARIABLE] = crash_at
    if clock:
        system_time = time.time
        time.time = lambda: system_time() + clock
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(handle, sys.stdout.fileno())
    os.dup2(handle, sys.stderr.fileno())
    configure_logging("debug", "console")
    try:
        asyncio.run(_KINDS[kind](**arguments))
    except GridError as error:  # like the command
        print(error.message, error.hint, sep="\n", flush=True)
        sys.exit(error.exit_code)


async def _provider(
    url: str,
    deployment: str,
    account: int,
    folder: str,
    definitions: str,
    confirmations: int = 1,
    min_free: int = 64,
    health_port: int | None = None,
    websocket: str | None = None,
    queues: bool = False,
) -> None:
    await run_provider(
        url,
        Deployment.from_json(deployment),
        dev_accounts()[account],
        FolderDefinitionStore(definitions),
        executor=_queueing_executor(Path(folder)) if queues else None,
        settings=ProviderSettings(
            state_dir=Path(folder),
            capacity=CAPACITY,
            poll_interval=0.2,
            confirmations=confirmations,
            min_free=min_free,
            health_port=health_port,
            websocket=websocket,
            coin_value=0,  # do not compare gas with interim payments
            executor_options={"writable": _writable(Path(folder))},
            **ALLOWED,
        ),
    )


def _writable(folder: Path) -> list[str]:
    """Return the folder in which jobs record their executions."""
    return [str(folder.parent / "tally")]


def _queueing_executor(folder: Path) -> QueueingExecutor:
    options = LocalOptions.model_validate({"writable": _writable(folder)})
    isolation = isolate(options, ExecutorContext(folder, CAPACITY, **ALLOWED))
    return QueueingExecutor(folder, CAPACITY, isolation=isolation)


class QueueingExecutor(LocalExecutor):
    """The local executor, declared as an executor with a queue; jobs do not wait in it."""

    queues = True


async def _scheduler(
    url: str,
    deployment: str,
    account: int,
    folder: str,
    confirmations: int = 1,
    websocket: str | None = None,
) -> None:
    await run_scheduler(
        url,
        Deployment.from_json(deployment),
        dev_accounts()[account],
        SchedulerSettings(
            state_dir=Path(folder),
            poll_interval=0.2,
            confirmations=confirmations,
            # Tests let providers miss timeouts on purpose: the scheduler must not put them on cooldown.
            watch=Watch(strikes=1_000_000),
            websocket=websocket,
        ),
    )


_KINDS = {"provider": _provider, "scheduler": _scheduler}
