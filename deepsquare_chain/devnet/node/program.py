"""A node that runs as a separate program on a loopback port, and ends with this process."""

from __future__ import annotations

import asyncio
import socket
import tempfile
from abc import abstractmethod
from pathlib import Path
from typing import IO, Final

import httpx2

from deepsquare_chain.devnet.node.base import Node
from deepsquare_chain.devnet.node.process import ChildProcess
from deepsquare_chain.errors import EndpointError
from deepsquare_chain.observability.serving import HOST, open_listener

_PORT_ATTEMPTS: Final = 3


class ProgramNode(Node):
    """Runs the program of a node; subclasses define its command.

    Attributes:
        name: Name of the program in messages.
        start_seconds: Start timeout in seconds.
        folder: Working folder of the program; None for that of this process.
    """

    name = "the node"
    start_seconds = 20.0
    folder: Path | None = None

    def __init__(self, chain_id: int, *, port: int = 0) -> None:
        super().__init__(chain_id)
        self._port = port
        self._child: ChildProcess | None = None
        self._words: IO[bytes] | None = None

    @abstractmethod
    def command(self, port: int) -> list[str | Path]:
        """Return the command that serves JSON-RPC on this port of 127.0.0.1.

        Raises:
            NotFoundError: The program is not installed.
        """

    async def start(self) -> None:
        """Start the program.

        Raises ``NotFoundError`` if it is not installed, ``UsageError`` if the port is not available,
        and ``EndpointError`` if it did not start.
        """
        attempts = _PORT_ATTEMPTS if self._port == 0 else 1
        for attempt in range(attempts):
            port = free_port(self._port)
            await self._spawn(self.command(port), port)
            if await self._answers():
                return
            output = self._last_words()
            await self.stop()
            # Another process may have taken the port since it was found free.
            if "in use" not in output or attempt + 1 == attempts:
                raise EndpointError(f"{self.name} did not start on port {port}: {output}")

    async def stop(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            await child.end()
        if self._words is not None:
            self._words.close()
            self._words = None

    async def _spawn(self, command: list[str | Path], port: int) -> None:
        self._words = tempfile.TemporaryFile()  # noqa: SIM115 - closed by stop()
        self._child = await ChildProcess.spawn(
            command, stdout=self._words, stderr=self._words, cwd=self.folder
        )
        self.url = f"http://{HOST}:{port}"
        self.pid = self._child.pid

    async def _answers(self) -> bool:
        """Wait until the node serves our chain; return False if it ended or timed out."""
        assert self._child is not None  # noqa: S101 - just spawned
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.start_seconds
        body = {"jsonrpc": "2.0", "id": 1, "method": "eth_chainId", "params": []}
        async with httpx2.AsyncClient(timeout=2, trust_env=False) as client:
            while loop.time() < deadline and self._child.returncode is None:
                try:
                    response = (await client.post(self.url, json=body)).json()
                    return bool(int(response["result"], 16) == self.chain_id)
                except (httpx2.HTTPError, ValueError, KeyError):
                    await asyncio.sleep(0.02)
        return False

    def _last_words(self) -> str:
        if self._words is None:
            return ""
        self._words.seek(0)
        return self._words.read(2_000).decode("utf-8", "replace").strip() or "it said nothing."


def free_port(port: int = 0) -> int:
    """Return a port that is free now; raises ``UsageError`` if the requested one is not."""
    listener: socket.socket = open_listener(port)
    with listener:
        return int(listener.getsockname()[1])
