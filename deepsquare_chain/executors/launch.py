"""Creates the folder of a run, allocates its GPUs, and starts its supervisor; probes that it works."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Final, TypeVar

from deepsquare_chain.executors import orphaned_processes, procfs
from deepsquare_chain.executors.base import ExecutorUnavailableError, RunSpec
from deepsquare_chain.executors.rundir import RunFolder, read_bytes, read_kept, unique
from deepsquare_chain.executors.sandbox import Isolation
from deepsquare_chain.faults import VARIABLE, crash_point
from deepsquare_chain.observability import get_logger

# -- allocation of GPUs by name, and the environment variables that expose them to a run
#
# The name of a GPU is its number, or its name in the daemon's own CUDA_VISIBLE_DEVICES (on AMD
# machines ROCR_VISIBLE_DEVICES) if set, by which an operator can withhold GPUs.

_CUDA: Final = "CUDA_VISIBLE_DEVICES"
_ROCR: Final = "ROCR_VISIBLE_DEVICES"
_NAMING: Final = (_CUDA, _ROCR)
#: Variables by driver. ROCR's selection is applied first; HIP's indexes refer to the selected GPUs.
_NVIDIA: Final = (_CUDA, "NVIDIA_VISIBLE_DEVICES")
_AMD: Final = (_ROCR,)
_ALL: Final = (*_NVIDIA, *_AMD, "HIP_VISIBLE_DEVICES")
#: Value for no device; an empty or unset variable means all devices to some drivers.
_NONE: Final = "-1"
_NONE_OF: Final = {"NVIDIA_VISIBLE_DEVICES": "void"}

#: Names of temporary folders next to those of the runs: incomplete, removed and probed runs.
NEW_PREFIX: Final = ".new-"
TRASH_PREFIX: Final = ".gone-"
PROBE_PREFIX: Final = ".probe-"
#: Seconds for which a successful probe is valid, and first and longest backoff after a failed one.
_PROBE_VALID: Final = 600.0
_PROBE_RETRY: Final = (15.0, 300.0)
#: Timeout of one probe in seconds, for a busy machine.
_PROBE_TIMEOUT: Final = 20.0
_PROBE_PAUSE: Final = 0.02
_PROBE_OUTPUT: Final = b"started\n"
_PROBE_SCRIPT: Final = b"echo started\n"
_log = get_logger(__name__)

T = TypeVar("T")


def device_names(count: int, environ: Mapping[str, str] | None = None) -> list[str]:
    """Return the names of at most `count` GPUs that a machine allocates."""
    env = os.environ if environ is None else environ
    for variable in _NAMING:
        if variable in env:
            names = [name.strip() for name in env[variable].split(",")]
            return [name for name in names if name and name != _NONE][:count]
    return [str(number) for number in range(count)]


def device_environment(devices: Sequence[str], dev: Path = Path("/dev")) -> dict[str, str]:
    """Return variables that expose these GPUs to a run and hide all others.

    The driver is detected by its devices in `dev`; if it is unknown, all variables are set.
    """
    if not devices:
        return {name: _NONE_OF.get(name, _NONE) for name in _ALL}
    names = ",".join(devices)
    # Only the order of the bus gives the same numbers in every driver and tool.
    order = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    if (dev / "kfd").exists() and not (dev / "nvidiactl").exists():
        return dict.fromkeys(_AMD, names)
    if (dev / "nvidiactl").exists():
        return dict.fromkeys(_NVIDIA, names) | order
    return dict.fromkeys(_ALL, names) | order


def free_devices(
    names: Sequence[str], used: Sequence[Sequence[str] | int], count: int
) -> list[str] | None:
    """Return the first `count` GPUs of `names` that no live run uses; None if there are too few.

    `used` holds, for each live run, the names of its GPUs, or their number if it has no names.
    """
    in_use = {name for allocated in used if not isinstance(allocated, int) for name in allocated}
    unused = [name for name in names if name not in in_use]
    unnamed = sum(allocated for allocated in used if isinstance(allocated, int))
    return unused[unnamed : unnamed + count] if len(unused) >= unnamed + count else None


#: Seconds to wait for a reply of the fork server, on a busy machine too.
_REPLY_TIMEOUT: Final = 30.0
#: Maximum bytes of a folder's name, with a margin.
_MAX_NAME_BYTES: Final = 300
_SOURCE: Final = str(Path(__file__).resolve().parents[2])


def make_run(
    runs: Path, spec: RunSpec, devices: Sequence[str] = (), isolation: Isolation | None = None
) -> RunFolder:
    """Create the folder of a run below `runs` by an atomic rename; an existing one is kept.

    `devices` are the names of its GPUs. Without `isolation` it is a plain process.

    Raises:
        OSError: The folder could not be created.
    """
    folder = RunFolder(runs / spec.key)
    temporary = RunFolder(runs / f"{NEW_PREFIX}{unique()}")
    resources = spec.resources
    record = {
        "key": spec.key,
        "env": dict(spec.env) | device_environment(devices),
        "walltime": spec.walltime,
        "cpus": resources.cpus,
        "memory": resources.memory,
        "gpus": resources.gpus,
        "devices": list(devices),
    }
    if isolation is not None:
        record["isolation"] = isolation.record(folder.path, devices)
    try:
        temporary.fill(record, spec.script, spec.walltime)
        crash_point("executor.filled")
        temporary.path.rename(folder.path)
        crash_point("executor.made")
    except OSError:
        # A concurrent submit of the same key won the race: its folder is used.
        if not folder.path.is_dir():
            raise
    finally:
        remove_tree(temporary.path)
    return folder


class Launched:
    """A supervisor started by this process; it reports when it has claimed the run.

    Args:
        report_pipe: Read end of the pipe for the report.
        process: Pidfd and pid of the supervisor; None when the fork server ended before it forked.
    """

    def __init__(self, report_pipe: int, process: tuple[int, int] | None) -> None:
        self._report_pipe: int | None = report_pipe
        self._handle: int | None = None
        self._pid = 0
        if process is not None:
            self._handle, self._pid = process
        self._claimed = False
        self._closing = threading.Lock()
        os.set_blocking(report_pipe, False)

    @property
    def report_pipe(self) -> int | None:
        """Descriptor that is readable after the report or the end; None once it has been read."""
        return self._report_pipe

    @property
    def ended(self) -> bool:
        """Whether the supervisor has ended; its report can still be read."""
        # Several threads of the daemon check runs.
        with self._closing:
            if self._handle is not None and _is_readable(self._handle, 0.0):
                os.close(self._handle)
                self._handle = None
            return self._handle is None

    def has_claimed(self) -> bool:
        """Return whether it reported that it claimed the run, which may have deleted its folder."""
        if self._report_pipe is not None and not self._claimed:
            with contextlib.suppress(BlockingIOError):  # no report yet
                self._claimed = bool(os.read(self._report_pipe, 1))
                self._close_report_pipe()
        return self._claimed

    def kill(self) -> None:
        """Kill the supervisor and its descendants."""
        if not self.ended:
            procfs.signal_trees([*procfs.descendants(self._pid), self._pid], signal.SIGKILL)
            if self._handle is not None:
                _is_readable(self._handle, _REPLY_TIMEOUT)
        self.release()

    def release(self) -> None:
        """Close the pipe: the supervisor is known to have claimed the run."""
        self._claimed = True
        self._close_report_pipe()

    def _close_report_pipe(self) -> None:
        if self._report_pipe is not None:
            os.close(self._report_pipe)
            self._report_pipe = None


class ForkServer:
    """Starts supervisors as forks of one process that has loaded their modules.

    A fork takes a tenth of the CPU time of a new interpreter. The server is started on demand and
    ends when this process ends, or after a time without requests. Supervisors do not depend on it.
    Thread-safe.
    """

    def __init__(self, runs: Path) -> None:
        self._runs = runs
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def start(self, folder: RunFolder, *, crashes: bool = True) -> Launched:
        """Start a supervisor, which claims the run or ends at once.

        Without `crashes`, the crash points of tests do not apply to it.

        Raises:
            OSError: No process could be started.
        """
        crash = os.environ.get(VARIABLE, "") if crashes else ""
        request = os.fsencode(folder.path) + b"\0" + crash.encode()
        report_pipe, sink = os.pipe()
        try:
            with folder.log.open("ab") as log, self._lock:
                process = None
                if self._socket is not None:
                    process = self._ask(request, sink, log.fileno())
                if process is None:
                    # There was no server, or it ended. If it forked before that, two supervisors
                    # race for the run: one claims it, and both report on the same pipe.
                    self._start_server(log)
                    process = self._ask(request, sink, log.fileno())
        except BaseException:
            os.close(report_pipe)
            raise
        finally:
            os.close(sink)
        return Launched(report_pipe, process)

    def close(self) -> None:
        """End the server. Supervisors continue."""
        with self._lock:
            self._end_server()

    def _start_server(self, log: IO[bytes]) -> None:
        self._end_server()
        env = {"PYTHONPATH": _SOURCE, "PYTHONDONTWRITEBYTECODE": "1"}
        # Some Python builds need it to start.
        if "LD_LIBRARY_PATH" in os.environ:
            env["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        # Without site packages and working folder: starts fast, and imports no foreign modules.
        # A supervisor overwrites the last argument with its folder, so that it can be identified.
        padding = "." * (len(os.fsencode(self._runs)) + _MAX_NAME_BYTES)
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
        """Request a supervisor; returns its pidfd and pid, None if the server is gone or hangs.

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
            reply, handles, _, _ = socket.recv_fds(server, 64, 1, socket.MSG_CMSG_CLOEXEC)
        except (BrokenPipeError, ConnectionError):
            reply = b""
        if not reply:
            self._end_server()
            return None
        number = int(reply)
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
    """Return whether a descriptor is readable within `seconds`.

    A pidfd is readable once its process has ended.
    """
    poller = select.poll()
    poller.register(handle, select.POLLIN)
    return bool(poller.poll(1000 * seconds))


def remove_tree(path: Path) -> None:
    """Remove a folder and everything in it, ignoring errors."""
    with contextlib.suppress(RecursionError):
        shutil.rmtree(path, ignore_errors=True)
    if path.exists():
        # A job may have nested folders without end, or removed its owner's permissions on them.
        _flatten(path)
        shutil.rmtree(path, ignore_errors=True)


def move_to_trash(folder: RunFolder) -> Path:
    """Rename the folder of a run and return its new path, so that a partly removed run has no key.

    Raises:
        OSError: The folder can't be renamed.
    """
    return folder.path.rename(folder.path.with_name(f"{TRASH_PREFIX}{unique()}"))


def _flatten(top: Path) -> None:
    """Move all folders in a tree directly into its top folder, with the owner's permissions."""
    with contextlib.suppress(OSError):
        top.chmod(0o700)
    folders = [top]
    while folders:
        entries: list[os.DirEntry[str]] = []
        with contextlib.suppress(OSError):
            entries = [*os.scandir(folders.pop())]
        for entry in entries:
            with contextlib.suppress(OSError):
                if entry.is_dir(follow_symlinks=False):
                    Path(entry.path).chmod(0o700)
                    folders.append(Path(entry.path).rename(top / f".{unique()}"))


class StartProbe:
    """Tests periodically whether this machine can start a run, with a small script; thread-safe."""

    def __init__(
        self, runs: Path, fork_server: ForkServer, isolation: Isolation | None = None
    ) -> None:
        self._runs = runs
        self._fork_server = fork_server
        self._isolation = isolation
        self._lock = threading.Lock()
        self._fault = ""
        self._due = 0.0
        self._retry = _PROBE_RETRY[0]

    def invalidate(self) -> None:
        """Invalidate the last probe after a failed start, so that the next claim probes again."""
        if not self._fault:
            self._due = 0.0

    def fault(self) -> str:
        """Return why nothing can be started here; empty when it can. Blocks during a probe."""
        with self._lock:
            if time.monotonic() >= self._due:
                self._probe_now()
            return self._fault

    def _probe_now(self) -> None:
        previous, self._fault = self._fault, self._probe()
        if self._fault:
            self._due = time.monotonic() + self._retry
            _log.error("start probe failed", reason=self._fault, retry_in=self._retry)
            self._retry = min(self._retry * 2, _PROBE_RETRY[1])
            return
        self._due = time.monotonic() + _PROBE_VALID
        self._retry = _PROBE_RETRY[0]
        if previous:
            _log.info("start probe recovered")

    def _probe(self) -> str:
        folder = RunFolder(self._runs / f"{PROBE_PREFIX}{unique()}")
        record: dict[str, Any] = {"key": "probe", "env": {}, "walltime": 30}
        record |= {"cpus": 1, "memory": 512, "gpus": 0}
        if self._isolation is not None:
            record["isolation"] = self._isolation.record(folder.path)
        try:
            folder.fill(record, _PROBE_SCRIPT, 30)
            return _outcome(folder, self._fork_server.start(folder, crashes=False))
        except OSError as error:
            return f"a test script could not be started: {error.strerror or error}"
        finally:
            remove_tree(folder.path)


def _outcome(folder: RunFolder, supervisor: Launched) -> str:
    deadline = time.monotonic() + _PROBE_TIMEOUT
    while not supervisor.ended:
        if time.monotonic() > deadline:
            supervisor.kill()
            return f"a test script did not end in {_PROBE_TIMEOUT:.0f} seconds"
        time.sleep(_PROBE_PAUSE)
    supervisor.release()
    ended, printed = folder.exit(), read_kept(folder.output, 0, 200)
    if ended is None:
        log = read_bytes(folder.log, 0, 65536).decode(errors="replace").strip()
        reason = log.splitlines()[-1][:200] if log else "it did not leave a record"
        return f"the supervisor of a test script failed: {reason}"
    if ended["code"] == 0 and printed == _PROBE_OUTPUT:
        return ""
    reason = " ".join(printed.decode(errors="replace").split())[:200]
    return f"a test script ended with code {ended['code']}: {reason or 'it has no output'}"


async def in_thread(work: Callable[..., T], *arguments: object) -> T:
    """Run blocking work in a thread and return its result.

    Raises:
        ExecutorUnavailableError: The machine can't start another thread.
    """
    try:
        return await asyncio.to_thread(work, *arguments)
    except RuntimeError as error:
        # Python has no specific exception for this.
        if "can't start new thread" not in str(error):
            raise
        raise ExecutorUnavailableError(
            "No thread can be started on this machine",
            hint="There are too many processes, or a limit on them: see `ulimit -u`.",
        ) from None
