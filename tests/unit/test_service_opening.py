"""Opening a service while its endpoint is unreachable."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import AsyncExitStack

import pytest
from structlog.testing import capture_logs

from deepsquare_chain.chain.rpc.endpoint import TransientEndpointError, WrongEndpointError
from deepsquare_chain.daemon import Daemon
from deepsquare_chain.daemon import service as daemon_service
from deepsquare_chain.daemon.service import open_with_retries, serve
from deepsquare_chain.errors import EndpointError, GridError, NotAuthorisedError


class Parts:
    """Opens a resource, then fails a given number of times."""

    def __init__(self, *errors: GridError) -> None:
        self.errors = list(errors)
        self.opened = self.closed = 0

    async def __call__(self, stack: AsyncExitStack) -> str:
        self.opened += 1
        stack.callback(self._close)
        if self.errors:
            raise self.errors.pop(0)
        return "open"

    def _close(self) -> None:
        self.closed += 1


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon_service, "_PAUSES", (0.001, 0.002))


async def test_an_unreachable_endpoint_is_retried() -> None:
    error = TransientEndpointError("The endpoint x can't be reached", hint="Is it up?")
    parts = Parts(error, EndpointError("403"), error, error)
    with capture_logs() as logs:
        async with AsyncExitStack() as stack:
            assert await open_with_retries("provider", parts, stack, asyncio.Event()) == "open"
            # Resources of the failed attempt are closed, others are not.
            assert (parts.opened, parts.closed) == (5, 4)
    assert parts.closed == 5
    # Each reason once, however often it is met.
    assert [(log["event"].split(" and ")[0], log.get("message")) for log in logs] == [
        ("endpoint unavailable", "The endpoint x can't be reached"),
        ("endpoint unavailable", "403"),
        ("endpoint answered", None),
    ]
    assert logs[0]["hint"] == "Is it up?"


@pytest.mark.parametrize("error", [WrongEndpointError("chain 5"), NotAuthorisedError("no role")])
async def test_permanent_errors_end_the_opening(error: GridError) -> None:
    parts = Parts(error)
    async with AsyncExitStack() as stack:
        with pytest.raises(type(error)):
            await open_with_retries("provider", parts, stack, asyncio.Event())
        assert (parts.opened, parts.closed) == (1, 1)


async def test_a_stop_ends_the_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon_service, "_PAUSES", (600.0, 600.0))
    stop = asyncio.Event()
    parts = Parts(EndpointError("down"))
    async with asyncio.timeout(20), AsyncExitStack() as stack:
        task = asyncio.create_task(open_with_retries("provider", parts, stack, stop))
        while not parts.closed:  # noqa: ASYNC110 - nobody sets an event
            await asyncio.sleep(0)
        stop.set()
        assert await task is None


async def test_a_stop_ends_a_try_that_gets_no_answer() -> None:
    stop, closed = asyncio.Event(), list[str]()

    async def hangs(parts: AsyncExitStack) -> str:
        parts.callback(closed.append, "part")
        stop.set()
        await asyncio.Event().wait()
        return "open"

    async with asyncio.timeout(20), AsyncExitStack() as stack:
        assert await open_with_retries("provider", hangs, stack, stop) is None
        assert closed == ["part"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_ends_the_waiting_as_it_ends_a_service(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(daemon_service, "_PAUSES", (600.0, 600.0))
    before = signal.getsignal(number)

    async def open_once(_: AsyncExitStack, __: asyncio.Event) -> Daemon:
        asyncio.get_running_loop().call_soon(os.kill, os.getpid(), number)
        raise EndpointError("down")

    async with asyncio.timeout(20):
        await serve("provider", open_once)
    assert signal.getsignal(number) is before


async def test_an_opened_service_runs_until_the_stop_and_is_closed() -> None:
    events = list[str]()

    async def open_once(parts: AsyncExitStack, stop: asyncio.Event) -> Daemon:
        parts.callback(events.append, "closed")

        async def cycle() -> bool:
            events.append("cycle")
            stop.set()
            return False

        return Daemon("provider", cycle, interval=600, stop=stop)

    async with asyncio.timeout(20):
        await serve("provider", open_once)
    assert events == ["cycle", "closed"]
