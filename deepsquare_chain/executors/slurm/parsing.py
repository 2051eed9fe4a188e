"""Parses the output of Slurm's commands; pure.

The text is untrusted: an unexpected line is skipped or yields an unknown value, and never an error
that stops the daemon. Times are in seconds since the epoch (`SLURM_TIME_FORMAT=%s`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from deepsquare_chain.errors import UsageError
from deepsquare_chain.job import Hardware

_JOB_ID: Final = re.compile(r"[1-9][0-9]{0,17}")
_SUBMITTED: Final = re.compile(r"([1-9][0-9]{0,17})(;[^\s;]{1,128})?")
_STATE: Final = re.compile(r"[A-Z_]{2,40}")
_CANCELLED_BY: Final = re.compile(r"CANCELLED by ([0-9]{1,10})")
_EXIT_CODE: Final = re.compile(r"([0-9]{1,5}):([0-9]{1,5})")
_LIMIT: Final = re.compile(r"(?:([0-9]{1,6})-)?(?:([0-9]{1,6}):)?([0-9]{1,6}):([0-9]{1,2})")
_FIELD: Final = re.compile(r"(?:^|\s)(JobState|Reason|ExitCode|StartTime|EndTime|TimeLimit)=(\S*)")
_CPUS: Final = re.compile(r"([0-9]{1,9})/([0-9]{1,9})/([0-9]{1,9})/([0-9]{1,9})")
_GPU: Final = re.compile(r"gpu(?::[A-Za-z0-9_.-]+)?:([0-9]{1,6})")
#: Numbers with more digits are invalid as time or size.
_MAX_DIGITS: Final = 12


@dataclass(frozen=True, slots=True)
class SlurmJob:
    """A Slurm job; unknown values are None or empty, times are in seconds since the epoch.

    Attributes:
        state: State in capitals, such as RUNNING, without a suffix.
        reason: Reason why it is pending or failed.
        exit_code: Exit code of the batch script.
        exit_signal: Signal that ended the batch script, 0 for none; 125 for out of memory.
        ended_at: For a running job the end of its time limit.
        limit: Time limit in seconds.
        cancelled_by: ID of the user who cancelled it.
    """

    id: str
    state: str
    name: str = ""
    comment: str = ""
    reason: str = ""
    exit_code: int | None = None
    exit_signal: int = 0
    started_at: int | None = None
    ended_at: int | None = None
    limit: int | None = None
    cancelled_by: int | None = None


@dataclass(frozen=True, slots=True)
class SlurmNode:
    """A node of the cluster; memory in MB.

    Attributes:
        states: State and flags of the node, such as {"mixed", "drain"}.
        cpus: Total number of CPUs.
        idle_cpus: CPUs that are up and not allocated.
    """

    name: str
    states: frozenset[str]
    cpus: int
    idle_cpus: int
    memory: int
    allocated_memory: int
    gpus: int
    allocated_gpus: int

    @property
    def is_up(self) -> bool:
        """Whether jobs can start on the node, now or after its current jobs."""
        return bool(self.states & _UP) and not self.states & _OUT_OF_SERVICE


_UP: Final = frozenset({"idle", "mixed", "allocated", "completing", "planned"})
_OUT_OF_SERVICE: Final = frozenset(
    [
        *("blocked", "down", "drain", "drained", "draining", "error", "fail", "failing", "future"),
        *("inval", "invalid", "maint", "no_respond", "not_responding", "planned_down"),
        *("power_down", "powered_down", "powering_down", "reboot", "reserved", "unknown"),
    ]
)
#: Suffixes that sinfo appends to a state: not responding, powering down, rebooting, ...
_MARKS: Final = {
    "*": "not_responding",
    "$": "maint",
    "@": "reboot",
    "^": "reboot",
    "!": "powering_down",
    "%": "powering_down",
}


def job_id(text: str) -> str | None:
    """Return the job ID from `sbatch --parsable`; other lines may precede it."""
    for line in reversed(text.splitlines()):
        match = _SUBMITTED.fullmatch(line.strip())
        if match:
            return match[1]
    return None


def _jobs(text: str, columns: int) -> Iterator[list[str]]:
    """Yield the columns of each line that begins with a job ID; the last may contain a separator.

    Other lines are skipped, such as the tasks of a foreign job array.
    """
    for line in text.splitlines():
        values = line.split("|", columns - 1)
        if len(values) == columns and _JOB_ID.fullmatch(values[0]):
            yield values


def queue(text: str) -> list[SlurmJob]:
    """Parse the jobs of squeue."""
    return [
        SlurmJob(
            id=number,
            state=_state(state),
            name=name,
            comment="" if comment == "(null)" else comment,
            reason=reason,
            started_at=_number(start),
            ended_at=_number(end),
            limit=time_limit(limit),
        )
        for number, state, reason, start, end, limit, name, comment in _jobs(text, 8)
    ]


def job(text: str) -> SlurmJob | None:
    """Parse the job of `scontrol --oneliner show job`.

    Only the part before the first user-defined field is read: a comment or a path may contain any
    text, even one that looks like a state.
    """
    number = re.match(r"JobId=([1-9][0-9]{0,17}) ", text)
    if number is None:
        return None
    trusted = text.partition(" Command=")[0]
    # The name is user-defined too; the relevant fields follow it.
    trusted = trusted.partition(" UserId=")[2]
    fields: dict[str, str] = {}
    for name, value in _FIELD.findall(trusted):
        fields.setdefault(name, value)
    code, signal = _exit(fields.get("ExitCode", ""))
    return SlurmJob(
        id=number[1],
        state=_state(fields.get("JobState", "")),
        reason=fields.get("Reason", ""),
        exit_code=code,
        exit_signal=signal,
        started_at=_number(fields.get("StartTime", "")),
        ended_at=_number(fields.get("EndTime", "")),
        limit=time_limit(fields.get("TimeLimit", "")),
    )


def accounting(text: str) -> list[SlurmJob]:
    """Parse the jobs of sacct from slurmdbd."""
    jobs = []
    for number, state, exit_code, start, end, name in _jobs(text, 6):
        code, signal = _exit(exit_code)
        canceller = _CANCELLED_BY.match(state)
        jobs.append(
            SlurmJob(
                id=number,
                state=_state(state),
                name=name,
                exit_code=code,
                exit_signal=signal,
                started_at=_number(start),
                ended_at=_number(end),
                cancelled_by=int(canceller[1]) if canceller else None,
            )
        )
    return jobs


def completions(text: str) -> list[SlurmJob]:
    """Parse the jobs of sacct from the file of completed jobs."""
    return [
        SlurmJob(number, _state(state), name, started_at=_number(start), ended_at=_number(end))
        for number, state, start, end, name in _jobs(text, 5)
    ]


def nodes(text: str, *, default_only: bool) -> list[SlurmNode]:
    """Parse the nodes of sinfo, which prints a line per node and partition, without duplicates.

    `default_only` includes only nodes of the default partition, which sinfo marks.
    """
    nodes_by_name: dict[str, SlurmNode] = {}
    for line in text.splitlines():
        parts = line.split()
        if len(parts) != 8:
            continue
        name, partition, state, cpus, memory, allocated, gres, used = parts
        if default_only and not partition.endswith("*"):
            continue
        counts = _CPUS.fullmatch(cpus)
        if counts is None or name in nodes_by_name:
            continue
        nodes_by_name[name] = SlurmNode(
            name=name,
            states=node_states(state),
            cpus=int(counts[4]),
            idle_cpus=int(counts[2]),
            memory=_number(memory) or 0,
            allocated_memory=_number(allocated) or 0,
            gpus=gpus(gres),
            allocated_gpus=gpus(used),
        )
    return list(nodes_by_name.values())


def partition_limits(text: str, *, default_only: bool) -> dict[str, tuple[bool, int | None]]:
    """Return for each partition whether it is up, and its time limit in seconds (None: unlimited).

    `default_only` includes only the default partition.
    """
    limits = {}
    for line in text.splitlines():
        parts = line.split("|")
        if len(parts) == 3 and (parts[0].endswith("*") or not default_only):
            limits[parts[0].rstrip("*")] = (parts[1] == "up", time_limit(parts[2]))
    return limits


def config(text: str) -> dict[str, str]:
    """Parse `scontrol show config`; keys are the names in slurm.conf."""
    settings = {}
    for line in text.splitlines():
        name, equals, value = line.partition("=")
        if equals:
            settings[name.strip()] = value.strip()
    return settings


def node_states(text: str) -> frozenset[str]:
    """Split a node's state: `mixed*+drain` is mixed, not responding and drain."""
    states = set()
    for part in re.split(r"[+\s]+", text.lower()):
        state = part.rstrip("*$@^!%#~-")
        states |= {_MARKS[mark] for mark in part[len(state) :] if mark in _MARKS}
        if state:
            states.add(state)
    return frozenset(states)


def gpus(text: str) -> int:
    """Count the GPUs in a list of generic resources such as `gpu:h100:4(S:0-1),shard:8`."""
    # Parentheses contain lists of sockets or devices, which may include commas.
    without_lists = re.sub(r"\([^()]*\)", "", text)
    counts = (_GPU.fullmatch(part) for part in without_lists.split(","))
    return sum(int(count[1]) for count in counts if count)


def time_limit(text: str) -> int | None:
    """Parse a limit such as `1-00:00:00` or `10:00` to seconds; None when there is none."""
    match = _LIMIT.fullmatch(text.strip())
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def _state(text: str) -> str:
    match = _STATE.match(text.strip())
    return match[0] if match else ""


def _exit(text: str) -> tuple[int | None, int]:
    match = _EXIT_CODE.fullmatch(text.strip())
    return (int(match[1]), int(match[2])) if match else (None, 0)


def _number(text: str) -> int | None:
    """Parse a whole number; None for N/A, Unknown, None and other text."""
    text = text.strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS else None


@dataclass(frozen=True, slots=True)
class FoundHardware:
    """Hardware to register; `left_out` names nodes that are down or smaller than the others."""

    hardware: Hardware
    left_out: tuple[str, ...]


def registered_hardware(nodes: Sequence[SlurmNode]) -> FoundHardware:
    """Return the largest hardware, of equal nodes, that nodes in service provide.

    A registered provider has nodes of one size. The size is that of one of the nodes, and every
    node with at least these resources counts. The best size has most total CPUs, then GPUs, then
    memory.

    Raises:
        UsageError: No node is in service.
    """
    usable = [node for node in nodes if node.is_up and node.cpus and node.memory]
    if not usable:
        raise UsageError(
            "No node of the cluster is in service",
            hint="Check `sinfo`, and the partitions in executor_options.",
        )
    sizes = {(node.cpus, node.memory, node.gpus) for node in usable}
    best = max((_hardware(size, usable) for size in sizes), key=_size_of)
    size = best.cpus_per_node, best.mem_per_node, best.gpus_per_node
    left_out = (node.name for node in nodes if node not in usable or not _fits_node(node, size))
    return FoundHardware(best, tuple(left_out))


def _hardware(size: tuple[int, int, int], nodes: Sequence[SlurmNode]) -> Hardware:
    return Hardware(sum(_fits_node(node, size) for node in nodes), *size)


def _fits_node(node: SlurmNode, size: tuple[int, int, int]) -> bool:
    cpus, memory, gpus = size
    return node.cpus >= cpus and node.memory >= memory and node.gpus >= gpus


def _size_of(hardware: Hardware) -> tuple[int, int, int]:
    count = hardware.nodes
    return (
        count * hardware.cpus_per_node,
        count * hardware.gpus_per_node,
        count * hardware.mem_per_node,
    )
