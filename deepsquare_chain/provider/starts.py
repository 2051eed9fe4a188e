"""Starts of runs, which may take longer than the cycle that began them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from typing import Final

from deepsquare_chain.provider.model import Submit, View

#: Seconds between two looks whether a cycle has something better to do.
_TICK: Final = 0.05


class Starts:
    """Begins a few runs at a time, so that nothing else waits behind a crowd of processes.

    A start that is slow goes on beside later cycles, which leave its job alone until then.

    Args:
        start: Begins one run; True when the executor has it.
        at_once: Most starts on their way.
    """

    def __init__(self, start: Callable[[View, Submit], Awaitable[bool]], *, at_once: int) -> None:
        self._start = start
        self._at_once = at_once
        self._going: dict[int, asyncio.Future[bool]] = {}

    @property
    def jobs(self) -> frozenset[int]:
        """Jobs whose start is on its way, or ended since `begin` looked last."""
        return frozenset(self._going)

    async def begin(self, wanted: Iterable[tuple[View, Submit]], enough: Callable[[], bool]) -> int:
        """Start what finds a place until it is enough; returns how many runs the executor got.

        What found no place is for the next cycle to plan again.
        """
        queue, done = deque(wanted), self._collect()
        while True:
            while queue and len(self._going) < self._at_once:
                view, action = queue.popleft()
                self._going[view.job.id] = asyncio.ensure_future(self._start(view, action))
            if not self._going or enough():
                return done
            await asyncio.wait(
                self._going.values(), timeout=_TICK, return_when=asyncio.FIRST_COMPLETED
            )
            done += self._collect()

    async def end(self) -> None:
        """Wait for what is on its way."""
        if self._going:
            await asyncio.wait(self._going.values())
        self._collect()

    def _collect(self) -> int:
        """Take those that have ended; an error that nobody foresaw is raised here."""
        ended = [job_id for job_id, task in self._going.items() if task.done()]
        return sum([self._going.pop(job_id).result() for job_id in ended])
