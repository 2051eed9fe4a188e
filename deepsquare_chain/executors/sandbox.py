"""The sandbox of a job: bubblewrap's arguments, and whether this machine can use it.

A job sees a read-only system, a home and temporary folders of its own, its own processes, and
no network unless the provider allows it. Only folders of a list are shown: nothing of the daemon
is on it, and what the provider adds is checked against the daemon's own folders.

The sandbox is neither bound to the life of the process that starts it (`--die-with-parent`) nor a
session of its own (`--new-session`): jobs outlive the daemon, and are found and ended whole.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from deepsquare_chain.errors import UsageError
from deepsquare_chain.executors.cgroups import CgroupParent
from deepsquare_chain.executors.rundir import SANDBOX_HOME, SANDBOX_SCRIPT, unique

#: Folders of the system that every job sees.
_SYSTEM: Final = (
    "/usr",
    "/bin",
    "/sbin",
    "/lib",
    "/lib32",
    "/lib64",
    "/libx32",
    "/opt",
    "/nix/store",
)
#: CPUs and their memory, by which programs place their threads; and the network's devices, by which an MPI
#: library finds its interfaces.
_TOPOLOGY: Final = "/sys/devices/system"
_DEVICES: Final = ("/sys/devices", "/sys/class", "/sys/bus")
_NIXOS: Final = ("/run/current-system",)
#: What programs read in /etc. Nothing else is shown: services keep passwords and keys there.
_ETC: Final = (
    "alternatives",
    "bash.bashrc",
    "ca-certificates",
    "ca-certificates.conf",
    "crypto-policies",
    "debian_version",
    "fonts",
    "gai.conf",
    "group",
    "host.conf",
    "hosts",
    "java-17-openjdk",
    "java-21-openjdk",
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "locale.alias",
    "locale.conf",
    "localtime",
    "magic",
    "mime.types",
    "mpich",
    "nsswitch.conf",
    "openmpi",
    "OpenCL",
    "os-release",
    "passwd",
    "perl",
    "pki",
    "profile",
    "profile.d",
    "protocols",
    "python3",
    "python3.11",
    "python3.12",
    "python3.13",
    "R",
    "redhat-release",
    "resolv.conf",
    "rpc",
    "services",
    "shells",
    "ssl/certs",
    "ssl/openssl.cnf",
    "static",
    "terminfo",
    "timezone",
    "vulkan",
)
#: Parts of /proc that stay this machine's: root's jobs could write to them.
_PROC: Final = ("sys", "sysrq-trigger", "irq", "bus")
#: What every NVIDIA driver needs in addition to the devices themselves.
_NVIDIA: Final = ("nvidiactl", "nvidia-uvm", "nvidia-uvm-tools", "nvidia-modeset", "nvidia-caps")
_AMD: Final = ("kfd", "dri")
_VERSION: Final = re.compile(r"(\d+)\.(\d+)")
#: The first version that keeps jobs from making user namespaces of their own.
_NO_NESTING: Final = (0, 8)
_PROBE_SECONDS: Final = 20.0


def _paths(value: Any) -> Any:
    """A list as files give it, or text as a variable or flag holds it."""
    return tuple(part for part in value.split(",") if part) if isinstance(value, str) else value


def _absolute(values: tuple[Path, ...]) -> tuple[Path, ...]:
    for value in values:
        if not value.is_absolute() or ".." in value.parts or value == Path("/"):
            raise ValueError(f"{str(value)[:80]!r} must be an absolute path, and not the root")
    return values


Paths = Annotated[tuple[Path, ...], BeforeValidator(_paths), AfterValidator(_absolute)]


class SandboxOptions(BaseModel):
    """What a provider may say about isolation in `executor_options`.

    Attributes:
        network: Let jobs use the network of the machine, its loopback interface included.
        readable: More files and folders that jobs may read, such as data sets and software.
        writable: Folders that all jobs may write to.
        disk: MB that a job may have in its folders; 0 for no limit.
        processes: Processes and threads that a job may have; 0 for no limit.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    network: bool = False
    readable: Paths = ()
    writable: Paths = ()
    disk: int = Field(10_000, ge=0, le=10**9)
    processes: int = Field(4_096, ge=0, le=10**7)

    def exposed(self, private: Iterable[Path]) -> Path | None:
        """A folder or file of the daemon that these options would show to jobs; None for none."""
        shown = [Path(os.path.realpath(path)) for path in (*self.readable, *self.writable)]
        for path in private:
            real = Path(os.path.realpath(path))
            if any(real == each or real.is_relative_to(each) for each in shown):
                return path
        return None


OptionsModel = TypeVar("OptionsModel", bound=BaseModel)


def parse_options(
    executor: str, model: type[OptionsModel], options: Mapping[str, Any]
) -> OptionsModel:
    """Check the options of an executor.

    Raises:
        UsageError: An option is unknown or has a wrong value; the message names it.
    """
    try:
        return model.model_validate(dict(options))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]) or "executor_options"
        reason = first["msg"].removeprefix("Value error, ")
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
) -> list[str]:
    """Arguments of bubblewrap, without its name, for every version from 0.4; pure.

    Args:
        options: What the provider allows.
        work: Folder that becomes the job's home and working folder.
        temporary: Folder that becomes /tmp and /var/tmp.
        script: The batch script, which becomes `SANDBOX_SCRIPT`.
        private: Folders and files of the daemon, which are hidden even below folders that every
            job sees.
        hostname: Name of the machine that the job sees; empty for the real one, by which the
            tasks of a job on several nodes find each other.
    """
    arguments = [
        *("--unshare-user", "--unshare-pid", "--unshare-ipc", "--unshare-cgroup-try"),
        *("--cap-drop", "ALL"),
    ]
    if hostname:
        arguments += ["--unshare-uts", "--hostname", hostname]
    if not options.network:
        arguments.append("--unshare-net")
    hardware = _DEVICES if options.network else [_TOPOLOGY]
    system = [*_SYSTEM, *_NIXOS, *hardware, *(f"/etc/{name}" for name in _ETC)]
    arguments += _bound("--ro-bind-try", system)
    arguments += ["--proc", "/proc"]
    arguments += _bound("--ro-bind-try", [f"/proc/{name}" for name in _PROC])
    # Memory files go to a file system of their own: the rest of /dev can't be written to.
    arguments += ["--dev", "/dev", "--tmpfs", "/dev/shm", "--remount-ro", "/dev"]  # noqa: S108
    arguments += ["--bind", temporary, "/tmp", "--bind", temporary, "/var/tmp"]  # noqa: S108
    # After these, because a provider may show a folder that is below one of them.
    readable = [str(path) for path in options.readable]
    arguments += _bound("--ro-bind-try", readable)
    arguments += _bound("--bind-try", [str(path) for path in options.writable])
    arguments += ["--dir", "/run", "--ro-bind", script, SANDBOX_SCRIPT]
    arguments += ["--bind", work, SANDBOX_HOME, "--chdir", SANDBOX_HOME]
    shown = _real_paths((*system, *readable))
    for path in private:
        arguments += _hidden(path, shown)
    return [*arguments, "--remount-ro", "/"]


def _bound(how: str, paths: Iterable[str]) -> list[str]:
    return [argument for path in paths for argument in (how, path, path)]


@functools.lru_cache(maxsize=8)
def _real_paths(paths: tuple[str, ...]) -> frozenset[str]:
    """The paths without links; found out once, because they are some eighty of the system."""
    return frozenset(os.path.realpath(path) for path in paths)


def _hidden(path: Path, shown: frozenset[str]) -> list[str]:
    """Arguments that put something empty over a path that is below one that is shown."""
    real = os.path.realpath(path)
    place = real
    while place not in shown:
        if place == (place := os.path.dirname(place)):
            return []
    if os.path.isdir(real):
        return ["--tmpfs", real, "--remount-ro", real]
    return ["--ro-bind", "/dev/null", real] if os.path.exists(real) else []


def device_arguments(devices: Sequence[str], dev: Path = Path("/dev")) -> list[str]:
    """Arguments that show GPUs by their names, and what their drivers need; none for no GPU.

    NVIDIA's devices are shown one by one where they are named by number; all where by UUID, and
    all of AMD's, whose driver has one device for every GPU.
    """
    if not devices:
        return []
    if all(name.isdigit() for name in devices):
        names = [f"nvidia{name}" for name in devices]
    else:
        names = sorted(path.name for path in dev.glob("nvidia[0-9]*"))
    found = [dev / name for name in (*names, *_NVIDIA, *_AMD) if (dev / name).exists()]
    arguments = ["--ro-bind", "/sys", "/sys"] if found else []
    for path in found:
        arguments += ["--dev-bind", str(path), str(path)]
    return arguments


@dataclass(frozen=True, slots=True)
class Sandbox:
    """Bubblewrap as it is installed on this machine."""

    program: str
    version: tuple[int, int]

    def command(self, arguments: Sequence[str]) -> list[str]:
        """The whole command, to which the job's own is appended."""
        nesting = ["--disable-userns"] if self.version >= _NO_NESTING else []
        return [self.program, *nesting, *arguments]


@dataclass(frozen=True, slots=True)
class SandboxProbe:
    """What a machine offers: its sandbox, or why there is none, in words."""

    sandbox: Sandbox | None
    reason: str = ""


def probe_sandbox(program: str = "bwrap") -> SandboxProbe:
    """Whether jobs can be run in a sandbox here, found out by running `true` in one."""
    path = shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/bin:/bin")
    if path is None:
        return SandboxProbe(None, "bubblewrap is not installed")
    try:
        said = _run([path, "--version"])
        match = _VERSION.search(said.stdout)
        version = (int(match[1]), int(match[2])) if match else (0, 0)
        sandbox = Sandbox(path, version)
        arguments = bubblewrap_arguments(
            SandboxOptions(), work="/usr", temporary="/usr", script="/dev/null"
        )
        done = _run([*sandbox.command(arguments), "/bin/sh", "-c", "true"])
    except (OSError, subprocess.SubprocessError) as error:
        return SandboxProbe(None, f"bubblewrap can't be run: {error}")
    if done.returncode:
        words = " ".join(done.stderr.split())[:300] or f"it ends with code {done.returncode}"
        return SandboxProbe(None, f"bubblewrap does not work here: {words}")
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
    """How jobs are kept apart on one machine.

    Attributes:
        sandbox: Bubblewrap; None where jobs are plain processes.
        options: What the provider allows, and the limits of a job.
        cgroups: Where control groups can be made.
        private: Folders and files of the daemon that no job may see.
    """

    sandbox: Sandbox | None
    options: SandboxOptions
    cgroups: CgroupParent
    private: tuple[Path, ...] = ()

    def record(self, folder: Path, devices: Sequence[str] = ()) -> Mapping[str, Any]:
        """What the specification of a run says about its isolation.

        Args:
            folder: Of the run.
            devices: Names of its GPUs.
        """
        command: list[str] = []
        if self.sandbox is not None:
            arguments = bubblewrap_arguments(
                self.options,
                work=str(folder / "work"),
                temporary=str(folder / "tmp"),
                script=str(folder / "script"),
                private=self.private,
            )
            end = arguments[-2:]  # the root is closed last
            command = self.sandbox.command([*arguments[:-2], *device_arguments(devices), *end])
        group = self.cgroups.job(f"{folder.name[:60]}-{unique(4)}")
        return {
            "command": command,
            "cgroup": group.record() if group else {},
            "disk": self.options.disk,
            "processes": self.options.processes,
        }
