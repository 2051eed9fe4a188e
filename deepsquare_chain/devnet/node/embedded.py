"""The embedded chain: a node that runs in this process or in a child process.

``python -m deepsquare_chain.devnet.node.embedded --port 8545`` prints one JSON line when it is ready.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress

# The C keccak is seven times faster than the Python one, and half of the EVM's work is keccak.
if importlib.util.find_spec("sha3") is not None:
    os.environ.setdefault("ETH_HASH_BACKEND", "pysha3")

from deepsquare_chain.devnet.node.base import (
    DEFAULT_CHAIN_ID,
    DEV_BALANCE,
    ChildProcess,
    Node,
    dev_accounts,
)
from deepsquare_chain.devnet.node.core import Core, Worker
from deepsquare_chain.devnet.node.methods import Methods, rpc_app
from deepsquare_chain.errors import EndpointError, GridError, UsageError
from deepsquare_chain.observability.serving import LoopbackServer

_READY_SECONDS = 30.0


class EmbeddedChain(Node):
    """The chain in this process: the EVM in one thread, the server on the running event loop.

    Args:
        port: Port on 127.0.0.1; 0 chooses a free one.
        block_time: Whole seconds between blocks; timestamps follow the wall clock. 0 mines a block
            as soon as there are transactions (timestamps may run ahead of the wall clock). None
            mines blocks only on request, with a clock that advances only on request.
    """

    def __init__(
        self, *, port: int = 0, chain_id: int = DEFAULT_CHAIN_ID, block_time: int | None = 1
    ) -> None:
        super().__init__(chain_id)
        if block_time is not None and block_time < 0:
            raise UsageError("A block time can't be negative.")
        self._port = port
        self._block_time = block_time
        self._worker: Worker | None = None
        self._server: LoopbackServer | None = None

    @property
    def failure(self) -> BaseException | None:
        """The exception that ended block production, or None."""
        return self._worker.failure if self._worker else None

    async def start(self) -> None:
        """Start the chain; raises ``UsageError`` if the port is not available."""
        balances = {bytes.fromhex(a.address[2:]): DEV_BALANCE for a in dev_accounts()}
        core = Core(self.chain_id, balances, frozen=self._block_time is None)
        self._worker = Worker(core, self._block_time)
        self._server = LoopbackServer(rpc_app(Methods(self._worker)), self._port)
        await self._server.start()
        self._worker.start()
        self.url = self._server.url
        self.pid = os.getpid()

    async def stop(self) -> None:
        worker, server = self._worker, self._server
        self._worker = self._server = None
        if worker is not None:
            await asyncio.to_thread(worker.stop)
        if server is not None:
            await server.stop()


class ChainProcess(Node):
    """The embedded chain in a child process, which ends with this process."""

    def __init__(
        self, *, port: int = 0, chain_id: int = DEFAULT_CHAIN_ID, block_time: int | None = 1
    ) -> None:
        super().__init__(chain_id)
        self._port = port
        self._block_time = block_time
        self._child: ChildProcess | None = None

    async def start(self) -> None:
        """Start the chain.

        Raises ``UsageError`` if the port is not available, ``EndpointError`` if it did not start.
        """
        block_time = "manual" if self._block_time is None else str(self._block_time)
        self._child = await ChildProcess.spawn(
            [
                *(sys.executable, "-m", "deepsquare_chain.devnet.node.embedded"),
                *("--port", str(self._port), "--chain-id", str(self.chain_id)),
                *("--block-time", block_time, "--parent-pid", str(os.getpid())),
            ],
            stdout=asyncio.subprocess.PIPE,
            stderr=None,
        )
        try:
            ready = await self._first_line(self._child)
        except BaseException:
            await self.stop()
            raise
        if "error" in ready:
            await self.stop()
            raise UsageError(ready["error"], hint=ready.get("hint", ""))
        self.url = ready["url"]
        self.pid = self._child.pid

    async def stop(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            await child.end()

    async def _first_line(self, child: ChildProcess) -> dict[str, str]:
        assert child.stdout is not None  # noqa: S101 - requested as a pipe
        line = b""
        with suppress(TimeoutError):
            line = await asyncio.wait_for(child.stdout.readline(), _READY_SECONDS)
        try:
            ready = json.loads(line)
        except ValueError:
            ready = None
        if not isinstance(ready, dict):
            raise EndpointError(
                "The embedded chain did not start.", hint="Its output is on standard error."
            )
        return ready


async def _serve(arguments: argparse.Namespace) -> int:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    orphaned = _orphan_check(arguments.parent_pid)
    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, stop.set)
    chain = EmbeddedChain(
        port=arguments.port, chain_id=arguments.chain_id, block_time=arguments.block_time
    )
    async with chain:
        ready = {"event": "ready", "url": chain.url, "chain_id": chain.chain_id, "pid": chain.pid}
        print(json.dumps(ready), flush=True)  # noqa: T201 - the ready line
        while not stop.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), 1.0)
            if chain.failure is not None:
                return 1
            if orphaned():
                return 0
    return 0


def _orphan_check(parent: int) -> Callable[[], bool]:
    """Return a function that tells whether the process ``parent`` (0: none) has ended."""
    if not parent:
        return lambda: False
    if os.getppid() == parent:  # also correct while the parent is a zombie
        return lambda: os.getppid() != parent
    return lambda: not _exists(parent)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _block_time(text: str) -> int | None:
    return None if text == "manual" else int(text)


def main() -> int:
    """Run the chain until SIGINT or SIGTERM; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m deepsquare_chain.devnet.node.embedded")
    parser.add_argument("--port", type=int, default=8545, help="on 127.0.0.1; 0: a free one")
    parser.add_argument("--chain-id", type=int, default=DEFAULT_CHAIN_ID)
    parser.add_argument(
        "--block-time",
        type=_block_time,
        default=1,
        help="seconds; 0: at once; 'manual': on request",
    )
    parser.add_argument("--parent-pid", type=int, default=0, help="end when this process has ended")
    try:
        return asyncio.run(_serve(parser.parse_args()))
    except GridError as error:
        print(json.dumps({"error": error.message, "hint": error.hint}), flush=True)  # noqa: T201
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
