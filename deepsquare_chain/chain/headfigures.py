"""How fresh the chain is that a service sees."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from deepsquare_chain.observe.metrics import Metrics


#: Age of the latest block, in seconds, from which a service is not ready: its node lags or stands.
STALE_HEAD: Final = 120


class HeadFigures:
    """Age of the latest block that was seen, and how far this machine's clock is off.

    The age is worked out whenever somebody asks for it, so that it grows while no endpoint answers
    and while a cycle hangs; it is no number before the first block.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._time: int | None = None
        self._behind = 0
        self._on_demand = False
        self._skew = metrics.gauge("clock_skew_seconds", "Wall clock minus time of the head.")
        age = metrics.gauge("head_age_seconds", "Seconds since the time of the head, now.")
        age.set_function(self._age)

    def saw(self, head_time: int, *, on_demand: bool = False) -> None:
        """Take in the latest block.

        Args:
            head_time: Its chain time, in seconds.
            on_demand: The chain makes blocks only when somebody sends, so that age means nothing.
        """
        self._time, self._on_demand, self._behind = head_time, on_demand, 0
        self._skew.set(time.time() - head_time)

    def fell_behind(self, blocks: int) -> None:
        """The endpoint showed a head that many blocks below one that was seen before."""
        self._behind = blocks

    def problem(self) -> str:
        """Why the chain that the service sees is not current, in words; empty when it is."""
        if self._behind:
            return f"the endpoint is {self._behind} blocks behind what was seen before"
        age = self._age()
        if self._on_demand or not age > STALE_HEAD:  # no number before the first block
            return ""
        return (
            f"the latest block is {age:.0f} s old by this machine's clock: the node lags or has "
            "stopped, or the clock is wrong"
        )

    def _age(self) -> float:
        return float("nan") if self._time is None else time.time() - self._time
