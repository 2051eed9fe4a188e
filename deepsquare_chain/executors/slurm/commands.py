"""Arguments of Slurm's commands; pure. Nothing here is ever read by a shell.

Only text formats are used that are the same from Slurm 20.11 to 26.05.
"""

from __future__ import annotations

from typing import Final

from deepsquare_chain.executors.base import RunSpec
from deepsquare_chain.executors.slurm.options import SlurmOptions

#: What `--format` of squeue prints; the last two may hold a separator.
QUEUE_FORMAT: Final = "%i|%T|%r|%S|%e|%l|%j|%k"
NODE_FORMAT: Final = "NodeList:255,Partition:127,StateLong:63,CPUsState:63,Memory:31,AllocMem:31,Gres:511,GresUsed:511"
PARTITION_FORMAT: Final = "%P|%a|%l"
ACCOUNT_FORMAT: Final = "JobID,State,ExitCode,Start,End,JobName"
COMPLETION_FORMAT: Final = "JobID,State,Start,End,JobName"
#: Whole minutes above the seconds that are paid: Slurm rounds, and ends jobs late or early.
_SLACK_MINUTES: Final = 2
NAME_PREFIX: Final = "deepsquare-"


def job_name(key: str) -> str:
    """Name of a run's Slurm job."""
    return NAME_PREFIX + key


def key_of(name: str) -> str | None:
    """Key of the run that a Slurm job belongs to; None for jobs of others."""
    return name.removeprefix(NAME_PREFIX) if name.startswith(NAME_PREFIX) else None


def minutes(seconds: int) -> int:
    """Slurm's limit in minutes, which is never what ends a run that obeys its walltime."""
    return -(-seconds // 60) + _SLACK_MINUTES


def submit(
    spec: RunSpec,
    options: SlurmOptions,
    *,
    folder: str,
    wrapper: str,
    limit_minutes: int,
    comment: str,
) -> list[str]:
    """`sbatch` for one run, with `folder` as the argument of the wrapper."""
    wanted = spec.resources
    arguments = [
        "sbatch",
        "--parsable",
        f"--job-name={job_name(spec.key)}",
        f"--comment={comment}",
        "--no-requeue",
        "--export=NONE",
        f"--chdir={folder}/work",
        # Slurm expands a percent sign in the name of a log.
        f"--output={folder.replace('%', '%%')}/slurm.log",
        "--input=/dev/null",
        f"--ntasks={wanted.tasks}",
        f"--cpus-per-task={wanted.cpus_per_task}",
        f"--mem-per-cpu={wanted.mem_per_cpu}M",
        f"--time={limit_minutes}",
    ]
    partitions = options.partitions_for(wanted.gpus)
    if partitions:
        arguments.append(f"--partition={','.join(partitions)}")
    for name, value in (
        ("account", options.account),
        ("qos", options.qos),
        ("constraint", options.constraint),
    ):
        if value:
            arguments.append(f"--{name}={value}")
    arguments += _gpus(wanted.gpus, options)
    return [*arguments, *options.extra, wrapper, folder]


def _gpus(count: int, options: SlurmOptions) -> list[str]:
    if not count:
        return []
    kind = f"{options.gpu_type}:" if options.gpu_type else ""
    if options.gpus == "gres":
        # gres counts per node, a job's GPUs count in all: both are the same on one node.
        return ["--nodes=1", f"--gres=gpu:{kind}{count}"]
    return [f"--gpus={kind}{count}"]


def queue(user: str) -> list[str]:
    """`squeue` for every job of a user that the controller remembers."""
    return ["squeue", "--noheader", "--states=all", f"--user={user}", f"--format={QUEUE_FORMAT}"]


def cancel(job_id: str, signal: str = "") -> list[str]:
    """`scancel`; with a signal, also to the batch script."""
    how = [f"--signal={signal}", "--full"] if signal else []
    return ["scancel", *how, job_id]


def show_job(job_id: str) -> list[str]:
    """`scontrol` for all that the controller knows about a job."""
    return ["scontrol", "--oneliner", "show", "job", job_id]


def set_limit(job_id: str, limit_minutes: int) -> list[str]:
    """`scontrol` for a new limit of a job."""
    return ["scontrol", "update", f"JobId={job_id}", f"TimeLimit={limit_minutes}"]


def show_config() -> list[str]:
    """`scontrol` for the cluster's configuration."""
    return ["scontrol", "show", "config"]


def nodes(partitions: tuple[str, ...]) -> list[str]:
    """`sinfo` for nodes, one line for each node and partition."""
    return ["sinfo", "--noheader", "--Node", *_of(partitions), f"--Format={NODE_FORMAT}"]


def partitions(names: tuple[str, ...]) -> list[str]:
    """`sinfo` for partitions: state and limit."""
    return ["sinfo", "--noheader", *_of(names), f"--format={PARTITION_FORMAT}"]


def _of(names: tuple[str, ...]) -> list[str]:
    return [f"--partition={','.join(names)}"] if names else []


def accounting(names: list[str], since: int) -> list[str]:
    """`sacct` for jobs by name that were known after `since` (seconds since the epoch)."""
    return [
        "sacct",
        "--allocations",
        "--noheader",
        "--parsable2",
        "--duplicates",
        f"--starttime={_moment(since)}",
        f"--name={','.join(names)}",
        f"--format={ACCOUNT_FORMAT}",
    ]


def completions() -> list[str]:
    """`sacct` for the file of completed jobs."""
    return ["sacct", "--completion", "--noheader", "--parsable2", f"--format={COMPLETION_FORMAT}"]


def _moment(seconds: int) -> str:
    """A time as sacct reads it, in the local time of this process (its TZ is UTC)."""
    from datetime import UTC, datetime  # noqa: PLC0415

    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")
