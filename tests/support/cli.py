"""Runs `deepsquare` as a user does: in a folder, with a devnet, as separate processes."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from deepsquare_chain.cli import main
from deepsquare_chain.devnet.node.base import ANVIL_VARIABLE, find_anvil
from tests.support.anvil import AT_ONCE

PROGRAM = (sys.executable, "-m", "deepsquare_chain.cli")
PROJECT = Path(__file__).parents[2]
EXAMPLES = PROJECT / "examples"
#: Processes are forked from a server that has imported all modules, which takes a second of CPU time.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        *("tests.support.rundaemon", "deepsquare_chain.client.grid"),
        *("deepsquare_chain.cli.app", "deepsquare_chain.devnet.grid"),
    ]
)
_FORKING = threading.Lock()  # the exit code of a fork can be read only once


@dataclass(frozen=True)
class Outcome:
    """The exit code and output of a command."""

    code: int
    out: str
    err: str


def clean_environment(home: Path) -> dict[str, str]:
    """Return the environment without the user's own settings."""
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith("DEEPSQUARE_")
    }
    path = os.pathsep.join(filter(None, [str(PROJECT), environment.get("PYTHONPATH", "")]))
    return {**environment, "XDG_CONFIG_HOME": str(home), "PYTHONPATH": path, "COLUMNS": "200"}


def run(arguments: Sequence[str], folder: Path, timeout: float = 180, **env: str) -> Outcome:
    """Run one command, and wait until it ends."""
    process = subprocess.run(
        [*PROGRAM, *arguments],
        cwd=folder,
        env={**clean_environment(folder), **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return Outcome(process.returncode, process.stdout, process.stderr)


def run_forked(arguments: Sequence[str], folder: Path, timeout: float = 180, **env: str) -> Outcome:
    """Run one command as `run` does, in a process that need not import the modules."""
    environment = {**clean_environment(folder), **env}
    with tempfile.TemporaryDirectory() as output:
        out, err = Path(output, "out"), Path(output, "err")
        process = FORKS.Process(
            target=_run_here, args=(list(arguments), folder, environment, out, err), daemon=True
        )
        with _FORKING:
            process.start()
        ended = multiprocessing.connection.wait([process.sentinel], timeout)
        with _FORKING:
            if not ended:
                process.kill()
            process.join()
        assert ended, f"{arguments} did not end in {timeout} seconds: {err.read_text()}"
        assert process.exitcode is not None
        return Outcome(process.exitcode, out.read_text(), err.read_text())


def _run_here(
    arguments: list[str], folder: Path, environment: dict[str, str], out: Path, err: Path
) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for path, descriptor in ((out, 1), (err, 2)):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(handle, descriptor)
        os.close(handle)
    main(arguments)


class Running:
    """A long-running command; its output goes to a file."""

    def __init__(self, arguments: Sequence[str], folder: Path, name: str, **env: str) -> None:
        self.log = folder / f"{name}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*PROGRAM, *arguments],
                cwd=folder,
                env={**clean_environment(folder), **env},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait_for(self, message: str, timeout: float = 180) -> None:
        """Wait until the output contains a text."""
        deadline = time.monotonic() + timeout
        while message not in self.log.read_text(errors="replace"):
            assert self.process.poll() is None, self.log.read_text(errors="replace")
            assert time.monotonic() < deadline, self.log.read_text(errors="replace")
            time.sleep(0.1)

    def end(self, number: int = signal.SIGINT, timeout: float = 90) -> int:
        """Send a signal, and return the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(timeout)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()


@contextmanager
def running(arguments: Sequence[str], folder: Path, name: str, **env: str) -> Iterator[Running]:
    """Run a command within a `with` block."""
    command = Running(arguments, folder, name, **env)
    try:
        yield command
    finally:
        command.end()


@contextmanager
def devnet(folder: Path, *more: str) -> Iterator[Running]:
    """Run `deepsquare devnet up` in a folder, on free ports; by default without an explorer.

    Anvil mines a block at once for each transaction, besides one per second, so commands need not
    wait. A test of pending transactions calls `evm_setIntervalMining` first.
    """
    ports = ("--port", "0", "--faucet-port", "0", "--relay-port", "0")
    arguments = ["devnet", "up", *ports, *(more or ["--no-explorer"])]
    env = {}
    if "anvil" in more:
        program = folder / "anvil-at-once"
        program.write_text(f'#!/bin/sh\nexec "{find_anvil()}" {AT_ONCE} "$@"\n')
        program.chmod(0o700)
        env[ANVIL_VARIABLE] = str(program)
    with running(arguments, folder, "devnet", **env) as up:
        up.wait_for("Ctrl-C ends it.")
        yield up
