"""Options of the Slurm executor: `executor_options` of the settings."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field

from deepsquare_chain.executors import sandbox
from deepsquare_chain.executors.sandbox import SandboxOptions
from deepsquare_chain.job import DAY

#: Options of sbatch that the executor sets itself, or that would change the kind of job.
RESERVED: Final = frozenset(
    [
        *("account", "array", "begin", "chdir", "cluster-constraint", "clusters", "comment"),
        *("constraint", "cpus-per-task", "delay-boot", "dependency", "error", "export"),
        *("export-file", "get-user-env", "gid", "gpus", "gres", "help", "hold", "input"),
        *("job-name", "kill-on-invalid-dep", "mem", "mem-per-cpu", "mem-per-gpu", "no-requeue"),
        *("ntasks", "open-mode", "output", "parsable", "partition", "qos", "quiet", "requeue"),
        *("test-only", "time", "time-min", "uid", "usage", "verbose", "version", "wait", "wrap"),
    ]
)
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@-]{0,127}")
_LONG_OPTION: Final = re.compile(r"--([a-z][a-z0-9-]*)(=[^\0\n]*)?")


def _split(value: Any) -> Any:
    """Parse a list from a file, or comma-separated text from a variable or flag."""
    if isinstance(value, str):
        return tuple(shlex.split(value.replace(",", " ")))
    return value


def _split_words(value: Any) -> Any:
    return tuple(shlex.split(value)) if isinstance(value, str) else value


def _names(values: tuple[str, ...]) -> tuple[str, ...]:
    for value in values:
        _name(value)
    return values


def _name(value: str) -> str:
    if value and not _NAME.fullmatch(value):
        raise ValueError(f"{value[:60]!r} is not a name that Slurm accepts")
    return value


def _line(value: str) -> str:
    if not value.isprintable() or value.startswith("-"):
        raise ValueError("must be one line that does not begin with a dash")
    return value


def _extra(values: tuple[str, ...]) -> tuple[str, ...]:
    for value in values:
        match = _LONG_OPTION.fullmatch(value)
        if match is None:
            raise ValueError(f"{value[:60]!r} is no long option of sbatch such as --nice=10")
        # sbatch accepts any unambiguous prefix of an option.
        reserved = next((name for name in sorted(RESERVED) if name.startswith(match[1])), None)
        if reserved is not None:
            raise ValueError(f"--{match[1]} is set by the executor (as --{reserved})")
    return values


def _absolute(value: Path) -> Path:
    if not value.is_absolute():
        raise ValueError("must be an absolute path")
    return value


AbsolutePath = Annotated[Path, AfterValidator(_absolute)]
Name = Annotated[str, AfterValidator(_name)]
Names = Annotated[tuple[str, ...], BeforeValidator(_split), AfterValidator(_names)]
Line = Annotated[str, AfterValidator(_line)]


class SlurmOptions(SandboxOptions):
    """Options of the Slurm executor; unknown ones are refused, and times are in seconds.

    Attributes:
        partitions: Partitions that jobs are submitted to; Slurm uses the one that starts first.
            Empty: the cluster's default partition.
        gpu_partitions: Partitions of jobs with GPUs, if different.
        account: Account that Slurm charges.
        qos: Quality of service.
        constraint: Features that nodes must have.
        gpus: How GPUs are requested: `gpus` is --gpus of the whole job; `gres` is --gres on one
            node, for clusters whose select plugin lacks --gpus.
        gpu_type: Type of the GPUs in the cluster's gres.
        extra: Additional long options for sbatch, such as `--nice=100` or `--reservation=grid`.
        run_dir: Folder of runs, with the same path on every node; by default `runs` in the
            provider's state folder.
        bin_dir: Folder of Slurm's commands; those of PATH by default.
        conf: Slurm's configuration file, if not in the default place.
        limit_headroom: Seconds by which Slurm's time limit exceeds the paid time, so that a
            top-up can extend a running job even if the daemon may not raise its limit. None: 0
            for root and Slurm's own user, which may raise it, a day for others.
        query_interval: Minimum seconds between two polls of the queue.
        command_timeout: Seconds after which a command of Slurm counts as failed.
        settle: Seconds after a failed sbatch during which its job may still appear.
        missing: Seconds for which a job must be missing everywhere before it counts as lost.
        accounting: Source of ended jobs that left the queue: `sacct` is slurmdbd, `completion`
            the file of completed jobs, `auto` the one that the cluster has.
        user: Unix user of the jobs, if different from the daemon's: it submits with `sudo`, and
            must be in the primary group of that user.
        isolation: `sandbox` runs each job under bubblewrap, which the nodes must have; such a job
            starts its tasks with `srun`. With `none`, jobs can read the files that the daemon's
            user can read.

    The options of `SandboxOptions` apply to jobs in a sandbox.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    partitions: Names = ()
    gpu_partitions: Names = ()
    account: Name = ""
    qos: Name = ""
    constraint: Line = ""
    gpus: Literal["gpus", "gres"] = "gpus"
    gpu_type: Name = ""
    extra: Annotated[tuple[str, ...], BeforeValidator(_split_words), AfterValidator(_extra)] = ()
    run_dir: AbsolutePath | None = None
    bin_dir: AbsolutePath | None = None
    conf: AbsolutePath | None = None
    limit_headroom: int | None = Field(None, ge=0, le=30 * DAY)
    query_interval: float = Field(2.0, ge=0, le=600)
    command_timeout: float = Field(30.0, gt=0, le=600)
    settle: float = Field(60.0, ge=0, le=3_600)
    missing: float = Field(60.0, ge=0, le=DAY)
    accounting: Literal["auto", "sacct", "completion", "none"] = "auto"
    user: Name = ""
    isolation: Literal["sandbox", "none"] = "sandbox"

    def partitions_for(self, gpus: int) -> tuple[str, ...]:
        """Return the partitions of a job with this number of GPUs."""
        return self.gpu_partitions if gpus and self.gpu_partitions else self.partitions

    @property
    def all_partitions(self) -> tuple[str, ...]:
        """All partitions of jobs, without duplicates."""
        return tuple(dict.fromkeys((*self.partitions, *self.gpu_partitions)))


def parse_options(options: Mapping[str, Any]) -> SlurmOptions:
    """Validate the options of the settings; errors as `sandbox.parse_options`."""
    return sandbox.parse_options("Slurm", SlurmOptions, options)
