"""A real node for tests and demos: anvil, from its npm package or wherever it is installed."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import tempfile
from pathlib import Path
from typing import IO

import httpx

from deepsquare_chain.devnet.node.base import (
    DEFAULT_CHAIN_ID,
    DEV_ACCOUNTS,
    DEV_BALANCE,
    DEV_MNEMONIC,
    Node,
)
from deepsquare_chain.devnet.node.process import ChildProcess
from deepsquare_chain.errors import EndpointError, NotFoundError, UsageError
from deepsquare_chain.observability.serving import HOST, open_listener

PACKAGE = "@foundry-rs/anvil-linux-amd64"
VARIABLE = "DEEPSQUARE_ANVIL"
_IN_PACKAGE = Path("node_modules") / PACKAGE / "bin" / "anvil"
_START_SECONDS = 20.0
_PORT_ATTEMPTS = 3


def find_anvil() -> Path:
    """The anvil program: ``DEEPSQUARE_ANVIL``, npm's package here or in the project, the PATH.

    Raises ``UsageError`` where the variable points nowhere, ``NotFoundError`` where there is none.
    """
    named = os.environ.get(VARIABLE)
    if named:
        if not _is_program(Path(named)):
            raise UsageError(
                f"{VARIABLE} names {named}, which is not a program.",
                hint=f"Point {VARIABLE} at the anvil program, or unset it.",
            )
        return Path(named).absolute()
    for folder in (Path.cwd(), Path(__file__).resolve().parents[3]):
        if _is_program(folder / _IN_PACKAGE):
            return folder / _IN_PACKAGE
    on_path = shutil.which("anvil")
    if on_path:
        return Path(on_path).absolute()
    raise NotFoundError(
        "anvil is not installed.",
        hint=f"Run `npm ci` in the project's folder (it brings {PACKAGE}), or install Foundry, "
        f"or set {VARIABLE} to the program. The embedded chain needs neither.",
    )


class Anvil(Node):
    """An anvil process on loopback, ended with this one.

    Args:
        port: On 127.0.0.1; 0 takes a free one.
        block_time: Seconds between blocks; None mines each transaction at once.
        hardfork: Rules of the EVM; cancun is what the contracts are built for.
        options: Further words of anvil's command line.
    """

    def __init__(
        self,
        *,
        port: int = 0,
        chain_id: int = DEFAULT_CHAIN_ID,
        block_time: int | None = 1,
        hardfork: str = "cancun",
        options: tuple[str, ...] = (),
    ) -> None:
        super().__init__(chain_id)
        self._port = port
        self._block_time = block_time
        self._hardfork = hardfork
        self._options = options
        self._child: ChildProcess | None = None
        self._words: IO[bytes] | None = None

    async def start(self) -> None:
        """Raises ``NotFoundError`` without anvil, ``UsageError`` for a port that can't be had."""
        program = find_anvil()
        attempts = _PORT_ATTEMPTS if self._port == 0 else 1
        for attempt in range(attempts):
            port = _claim(self._port)
            await self._spawn(program, port)
            if await self._answers():
                return
            words = self._last_words()
            await self.stop()
            # Between choosing a free port and anvil's taking it, somebody may have been faster.
            if "in use" not in words or attempt + 1 == attempts:
                raise EndpointError(f"anvil did not start on port {port}: {words}")

    async def stop(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            await child.end()
        if self._words is not None:
            self._words.close()
            self._words = None

    async def _spawn(self, program: Path, port: int) -> None:
        pace = [] if self._block_time is None else ["--block-time", str(self._block_time)]
        self._words = tempfile.TemporaryFile()  # noqa: SIM115 - closed by stop()
        self._child = await ChildProcess.spawn(
            [
                *(program, "--silent", "--host", HOST, "--port", str(port)),
                *("--chain-id", str(self.chain_id), "--hardfork", self._hardfork),
                *("--mnemonic", DEV_MNEMONIC, "--accounts", str(DEV_ACCOUNTS + 1)),
                *("--balance", str(DEV_BALANCE // 10**18), "--gas-limit", "60000000"),
                *pace,
                *self._options,
            ],
            stdout=self._words,
            stderr=self._words,
        )
        self.url = f"http://{HOST}:{port}"
        self.pid = self._child.pid

    async def _answers(self) -> bool:
        """Wait until it speaks for our chain; False once it has ended or time is up."""
        assert self._child is not None  # noqa: S101 - just spawned
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _START_SECONDS
        body = {"jsonrpc": "2.0", "id": 1, "method": "eth_chainId", "params": []}
        async with httpx.AsyncClient(timeout=2, trust_env=False) as client:
            while loop.time() < deadline and self._child.returncode is None:
                try:
                    answer = (await client.post(self.url, json=body)).json()
                    return bool(int(answer["result"], 16) == self.chain_id)
                except (httpx.HTTPError, ValueError, KeyError):
                    await asyncio.sleep(0.02)
        return False

    def _last_words(self) -> str:
        if self._words is None:
            return ""
        self._words.seek(0)
        return self._words.read(2_000).decode("utf-8", "replace").strip() or "it said nothing."


def _claim(port: int) -> int:
    """A port that is free at this moment; ``UsageError`` where the wanted one is not."""
    listener: socket.socket = open_listener(port)
    with listener:
        return int(listener.getsockname()[1])


def _is_program(path: Path) -> bool:
    return path.is_file() and os.access(path, os.X_OK)
