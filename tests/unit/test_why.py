"""Reasons why a job is delayed: each printed once, with the next step."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import pytest

from deepsquare_chain.cli import why
from deepsquare_chain.cli.why import JobSituation, Reason, ReasonPrinter
from deepsquare_chain.errors import EndpointError
from deepsquare_chain.job import JobStatus
from deepsquare_chain.metascheduler.eligibility import Refusal
from tests.unit.test_client import JOB

pytestmark = pytest.mark.unit


class FakeOnlooker:
    """Returns the given situations in turn."""

    def __init__(self, *situations: JobSituation | Exception) -> None:
        self.situations = list(situations)
        self.closed = False
        self.looked = asyncio.Event()

    def __call__(self, _contracts: object) -> FakeOnlooker:
        return self

    async def situation(self, _job: object) -> JobSituation:
        await asyncio.sleep(0)
        self.looked.set()
        pop = self.situations.pop(0)
        if isinstance(pop, Exception):
            raise pop
        return pop

    def __exit__(self, *_: object) -> None:
        self.closed = True


def situation_of(text: str, cause: Hashable) -> JobSituation:
    return JobSituation(JOB, text, cause=cause)


async def printed_lines(
    monkeypatch: pytest.MonkeyPatch, *situations: JobSituation | Exception
) -> list[str]:
    """Return the lines printed for these situations."""
    onlooker, lines = FakeOnlooker(*situations), []  # type: tuple[FakeOnlooker, list[str]]
    monkeypatch.setattr(why, "ExplainingScheduler", onlooker)
    contracts: Any = None
    async with ReasonPrinter(contracts, lines.append) as printer:
        for _ in situations:
            printer.start_explaining(JOB)
            printer.start_explaining(JOB)  # one read at a time
            assert not printer.idle
            await onlooker.looked.wait()
            await asyncio.sleep(0)
            onlooker.looked.clear()
    assert (onlooker.situations, onlooker.closed) == ([], True)
    return lines


async def test_a_cause_is_reported_once_whatever_its_numbers_say(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = await printed_lines(
        monkeypatch,
        situation_of("waits for 1 s", "capacity"),
        situation_of("waits for 2 s", "capacity"),
        situation_of("too expensive", "budget"),
        situation_of("waits for 9 s", "capacity"),
    )
    assert lines == ["waits for 1 s", "too expensive", "waits for 9 s"]


async def test_neither_a_failed_read_nor_an_unknown_reason_is_printed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = await printed_lines(
        monkeypatch,
        EndpointError("The node does not answer"),
        situation_of("job 1 is PENDING", None),
        situation_of("no provider is registered", ()),
    )
    assert lines == ["no provider is registered"]


@pytest.mark.parametrize("error", [EndpointError("replaced"), ZeroDivisionError("a defect")])
async def test_after_a_failed_read_a_new_snapshot_is_opened(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """State read before an error may be of a branch that was replaced."""
    onlookers = [FakeOnlooker(error), FakeOnlooker(situation_of("waits", "capacity"))]
    remaining = list(onlookers)
    monkeypatch.setattr(why, "ExplainingScheduler", lambda _contracts: remaining.pop(0))
    contracts: Any = None
    lines: list[str] = []
    async with asyncio.timeout(10), ReasonPrinter(contracts, lines.append) as printer:
        for item in onlookers:
            printer.start_explaining(JOB)
            await item.looked.wait()
            await asyncio.sleep(0)
            assert printer.idle
    assert (lines, [item.closed for item in onlookers]) == (["waits"], [True, True])


async def test_the_end_of_the_wait_ends_the_read(monkeypatch: pytest.MonkeyPatch) -> None:
    class HangingOnlooker(FakeOnlooker):
        async def situation(self, _job: object) -> JobSituation:
            await asyncio.Event().wait()
            raise AssertionError

    onlooker, lines = HangingOnlooker(), []  # type: tuple[HangingOnlooker, list[str]]
    monkeypatch.setattr(why, "ExplainingScheduler", onlooker)
    contracts: Any = None
    async with ReasonPrinter(contracts, lines.append) as printer:
        printer.start_explaining(JOB)
        await asyncio.sleep(0)
    assert (lines, onlooker.closed) == ([], True)


def test_nothing_is_opened_for_a_job_that_makes_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_contracts: object) -> None:
        raise AssertionError("looked")

    monkeypatch.setattr(why, "ExplainingScheduler", refuse)

    async def moves() -> None:
        contracts: Any = None
        async with ReasonPrinter(contracts, print):
            pass

    asyncio.run(moves())


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        (Reason(7, 1, ""), "deepsquare metascheduler run"),
        (
            Reason(7, None, "", refusals=(Refusal.TOO_LARGE, Refusal.BUDGET)),
            "deepsquare job topup 7",
        ),
        (
            Reason(7, None, "", refusals=(Refusal.TOO_LARGE, Refusal.LABELS)),
            "deepsquare quote FILE",
        ),
        (
            Reason(7, None, "", refusals=(Refusal.TOO_LARGE, Refusal.SILENT)),
            "continues automatically",
        ),
        (Reason(7, None, "", refusals=(Refusal.BUDGET, None)), "continues automatically"),
        (Reason(7, None, "", refusals=(Refusal.BANNED, Refusal.BANNED)), "continues automatically"),
        (Reason(7, None, "", refusals=(Refusal.BANNED, Refusal.LABELS)), "deepsquare quote FILE"),
        (Reason(7, None, ""), "continues automatically"),
    ],
)
def test_a_waiting_job_comes_with_advice(reason: Reason, message: str) -> None:
    advice = why._advice(reason)
    assert message in advice
    assert "`deepsquare job cancel 7` refunds all of its credits" in advice


def test_a_claimed_job_is_waited_for_and_an_unclaimed_one_comes_back() -> None:
    assigned = replace(JOB, status=JobStatus.META_SCHEDULED, provider_id=3)
    assert "if provider 3 does not claim it within 120 s" in why._claim_advice(assigned, 120)
    assert why._claim_advice(replace(assigned, status=JobStatus.SCHEDULED), 120) == ""


def test_the_text_has_the_reason_the_providers_and_the_next_step() -> None:
    job_situation = JobSituation(JOB, "job 1 waits", ("provider 1 rests",), "nothing")
    assert job_situation.words == "job 1 waits\n  provider 1 rests\nNext: nothing"
    assert replace(job_situation, details=(), advice="").words == "job 1 waits"
    assert replace(JOB, status=JobStatus.PENDING) == job_situation.job
