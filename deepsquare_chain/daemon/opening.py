"""Opens a service, with retries while its endpoint is down."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from typing import Final, TypeVar

from deepsquare_chain.chain.rpc.connection import WrongEndpointError
from deepsquare_chain.daemon.loop import Daemon, cancelled
from deepsquare_chain.daemon.signals import heeding_signals
from deepsquare_chain.errors import EndpointError
from deepsquare_chain.observability import get_logger

#: First and longest backoff between two attempts, in seconds.
_PAUSES: Final = (0.5, 10.0)
_log = get_logger(__name__)

T = TypeVar("T")


async def serve(
    name: str,
    open_once: Callable[[AsyncExitStack, asyncio.Event], Awaitable[Daemon]],
    stop: asyncio.Event | None = None,
) -> None:
    """Open a service, waiting for its endpoint, and run it until SIGINT, SIGTERM or `stop`.

    Args:
        name: Name of the service, for the log.
        open_once: Opens all parts on a stack that closes them, and returns the daemon, which
            stops when the given event is set.
        stop: Ends the wait and the daemon when set.

    Raises:
        GridError: As `open_patiently`, or a fatal error of the daemon.
    """
    stopping = stop or asyncio.Event()

    def on_signal(number: int) -> None:
        _log.info("service stops", service=name, signal=signal.Signals(number).name)
        stopping.set()

    async with AsyncExitStack() as stack:
        with heeding_signals(on_signal):
            daemon = await open_patiently(
                name, lambda parts: open_once(parts, stopping), stack, stopping
            )
        if daemon is not None:
            await daemon.run()


async def open_patiently(
    name: str,
    open_once: Callable[[AsyncExitStack], Awaitable[T]],
    stack: AsyncExitStack,
    stop: asyncio.Event,
) -> T | None:
    """Open a service's parts, with retries while the endpoint does not answer.

    Each reason to wait is logged once, and so is the end of the wait.

    Args:
        name: Name of the service, for the log.
        open_once: Opens all parts and registers their closing on the given stack; parts opened
            before a failure are closed.
        stack: Closes the parts in the end.
        stop: Ends the wait when set, and cancels the current attempt.

    Returns:
        The result of `open_once`; None after a stop.

    Raises:
        WrongEndpointError: The endpoint serves another chain, or lacks the contracts.
        GridError: Any other error of `open_once`.
    """
    pause, longest = _PAUSES
    started_at, reported = time.monotonic(), set[str]()
    while not stop.is_set():
        try:
            async with AsyncExitStack() as parts:
                result = await _unless_stopped(open_once(parts), stop)
                if result is None:
                    return None
                await stack.enter_async_context(parts.pop_all())
        except WrongEndpointError:
            raise
        except EndpointError as error:
            if error.message not in reported:
                reported.add(error.message)
                _log.warning(
                    "service waits for its endpoint and begins when it answers",
                    service=name,
                    message=error.message,
                    hint=error.hint,
                )
        else:
            if reported:
                waited = round(time.monotonic() - started_at, 1)
                _log.info("endpoint answers", service=name, waited=waited)
            return result
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), pause)
        pause = min(longest, 2 * pause)
    return None


async def _unless_stopped(work: Awaitable[T], stop: asyncio.Event) -> T | None:
    """Return the result of the work; on an earlier stop, cancel it and return None."""
    task, stopping = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({task, stopping}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        await cancelled(stopping)
        await cancelled(task)
