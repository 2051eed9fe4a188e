"""A real node for tests: found where npm puts it, started on a free loopback port."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
REQUIRE_REAL = "DEEPSQUARE_REQUIRE_REAL"
_INSTALLED = ROOT / "node_modules" / "@foundry-rs" / "anvil-linux-amd64" / "bin" / "anvil"
_LISTENING = re.compile(rb"Listening on 127\.0\.0\.1:([0-9]+)")
_START_SECONDS = 30.0


@dataclass(frozen=True)
class AnvilNode:
    """A running node with the well-known funded accounts of anvil."""

    url: str
    port: int
    pid: int


def find_anvil() -> Path | None:
    """The binary: `DEEPSQUARE_ANVIL`, else npm's, else the one on the path."""
    named = os.environ.get("DEEPSQUARE_ANVIL") or shutil.which("anvil")
    candidates = [_INSTALLED] if "DEEPSQUARE_ANVIL" not in os.environ else []
    candidates += [Path(named)] if named else []
    return next((path for path in candidates if os.access(path, os.X_OK)), None)


def require_anvil() -> Path:
    """The binary; without it the test is skipped, or fails where real parts are required."""
    binary = find_anvil()
    if binary is None:
        missing = "anvil is not installed: run `npm ci`, or set DEEPSQUARE_ANVIL to its path"
        if os.environ.get(REQUIRE_REAL) == "1":
            pytest.fail(missing)
        pytest.skip(missing)
    return binary


@contextmanager
def start_anvil(*arguments: str, block_time: int | None = None) -> Iterator[AnvilNode]:
    """A node that lives as long as the block.

    Args:
        arguments: More of anvil's own options.
        block_time: Seconds between blocks; None makes a block for each transaction.
    """
    command = [str(require_anvil()), "--host", "127.0.0.1", "--port", "0", *arguments]
    if block_time is not None:
        command += ["--block-time", str(block_time)]
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            port = _wait_for_port(process, output.fileno())
            yield AnvilNode(f"http://127.0.0.1:{port}", port, process.pid)
        finally:
            _end(process)


def _wait_for_port(process: subprocess.Popen[bytes], output: int) -> int:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        printed = os.pread(output, 1_000_000, 0)
        found = _LISTENING.search(printed)
        if found:
            return int(found[1])
        if process.poll() is not None:
            break
        time.sleep(0.02)
    raise RuntimeError(f"anvil did not start: {printed[-2000:].decode(errors='replace')}")


def _end(process: subprocess.Popen[bytes]) -> None:
    # A stopped process hears nothing but SIGCONT and SIGKILL.
    for sign, patience in ((signal.SIGCONT, 0.0), (signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
        process.send_signal(sign)
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
        return
