"""The live view in a terminal of 80x24, without a grid."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from textual.pilot import Pilot
from textual.widgets import DataTable, Input, RichLog, Static

from deepsquare_chain.cli.top_screen import Actions, AskScreen, LogScreen, TopApp
from deepsquare_chain.client.offers import GridSnapshot, JobLine, ProviderLine
from deepsquare_chain.credits import CREDIT
from deepsquare_chain.errors import EndpointError, RevertedError
from deepsquare_chain.job import (
    Hardware,
    Job,
    JobFlags,
    Offer,
    Prices,
    Provider,
    ProviderStatus,
    Resources,
)
from deepsquare_chain.job import JobStatus as S

SIZE = (80, 24)
PROVIDER = Provider(
    *(1, "0x" + "22" * 20, ProviderStatus.ACTIVE, 10**10, 1, 0),
    *(Hardware(1, 8, 4_096, 0), Offer(8, 4_096, 0), Prices(CREDIT // 3_600, 0, 0)),
)


def line(number: int, status: S, name: str = "train", elapsed: int = 65) -> JobLine:
    resources = Resources(tasks=2, cpus_per_task=1, mem_per_cpu=512, gpus=0)
    job = Job(
        *(number, "0x" + "11" * 20, status, 1_000, 1 if status is S.RUNNING else 0),
        *(resources, 0, JobFlags.NONE, 5 * CREDIT, 0, 600, 500, b"", 0),
    )
    return JobLine(job, name, elapsed, 535 if status is S.RUNNING else None)


GRID = GridSnapshot(
    block=123,
    time=1_065,
    balance=995 * CREDIT,
    jobs=(line(7, S.RUNNING), line(9, S.PENDING, "[red]not markup"), line(3, S.FINISHED)),
    queue=(line(8, S.PENDING, "somebody's"), line(9, S.PENDING)),
    providers=(ProviderLine(PROVIDER, 1, Offer(2, 1_024, 0)),),
)


class FakeGrid:
    """A grid that records the actions of the screen."""

    def __init__(self) -> None:
        self.grid: GridSnapshot | Exception = GRID
        self.did: list[Any] = []

    async def read(self) -> GridSnapshot:
        if isinstance(self.grid, Exception):
            raise self.grid
        return self.grid

    async def logs(self, job_id: int) -> AsyncIterator[bytes]:
        for part in (b"first li", b"ne \xc3", b"\xa9\nsec\x1b[2Jond"):
            yield part
        self.did.append(("read", job_id))

    async def cancel(self, job_id: int) -> None:
        self.did.append(("cancel", job_id))
        if job_id == 9:
            raise RevertedError("It has ended", hint="Look again.")

    async def top_up(self, job_id: int, amount: int) -> None:
        self.did.append(("top up", job_id, amount))

    def app(self, *, wallet: bool = True) -> TopApp:
        sends = (self.cancel, self.top_up) if wallet else (None, None)
        return TopApp(self.read, Actions(self.logs, *sends), interval=60, chain_id=1337)


def rows(app: TopApp, name: str) -> list[list[str]]:
    table = app.query_one(f"#{name}", DataTable)
    return [[str(cell) for cell in table.get_row_at(number)] for number in range(table.row_count)]


def status(app: TopApp) -> str:
    return str(app.query_one("#status", Static).render())


def screen_text(app: TopApp) -> list[str]:
    return [
        "".join(part.text for part in strip) for strip in app.screen._compositor.render_strips()
    ]


async def wait_until(pilot: Pilot[None], condition: Callable[[], bool]) -> None:
    """Wait until the screen shows something: on a busy machine `press` returns before that."""
    async with asyncio.timeout(30):
        while not condition():
            await pilot.pause(0.01)


async def test_everything_fits_in_80_columns() -> None:
    grid = FakeGrid()
    app = grid.app()
    async with app.run_test(size=SIZE) as pilot:
        await wait_until(pilot, lambda: len(rows(app, "providers")) == 1)
        await pilot.pause()
        assert status(app).split("  ") == [
            "chain 1337", "block 123", "995 credits", "1 running", "2 in the queue"
        ]  # fmt: skip
        assert rows(app, "jobs") == [
            ["7", "train", "RUNNING", "1", "00:01:05", "00:08:55", "5", "2"],
            ["9", "[red]not markup", "PENDING", "-", "00:01:05", "-", "5", "2"],
            ["3", "train", "FINISHED", "-", "-", "-", "0", "2"],
        ]
        assert [row[:3] for row in rows(app, "queue")] == [
            ["8", "somebody's", "PENDING"], ["9", "train", "PENDING"]
        ]  # fmt: skip
        assert rows(app, "providers") == [["1", "ACTIVE", "1", "2/8", "1024/4096", "0/0", "1"]]
        text = screen_text(app)
        assert len(text) == 24
        assert max(map(len, text)) == 80
        for name in ("jobs", "queue", "providers"):
            table = app.query_one(f"#{name}", DataTable)
            assert table.size.height >= 3, "its head and two rows are seen"
            assert table.virtual_size.width <= 80, "no column is cut off"
        for message in ("[red]not markup", "l Logs", "c Cancel", "t Top up", "q Quit"):
            assert any(message in row for row in text), (message, text)


async def test_a_slow_endpoint_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    grid, answered, now = FakeGrid(), asyncio.Event(), [100.0]
    app = grid.app()
    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr("deepsquare_chain.cli.top_screen.time", clock)

    async def slowly() -> GridSnapshot:
        await answered.wait()
        return GRID

    monkeypatch.setattr(app, "_read", slowly)
    async with app.run_test(size=SIZE) as pilot:
        await wait_until(pilot, lambda: any(worker.is_running for worker in app.workers))
        assert status(app) == "reading the chain ..."
        now[0] += 6
        await pilot.press("r")
        late = "no response from the endpoint for 6 s; the tables may be old"
        await wait_until(pilot, lambda: status(app) == late)
        answered.set()
        await wait_until(pilot, lambda: status(app).startswith("chain 1337"))


async def test_the_cursor_stays_at_its_job() -> None:
    grid = FakeGrid()
    app = grid.app()
    async with app.run_test(size=SIZE) as pilot:
        await wait_until(pilot, lambda: len(rows(app, "jobs")) == 3)
        await pilot.press("down")
        await wait_until(pilot, lambda: app._job() == 9)
        grid.grid = replace(GRID, jobs=(line(10, S.RUNNING), *GRID.jobs))
        await pilot.press("r")
        await wait_until(pilot, lambda: len(rows(app, "jobs")) == 4)
        assert app._job() == 9
        grid.grid = EndpointError("The endpoint does not answer")
        await pilot.press("r")
        await wait_until(pilot, lambda: status(app) == "The endpoint does not answer; retrying")
        assert len(rows(app, "jobs")) == 4, "what was read last stays"


async def test_logs_are_shown_as_text() -> None:
    grid = FakeGrid()
    app = grid.app()
    async with app.run_test(size=SIZE) as pilot:
        await wait_until(pilot, lambda: len(rows(app, "jobs")) == 3)
        await pilot.press("l")
        await wait_until(pilot, lambda: isinstance(app.screen, LogScreen))
        await wait_until(pilot, lambda: len(app.screen.query_one(RichLog).lines) == 3)
        lines = [row.text.rstrip() for row in app.screen.query_one(RichLog).lines]
        assert lines == ["first line é", r"sec\x1b[2Jond", "(the end)"]
        assert grid.did == [("read", 7)]
        await pilot.press("escape")
        await wait_until(pilot, lambda: not isinstance(app.screen, LogScreen))


async def test_cancel_and_top_up_ask_first() -> None:
    grid = FakeGrid()
    app = grid.app()
    async with app.run_test(size=SIZE) as pilot:
        await wait_until(pilot, lambda: len(rows(app, "jobs")) == 3)

        async def ask(key: str) -> None:
            await pilot.press(key)
            await wait_until(pilot, lambda: bool(app.screen.query(Input)))

        async def answer(key: str, text: str) -> None:
            await ask(key)
            assert isinstance(app.screen, AskScreen)
            app.screen.query_one(Input).value = text
            await pilot.press("enter")
            await wait_until(pilot, lambda: not isinstance(app.screen, AskScreen))
            await app.workers.wait_for_complete()

        await answer("c", "no")
        await answer("t", "much")
        assert grid.did == []
        await answer("c", "yes")
        await answer("t", "1.5")
        assert grid.did == [("cancel", 7), ("top up", 7, 15 * CREDIT // 10)]
        await ask("c")
        await pilot.press("escape")
        await wait_until(pilot, lambda: not isinstance(app.screen, AskScreen))
        await app.workers.wait_for_complete()
        assert len(grid.did) == 2
        await pilot.press("tab", "down")
        await wait_until(pilot, lambda: app._job() == 9)
        await answer("c", "y")
        assert grid.did[-1] == ("cancel", 9)
        assert any(
            "It has ended Look again." in notification.message
            for notification in app._notifications
        )


async def test_without_a_wallet_nothing_is_sent() -> None:
    grid = FakeGrid()
    app = grid.app(wallet=False)
    async with app.run_test(size=SIZE) as pilot:
        await wait_until(pilot, lambda: len(rows(app, "jobs")) == 3)
        await pilot.press("c", "t")
        await wait_until(pilot, lambda: len(app._notifications) == 2)
        assert not isinstance(app.screen, AskScreen)
        assert {notification.message for notification in app._notifications} == {
            "No wallet is open, so nothing can be sent."
        }
        await pilot.press("q")
    assert app.return_code == 0
