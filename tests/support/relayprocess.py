"""`deepsquare relay serve` as a process that can be killed at a crash point and restarted."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path

from deepsquare_chain.faults import VARIABLE
from deepsquare_chain.observability.serving import open_listener
from tests.support.cli import PROGRAM, clean_environment
from tests.support.livegrid import LiveGrid


class RelayProcess:
    """The process of a relay; port and state stay the same across restarts.

    Args:
        grid: The grid of the relay.
        folder: Folder of its wallet, state and log.
    """

    def __init__(self, grid: LiveGrid, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        with open_listener(0) as listener:
            self._port = listener.getsockname()[1]
        grid.deployment.save(folder / "deployment.json")
        self._environment = {
            **clean_environment(folder),
            "DEEPSQUARE_ENDPOINT": grid.node.url,
            "DEEPSQUARE_DEPLOYMENT": str(folder / "deployment.json"),
            "DEEPSQUARE_STATE_DIR": str(folder / "state"),
            "DEEPSQUARE_KEYSTORE": str(folder / "wallet.json"),
            "DEEPSQUARE_PASSWORD_FILE": str(folder / "password"),
            "DEEPSQUARE_POLL_INTERVAL": "0.2",
        }
        self._process: asyncio.subprocess.Process | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    async def start(self, crash_at: str = "") -> None:
        """Start the relay, with a crash point if given; return when it serves requests."""
        with (self._folder / "log").open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *PROGRAM,
                *("relay", "serve", "--port", str(self._port), "-o", "json"),
                cwd=self._folder,
                env={**self._environment, VARIABLE: crash_at},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        assert self._process.stdout is not None
        line = await asyncio.wait_for(self._process.stdout.readline(), 60)
        assert line, (self._folder / "log").read_text()
        assert json.loads(line)["url"] == self.url

    async def killed(self) -> None:
        """Wait until the crash point has killed it."""
        assert self._process is not None
        assert await asyncio.wait_for(self._process.wait(), 60) == -signal.SIGKILL

    async def stop(self) -> None:
        """Stop it with SIGTERM."""
        if self._process is not None and self._process.returncode is None:
            os.kill(self._process.pid, signal.SIGTERM)
            await asyncio.wait_for(self._process.wait(), 30)
