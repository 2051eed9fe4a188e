"""What a supervisor does for the isolation of its run: control groups, disk quota, the command.

The specification of the run says everything; `sandbox.Isolation` wrote it. Without it a run is a
plain process. The supervisor imports this, so nothing heavy is imported here.
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
from deepsquare_chain.executors.memory import SHARED
from deepsquare_chain.executors.rundir import SANDBOX_HOME, SANDBOX_SCRIPT, RunFolder
from deepsquare_chain.job import MEGABYTE

_BLOCK: Final = 512
#: Bytes that a file or folder counts at least, for the inode that it takes.
_INODE: Final = 1024
#: Least seconds between two measurements of the disk, and how many times longer than the
#: measurement the pause is: a job with millions of files must not cost the provider a CPU.
_DISK_PAUSE: Final = 0.5
_DISK_SHARE: Final = 20
#: Bytes below which a disk counts as full, and most bytes of a run that can't have filled it: no
#: provider claims below a floor of so much.
_FULL: Final = MEGABYTE
_LEAST_FLOOR: Final = 64 * MEGABYTE
#: Bytes of a single file that a supervisor itself may need.
_LEAST_FILE: Final = 16 * MEGABYTE
#: Processes that bubblewrap itself takes.
_OF_THE_SANDBOX: Final = 2
#: Enters the groups named before `--` and becomes the command behind it.
_ENTER: Final = 'while [ "$1" != -- ]; do echo 0 >"$1" || exit 126; shift; done; shift; exec "$@"'


class Confinement:
    """Limits and sandbox of one run.

    Args:
        folder: Of the run.
        spec: Its specification.
    """

    def __init__(self, folder: RunFolder, spec: Mapping[str, Any]) -> None:
        found: Mapping[str, Any] = spec.get("isolation") or {}
        self._folder = folder
        self._wrapper = [str(part) for part in found.get("command", ())]
        self._group = JobCgroup.from_record(found.get("cgroup", {}))
        self._disk = int(found.get("disk", 0)) * MEGABYTE
        self._processes = int(found.get("processes", 0))
        self._memory = int(spec["memory"]) * MEGABYTE
        self._cpus = int(spec.get("cpus", 1))
        self._next_disk = time.monotonic() + _DISK_PAUSE  # short jobs cost no measurement
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
        """The script's home and working folder, as the script sees it."""
        return SANDBOX_HOME if self._wrapper else str(self._folder.work)

    @property
    def script(self) -> str:
        """The script, as its shell sees it."""
        return SANDBOX_SCRIPT if self._wrapper else str(self._folder.script)

    def begin(self) -> None:
        """Make the control groups, and set the limit of a single file.

        Raises:
            OSError: A group can't be made.
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
        """The command that runs another one within the groups and the sandbox."""
        command = [*self._wrapper, *inner]
        if self._group is not None:
            command = ["/bin/sh", "-c", _ENTER, "sh", *self._group.entrances, "--", *command]
        return command

    def cause(self, now: float) -> str:
        """Why the run must end now: memory, disk or processes; empty for no reason.

        Args:
            now: Monotonic seconds.
        """
        if self._group is not None and self._group.ran_out_of_memory():
            return "memory"
        counted = self._group is not None and self._group.limits("pids")
        if self._processes and not counted:
            found = len(procfs.descendants(os.getpid()))
            if found > self._processes + _OF_THE_SANDBOX:
                return "processes"
        return "disk" if self._exceeds_disk(now) else ""

    def shared_memory(self, pid: int) -> int:
        """Bytes in the sandbox's own /dev/shm, which nothing outside can see.

        Args:
            pid: Of bubblewrap, outside of the sandbox.
        """
        inside = procfs.descendants(pid)[:1] if self._wrapper else []
        for child in inside:
            with contextlib.suppress(OSError):
                place = f"{procfs.PROC}/{child}/root{SHARED}"
                # Until it is set up, the sandbox has the root of the machine.
                if os.stat(place).st_dev != os.stat(SHARED).st_dev:
                    state = os.statvfs(place)
                    return (state.f_blocks - state.f_bfree) * state.f_frsize
        return 0

    def verdict(self, status: int | None) -> str:
        """The limit that ended a script which ended by itself, empty for none.

        Args:
            status: Of the script's process, as `waitpid` gives it.
        """
        if self._group is not None and self._group.ran_out_of_memory():
            return "memory"
        if status is not None and self._disk:
            code = os.waitstatus_to_exitcode(status)
            if code in {-signal.SIGXFSZ, 128 + signal.SIGXFSZ}:
                return "disk"
        return "disk" if self._exceeds_disk(float("inf")) else ""

    def disk_is_full(self) -> bool:
        """Whether the machine's disk is full, and not by this run."""
        if not self._disk:
            return False
        state = os.statvfs(self._folder.work)
        if int(state.f_bavail * state.f_frsize) >= _FULL:
            return False
        return self._disk_used(_LEAST_FLOOR) <= _LEAST_FLOOR

    def end(self) -> None:
        """End what is left in the groups, and remove them."""
        if self._group is not None:
            try:
                self._group.end()
            except OSError:
                return  # whoever finds the run ended tries again

    def _exceeds_disk(self, now: float) -> bool:
        if not self._disk or now < self._next_disk:
            return False
        began = time.monotonic()
        used = self._disk_used(self._disk)
        spent = time.monotonic() - began
        self._next_disk = time.monotonic() + max(_DISK_PAUSE, _DISK_SHARE * spent)
        return used > self._disk

    def _disk_used(self, limit: int) -> int:
        """Bytes that the run takes on disk; stops to count once they are more than `limit`."""
        used = _deleted_files(procfs.descendants(os.getpid()), self._device)
        for folder in (self._folder.work, self._folder.temporary):
            used += disk_usage(str(folder), limit - used)
        return used


def disk_usage(folder: str, limit: int) -> int:
    """Bytes that a folder takes on disk; stops to count once they are more than `limit`.

    Holes of sparse files do not count; hard links count each. Links are not followed.
    """
    used = 0
    waiting = [folder]
    while waiting:
        for entry in _entries(waiting.pop()):
            try:
                state = entry.stat(follow_symlinks=False)
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
            except OSError:
                continue
            used += state.st_blocks * _BLOCK + _INODE
            if used > limit:
                return used
    return used


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """What is in a folder; one that the job closed to its owner is opened again."""
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
    """Bytes of files on a device that have no name any more and that processes hold open."""
    found: dict[int, int] = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            for name in os.listdir(f"{procfs.PROC}/{pid}/fd"):
                with contextlib.suppress(OSError):
                    state = os.stat(f"{procfs.PROC}/{pid}/fd/{name}")
                    if not state.st_nlink and state.st_dev == device and S_ISREG(state.st_mode):
                        found[state.st_ino] = state.st_blocks * _BLOCK
    return sum(found.values())
