"""SIGINT and SIGTERM: for a service, and for a program that ends in order at Ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Final

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def heeding_signals(handler: Callable[[int], None]) -> Iterator[None]:
    """Give the signals' numbers to a callback of the running loop, and to who had them afterwards."""
    loop = asyncio.get_running_loop()
    before = {}
    for number in _SIGNALS:
        # Only the main thread takes signals; a service inside another program has its stop.
        with contextlib.suppress(RuntimeError, ValueError, NotImplementedError):
            previous = signal.getsignal(number)
            loop.add_signal_handler(number, handler, number)
            before[number] = previous
    try:
        yield
    finally:
        for number, previous in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, previous)


SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[asyncio.Event]:
    """An event that SIGINT, SIGTERM and SIGHUP set, for as long as the block lasts.

    While it starts, a task that is to be cut short is cancelled by the first of them as well.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in SIGNALS:
        loop.add_signal_handler(number, stop.set)
    try:
        yield stop
    finally:
        for number in SIGNALS:
            loop.remove_signal_handler(number)


async def until_stopped(stop: asyncio.Event, work: asyncio.Task[None]) -> bool:
    """Wait for the work, or cancel it at the stop; whether it was stopped.

    Raises:
        BaseException: What the work raised.
    """
    waiting = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({work, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            work.cancel()
            await asyncio.wait({work})
        if work.cancelled():
            return True
        work.result()
        return False
    finally:
        waiting.cancel()
