"""Daemons as processes of their own, to be killed and started again."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from deepsquare_chain.chain.deployment import Deployment
from deepsquare_chain.devnet.node import dev_accounts
from deepsquare_chain.job import Offer
from deepsquare_chain.observe import configure_logging
from deepsquare_chain.observe.faults import VARIABLE
from deepsquare_chain.provider.runner import run_provider
from deepsquare_chain.provider.service import ProviderSettings
from deepsquare_chain.store.definitions import FolderDefinitionStore
from tests.support.livegrid import LiveGrid

ROOT = Path(__file__).resolve().parents[2]
CAPACITY = Offer(cpus=8, memory=4096, gpus=0)


class DaemonProcess:
    """A provider's daemon in a process; its log is beside its state folder."""

    def __init__(
        self, grid: LiveGrid, folder: Path, definitions: Path, *, number: int = 0, **more: Any
    ) -> None:
        self.log = folder.with_name(f"{folder.name}.log")
        self._arguments = {
            "kind": "provider",
            "url": grid.node.url,
            "deployment": grid.deployment.to_json(),
            "account": 4 + number,
            "folder": str(folder),
            "definitions": str(definitions),
            **more,
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, crash_at: str = "") -> None:
        """Start it; with a label it dies at that crash point."""
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        env.pop(VARIABLE, None)
        if crash_at:
            env[VARIABLE] = crash_at
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.rundaemon", json.dumps(self._arguments)],
                cwd=ROOT,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """End it as a power cut would."""
        if self._process is not None and self.alive:
            self._process.kill()
        self.wait()

    def wait(self, timeout: float = 30.0) -> int:
        """Its exit code, negative for a signal."""
        assert self._process is not None
        return self._process.wait(timeout)

    def stop(self) -> None:
        """End it as an operator would."""
        if self._process is not None and self.alive:
            self._process.send_signal(signal.SIGTERM)
        self.wait()

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._process is not None:
            self.kill()


async def until(done: Callable[[], Any], *, timeout: float = 40.0) -> None:
    """Wait until `done()`, which may be a coroutine function, holds."""
    deadline = time.monotonic() + timeout
    while True:
        answer = done()
        if await answer if asyncio.iscoroutine(answer) else answer:
            return
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)


async def _provider(arguments: dict[str, Any]) -> None:
    await run_provider(
        arguments["url"],
        Deployment.from_json(arguments["deployment"]),
        dev_accounts()[arguments["account"]],
        FolderDefinitionStore(arguments["definitions"]),
        ProviderSettings(
            state_dir=Path(arguments["folder"]),
            capacity=CAPACITY,
            poll_interval=0.2,
            confirmations=arguments.get("confirmations", 1),
        ),
    )


if __name__ == "__main__":
    configure_logging("debug", "console")
    asyncio.run(_provider(json.loads(sys.argv[1])))
