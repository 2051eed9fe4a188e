"""Expected starts of PENDING jobs, from a meta-scheduler that only reads."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Final

from starlette.concurrency import run_in_threadpool

from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.errors import GridError
from deepsquare_chain.metascheduler.dry_run import DryRunScheduler
from deepsquare_chain.metascheduler.forecast import Prospect, StartAccuracy, prospect_of
from deepsquare_chain.metascheduler.history import RunHistory
from deepsquare_chain.metascheduler.policy import Rules, Snapshot
from deepsquare_chain.observability import get_logger

_log = get_logger(__name__)
#: Seconds after which the grid is read again, and for which a page waits for that.
_KEPT_SECONDS: Final = 5.0
_WAIT_SECONDS: Final = 2.0


@dataclass(frozen=True, slots=True)
class _GridState:
    """What a forecast needs. `history` is a copy: the scheduler goes on with its own."""

    snapshot: Snapshot
    rules: Rules
    history: RunHistory
    version: tuple[int, int]
    starts: StartAccuracy | None


class Forecasts:
    """Forecasts by the rules of a meta-scheduler without a rules file.

    The first one reads all events of the deployment in the background. Pages do not wait for it
    for more than two seconds.
    """

    def __init__(self, contracts: Contracts) -> None:
        self._contracts = contracts
        self._dry_run: DryRunScheduler | None = None
        self._reading: asyncio.Task[None] | None = None
        self._read_at = float("-inf")
        self._state: _GridState | None = None

    async def of(self, job_id: int) -> Prospect | None:
        """Return the prospect of a job; None if it is not in the queue, or not known yet."""
        is_reading = self._reading is not None and not self._reading.done()
        if not is_reading and time.monotonic() - self._read_at > _KEPT_SECONDS:
            self._reading = asyncio.create_task(self._read())
        if self._reading is not None:
            await asyncio.wait([self._reading], timeout=_WAIT_SECONDS)
        state = self._state
        if state is None or all(entry.job.id != job_id for entry in state.snapshot.waiting):
            return None
        return await run_in_threadpool(
            prospect_of, state.snapshot, state.rules, state.history, job_id, starts=state.starts
        )

    async def _read(self) -> None:
        try:
            self._dry_run = self._dry_run or DryRunScheduler(self._contracts)
            service = await self._dry_run.look()
            await self._dry_run.judge_starts()
        except GridError as error:
            # The events read so far may be of blocks that were replaced: the next read starts anew.
            _log.debug("forecast failed", error=str(error))
            self._dry_run = self._state = None
            return
        finally:
            self._read_at = time.monotonic()
        if service.cluster is None:
            return
        history, starts = service.state.history(), service.state.past_starts.accuracy
        version = (history.version, history.payments)
        previous = self._state
        copy = (
            previous.history
            if previous is not None and previous.version == version
            else RunHistory.of_rows(history.rows())
        )
        self._state = _GridState(service.cluster.snapshot, service.rules, copy, version, starts)
