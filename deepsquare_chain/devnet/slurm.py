"""A Slurm cluster on this machine for the jobs of a demo.

Each demo has its own cluster: the grids of two demos have the same chain ID and accounts, so that
their jobs would have the same names in a shared cluster.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from deepsquare_chain.errors import GridError, NotFoundError
from deepsquare_chain.executors.isolation import machine_isolation

_SYSTEM_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_PROGRAMS: Final = ("munged", "slurmctld", "slurmd", "sbatch")
#: Nodes of the cluster, with 4 CPUs each: as many CPUs as both providers offer together.
_NODES: Final = 3


@dataclass(frozen=True, slots=True)
class SlurmCluster:
    """A cluster that jobs can be submitted to.

    Attributes:
        conf: Path of its `slurm.conf`.
        sandboxed: Whether its nodes (this machine) can run jobs in a sandbox.
    """

    conf: Path
    sandboxed: bool

    @property
    def environment(self) -> dict[str, str]:
        """Settings of a provider that runs its jobs on this cluster."""
        isolation = "sandbox" if self.sandboxed else "none"
        settings = {
            "DEEPSQUARE_EXECUTOR": "slurm",
            "DEEPSQUARE_EXECUTOR_OPTIONS": (
                f"conf={self.conf} query_interval=0.5 isolation={isolation}"
            ),
        }
        return settings if self.sandboxed else settings | {"DEEPSQUARE_ALLOW_UNISOLATED": "1"}


@contextlib.asynccontextmanager
async def slurm_cluster(report: Callable[[str], None]) -> AsyncIterator[SlurmCluster]:
    """Run a cluster of three nodes within an `async with` block.

    Args:
        report: Called with a message when the cluster starts.

    Raises:
        NotFoundError: Slurm is not installed.
        GridError: It did not start.
    """
    script = _script()
    # The length of a socket path is limited, so that the demo's folder may be too deep.
    folder = Path(tempfile.mkdtemp(prefix="deepsquare-slurm-"))
    try:
        allowances = await asyncio.to_thread(lambda: machine_isolation().allowances)
        sandboxed = "allow_unisolated" not in allowances
        report(
            f"starting a Slurm cluster of {_NODES} nodes on this machine; its jobs are "
            f"{'isolated by bubblewrap' if sandboxed else 'not isolated'}"
        )
        await _run_script(script, "up", folder, "--nodes", str(_NODES), "--gpus", "0")
        yield SlurmCluster(folder / "slurm.conf", sandboxed)
    finally:
        await _run_script(script, "down", folder)
        shutil.rmtree(folder, ignore_errors=True)


def _script() -> Path:
    missing = [name for name in _PROGRAMS if shutil.which(name, path=_SYSTEM_PATH) is None]
    if missing:
        raise NotFoundError(
            f"Slurm is not installed: {', '.join(missing)} is missing",
            hint="Debian, Ubuntu: apt-get install slurm-wlm munge.",
        )
    for folder in (Path(__file__).parents[2], Path.cwd()):
        script = folder / "scripts" / "local_slurm.sh"
        if script.is_file():
            return script
    raise NotFoundError(
        "scripts/local_slurm.sh was not found", hint="Run the demo from the project's folder."
    )


async def _run_script(script: Path, command: str, folder: Path, *options: str) -> None:
    # A separate session: Ctrl-C reaches only the demo, which then stops the cluster gracefully.
    process = await asyncio.create_subprocess_exec(
        str(script),
        command,
        str(folder),
        *options,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        _, errors = await process.communicate()
    except asyncio.CancelledError:
        await process.wait()
        raise
    if process.returncode:
        lines = errors.decode(errors="replace").strip().splitlines()
        raise GridError(
            f"The local Slurm cluster: {lines[-1] if lines else 'the script failed'}",
            hint="Run the script by hand: scripts/local_slurm.sh up DIR, and see the logs in DIR.",
        )
