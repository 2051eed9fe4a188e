"""The loop that every service shares."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from deepsquare_chain.daemon import Daemon
from deepsquare_chain.errors import EndpointError, GridError


class Service:
    """A service whose cycles have given results; it then stops the daemon."""

    def __init__(self, *steps: Any, then_stop: bool = True) -> None:
        self.steps = list(steps)
        self.then_stop = then_stop
        self.times: list[float] = []
        self.daemon: Daemon | None = None

    async def cycle(self) -> bool | None:
        self.times.append(time.monotonic())
        step = self.steps.pop(0) if self.steps else None
        if not self.steps and self.then_stop and self.daemon is not None:
            self.daemon.stop.set()
        if isinstance(step, BaseException):
            raise step
        if callable(step):
            result = step()
            if asyncio.iscoroutine(result):
                await result
        return step is True

    def pauses(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False)]


def make(service: Service, **options: Any) -> Daemon:
    options.setdefault("interval", 0.01)
    options.setdefault("min_backoff", 0.01)
    daemon = service.daemon = Daemon("test", service.cycle, **options)
    return daemon


async def run(daemon: Daemon) -> None:
    async with asyncio.timeout(10):
        await daemon.run()


async def test_cycles_run_until_the_stop_and_ready_follows_the_first() -> None:
    service = Service(None, None, None)
    daemon = make(service)
    assert not daemon.ready.is_set()
    assert daemon.health().live
    assert not daemon.health().ready
    await run(daemon)
    assert len(service.times) == daemon.cycles == 3
    assert daemon.ready.is_set()
    assert daemon.state == "stopped"
    assert not daemon.health().live


async def test_stop_that_is_set_before_the_start_runs_nothing() -> None:
    stop = asyncio.Event()
    stop.set()
    service = Service(None)
    await run(make(service, stop=stop))
    assert service.times == []


async def test_interval_is_kept_and_a_wake_cuts_it_short() -> None:
    service = Service(None, None, None)
    daemon = make(service, interval=2)
    service.steps[1] = daemon.wake  # during a cycle: the next one follows at once
    await run(daemon)
    first, second = service.pauses()
    assert first >= 1.9
    assert second < 1.5


async def test_cycle_that_wants_another_gets_it_at_once() -> None:
    service = Service(True, True, None, None)
    await run(make(service, interval=2))
    *at_once, last = service.pauses()
    assert len(at_once) == 2
    assert max(at_once) < 1.5
    assert last >= 1.9


async def test_endless_work_still_heeds_the_stop_and_lets_others_in() -> None:
    service = Service(*[True] * 1_000_000, then_stop=False)
    daemon = make(service, interval=60)
    asyncio.get_running_loop().call_later(0.1, daemon.stop.set)
    await run(daemon)
    assert 1 < daemon.cycles < 1_000_000


async def test_wake_starts_the_next_cycle_at_once() -> None:
    service = Service(None, None)
    daemon = make(service, interval=30)
    task = asyncio.create_task(run(daemon))
    await daemon.ready.wait()
    await asyncio.sleep(0.05)
    daemon.wake()
    await task
    assert len(service.times) == 2


async def test_failures_back_off_exponentially_and_are_forgotten_after_success(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    errors = [EndpointError(f"down {n}", hint="start it") for n in range(4)]
    service = Service(*errors, None, EndpointError("again"), None)
    daemon = make(service, min_backoff=0.05, max_backoff=0.15, interval=0.0)
    reports: list[tuple[str, bool]] = []
    service.steps[4] = lambda: reports.append((daemon.state, daemon.ready.is_set()))
    pauses: list[float] = []

    async def pause(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(daemon, "_pause", pause)
    with capture_logs() as logs:
        await run(daemon)
    for seconds, expected in zip(pauses, [0.05, 0.1, 0.15, 0.15, 0.0, 0.05, 0.0], strict=True):
        assert expected * 0.8 <= seconds <= expected
    assert reports == [("failing", False)]
    assert (daemon.failures, daemon.failures_in_row, daemon.last_error) == (5, 0, "")
    failed = [line for line in logs if line["event"] == "cycle failed"]
    assert [line["failures_in_row"] for line in failed] == [1, 2, 3, 4, 1]
    assert (failed[0]["error"], failed[0]["hint"]) == ("EndpointError", "start it")
    # An error with a remedy has no traceback.
    assert all("exc_info" not in line for line in failed)
    assert daemon.metrics.value("cycles_total", end="failed") == 5
    assert daemon.metrics.value("cycles_total", end="ok") == 2
    assert daemon.metrics.value("failures_in_row") == 0


async def test_wake_does_not_cut_the_pause_after_a_failure() -> None:
    service = Service(EndpointError("down"), None)
    daemon = make(service, min_backoff=0.3)
    asyncio.get_running_loop().call_later(0.05, daemon.wake)
    await run(daemon)
    assert service.pauses()[0] >= 0.23


async def test_stop_cuts_every_pause_short() -> None:
    for step in (None, EndpointError("down")):
        service = Service(step, then_stop=False)
        daemon = make(service, interval=60, min_backoff=60)
        asyncio.get_running_loop().call_later(0.05, daemon.stop.set)
        start = time.monotonic()
        await run(daemon)
        assert time.monotonic() - start < 30
        assert len(service.times) == 1


async def test_unexpected_errors_are_logged_with_a_traceback() -> None:
    service = Service(ZeroDivisionError("oops"), None)
    with capture_logs() as logs:
        await run(make(service))
    line = next(line for line in logs if line["event"] == "cycle failed")
    assert isinstance(line["exc_info"], ZeroDivisionError)


async def test_fatal_errors_end_the_daemon_after_its_close() -> None:
    class WrongChainError(GridError):
        pass

    service = Service(WrongChainError("chain 5 instead of 1"), None)
    daemon = make(service, fatal=(WrongChainError,))
    closed: list[str] = []
    daemon.on_close("part", lambda: closed.append("part"))
    with pytest.raises(WrongChainError):
        await run(daemon)
    assert closed == ["part"]
    assert len(service.times) == 1
    assert "chain 5" in daemon.last_error


async def test_slow_cycle_is_a_failure_and_is_cut_off() -> None:
    cancelled: list[str] = []

    async def slow() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            cancelled.append("cut")

    service = Service(slow, None)
    daemon = make(service, timeout=0.05)
    await run(daemon)
    assert cancelled == ["cut"]
    assert daemon.failures == 1


async def test_cycle_that_cancels_itself_is_a_failure() -> None:
    service = Service(asyncio.CancelledError(), None)
    daemon = make(service)
    await run(daemon)
    assert daemon.failures == 1
    assert daemon.cycles == 2


async def test_stop_lets_the_running_cycle_finish_within_the_grace() -> None:
    finished: list[str] = []

    async def work() -> None:
        await asyncio.sleep(0.2)
        finished.append("whole")

    service = Service(work, then_stop=False)
    daemon = make(service)
    asyncio.get_running_loop().call_later(0.05, daemon.stop.set)
    await run(daemon)
    assert finished == ["whole"]
    assert daemon.cycles == 1

    async def endless() -> None:
        await asyncio.sleep(60)

    service = Service(endless, then_stop=False)
    daemon = make(service, grace=0.1)
    asyncio.get_running_loop().call_later(0.05, daemon.stop.set)
    await run(daemon)
    assert daemon.cycles == 0
    assert not daemon.ready.is_set()


async def test_close_is_ordered_bounded_and_complete() -> None:
    closed: list[str] = []

    async def store() -> None:
        closed.append("store")

    async def hangs() -> None:
        closed.append("hangs")
        await asyncio.sleep(60)

    def broken() -> None:
        closed.append("broken")
        raise OSError("disk")

    daemon = make(Service(None), grace=0.1)
    parts: list[tuple[str, Callable[[], Awaitable[None] | None]]] = [
        ("store", store),
        ("broken", broken),
        ("hangs", hangs),
        ("server", lambda: closed.append("server")),
    ]
    for name, callback in parts:
        daemon.on_close(name, callback)
    with capture_logs() as logs:
        await run(daemon)
    assert closed == ["server", "hangs", "broken", "store"]
    failed = [line["part"] for line in logs if line["event"] == "close failed"]
    assert failed == ["hangs", "broken"]


async def test_a_cancelled_daemon_cancels_its_cycle_and_closes() -> None:
    events: list[str] = []

    async def endless() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            events.append("cycle ended")

    daemon = make(Service(endless, then_stop=False))
    daemon.on_close("part", lambda: events.append("closed"))
    task = asyncio.create_task(daemon.run())
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert events == ["cycle ended", "closed"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_signals_stop_it_and_a_second_one_cuts_the_cycle_off(number: int) -> None:
    async def endless() -> None:
        asyncio.get_running_loop().call_later(0.05, os.kill, os.getpid(), number)
        await asyncio.sleep(60)

    service = Service(None, endless, then_stop=False)
    daemon = make(service)
    closed: list[str] = []
    daemon.on_close("part", lambda: closed.append("part"))
    asyncio.get_running_loop().call_later(0.2, os.kill, os.getpid(), number)
    before = signal.getsignal(number)
    start = time.monotonic()
    await run(daemon)
    assert time.monotonic() - start < 30
    assert closed == ["part"]
    assert daemon.cycles == 1
    assert signal.getsignal(number) is before


async def test_status_file_is_whole_at_every_moment(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    statuses: list[dict[str, Any]] = []
    service = Service(None, EndpointError("http://u:hunter2@node"), None)
    daemon = make(service, status_file=path)
    service.steps[2] = lambda: statuses.append(json.loads(path.read_text()))
    await run(daemon)
    assert (statuses[0]["state"], statuses[0]["failures"], statuses[0]["ready"]) == (
        "failing",
        1,
        False,
    )
    assert "EndpointError" in statuses[0]["last_error"]
    assert "hunter2" not in path.read_text() + str(statuses)
    last = json.loads(path.read_text())
    assert (last["state"], last["cycles"], last["pid"]) == ("stopped", 3, os.getpid())
    assert os.listdir(tmp_path) == ["status.json"]


async def test_a_status_that_cannot_be_written_does_not_end_the_daemon(tmp_path: Path) -> None:
    service = Service(None, None)
    daemon = make(service, status_file=tmp_path / "missing" / "status.json")
    await run(daemon)
    assert daemon.cycles == 2


async def test_health_notices_a_cycle_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepsquare_chain.daemon.loop._HUNG_AFTER", 0.0)
    checks = []
    service = Service(None, None)
    daemon = make(service)
    service.steps[1] = lambda: checks.append((daemon.health().live, daemon.health().ready))
    await run(daemon)
    assert checks == [(False, True)]
    assert daemon.health().details["name"] == "test"


async def test_a_service_reports_why_it_is_not_ready() -> None:
    reason = ""
    states: list[tuple[bool, bool, str]] = []
    service = Service(None, None, None)

    def look() -> None:
        nonlocal reason
        health = daemon.health()
        states.append((health.ready, health.details["ready"], health.details["unready"]))
        reason = "the node lags"

    daemon = make(service)
    daemon.unready = lambda: reason
    service.steps[1] = service.steps[2] = look
    await run(daemon)
    assert states == [(True, True, ""), (False, False, "the node lags")]
