"""SIGINT and SIGTERM for a service."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Final

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def heeding_signals(told: Callable[[int], None]) -> Iterator[None]:
    """Give the signals' numbers to a callback of the running loop, and to who had them afterwards."""
    loop = asyncio.get_running_loop()
    before = {}
    for number in _SIGNALS:
        # Only the main thread takes signals; a service inside another program has its stop.
        with contextlib.suppress(RuntimeError, ValueError, NotImplementedError):
            previous = signal.getsignal(number)
            loop.add_signal_handler(number, told, number)
            before[number] = previous
    try:
        yield
    finally:
        for number, previous in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, previous)
