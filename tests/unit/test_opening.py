"""Opening a service whose endpoint is away at first."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Any

import pytest

from deepsquare_chain.chain.endpoint import TransientEndpointError, WrongEndpointError
from deepsquare_chain.daemon import opening
from deepsquare_chain.daemon.opening import open_patiently
from deepsquare_chain.errors import EndpointError, GridError, NotAuthorisedError


class Parts:
    """Opens a part, then fails as often as it is told."""

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
    monkeypatch.setattr(opening, "_PAUSES", (0.001, 0.002))


async def test_an_endpoint_that_is_away_is_waited_for(capsys: Any) -> None:
    parts = Parts(TransientEndpointError("The endpoint x can't be reached"), EndpointError("403"))
    async with AsyncExitStack() as stack:
        assert await open_patiently("provider", parts, stack) == "open"
        # What failed halfway is closed, what stands is not.
        assert (parts.opened, parts.closed) == (3, 2)
    assert parts.closed == 3
    said = capsys.readouterr().out
    assert said.count("service can't begin yet") == 2
    assert "The endpoint x can't be reached" in said


@pytest.mark.parametrize("error", [WrongEndpointError("chain 5"), NotAuthorisedError("no role")])
async def test_what_waiting_does_not_mend_ends_it(error: GridError) -> None:
    parts = Parts(error)
    async with AsyncExitStack() as stack:
        with pytest.raises(type(error)):
            await open_patiently("provider", parts, stack)
        assert (parts.opened, parts.closed) == (1, 1)


async def test_a_stop_ends_the_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "_PAUSES", (600.0, 600.0))
    stop = asyncio.Event()
    parts = Parts(EndpointError("down"))
    async with asyncio.timeout(20), AsyncExitStack() as stack:
        task = asyncio.create_task(open_patiently("provider", parts, stack, stop))
        while not parts.closed:  # noqa: ASYNC110 - nobody sets an event
            await asyncio.sleep(0)
        stop.set()
        assert await task is None
