"""Makes the folder of a run and starts its supervisor."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from deepsquare_chain.executors import leftovers, procfs
from deepsquare_chain.executors.base import RunSpec
from deepsquare_chain.executors.gpus import device_environment
from deepsquare_chain.executors.rundir import RunFolder, unique
from deepsquare_chain.faults import VARIABLE, crash_point

#: Jobs stand a little behind their daemon: a crowd of them must not keep claims and reports waiting.
_NICE: Final = 5
_SOURCE: Final = str(Path(__file__).resolve().parents[2])


def make_run(runs: Path, spec: RunSpec, devices: Sequence[str] = ()) -> RunFolder:
    """Make the folder of a run below `runs`, whole or not at all; one that is there stays.

    Args:
        runs: Folder of all runs.
        spec: What to run.
        devices: Names of the GPUs that are its own.

    Raises:
        OSError: It could not be made.
    """
    folder = RunFolder(runs / spec.key)
    fresh = RunFolder(runs / f".new-{unique()}")
    wanted = spec.resources
    record = {
        "key": spec.key,
        "env": dict(spec.env) | device_environment(devices),
        "walltime": spec.walltime,
        "cpus": wanted.cpus,
        "memory": wanted.memory,
        "gpus": wanted.gpus,
        "devices": list(devices),
    }
    try:
        fresh.fill(record, spec.script, spec.walltime)
        crash_point("executor.filled")
        fresh.path.rename(folder.path)
        crash_point("executor.made")
    except OSError:
        # Another submit of the same key may have come first: its folder is the run.
        if not folder.path.is_dir():
            raise
    finally:
        remove_tree(fresh.path)
    return folder


class Launched:
    """A supervisor that was started here; it says when it has taken the run."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._took = False
        if process.stdout is not None:
            os.set_blocking(process.stdout.fileno(), False)

    @property
    def voice(self) -> int | None:
        """Descriptor that can be read when it has said something or is gone; None from then on."""
        said = self._process.stdout
        return None if said is None or said.closed else said.fileno()

    @property
    def ended(self) -> bool:
        """Whether it is gone; what it said before can still be heard."""
        return self._process.poll() is not None

    def took(self) -> bool:
        """Whether it took the run, by its own word: the run may have removed its folder since."""
        said = self._process.stdout
        if not self._took and said is not None and not said.closed:
            word = said.read(1)  # None as long as it says nothing
            if word is not None:
                said.close()
            self._took = bool(word)
        return self._took

    def kill(self) -> None:
        """End the supervisor and the processes that it started in its own group."""
        procfs.signal_trees([*procfs.descendants(self._process.pid), self._process.pid], 9)
        self._process.wait()
        self.release()

    def release(self) -> None:
        """Listen no longer: it is known to have the run."""
        self._took = True
        if self._process.stdout is not None:
            self._process.stdout.close()


def start_supervisor(folder: RunFolder, *, crashes: bool = True) -> Launched:
    """Start a supervisor, which takes the run or ends at once.

    Args:
        folder: Of the run.
        crashes: Whether it heeds the crash points that a test asks for.

    Raises:
        OSError: No process could be started.
    """
    env = {"PYTHONPATH": _SOURCE, "PYTHONDONTWRITEBYTECODE": "1"}
    # Some Pythons need the first to start at all; the second is for tests.
    names = ("LD_LIBRARY_PATH", VARIABLE) if crashes else ("LD_LIBRARY_PATH",)
    env |= {name: os.environ[name] for name in names if name in os.environ}
    # Without site packages and working folder: quick to start, and nobody else's modules.
    command = [sys.executable, "-S", "-P", "-m", leftovers.SUPERVISOR_MODULE, str(folder.path)]
    with folder.log.open("ab") as log:
        process = subprocess.Popen(
            command,
            bufsize=0,
            cwd="/",
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
        )
    with contextlib.suppress(OSError):  # it may be gone already
        os.setpriority(os.PRIO_PROCESS, process.pid, min(19, os.nice(0) + _NICE))
    return Launched(process)


def remove_tree(path: Path) -> None:
    """Remove a folder and everything in it, as far as that is possible."""
    shutil.rmtree(path, ignore_errors=True)
    if path.exists():
        # A job may have closed its folders even to their owner.
        for place, folders, _ in os.walk(path):
            for name in folders:
                with contextlib.suppress(OSError, NotImplementedError):
                    _open_up(Path(place, name))
        shutil.rmtree(path, ignore_errors=True)


def _open_up(path: Path) -> None:
    if not path.is_symlink():
        path.chmod(0o700)
