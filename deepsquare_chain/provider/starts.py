"""Starts of runs, which may take longer than the cycle that began them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Final

from deepsquare_chain.provider.beside import Beside
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

    def __init__(
        self, start: Callable[[View, Submit], Coroutine[Any, Any, bool]], *, at_once: int
    ) -> None:
        self._start = start
        self._at_once = at_once
        self._beside = Beside()

    @property
    def jobs(self) -> frozenset[int]:
        """Jobs whose start is on its way, or ended since `begin` looked last."""
        return self._beside.jobs

    async def begin(self, wanted: Iterable[tuple[View, Submit]], enough: Callable[[], bool]) -> int:
        """Start what finds a place until it is enough; returns how many runs the executor got.

        What found no place is for the next cycle to plan again.
        """
        queue, done = deque(wanted), self._beside.collect()
        while True:
            while queue and len(self._beside) < self._at_once:
                view, action = queue.popleft()
                self._beside.begin(self._start(view, action), [view.job.id])
            if not self._beside or enough():
                return done
            await self._beside.wait(_TICK, first=True)
            done += self._beside.collect()

    async def end(self) -> None:
        """Wait for what is on its way."""
        await self._beside.wait()
        self._beside.collect()
