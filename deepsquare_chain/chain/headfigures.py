"""How fresh the chain is that a service sees."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deepsquare_chain.observe.metrics import Metrics


class HeadFigures:
    """Age of the latest block that was seen, and how far this machine's clock is off.

    The age is worked out whenever somebody asks for it, so that it grows while no endpoint answers
    and while a cycle hangs; it is no number before the first block.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._time: int | None = None
        self._skew = metrics.gauge("clock_skew_seconds", "Wall clock minus time of the head.")
        age = metrics.gauge("head_age_seconds", "Seconds since the time of the head, now.")
        age.set_function(self._age)

    def saw(self, head_time: int) -> None:
        """Take in the chain time of the latest block, in seconds."""
        self._time = head_time
        self._skew.set(time.time() - head_time)

    def _age(self) -> float:
        return float("nan") if self._time is None else time.time() - self._time
