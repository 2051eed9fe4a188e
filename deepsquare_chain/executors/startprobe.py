"""Probes whether this machine can start scripts, by running one.

A machine on which nothing starts (no shell, no free process, a full disk) fails every job at once,
and would attract all jobs of the grid. The probe runs a trivial job through the supervisor; after a
failed probe the daemon claims nothing until a later one succeeds.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any, Final

from deepsquare_chain.executors.launch import ForkServer, Launched, remove_tree
from deepsquare_chain.executors.outputlog import read_kept
from deepsquare_chain.executors.rundir import RunFolder, read_bytes, unique
from deepsquare_chain.executors.sandbox import Isolation
from deepsquare_chain.observability import get_logger

PREFIX: Final = ".probe-"
#: Seconds for which a successful probe is valid, and first and longest backoff after a failed one.
_GOOD_FOR: Final = 600.0
_RETRY: Final = (15.0, 300.0)
#: Timeout of one probe in seconds, for a busy machine.
_PATIENCE: Final = 20.0
_PAUSE: Final = 0.02
_WORD: Final = b"started\n"
_SCRIPT: Final = b"echo started\n"
_log = get_logger(__name__)


class StartProbe:
    """Probes one machine periodically; thread-safe.

    Args:
        runs: Folder of the runs, in which the probe creates a temporary folder.
        fork_server: Starts the supervisor.
        isolation: Isolation of runs, which also applies to the probe.
    """

    def __init__(
        self, runs: Path, fork_server: ForkServer, isolation: Isolation | None = None
    ) -> None:
        self._runs = runs
        self._fork_server = fork_server
        self._isolation = isolation
        self._lock = threading.Lock()
        self._fault = ""
        self._due = 0.0
        self._retry = _RETRY[0]

    def invalidate(self) -> None:
        """Invalidate the last probe after a failed start, so that the next claim probes again."""
        if not self._fault:
            self._due = 0.0

    def fault(self) -> str:
        """Return why nothing can be started here; empty when it can. Blocks during a probe."""
        with self._lock:
            if time.monotonic() >= self._due:
                self._probe_now()
            return self._fault

    def _probe_now(self) -> None:
        previous, self._fault = self._fault, self._probe()
        if self._fault:
            self._due = time.monotonic() + self._retry
            _log.error("jobs can't be started", reason=self._fault, retry_in=self._retry)
            self._retry = min(self._retry * 2, _RETRY[1])
            return
        self._due = time.monotonic() + _GOOD_FOR
        self._retry = _RETRY[0]
        if previous:
            _log.info("jobs can be started again")

    def _probe(self) -> str:
        folder = RunFolder(self._runs / f"{PREFIX}{unique()}")
        record: dict[str, Any] = {"key": "probe", "env": {}, "walltime": 30}
        record |= {"cpus": 1, "memory": 512, "gpus": 0}
        if self._isolation is not None:
            record["isolation"] = self._isolation.record(folder.path)
        try:
            folder.fill(record, _SCRIPT, 30)
            return _outcome(folder, self._fork_server.start(folder, crashes=False))
        except OSError as error:
            return f"a test script could not be started: {error.strerror or error}"
        finally:
            remove_tree(folder.path)


def _outcome(folder: RunFolder, supervisor: Launched) -> str:
    deadline = time.monotonic() + _PATIENCE
    while not supervisor.ended:
        if time.monotonic() > deadline:
            supervisor.kill()
            return f"a test script did not end in {_PATIENCE:.0f} seconds"
        time.sleep(_PAUSE)
    supervisor.release()
    ended, printed = folder.exit(), read_kept(folder.output, 0, 200)
    if ended is None:
        log = read_bytes(folder.log, 0, 65536).decode(errors="replace").strip()
        reason = log.splitlines()[-1][:200] if log else "it did not leave a record"
        return f"the supervisor of a test script failed: {reason}"
    if ended["code"] == 0 and printed == _WORD:
        return ""
    reason = " ".join(printed.decode(errors="replace").split())[:200]
    return f"a test script ended with code {ended['code']}: {reason or 'it has no output'}"
