"""Background tasks of a service, which may outlast the cycle that started them."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any


class BackgroundTasks:
    """Tasks that may outlast a cycle; each returns the number of jobs that it changed."""

    def __init__(self) -> None:
        self._going: dict[asyncio.Task[int], frozenset[int]] = {}

    def __len__(self) -> int:
        return len(self._going)

    @property
    def jobs(self) -> frozenset[int]:
        """Jobs of running tasks, and of those that ended since the last `collect`."""
        return frozenset().union(*self._going.values())

    def begin(self, work: Coroutine[Any, Any, int], jobs: Iterable[int]) -> None:
        """Start a task for these jobs."""
        self._going[asyncio.create_task(work)] = frozenset(jobs)

    async def wait(self, timeout: float | None = None, *, first: bool = False) -> None:
        """Wait until all tasks have ended, or the first of them; `timeout` in seconds."""
        if self._going:
            condition = asyncio.FIRST_COMPLETED if first else asyncio.ALL_COMPLETED
            await asyncio.wait(self._going, timeout=timeout, return_when=condition)

    def collect(self) -> int:
        """Remove ended tasks; returns the number of jobs changed.

        Raises:
            Exception: An unexpected error of a task.
        """
        changed = 0
        for task in [running for running in self._going if running.done()]:
            del self._going[task]
            changed += task.result()
        return changed

    def cut_off(self) -> None:
        """Cancel all running tasks."""
        for task in self._going:
            task.cancel()
        self._going.clear()
