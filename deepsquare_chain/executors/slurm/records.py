"""The folder of a Slurm run, and its state and exit status from Slurm's states and these files.

    file             content                                 written by
    environment      variables of the script                 executor, before sbatch
    sandbox          bubblewrap's command, where jobs are    executor, before sbatch
                     isolated
    limits           KB of disk, processes, GPUs, and 1      executor, before sbatch
                     if jobs may create user namespaces
    srun             `srun` of a job in a sandbox            executor, before sbatch
    steps/           pipes of that srun, during the job      wrapper
    intent.json      intent to call sbatch                   executor
    slurm.json       ID of the Slurm job                     executor, once it is known
    start.json       claim of the run by its Slurm job       wrapper, only once
    end.json         code, reason and duration               wrapper
    slurm.log        Slurm's own messages                    Slurm
    exit.json        exit record                             executor

The folder is on a file system that the nodes share. Methods raise OSError unchanged.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from deepsquare_chain.executors.base import Exit, RunState
from deepsquare_chain.executors.rundir import (
    RunFolder,
    dump,
    finite_number,
    read_optional,
    read_record,
    replace,
    unique,
    write_new,
)
from deepsquare_chain.executors.slurm.parsing import SlurmJob

_QUEUED: Final = frozenset(
    [
        *("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD"),
        *("SPECIAL_EXIT", "POWER_UP_NODE"),
    ]
)
_RUNNING: Final = frozenset(
    [
        *("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"),
        *("EXPEDITING", "UPDATE_DB"),
    ]
)
_TIME: Final = frozenset({"TIMEOUT", "DEADLINE"})
#: Failures of the provider, which the job did not cause.
_LOST: Final = frozenset(
    ["NODE_FAIL", "BOOT_FAIL", "PREEMPTED", "REVOKED", "LAUNCH_FAILED", "RECONFIG_FAIL"]
)
_ENDED: Final = _TIME | _LOST | {"COMPLETED", "FAILED", "OUT_OF_MEMORY", "CANCELLED"}
#: Reasons for which a pending job never starts.
_NEVER: Final = frozenset(
    [
        *("BadConstraints", "PartitionConfig", "PartitionTimeLimit", "PartitionNodeLimit"),
        *("InvalidAccount", "InvalidQOS", "AssociationTimeLimit", "AccountNotAllowed"),
        *("QOSNotAllowed", "AssocMaxWallDurationPerJobLimit", "QOSMaxWallDurationPerJobLimit"),
        "DependencyNeverSatisfied",
    ]
)
_TERM: Final = 128 + signal.SIGTERM
_KILL: Final = 128 + signal.SIGKILL
#: Exit status of jobs whose wrapper never began: nodes can't execute it, or lack its folder.
_NEVER_BEGAN: Final = {
    "CANCELLED": (_TERM, "cancelled"),
    "COMPLETED": (126, "unstarted"),
    "FAILED": (126, "unstarted"),
    "LAUNCH_FAILED": (126, "unstarted"),
}


@dataclass(frozen=True, slots=True)
class Orders:
    """Requests of the daemon: a cancel, or the end of a run that exceeded its walltime."""

    cancel: bool = False
    overdue: bool = False


def run_state(slurm_state: str) -> RunState:
    """Return the run state for a state of Slurm; UNKNOWN if no known version has it."""
    if slurm_state in _QUEUED:
        return RunState.QUEUED
    if slurm_state in _RUNNING:
        return RunState.RUNNING
    return RunState.ENDED if slurm_state in _ENDED else RunState.UNKNOWN


def never_starts(job: SlurmJob) -> bool:
    """Return whether a pending job can never start."""
    return job.state == "PENDING" and job.reason in _NEVER


def conclude(
    job: SlurmJob | None,
    started_at: float | None,
    end: Exit | None,
    orders: Orders,
    *,
    user_id: int,
    now: float,
) -> Exit:
    """Return the exit status of a run.

    Args:
        job: Slurm job in a final state; None when Slurm no longer has it.
        started_at: Start of the wrapper in seconds since the epoch; None if it never began.
        end: The wrapper's record of the script's end, see `SlurmFolder.end`; None if there is none.
        orders: Requests of the daemon.
        user_id: User ID of the jobs' user.
        now: Seconds since the epoch, used if the time of the end is unknown.
    """
    code, reason = _verdict(job, started_at, end, orders, user_id)
    if end is not None:
        return Exit(code, reason, end.seconds, end.started_at, end.ended_at)
    ended_at = float(job.ended_at) if job is not None and job.ended_at else now
    if started_at is None:
        return Exit(code, reason, 0, ended_at, ended_at)
    ended_at = max(started_at, ended_at)
    return Exit(code, reason, math.ceil(ended_at - started_at), started_at, ended_at)


def _verdict(
    job: SlurmJob | None,
    started_at: float | None,
    end: Exit | None,
    orders: Orders,
    user_id: int,
) -> tuple[int, str]:
    state = job.state if job is not None else ""
    killed_by = end.code if end is not None and end.code else _TERM
    if end is not None and end.reason in {"walltime", "cancelled", "disk", "processes"}:
        return killed_by, end.reason
    if state == "OUT_OF_MEMORY":
        return (end.code if end and end.code else _KILL), "memory"
    if end is not None and _is_genuine(end, state):
        return end.code, end.reason
    if orders.overdue or state in _TIME:
        return killed_by, "walltime"
    if orders.cancel:
        return killed_by, "cancelled"
    return _by_slurm(job, end, began=started_at is not None, user_id=user_id)


def _by_slurm(
    job: SlurmJob | None, end: Exit | None, *, began: bool, user_id: int
) -> tuple[int, str]:
    """Return code and reason from Slurm, if neither script nor daemon caused the end."""
    if job is None:
        return _KILL, "lost"
    if not began:
        return _NEVER_BEGAN.get(job.state, (_KILL, "lost"))
    if job.state in {"COMPLETED", "FAILED"}:
        return _by_exit_code(job, end)
    if job.state == "CANCELLED":
        return _TERM, "signalled" if job.cancelled_by == user_id else "cancelled"
    return _KILL, "lost"


def _is_genuine(end: Exit, state: str) -> bool:
    """Return whether the script ended by itself, before the event that ended the Slurm job."""
    if end.reason == "terminated":
        return False
    if end.code == 0:
        return True
    killed = state in _TIME | {"CANCELLED"} and end.code in {_TERM, _KILL}
    return not killed and state not in _LOST


def _by_exit_code(job: SlurmJob, end: Exit | None) -> tuple[int, str]:
    if end is not None:
        # The batch script was terminated by the job itself, not by Slurm.
        return end.code or _TERM, "signalled"
    if job.exit_signal:
        return 128 + job.exit_signal, "signalled"
    code = job.exit_code or 0
    if job.state == "FAILED" and not code:
        return _KILL, "signalled"
    return code, "exited"


#: Job ID of a run that was cancelled before its Slurm job began: no wrapper can claim it.
WITHDRAWN: Final = "0"
_END_REASONS: Final = frozenset(
    {"exited", "signalled", "walltime", "cancelled", "terminated", "disk", "processes"}
)


class SlurmFolder(RunFolder):
    """Records of one run; `group` is that of the job's user if it is not the daemon's user."""

    def __init__(self, path: Path, group: int | None = None) -> None:
        super().__init__(path)
        self._group = group

    def share(self) -> None:
        """Give the group of the job's user access to the executor's files and to the folder."""
        if self._group is None:
            return
        for path in (self.path, self.work, self.temporary):
            if path.is_dir():
                os.chown(path, -1, self._group)
                path.chmod(0o2770)
        for name in ("script", "control.json", "environment", "sandbox", "limits", "srun"):
            path = self.path / name
            if path.exists():
                os.chown(path, -1, self._group)
                path.chmod(0o550 if name == "srun" else 0o640)

    def set_control(self, **changes: object) -> None:
        """Change the control record."""
        super().set_control(**changes)
        self.share()

    def set_environment(self, env: Mapping[str, str]) -> None:
        """Write the environment variables of the script, separated by NUL."""
        data = b"".join(f"{name}={value}".encode() + b"\0" for name, value in env.items())
        replace(self.path / "environment", data)

    def set_sandbox(self, command: Sequence[str], limits: Sequence[int], srun: bytes) -> None:
        """Write bubblewrap's command, the limits, and the program that replaces Slurm's `srun`.

        `limits` are disk in KB, processes, GPUs, and 1 if jobs may create user namespaces.
        """
        self.temporary.mkdir(mode=0o700, exist_ok=True)
        path = self.path / "srun"
        path.write_bytes(srun)
        path.chmod(0o500)
        replace(self.path / "sandbox", b"".join(os.fsencode(part) + b"\0" for part in command))
        replace(self.path / "limits", " ".join(map(str, limits)).encode() + b"\n")

    # -- submission

    def intent(self) -> float | None:
        """Return the time of the intent to call sbatch, in epoch seconds; None for none."""
        record = read_optional(self.path / "intent.json")
        return None if record is None else finite_number(record, "at")

    def set_intent(self) -> None:
        """Record the intent to call sbatch."""
        replace(self.path / "intent.json", dump({"at": time.time()}))

    def drop_intent(self) -> None:
        """Remove the intent: sbatch certainly submitted no job."""
        (self.path / "intent.json").unlink(missing_ok=True)

    def job_id(self) -> str | None:
        """Return the ID of the Slurm job; None while it is not known."""
        record = read_optional(self.path / "slurm.json")
        return None if record is None else str(record.get("job", ""))

    def set_job_id(self, job_id: str) -> None:
        """Record the ID of the Slurm job."""
        replace(self.path / "slurm.json", dump({"job": job_id}))

    def withdraw(self) -> None:
        """Request the cancellation of the run, and claim it so that no later wrapper can."""
        self.set_control(cancel=True)
        temporary = self.path / f".withdrawn.{unique()}"
        try:
            write_new(temporary, dump({"job": WITHDRAWN, "at": time.time()}))
            os.link(temporary, self.path / "start.json")
        except FileExistsError:
            pass  # a wrapper claimed it, and reads the cancel request
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()

    # -- records of the wrapper

    def start(self) -> tuple[str, float | None] | None:
        """Return the Slurm job that claimed the run, and the time; no time if it was withdrawn."""
        record = read_optional(self.path / "start.json")
        if record is None:
            return None
        job = str(record.get("job", ""))[:20]
        return job, None if job == WITHDRAWN else finite_number(record, "at")

    def end(self) -> Exit | None:
        """Return the wrapper's record of the script's end; None while there is no valid one.

        The reason `terminated` means that Slurm ended the script, for the reason in its state.
        """
        try:
            record = read_record(self.path / "end.json")
            seconds = math.ceil(int(record["centiseconds"]) / 100)
            times = finite_number(record, "started_at"), finite_number(record, "ended_at")
            end = Exit(int(record["code"]), str(record["reason"]), seconds, *times)
        except FileNotFoundError:
            return None
        except (OSError, KeyError, TypeError, ValueError, OverflowError):
            return None  # damaged by the job: Slurm's state is used
        is_valid = 0 <= end.code <= 255 and end.reason in _END_REASONS and end.seconds >= 0
        return end if is_valid else None

    # -- requests and verdict of the daemon

    def orders(self) -> Orders:
        """Return the requests for the run."""
        control = self.control()
        return Orders(cancel=control.get("cancel") is True, overdue=control.get("overdue") is True)

    def walltime(self) -> int:
        """Return the current walltime in seconds."""
        return int(finite_number(self.control(), "walltime"))

    def verdict(self) -> Exit | None:
        """Return the recorded exit status of the run; None if there is none."""
        try:
            record = self.exit()
            return None if record is None else Exit.from_record(record)
        except OSError:
            return None

    def set_verdict(self, ended: Exit) -> None:
        """Record the exit status of the run."""
        self.set_exit(asdict(ended))
