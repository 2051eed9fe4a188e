"""Makes the folder of a run and starts its supervisor."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Final

from deepsquare_chain.executors import orphaned_processes, procfs
from deepsquare_chain.executors.base import RunSpec
from deepsquare_chain.executors.gpus import device_environment
from deepsquare_chain.executors.rundir import RunFolder, unique
from deepsquare_chain.executors.sandbox import Isolation
from deepsquare_chain.faults import VARIABLE, crash_point

#: Seconds within which the fork server answers, on a busy machine too.
_REPLY_TIMEOUT: Final = 30.0
#: Bytes of the longest name that a folder may have, and some more.
_LONGEST_NAME: Final = 300
_SOURCE: Final = str(Path(__file__).resolve().parents[2])


def make_run(
    runs: Path, spec: RunSpec, devices: Sequence[str] = (), isolation: Isolation | None = None
) -> RunFolder:
    """Make the folder of a run below `runs`, whole or not at all; one that is there stays.

    Args:
        runs: Folder of all runs.
        spec: What to run.
        devices: Names of the GPUs that are its own.
        isolation: How it is kept apart from the machine; None for a plain process.

    Raises:
        OSError: It could not be made.
    """
    folder = RunFolder(runs / spec.key)
    fresh = RunFolder(runs / f".new-{unique()}")
    wanted = spec.resources
    record = {
        "key": spec.key,
        "env": dict(spec.env) | device_environment(devices),
        "walltime": spec.walltime,
        "cpus": wanted.cpus,
        "memory": wanted.memory,
        "gpus": wanted.gpus,
        "devices": list(devices),
    }
    if isolation is not None:
        record["isolation"] = isolation.record(folder.path, devices)
    try:
        fresh.fill(record, spec.script, spec.walltime)
        crash_point("executor.filled")
        fresh.path.rename(folder.path)
        crash_point("executor.made")
    except OSError:
        # Another submit of the same key may have come first: its folder is the run.
        if not folder.path.is_dir():
            raise
    finally:
        remove_tree(fresh.path)
    return folder


class Launched:
    """A supervisor that was started here; it says when it has taken the run.

    Args:
        voice: Read end of the pipe on which it says so.
        process: Its pidfd and its pid; None when the fork server ended before it forked.
    """

    def __init__(self, voice: int, process: tuple[int, int] | None) -> None:
        self._voice: int | None = voice
        self._handle: int | None = None
        self._pid = 0
        if process is not None:
            self._handle, self._pid = process
        self._took = False
        self._closing = threading.Lock()
        os.set_blocking(voice, False)

    @property
    def voice(self) -> int | None:
        """Descriptor that can be read when it has said something or is gone; None from then on."""
        return self._voice

    @property
    def ended(self) -> bool:
        """Whether it is gone; what it said before can still be heard."""
        # Several parts of the daemon look at runs, each in a thread of its own.
        with self._closing:
            if self._handle is not None and _is_readable(self._handle, 0.0):
                os.close(self._handle)
                self._handle = None
            return self._handle is None

    def took(self) -> bool:
        """Whether it took the run, by its own word: the run may have removed its folder since."""
        if self._voice is not None and not self._took:
            with contextlib.suppress(BlockingIOError):  # it says nothing yet
                self._took = bool(os.read(self._voice, 1))
                self._close_voice()
        return self._took

    def kill(self) -> None:
        """End the supervisor and the processes that it started in its own group."""
        if not self.ended:
            procfs.signal_trees([*procfs.descendants(self._pid), self._pid], signal.SIGKILL)
            if self._handle is not None:
                _is_readable(self._handle, _REPLY_TIMEOUT)
        self.release()

    def release(self) -> None:
        """Listen no longer: it is known to have the run."""
        self._took = True
        self._close_voice()

    def _close_voice(self) -> None:
        if self._voice is not None:
            os.close(self._voice)
            self._voice = None


class ForkServer:
    """Starts supervisors as forks of one process that has loaded their modules.

    A fork takes a tenth of the CPU time that a new interpreter takes. The server is started when it
    is needed and ends by itself when this process ends, or when nothing was asked of it for a
    while. Supervisors do not depend on it. Safe to be used from several threads.

    Args:
        runs: Folder of all runs.
    """

    def __init__(self, runs: Path) -> None:
        self._runs = runs
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def start(self, folder: RunFolder, *, crashes: bool = True) -> Launched:
        """Start a supervisor, which takes the run or ends at once.

        Args:
            folder: Of the run.
            crashes: Whether it heeds the crash points that a test asks for.

        Raises:
            OSError: No process could be started.
        """
        crash = os.environ.get(VARIABLE, "") if crashes else ""
        request = os.fsencode(folder.path) + b"\0" + crash.encode()
        voice, sink = os.pipe()
        try:
            with folder.log.open("ab") as log, self._lock:
                process = None
                if self._socket is not None:
                    process = self._ask(request, sink, log.fileno())
                if process is None:
                    # There was none, or it ended. Where it forked before it ended, two supervisors
                    # race for the run: one takes it, and both speak into the same pipe.
                    self._start_server(log)
                    process = self._ask(request, sink, log.fileno())
        except BaseException:
            os.close(voice)
            raise
        finally:
            os.close(sink)
        return Launched(voice, process)

    def close(self) -> None:
        """End the server. Supervisors go on."""
        with self._lock:
            self._end_server()

    def _start_server(self, log: IO[bytes]) -> None:
        self._end_server()
        env = {"PYTHONPATH": _SOURCE, "PYTHONDONTWRITEBYTECODE": "1"}
        # Some Pythons need it to start at all.
        if "LD_LIBRARY_PATH" in os.environ:
            env["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        # Without site packages and working folder: quick to start, and nobody else's modules.
        # A supervisor writes its folder over the last argument, so that it can be recognised.
        padding = "." * (len(os.fsencode(self._runs)) + _LONGEST_NAME)
        command = [sys.executable, "-S", "-P", "-m", orphaned_processes.SUPERVISOR_MODULE, padding]
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                self._process = subprocess.Popen(
                    command,
                    cwd="/",
                    env=env,
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=log,
                    start_new_session=True,
                )
        except OSError:
            ours.close()
            raise
        self._socket = ours

    def _ask(self, request: bytes, sink: int, log: int) -> tuple[int, int] | None:
        """Pidfd and pid of a new supervisor; None when the server is gone or hangs.

        Raises:
            OSError: The server could not fork.
        """
        server = self._socket
        if server is None:
            return None
        try:
            socket.send_fds(server, [request], [sink, log])
            if not _is_readable(server.fileno(), _REPLY_TIMEOUT):
                self._end_server()
                return None
            answer, handles, _, _ = socket.recv_fds(server, 64, 1, socket.MSG_CMSG_CLOEXEC)
        except (BrokenPipeError, ConnectionError):
            answer = b""
        if not answer:
            self._end_server()
            return None
        number = int(answer)
        if not handles:
            raise OSError(number, os.strerror(number))
        return handles[0], number

    def _end_server(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def _is_readable(handle: int, seconds: float) -> bool:
    """Whether a descriptor can be read within so many seconds; a pidfd when its process ended."""
    poller = select.poll()
    poller.register(handle, select.POLLIN)
    return bool(poller.poll(1000 * seconds))


def remove_tree(path: Path) -> None:
    """Remove a folder and everything in it, as far as that is possible."""
    shutil.rmtree(path, ignore_errors=True)
    if path.exists():
        # A job may have closed its folders even to their owner.
        for place, folders, _ in os.walk(path):
            for name in folders:
                with contextlib.suppress(OSError, NotImplementedError):
                    _open_up(Path(place, name))
        shutil.rmtree(path, ignore_errors=True)


def _open_up(path: Path) -> None:
    if not path.is_symlink():
        path.chmod(0o700)
