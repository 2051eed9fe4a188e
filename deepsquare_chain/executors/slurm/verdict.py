"""Maps Slurm's states and the wrapper's records to a run's state and exit status; pure.

| Slurm's state | exit reason of the run |
|---|---|
| COMPLETED, FAILED | by the wrapper's record or Slurm's exit code; unstarted if it never began |
| TIMEOUT, DEADLINE | walltime |
| OUT_OF_MEMORY | memory |
| CANCELLED | cancelled; signalled if by the run's own user without a cancel request |
| LAUNCH_FAILED | unstarted if the wrapper never began, else lost |
| NODE_FAIL, BOOT_FAIL, PREEMPTED, REVOKED, RECONFIG_FAIL | lost |

A script that ended with code 0 before such a state counts as finished.
"""

from __future__ import annotations

import math
import signal
from dataclasses import dataclass
from typing import Final

from deepsquare_chain.executors.base import Exit, RunState
from deepsquare_chain.executors.slurm.parsing import SlurmJob

_QUEUED: Final = frozenset(
    [
        "PENDING",
        "CONFIGURING",
        "REQUEUED",
        "REQUEUE_HOLD",
        "REQUEUE_FED",
        "RESV_DEL_HOLD",
        "SPECIAL_EXIT",
        "POWER_UP_NODE",
    ]
)
_RUNNING: Final = frozenset(
    [
        "RUNNING",
        "COMPLETING",
        "SUSPENDED",
        "STOPPED",
        "SIGNALING",
        "STAGE_OUT",
        "RESIZING",
        "EXPEDITING",
        "UPDATE_DB",
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
        "BadConstraints",
        "PartitionConfig",
        "PartitionTimeLimit",
        "PartitionNodeLimit",
        "InvalidAccount",
        "InvalidQOS",
        "AssociationTimeLimit",
        "AccountNotAllowed",
        "QOSNotAllowed",
        "AssocMaxWallDurationPerJobLimit",
        "QOSMaxWallDurationPerJobLimit",
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
class EndRecord:
    """The wrapper's record of the script's end; times are in seconds.

    `reason` is exited, signalled, walltime, cancelled, or terminated: Slurm ended it, for the
    reason in its state.
    """

    code: int
    reason: str
    seconds: int
    started_at: float
    ended_at: float


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
    end: EndRecord | None,
    orders: Orders,
    *,
    user_id: int,
    now: float,
) -> Exit:
    """Return the exit status of a run.

    Args:
        job: Slurm job in a final state; None when Slurm no longer has it.
        started_at: Start of the wrapper in seconds since the epoch; None if it never began.
        end: The wrapper's record; None if there is none.
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
    end: EndRecord | None,
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
    job: SlurmJob | None, end: EndRecord | None, *, began: bool, user_id: int
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


def _is_genuine(end: EndRecord, state: str) -> bool:
    """Return whether the script ended by itself, before the event that ended the Slurm job."""
    if end.reason == "terminated":
        return False
    if end.code == 0:
        return True
    killed = state in _TIME | {"CANCELLED"} and end.code in {_TERM, _KILL}
    return not killed and state not in _LOST


def _by_exit_code(job: SlurmJob, end: EndRecord | None) -> tuple[int, str]:
    if end is not None:
        # The batch script was terminated by the job itself, not by Slurm.
        return end.code or _TERM, "signalled"
    if job.exit_signal:
        return 128 + job.exit_signal, "signalled"
    code = job.exit_code or 0
    if job.state == "FAILED" and not code:
        return _KILL, "signalled"
    return code, "exited"
