"""Control groups of jobs: limits of memory, CPUs and processes that the kernel enforces.

Version 2 needs a delegated subtree (systemd: `Delegate=yes` with `DelegateSubgroup=`), version 1 a
hierarchy that this user may write to. Each controller may be missing; a job then has no such limit,
or its supervisor measures it. The paths of a job's groups are stored in its run folder, so that any
process that recovers the run can end and remove them.

Supervisors import this module, so it has no heavy imports.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

CONTROLLERS: Final = ("memory", "cpu", "pids")
_MOUNT_INFO: Final = Path("/proc/self/mountinfo")
_OWN: Final = Path("/proc/self/cgroup")
#: Period of the CPU limit in microseconds; a job's quota is `cpus` times the period.
_PERIOD: Final = 100_000
_PREFIX: Final = "deepsquare-"
#: Seconds for which an empty group may be a new one of a starting supervisor.
_NEW: Final = 60.0
_REMOVE_TIMEOUT: Final = 5.0
_PAUSE: Final = 0.01


class JobCgroup:
    """The control groups of one job: a folder by controller, in version 2 the same for all."""

    def __init__(self, version: int, folders: Mapping[str, str]) -> None:
        self._version = version
        self._folders = dict(folders)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> JobCgroup | None:
        """Return the groups in a run's specification; None if there are none."""
        folders = record.get("folders")
        if not isinstance(folders, dict) or not folders:
            return None
        group_folders = {name: str(folders[name]) for name in CONTROLLERS if name in folders}
        return cls(2 if record.get("version") == 2 else 1, group_folders) if group_folders else None

    def record(self) -> dict[str, Any]:
        """Return the groups for a run's specification."""
        return {"version": self._version, "folders": self._folders}

    def limits(self, controller: str) -> bool:
        """Return whether the kernel enforces this limit."""
        return controller in self._folders

    @property
    def _distinct(self) -> list[str]:
        return list(dict.fromkeys(self._folders.values()))

    @property
    def entrances(self) -> list[str]:
        """Files to which a process writes 0 to enter the groups."""
        return [f"{folder}/cgroup.procs" for folder in self._distinct]

    def make(self, *, memory: int, cpus: int, processes: int) -> None:
        """Create the groups with their limits.

        `memory` is in bytes and includes files in memory file systems; `processes` counts threads
        too, 0 for no limit.

        Raises:
            OSError: A group can't be created, or a limit can't be set.
        """
        for folder in self._distinct:
            os.makedirs(folder, exist_ok=True)
        for controller, folder in self._folders.items():
            for name, value, is_required in self._values(controller, memory, cpus, processes):
                try:
                    _write(f"{folder}/{name}", value)
                except FileNotFoundError:
                    if is_required:
                        raise

    def _values(
        self, controller: str, memory: int, cpus: int, processes: int
    ) -> list[tuple[str, str, bool]]:
        """Return file names, values, and whether the file is required."""
        if controller == "pids":
            return [("pids.max", str(processes or "max"), True)]
        if controller == "cpu":
            if self._version == 1:
                return [
                    ("cpu.cfs_period_us", str(_PERIOD), True),
                    ("cpu.cfs_quota_us", str(cpus * _PERIOD), True),
                ]
            return [("cpu.max", f"{cpus * _PERIOD} {_PERIOD}", True)]
        if self._version == 1:
            return [
                ("memory.limit_in_bytes", str(memory), True),
                # Memory and swap together, if the kernel accounts swap.
                ("memory.memsw.limit_in_bytes", str(memory), False),
            ]
        return [
            ("memory.max", str(memory), True),
            ("memory.swap.max", "0", False),
            ("memory.oom.group", "1", False),
        ]

    def ran_out_of_memory(self) -> bool:
        """Return whether the kernel killed a process of the job because of its memory limit."""
        if "memory" not in self._folders:
            return False
        name = "memory.oom_control" if self._version == 1 else "memory.events"
        return _counter(f"{self._folders['memory']}/{name}", "oom_kill") > 0

    def end(self) -> None:
        """Kill every process in the groups and remove the groups; idempotent.

        Raises:
            OSError: A process can't be killed, or a group can't be removed.
        """
        deadline = time.monotonic() + _REMOVE_TIMEOUT
        for folder in self._distinct:
            while True:
                for pid in _members(folder):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                try:
                    os.rmdir(folder)
                except FileNotFoundError:
                    break
                except OSError:
                    # Busy: a killed process takes a moment to exit.
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(_PAUSE)
                else:
                    break


class CgroupParent:
    """Parent of the groups of jobs: a folder by controller, of version 1 or 2."""

    def __init__(self, version: int, folders: Mapping[str, Path]) -> None:
        self._version = version
        self._folders = dict(folders)

    @property
    def controllers(self) -> tuple[str, ...]:
        """Controllers whose limits the kernel enforces here."""
        return tuple(name for name in CONTROLLERS if name in self._folders)

    def job(self, name: str) -> JobCgroup | None:
        """Return the groups of a job, not created yet; None if there is no controller."""
        folders = {key: str(path / f"{_PREFIX}{name}") for key, path in self._folders.items()}
        return JobCgroup(self._version, folders) if folders else None

    def sweep(self) -> int:
        """Remove empty groups of jobs; returns the number of groups removed.

        They remain after supervisors that were killed with their daemon. The kernel refuses to
        remove a group that has processes.
        """
        removed = 0
        for folder in set(self._folders.values()):
            for path in folder.glob(f"{_PREFIX}*"):
                with contextlib.suppress(OSError):
                    if time.time() - path.stat().st_mtime > _NEW:
                        path.rmdir()
                        removed += 1
        return removed


def find_cgroups(
    mount_info: Path = _MOUNT_INFO, own: Path = _OWN, *, enable: bool = True
) -> CgroupParent:
    """Return the parent in which this process may create groups, with its controllers.

    `enable` enables the controllers of version 2 for jobs. This process then moves into its own
    group `daemon`, because the kernel allows no processes in a group whose child groups have
    controllers.
    """
    mounts = _mounts(mount_info)
    paths = _own_paths(own)
    v1_groups: dict[str, Path] = {}
    for controller in CONTROLLERS:
        mount = mounts.get(controller)
        if mount is not None and controller in paths:
            usable = _usable_v1(Path(mount + paths[controller]), controller)
            if usable is not None:
                v1_groups[controller] = usable
    if v1_groups or "" not in mounts or "" not in paths:
        return CgroupParent(1, v1_groups)
    return CgroupParent(2, _delegated(Path(mounts[""] + paths[""]), enable=enable))


def _usable_v1(group: Path, controller: str) -> Path | None:
    """Return the group, if groups with a limit can be created in it."""
    files = {"memory": "memory.limit_in_bytes", "cpu": "cpu.cfs_quota_us", "pids": "pids.max"}
    probe = group / f"{_PREFIX}probe-{os.getpid()}"
    try:
        probe.mkdir()
    except OSError:
        return None
    try:
        return group if os.access(probe / files[controller], os.W_OK) else None
    finally:
        with contextlib.suppress(OSError):
            probe.rmdir()


def _delegated(group: Path, *, enable: bool) -> dict[str, Path]:
    """Return the controllers of a delegated version 2 group, enabled for its child groups."""
    if group.name == "daemon":  # created by DelegateSubgroup=, or by an earlier start
        group = group.parent
    try:
        offered = (group / "cgroup.controllers").read_text().split()
        available = [name for name in CONTROLLERS if name in offered]
        if not available:
            return {}
        if not enable:
            usable = os.access(group / "cgroup.subtree_control", os.W_OK)
            return dict.fromkeys(available, group) if usable else {}
        enabled = (group / "cgroup.subtree_control").read_text().split()
        if not set(available) <= set(enabled):
            _leave(group)
            _write(
                str(group / "cgroup.subtree_control"), " ".join(f"+{name}" for name in available)
            )
    except OSError:
        return {}
    return dict.fromkeys(available, group)


def _leave(group: Path) -> None:
    """Move every process of a group into a group `daemon` below it."""
    inner = group / "daemon"
    inner.mkdir(exist_ok=True)
    for pid in _members(str(group)):
        with contextlib.suppress(ProcessLookupError):
            _write(str(inner / "cgroup.procs"), str(pid))


def _mounts(mount_info: Path) -> dict[str, str]:
    """Return the mount points by controller of version 1; the empty name is version 2."""
    mount_points: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in mount_info.read_text().splitlines():
            fields, _, rest = line.partition(" - ")
            kind, _, options = rest.split(" ", 2)
            root, mount_point = fields.split()[3:5]
            if kind == "cgroup2":
                mount_points.setdefault("", mount_point if root == "/" else "")
            elif kind == "cgroup" and root == "/":
                for option in options.split(","):
                    if option in CONTROLLERS:
                        mount_points.setdefault(option, mount_point)
    return {name: mount_point for name, mount_point in mount_points.items() if mount_point}


def _own_paths(own: Path) -> dict[str, str]:
    """Return the path of this process's group by controller; the empty name is version 2."""
    paths = {}
    with contextlib.suppress(OSError):
        for line in own.read_text().splitlines():
            _, names, path = line.split(":", 2)
            for name in names.split(","):
                paths[name] = "" if path == "/" else path
    return paths


def _members(folder: str) -> list[int]:
    try:
        with open(f"{folder}/cgroup.procs", "rb") as file:
            return [int(line) for line in file.read().split()]
    except (OSError, ValueError):
        return []


def _counter(path: str, name: str) -> int:
    """Return a number from a file with lines `name number`; 0 if it can't be read."""
    with contextlib.suppress(OSError, ValueError), open(path, "rb") as file:
        for line in file:
            key, _, value = line.partition(b" ")
            if key == name.encode():
                return int(value)
    return 0


def _write(path: str, value: str) -> None:
    # Not `open`: it would create and truncate.
    handle = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(handle, value.encode())
    finally:
        os.close(handle)
