"""The folder of a Slurm run: the files of the daemon and the wrapper in addition to those of every run.

    environment      variables of the script                 executor, before sbatch
    sandbox          bubblewrap's command, where jobs are    executor, before sbatch
                     isolated
    limits           KB of disk, processes, GPUs             executor, before sbatch
    srun             what a job in a sandbox finds as srun   executor, before sbatch
    steps/           pipes of that srun, while the job runs  wrapper
    intent.json      sbatch is about to be called            executor
    slurm.json       number of the Slurm job                 executor, once it is known
    start.json       the Slurm job that took the run         wrapper, once for ever
    end.json         code, reason and duration               wrapper
    slurm.log        what Slurm itself has to say            Slurm
    exit.json        how the run ended                       executor

The folder is on a file system that the nodes share. Methods raise OSError as the system gives it.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from deepsquare_chain.executors.base import Exit
from deepsquare_chain.executors.rundir import (
    RunFolder,
    dump,
    exit_record,
    read_record,
    replace,
    unique,
    write_new,
)
from deepsquare_chain.executors.slurm.verdict import EndRecord, Orders

#: The job of a run that was cancelled before sbatch knew it: no wrapper takes such a run.
WITHDRAWN: Final = "0"
_END_REASONS: Final = frozenset(
    {"exited", "signalled", "walltime", "cancelled", "terminated", "disk", "processes"}
)


class SlurmFolder(RunFolder):
    """Records of one run.

    Args:
        path: The folder.
        group: Number of the group of the job's user, who is not the daemon's; None where they are one.
    """

    def __init__(self, path: Path, group: int | None = None) -> None:
        super().__init__(path)
        self._group = group

    def share(self) -> None:
        """Let the job's user, by its group, read what the executor wrote, and write to the folder."""
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

    def exists(self) -> bool:
        """Whether the run has a folder; a place that can't be read is an error, never a no."""
        try:
            self.path.stat()
        except FileNotFoundError:
            self.path.parent.stat()
            return False
        return True

    def set_environment(self, env: Mapping[str, str]) -> None:
        """Write the variables of the script; no value holds a NUL."""
        data = b"".join(f"{name}={value}".encode() + b"\0" for name, value in env.items())
        replace(self.path / "environment", data)

    def set_sandbox(self, command: Sequence[str], limits: Sequence[int], srun: bytes) -> None:
        """Write bubblewrap's command, the limits of disk (KB), processes and GPUs, and the job's srun."""
        self.temporary.mkdir(mode=0o700, exist_ok=True)
        path = self.path / "srun"
        path.write_bytes(srun)
        path.chmod(0o500)
        replace(self.path / "sandbox", b"".join(os.fsencode(part) + b"\0" for part in command))
        replace(self.path / "limits", " ".join(map(str, limits)).encode() + b"\n")

    # -- submission

    def intent(self) -> float | None:
        """When sbatch was last about to be called, seconds since the epoch; None for never."""
        record = _optional(self.path / "intent.json")
        return None if record is None else _number(record, "at")

    def set_intent(self) -> None:
        """Record that sbatch is about to be called."""
        replace(self.path / "intent.json", dump({"at": time.time()}))

    def drop_intent(self) -> None:
        """Record that sbatch surely took nothing."""
        (self.path / "intent.json").unlink(missing_ok=True)

    def job_id(self) -> str | None:
        """Number of the Slurm job, None while it is not known."""
        record = _optional(self.path / "slurm.json")
        return None if record is None else str(record.get("job", ""))

    def set_job_id(self, job_id: str) -> None:
        """Record the number of the Slurm job."""
        replace(self.path / "slurm.json", dump({"job": job_id}))

    def call_off(self) -> None:
        """Order the end of the run, and keep every wrapper that has not begun from taking it."""
        self.set_control(cancel=True)
        fresh = self.path / f".withdrawn.{unique()}"
        try:
            write_new(fresh, dump({"job": WITHDRAWN, "at": time.time()}))
            os.link(fresh, self.path / "start.json")
        except FileExistsError:
            pass  # a wrapper has it, and reads the order
        finally:
            with contextlib.suppress(OSError):
                fresh.unlink()

    # -- what the wrapper wrote

    def start(self) -> tuple[str, float | None] | None:
        """The Slurm job that took the run, and when; no time for a run that was withdrawn."""
        record = _optional(self.path / "start.json")
        if record is None:
            return None
        job = str(record.get("job", ""))[:20]
        return job, None if job == WITHDRAWN else _number(record, "at")

    def end(self) -> EndRecord | None:
        """The end that the wrapper recorded; None as long as there is none that can be read."""
        try:
            record = read_record(self.path / "end.json")
            seconds = math.ceil(int(record["centiseconds"]) / 100)
            times = _number(record, "started_at"), _number(record, "ended_at")
            found = EndRecord(int(record["code"]), str(record["reason"]), seconds, *times)
        except FileNotFoundError:
            return None
        except (OSError, KeyError, TypeError, ValueError, OverflowError):
            return None  # spoilt by the job: Slurm's own word counts
        sound = 0 <= found.code <= 255 and found.reason in _END_REASONS and found.seconds >= 0
        return found if sound else None

    # -- what the daemon ordered, and what it found

    def orders(self) -> Orders:
        """What was ordered for the run."""
        control = self.control()
        return Orders(cancel=control.get("cancel") is True, overdue=control.get("overdue") is True)

    def walltime(self) -> int:
        """Seconds that the run may take, as last written."""
        return int(_number(self.control(), "walltime"))

    def verdict(self) -> Exit | None:
        """How the run ended, once that was found."""
        try:
            record = self.exit()
            if record is None:
                return None
            return Exit(
                code=int(record["code"]),
                reason=str(record["reason"]),
                seconds=int(record["seconds"]),
                started_at=float(record["started_at"]),
                ended_at=float(record["ended_at"]),
            )
        except (OSError, KeyError, TypeError, ValueError, OverflowError):
            return None

    def set_verdict(self, found: Exit) -> None:
        """Record how the run ended."""
        self.set_exit(
            exit_record(found.code, found.reason, found.seconds, found.started_at, found.ended_at)
        )


def _optional(path: Path) -> dict[str, Any] | None:
    try:
        return read_record(path)
    except FileNotFoundError:
        return None


def _number(record: Mapping[str, Any], name: str) -> float:
    try:
        found = float(record[name])
    except (KeyError, TypeError, ValueError, OverflowError):
        raise OSError(5, f"holds no number {name}") from None
    if not math.isfinite(found):
        raise OSError(5, f"holds no number {name}")
    return found
