"""The sandbox of a job: bubblewrap's arguments, and a probe whether this machine supports it.

A job sees a read-only system, its own home and temporary folders, its own processes, and no network
unless the provider allows it. Folders are exposed by an allowlist, without folders of the daemon;
folders that the provider adds are checked against those of the daemon.

The sandbox neither ends with the process that starts it (`--die-with-parent`) nor has its own
session (`--new-session`): jobs continue after the end of the daemon, and are ended as a whole.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import functools
import os
import re
import shutil
import stat
import subprocess
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from deepsquare_chain.errors import UsageError
from deepsquare_chain.executors.cgroups import CgroupParent
from deepsquare_chain.executors.rundir import SANDBOX_HOME, SANDBOX_SCRIPT, unique
from deepsquare_chain.job import MEGABYTE
from deepsquare_chain.observability import get_logger

#: Folders of the system that every job sees.
_SYSTEM: Final = (
    *("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"),
    *("/opt", "/nix/store"),
)
#: Topology of CPUs and memory, for thread placement; and network devices, by which MPI libraries
#: find their interfaces.
_TOPOLOGY: Final = "/sys/devices/system"
_DEVICES: Final = ("/sys/devices", "/sys/class", "/sys/bus")
_NIXOS: Final = ("/run/current-system",)
#: Allowlist of /etc, for files that programs read; other files may hold passwords and keys.
_ETC: Final = (
    *("alternatives", "bash.bashrc", "ca-certificates", "ca-certificates.conf"),
    *("crypto-policies", "debian_version", "fonts", "gai.conf", "group", "host.conf", "hosts"),
    *("java-17-openjdk", "java-21-openjdk", "ld.so.cache", "ld.so.conf", "ld.so.conf.d"),
    *("locale.alias", "locale.conf", "localtime", "magic", "mime.types", "mpich"),
    *("nsswitch.conf", "openmpi", "OpenCL", "os-release", "passwd", "perl", "pki", "profile"),
    *("profile.d", "protocols", "python3", "python3.11", "python3.12", "python3.13", "R"),
    *("redhat-release", "resolv.conf", "rpc", "services", "shells", "ssl/certs"),
    *("ssl/openssl.cnf", "static", "terminfo", "timezone", "vulkan"),
)
#: Seconds between two checks of a copy of /etc; and its limits, above which it is not used.
_ETC_PERIOD: Final = 10.0
_ETC_ENTRIES: Final = 20_000
_ETC_BYTES: Final = 64 * MEGABYTE
#: Parts of /proc that are bound read-only: jobs run by root could write to them.
_PROC: Final = ("sys", "sysrq-trigger", "irq", "bus")
#: Devices that every NVIDIA driver needs in addition to the GPUs.
_NVIDIA: Final = ("nvidiactl", "nvidia-uvm", "nvidia-uvm-tools", "nvidia-modeset", "nvidia-caps")
_AMD: Final = ("kfd", "dri")
_VERSION: Final = re.compile(r"(\d+)\.(\d+)")
#: The first version that can forbid jobs to create user namespaces.
_NO_NESTING: Final = (0, 8)
#: Device of virtual network interfaces, and the settings of the job's own network.
_TUN: Final = "/dev/net/tun"
_NETWORK_SETTINGS: Final = "/proc/sys/net"
#: User and group ID of root's jobs that may create user namespaces: the kernel lets no process
#: without capabilities map the root of the namespace around it.
_JOB_ID: Final = "1000"
_PROBE_SECONDS: Final = 20.0
_log = get_logger(__name__)


def _paths(value: Any) -> Any:
    """Parse a list from a file, or comma-separated text from a variable or flag."""
    return tuple(part for part in value.split(",") if part) if isinstance(value, str) else value


def _absolute(values: tuple[Path, ...]) -> tuple[Path, ...]:
    for value in values:
        if not value.is_absolute() or ".." in value.parts or value == Path("/"):
            raise ValueError(f"{str(value)[:80]!r} must be an absolute path, and not the root")
    return values


Paths = Annotated[tuple[Path, ...], BeforeValidator(_paths), AfterValidator(_absolute)]


class SandboxOptions(BaseModel):
    """Options for isolation in `executor_options`.

    Attributes:
        network: Let jobs use the network of the machine, its loopback interface included.
        namespaces: Let jobs create user and network namespaces, and virtual network interfaces:
            networks of steps and containers need them. More of the kernel is exposed to jobs.
        readable: Additional files and folders that jobs may read, such as data sets and software.
        writable: Folders that all jobs may write to.
        disk: Disk quota of a job in MB; 0 for no limit.
        processes: Maximum processes and threads of a job; 0 for no limit.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    network: bool = False
    namespaces: bool = False
    readable: Paths = ()
    writable: Paths = ()
    disk: int = Field(10_000, ge=0, le=10**9)
    processes: int = Field(4_096, ge=0, le=10**7)

    def exposed(self, private: Iterable[Path]) -> Path | None:
        """Return a path of the daemon that these options would expose to jobs; None for none."""
        exposed = [os.path.realpath(path) for path in (*self.readable, *self.writable)]
        for path in private:
            real = Path(os.path.realpath(path))
            if any(real.is_relative_to(folder) for folder in exposed):
                return path
        return None


OptionsModel = TypeVar("OptionsModel", bound=BaseModel)


def parse_options(
    executor: str, model: type[OptionsModel], options: Mapping[str, Any]
) -> OptionsModel:
    """Validate the options of an executor.

    Raises:
        UsageError: An option is unknown or invalid; the message names it.
    """
    try:
        return model.model_validate(dict(options))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]) or "executor_options"
        reason = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            close = difflib.get_close_matches(name, model.model_fields, n=1)
            reason = "there is no such option" + (f"; did you mean {close[0]}?" if close else "")
        raise UsageError(
            f"Option {name} of the {executor} executor: {reason}",
            hint="Correct it in executor_options; docs/provider.md lists the options.",
        ) from None


def bubblewrap_arguments(
    options: SandboxOptions,
    *,
    work: str,
    temporary: str,
    script: str,
    private: Sequence[Path] = (),
    hostname: str = "job",
    etc: Path | None = None,
    is_root: bool = False,
) -> list[str]:
    """Return the arguments of bubblewrap, without its name, for all versions from 0.4.

    Args:
        options: Options of the provider.
        work: Folder that becomes the job's home and working folder.
        temporary: Folder that becomes /tmp and /var/tmp.
        script: The batch script, which becomes `SANDBOX_SCRIPT`.
        private: Folders and files of the daemon, which are hidden even below exposed folders.
        hostname: Hostname in the sandbox; empty for the real one, by which the tasks of a job on
            several nodes find each other.
        etc: Copy of the allowed files of /etc, for jobs on this machine: the arguments then follow
            its folders. None for jobs on any machine, which bind each file of its own /etc.
        is_root: Whether jobs run as root of the machine.
    """
    arguments = [
        *("--unshare-user", "--unshare-pid", "--unshare-ipc", "--unshare-cgroup-try"),
        *("--cap-drop", "ALL"),
    ]
    if hostname:
        arguments += ["--unshare-uts", "--hostname", hostname]
    if not options.network:
        arguments.append("--unshare-net")
    if options.namespaces and is_root:
        arguments += ["--uid", _JOB_ID, "--gid", _JOB_ID]
    hardware = _DEVICES if options.network else [_TOPOLOGY]
    system = [*_SYSTEM, *_NIXOS, *hardware, *(f"/etc/{name}" for name in _ETC)]
    if etc is None:
        arguments += _bound("--ro-bind-try", system)
    else:
        arguments += _links(_SYSTEM)
        arguments += _bound("--ro-bind-try", [*_NIXOS, *hardware])
        arguments += ["--ro-bind", str(etc), "/etc"]
    arguments += ["--proc", "/proc"]
    if etc is None or is_root:
        arguments += _bound("--ro-bind-try", [f"/proc/{name}" for name in _PROC])
    if options.namespaces and not (options.network and is_root):
        # Root could change the settings of the machine's network.
        arguments += ["--bind-try", _NETWORK_SETTINGS, _NETWORK_SETTINGS]
    arguments += ["--dev", "/dev"]
    if options.namespaces:
        arguments += ["--dev-bind-try", _TUN, _TUN]
    # /dev/shm is a separate file system; the rest of /dev is read-only.
    arguments += ["--tmpfs", "/dev/shm", "--remount-ro", "/dev"]  # noqa: S108
    arguments += ["--bind", temporary, "/tmp", "--bind", temporary, "/var/tmp"]  # noqa: S108
    # After these mounts, because a provider may expose a folder below one of them.
    readable = [str(path) for path in options.readable]
    arguments += _bound("--ro-bind-try", readable)
    arguments += _bound("--bind-try", [str(path) for path in options.writable])
    arguments += ["--dir", "/run", "--ro-bind", script, SANDBOX_SCRIPT]
    arguments += ["--bind", work, SANDBOX_HOME, "--chdir", SANDBOX_HOME]
    exposed_paths = _real_paths((*system, *readable))
    for path in private:
        arguments += _hidden(path, exposed_paths)
    return [*arguments, "--remount-ro", "/"]


def _bound(how: str, paths: Iterable[str]) -> list[str]:
    return [argument for path in paths for argument in (how, path, path)]


@functools.lru_cache(maxsize=8)
def _links(paths: tuple[str, ...]) -> tuple[str, ...]:
    """Return arguments that bind folders, and that repeat those that are links to each other."""
    arguments: list[str] = []
    for path in paths:
        if os.path.islink(path) and os.path.realpath(path).startswith("/usr/"):
            arguments += ("--symlink", os.path.realpath(path), path)
        elif os.path.exists(path):
            arguments += ("--ro-bind-try", path, path)
    return tuple(arguments)


@functools.lru_cache(maxsize=8)
def _real_paths(paths: tuple[str, ...]) -> frozenset[str]:
    """Return the paths with links resolved; cached, because there are some eighty."""
    return frozenset(os.path.realpath(path) for path in paths)


def _hidden(path: Path, exposed: frozenset[str]) -> list[str]:
    """Return arguments that mask a path below an exposed one with an empty mount."""
    real = os.path.realpath(path)
    parent = real
    while parent not in exposed:
        if parent == (parent := os.path.dirname(parent)):
            return []
    if os.path.isdir(real):
        return ["--tmpfs", real, "--remount-ro", real]
    return ["--ro-bind", "/dev/null", real] if os.path.exists(real) else []


def device_arguments(devices: Sequence[str], dev: Path = Path("/dev")) -> list[str]:
    """Return arguments that expose GPUs and the devices of their drivers; empty without GPUs.

    NVIDIA GPUs are exposed individually if named by number, all if named by UUID. AMD GPUs are all
    exposed, as their driver has one device for all of them.
    """
    if not devices:
        return []
    if all(name.isdigit() for name in devices):
        names = [f"nvidia{name}" for name in devices]
    else:
        names = sorted(path.name for path in dev.glob("nvidia[0-9]*"))
    paths = [dev / name for name in (*names, *_NVIDIA, *_AMD) if (dev / name).exists()]
    arguments = ["--ro-bind", "/sys", "/sys"] if paths else []
    for path in paths:
        arguments += ["--dev-bind", str(path), str(path)]
    return arguments


class EtcCopy:
    """A copy of the files in /etc that jobs may read, which a sandbox shows by one mount.

    A mount takes 0.2 ms of CPU time per job, and some forty files and folders are allowed.
    Running jobs see changes of the copy. Thread-safe.
    """

    def __init__(self, folder: Path, source: Path = Path("/etc")) -> None:
        self._folder = folder
        self._source = source
        self._lock = threading.Lock()
        self._next_check = float("-inf")
        self._reason = ""

    def current(self) -> Path | None:
        """Return the folder, updated when older than `_ETC_PERIOD`; None if it can't be made."""
        with self._lock:
            now = time.monotonic()
            if now >= self._next_check:
                self._next_check = now + _ETC_PERIOD
                try:
                    self._update()
                    self._reason = ""
                except OSError as error:
                    if not self._reason:
                        _log.warning("copy of /etc not created", reason=str(error))
                    self._reason = str(error)
            return None if self._reason else self._folder

    def _update(self) -> None:
        """Make the copy equal to its source; each file is replaced by an atomic rename."""
        self._folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        entries = self._entries()
        for parent, folders, files in os.walk(self._folder, topdown=False):
            for name in (*folders, *files):
                path = Path(parent, name)
                status = entries.get(str(path.relative_to(self._folder)))
                kind = stat.S_IFMT(path.lstat().st_mode)
                if status is None or stat.S_IFMT(status.st_mode) != kind:
                    _remove(path)
        for name, status in entries.items():
            with contextlib.suppress(PermissionError):  # a job could not read it either
                _copy(self._source / name, status, self._folder / name)

    def _entries(self) -> dict[str, os.stat_result]:
        """Return the file status of all allowed entries by relative path, parents first.

        Links are followed for the allowed names, as by a bind mount, but not below them.

        Raises:
            OSError: They are too many or too large for a copy.
        """
        entries: dict[str, os.stat_result] = {}
        for name in _ETC:
            for parent in reversed(Path(name).parents[:-1]):
                with contextlib.suppress(OSError):
                    entries[str(parent)] = (self._source / parent).stat()
            pending = [name]
            while pending:
                relative = pending.pop()
                path = self._source / relative
                with contextlib.suppress(OSError):  # it is missing, or not readable
                    status = path.stat() if relative == name else path.lstat()
                    entries[relative] = status
                    if stat.S_ISDIR(status.st_mode):
                        pending += [f"{relative}/{child}" for child in os.listdir(path)]
                if len(entries) > _ETC_ENTRIES:
                    raise OSError(errno.EFBIG, "too many files", str(self._source))
        if sum(status.st_size for status in entries.values()) > _ETC_BYTES:
            raise OSError(errno.EFBIG, "too large", str(self._source))
        return entries


def _copy(source: Path, status: os.stat_result, target: Path) -> None:
    """Copy a folder's name, a link or a file, unless the target is equal to it."""
    if stat.S_ISDIR(status.st_mode):
        target.mkdir(mode=0o755, exist_ok=True)
        return
    temporary = target.with_name(f".{target.name}.new")
    temporary.unlink(missing_ok=True)
    if stat.S_ISLNK(status.st_mode):
        if not target.is_symlink() or os.readlink(target) != os.readlink(source):
            temporary.symlink_to(os.readlink(source))
            temporary.replace(target)
    elif stat.S_ISREG(status.st_mode):
        copied = target.lstat() if target.exists() else None
        version = status.st_size, status.st_mtime_ns
        if copied is None or (copied.st_size, copied.st_mtime_ns) != version:
            shutil.copy2(source, temporary)
            temporary.replace(target)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


@dataclass(frozen=True, slots=True)
class Sandbox:
    """The installed bubblewrap of this machine."""

    program: str
    version: tuple[int, int]

    def command(self, arguments: Sequence[str], *, namespaces: bool = False) -> list[str]:
        """Return the command prefix, to which the job's command is appended.

        `namespaces` permits jobs to create user namespaces.
        """
        forbid = self.version >= _NO_NESTING and not namespaces
        return [self.program, *(["--disable-userns"] if forbid else []), *arguments]


@dataclass(frozen=True, slots=True)
class SandboxProbe:
    """Result of a probe: the sandbox, or why there is none."""

    sandbox: Sandbox | None
    reason: str = ""


def probe_sandbox(program: str = "bwrap") -> SandboxProbe:
    """Probe whether jobs can run in a sandbox here, by running `true` in one."""
    path = shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/bin:/bin")
    if path is None:
        return SandboxProbe(None, "bubblewrap is not installed")
    try:
        version_output = _run([path, "--version"])
        match = _VERSION.search(version_output.stdout)
        version = (int(match[1]), int(match[2])) if match else (0, 0)
        sandbox = Sandbox(path, version)
        arguments = bubblewrap_arguments(
            SandboxOptions(), work="/usr", temporary="/usr", script="/dev/null"
        )
        test = _run([*sandbox.command(arguments), "/bin/sh", "-c", "true"])
    except (OSError, subprocess.SubprocessError) as error:
        return SandboxProbe(None, f"bubblewrap can't be run: {error}")
    if test.returncode:
        reason = " ".join(test.stderr.split())[:300] or f"it ends with code {test.returncode}"
        return SandboxProbe(None, f"bubblewrap does not work on this machine: {reason}")
    return SandboxProbe(sandbox)


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        errors="replace",
        stdin=subprocess.DEVNULL,
        timeout=_PROBE_SECONDS,
        check=False,
    )


@dataclass(frozen=True, slots=True)
class Isolation:
    """Isolation of jobs on one machine.

    Attributes:
        sandbox: Bubblewrap; None for jobs as plain processes.
        options: Options of the provider, with the limits of a job.
        cgroups: Parent of the jobs' control groups.
        private: Folders and files of the daemon that are hidden from jobs.
        etc: Copy of the allowed files of /etc; None to bind each of them.
    """

    sandbox: Sandbox | None
    options: SandboxOptions
    cgroups: CgroupParent
    private: tuple[Path, ...] = ()
    etc: EtcCopy | None = None

    def record(self, folder: Path, devices: Sequence[str] = ()) -> Mapping[str, Any]:
        """Return the isolation of a run with these GPUs, for its specification in `folder`."""
        command: list[str] = []
        if self.sandbox is not None:
            arguments = bubblewrap_arguments(
                self.options,
                work=str(folder / "work"),
                temporary=str(folder / "tmp"),
                script=str(folder / "script"),
                private=self.private,
                etc=self.etc.current() if self.etc else None,
                is_root=os.geteuid() == 0,
            )
            last_arguments = arguments[-2:]  # the root is remounted read-only last
            command = self.sandbox.command(
                [*arguments[:-2], *device_arguments(devices), *last_arguments],
                namespaces=self.options.namespaces,
            )
        group = self.cgroups.job(f"{folder.name[:60]}-{unique(4)}")
        return {
            "command": command,
            "cgroup": group.record() if group else {},
            "disk": self.options.disk,
            "processes": self.options.processes,
        }
