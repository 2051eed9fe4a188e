"""The main loop of every long-running service.

A service implements one coroutine, its cycle: read the state of chain and executor, and act on it.
Start, restart and catch-up are ordinary cycles. The loop handles the time between them, wake-ups,
signals, backoff after errors, and the ordered close.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import os
import random
import signal
import sqlite3
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from pydantic_core import from_json

from deepsquare_chain.errors import GridError
from deepsquare_chain.observability import get_logger, redact_text
from deepsquare_chain.observability.metrics import Health, Metrics

# -- handlers of SIGINT and SIGTERM, for services and for programs with an orderly end at Ctrl-C


@contextlib.contextmanager
def handle_signals(
    handler: Callable[[int], None], numbers: Iterable[int] = (signal.SIGINT, signal.SIGTERM)
) -> Iterator[None]:
    """Call a handler in the running loop for these signals; restores the previous handlers."""
    loop = asyncio.get_running_loop()
    previous_handlers = {}
    for number in numbers:
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


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[asyncio.Event]:
    """Provide an event that SIGINT, SIGTERM and SIGHUP set within the block.

    To cancel a task on the first signal as well, see `until_stopped`.
    """
    stop = asyncio.Event()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    with handle_signals(lambda _: stop.set(), numbers):
        yield stop


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


# -- the folder of a service, and the status file that its daemon writes there

_MAX_BYTES = 100_000


def service_folder(state_dir: Path, service: str, address: str, contract: str = "") -> Path:
    """Return the state folder of a service and wallet; several may share a state directory.

    If the folder belongs to another MetaScheduler than `contract`, the result has the contract in
    its name: services of an old and a new deployment run side by side.
    """
    folder = state_dir / f"{service}-{address[:10].lower()}"
    owner = _contract_of(folder / f"{service}.db") if contract else ""
    if owner in ("", contract.lower()):
        return folder
    return folder.with_name(f"{folder.name}-{contract[2:10].lower()}")


def _contract_of(database: Path) -> str:
    """Return the contract that a service's database belongs to; empty if there is none yet."""
    try:
        with contextlib.closing(
            sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True)
        ) as opened:
            row = opened.execute("SELECT value FROM identity WHERE key = 'contract'").fetchone()
    except sqlite3.Error:
        return ""  # missing, or no database, which the service reports
    return row[0] if row else ""


def running_services(state_dir: Path, service: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield folder and status of each running daemon of a service below a state folder."""
    for path in sorted(state_dir.glob(f"{service}-*/{service}.json")):
        status = read_status(path.parent, service)
        if status is not None:
            yield path.parent, status


def read_status(folder: Path, service: str) -> dict[str, Any] | None:
    """Return a daemon's last status; None if it does not run, or the file can't be read."""
    try:
        with (folder / f"{service}.json").open("rb") as file:
            status = from_json(file.read(_MAX_BYTES), allow_inf_nan=False)
        alive = status["state"] != "stopped" and _is_alive(int(status["pid"]))
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None
    return dict(status) if alive else None


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # a process of another user
        return True
    return pid > 0


# -- background tasks of a service, which may outlast the cycle that started them


class BackgroundTasks:
    """Tasks that may outlast a cycle; each returns the number of jobs that it changed."""

    def __init__(self) -> None:
        self._tasks: dict[asyncio.Task[int], frozenset[int]] = {}

    def __len__(self) -> int:
        return len(self._tasks)

    @property
    def jobs(self) -> frozenset[int]:
        """Jobs of running tasks, and of those that ended since the last `collect`."""
        return frozenset().union(*self._tasks.values())

    def begin(self, work: Coroutine[Any, Any, int], jobs: Iterable[int]) -> None:
        """Start a task for these jobs."""
        self._tasks[asyncio.create_task(work)] = frozenset(jobs)

    async def wait(self, timeout: float | None = None, *, first: bool = False) -> None:
        """Wait until all tasks have ended, or the first of them; `timeout` in seconds."""
        if self._tasks:
            condition = asyncio.FIRST_COMPLETED if first else asyncio.ALL_COMPLETED
            await asyncio.wait(self._tasks, timeout=timeout, return_when=condition)

    def collect(self) -> int:
        """Remove ended tasks; returns the number of jobs changed.

        Raises:
            Exception: An unexpected error of a task.
        """
        changed = 0
        for task in [running for running in self._tasks if running.done()]:
            del self._tasks[task]
            changed += task.result()
        return changed

    def cancel_all(self) -> None:
        """Cancel all running tasks."""
        for task in self._tasks:
            task.cancel()
        self._tasks.clear()


Cycle = Callable[[], Awaitable[bool | None]]
Close = Callable[[], Awaitable[object] | object]

_HUNG_AFTER: Final = 120.0  # seconds of one cycle after which the service counts as hung
_log = get_logger(__name__)


class Daemon:
    """Runs a cycle repeatedly until it is stopped.

    Args:
        name: Name of the service in logs, metrics and the status file.
        cycle: Reads the current state and acts on it; idempotent. Returns True when the next
            cycle should follow at once.
        interval: Seconds between the end of a cycle and the start of the next without a wake-up;
            a function is called after each cycle.
        max_backoff: Longest pause after failures, in seconds; the first is `min_backoff`, and each
            consecutive failure doubles it.
        timeout: Seconds after which a cycle counts as failed; None for no timeout.
        fatal: Errors that end the daemon instead of a retry; `run` raises them.
        grace: Seconds that a running cycle, and each close callback, may take after the stop.
        status_file: JSON file for other processes, replaced atomically after every cycle.
    """

    def __init__(
        self,
        name: str,
        cycle: Cycle,
        *,
        interval: float | Callable[[], float],
        stop: asyncio.Event | None = None,
        min_backoff: float = 0.5,
        max_backoff: float = 60.0,
        timeout: float | None = None,
        fatal: tuple[type[BaseException], ...] = (),
        grace: float = 10.0,
        status_file: Path | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self.name = name
        self.stop = stop or asyncio.Event()
        self.ready = asyncio.Event()
        self.cycles = 0
        self.failures = 0
        self.failures_in_row = 0
        self.last_error = ""
        self.state = "starting"
        self.metrics = metrics or Metrics(name)
        #: Returns the service's fields of the status; JSON values.
        self.details: Callable[[], Mapping[str, Any]] = dict
        #: Returns why the service is not ready although its cycles succeed; empty when it is.
        self.unready: Callable[[], str] = str
        self._cycle = cycle
        self._interval = interval
        self._backoff = (min_backoff, max_backoff)
        self._timeout = timeout
        self._fatal = fatal
        self._grace = grace
        self._status_file = status_file
        self._closers: list[tuple[str, Close]] = []
        self._wake = asyncio.Event()
        self._running: asyncio.Task[bool] | None = None
        self._cycle_began: float | None = None
        self._ended = self.metrics.counter("cycles", "Cycles by result.", end=("ok", "failed"))
        self._seconds = self.metrics.histogram("cycle_seconds", "Duration of cycles.")
        self._failures_gauge = self.metrics.gauge("failures_in_row", "Consecutive failed cycles.")
        self._last_success = self.metrics.gauge(
            "last_good_cycle_timestamp_seconds",
            "End of the last successful cycle, in seconds since the epoch.",
        )

    def wake(self) -> None:
        """Run the next cycle at once, on an external hint; after a failure, after the backoff."""
        self._wake.set()

    def on_close(self, name: str, callback: Close) -> None:
        """Register a callback for the end of the daemon; the last one added is called first."""
        self._closers.append((name, callback))

    def health(self) -> Health:
        """Return the current health, for `observability.health`."""
        started_at = self._cycle_began
        limit = max(_HUNG_AFTER, self._timeout or 0.0)
        is_live = self.state != "stopped" and (
            started_at is None or time.monotonic() - started_at < limit
        )
        return Health(live=is_live, ready=self._is_ready(), details=self.status())

    def status(self) -> dict[str, Any]:
        """Return the content of the status file."""
        return {
            "name": self.name,
            "pid": os.getpid(),
            "state": self.state,
            "ready": self._is_ready(),
            "unready": self.unready(),
            "cycles": self.cycles,
            "failures": self.failures,
            "failures_in_row": self.failures_in_row,
            "last_error": self.last_error,
            "updated_at": round(time.time(), 3),
            **self.details(),
        }

    def _is_ready(self) -> bool:
        return self.ready.is_set() and self.state == "running" and not self.unready()

    async def run(self) -> None:
        """Run until the stop, then close everything in order.

        Raises:
            BaseException: One of the `fatal` errors, once everything is closed.
        """
        _log.info("service started", service=self.name)
        with handle_signals(self._on_signal):
            try:
                while not self.stop.is_set():
                    self._wake.clear()
                    pause = await self._run_cycle()
                    self._write_status()
                    await self._pause(pause)
            finally:
                await self._close()

    async def _run_cycle(self) -> float:
        """Run one cycle; returns the seconds until the next."""
        started_at = self._cycle_began = time.monotonic()
        try:
            again = await self._guarded_cycle()
        except self._fatal as error:
            self._failed(error)
            _log.error("service failed", service=self.name, error=_describe(error))
            raise
        except Exception as error:  # noqa: BLE001 - retried by the next cycle
            return self._failed(error)
        finally:
            self._cycle_began = None
            self._seconds.observe(time.monotonic() - started_at)
        return 0.0 if again is None else self._succeeded(again)

    async def _guarded_cycle(self) -> bool | None:
        """Run a cycle; returns its result, or None when a stop cancelled it."""
        cycle = asyncio.ensure_future(self._call_cycle())
        stopping = asyncio.ensure_future(self.stop.wait())
        self._running = cycle
        try:
            await asyncio.wait({cycle, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not cycle.done():
                await asyncio.wait({cycle}, timeout=self._grace)
            if not cycle.done():
                _log.warning("cycle cancelled", service=self.name, grace=self._grace)
                await cancelled(cycle)
                return None
            if not cycle.cancelled():
                return cycle.result()
            if not self.stop.is_set():
                raise RuntimeError("the cycle cancelled itself")
            return None  # a second signal cancelled it
        finally:
            self._running = None
            await cancelled(stopping)
            # A cancelled daemon cancels its cycle too.
            await cancelled(cycle)

    async def _call_cycle(self) -> bool:
        async with asyncio.timeout(self._timeout):
            return bool(await self._cycle())

    def _succeeded(self, again: bool) -> float:
        if self.failures_in_row:
            _log.info("service recovered", service=self.name, failures=self.failures_in_row)
        self.cycles += 1
        self.failures_in_row = 0
        self.last_error = ""
        self.state = "running"
        self.ready.set()
        self.metrics.add(self._ended, "ok")
        self._failures_gauge.set(0)
        self._last_success.set_to_current_time()
        if again:
            return 0.0
        return self._interval() if callable(self._interval) else self._interval

    def _failed(self, error: BaseException) -> float:
        self.cycles += 1
        self.failures += 1
        self.failures_in_row += 1
        self.last_error = redact_text(_describe(error))
        self.state = "failing"
        self.metrics.add(self._ended, "failed")
        self._failures_gauge.set(self.failures_in_row)
        low, high = self._backoff
        pause: float = min(high, low * 2.0 ** min(self.failures_in_row - 1, 30))
        # Random jitter, so that services that fail together do not retry together.
        pause *= random.uniform(0.8, 1.0)  # noqa: S311
        fields: dict[str, Any] = {"error": type(error).__name__, "message": str(error)}
        if getattr(error, "hint", ""):
            fields["hint"] = error.hint  # type: ignore[attr-defined]
        if not isinstance(error, GridError | TimeoutError):
            fields["exc_info"] = error  # unexpected: log the traceback
        fields |= {"failures_in_row": self.failures_in_row, "retry_in": round(pause, 2)}
        _log.error("cycle failed", service=self.name, **fields)
        return pause

    async def _pause(self, seconds: float) -> None:
        events = [self.stop] if self.failures_in_row else [self.stop, self._wake]
        tasks = [asyncio.ensure_future(event.wait()) for event in events]
        try:
            await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                await cancelled(task)

    async def _close(self) -> None:
        self.state = "stopping"
        for name, callback in reversed(self._closers):
            try:
                async with asyncio.timeout(self._grace):
                    result = callback()
                    if inspect.isawaitable(result):
                        await result
            except Exception as error:  # noqa: BLE001 - the others must still be closed
                _log.error("close failed", service=self.name, part=name, error=_describe(error))
        self._closers.clear()
        self.state = "stopped"
        self._write_status()
        _log.info("service stopped", service=self.name, cycles=self.cycles)

    def _write_status(self) -> None:
        if self._status_file is None:
            return
        temporary = self._status_file.with_name(f".{self._status_file.name}.{os.getpid()}")
        try:
            temporary.write_text(json.dumps(self.status()))
            temporary.replace(self._status_file)
        except OSError as error:
            # A full disk must not end a service that can still work.
            _log.warning("status file not written", service=self.name, error=str(error))

    def _on_signal(self, number: int) -> None:
        name = signal.Signals(number).name
        if self.stop.is_set() and self._running is not None:
            _log.warning("cycle cancelled by a second signal", service=self.name, signal=name)
            self._running.cancel()
            return
        _log.info("stop requested", service=self.name, signal=name)
        self.stop.set()


def _describe(error: BaseException) -> str:
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


async def cancelled(task: asyncio.Future[Any]) -> None:
    """Cancel a task and wait until it has ended; its result is discarded."""
    if not task.done():
        task.cancel()
        await asyncio.wait({task})
    if not task.cancelled():
        task.exception()
