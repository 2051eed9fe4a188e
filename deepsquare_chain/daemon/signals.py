"""Handlers of SIGINT and SIGTERM, for services and for programs with an orderly end at Ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Final

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def heeding_signals(handler: Callable[[int], None]) -> Iterator[None]:
    """Call a handler in the running loop for SIGINT and SIGTERM; restores the previous handlers."""
    loop = asyncio.get_running_loop()
    previous_handlers = {}
    for number in _SIGNALS:
        # Only the main thread can handle signals; embedded services are stopped by an event.
        with contextlib.suppress(RuntimeError, ValueError, NotImplementedError):
            previous = signal.getsignal(number)
            loop.add_signal_handler(number, handler, number)
            previous_handlers[number] = previous
    try:
        yield
    finally:
        for number, previous in previous_handlers.items():
            loop.remove_signal_handler(number)
            signal.signal(number, previous)


SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[asyncio.Event]:
    """Provide an event that SIGINT, SIGTERM and SIGHUP set within the block.

    To cancel a task on the first signal as well, see `until_stopped`.
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
    """Wait for the work, or cancel it at the stop; returns whether it was stopped.

    Raises:
        BaseException: The error of the work.
    """
    stop_task = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({work, stop_task}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            work.cancel()
            await asyncio.wait({work})
        if work.cancelled():
            return True
        work.result()
        return False
    finally:
        stop_task.cancel()
