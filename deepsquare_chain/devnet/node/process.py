"""Child processes of the devnet: started in their own session, and stopped by their PID."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

# Sets the parent death signal (PR_SET_PDEATHSIG) and then executes the program with the same PID:
# no orphaned process remains, even after a SIGKILL of the parent. Other systems than Linux skip it.
_TIED = """
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
            *(sys.executable, "-I", "-S", "-c", _TIED, str(os.getpid())),
            *map(str, command),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            env=None if env is None else dict(env),
            cwd=cwd,
            start_new_session=True,
        )
        return cls(process)

    async def end(self, grace: float = 5.0) -> None:
        """Send SIGTERM, then SIGKILL after ``grace`` seconds; wait until the process has ended."""
        for signum in (signal.SIGTERM, signal.SIGKILL):
            if self._process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    self._process.send_signal(signum)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._process.wait(), grace)
        if self._process.stdout is not None:
            # Reading to the end closes the pipe while the event loop still runs.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.stdout.read(), grace)
