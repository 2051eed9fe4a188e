"""Isolation of a run by its supervisor: control groups, disk quota and sandbox command.

All settings are in the specification of the run, written by `sandbox.Isolation`. Without them a run
is a plain process. Supervisors import this module, so it has no heavy imports.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import time
from collections.abc import Iterable, Mapping
from stat import S_ISREG
from typing import Any, Final

from deepsquare_chain.executors import procfs
from deepsquare_chain.executors.cgroups import JobCgroup
from deepsquare_chain.executors.procfs import SHARED
from deepsquare_chain.executors.rundir import SANDBOX_HOME, SANDBOX_SCRIPT, RunFolder
from deepsquare_chain.job import MEGABYTE

_BLOCK: Final = 512
#: Minimum bytes that a file or folder counts, for its inode.
_INODE: Final = 1024
#: Minimum seconds between two measurements of the disk, and the minimum ratio of pause to
#: measurement: a job with millions of files must not cost the provider a CPU.
_DISK_PAUSE: Final = 0.5
_DISK_SHARE: Final = 20
#: Bytes below which a disk counts as full, and maximum bytes of a run that can't have filled it: no
#: provider claims with less free disk than that.
_FULL: Final = MEGABYTE
_LEAST_FLOOR: Final = 64 * MEGABYTE
#: Minimum limit of a single file in bytes, for the supervisor's own files.
_LEAST_FILE: Final = 16 * MEGABYTE
#: Processes of bubblewrap itself.
_OF_THE_SANDBOX: Final = 2
#: Enters the groups given before `--` and executes the command after it.
_ENTER: Final = 'while [ "$1" != -- ]; do echo 0 >"$1" || exit 126; shift; done; shift; exec "$@"'


class Confinement:
    """Limits and sandbox of one run.

    Args:
        folder: Folder of the run.
        spec: Specification of the run.
    """

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
            largest = max(self._disk, _LEAST_FILE)
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            if hard == resource.RLIM_INFINITY or hard > largest:
                resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
        if self._group is not None:
            self._group.make(memory=self._memory, cpus=self._cpus, processes=self._processes)

    def command(self, inner: list[str]) -> list[str]:
        """Wrap a command to run within the groups and the sandbox."""
        command = [*self._wrapper, *inner]
        if self._group is not None:
            command = ["/bin/sh", "-c", _ENTER, "sh", *self._group.entrances, "--", *command]
        return command

    def cause(self, now: float) -> str:
        """Return the exceeded limit that ends the run: memory, disk, processes, or empty for none.

        Args:
            now: Monotonic seconds.
        """
        if self._group is not None and self._group.ran_out_of_memory():
            return "memory"
        kernel_limits = self._group is not None and self._group.limits("pids")
        if self._processes and not kernel_limits:
            count = len(procfs.descendants(os.getpid()))
            if count > self._processes + _OF_THE_SANDBOX:
                return "processes"
        return "disk" if self._exceeds_disk(now) else ""

    def shared_memory(self, pid: int) -> int:
        """Return the bytes in the sandbox's own /dev/shm, which is invisible outside.

        Args:
            pid: Pid of bubblewrap, outside of the sandbox.
        """
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
        """Return the limit that caused the end of a script, empty for none.

        Args:
            status: Status of the script's process from `waitpid`.
        """
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
        if int(state.f_bavail * state.f_frsize) >= _FULL:
            return False
        return self._disk_used(_LEAST_FLOOR) <= _LEAST_FLOOR

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
        used = _deleted_files(procfs.descendants(os.getpid()), self._device)
        for folder in (self._folder.work, self._folder.temporary):
            used += disk_usage(str(folder), limit - used)
        return used


def disk_usage(folder: str, limit: int) -> int:
    """Return the disk usage of a folder in bytes; stops counting above `limit`.

    Holes of sparse files do not count; each hard link counts. Links are not followed.
    """
    used = 0
    folders = [folder]
    while folders:
        for entry in _entries(folders.pop()):
            try:
                state = entry.stat(follow_symlinks=False)
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
            except OSError:
                continue
            used += state.st_blocks * _BLOCK + _INODE
            if used > limit:
                return used
    return used


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """List a folder; restores the owner's permissions if the job removed them."""
    flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    for _ in range(2):
        try:
            with os.scandir(folder) as entries:
                return list(entries)
        except PermissionError:
            with contextlib.suppress(OSError):
                handle = os.open(folder, flags)
                try:
                    os.chmod(f"/proc/self/fd/{handle}", 0o700)
                finally:
                    os.close(handle)
        except OSError:
            break  # removed meanwhile
    return []


def _deleted_files(pids: Iterable[int], device: int) -> int:
    """Return the bytes of deleted files on a device that processes hold open."""
    sizes: dict[int, int] = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            for name in os.listdir(f"{procfs.PROC}/{pid}/fd"):
                with contextlib.suppress(OSError):
                    state = os.stat(f"{procfs.PROC}/{pid}/fd/{name}")
                    if not state.st_nlink and state.st_dev == device and S_ISREG(state.st_mode):
                        sizes[state.st_ino] = state.st_blocks * _BLOCK
    return sum(sizes.values())
