"""Arguments of Slurm's commands; pure. They are never parsed by a shell.

Only text formats that are the same from Slurm 20.11 to 26.05 are used.
"""

from __future__ import annotations

from typing import Final

from deepsquare_chain.executors.base import RunSpec
from deepsquare_chain.executors.slurm.options import SlurmOptions

#: `--format` of squeue; the last two fields may contain the separator.
QUEUE_FORMAT: Final = "%i|%T|%r|%S|%e|%l|%j|%k"
NODE_FORMAT: Final = "NodeList:255,Partition:127,StateLong:63,CPUsState:63,Memory:31,AllocMem:31,Gres:511,GresUsed:511"
PARTITION_FORMAT: Final = "%P|%a|%l"
ACCOUNT_FORMAT: Final = "JobID,State,ExitCode,Start,End,JobName"
COMPLETION_FORMAT: Final = "JobID,State,Start,End,JobName"
#: Minutes in addition to the paid seconds: Slurm rounds, and ends jobs late or early.
_SLACK_MINUTES: Final = 2
NAME_PREFIX: Final = "deepsquare-"


def job_name(key: str) -> str:
    """Return the name of a run's Slurm job."""
    return NAME_PREFIX + key


def key_of(name: str) -> str | None:
    """Return the run key of a Slurm job by its name; None for foreign jobs."""
    return name.removeprefix(NAME_PREFIX) if name.startswith(NAME_PREFIX) else None


def minutes(seconds: int) -> int:
    """Return Slurm's time limit in minutes, which is longer than the walltime in `seconds`."""
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
    """Return `sbatch` for one run, with `folder` as the argument of the wrapper."""
    resources = spec.resources
    arguments = [
        "sbatch",
        "--parsable",
        f"--job-name={job_name(spec.key)}",
        f"--comment={comment}",
        "--no-requeue",
        "--export=NONE",
        f"--chdir={folder}/work",
        # Slurm expands percent signs in the name of a log.
        f"--output={folder.replace('%', '%%')}/slurm.log",
        "--input=/dev/null",
        f"--ntasks={resources.tasks}",
        f"--cpus-per-task={resources.cpus_per_task}",
        f"--mem-per-cpu={resources.mem_per_cpu}M",
        f"--time={limit_minutes}",
    ]
    arguments += _placement(resources.gpus, options)
    return [*arguments, *_gpus(resources.gpus, options), *options.extra, wrapper, folder]


def trial(options: SlurmOptions) -> list[str]:
    """Return `sbatch` that validates the options with the smallest job, without submitting it."""
    arguments = ["sbatch", "--test-only", "--ntasks=1", "--mem-per-cpu=1M", "--time=1"]
    return [*arguments, *_placement(0, options), *options.extra, "--wrap=true"]


def _placement(gpus: int, options: SlurmOptions) -> list[str]:
    values = {
        "partition": ",".join(options.partitions_for(gpus)),
        "account": options.account,
        "qos": options.qos,
        "constraint": options.constraint,
    }
    return [f"--{name}={value}" for name, value in values.items() if value]


def _gpus(count: int, options: SlurmOptions) -> list[str]:
    if not count:
        return []
    type_prefix = f"{options.gpu_type}:" if options.gpu_type else ""
    if options.gpus == "gres":
        # --gres is per node, a job's GPUs are a total: both are the same on one node.
        return ["--nodes=1", f"--gres=gpu:{type_prefix}{count}"]
    return [f"--gpus={type_prefix}{count}"]


def queue(user: str) -> list[str]:
    """Return `squeue` for all jobs of a user that the controller still has."""
    return ["squeue", "--noheader", "--states=all", f"--user={user}", f"--format={QUEUE_FORMAT}"]


def cancel(job_id: str, signal: str = "") -> list[str]:
    """Return `scancel`; a signal is also sent to the batch script."""
    signal_options = [f"--signal={signal}", "--full"] if signal else []
    return ["scancel", *signal_options, job_id]


def show_job(job_id: str) -> list[str]:
    """Return `scontrol` for the details of a job."""
    return ["scontrol", "--oneliner", "show", "job", job_id]


def set_limit(job_id: str, limit_minutes: int) -> list[str]:
    """Return `scontrol` for a new time limit of a job."""
    return ["scontrol", "update", f"JobId={job_id}", f"TimeLimit={limit_minutes}"]


def show_config() -> list[str]:
    """Return `scontrol` for the cluster's configuration."""
    return ["scontrol", "show", "config"]


def nodes(partitions: tuple[str, ...]) -> list[str]:
    """Return `sinfo` for nodes, one line per node and partition."""
    return ["sinfo", "--noheader", "--Node", *_of(partitions), f"--Format={NODE_FORMAT}"]


def partitions(names: tuple[str, ...]) -> list[str]:
    """Return `sinfo` for partitions: state and time limit."""
    return ["sinfo", "--noheader", *_of(names), f"--format={PARTITION_FORMAT}"]


def _of(names: tuple[str, ...]) -> list[str]:
    return [f"--partition={','.join(names)}"] if names else []


def accounting(names: list[str], since: int) -> list[str]:
    """Return `sacct` for jobs by name after `since` (seconds since the epoch)."""
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
    """Return `sacct` for the file of completed jobs."""
    return ["sacct", "--completion", "--noheader", "--parsable2", f"--format={COMPLETION_FORMAT}"]


def _moment(seconds: int) -> str:
    """Format a time for sacct, in the command's local time (its TZ is UTC)."""
    from datetime import UTC, datetime  # noqa: PLC0415

    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")
