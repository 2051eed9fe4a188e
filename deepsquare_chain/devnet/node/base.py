"""The interface of devnet nodes: a URL, funded accounts, control over chain time; and anvil."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, Final, Self

import httpx2
from eth_account import Account
from eth_account.signers.local import LocalAccount
from eth_utils.address import to_checksum_address

from deepsquare_chain.chain.transactions.fees import GWEI
from deepsquare_chain.errors import EndpointError, GridError, NotFoundError, UsageError
from deepsquare_chain.observability.serving import HOST, open_listener

# The standard test mnemonic of Ethereum tools: its keys are public and must never hold value.
DEV_MNEMONIC = "test test test test test test test test test test test junk"
DEV_ACCOUNTS = 10
DEV_BALANCE = 1_000_000 * 10**18  # wei per account, including the bank
DEFAULT_CHAIN_ID = 1337

ANVIL_PACKAGE = "@foundry-rs/anvil-linux-amd64"
ANVIL_VARIABLE = "DEEPSQUARE_ANVIL"
_IN_ANVIL_PACKAGE = Path("node_modules") / ANVIL_PACKAGE / "bin" / "anvil"


@lru_cache(maxsize=1)
def dev_accounts() -> tuple[LocalAccount, ...]:
    """Return the funded accounts; the last one is the bank that ``Node.fund`` pays from."""
    Account.enable_unaudited_hdwallet_features()
    return tuple(
        Account.from_mnemonic(DEV_MNEMONIC, account_path=f"m/44'/60'/0'/0/{index}")
        for index in range(DEV_ACCOUNTS + 1)
    )


class StartedContext(ABC):
    """Starts in an `async with` block, and closes at its end or when the start fails."""

    @abstractmethod
    async def start(self) -> None:
        """Start; return when it accepts requests."""

    @abstractmethod
    async def close(self) -> None:
        """Stop, and close the connections."""

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class Node(StartedContext):
    """A chain for development, used as an async context manager.

    ``url`` is its JSON-RPC endpoint, ``accounts`` are funded, and ``pid`` is its process ID.
    """

    def __init__(self, chain_id: int = DEFAULT_CHAIN_ID) -> None:
        self.chain_id = chain_id
        self.url = ""
        self.pid = 0
        self._client: httpx2.AsyncClient | None = None
        self._bank = asyncio.Lock()
        self._requests = 0

    @property
    def accounts(self) -> tuple[LocalAccount, ...]:
        """Ten accounts with ``DEV_BALANCE`` wei each."""
        return dev_accounts()[:DEV_ACCOUNTS]

    @property
    def dev_keys(self) -> tuple[str, ...]:
        """Private keys of ``accounts``, as 0x-hex."""
        return tuple("0x" + bytes(account.key).hex() for account in self.accounts)

    @abstractmethod
    async def start(self) -> None:
        """Start the node; return when it accepts requests and ``url`` and ``pid`` are set."""

    @abstractmethod
    async def stop(self) -> None:
        """Stop the node; idempotent."""

    async def close(self) -> None:
        """Stop the node and close the connections to it."""
        if self._client is not None:
            await self._client.aclose()
            self._client = None
        await self.stop()

    async def rpc(self, method: str, *params: Any) -> Any:
        """Send one JSON-RPC request and return the result; raises ``EndpointError`` on failure."""
        if self._client is None:
            self._client = httpx2.AsyncClient(base_url=self.url, timeout=30, trust_env=False)
        self._requests += 1
        body = {"jsonrpc": "2.0", "id": self._requests, "method": method, "params": params}
        try:
            response = (await self._client.post("/", json=body)).json()
        except (httpx2.HTTPError, ValueError) as error:
            raise EndpointError(f"The devnet node at {self.url} doesn't answer: {error}") from error
        if "error" in response:
            raise EndpointError(f"{method}: {response['error'].get('message')}")
        return response["result"]

    async def fund(self, address: str, wei: int, *, timeout: float = 30.0) -> None:
        """Send ``wei`` from the bank to an address; return when mined (``timeout`` in seconds)."""
        bank = dev_accounts()[-1]
        async with self._bank:  # serialises the use of nonces
            nonce = int(await self.rpc("eth_getTransactionCount", bank.address, "pending"), 16)
            payment: dict[str, Any] = {
                "chainId": self.chain_id,
                "nonce": nonce,
                "to": to_checksum_address(address),
                "value": wei,
                "gas": 100_000,
                "maxFeePerGas": 100 * GWEI,
                "maxPriorityFeePerGas": GWEI,
            }
            raw = bytes(bank.sign_transaction(payment).raw_transaction)
            tx_hash = await self.rpc("eth_sendRawTransaction", "0x" + raw.hex())
        await self._wait_until_mined(tx_hash, timeout)

    async def mine(self, blocks: int = 1) -> None:
        """Mine blocks immediately."""
        for _ in range(blocks):
            await self.rpc("evm_mine")

    async def increase_time(self, seconds: int) -> None:
        """Advance chain time, and mine a block with the new time."""
        await self.rpc("evm_increaseTime", seconds)
        await self.mine()

    async def set_time(self, timestamp: int) -> None:
        """Mine a block at ``timestamp`` seconds, later than the head's; time continues from it."""
        await self.rpc("evm_setNextBlockTimestamp", timestamp)
        await self.mine()

    async def _wait_until_mined(self, tx_hash: str, timeout: float) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        while loop.time() < deadline:
            receipt = await self.rpc("eth_getTransactionReceipt", tx_hash)
            if receipt is not None:
                if receipt["status"] != "0x1":
                    raise GridError(f"The funding transaction {tx_hash} failed.")
                return
            await asyncio.sleep(0.05)
        raise EndpointError(
            f"The funding transaction {tx_hash} was not mined within {timeout:.0f} seconds."
        )


# -- child processes of the devnet: started in their own session, and stopped by their PID

# Sets the parent death signal (PR_SET_PDEATHSIG) and then executes the program with the same PID:
# no orphaned process remains, even after a SIGKILL of the parent. Other systems than Linux skip it.
_PARENT_DEATH_WRAPPER = """
import ctypes, os, sys
try:
    ctypes.CDLL(None).prctl(1, 9)
except Exception:
    pass
if os.getppid() != int(sys.argv[1]):
    os._exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


class ChildProcess:
    """A child process that ends when this process ends."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Exit code; None while it runs."""
        return self._process.returncode

    @property
    def stdout(self) -> asyncio.StreamReader | None:
        return self._process.stdout

    @classmethod
    async def spawn(
        cls,
        command: Sequence[str | Path],
        *,
        stdout: int | IO[bytes] = asyncio.subprocess.DEVNULL,
        stderr: int | IO[bytes] | None = asyncio.subprocess.DEVNULL,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> ChildProcess:
        """Start ``command`` in its own session, so that it does not receive the terminal's Ctrl-C.

        Its first part is an absolute path; ``stderr=None`` inherits standard error.
        """
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", "-c", _PARENT_DEATH_WRAPPER, str(os.getpid())),
            *map(str, command),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            env=None if env is None else dict(env),
            cwd=cwd,
            start_new_session=True,
        )
        return cls(process)

    async def first_line(self, timeout: float) -> bytes:
        """Return the first line of its piped standard output; empty if it ends or after `timeout` s."""
        assert self.stdout is not None  # noqa: S101 - requested as a pipe
        with contextlib.suppress(TimeoutError):
            return await asyncio.wait_for(self.stdout.readline(), timeout)
        return b""

    async def end(self, grace: float = 5.0) -> None:
        """Send SIGTERM, then SIGKILL after ``grace`` seconds; wait until the process has ended."""
        for signum in (signal.SIGTERM, signal.SIGKILL):
            if self._process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    self._process.send_signal(signum)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._process.wait(), grace)
        if self.stdout is not None:
            # Reading to the end closes the pipe while the event loop still runs.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.stdout.read(), grace)


# -- a node that runs as a separate program on a loopback port, and ends with this process

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
        self._output: IO[bytes] | None = None

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
            if await self._wait_until_ready():
                return
            output = self._last_output()
            await self.stop()
            # Another process may have taken the port since it was found free.
            if "in use" not in output or attempt + 1 == attempts:
                raise EndpointError(f"{self.name} did not start on port {port}: {output}")

    async def stop(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            await child.end()
        if self._output is not None:
            self._output.close()
            self._output = None

    async def _spawn(self, command: list[str | Path], port: int) -> None:
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - closed by stop()
        self._child = await ChildProcess.spawn(
            command, stdout=self._output, stderr=self._output, cwd=self.folder
        )
        self.url = f"http://{HOST}:{port}"
        self.pid = self._child.pid

    async def _wait_until_ready(self) -> bool:
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

    def _last_output(self) -> str:
        if self._output is None:
            return ""
        self._output.seek(0)
        return self._output.read(2_000).decode("utf-8", "replace").strip() or "no output."


def free_port(port: int = 0) -> int:
    """Return a port that is free now; raises ``UsageError`` if the requested one is not."""
    listener: socket.socket = open_listener(port)
    with listener:
        return int(listener.getsockname()[1])


def find_anvil() -> Path:
    """Find anvil: ``DEEPSQUARE_ANVIL``, npm's package here or in the project, then the PATH.

    Raises ``UsageError`` if the variable does not name a program, ``NotFoundError`` if there is none.
    """
    named = os.environ.get(ANVIL_VARIABLE)
    if named:
        if not _is_program(Path(named)):
            raise UsageError(
                f"{ANVIL_VARIABLE} names {named}, which is not an executable program.",
                hint=f"Point {ANVIL_VARIABLE} at the anvil program, or unset it.",
            )
        return Path(named).absolute()
    for folder in (Path.cwd(), Path(__file__).resolve().parents[3]):
        if _is_program(folder / _IN_ANVIL_PACKAGE):
            return folder / _IN_ANVIL_PACKAGE
    on_path = shutil.which("anvil")
    if on_path:
        return Path(on_path).absolute()
    raise NotFoundError(
        "anvil is not installed.",
        hint=f"Run `npm ci` in the project's folder (it brings {ANVIL_PACKAGE}), or install Foundry, "
        f"or set {ANVIL_VARIABLE} to the program. The embedded chain needs neither.",
    )


class Anvil(ProgramNode):
    """An anvil process on 127.0.0.1, which ends with this process.

    Args:
        port: Port on 127.0.0.1; 0 chooses a free one.
        block_time: Seconds between blocks; None mines each transaction immediately.
        hardfork: Rules of the EVM; the contracts are compiled for cancun.
        options: Additional command-line options of anvil.
    """

    name = "anvil"

    def __init__(
        self,
        *,
        port: int = 0,
        chain_id: int = DEFAULT_CHAIN_ID,
        block_time: int | None = 1,
        hardfork: str = "cancun",
        options: tuple[str, ...] = (),
    ) -> None:
        super().__init__(chain_id, port=port)
        self._block_time = block_time
        self._hardfork = hardfork
        self._options = options

    def command(self, port: int) -> list[str | Path]:
        """Return the command line of anvil."""
        pace = [] if self._block_time is None else ["--block-time", str(self._block_time)]
        return [
            *(find_anvil(), "--silent", "--host", HOST, "--port", str(port)),
            *("--chain-id", str(self.chain_id), "--hardfork", self._hardfork),
            *("--mnemonic", DEV_MNEMONIC, "--accounts", str(DEV_ACCOUNTS + 1)),
            *("--balance", str(DEV_BALANCE // 10**18), "--gas-limit", "60000000"),
            *pace,
            *self._options,
        ]


def _is_program(path: Path) -> bool:
    return path.is_file() and os.access(path, os.X_OK)
