"""A temporary PostgreSQL server for tests, on loopback; stopped by its PID."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.anvil import REQUIRE_REAL

_FOLDERS = Path("/usr/lib/postgresql")
_START_SECONDS = 60.0


def require_postgres() -> Path:
    """Return the folder of PostgreSQL's programs; without it, skip the test, or fail if required."""
    candidates = sorted(_FOLDERS.glob("*/bin/initdb"), key=lambda item: int(item.parts[-3]))
    if candidates:
        return candidates[-1].parent
    if initdb := shutil.which("initdb"):
        return Path(initdb).resolve().parent
    missing = "PostgreSQL is not installed (Debian: apt-get install postgresql)"
    if os.environ.get(REQUIRE_REAL) == "1":
        pytest.fail(missing)
    pytest.skip(missing)


class Server:
    """A running PostgreSQL server, which creates databases on request."""

    def __init__(self, programs: Path, port: int, options: dict[str, Any]) -> None:
        self._programs = programs
        self._options = options
        self.port = port
        self._made = 0

    def database(self) -> str:
        """Create an empty database, and return its URL."""
        self._made += 1
        name = f"index{self._made}"
        self.psql("postgres", f'CREATE DATABASE "{name}"')
        return f"postgresql+psycopg://grid@127.0.0.1:{self.port}/{name}"

    def psql(self, database: str, statement: str) -> str:
        """Run SQL as the server's administrator, and return its output."""
        command = [str(self._programs / "psql"), "-qtA", "-v", "ON_ERROR_STOP=1"]
        command += [
            "-h",
            "127.0.0.1",
            "-p",
            str(self.port),
            "-U",
            "grid",
            database,
            "-c",
            statement,
        ]
        process = subprocess.run(
            command, check=True, capture_output=True, text=True, **self._options
        )
        return process.stdout.strip()


@contextmanager
def postgres() -> Iterator[Server]:
    """Run a server within a `with` block.

    PostgreSQL refuses to run as root, so root runs it as the user postgres or nobody.
    """
    programs = require_postgres()
    options = _unprivileged()
    folder = Path(tempfile.mkdtemp(prefix="grid-postgres-"))
    try:
        if options:
            os.chown(folder, options["user"], options["group"])
        data = folder / "data"
        flags = ["-U", "grid", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"]
        subprocess.run(
            [programs / "initdb", "-D", data, *flags],
            check=True,
            capture_output=True,
            **options,
        )
        with _running(programs, data, folder, options) as port:
            yield Server(programs, port, options)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _running(programs: Path, data: Path, folder: Path, options: dict[str, Any]) -> Iterator[int]:
    port = _free_port()
    settings = ["-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={folder}"]
    # Durability is not needed in tests.
    settings += ["-c", "fsync=off", "-c", "max_connections=50"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [programs / "postgres", "-D", data, "-p", str(port), *settings],
            stdout=log,
            stderr=log,
            **options,
        )
    try:
        _wait(programs, port, process, folder / "log")
        yield port
    finally:
        # Fast shutdown: closes connections instead of waiting for them.
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(programs: Path, port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    ready = [programs / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(port)]
    while subprocess.run(ready, check=False).returncode:
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"PostgreSQL did not start: {log.read_text()[-2_000:]}")
        time.sleep(0.05)


def _unprivileged() -> dict[str, Any]:
    """Return the subprocess options to run as an unprivileged user; empty if not root."""
    if os.geteuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        try:
            user = pwd.getpwnam(name)
        except KeyError:
            continue
        return {
            "user": user.pw_uid,
            "group": user.pw_gid,
            "extra_groups": [],
            "cwd": "/",
            "env": {"PATH": os.environ.get("PATH", ""), "LC_ALL": "C"},
        }
    raise RuntimeError("there is no user but root to run PostgreSQL")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
