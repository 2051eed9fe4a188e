"""From Slurm's states and the wrapper's records to the state and the end of a run; pure.

| Slurm's state | the run |
|---|---|
| COMPLETED, FAILED | as the wrapper recorded it, else by Slurm's exit code; unstarted if it never began |
| TIMEOUT, DEADLINE | walltime |
| OUT_OF_MEMORY | memory |
| CANCELLED | cancelled; by the run's own user without an order: signalled |
| NODE_FAIL, BOOT_FAIL, PREEMPTED, REVOKED, LAUNCH_FAILED, RECONFIG_FAIL | lost |

A script that had ended with code 0 before such a state came has finished.
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
#: The provider's loss: the job did nothing wrong.
_LOST: Final = frozenset(
    ["NODE_FAIL", "BOOT_FAIL", "PREEMPTED", "REVOKED", "LAUNCH_FAILED", "RECONFIG_FAIL"]
)
_ENDED: Final = _TIME | _LOST | {"COMPLETED", "FAILED", "OUT_OF_MEMORY", "CANCELLED"}
#: Reasons of pending jobs that no waiting ends.
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
#: Ends of jobs whose wrapper never began: the nodes could not execute it, or do not see its folder.
_NEVER_BEGAN: Final = {
    "CANCELLED": (_TERM, "cancelled"),
    "COMPLETED": (126, "unstarted"),
    "FAILED": (126, "unstarted"),
    "LAUNCH_FAILED": (126, "unstarted"),
}


@dataclass(frozen=True, slots=True)
class EndRecord:
    """What the wrapper wrote when the script had ended; times are seconds.

    `reason` is exited, signalled, walltime, cancelled, or terminated: Slurm ended it, and its
    state tells why.
    """

    code: int
    reason: str
    seconds: int
    started_at: float
    ended_at: float


@dataclass(frozen=True, slots=True)
class Orders:
    """What the daemon ordered: a cancel, or the end of a run that outstayed its walltime."""

    cancel: bool = False
    overdue: bool = False


def run_state(slurm_state: str) -> RunState:
    """The run's state by Slurm's; UNKNOWN for one that no known version has."""
    if slurm_state in _QUEUED:
        return RunState.QUEUED
    if slurm_state in _RUNNING:
        return RunState.RUNNING
    return RunState.ENDED if slurm_state in _ENDED else RunState.UNKNOWN


def never_starts(job: SlurmJob) -> bool:
    """Whether a pending job waits for something that does not come."""
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
    """How a run ended.

    Args:
        job: Its Slurm job in an end state; None when Slurm has forgotten it.
        started_at: When the wrapper began, seconds since the epoch; None when it never did.
        end: The wrapper's record, None when it left none.
        orders: What the daemon ordered.
        user_id: Number of the user whose jobs these are.
        now: Seconds since the epoch, where nobody tells when it ended.
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
    """The end as Slurm tells it, where neither the script nor the daemon caused it."""
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
    """Whether the script ended by itself, and was not brought down by what ended the job."""
    if end.reason == "terminated":
        return False
    if end.code == 0:
        return True
    killed = state in _TIME | {"CANCELLED"} and end.code in {_TERM, _KILL}
    return not killed and state not in _LOST


def _by_exit_code(job: SlurmJob, end: EndRecord | None) -> tuple[int, str]:
    if end is not None:
        # The batch script was terminated, and not by Slurm: by the job itself.
        return end.code or _TERM, "signalled"
    if job.exit_signal:
        return 128 + job.exit_signal, "signalled"
    code = job.exit_code or 0
    if job.state == "FAILED" and not code:
        return _KILL, "signalled"
    return code, "exited"
