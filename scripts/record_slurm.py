#!/usr/bin/env python3
"""Record the output of one Slurm version's commands, for the tests of the parsers.

Starts a cluster with `scripts/local_slurm.sh`, submits jobs of many kinds, and writes the outputs of
the executor's commands to OUT. `--root` is a folder with a system that has another version, made by
`debootstrap --include=slurm-wlm,slurmdbd,mariadb-server,munge,procps,hostname SUITE FOLDER`, with /proc
and /dev mounted and this machine's name in /etc/hosts; this requires root.
"""

from __future__ import annotations

import argparse
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from deepsquare_chain.executors.base import RunSpec
from deepsquare_chain.executors.slurm import commands
from deepsquare_chain.executors.slurm.options import SlurmOptions
from deepsquare_chain.job import Resources

SCRIPT: Final = Path(__file__).with_name("local_slurm.sh")
KEY: Final = "31337-5fbdb231-"
COMMENT: Final = "deepsquare chain=31337 contract=0x5FbDB2315678afecb367f032d93F642f64180aa3 job=1"
NODE: Final = Resources(1, 4, 256, 0)
SMALL: Final = Resources(1, 1, 64, 0)


class Recorder:
    """Records the outputs of a cluster of one Slurm version to a folder."""

    def __init__(self, root: Path | None, output: Path, folder: str, *, accounting: bool) -> None:
        self._prefix = ["chroot", str(root)] if root else []
        self._root, self._out, self._folder = root or Path("/"), output, folder
        self._conf = f"{folder}/slurm.conf"
        self._accounting = accounting
        self._jobs: dict[str, str] = {}

    def inside(self, path: str) -> Path:
        """Convert a path of the other system to a path of this system."""
        return self._root / path.lstrip("/")

    def run(self, arguments: list[str]) -> str:
        """Run a command, and return its standard output and error."""
        environment = [
            "env",
            "TZ=UTC",
            "LC_ALL=C",
            "SLURM_TIME_FORMAT=%s",
            f"SLURM_CONF={self._conf}",
        ]
        process = subprocess.run(
            [*self._prefix, *environment, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=120,
            check=False,
        )
        return process.stdout

    def write(self, name: str, text: str) -> None:
        """Write an output, with the names of this machine replaced."""
        text = text.replace(self._folder, "/cluster")
        host = re.escape(socket.gethostname().split(".", maxsplit=1)[0])
        text = re.sub(rf"\b{host}\b(\.[\w.-]+)?", "controller", text)
        (self._out / f"{name}.txt").write_text(text)

    def submit(
        self,
        name: str,
        script: str,
        resources: Resources = SMALL,
        *,
        minutes: int = 3,
        **options: object,
    ) -> str:
        """Submit a job, and return its Slurm job ID."""
        file = self.inside(f"{self._folder}/{name}.sh")
        file.write_text(f"#!/bin/sh\n{script}\n")
        (self.inside(self._folder) / "work").mkdir(exist_ok=True)
        arguments = commands.submit(
            RunSpec(KEY + name, b"", resources, 60, {}),
            SlurmOptions.model_validate(options),
            folder=self._folder,
            wrapper=f"{self._folder}/{name}.sh",
            limit_minutes=minutes,
            comment=COMMENT,
        )
        number = self.run(arguments).split(";")[0].strip()
        if not number.isdigit():
            sys.exit(f"job {name} was not taken: {number}")
        self._jobs[name] = number
        return number

    def await_state(self, name: str, state: str) -> None:
        """Wait until a job has the given state."""
        for _ in range(300):
            if f"JobState={state} " in self.run(commands.show_job(self._jobs[name])):
                return
            time.sleep(0.2)
        sys.exit(
            f"job {name} did not become {state}: {self.run(commands.show_job(self._jobs[name]))}"
        )

    def record(self) -> None:
        """Submit jobs of all kinds, and write the outputs of the commands."""
        self.write("version", self.run(["sinfo", "--version"]))
        self.write("scontrol_config", self.run(commands.show_config()))
        self.write("sinfo_nodes", self.run(commands.nodes(())))
        self.write("sinfo_partitions", self.run(commands.partitions(())))
        lines = self.run(["sinfo", "--noheader", "--Node", "--partition=main", "--format=%N"])
        second = lines.split()[1]
        self.submit("1", "exit 3")
        self.submit("2", "true")
        self.submit("3", "exec sleep 600", extra=[f"--nodelist={second}"])
        self.submit("4", "exec sleep 600")
        for name, state in {
            "1": "FAILED",
            "2": "COMPLETED",
            "3": "RUNNING",
            "4": "RUNNING",
        }.items():
            self.await_state(name, state)
        self.run(["scontrol", "update", f"NodeName={second}", "State=DOWN", "Reason=recording"])
        self.await_state("3", "NODE_FAIL")
        self.run(commands.cancel(self._jobs["4"]))
        self.await_state("4", "CANCELLED")
        self.submit("5", "exec sleep 600", Resources(1, 2, 64, 1))
        self.await_state("5", "RUNNING")
        self.submit("6", "true", NODE)
        self.submit("7", "true", minutes=60, partitions=["short"])
        self.run(
            ["sbatch", "--array=0-2", "--job-name=RUNNING|x|a|b", "--hold", f"{self._folder}/2.sh"]
        )
        self.run(commands.set_limit(self._jobs["5"], 1440))
        time.sleep(6)  # until accounting has all jobs
        self.write("sinfo_busy", self.run(commands.nodes(())))
        self.write("squeue", self.run(commands.queue("root")))
        job_outputs = [self.run(commands.show_job(number)) for number in self._jobs.values()]
        self.write("scontrol_job", "".join(job_outputs))
        self.write("sacct_completion", self.run(commands.completions()))
        if self._accounting:
            names = [commands.job_name(KEY + name) for name in self._jobs]
            self.write("sacct", self.run(commands.accounting(names, int(time.time()) - 3600)))
        self.write("scontrol_error", self.run(commands.show_job("9999")))
        self.write("scontrol_update_error", self.run(commands.set_limit("9999", 5)))
        wrong = ("--partition=none", "--mem-per-cpu=9999999M", "--constraint=none", "--time=x")
        for number, flag in enumerate(wrong):
            refused = self.run(["sbatch", flag, f"{self._folder}/2.sh"])
            self.write(f"sbatch_error_{number}", refused)
        self.run([*self.cluster("stop"), "slurmctld"])
        self.write("unreachable", self.run(commands.queue("root")))
        self.run([*self.cluster("start"), "slurmctld"])

    def cluster(self, verb: str) -> list[str]:
        """Return the command line of the cluster script."""
        return ["bash", f"{self._folder}.sh", verb, self._folder]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "out", type=Path, help="folder to write, such as tests/unit/slurm_outputs/24.11"
    )
    parser.add_argument("--root", type=Path, help="folder of another system, for chroot")
    parser.add_argument(
        "--accounting", action="store_true", help="record sacct, which needs a database"
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    parent = (options.root or Path("/")) / "tmp"
    with tempfile.TemporaryDirectory(prefix="slurm-", dir=parent) as outside:
        Path(outside).chmod(0o711)  # munged requires that all users can reach its socket
        folder = f"/tmp/{Path(outside).name}/c"  # noqa: S108
        recorder = Recorder(options.root, options.out, folder, accounting=options.accounting)
        shutil.copy(SCRIPT, recorder.inside(f"{folder}.sh"))
        script_options = ["--jobcomp", *(["--accounting"] if options.accounting else [])]
        output = recorder.run([*recorder.cluster("up"), "--no-cgroup", *script_options])
        try:
            if "export SLURM_CONF" not in output:
                sys.exit(f"The cluster did not start:\n{output}")
            recorder.record()
        finally:
            recorder.run(recorder.cluster("down"))


if __name__ == "__main__":
    main()
