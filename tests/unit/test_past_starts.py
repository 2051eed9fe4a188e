"""Errors of forecasts, measured on past starts."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from deepsquare_chain.chain.bindings import events as ev
from deepsquare_chain.chain.follower import Batch
from deepsquare_chain.job import JobFlags, JobStatus, Objective, Resources, Terms
from deepsquare_chain.metascheduler import past_starts
from deepsquare_chain.metascheduler.forecast import Prospect, StartAccuracy
from deepsquare_chain.metascheduler.history import RunHistory
from deepsquare_chain.metascheduler.past_starts import MAX_STARTS, PROMPT_BLOCKS, PastStarts
from deepsquare_chain.metascheduler.policy import Rules
from tests.support.workloads import NOW, address, provider

pytestmark = pytest.mark.unit

CUSTOMER, PROVIDER = address(7), address(1)
RULES = Rules(start_margin=0)
PENDING, ASSIGNED, RUNNING = JobStatus.PENDING, JobStatus.META_SCHEDULED, JobStatus.RUNNING


def submitted(block: int, job_id: int, limit: int = 100, uses: str = "") -> ev.JobSubmitted:
    terms = Terms(
        10**18, limit, Resources(8, 1, 100, 0), 0, JobFlags.NONE, Objective.COST, "", uses
    )
    return ev.JobSubmitted(
        block_number=block, job_id=job_id, customer=CUSTOMER, definition=b"", terms=terms
    )


def moved(block: int, job_id: int, before: JobStatus, after: JobStatus) -> ev.JobTransition:
    return ev.JobTransition(
        block_number=block,
        job_id=job_id,
        customer=CUSTOMER,
        provider=PROVIDER,
        before=before,
        after=after,
    )


def run(job_id: int, start: int, end: int) -> list[ev.Event]:
    return [
        moved(start - 1, job_id, PENDING, ASSIGNED),
        moved(start, job_id, ASSIGNED, RUNNING),
        moved(end, job_id, RUNNING, JobStatus.FINISHED),
    ]


def feed(past: PastStarts, events: list[ev.Event]) -> None:
    """Apply events in batches of a block, with ten seconds between blocks."""
    for event in sorted(events, key=lambda event: event.block_number):
        block = event.block_number
        past.apply(Batch((event,), block, block, time=NOW + 10 * block))


def judged(events: list[ev.Event]) -> PastStarts:
    past = PastStarts()
    feed(past, events)
    past.judge([provider()], RULES, RunHistory())
    return past


def one_after_the_other(count: int, end: int = 8) -> list[ev.Event]:
    """Return jobs that need the whole provider; each is submitted when the one before starts."""
    events: list[ev.Event] = [submitted(1, 1)]
    for number in range(1, count + 1):
        begin = 2 + (number - 1) * end
        events += run(number, begin, begin + end - 1)
        events.append(submitted(begin, number + 1))
    return events


def test_it_compares_a_forecast_by_limits_with_the_actual_start() -> None:
    """Job 1 may run for 100 s, from block 2 on, but runs for 70: job 2 starts 20 s early."""
    accuracy = judged(one_after_the_other(2)).accuracy
    assert accuracy == StartAccuracy(1, 20, 20, 20 / 80)
    assert accuracy.text == (
        "for the last job that had to wait, the forecast would have been off by 20 s (25% of the wait)"
    )


def test_it_counts_the_latest_starts() -> None:
    accuracy = judged(one_after_the_other(MAX_STARTS + 5)).accuracy
    assert accuracy == StartAccuracy(MAX_STARTS, 20, 20, 20 / 80)
    assert accuracy.text == (
        f"for the last {MAX_STARTS} jobs that had to wait, forecasts would have been off by 20 s in "
        "the median (25% of the wait) and 20 s at the 90th percentile"
    )


def test_each_start_is_judged_once() -> None:
    past = judged(one_after_the_other(2))
    history = RunHistory()
    past.judge([provider(cpus=16)], RULES, history)
    assert past.accuracy == StartAccuracy(1, 20, 20, 20 / 80)


def test_the_error_is_shown_with_the_forecast() -> None:
    prospect = Prospect(NOW, 1, 1, None, 1.5, StartAccuracy(1, 20, 20, 0.25))
    assert prospect.reliability == (
        "for the last job that had to wait, the forecast would have been off by 20 s (25% of the "
        "wait); estimates of recent run times were off by a factor of 1.5 on average"
    )


def _prompt() -> list[ev.Event]:
    return [submitted(1, 1), *run(1, 1 + PROMPT_BLOCKS, 50)]


def _returned() -> list[ev.Event]:
    return [
        *one_after_the_other(1),
        moved(11, 2, PENDING, ASSIGNED),
        moved(12, 2, ASSIGNED, PENDING),
        *run(2, 20, 30),
    ]


def _retried() -> list[ev.Event]:
    events = one_after_the_other(1)
    retry = ev.JobRetried(block_number=9, job_id=1, successor=3, escrow=1)
    return [*events, retry, *run(3, 20, 30)]


def _dependent() -> list[ev.Event]:
    events = [event for event in one_after_the_other(1) if getattr(event, "job_id", 0) != 2]
    return [*events, submitted(3, 2, uses="deepsquare.afterany=1"), *run(2, 20, 30)]


def _without_earlier_jobs() -> list[ev.Event]:
    return [event for event in one_after_the_other(3) if getattr(event, "job_id", 0) != 1]


@pytest.mark.parametrize(
    "events",
    [_prompt, _returned, _retried, _dependent, _without_earlier_jobs],
    ids=lambda events: events.__name__,
)
def test_starts_that_are_not_judged(events: Callable[[], list[ev.Event]]) -> None:
    past = judged(events())
    assert past.accuracy is None
    assert not past.undated()


def test_times_of_blocks_are_requested() -> None:
    """A batch of many blocks only has the time of its last block."""
    past = PastStarts()
    events = sorted(one_after_the_other(2), key=lambda event: event.block_number)
    past.apply(Batch(tuple(events), 1, 30, time=NOW + 300))
    assert past.undated() == [2, 10]
    past.judge([provider()], RULES, RunHistory())
    assert past.accuracy is None
    past.date({2: NOW + 20, 10: NOW + 100})
    past.judge([provider()], RULES, RunHistory())
    assert past.accuracy == StartAccuracy(1, 20, 20, 20 / 80)
    assert not past.undated()


def test_a_reorganisation_removes_its_starts() -> None:
    events = one_after_the_other(3)
    past = judged(events)
    assert past.accuracy is not None
    assert past.accuracy.starts == 2
    past.apply(Batch((), 0, 0, rolled_back_to=17))
    assert past.accuracy == StartAccuracy(1, 20, 20, 20 / 80)
    feed(past, [event for event in events if event.block_number > 17])
    past.judge([provider()], RULES, RunHistory())
    assert past.accuracy == StartAccuracy(2, 20, 20, 20 / 80)


@pytest.mark.parametrize("limit", ["_MAX_JOBS", "_MAX_WORK"])
def test_the_work_is_bounded(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(past_starts, limit, 1)
    events = [*one_after_the_other(2), submitted(1, 4)]
    past = judged(events)
    assert past.accuracy is None
    assert not past.undated()
    monkeypatch.undo()
    assert judged(events).accuracy is not None
