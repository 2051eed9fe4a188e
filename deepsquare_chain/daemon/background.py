"""What goes on beside the cycles that began it, and the jobs that it concerns."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any


class BackgroundTasks:
    """Tasks that may outlast a cycle; each says of how many jobs something was done."""

    def __init__(self) -> None:
        self._going: dict[asyncio.Task[int], frozenset[int]] = {}

    def __len__(self) -> int:
        return len(self._going)

    @property
    def jobs(self) -> frozenset[int]:
        """Jobs of all that is on its way, or ended since `collect` looked last."""
        return frozenset().union(*self._going.values())

    def begin(self, work: Coroutine[Any, Any, int], jobs: Iterable[int]) -> None:
        """Start something that concerns these jobs."""
        self._going[asyncio.create_task(work)] = frozenset(jobs)

    async def wait(self, timeout: float | None = None, *, first: bool = False) -> None:
        """Wait until all have ended, or the first of them; `timeout` in seconds."""
        if self._going:
            when = asyncio.FIRST_COMPLETED if first else asyncio.ALL_COMPLETED
            await asyncio.wait(self._going, timeout=timeout, return_when=when)

    def collect(self) -> int:
        """Take those that have ended; an error that nobody foresaw is raised here."""
        done = 0
        for task in [each for each in self._going if each.done()]:
            del self._going[task]
            done += task.result()
        return done

    def cut_off(self) -> None:
        """Cancel whatever is left."""
        for task in self._going:
            task.cancel()
        self._going.clear()
