"""Supervisors: each isolates and runs one batch script to its end, and writes an exit record.

The module runs as a fork server: it loads the modules of a supervisor, and forks one for each
request of the daemon on the socket that is its stdin (`launch.ForkServer`). A supervisor has its
own session and continues after the end of the daemon. It is the subreaper of all processes of the
script, so that no descendant can escape: when it has no child left, the run's processes are gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import gc
import math
import os
import resource
import select
import signal
import socket
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from stat import S_ISREG
from typing import Any, Final, NoReturn

from deepsquare_chain.executors import procfs
from deepsquare_chain.executors.cgroups import JobCgroup
from deepsquare_chain.executors.orphaned_processes import SUPERVISOR_MODULE
from deepsquare_chain.executors.procfs import BLOCK_BYTES, SHARED, MemoryMeter
from deepsquare_chain.executors.rundir import (
    GRACE,
    LARGE_FILE,
    MARK,
    OUTPUT_LIMIT,
    SANDBOX_HOME,
    SANDBOX_SCRIPT,
    OutputWriter,
    RunFolder,
    disk_usage,
    exit_record,
    finite_number,
    unique,
)
from deepsquare_chain.faults import VARIABLE, crash_point
from deepsquare_chain.job import MEGABYTE

#: Minimum seconds between two measurements of the disk, and the minimum ratio of pause to
#: measurement: a job with millions of files must not cost the provider a CPU.
_DISK_PAUSE: Final = 0.5
_DISK_SHARE: Final = 20
#: Free bytes below which a disk counts as full; and maximum bytes of a run that can't have filled
#: it, because no provider claims with less free disk than that.
_FULL_DISK: Final = MEGABYTE
_MIN_DISK_FLOOR: Final = 64 * MEGABYTE
#: Minimum limit of a single file in bytes, for the supervisor's own files.
_MIN_FILE_LIMIT: Final = 16 * MEGABYTE
#: Processes of bubblewrap itself.
_BUBBLEWRAP_PROCESSES: Final = 2
#: Enters the groups given before `--` and executes the command after it.
_ENTER_GROUPS: Final = (
    'while [ "$1" != -- ]; do echo 0 >"$1" || exit 126; shift; done; shift; exec "$@"'
)


class Confinement:
    """Limits and sandbox of one run."""

    def __init__(self, folder: RunFolder, spec: Mapping[str, Any]) -> None:
        isolation: Mapping[str, Any] = spec.get("isolation") or {}
        self._folder = folder
        self._wrapper = [str(part) for part in isolation.get("command", ())]
        self._group = JobCgroup.from_record(isolation.get("cgroup", {}))
        self._disk = int(isolation.get("disk", 0)) * MEGABYTE
        self._processes = int(isolation.get("processes", 0))
        self._memory = int(spec["memory"]) * MEGABYTE
        self._cpus = int(spec.get("cpus", 1))
        self._next_disk = time.monotonic() + _DISK_PAUSE  # short jobs are not measured
        self._device = 0
        self._large: dict[int, int] = {}  # sizes of large files by inode, as last measured
        #: Folders that the script can fill, as it sees them.
        self._writable = [SANDBOX_HOME, "/tmp", "/var/tmp"]  # noqa: S108 - in the sandbox
        if not self._wrapper:
            self._writable = [os.path.realpath(folder.path)]

    @property
    def is_sandboxed(self) -> bool:
        """Whether the script runs under bubblewrap."""
        return bool(self._wrapper)

    @property
    def limits_memory(self) -> bool:
        """Whether the kernel enforces the memory limit."""
        return self._group is not None and self._group.limits("memory")

    @property
    def home(self) -> str:
        """The script's home and working folder, inside the sandbox if there is one."""
        return SANDBOX_HOME if self._wrapper else str(self._folder.work)

    @property
    def script(self) -> str:
        """Path of the script, inside the sandbox if there is one."""
        return SANDBOX_SCRIPT if self._wrapper else str(self._folder.script)

    def begin(self) -> None:
        """Create the control groups, and set the limit of a single file.

        Raises:
            OSError: A group can't be created.
        """
        if self._disk:
            self._device = self._folder.work.stat().st_dev
            largest = max(self._disk, _MIN_FILE_LIMIT)
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            if hard == resource.RLIM_INFINITY or hard > largest:
                resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
        if self._group is not None:
            self._group.make(memory=self._memory, cpus=self._cpus, processes=self._processes)

    def command(self, inner: list[str]) -> list[str]:
        """Wrap a command to run within the groups and the sandbox."""
        command = [*self._wrapper, *inner]
        if self._group is not None:
            command = ["/bin/sh", "-c", _ENTER_GROUPS, "sh", *self._group.entrances, "--", *command]
        return command

    def cause(self, now: float) -> str:
        """Return the exceeded limit that ends the run at monotonic time `now`.

        One of memory, disk and processes; empty for none.
        """
        if self._group is not None and self._group.ran_out_of_memory():
            return "memory"
        kernel_limits = self._group is not None and self._group.limits("pids")
        if self._processes and not kernel_limits:
            count = len(procfs.descendants(os.getpid()))
            if count > self._processes + _BUBBLEWRAP_PROCESSES:
                return "processes"
        return "disk" if self._exceeds_disk(now) else ""

    def shared_memory(self, pid: int) -> int:
        """Return the bytes in the own /dev/shm of the sandbox of this bubblewrap process."""
        inside = procfs.descendants(pid)[:1] if self._wrapper else []
        for child in inside:
            with contextlib.suppress(OSError):
                folder = f"{procfs.PROC}/{child}/root{SHARED}"
                # During its set-up, the sandbox still has the root of the machine.
                if os.stat(folder).st_dev != os.stat(SHARED).st_dev:
                    file_system = os.statvfs(folder)
                    return (file_system.f_blocks - file_system.f_bfree) * file_system.f_frsize
        return 0

    def verdict(self, status: int | None) -> str:
        """Return the limit that caused the end of a script with this `waitpid` status, or empty."""
        if self._group is not None and self._group.ran_out_of_memory():
            return "memory"
        if status is not None and self._disk:
            code = os.waitstatus_to_exitcode(status)
            if code in {-signal.SIGXFSZ, 128 + signal.SIGXFSZ}:
                return "disk"
        return "disk" if self._exceeds_disk(float("inf")) else ""

    def disk_is_full(self) -> bool:
        """Return whether the machine's disk is full, and this run did not fill it."""
        if not self._disk:
            return False
        state = os.statvfs(self._folder.work)
        if int(state.f_bavail * state.f_frsize) >= _FULL_DISK:
            return False
        return self._disk_used(_MIN_DISK_FLOOR) <= _MIN_DISK_FLOOR

    def end(self) -> None:
        """Kill remaining processes in the groups, and remove the groups."""
        if self._group is not None:
            try:
                self._group.end()
            except OSError:
                return  # retried by the process that handles the ended run

    def _exceeds_disk(self, now: float) -> bool:
        if not self._disk or now < self._next_disk:
            return False
        started_at = time.monotonic()
        used = self._disk_used(self._disk)
        duration = time.monotonic() - started_at
        self._next_disk = time.monotonic() + max(_DISK_PAUSE, _DISK_SHARE * duration)
        return used > self._disk

    def _disk_used(self, limit: int) -> int:
        """Return the run's disk usage in bytes; stops counting above `limit`."""
        deleted = self._deleted_files()
        used, self._large = sum(deleted.values()), deleted
        for folder in (self._folder.work, self._folder.temporary):
            used += disk_usage(str(folder), limit - used, self._large)
        return used

    def _deleted_files(self) -> dict[int, int]:
        """Return the bytes of deleted files that the run has open or mapped, by inode.

        Only root may read the size of a file that is mapped but not open. Its mapped part counts,
        or its size at the previous measurement, or the minimum size that is kept from there.
        """
        opened: dict[int, int] = {}
        mapped: dict[int, int] = {}
        for pid in procfs.descendants(os.getpid()):
            with contextlib.suppress(OSError):
                for name in os.listdir(f"{procfs.PROC}/{pid}/fd"):
                    with contextlib.suppress(OSError):
                        state = os.stat(f"{procfs.PROC}/{pid}/fd/{name}")
                        is_ours = state.st_dev == self._device and S_ISREG(state.st_mode)
                        if is_ours and not state.st_nlink:
                            opened[state.st_ino] = state.st_blocks * BLOCK_BYTES
            with contextlib.suppress(OSError):
                for inode, end in procfs.deleted_mappings(pid, self._writable):
                    size = max(end, self._large.get(inode, LARGE_FILE))
                    mapped[inode] = max(size, mapped.get(inode, 0))
        return mapped | opened


#: Seconds between two checks of limits and control file, and the maximum if checks are slow: they
#: may take one part in `_CHECK_SHARE` of the time.
TICK: Final = 0.25
_MAX_TICK: Final = 2.0
_CHECK_SHARE: Final = 20
#: Seconds between two kills of remaining processes, and pause after much output or many events.
_KILL_INTERVAL: Final = 0.05
_THROTTLE: Final = 0.01
_PR_SET_CHILD_SUBREAPER: Final = 36
#: Number of the system call keyctl by machine, for which the C library has no function.
_KEYCTL: Final[Mapping[str, int]] = {"x86_64": 250, "aarch64": 219, "riscv64": 219, "ppc64le": 271}
_JOIN_SESSION_KEYRING: Final = 1
_PIPE_BYTES: Final = 256 * 1024
_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#: Exit code of a supervisor whose run was claimed before.
TAKEN: Final = 3
#: Possible paths of bash; the first that exists is used.
_SHELLS: Final = (
    "/bin/bash",
    "/usr/bin/bash",
    "/usr/local/bin/bash",
    "/run/current-system/sw/bin/bash",
)
#: Descriptor on which the shell reports its start, and the command that does so before the script.
_REPORT_DESCRIPTOR: Final = 9
_START: Final = f'printf . >&{_REPORT_DESCRIPTOR} && exec "$0" "$1" {_REPORT_DESCRIPTOR}>&-'
#: Jobs run at a lower priority than the daemon, so that many of them do not delay claims and
#: reports.
_NICE: Final = 5
#: Seconds without a request after which the fork server ends.
_SERVER_IDLE: Final = 60.0
_REQUEST_BYTES: Final = 8192
#: Index of arg_start in /proc/PID/stat, counted from the state; arg_end is the next field.
_ARG_START: Final = 45
_SIGNAL_BASE: Final = 128
_MAX_SIGNAL: Final = 64
_libc: Any = ctypes.CDLL(None, use_errno=True)


class Supervisor:
    """Supervises one run, from its claim to its exit record."""

    def __init__(self, folder: RunFolder) -> None:
        spec = folder.spec()
        self._folder = folder
        self._env: dict[str, str] = spec["env"]
        self._memory = int(spec["memory"]) * MEGABYTE
        self._confinement = Confinement(folder, spec)
        self._token = unique(16)
        self._reserved = folder.reserve_exit()
        self._walltime = int(spec["walltime"])
        self._cancelled = False
        self._next_check = 0.0
        self._control_version = (0, 0)
        self._pid = 0
        self._status: int | None = None
        self._failure = ""
        self._pipe, self._wakeup, self._start_report = -1, -1, -1
        self._meter: MemoryMeter | None = None
        self._output = OutputWriter(folder.output, OUTPUT_LIMIT)

    def claim(self) -> bool:
        """Claim the run; returns False when another supervisor, or a cancel, claimed it first."""
        if self._folder.claim(procfs.identify(os.getpid()), self._token):
            crash_point("supervisor.claimed")
            _report_claim()
            return True
        self._reserved.unlink(missing_ok=True)
        return False

    def run(self) -> None:
        """Run the script to its end and write the exit record."""
        self._wakeup = self._listen()
        self._started_at, self._started = time.time(), time.monotonic()
        reason = ""
        if self._spawn():
            reason = self._watch()
            self._end_tree()
            reason = reason or self._confinement.verdict(self._status) or self._fault()
        self._confinement.end()
        if self._meter is not None:
            self._meter.clear()
            self._meter = None
        seconds = math.ceil(time.monotonic() - self._started)
        self._drain()
        self._output.close()
        crash_point("supervisor.ended")
        self._record(*self._verdict(reason), seconds)
        crash_point("supervisor.recorded")

    def _listen(self) -> int:
        """Make signals wake the loop; the handlers are reset when the script is executed."""
        read, write = os.pipe()
        os.set_blocking(read, False)
        os.set_blocking(write, False)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for number in (signal.SIGCHLD, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        signal.signal(signal.SIGTERM, self._on_term)
        return read

    def _on_term(self, *_: object) -> None:
        self._cancelled = True

    def _spawn(self) -> bool:
        """Start the script in its own session, folder and environment."""
        self._pipe, sink = os.pipe()
        self._start_report, start_sink = os.pipe()
        os.set_blocking(self._pipe, False)
        os.set_blocking(self._start_report, False)
        with contextlib.suppress(OSError):
            # Fewer, larger reads for a job with endless output.
            fcntl.fcntl(self._pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        try:
            self._confinement.begin()
            if not self._confinement.limits_memory:
                self._meter = MemoryMeter(self._started_at)
            self._pid = self._execute(sink, start_sink)
        except OSError as error:
            self._failure = f"The script could not be started: {error.strerror}\n"
            return False
        finally:
            os.close(sink)
            os.close(start_sink)
        crash_point("supervisor.spawned")
        # Optional: the job of a dead supervisor is also found by its mark.
        with contextlib.suppress(OSError):
            self._folder.set_job(procfs.identify(self._pid), self._started_at, self._started)
        return True

    def _execute(self, sink: int, start_sink: int) -> int:
        """Start the script with output to `sink`; returns its pid. The shell reports to `start_sink`.

        Not by `subprocess`, which takes longer to load than a short job runs.
        """
        shell = _shell()
        # With -p the first shell reads no start-up file; the second one does.
        begin = [shell, "-p", "-c", _START, shell, self._confinement.script]
        command = self._confinement.command(begin)
        os.chdir(self._folder.work)
        try:
            return os.posix_spawn(
                command[0],
                command,
                self._environment(),
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_DUP2, sink, 1),
                    (os.POSIX_SPAWN_DUP2, sink, 2),
                    (os.POSIX_SPAWN_DUP2, start_sink, _REPORT_DESCRIPTOR),
                ],
                setsid=True,
                # Python ignores these signals, and the script would inherit that.
                setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],
            )
        finally:
            os.chdir("/")

    def _environment(self) -> dict[str, str]:
        base = {"PATH": _PATH, "HOME": self._confinement.home, "LANG": "C.UTF-8"}
        return base | self._env | {MARK: self._token}

    def _watch(self) -> str:
        """Wait for the script's end; returns the cause to end it early, or an empty string."""
        while True:
            self._reap()
            if self._status is not None:
                return ""
            cause = self._cause()
            if cause:
                return cause
            self._wait(max(self._next_check - time.monotonic(), 0.0))

    def _cause(self) -> str:
        now = time.monotonic()
        # Output wakes the loop far more often than these causes need a check.
        if now < self._next_check and not self._cancelled:
            return ""
        self._read_control()
        if self._cancelled:
            return "cancelled"
        if now - self._started >= self._walltime:
            return "walltime"
        cause = self._confinement.cause(now)
        if not cause and self._meter is not None:
            shared_memory = self._confinement.shared_memory(self._pid)
            if self._meter.exceeds(self._memory, shared_memory):
                cause = "memory"
        # Checks of very many processes are slow.
        pause = max(TICK, min(_MAX_TICK, _CHECK_SHARE * (time.monotonic() - now)))
        self._next_check = now + min(pause, self._started + self._walltime - now)
        return cause

    def _read_control(self) -> None:
        # A control file that a job removed or damaged is ignored.
        with contextlib.suppress(OSError, KeyError):
            info = (self._folder.path / "control.json").stat()
            version = (info.st_ino, info.st_mtime_ns)
            if version != self._control_version:
                control = self._folder.control()
                self._walltime = int(finite_number(control, "walltime"))
                self._cancelled = self._cancelled or bool(control["cancel"])
                self._control_version = version

    def _wait(self, seconds: float) -> None:
        """Sleep until a signal, output or the timeout; reads the output."""
        memory_events = -1 if self._meter is None else self._meter.events
        watched = [fd for fd in (self._wakeup, self._pipe, memory_events) if fd >= 0]
        ready, _, _ = select.select(watched, (), (), seconds)
        if self._wakeup in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(self._wakeup, 4096)
        if memory_events in ready and self._meter is not None:
            self._meter.notice()
            time.sleep(_THROTTLE)  # limits the load by a job that opens files in a loop
        if self._pipe in ready and self._pump() >= _PIPE_BYTES:
            # Backpressure: more than some 25 MB per second would cost the provider a core.
            time.sleep(_THROTTLE)

    def _pump(self) -> int:
        """Read one part of the output; returns its size, 0 when there is none."""
        try:
            data = os.read(self._pipe, _PIPE_BYTES)
        except OSError as error:
            if error.errno == errno.EAGAIN:
                return 0
            data = b""
        if not data:
            os.close(self._pipe)
            self._pipe = -1
        else:
            self._output.take(data)
        return len(data)

    def _drain(self) -> None:
        # Bounded, because a foreign process may hold the pipe open.
        for _ in range(64):
            if self._pipe < 0 or not self._pump():
                break
        if self._failure:
            self._output.take(self._failure.encode())

    def _reap(self) -> bool:
        """Reap ended children; returns True while any process of the run is left."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            if pid == self._pid:
                self._status = status

    def _end_tree(self) -> None:
        """Send TERM to the remaining processes, and KILL after the grace period."""
        if not self._reap():
            return
        pids = procfs.descendants(os.getpid())
        if self._confinement.is_sandboxed:
            # Bubblewrap itself would end at once, and the script's exit code would be lost.
            pids = [pid for pid in pids if pid != self._pid]
            procfs.signal_each(pids, signal.SIGTERM)
            procfs.signal_each(pids, signal.SIGCONT)
        else:
            procfs.signal_trees(pids, signal.SIGTERM)
            # A stopped process handles its TERM only after CONT.
            procfs.signal_trees(pids, signal.SIGCONT)
        deadline = time.monotonic() + GRACE
        while self._reap():
            if time.monotonic() >= deadline:
                procfs.signal_trees(procfs.descendants(os.getpid()), signal.SIGKILL)
            self._wait(_KILL_INTERVAL)

    def _fault(self) -> str:
        """Return the reason if the machine caused the failure of the run; empty otherwise.

        If the shell never reached the script, the sandbox, the control groups or the shell failed,
        whatever their exit code is. A missing program is the script's failure; a full disk that
        the script did not fill is the machine's.
        """
        try:
            has_begun = bool(os.read(self._start_report, 1))
        except BlockingIOError:
            has_begun = False
        if not has_begun:
            self._failure = "The script was not executed\n"
            return "unstarted"
        with contextlib.suppress(OSError):
            if self._status and self._confinement.disk_is_full():
                self._failure = "The disk of the provider's machine is full\n"
                return "full"
        return ""

    def _verdict(self, reason: str) -> tuple[int, str]:
        if self._status is None:
            return 126, reason or "unstarted"
        code = os.waitstatus_to_exitcode(self._status)
        if self._confinement.is_sandboxed and _SIGNAL_BASE < code <= _SIGNAL_BASE + _MAX_SIGNAL:
            # Bubblewrap exits with this code when a signal ended the script.
            code = _SIGNAL_BASE - code
        if code < 0:
            return _SIGNAL_BASE - code, reason or "signalled"
        # A script that traps TERM and exits with 0 was still stopped.
        return (code or 128 + signal.SIGTERM if reason else code), reason or "exited"

    def _record(self, code: int, reason: str, seconds: int) -> None:
        if reason == "unstarted":
            seconds = 0
        record = exit_record(code, reason, seconds, self._started_at, time.time())
        reserved: Path | None = self._reserved
        pause = 0.1
        while self._folder.path.is_dir():
            try:
                self._folder.set_exit(record, reserved)
            except OSError:
                # The reserved file may be gone; retry as long as the folder exists.
                reserved = None
                time.sleep(pause)
                pause = min(pause * 2, 10.0)
            else:
                return


def _shell() -> str:
    return next((path for path in _SHELLS if os.path.exists(path)), _SHELLS[0])


def _report_claim() -> None:
    """Report the claim to the parent on stdout: a run may delete its folder with the claim."""
    with contextlib.suppress(OSError):  # the reader is gone
        os.write(1, b"t")
    null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    os.dup2(null, 1)
    os.close(null)


def _become_subreaper() -> None:
    if _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "can't become the subreaper of the run")


def _join_new_keyring() -> None:
    """Leave the session keyring of the daemon: a sandbox does not hide its keys.

    Fails without consequence where the kernel has no keyrings. A user may own only some 200 keys; beyond
    that a run shares the keyring of the fork server, which has none of the daemon's keys either.
    """
    number = _KEYCTL.get(os.uname().machine)
    if number is not None:
        _libc.syscall(number, _JOIN_SESSION_KEYRING, None)


def _show_in_command_line(folder: str) -> None:
    """Set the command line of this process in /proc and `ps` to `SUPERVISOR_MODULE FOLDER`.

    The kernel reads it from the process's memory, between two addresses given in /proc; the fork
    server was started with an argument that is long enough.
    """
    raw = procfs.read(f"{procfs.PROC}/self/stat")
    fields = raw[raw.rindex(b")") + 2 :].split()
    start, end = int(fields[_ARG_START]), int(fields[_ARG_START + 1])
    line = b"\0".join((SUPERVISOR_MODULE.encode(), os.fsencode(folder), b""))
    if len(line) <= end - start:
        ctypes.memmove(start, line.ljust(end - start, b"\0"), end - start)


def main(arguments: list[str]) -> int:
    """Supervise the run in the folder `arguments[0]`; returns `TAKEN` if it was claimed before."""
    os.umask(0o077)
    _join_new_keyring()
    _become_subreaper()
    # A core dump would be written to the state folder, without a size limit.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    supervisor = Supervisor(RunFolder(Path(arguments[0])))
    if not supervisor.claim():
        return TAKEN
    supervisor.run()
    return 0


def serve(server: socket.socket) -> None:
    """Fork a supervisor for each request, until the daemon is gone or idle for `_SERVER_IDLE`.

    A request is the folder and the crash point of a test, separated by NUL, with two descriptors:
    the pipe for the report of the claim, and the supervisor's log. The reply is the pid, with its
    pidfd; or an error number.
    """
    _join_new_keyring()
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    os.dup2(null, 2)  # stderr is the log of the run for which the server was started
    wakeup, sink = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(sink, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    gc.collect()
    gc.freeze()  # keeps memory shared with forks (copy-on-write)
    while True:
        ready, _, _ = select.select([server.fileno(), wakeup], (), (), _SERVER_IDLE)
        if wakeup in ready:
            os.read(wakeup, 4096)
            _reap_ended()
        elif not ready:
            return
        if server.fileno() not in ready:
            continue
        request, handles, _, _ = socket.recv_fds(server, _REQUEST_BYTES, 2, socket.MSG_CMSG_CLOEXEC)
        if not request:
            return
        try:
            pid = os.fork()
        except OSError as error:
            server.send(str(error.errno).encode())
        else:
            if pid == 0:
                _become_supervisor(server, request, null, handles, (wakeup, sink))
            handle = os.pidfd_open(pid)  # only this process reaps it, so the pid is not reused
            socket.send_fds(server, [str(pid).encode()], [handle])
            os.close(handle)
        for handle in handles:
            os.close(handle)


def _reap_ended() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _become_supervisor(
    server: socket.socket,
    request: bytes,
    null_device: int,
    handles: list[int],
    unused: Iterable[int],
) -> NoReturn:
    """In the fork: close the descriptors of the fork server, and run the supervisor."""
    code = 1
    try:
        os.setsid()
        for target, handle in enumerate((null_device, *handles)):
            os.dup2(handle, target)
        signal.set_wakeup_fd(-1)
        for handle in (null_device, *handles, *unused, server.detach()):
            if handle > 2:
                os.close(handle)
        folder, _, crash = request.partition(b"\0")
        if crash:
            os.environ[VARIABLE] = crash.decode()
        os.nice(_NICE)
        _show_in_command_line(os.fsdecode(folder))
        code = main([os.fsdecode(folder)])
    except BaseException:  # noqa: BLE001 - the fork must not continue the fork server's code
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)


if __name__ == "__main__":
    serve(socket.socket(fileno=0))
