"""What every executor promises, and the words it uses."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, Protocol

from deepsquare_chain.errors import GridError
from deepsquare_chain.job import Offer, Resources

MAX_SCRIPT_BYTES: Final = 4 * 1024 * 1024
MAX_ENV_BYTES: Final = 1024 * 1024
#: Bytes of a block as the system counts what a file takes.
_BLOCK: Final = 512
MAX_WALLTIME: Final = 2**31  # seconds; far above the 24 bits of a time limit on chain
# The kernel refuses one `NAME=value` of 32 pages or more, NUL included.
_MAX_ENV_STRING: Final = 128 * 1024 - 1
# A key names a folder and a queue entry, so it can be neither hidden nor a path.
_KEY: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,119}")
_MAX_COMMENT: Final = 256
_ENV_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class ExecutorError(GridError):
    """An executor can't do what it was asked."""


class ExecutorUnavailableError(ExecutorError):
    """The executor can't answer or can't start a run now: nothing was decided, try again later.

    A full disk, exhausted descriptors or memory, and an unreadable folder end here. It never
    means that a run does not exist.
    """


class RunRefusedError(ExecutorError):
    """The run as specified can't be run here; trying again changes nothing."""


class RunState(StrEnum):
    """Where a run stands; UNKNOWN says that the executor can't tell, never that it is gone."""

    QUEUED = "queued"
    RUNNING = "running"
    ENDED = "ended"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class RunSpec:
    """One run of one job.

    Attributes:
        key: Names the run for ever, such as "31337-5fbdb231-42"; a key runs at most once.
        script: Body of the batch script, run by bash.
        resources: What the run occupies; its memory (MB) is enforced.
        walltime: Seconds it may take.
        env: Environment of the script, beyond PATH, HOME and LANG.
        comment: One line for people who look at the executor's queue, such as the chain id, the
            contract and the job id.
    """

    key: str
    script: bytes
    resources: Resources
    walltime: int
    env: Mapping[str, str]
    comment: str = ""


@dataclass(frozen=True, slots=True)
class Exit:
    """How a run ended.

    Attributes:
        code: Exit code of the script, 128 + signal when a signal ended it; never 0 for a run
            that the executor stopped.
        reason: exited, signalled, walltime, memory, disk, processes, cancelled, lost,
            unstarted or full (the machine's disk, not the run's share of it).
            Unstarted: the machine could not execute the script, which is no fault of the job.
        seconds: Time it ran, rounded up; 0 when it never started.
        started_at: Seconds since the epoch.
        ended_at: Seconds since the epoch.
    """

    code: int
    reason: str
    seconds: int
    started_at: float
    ended_at: float


@dataclass(frozen=True, slots=True)
class RunStatus:
    """State of a run; `exit` is there when, and only when, it has ENDED."""

    state: RunState
    exit: Exit | None = None


@dataclass(frozen=True, slots=True)
class Stored:
    """What a run's folder takes: bytes of disk, and seconds since the epoch of its last change."""

    size: int
    changed_at: float


def stored_in(folder: Path) -> Stored | None:
    """What a folder takes with all below it; nothing is followed out of it. None without one.

    Raises:
        OSError: The folder itself can't be read; what vanishes meanwhile is passed over.
    """
    try:
        found = folder.lstat()
    except FileNotFoundError:
        return None
    size = found.st_blocks * _BLOCK
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            with suppress(OSError):
                size += os.lstat(os.path.join(place, name)).st_blocks * _BLOCK
    return Stored(size, found.st_mtime)


class Executor(Protocol):
    """A machine or a cluster that runs batch scripts.

    Every method raises `ExecutorUnavailableError` when the executor can't answer.
    """

    queues: bool
    """True: it has a queue of its own, submit once SCHEDULED. False: start on chain first."""

    async def submit(self, spec: RunSpec) -> str:
        """Start the run and return its handle; a known key is adopted, never run twice.

        Raises:
            RunRefusedError: The specification can't be run.
        """
        ...

    async def find(self, key: str) -> str | None:
        """Handle of the run with this key, None when it surely never began here."""
        ...

    async def poll(self, handles: list[str]) -> dict[str, RunStatus]:
        """Status of each handle."""
        ...

    async def cancel(self, handle: str) -> None:
        """End the run; returns when its processes are gone. An ended or unknown run is no error."""
        ...

    async def extend(self, handle: str, walltime: int) -> None:
        """Give the run `walltime` seconds in all, counted from its start."""
        ...

    async def capacity(self) -> Offer:
        """Cpus, memory (MB) and gpus that are free now."""
        ...

    async def fault(self) -> str:
        """Why no run can be started here now, in words; empty when nothing speaks against it."""
        ...

    async def output(self, handle: str, offset: int = 0, limit: int = 65536) -> bytes:
        """Up to `limit` bytes, from byte `offset`, of what the run printed.

        Raises:
            NotFoundError: No such run.
        """
        ...

    def folder(self, handle: str) -> Path:
        """The folder of a run, whether it is there or not; see `rundir`."""
        ...

    async def keys(self) -> list[str]:
        """Every run it still knows, live or ended."""
        ...

    async def stored(self, handle: str) -> Stored | None:
        """The disk that a run's folder takes; None where it has none.

        An executor that leaves nothing on the daemon's disk answers None.
        """
        ...

    async def forget(self, handle: str) -> None:
        """Remove an ended run with all that it left; its key is not known any more.

        Raises:
            ExecutorError: The run has not ended.
        """
        ...


@dataclass(frozen=True, slots=True)
class ExecutorContext:
    """What an executor is made from; see `registry.create_executor`.

    Attributes:
        state_dir: Folder of the daemon.
        capacity: CPUs, memory (MB) and GPUs that a single machine may use; a cluster knows its own.
        min_free: MB of disk below which nothing is called free.
        owner: Account of the provider.
        options: `executor_options` of the settings, not checked yet.
        allow_unisolated: Run jobs that nothing keeps apart from the daemon; without it, an executor
            that can't isolate jobs refuses to be made.
        allow_root: Run jobs as root.
        private: Folders and files of the daemon that no job may see: keystore, password, state.
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
    """The error for a folder that can't be used now."""
    reason = getattr(error, "strerror", None) or str(error)
    return ExecutorUnavailableError(
        f"The {executor} executor can't work in {path}: {reason}",
        hint="Check the disk, its permissions and limits; it is tried again.",
    )


def check_key(key: str) -> str:
    """The key itself, once it is sure to be a plain folder name.

    Raises:
        RunRefusedError: It is not.
    """
    if not _KEY.fullmatch(key):
        raise RunRefusedError(f"Run key {key[:80]!r} is not a plain name")
    return key


def check_spec(spec: RunSpec) -> None:
    """Refuse what no executor can run.

    Raises:
        RunRefusedError: Naming the run and the field.
    """
    check_key(spec.key)
    problem = _problem(spec)
    if problem:
        raise RunRefusedError(f"Run {spec.key} is refused: {problem}")


def _problem(spec: RunSpec) -> str:
    wanted = spec.resources
    if min(wanted.tasks, wanted.cpus_per_task, wanted.mem_per_cpu) < 1 or wanted.gpus < 0:
        return f"its resources {wanted} are not positive"
    if not 1 <= spec.walltime <= MAX_WALLTIME:
        return f"its walltime of {spec.walltime} seconds is out of range"
    if len(spec.script) > MAX_SCRIPT_BYTES:
        return f"its script is larger than {MAX_SCRIPT_BYTES:,} bytes"
    if not spec.comment.isprintable() or "|" in spec.comment or len(spec.comment) > _MAX_COMMENT:
        return "its comment is not one plain line"
    return _env_problem(spec.env)


def _env_problem(env: Mapping[str, str]) -> str:
    total = 0
    for name, value in env.items():
        if not _ENV_NAME.fullmatch(name):
            return f"{name[:80]!r} is no name of an environment variable"
        try:
            size = len(f"{name}={value}".encode())
        except UnicodeEncodeError:
            return f"the environment variable {name[:80]} is not text"
        if "\0" in value or size > _MAX_ENV_STRING:
            return f"the environment variable {name[:80]} holds a NUL byte or is too long"
        total += size
    return (
        f"its environment is larger than {MAX_ENV_BYTES:,} bytes" if total > MAX_ENV_BYTES else ""
    )
