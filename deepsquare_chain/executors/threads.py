"""Runs blocking work of executors in threads; not in `base`, which pure modules import."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from deepsquare_chain.executors.base import ExecutorUnavailableError

T = TypeVar("T")


async def in_thread(work: Callable[..., T], *arguments: object) -> T:
    """Run blocking work in a thread and return its result.

    Raises:
        ExecutorUnavailableError: The machine can't start another thread.
    """
    try:
        return await asyncio.to_thread(work, *arguments)
    except RuntimeError as error:
        # Python has no specific exception for this.
        if "can't start new thread" not in str(error):
            raise
        raise ExecutorUnavailableError(
            "No thread can be started on this machine",
            hint="There are too many processes, or a limit on them: see `ulimit -u`.",
        ) from None
