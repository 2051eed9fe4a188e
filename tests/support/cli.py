"""Running `deepsquare` as a user does: in a folder, with a devnet, in processes of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PROGRAM = (sys.executable, "-m", "deepsquare_chain.cli")
PROJECT = Path(__file__).parents[2]
EXAMPLES = PROJECT / "examples"


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str


def clean_environment(home: Path) -> dict[str, str]:
    """This environment without settings of the machine's user."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("DEEPSQUARE_")}
    path = os.pathsep.join(filter(None, [str(PROJECT), kept.get("PYTHONPATH", "")]))
    return {**kept, "XDG_CONFIG_HOME": str(home), "PYTHONPATH": path, "COLUMNS": "200"}


def run(arguments: Sequence[str], folder: Path, timeout: float = 60, **env: str) -> Outcome:
    """One command, to its end."""
    done = subprocess.run(
        [*PROGRAM, *arguments],
        cwd=folder,
        env={**clean_environment(folder), **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


class Running:
    """A command that stays; its words go to a file."""

    def __init__(self, arguments: Sequence[str], folder: Path, name: str) -> None:
        self.log = folder / f"{name}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*PROGRAM, *arguments],
                cwd=folder,
                env=clean_environment(folder),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait_for(self, words: str, timeout: float = 180) -> None:
        """Until it has said these words."""
        deadline = time.monotonic() + timeout
        while words not in self.log.read_text(errors="replace"):
            assert self.process.poll() is None, self.log.read_text(errors="replace")
            assert time.monotonic() < deadline, self.log.read_text(errors="replace")
            time.sleep(0.1)

    def end(self, number: int = signal.SIGINT, timeout: float = 30) -> int:
        """Send it a signal; its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(timeout)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()


@contextmanager
def running(arguments: Sequence[str], folder: Path, name: str) -> Iterator[Running]:
    """A command for the time of a block."""
    found = Running(arguments, folder, name)
    try:
        yield found
    finally:
        found.end()


@contextmanager
def devnet(folder: Path, *more: str) -> Iterator[Running]:
    """`deepsquare devnet up` in a folder, on free ports; without an explorer unless asked for."""
    ports = ("--port", "0", "--faucet-port", "0", "--relay-port", "0")
    arguments = ["devnet", "up", *ports, *(more or ["--no-explorer"])]
    with running(arguments, folder, "devnet") as up:
        up.wait_for("Ctrl-C ends it.")
        yield up
