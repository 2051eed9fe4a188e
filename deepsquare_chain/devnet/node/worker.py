"""The worker thread of the embedded chain: seals blocks on time, and runs requests in between."""

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
_READS_PER_TRANSACTION = 4  # prevents starvation of calls and of transactions
_NEVER = float("inf")


class Worker(threading.Thread):
    """Runs a ``Core`` in a thread.

    ``block_time`` is in whole seconds: blocks, also empty ones, are sealed at full seconds of the
    wall clock. ``INSTANT`` seals when no transaction is left to execute; None seals on request only.
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
        """Run ``work`` on the thread; urgent work (new transactions) takes precedence over reads."""
        future: Future[T] = Future()
        with self._wake:
            if self._stopping or self.failure:
                future.set_exception(_stopped(self.failure))
                return future
            (self._urgent if urgent else self._reads).append((future, work))
            self._wake.notify()
        return future

    def stop(self, timeout: float = 10.0) -> None:
        """Stop the thread after its current work; wait at most ``timeout`` seconds."""
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
            # Requests must fail, or a stopped chain would look like a slow one.
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
        """Execute a transaction if one is ready; in instant mode, seal a block after the last one."""
        if self.core.step():
            return True
        if self._block_time == INSTANT and self.core.has_executed:
            self.core.seal()
            return True
        return False

    def _plan(self) -> None:
        """Plan the next block: its wall second, and its deadline on the monotonic clock."""
        if not self._block_time:
            return
        wall = time.time()
        # At most one block time ahead, even if the wall clock is changed.
        self.core.plan = int(wall) + self._block_time
        self._deadline = time.monotonic() + self.core.plan - wall

    def _wait(self) -> None:
        with self._wake:
            if self._urgent or self._reads or self._stopping:
                return
            remaining = self._deadline - time.monotonic()
            self._wake.wait(None if remaining == _NEVER else max(0.0, remaining))

    def _refuse_rest(self) -> None:
        with self._wake:
            self._stopping = True
            queued = [*self._urgent, *self._reads]
            self._urgent.clear()
            self._reads.clear()
        for future, _ in queued:
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
    reason = f": {type(failure).__name__}: {failure}" if failure else ""
    return RpcError(INTERNAL_ERROR, f"the embedded chain has stopped{reason}")
