"""A real Slurm cluster for tests; if Slurm is missing, tests are skipped, or fail if required."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

from deepsquare_chain.executors.slurm import SlurmExecutor
from deepsquare_chain.executors.slurm.options import parse_options
from tests.support.anvil import REQUIRE_REAL

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "local_slurm.sh"
_SYSTEM = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def require_slurm(*more: str) -> None:
    """Without Slurm or the other programs, skip the test, or fail if real parts are required."""
    programs = ("munged", "slurmctld", "slurmd", "sbatch", *more)
    missing = [name for name in programs if shutil.which(name, path=_SYSTEM) is None]
    if not missing:
        return
    reason = f"{', '.join(missing)} not installed (Debian: slurm-wlm munge slurmdbd mariadb-server gcc, mpich libmpich-dev, openmpi-bin libopenmpi-dev)"
    if os.environ.get(REQUIRE_REAL) == "1":
        pytest.fail(reason)
    pytest.skip(reason)


class LocalSlurm:
    """A cluster started by `scripts/local_slurm.sh`.

    Args:
        options: Options of the script, such as `--nodes 3`.
    """

    def __init__(self, *options: str) -> None:
        require_slurm()
        # A short path (the length of socket paths is limited) that every user can access.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self.conf = self.folder / "slurm.conf"
        try:
            self.script("up", *options)
            daemons = (self.folder / "daemons").read_text().split()
            self.nodes = [name for name in daemons if name.startswith("n")]
        except BaseException:
            self.close()
            raise

    def script(self, command: str, *arguments: str) -> str:
        """Run the script for this cluster, and return its standard error."""
        process = subprocess.run(
            [str(SCRIPT), command, str(self.folder), *arguments],
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        assert process.returncode == 0, process.stderr + process.stdout
        return process.stderr

    def run(self, *arguments: str) -> str:
        """Run a Slurm command, and return its output."""
        env = {**os.environ, "SLURM_CONF": str(self.conf), "SLURM_TIME_FORMAT": "%s"}
        process = subprocess.run(
            arguments, env=env, capture_output=True, text=True, timeout=30, check=False
        )
        assert process.returncode == 0, process.stderr
        return process.stdout

    @property
    def has_cgroups(self) -> bool:
        """Whether the cluster enforces memory limits by cgroups, instead of by sampling."""
        return "task/cgroup" in self.conf.read_text()

    def executor(self, state_dir: Path, *, owner: str = "", **options: Any) -> SlurmExecutor:
        """Return an executor for this cluster, with a short query interval and no accounting."""
        settings: dict[str, Any] = {"conf": str(self.conf), "query_interval": 0.1, "missing": 3}
        settings |= {"accounting": "none", "isolation": "none", **options}
        return SlurmExecutor(state_dir, parse_options(settings), owner=owner)

    def close(self) -> None:
        """Stop all daemons of the cluster, and remove its folder."""
        self.script("down")
        shutil.rmtree(self.folder, ignore_errors=True)
