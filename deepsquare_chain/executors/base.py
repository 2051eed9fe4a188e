"""The executor protocol, its data types and errors, and executors by name (entry points)."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Final, Protocol, cast

from deepsquare_chain.errors import GridError, UsageError
from deepsquare_chain.executors.procfs import BLOCK_BYTES
from deepsquare_chain.executors.rundir import disk_usage
from deepsquare_chain.job import Offer, Resources
from deepsquare_chain.observability.metrics import Check

MAX_SCRIPT_BYTES: Final = 4 * 1024 * 1024
MAX_ENV_BYTES: Final = 1024 * 1024
MAX_WALLTIME: Final = 2**31  # seconds; far above the 24 bits of a time limit on chain
# The kernel refuses one `NAME=value` of 32 pages or more, NUL included.
_MAX_ENV_STRING: Final = 128 * 1024 - 1
# A key is the name of a folder and of a queue entry: no leading dot, no path.
_KEY: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,119}")
_MAX_COMMENT: Final = 256
_ENV_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
#: Variables that would change the executor's own programs, which start a script outside of its sandbox:
#: of the dynamic loader, the C library, bash and Slurm.
_RESERVED_ENV: Final = re.compile(
    r"(LD|BASH|MALLOC|SLURM|SRUN)_.*|PATH|IFS|ENV|PS4|BASHOPTS|SHELLOPTS|POSIXLY_CORRECT"
    r"|GCONV_PATH|GLIBC_TUNABLES|LOCPATH"
)


class ExecutorError(GridError):
    """An executor can't carry out a request."""


class ExecutorUnavailableError(ExecutorError):
    """The executor can't answer or can't start a run now; retry later.

    Causes include a full disk, exhausted descriptors or memory, and an unreadable folder. The
    error never means that a run does not exist.
    """


class RunRefusedError(ExecutorError):
    """The run can't be executed here as specified; a retry would fail too."""


class RunState(StrEnum):
    """State of a run; UNKNOWN: it can't be determined, which never means that the run is gone."""

    QUEUED = "queued"
    RUNNING = "running"
    ENDED = "ended"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class RunSpec:
    """Specification of one run of a job.

    Attributes:
        key: Permanent name of the run, such as "31337-5fbdb231-42"; a key runs at most once.
        script: Batch script, executed by bash.
        resources: Resources of the run; its memory (MB) is enforced.
        walltime: Time limit in seconds.
        env: Environment of the script, in addition to PATH, HOME and LANG. The sandbox is started
            with it, so that variables of the loader and of shells are refused.
        comment: One line for operators who read the executor's queue, such as the chain ID, the
            contract and the job ID.
    """

    key: str
    script: bytes
    resources: Resources
    walltime: int
    env: Mapping[str, str]
    comment: str = ""


@dataclass(frozen=True, slots=True)
class Exit:
    """Exit status of a run.

    Times are in seconds since the epoch.

    Attributes:
        code: Exit code of the script, or 128 + signal number after a signal; never 0 for a run
            that the executor stopped.
        reason: exited, signalled, walltime, memory, disk, processes, cancelled, lost,
            unstarted or full (the machine's disk, not the run's share of it).
            Unstarted: the machine could not execute the script; the job did not cause it.
        seconds: Duration, rounded up; 0 for a run that never started.
    """

    code: int
    reason: str
    seconds: int
    started_at: float
    ended_at: float

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Exit:
        """Parse a stored exit record.

        Raises:
            OSError: The record is damaged.
        """
        try:
            return cls(
                code=int(record["code"]),
                reason=str(record["reason"]),
                seconds=int(record["seconds"]),
                started_at=float(record["started_at"]),
                ended_at=float(record["ended_at"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError):
            raise OSError("the exit record is damaged") from None


@dataclass(frozen=True, slots=True)
class RunStatus:
    """State of a run; `exit` is set if and only if the state is ENDED."""

    state: RunState
    exit: Exit | None = None


@dataclass(frozen=True, slots=True)
class Stored:
    """Disk usage of a run's folder in bytes, and its last change in seconds since the epoch."""

    size: int
    changed_at: float


def run_keys(runs: Path) -> list[str]:
    """Return the keys of all run folders in `runs`, sorted.

    Raises:
        OSError: The folder can't be read.
    """
    keys = []
    for entry in os.scandir(runs):
        with contextlib.suppress(RunRefusedError):
            if entry.is_dir(follow_symlinks=False):
                keys.append(check_key(entry.name))
    return sorted(keys)


def stored_in(folder: Path) -> Stored | None:
    """Return the disk usage of a folder; links are not followed. None if it does not exist.

    Raises:
        OSError: The folder itself can't be read; files that vanish meanwhile are skipped.
    """
    try:
        status = folder.lstat()
    except FileNotFoundError:
        return None
    return Stored(status.st_blocks * BLOCK_BYTES + disk_usage(str(folder)), status.st_mtime)


class Executor(Protocol):
    """A machine or a cluster that runs batch scripts.

    Every method raises `ExecutorUnavailableError` when the executor can't answer, and
    `RunRefusedError` for a key that is not a plain name. Implementations document only what they
    add to these guarantees.
    """

    queues: bool
    """True: it has a queue of its own, submit once SCHEDULED. False: start on chain first."""

    async def submit(self, spec: RunSpec) -> str:
        """Start the run and return its handle; idempotent: an existing key is adopted.

        Raises:
            RunRefusedError: The specification can't be run.
        """
        ...

    async def find(self, key: str) -> str | None:
        """Return the handle of the run with this key; None if it certainly never began here."""
        ...

    async def poll(self, handles: list[str]) -> dict[str, RunStatus]:
        """Return the status of each handle; UNKNOWN if its folder is missing or can't be read."""
        ...

    async def cancel(self, handle: str) -> None:
        """Cancel the run and wait for the end of its processes.

        An ended or unknown run is no error.
        """
        ...

    async def extend(self, handle: str, walltime: int) -> None:
        """Set the total time limit of the run to `walltime` seconds from its start.

        Raises:
            NotFoundError: There is no such run.
            RunRefusedError: The walltime is out of range, or the executor can't set it.
        """
        ...

    async def capacity(self) -> Offer:
        """Return the CPUs, memory (MB) and GPUs that are free now."""
        ...

    async def fault(self) -> str:
        """Return why no run can be started now; empty when there is no known fault."""
        ...

    async def output(self, handle: str, offset: int = 0, limit: int = 65536) -> bytes:
        """Return up to `limit` bytes of the run's output (both streams), from byte `offset`.

        A note replaces the middle of a long output. The kept output is final once the run has ended.

        Raises:
            NotFoundError: There is no such run.
        """
        ...

    def folder(self, handle: str) -> Path:
        """Return the path of a run's folder, which may not exist; see `rundir`."""
        ...

    async def keys(self) -> list[str]:
        """Return the keys of all runs that are stored, live or ended."""
        ...

    async def stored(self, handle: str) -> Stored | None:
        """Return the disk usage of a run's folder; None if there is none.

        An executor that stores nothing on the daemon's disk returns None.
        """
        ...

    async def forget(self, handle: str) -> None:
        """Delete an ended run with all its files and its key.

        Raises:
            ExecutorError: The run has not ended.
        """
        ...


@dataclass(frozen=True, slots=True)
class ExecutorContext:
    """Settings to create an executor; see `create_executor`.

    Attributes:
        state_dir: State folder of the daemon.
        capacity: CPUs, memory (MB) and GPUs that a single machine may use; a cluster reports its
            own.
        min_free: MB of free disk below which no capacity counts as free.
        owner: Account of the provider.
        options: `executor_options` of the settings, not validated yet.
        allow_unisolated: Run jobs without isolation from the daemon; without it, an executor that
            can't isolate jobs is not created.
        allow_root: Run jobs as root.
        private: Folders and files of the daemon that are hidden from jobs: keystore, password,
            state.
    """

    state_dir: Path
    capacity: Offer
    min_free: int = 64
    owner: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    allow_unisolated: bool = False
    allow_root: bool = False
    private: tuple[Path, ...] = ()


def unavailable(executor: str, path: Path, error: Exception) -> ExecutorUnavailableError:
    """Return the error for a folder that can't be used now."""
    reason = getattr(error, "strerror", None) or str(error)
    return ExecutorUnavailableError(
        f"The {executor} executor can't work in {path}: {reason}",
        hint="Check the disk, its permissions and limits; the action is retried.",
    )


def check_key(key: str) -> str:
    """Return the key if it is a plain folder name.

    Raises:
        RunRefusedError: The key is not a plain name.
    """
    if not _KEY.fullmatch(key):
        raise RunRefusedError(f"Run key {key[:80]!r} is not a plain name")
    return key


def check_spec(spec: RunSpec) -> None:
    """Validate a specification for all executors.

    Raises:
        RunRefusedError: A field is invalid; the message names run and field.
    """
    check_walltime(check_key(spec.key), spec.walltime)
    problem = _problem(spec)
    if problem:
        raise RunRefusedError(f"Run {spec.key} is refused: {problem}")


def check_walltime(key: str, walltime: int) -> None:
    """Validate the time limit of a run in seconds.

    Raises:
        RunRefusedError: It is out of range.
    """
    if not 1 <= walltime <= MAX_WALLTIME:
        raise RunRefusedError(f"Run {key}: a walltime of {walltime} seconds is out of range")


def _problem(spec: RunSpec) -> str:
    size = spec.resources
    if min(size.tasks, size.cpus_per_task, size.mem_per_cpu) < 1 or size.gpus < 0:
        return f"its resources {size} are not positive"
    if len(spec.script) > MAX_SCRIPT_BYTES:
        return f"its script is larger than {MAX_SCRIPT_BYTES:,} bytes"
    if not spec.comment.isprintable() or "|" in spec.comment or len(spec.comment) > _MAX_COMMENT:
        return "its comment is not one plain line"
    return _env_problem(spec.env)


def _env_problem(env: Mapping[str, str]) -> str:
    total = 0
    for name, value in env.items():
        if not _ENV_NAME.fullmatch(name):
            return f"{name[:80]!r} is not a name of an environment variable"
        if _RESERVED_ENV.fullmatch(name):
            return f"the environment variable {name[:80]} may only be set by the script"
        try:
            size = len(f"{name}={value}".encode())
        except UnicodeEncodeError:
            return f"the environment variable {name[:80]} is not text"
        if "\0" in value or size > _MAX_ENV_STRING:
            return f"the environment variable {name[:80]} contains a NUL byte or is too long"
        total += size
    return (
        f"its environment is larger than {MAX_ENV_BYTES:,} bytes" if total > MAX_ENV_BYTES else ""
    )


#: Group of the entry points of executors.
GROUP: Final = "deepsquare.executors"
_ROOT: Final = "Give the daemon a user of its own, or accept the risk with --allow-root."


def executor_names() -> list[str]:
    """Return the names of the installed executors."""
    return sorted({point.name for point in entry_points(group=GROUP)})


def create_executor(name: str, context: ExecutorContext) -> Executor:
    """Create an executor by name; its entry point is a function that takes the context.

    Raises:
        UsageError: The executor is not installed or can't be loaded; an option is invalid; jobs
            would run as root or without isolation, and the context does not allow it.
        ExecutorUnavailableError: The executor can't be used now.
    """
    refuse_root(context)
    return cast("Callable[[ExecutorContext], Executor]", _load(name))(context)


async def examine_executor(name: str, context: ExecutorContext) -> list[Check]:
    """Return an executor's checks of the machine or cluster; read-only.

    The module of an executor may define a coroutine function `examine(context)` that returns
    checks.
    """
    try:
        module = sys.modules[_load(name).__module__]
        examine = getattr(module, "examine", None)
        checks = [] if examine is None else list(await examine(context))
    except GridError as error:
        setting = "executor, executor_options"
        return [Check("executor", False, error.message, error.hint, setting)]
    if all(check.name != "executor" for check in checks):
        checks.insert(0, Check("executor", True, f"{name} is installed", "", "executor"))
    return [*checks, user_check()]


def refuse_root(context: ExecutorContext) -> None:
    """Refuse to run jobs as root unless that is allowed.

    Raises:
        UsageError: This process runs as root.
    """
    if os.geteuid() == 0 and not context.allow_root:
        raise UsageError("A provider must not run as root: its jobs would run as root", hint=_ROOT)


def user_check() -> Check:
    """Check that the daemon does not run as root."""
    if os.geteuid() == 0:
        return Check("user", False, "root: jobs would run as root", _ROOT, "allow_root")
    return Check("user", True, f"user {os.geteuid()}, not root", "", "allow_root")


def _load(name: str) -> Any:
    points = list(entry_points(group=GROUP, name=name))
    if not points:
        installed = ", ".join(executor_names()) or "none"
        raise UsageError(
            f"There is no executor {name[:60]!r}",
            hint=f"Installed executors: {installed}. After an upgrade, install the package again.",
        )
    try:
        return points[0].load()
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"The executor {name} can't be loaded from {points[0].value}: {error}",
            hint="Install the package that provides it again.",
        ) from error
