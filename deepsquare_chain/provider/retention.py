"""Retention of the folders of ended runs, by age and total size."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final

from deepsquare_chain.daemon.loop import BackgroundTasks
from deepsquare_chain.errors import GridError
from deepsquare_chain.executors.base import Executor, Stored
from deepsquare_chain.observability import get_logger
from deepsquare_chain.provider.model import Phase, parse_key
from deepsquare_chain.provider.state import RunTable

#: Seconds between two checks.
_INTERVAL: Final = 600.0
#: Seconds for which a folder is always kept, so that its results can be fetched.
MIN_AGE: Final = 3_600.0
_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    """Maximum age of folders in seconds, and their maximum total size in bytes; 0 for no limit."""

    age: float
    size: int = 0


@dataclass(frozen=True, slots=True)
class KeptRun:
    """The folder of a run whose job is settled; `ended_at` in seconds since the epoch."""

    key: str
    ended_at: float
    size: int


def expired(kept: Collection[KeptRun], limits: Limits, now: float) -> list[KeptRun]:
    """Return the folders to remove, oldest first: those above the age or the total size.

    Nothing younger than `MIN_AGE` is removed.
    """
    to_remove = []
    remaining_size = sum(run.size for run in kept)
    for run in sorted(kept, key=lambda run: (run.ended_at, run.key)):
        age = now - run.ended_at
        too_much = limits.size and remaining_size > limits.size
        if age > MIN_AGE and (age > limits.age or too_much):
            to_remove.append(run)
            remaining_size -= run.size
    return to_remove


class Retention:
    """Removes the folders of closed runs in the background.

    Only runs of this grid whose job is settled or assigned anew are removed: runs of another
    chain or contract stay until the operator removes them.

    Args:
        executor: Executor that owns the folders.
        table: Run records of this provider.
        chain_id: Chain ID of the grid.
        contract: Address of the MetaScheduler.
        limits: Maximum age and size.
        show: Called with the number of kept folders and their bytes.
        interval: Minimum seconds between two checks.
    """

    def __init__(
        self,
        executor: Executor,
        table: RunTable,
        *,
        chain_id: int,
        contract: str,
        limits: Limits,
        show: Callable[[int, int], None],
        interval: float = _INTERVAL,
    ) -> None:
        self._executor = executor
        self._table = table
        self._grid = (chain_id, contract)
        self._limits = limits
        self._show = show
        self._interval = interval
        self._checked_at = float("-inf")
        # The folder of a settled run is final, so its size is measured once.
        self._measured: dict[str, Stored] = {}
        self._tasks = BackgroundTasks()

    def check(self) -> None:
        """Begin to remove expired folders, if a check is due."""
        self._tasks.collect()
        now = time.monotonic()
        if self._tasks or now - self._checked_at < self._interval:
            return
        self._checked_at = now
        self._tasks.begin(self.clean(), [])

    async def close(self) -> None:
        """Cancel the removal; a partly removed folder is removed at the next start."""
        self._tasks.cancel_all()

    async def clean(self) -> int:
        """Remove expired folders; returns the number of folders removed."""
        try:
            kept = await self._kept()
        except GridError as error:
            _log.warning("kept runs not measured", error=error.message)
            return 0
        removed: list[KeptRun] = []
        for run in expired(kept, self._limits, time.time()):
            try:
                await self._executor.forget(run.key)
            except GridError as error:
                _log.warning("run not removed", run=run.key, error=error.message, hint=error.hint)
                continue
            self._measured.pop(run.key, None)
            removed.append(run)
        if removed:
            freed = sum(run.size for run in removed)
            _log.info("ended runs removed", runs=len(removed), bytes=freed)
        remaining = set(kept) - set(removed)
        self._show(len(remaining), sum(run.size for run in remaining))
        return len(removed)

    async def _kept(self) -> list[KeptRun]:
        kept_runs = []
        for key in await self._executor.keys():
            parsed = parse_key(*self._grid, key)
            run = None if parsed is None else self._table.get(parsed[0])
            if parsed is None or run is None:
                continue
            if run.attempt == parsed[1] and run.phase is not Phase.CLOSED:
                continue
            stored = self._measured.get(key) or await self._executor.stored(key)
            if stored is None:
                continue
            self._measured[key] = stored
            ended = run.exit.ended_at if run.exit and run.attempt == parsed[1] else None
            kept_runs.append(KeptRun(key, ended or stored.changed_at, stored.size))
        return kept_runs
