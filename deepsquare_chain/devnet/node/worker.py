"""The one thread that owns the embedded chain: seals on time, and serves work in between."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from deepsquare_chain.devnet.node.core import Core
from deepsquare_chain.devnet.node.rpcerrors import INTERNAL_ERROR, RpcError

log = logging.getLogger(__name__)
T = TypeVar("T")
_Job = tuple[Future[Any], Callable[[], Any]]

INSTANT = 0
_READS_PER_TRANSACTION = 4  # so that neither calls nor transactions starve the other
_NEVER = float("inf")


class Worker(threading.Thread):
    """Runs a ``Core``.

    ``block_time`` is in whole seconds: blocks fall on the wall clock's full seconds, empty ones
    included. ``INSTANT`` seals as soon as nothing is left to execute; None only on request.
    """

    def __init__(self, core: Core, block_time: int | None) -> None:
        super().__init__(name="embedded-chain", daemon=True)
        self.core = core
        self.failure: BaseException | None = None
        self._block_time = block_time
        self._urgent: deque[_Job] = deque()
        self._reads: deque[_Job] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._reads_run = 0
        self._deadline = _NEVER

    def submit(self, work: Callable[[], T], *, urgent: bool = False) -> Future[T]:
        """Run ``work`` on the thread; urgent work (new transactions) goes before reads."""
        future: Future[T] = Future()
        with self._wake:
            if self._stopping or self.failure:
                future.set_exception(_stopped(self.failure))
                return future
            (self._urgent if urgent else self._reads).append((future, work))
            self._wake.notify()
        return future

    def stop(self, timeout: float = 10.0) -> None:
        """End the thread after what it is doing now; seconds to wait for that."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self.is_alive():
            self.join(timeout)

    def run(self) -> None:
        try:
            self._plan()
            while not self._stopping:
                self._turn()
        except BaseException as error:
            # A chain that can't make blocks must not look like a slow one.
            log.exception("the embedded chain stopped")
            self.failure = error
        finally:
            self._refuse_rest()

    def _turn(self) -> None:
        if time.monotonic() >= self._deadline:
            self.core.seal()
            self._plan()
        elif self._urgent:
            _settle(*self._urgent.popleft())
        elif self._reads and self._reads_run < _READS_PER_TRANSACTION:
            self._reads_run += 1
            _settle(*self._reads.popleft())
        elif self._step():
            self._reads_run = 0
        elif self._reads:
            _settle(*self._reads.popleft())
        else:
            self._wait()

    def _step(self) -> bool:
        """Execute a transaction if one is ready; in instant mode the last one brings a block."""
        if self.core.step():
            return True
        if self._block_time == INSTANT and self.core.has_executed:
            self.core.seal()
            return True
        return False

    def _plan(self) -> None:
        """Fix the wall second of the next block and, on the monotonic clock, when it is due."""
        if not self._block_time:
            return
        wall = time.time()
        # Never more than one block time ahead, wherever somebody sets the wall clock to.
        self.core.plan = int(wall) + self._block_time
        self._deadline = time.monotonic() + self.core.plan - wall

    def _wait(self) -> None:
        with self._wake:
            if self._urgent or self._reads or self._stopping:
                return
            left = self._deadline - time.monotonic()
            self._wake.wait(None if left == _NEVER else max(0.0, left))

    def _refuse_rest(self) -> None:
        with self._wake:
            self._stopping = True
            rest = [*self._urgent, *self._reads]
            self._urgent.clear()
            self._reads.clear()
        for future, _ in rest:
            if future.set_running_or_notify_cancel():
                future.set_exception(_stopped(self.failure))


def _settle(future: Future[Any], work: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(work())
    except RpcError as error:
        future.set_exception(error)
    except Exception as error:
        log.exception("a request to the embedded chain failed")
        future.set_exception(
            RpcError(INTERNAL_ERROR, f"internal error: {type(error).__name__}: {error}")
        )


def _stopped(failure: BaseException | None) -> RpcError:
    why = f": {type(failure).__name__}: {failure}" if failure else ""
    return RpcError(INTERNAL_ERROR, f"the embedded chain has stopped{why}")
