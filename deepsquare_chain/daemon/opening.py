"""Opening a service whose endpoint may be away: it waits, as a running one does."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from typing import Final, TypeVar

from deepsquare_chain.chain.rpc import WrongEndpointError
from deepsquare_chain.errors import EndpointError
from deepsquare_chain.observe import get_logger

#: Seconds before the next try, doubled with each.
_PAUSES: Final = (0.5, 10.0)
_log = get_logger(__name__)

T = TypeVar("T")


async def open_patiently(
    name: str,
    open_once: Callable[[AsyncExitStack], Awaitable[T]],
    stack: AsyncExitStack,
    stop: asyncio.Event | None = None,
) -> T | None:
    """Open a service's parts, again and again while the endpoint does not answer.

    Args:
        name: Of the service, for the log.
        open_once: Opens all parts and leaves their closing to the stack that it is given; what
            it opened before a failure is closed.
        stack: Closes the parts in the end.
        stop: Ends the waiting when set.

    Returns:
        What was opened; None after a stop.

    Raises:
        WrongEndpointError: It is the wrong chain, or the contracts are not there.
        GridError: Whatever else `open_once` raises.
    """
    stopping = stop or asyncio.Event()
    low, high = _PAUSES
    pause = low
    while not stopping.is_set():
        try:
            async with AsyncExitStack() as parts:
                found = await open_once(parts)
                await stack.enter_async_context(parts.pop_all())
                return found
        except WrongEndpointError:
            raise
        except EndpointError as error:
            _log.error(
                "service can't begin yet",
                service=name,
                message=error.message,
                hint=error.hint,
                retry_in=pause,
            )
        with suppress(TimeoutError):
            await asyncio.wait_for(stopping.wait(), pause)
        pause = min(high, 2 * pause)
    return None
