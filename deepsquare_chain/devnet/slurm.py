"""A Slurm cluster on this machine on which a demo runs its jobs.

It is the demo's own: grids of two demos have the same chain id and accounts, so that in one cluster
their jobs would have the same names.
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
#: Nodes of a cluster of its own, with 4 CPUs each: what the two providers offer together.
_NODES: Final = 3


@dataclass(frozen=True, slots=True)
class SlurmCluster:
    """A cluster that jobs can be submitted to.

    Attributes:
        conf: Its `slurm.conf`.
        sandboxed: Whether its nodes, which are this machine, can run jobs in a sandbox.
    """

    conf: Path
    sandboxed: bool

    @property
    def environment(self) -> dict[str, str]:
        """Settings of a provider that runs its jobs there."""
        isolation = "sandbox" if self.sandboxed else "none"
        settings = {
            "DEEPSQUARE_EXECUTOR": "slurm",
            "DEEPSQUARE_EXECUTOR_OPTIONS": (
                f"conf={self.conf} query_interval=0.5 isolation={isolation}"
            ),
        }
        return settings if self.sandboxed else settings | {"DEEPSQUARE_ALLOW_UNISOLATED": "1"}


@contextlib.asynccontextmanager
async def slurm_cluster(tell: Callable[[str], None]) -> AsyncIterator[SlurmCluster]:
    """A cluster of three nodes, which ends with the block.

    Args:
        tell: Called when it starts.

    Raises:
        NotFoundError: Slurm is not installed.
        GridError: It did not start.
    """
    script = _script()
    # A socket's path is limited, so that the demo's own folder may be too deep.
    folder = Path(tempfile.mkdtemp(prefix="deepsquare-slurm-"))
    try:
        allowances = await asyncio.to_thread(lambda: machine_isolation().allowances)
        sandboxed = "allow_unisolated" not in allowances
        tell(
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
    for place in (Path(__file__).parents[2], Path.cwd()):
        script = place / "scripts" / "local_slurm.sh"
        if script.is_file():
            return script
    raise NotFoundError(
        "scripts/local_slurm.sh is not there", hint="Run the demo from the project's folder."
    )


async def _run_script(script: Path, command: str, folder: Path, *options: str) -> None:
    # In a session of its own: Ctrl-C is for the demo, which then ends the cluster in order.
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
        _, said = await process.communicate()
    except asyncio.CancelledError:
        await process.wait()
        raise
    if process.returncode:
        words = said.decode(errors="replace").strip().splitlines()
        raise GridError(
            f"The local Slurm cluster: {words[-1] if words else 'the script failed'}",
            hint="Run the script by hand: scripts/local_slurm.sh up DIR, and look at the logs in DIR.",
        )
