"""A real Slurm cluster for tests, in a folder of its own; skipped or required where it is missing."""

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
    """Skip, or fail where real parts are required, on a machine without Slurm or other programs."""
    wanted = ("munged", "slurmctld", "slurmd", "sbatch", *more)
    missing = [name for name in wanted if shutil.which(name, path=_SYSTEM) is None]
    if not missing:
        return
    reason = f"{', '.join(missing)} not installed (Debian: slurm-wlm munge slurmdbd mariadb-server gcc, mpich libmpich-dev, openmpi-bin libopenmpi-dev)"
    if os.environ.get(REQUIRE_REAL) == "1":
        pytest.fail(reason)
    pytest.skip(reason)


class LocalSlurm:
    """A cluster as `scripts/local_slurm.sh` starts it.

    Args:
        options: Those of the script, such as `--nodes 3`.
    """

    def __init__(self, *options: str) -> None:
        require_slurm()
        # A short path: a socket's is limited, and every user must be able to reach it.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self.conf = self.folder / "slurm.conf"
        try:
            self.said = self.script("up", *options)
            daemons = (self.folder / "daemons").read_text().split()
            self.nodes = [name for name in daemons if name.startswith("n")]
        except BaseException:
            self.close()
            raise

    def script(self, command: str, *arguments: str) -> str:
        """Run the script for this cluster; what it says on stderr."""
        done = subprocess.run(
            [str(SCRIPT), command, str(self.folder), *arguments],
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stderr

    def run(self, *arguments: str) -> str:
        """What one of Slurm's commands prints."""
        env = {**os.environ, "SLURM_CONF": str(self.conf), "SLURM_TIME_FORMAT": "%s"}
        done = subprocess.run(
            arguments, env=env, capture_output=True, text=True, timeout=30, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    @property
    def has_cgroups(self) -> bool:
        """Whether it enforces memory limits by cgroups, and not by sampling."""
        return "task/cgroup" in self.conf.read_text()

    def executor(self, state_dir: Path, *, owner: str = "", **options: Any) -> SlurmExecutor:
        """An executor of this cluster that looks often, and at no accounting."""
        given: dict[str, Any] = {"conf": str(self.conf), "query_interval": 0.1, "missing": 3}
        given |= {"accounting": "none", "isolation": "none", **options}
        return SlurmExecutor(state_dir, parse_options(given), owner=owner)

    def close(self) -> None:
        """End every process of it, and remove its folder."""
        self.script("down")
        shutil.rmtree(self.folder, ignore_errors=True)
