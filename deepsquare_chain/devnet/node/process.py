"""Child processes of the devnet: started in a session of their own, ended by their pid."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

# Sets "die with your parent" on itself, then becomes the program: same pid, no orphan even
# after a SIGKILL of the parent. Non-Linux systems go on without it.
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
    """A program that lives no longer than this one."""

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
        """Start ``command``, away from the terminal's Ctrl-C.

        Its first part is an absolute path; ``stderr=None`` shares this program's own.
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
        """SIGTERM, after ``grace`` seconds SIGKILL; returns when the process is gone."""
        for signum in (signal.SIGTERM, signal.SIGKILL):
            if self._process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    self._process.send_signal(signum)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._process.wait(), grace)
        if self._process.stdout is not None:
            # Read to its end, the pipe closes with the loop still there to close it.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.stdout.read(), grace)
